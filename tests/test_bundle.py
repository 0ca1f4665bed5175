"""A bundle is whole or refused: round trip, one changed byte, foreign formats, cards that say too much or too little, scope."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deft_med import bundle
from deft_med.attribution import attribution, collections, readme
from deft_med.card import WEIGHTS, Card, out_of_scope, parse
from deft_med.errors import ModelError, OutputError, ResourceError, UsageError
from deft_med.htransform import HTransform
from deft_med.network import UNet
from deft_med.prior import Prior
from deft_med.volume import Scan
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles

ENTRY = {"file": "ct/train/a.nii.gz", "split": "train", "subject": "A", "slices": 3, "matrix": 256, "collection": "Some-Collection (TCIA)",
         "licence": "CC BY 3.0", "doi": "10.7937/ABC"}  # fmt: skip
CARD: dict[str, Any] = {
    "name": "small", "version": "0.1.0", "modality": "CT", "anatomy": ["chest", "head"],
    "window": {"offset": 0.0, "scale": 1000.0, "unit": "HU"}, "pixel_size_mm": [0.7, 2.2], "field_of_view_mm": [180, 560],
    "channels": 1, "sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 80.0,
    "prior": {"widths": [16, 24], "dim": 16}, "h": {"widths": [8, 8], "dim": 16, "residual": {"window": "hann"}},
    "protocols": [{"geometry": "parallel", "views": [18, 180], "coverage_deg": [90, 180], "gaussian_percent": [0.5, 8.0],
                   "photons": [5e3, 1e5]}],
    "training_data": [{"collection": "Some-Collection (TCIA)", "licence": "CC BY 3.0", "doi": "10.7937/ABC", "subjects": 1, "slices": 3}],
    "metrics": [{"name": "PSNR", "value": 30.0, "sd": 1.0, "n": 17, "data": "ct/val", "command": "python -m deft_med.benchmark"}],
    "configs": ["train/ct_prior.yaml"],
}  # fmt: skip


def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    prior, h = Prior(UNet(1, 1, (16, 24), scalars=1, dim=16)), HTransform(UNet(3, 1, (8, 8), scalars=3, dim=16))
    for module in (prior, h):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.05)
    return prior.state_dict(), h.state_dict()


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    bundle.save(tmp_path / "small", *states(), CARD, attribution([ENTRY]))
    return tmp_path / "small"


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CARD), **changes}


def scan(*, pixel: float = 1.0, size: int = 256, views: int = 60, coverage: float = np.pi, noise: Any = 0.035, fan: bool = False) -> Scan:
    angles = uniform_angles(views, coverage)
    beam = FanBeam(angles=angles, detectors=7, pitch=pixel, source_origin=600.0, origin_detector=400.0) if fan else None
    y = np.ones((2, views, 7), np.float32)
    grid = Grid(shape=(size, size), spacing=(pixel, pixel))
    level = None if noise is None else np.asarray(noise, np.float32)
    return Scan(y=y, acquisition=beam or ParallelBeam(angles=angles, detectors=7, pitch=pixel), grid=grid, noise=level)


# ---------------------------------------------------------------------------------------------------------------------- round trip


def test_round_trip_keeps_every_weight_to_float16(saved: Path) -> None:
    card, prior, h = bundle.load(saved)
    for before, after in zip(states(), (prior, h), strict=True):
        assert list(before) == list(after) or set(before) == set(after)
        assert all(torch.equal(before[k].half().float(), after[k]) for k in before)
    assert card.prior.parameters == sum(v.numel() for v in prior.values()) and card.h.parameters == sum(v.numel() for v in h.values())
    assert card.protocols[0].views == (18, 180) and card.h.residual == {"window": "hann"} and card.licence == "CC-BY-4.0"
    texts = {"ATTRIBUTION.md", "LICENSE", "README.md", "card.json", "metadata.json"}
    assert {p.name for p in saved.iterdir()} == texts | {"prior.safetensors", "h.safetensors"}
    assert "Some-Collection" in (saved / "ATTRIBUTION.md").read_text("utf-8") and "legalcode" in (saved / "LICENSE").read_text("utf-8")
    assert json.loads((saved / "metadata.json").read_text("utf-8"))["network_data_format"]["inputs"]["image"]["num_channels"] == 1
    assert "not a medical device" in (saved / "README.md").read_text("utf-8").lower()


def test_a_loaded_model_denoises_and_is_frozen(saved: Path) -> None:
    model = bundle.load_model(str(saved)).to("cpu")
    assert not any(p.requires_grad for p in model.deft.parameters()) and not model.deft.training
    x = model.deft.prior(torch.randn(1, 1, 10, 14), torch.tensor([2.0]))
    assert x.shape == (1, 1, 10, 14) and torch.isfinite(x).all()
    assert (model.window.scale, model.sigma_min, model.sigma_max, model.eta, model.trust) == (1000.0, 0.01, 80.0, 0.5, 0.2)


def test_a_bare_network_of_a_prior_is_accepted(tmp_path: Path) -> None:
    prior, h = states()
    bundle.save(tmp_path / "bare", {k.removeprefix("network."): v for k, v in prior.items()}, h, CARD, attribution([ENTRY]))
    assert set(bundle.load(tmp_path / "bare")[1]) == set(prior)


def test_saving_is_all_or_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, h = states()
    with pytest.raises(OutputError, match="exists already"):
        bundle.save(saved, prior, h, CARD, attribution([ENTRY]))
    before = (saved / "card.json").read_bytes()
    bundle.save(saved, prior, h, changed(version="0.2.0"), attribution([ENTRY]), overwrite=True)
    assert json.loads((saved / "card.json").read_bytes())["version"] == "0.2.0" and before != (saved / "card.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        bundle.save(saved.with_name("other"), prior, h, CARD, attribution([ENTRY]))
    assert [p.name for p in saved.parent.iterdir()] == ["small"]


def test_what_float16_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    prior, h = states()
    prior["network.outlet.bias"][0] = 1e6
    with pytest.raises(ModelError, match="float16 cannot hold"):
        bundle.save(tmp_path / "b", prior, h, CARD, attribution([ENTRY]))
    with pytest.raises(ModelError, match="attribution of its training data"):
        bundle.save(tmp_path / "b", *states(), CARD, " ")
    assert not (tmp_path / "b").exists()


# -------------------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["prior.safetensors", "h.safetensors"])
@pytest.mark.parametrize("where", [0, 1000, -1])
def test_one_changed_byte_is_refused(saved: Path, name: str, where: int) -> None:
    blob = bytearray((saved / name).read_bytes())
    blob[where] ^= 1
    (saved / name).write_bytes(blob)
    with pytest.raises(ModelError, match=f"{name} is not the file that its card describes") as error:
        bundle.load(saved)
    assert error.value.exit_code == 8


def rewrite(folder: Path, name: str, blob: bytes) -> None:
    """Replace a weight file together with its digest: what a careless or hostile hand would do."""
    (folder / name).write_bytes(blob)
    card = json.loads((folder / "card.json").read_text("utf-8"))
    card["sha256"][name] = hashlib.sha256(blob).hexdigest()
    (folder / "card.json").write_text(json.dumps(card), "utf-8")


def test_a_pickle_is_not_read(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, "prior.safetensors", pickle.dumps({"network.outlet.bias": [0.0]}))
    with pytest.raises(ModelError, match="no safetensors file"):
        bundle.load(saved)
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ModelError, match="pickles and other formats are not read"):
        bundle.load(tmp_path / "model.pt")


def test_missing_unknown_and_misshapen_weights_are_refused(saved: Path) -> None:
    from safetensors.torch import save

    prior, _ = states()
    for edit, message in (
        (lambda s: s.pop("network.outlet.bias"), "1 missing .first: network.outlet.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unknown .first: extra"),
        (lambda s: s.update({"network.outlet.bias": torch.zeros(5)}), "1 misshapen"),
    ):
        state = dict(prior)
        edit(state)
        rewrite(saved, "prior.safetensors", save(state))
        with pytest.raises(ModelError, match=message):
            bundle.load(saved)


def test_a_folder_that_is_no_bundle(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no readable card.json"):
        bundle.load(tmp_path / "empty")
    (saved / "h.safetensors").unlink()
    with pytest.raises(ModelError, match="no readable h.safetensors"):
        bundle.load(saved)
    with pytest.raises(UsageError, match="no model of that name"):
        bundle.load("no-such-model")


@pytest.mark.parametrize("edit, message", [
    (lambda c: c.update(surprise=1), "unknown key surprise"),
    (lambda c: c.pop("pixel_size_mm"), "missing key pixel_size_mm"),
    (lambda c: c.update(channels="one"), "channels wants int"),
    (lambda c: c.update(pixel_size_mm=[2.0, 1.0]), "pixel_size_mm wants 0 < low <= high"),
    (lambda c: c["protocols"][0].update(views=[0, 3]), r"protocols\[0\].views wants"),
    (lambda c: c.update(licence="unknown"), "licence wants CC-BY-4.0"),
    (lambda c: c["sha256"].pop("h.safetensors"), "sha256 wants one digest"),
    (lambda c: c.update(name="../evil"), "name wants lower-case"),
    (lambda c: c.update(sigma_min=100.0), "want to be positive"),
    (lambda c: c["prior"].update(widths=[]), "cannot be built"),
])  # fmt: skip
def test_a_card_that_is_not_one(saved: Path, edit: Any, message: str) -> None:
    card = json.loads((saved / "card.json").read_text("utf-8"))
    edit(card)
    (saved / "card.json").write_text(json.dumps(card), "utf-8")
    with pytest.raises(ModelError, match=message):
        bundle.load(saved)


def test_a_card_that_is_no_json() -> None:
    with pytest.raises(ModelError, match="no JSON"):
        parse(b"\x80\x04")


# --------------------------------------------------------------------------------------------------------------------------- scope


@pytest.fixture()
def card(saved: Path) -> Card:
    return bundle.load(saved)[0]


def test_a_scan_within_the_card(card: Card) -> None:
    assert bundle.check(card, scan()) == []
    assert bundle.check(card, scan(noise=None)) == []
    assert bundle.check(card, scan(pixel=0.862)) == []  # 221 mm: a head
    assert bundle.check(card, scan(coverage=2 * np.pi)) == []  # parallel rays of a full turn are those of half a turn twice
    assert bundle.check(card, scan(noise=[[[0.02]], [[0.06]]])) == []


@pytest.mark.parametrize("changes, message", [
    ({"pixel": 0.66, "size": 128}, "field of view 84.5 mm: the model accepts 180 to 560 mm"),
    ({"pixel": 0.66, "size": 300}, "pixel size 0.66 mm"),
    ({"pixel": 2.3, "size": 240}, "pixel size 2.3 mm"),
    ({"views": 12}, "number of views 12: the model accepts 18 to 180"),
    ({"coverage": np.pi / 3}, "angular coverage 60 degrees"),
    ({"noise": 0.2}, "noise 20 % of the mean line integral"),
    ({"noise": np.geomspace(0.005, 0.05, 60)[:, None]}, ""),
    ({"noise": np.geomspace(0.1, 1, 60)[:, None]}, "dose .* photons per ray"),
    ({"fan": True}, "fan acquisition: the model accepts parallel ones"),
])  # fmt: skip
def test_a_scan_outside_the_card(card: Card, changes: dict[str, Any], message: str) -> None:
    import re

    found = bundle.check(card, scan(**changes))
    assert any(re.search(message, line) for line in found) if message else not found


def test_modality_and_anatomy_count(card: Card) -> None:
    common: dict[str, Any] = {"pixel_size_mm": (1.0, 1.0), "field_of_view_mm": 256.0}
    assert out_of_scope(card, modality="CT", anatomy="HEAD", **common) == []
    assert out_of_scope(card, modality="MR", **common) == ["modality MR: the model accepts CT"]
    assert "anatomy knee" in out_of_scope(card, modality="CT", anatomy="KNEE", **common)[0]


# --------------------------------------------------------------------------------------------------------------------- attribution


def test_attribution_counts_subjects_not_files() -> None:
    entries = [ENTRY, {**ENTRY, "matrix": 512, "slices": 2}, {**ENTRY, "subject": "B", "slices": 5},
               {**ENTRY, "collection": "Other", "licence": "CC BY 4.0", "doi": "10.7937/XYZ"}]  # fmt: skip
    rows = collections(entries)
    assert [(r.collection, r.subjects, r.slices) for r in rows] == [("Other", 1, 3), ("Some-Collection (TCIA)", 2, 8)]
    text = attribution(entries)
    assert "https://doi.org/10.7937/XYZ" in text and "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)" in text
    assert "3 subjects" in text and "The Cancer Imaging Archive" in text


@pytest.mark.parametrize("changes, message", [
    ({"licence": ""}, "has no licence"),
    ({"licence": None}, "has no licence"),
    ({"licence": "CC BY-NC 4.0"}, "not known to permit redistribution"),
    ({"doi": ""}, "has no DOI"),
    ({"doi": "TCIA"}, "has no DOI"),
    ({"collection": ""}, "has no collection or source, or no subject"),
    ({"subject": ""}, "has no collection or source, or no subject"),
])  # fmt: skip
def test_a_training_file_without_a_licence_cannot_be_published(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        attribution([ENTRY, {**ENTRY, **changes}])


SOURCED = {"file": "mr/train/b.nii.gz", "shape": [9, 9, 9], "subject": "B", "source": "owner/some.repo head 1, (c) 2015 Someone",
           "licence": "BSD-2-Clause (repository), CC BY 4.0 (figshare)"}  # fmt: skip


def test_a_repository_is_credited_with_its_link_and_without_invented_numbers() -> None:
    entries = [SOURCED, {**SOURCED, "file": "mr/train/b2.nii.gz"}, {**SOURCED, "subject": "C", "slices": 4}, ENTRY]
    assert [(r.doi, r.subjects, r.slices) for r in collections(entries)] == [("10.7937/ABC", 1, 3), ("", 2, 0)]
    text = attribution(entries, "MR")
    assert "| owner/some.repo head 1, (c) 2015 Someone |" in text
    assert "| [github.com/owner/some.repo](https://github.com/owner/some.repo) | 2 | - |" in text
    assert "[BSD-2-Clause](https://spdx.org/licenses/BSD-2-Clause.html) (repository), [CC BY 4.0](https://creativecommons" in text
    assert "synthetic phase" in text and "Hounsfield" not in text and "notices of copyright" in text
    assert "Hounsfield" in attribution([ENTRY]) and "notices of copyright" not in attribution([ENTRY])
    assert "https://doi.org/10.5281/zenodo.1" in attribution([{**SOURCED, "source": "a hospital", "doi": "10.5281/zenodo.1"}])


@pytest.mark.parametrize("changes, message", [
    ({"source": "a hospital"}, "has no DOI"),
    ({"source": "n/a"}, "has no DOI"),
    ({"source": "Some-Collection (TCIA) 1"}, "has no DOI"),
    ({"collection": "Some-Collection (TCIA)"}, "has no DOI"),
    ({"doi": "soon"}, "has no DOI"),
    ({"licence": "MIT (noncommercial)"}, "not known to permit"),
    ({"licence": "MIT, CC BY-NC 4.0 (figshare)"}, "not known to permit"),
    ({"source": ""}, "has no collection or source"),
])  # fmt: skip
def test_a_source_that_cannot_be_found_or_shared_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        collections([{**SOURCED, **changes}])


def test_the_readme_of_an_mr_model_speaks_of_k_space() -> None:
    window = {"offset": 0.0, "scale": 1.0, "unit": "a.u."}
    protocol = {"acceleration": [2, 10], "coils": [1, 16], "noise_of_scale_percent": [0.3, 10]}
    text = readme(parse(changed(
        modality="MR", channels=2, window=window, protocols=[{"geometry": "cartesian", **protocol}, {"geometry": "trajectory"}],
        training_data=[dataclasses.asdict(row) for row in collections([SOURCED])], licence="CC-BY-4.0", deft_med="0.1.0",
        sha256=dict.fromkeys(WEIGHTS, "0" * 64))))
    assert "u = (" not in text and "of its k-space" in text and "Accepts non-Cartesian acquisitions." in text
    assert "Cartesian acquisitions, 1 to 16 coils, acceleration 2 to 10, noise 0.3 to 10 % of the image's scale." in text


def test_no_training_file_at_all() -> None:
    with pytest.raises(ModelError, match="no training file"):
        attribution([])


@pytest.mark.data
def test_every_training_file_of_the_development_data_has_a_licence(data_dir: Path) -> None:
    manifest = json.loads((data_dir / "ct_manifest.json").read_text("utf-8"))
    rows = collections(entry for entry in manifest if entry["split"] == "train")
    assert sum(r.subjects for r in rows) == 45
    manifest = json.loads((data_dir / "mr_manifest.json").read_text("utf-8"))
    rows = collections(entry for entry in manifest if entry["split"] == "train" and entry["subject"] != "UIH_B")
    assert sum(r.subjects for r in rows) == 6


# ---------------------------------------------------------------------------------------------------------------- what ships


def test_what_ships_is_whole_and_credited() -> None:
    for name in bundle.available():
        card = bundle.load(name)[0]
        text = (bundle.BUNDLES / name / "ATTRIBUTION.md").read_text("utf-8")
        assert card.name == name and card.training_data
        assert all(row.licence and row.doi in text for row in card.training_data)
        assert sum(p.stat().st_size for p in (bundle.BUNDLES / name).iterdir()) <= 15e6


def test_the_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.main(["list"]) == 0
    assert bundle.main(["card", str(saved)]) == 0 and '"name": "small"' in capsys.readouterr().out
    assert bundle.main(["show", str(saved)]) == 0 and capsys.readouterr().out == (saved / "README.md").read_text()
    assert bundle.main(["check", str(saved)]) == 0 and "small 0.1.0: whole" in capsys.readouterr().out
    assert bundle.main(["check", "nonsense"]) == 2 and bundle.main(["check"]) == 2
    assert "no model of that name" in capsys.readouterr().err
