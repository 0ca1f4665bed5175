"""The table: rows are reused only for the same settings, subjects count once, and a bundle comes out of two trainings."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import save_file
from test_pipeline import head

from deft_med import benchmark, bundle, export, scores
from deft_med.errors import UsageError
from deft_med.kinds import bare
from deft_med.kinds import trained as load_trained
from deft_med.study import digest
from deft_med.subjects import entries, pool


@pytest.fixture()
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    for subject, slices in (("a", 2), ("b", 1)):
        (folder / subject).mkdir(parents=True)
        data = head(slices).data.transpose(2, 1, 0)
        nib.save(nib.Nifti1Image(data, np.diag([-4.0, -4.0, 5.0, 1.0])), folder / subject / "scan.nii.gz")
    (tmp_path / "small.yaml").write_text("views: 12\nnoise: {gaussian_percent: 3.5}\ngrid: 48\n")
    return folder


def test_a_table_is_measured_once_and_counts_subjects(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    methods = ["--methods", "fbp:ram-lak,fbp:hann:0.7", "--out", str(tmp_path / "out")]
    command = [str(scans), "--protocol", str(tmp_path / "small.yaml"), *methods]
    assert benchmark.main(command) == 0
    first = capsys.readouterr().out
    assert "2 subjects, 3 slices" in first and "| fbp:hann:0.7 | 2 / 3 |" in first
    count = len((tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert count == 6 and {f.name for f in (tmp_path / "out").iterdir()} >= {"table.md", "table.json", "quality.png"}
    assert benchmark.main(command) == 0
    assert capsys.readouterr().out == first
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == count
    assert benchmark.main([*command[:-4], "--methods", "magic", "--out", str(tmp_path / "other")]) == 2
    assert "unknown method" in capsys.readouterr().err


def test_subjects_weigh_alike_and_missing_numbers_are_left_out() -> None:
    rows = [{"subject": s, "slice": k, "method": "m", "converged": k != 1, **dict.fromkeys(scores.NUMBERS, value)}
            for s, k, value in (("a", 0, 10.0), ("a", 1, 20.0), ("b", 0, 30.0))]
    rows[2]["psnr_body"] = None
    found = scores.summary(rows, ["m", "unused"], "m")
    line = scores.table(found, "CT", "m").splitlines()[2]
    assert line.startswith("| m (1 not converged) | 2 / 3 | 22.50 ± 10.61 |") and "| 15.00 |" in line and len(found) == 1
    assert digest(0, "a", 1) != digest(0, "b", 1) != digest(1, "b", 1)


def test_folders_become_one_pool_split_by_subject(scans: Path, tmp_path: Path) -> None:
    listed = entries(scans)
    assert [e["subject"] for e in listed] == ["a", "b"]
    made = pool(listed)
    assert made.images[256].shape == (3, 256, 256) and made.subject[256].tolist() == [0, 0, 1]
    assert made.spacing[256].tolist() == [4.0] * 3 and int(made.images[256].min()) == -1000
    assert int(made.images[256][0, 128, 116]) == 40  # rows and columns as DICOM has them, HU as they are
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps([{"file": "a/scan.nii.gz", "subject": "a", "split": s} for s in ("train", "tune")]))
    with pytest.raises(UsageError, match="split by subject"):
        entries(scans, manifest)
    with pytest.raises(UsageError, match="no images found"):
        entries(_empty(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        entries(tmp_path / "nowhere")


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_two_trainings_become_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shape = "network: {widths: [8, 8], dim: 16}\nrecipe: {stages: [{steps: 1, size: 64, batch: 1}]}\n"
    for name, text in (("prior", "kind: prior\n"), ("h", "kind: htransform\nprior: prior\nfilter: ram-lak\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text + shape)
        from deft_med.config import load
        from deft_med.kinds import Training

        save_file(bare(load(tmp_path / name / "config.yaml", Training)).state_dict(), tmp_path / name / "best.safetensors")
    entry = {"file": "a.nii.gz", "split": "train", "subject": "a", "slices": 1, "matrix": 256, "collection": "C", "licence": "CC BY 4.0",
             "doi": "10.7937/ABC"}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    command = [str(tmp_path / "prior"), str(tmp_path / "h"), "--card", "ct", "--manifest", str(tmp_path / "manifest.json"), "--out"]
    assert export.main([*command, str(tmp_path / "model")]) == 0
    model = bundle.load_model(tmp_path / "model")
    assert model.filter == "ram-lak" and model.card.training_data[0].doi == "10.7937/ABC"
    (tmp_path / "manifest.json").write_text(json.dumps([{**entry, "licence": ""}]))
    assert export.main([*command, str(tmp_path / "other")]) == 8
    assert export.main([command[1], command[0], *command[2:], str(tmp_path / "other")]) == 2
    assert "a bundle is a prior and an htransform" in capsys.readouterr().err
    with pytest.raises(UsageError, match="train nothing first"):
        load_trained(tmp_path / "nothing")
