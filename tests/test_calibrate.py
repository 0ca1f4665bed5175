"""Calibration: the factor of a known error, resuming, the card, and what is made of it; with a small untrained model."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.special import stdtr, stdtrit
from test_bundle import CARD, ENTRY, states
from test_pipeline import head

from deft_med import bundle, calibrate, export
from deft_med.attribution import attribution
from deft_med.card import Calibration, parse
from deft_med.errors import ModelError, OutputError, UsageError
from deft_med.metrics import LEVEL, misses
from deft_med.trust import judge, verdict, worth

ONE: dict[str, Any] = {"factor": 1.3, "coverage_raw": 0.8, "coverage": 0.9, "chi2_99": 1.1, "samples": 8, "subjects": 3, "slices": 9,
                       "command": "python -m deft_med.calibrate DATA", "level": 0.9}
SETTINGS = {"samples": 4}


def record(subject: str, slice: int, *, protocol: str = "p", spread: float = 1.0, chi2: float = 1.0, seed: int = 0) -> dict:
    """What `measure` keeps of a slice whose samples have `spread` times the spread of the truth."""
    draws = np.random.default_rng([seed, slice, ord(subject[0])]).normal(size=(5, 40_000))
    missed = misses(draws[:4].mean(0), spread * draws[:4].std(0, ddof=1), 4, draws[4])
    quantiles = np.quantile(missed, (np.arange(calibrate.POINTS) + 0.5) / calibrate.POINTS, method="inverted_cdf")
    return {"protocol": protocol, "subject": subject, "slice": slice, "settings": SETTINGS, "chi2": chi2, "misses": quantiles.tolist(),
            "ranks": [0.2] * 5}


# ------------------------------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("spread, factor", [(1.0, 1.0), (0.5, 2.0)])
def test_the_factor_of_a_known_error_is_found(spread: float, factor: float) -> None:
    found = calibrate.summarised([record("a", k, spread=spread) for k in range(3)] + [record("b", 0, spread=spread)])["calibration"]["p"]
    assert found["factor"] == pytest.approx(factor, rel=0.02) and found["coverage"] == pytest.approx(0.9, abs=0.005)
    assert found["coverage_raw"] == pytest.approx(2 * stdtr(3, spread * stdtrit(3, 0.95)) - 1, abs=0.005)
    assert (found["subjects"], found["slices"], found["samples"], found["level"]) == (2, 4, 4, LEVEL)


def test_subjects_weigh_alike_and_coverage_is_of_subjects_who_were_left_out() -> None:
    many = [record("a", k, spread=1.0) for k in range(6)] + [record("b", 0, spread=0.25)]
    swapped = [record("a", 0, spread=1.0)] + [record("b", k, spread=0.25) for k in range(6)]
    factors = [calibrate.summarised(rows)["calibration"]["p"]["factor"] for rows in (many, swapped)]
    assert factors[0] == pytest.approx(factors[1], rel=0.02) and 1.5 < factors[0] < 3
    left_out = calibrate.summarised(many)["calibration"]["p"]["coverage"]
    assert left_out < 0.75, "each with the other's factor: 1 for the narrow one, 4 for the true one"
    assert calibrate.summarised(many[:6])["calibration"]["p"]["coverage"] == pytest.approx(0.9, abs=0.002)


def test_protocols_are_kept_apart_and_all_is_over_both() -> None:
    rows = [record("a", k, protocol=p, spread=s, chi2=c + k / 100) for p, s, c in (("p", 1.0, 1.0), ("q", 0.5, 1.5)) for k in range(3)]
    found = calibrate.summarised(rows, "calibrate --protocol {}")
    factors = {name: one["factor"] for name, one in found["calibration"].items()}
    assert factors["p"] == pytest.approx(1, rel=0.02) and factors["q"] == pytest.approx(2, rel=0.02) and 1.2 < factors["all"] < 1.9
    assert found["calibration"]["p"]["chi2_99"] == 1.02 and found["chi2"]["all"]["99"] == 1.52 and found["chi2"]["p"]["50"] == 1.01
    assert found["calibration"]["all"]["command"] == "calibrate --protocol p,q" and found["calibration"]["all"]["slices"] == 3
    assert "| q | 2.0" in calibrate.table(found)
    with pytest.raises(UsageError, match="no slice holds a body"):
        calibrate.summarised([{**rows[0], "misses": None}])


# -------------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    bundle.save(folder / "model", *states(), CARD, attribution([ENTRY]))
    for subject, slices in (("a", 2), ("b", 1)):
        (folder / "scans" / subject).mkdir(parents=True)
        data = head(slices).data.transpose(2, 1, 0)
        nib.save(nib.Nifti1Image(data, np.diag([-4.0, -4.0, 5.0, 1.0])), folder / "scans" / subject / "scan.nii.gz")
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(f"views: {12 if name == 'one' else 20}\nnoise: {{gaussian_percent: 3.5}}\ngrid: 48\n")
    return folder


def command(made: Path, *more: str, protocol: str = "one", out: str = "found.json") -> int:
    names = ",".join(str(made / f"{name}.yaml") for name in protocol.split(","))
    return calibrate.main([str(made / "scans"), "--protocol", names, "--model", str(made / "model"), "--samples", "3", "--steps", "3",
                           "--slices", "2", "--device", "cpu", "--out", str(made / out), *more])


def test_it_measures_resumes_and_grows(made: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(made) == 0
    assert "| one |" in capsys.readouterr().out
    first = json.loads((made / "found.json").read_text())
    assert len(first["records"]) == 3 and set(first["calibration"]) == {"one"}
    one = first["calibration"]["one"]
    assert (one["subjects"], one["slices"], one["samples"]) == (2, 3, 3) and str(made) not in one["command"]
    assert sum(first["ranks"]["one"]) == pytest.approx(1, abs=1e-3) and len(first["ranks"]["one"]) == 4
    measured, measure = [], calibrate.measure
    monkeypatch.setattr(calibrate, "measure", lambda *a, **k: measured.append(a[1].name) or measure(*a, **k))
    assert command(made, protocol="one,two") == 0 and measured == ["two"] * 3
    grown = json.loads((made / "found.json").read_text())
    assert set(grown["calibration"]) == {"one", "two", "all"} and grown["calibration"]["one"]["factor"] == one["factor"]
    assert command(made, "--seed", "1", "--subjects", "1") == 0 and measured[3:] == ["one"] * 2, "other settings are measured afresh"


def test_a_calibration_goes_on_the_card_and_leaves_the_weights(made: Path) -> None:
    folder = made / "model"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert command(made, "--into", str(folder), out="into.json") == 0
    found = json.loads((made / "into.json").read_text())["calibration"]
    card = bundle.load(folder)[0]
    assert dataclasses.asdict(card.calibration["one"]) == found["one"] and set(card.calibration) == {"one"}
    changed = {p.name for p in folder.iterdir() if p.read_bytes() != before.get(p.name)}
    assert changed <= {"card.json", "README.md"} and set(before) == {p.name for p in folder.iterdir()}
    assert dataclasses.replace(card, calibration={}) == parse(before["card.json"])
    assert export.calibrated(made / "into.json") == found
    again = bundle.recalibrate(folder, {"two": ONE})
    assert set(again.calibration) == {"one", "two"} and again == bundle.load(folder)[0]
    readme = (folder / "README.md").read_text("utf-8")
    assert "| two | 1.3 | 80.0% | 90.0% | 90% | 1.1 | 3, 9 | `python -m deft_med.calibrate DATA` |" in readme


def test_the_factor_of_the_card_is_tried_beside() -> None:
    card = types.SimpleNamespace(calibrated=lambda name: ("p", Calibration(**ONE)) if name == "p" else ("", None))
    found = calibrate.summarised([record(subject, 0, spread=1 / ONE["factor"]) for subject in "abc"], card=card)
    assert found["card"]["p"]["factor"] == ONE["factor"] and found["card"]["p"]["coverage"] == pytest.approx(0.9, abs=0.01)
    assert set(found["card"]) == {"p"}, "one protocol does not speak for others"
    assert "0.90" in calibrate.table(found)


def test_what_is_measured_is_what_is_published(made: Path) -> None:
    from deft_med.config import protocol
    from deft_med.metrics import body_mask
    from deft_med.pipeline import reconstruct
    from deft_med.simulate import simulate

    model, rule = bundle.load_model(made / "model"), protocol(made / "one.yaml")
    volume = head(1)
    scan = simulate(volume, rule, seed=3)
    result = reconstruct(scan, model, samples=3, steps=3, seed=3, device="cpu")
    found = calibrate.measure(volume, rule, model, seed=3, samples=3, steps=3)
    assert found["chi2"] == pytest.approx(result.chi2["samples"], rel=1e-5)
    missed = misses(result.volume.data, result.std.data, 3, scan.reference.data, mask=body_mask(scan.reference.data))
    assert np.median(found["misses"]) == pytest.approx(np.median(missed), rel=0.02)
    thin = dataclasses.replace(volume, data=np.full_like(volume.data, -700))
    with torch.no_grad():
        assert calibrate.measure(thin, rule, model, seed=3, samples=2, steps=2)["misses"] is None


@pytest.mark.parametrize("more, word", [
    (["--samples", "1"], "at least 2"), (["--only", "nothing"], "no image is left"), (["--into", "ct"], "other weights"),
    (["--protocol", "ct_sparse60,mri_cartesian_4x"], "of MR"), (["--protocol", "mri_cartesian_4x"], "the model is for CT"),
    (["--out", "no.json"], "did not write"),
])
def test_usage(made: Path, more: list[str], word: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    (made / "no.json").write_text("{}")
    if "ct" in more and "ct" not in bundle.available():
        pytest.skip("no model ships")
    assert command(made, *more) == 2
    assert word in capsys.readouterr().err


def test_what_cannot_be_written_and_what_is_no_calibration(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        calibrate.written(tmp_path / "file" / "x.json", {})
    with pytest.raises(UsageError, match="wants the JSON file that deft_med.calibrate wrote"):
        export.calibrated(tmp_path / "file")
    with pytest.raises(UsageError, match="folder of a bundle"):
        bundle.recalibrate(tmp_path / "file", {})
    for wrong, word in (({"factor": 0}, "calibration is not valid"), ({"samples": 1}, "calibration is not valid"),
                        ({"surprise": 1}, "unknown key surprise")):
        with pytest.raises(ModelError, match=word):
            bundle.recalibrate(made / "model", {"p": {**ONE, **wrong}})
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(OutputError, match="copy it to a writable one"):
        bundle.recalibrate(made / "model", {"p": ONE})


# ----------------------------------------------------------------------------------------------------------------- what is said of it


def test_a_check_fails_more_often_than_chance_or_at_one_gross_slice() -> None:
    blank = {"sha256": {f"{n}.safetensors": "0" * 64 for n in ("prior", "h")}, "licence": "CC-BY-4.0", "deft_med": "0"}
    card = parse({**CARD, **blank, "calibration": {"p": ONE}})

    def check(chi2: list[float], protocol: str | None = "p") -> str | None:
        return judge(chi2, "samples", card.calibration.get(protocol or ""), 0.03)["check"]

    def said(chi2: list[float]) -> str:
        return verdict(judge(chi2, "samples", card.calibration["p"]), "p")

    assert check([1.0]) == "passed" and check([1.11]) == "failed" and check([float("nan")]) == "failed"
    assert check([1.11] + [1.0] * 11) == "passed", "one of twelve is chance in one run of ten"
    assert check([1.11, 1.12] + [1.0] * 10) == "failed" and check([2.5] + [1.0] * 99) == "failed"
    assert check([1.24] + [1.0] * 11) == "passed" and check([1.26] + [1.0] * 11) == "failed", "five deviations are no chance"
    assert [judge([value], "samples", card.calibration["p"], 0.1)["check"] for value in (1.15, 1.24)] == ["passed", "failed"]
    alone = parse({**CARD, **blank, "calibration": {"p": {**ONE, "subjects": 2}}}).calibration["p"]
    assert [judge([value], "samples", alone)["check"] for value in (1.9, 2.1)] == ["passed", "failed"], "two people are no limit for others"
    assert [check([value], "other") for value in (1.9, 2.1)] == ["passed", "failed"], "where no card knows the limit is two"
    assert [judge([value], "tv")["check"] for value in (2.9, 3.1)] == ["passed", "failed"], "three of what is no sample"
    assert [judge([9.0], of)["check"] for of in ("fbp", "zero-filled", "tv", "mean")] == ["not checked"] * 2 + ["failed"] * 2
    assert said([1.0, 1.2]).startswith("chi2 of the samples is up to 1.2 in slice 2 (1 of 2), above 1.1,")
    assert "and 12 more (20 of 20)" in said([1.2] * 20) and said([1.0]) == ""
    assert verdict(judge([4.0], "wavelet", first=7), None).startswith("chi2 of wavelet is up to 4 in slice 7 (1 of 1), above 3, which")
    assert parse({**CARD, **blank}).calibrated("p") == ("", None) and card.calibrated(None) == ("", None)
    everywhere = parse({**CARD, **blank, "calibration": {"p": ONE, "all": {**ONE, "factor": 2.0}}})
    assert everywhere.calibrated("q") == ("all", Calibration(**{**ONE, "factor": 2.0})) and everywhere.calibrated("p")[0] == "p"
    said = {"calibrated_on": "all", "samples": 8, "calibrated_with_samples": 8}
    assert worth(said) == "calibrated on several other protocols" and worth({"calibrated_on": None}) == "not calibrated"
