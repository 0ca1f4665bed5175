"""The command as a user meets it: exit codes, one clear line, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
from bad_inputs import BAD_INPUTS, CANARY
from test_bundle import CARD, ENTRY, states

from deft_med import bundle, io
from deft_med.attribution import attribution
from deft_med.config import protocol
from deft_med.errors import OutputError
from deft_med.publish import check_target, published
from deft_med.reconstruct import _Bar, main, parser
from deft_med.simulate import simulate

CASES = sorted(BAD_INPUTS)


def fbp(*arguments: object) -> int:
    return main([*map(str, arguments), "--method", "fbp", "--quiet"])


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_its_code_and_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, code = BAD_INPUTS[name][:2]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    begun = time.monotonic()
    assert fbp(path, "--out", tmp_path / "out") == code
    assert time.monotonic() - begun < 10
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("deft_med: error: ")
    assert CANARY not in lines[0] and str(tmp_path) not in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_the_example_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["--example", "ct", "--method", "fbp", "--format", "both", "--out", str(out)]) == 0
    first, *_, last = capsys.readouterr().err.strip().splitlines()
    assert "retrospective study under ct_sparse60" in first and "SIMULATED" in first
    assert last.startswith("done in") and "report.html" in last
    assert {p.name for p in out.iterdir()} >= {"dicom", "dicom_fbp", "volume.nii.gz", "report.png", "report.html", "run.json"}
    record = json.loads((out / "run.json").read_text())
    assert record["provenance"]["simulated"] and record["provenance"]["protocol"] == "ct_sparse60"
    assert record["chi2"]["reference"] == pytest.approx(1, abs=0.05)
    series = pydicom.dcmread(next((out / "dicom").glob("*.dcm")))
    assert series.SeriesDescription.startswith("SIMULATED RESEARCH") and series.ImageType[3] == "SIMULATED"
    again = io.read(out / "dicom").volume
    source = io.read(io.example("ct")).volume
    assert again.shape == (1, 256, 256)
    for corner in ((-0.5, -0.5), (511.5, 511.5), (-0.5, 511.5)):  # corners of the field of view, in LPS mm
        there = source.affine @ [*corner, 0, 1]
        here = again.affine @ [(corner[0] + 0.5) / 2 - 0.5, (corner[1] + 0.5) / 2 - 0.5, 0, 1]
        assert np.abs(there - here).max() < 1e-3


def test_an_earlier_run_is_replaced_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert fbp("--example", "ct", "--out", out) == 0
    assert fbp("--example", "ct", "--out", out) == 7
    assert "--overwrite" in capsys.readouterr().err
    assert fbp("--example", "ct", "--out", out, "--overwrite") == 0
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.txt").write_text("mine")
    assert fbp("--example", "ct", "--out", strange, "--overwrite") == 7
    assert "not written by deft_med" in capsys.readouterr().err
    assert (strange / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("arguments", "code", "word"), [
    (["--example", "ct", "--method", "wavelet"], 2, "for CT: choose one of deft, deft-online, fbp, tv"),
    (["--example", "ct", "--threads", "0"], 2, "--threads is at least 1"),
    ([], 2, "give one INPUT"),
    (["--example", "ct", "also.dcm"], 2, "give one INPUT"),
    (["--example", "ct", "--protocol", "nonsense"], 2, "ct_sparse60"),
    (["--example", "ct", "--method", "deft", "--model", "nonsense"], 2, "no model of that name"),
    (["--example", "ct", "--method", "deft", "--samples", "0"], 2, "at least 1"),
    (["--example", "ct", "--method", "deft", "--steps", "-3"], 2, "at least 1"),
    (["--example", "ct", "--device", "toaster"], 2, "device"),
])
def test_usage_errors(arguments: list[str], code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    method = [] if "--method" in arguments else ["--method", "fbp"]
    assert main([*arguments, *method, "--quiet", "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert word in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_some_slices_of_a_volume(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = np.zeros((40, 40, 6), np.float32) - 1000
    data[8:32, 8:32] = np.arange(6, dtype=np.float32) * 10
    nibabel.save(nibabel.Nifti1Image(data, np.diag([6.0, 6.0, 5.0, 1.0])), tmp_path / "body.nii.gz")
    whole, some = tmp_path / "whole", tmp_path / "some"
    assert fbp(tmp_path / "body.nii.gz", "--modality", "CT", "--out", whole) == 0
    more = ["--modality", "CT", "--slices", "3:4", "--method", "fbp", "--steps", "9"]
    assert main([str(tmp_path / "body.nii.gz"), *more, "--out", str(some)]) == 0
    assert "has no say here: --steps" in capsys.readouterr().err
    one, two = (nibabel.load(out / "volume.nii.gz") for out in (whole, some))
    assert two.shape[2] == 2 and np.allclose(two.affine[:3, 3], (one.affine @ [0, 0, 2, 1])[:3])
    assert json.loads((some / "run.json").read_text())["provenance"]["slices"] == "3:4"
    for text in ("0", "3:2", "5:7", "a", "-1", "3:", "\u00b2"):
        assert fbp(tmp_path / "body.nii.gz", "--modality", "CT", f"--slices={text}", "--out", tmp_path / "no") == 2
        assert "--slices wants A or A:B between 1 and 6" in capsys.readouterr().err


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = iter([0.0, 20.0, 70.0, 100.0, 140.0])
    monkeypatch.setattr(sys.modules[main.__module__], "time", SimpleNamespace(perf_counter=lambda: next(now)))
    bar = _Bar(said.append, terminal=False)
    for done in (1, 2, 3, 4):
        bar(done, 8)
    assert said == ["25 % of 8 evaluations, about 4 min left", "50 % of 8 evaluations, about 2 min left"]


def test_help_is_quick_and_light() -> None:
    code = ("import sys; from deft_med.reconstruct import parser; parser().format_help(); "
            "print([m for m in ('torch', 'monai', 'numpy', 'pydicom', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_prepared_empty_folder_stays_the_folder_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o751)
    before = out.stat()
    monkeypatch.chdir(out)
    with pytest.raises(RuntimeError, match="half"), published(Path(".")) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("half")
    assert not list(out.iterdir())
    assert fbp("--example", "ct", "--out", ".") == 0
    after = out.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and (out / "run.json").is_file()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_who_stops_listening_does_not_lose_the_result(tmp_path: Path) -> None:
    command = f"{sys.executable} -m deft_med.reconstruct --example ct --method fbp --json --out {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} 2>&1 | true"], check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "run.json").is_file()


def test_a_file_in_the_way_and_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not written by deft_med"):
        check_target(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        check_target(tmp_path / "file", overwrite=False)
    with pytest.raises(OutputError, match="cannot be written"):
        check_target(tmp_path / "file" / "out", overwrite=False)


def test_nothing_is_left_when_publishing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), published(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []
    with published(tmp_path / "out") as folder:
        (folder / "run.json").write_text("{}")
    with published(tmp_path / "out", overwrite=True) as folder:
        (folder / "run.json").write_text("[]")
    assert (tmp_path / "out" / "run.json").read_text() == "[]"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_phantom_with_a_cross_check(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["--example", "mr", "--method", "cg-sense", "--cross-check", "--phase", "--out", str(out)]) == 0
    assert (out / "volume_phase.nii.gz").is_file()
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert "held-out error" in last and "(zero-filled" in last and "nothing" not in last
    provenance = json.loads((out / "run.json").read_text())["provenance"]
    assert provenance["method"] == "cg-sense" and "samples" not in provenance
    assert set(json.loads((out / "run.json").read_text())["cross_check"]["methods"]) == {"zero-filled", "cg-sense"}


@pytest.fixture()
def chest(tmp_path: Path) -> Path:
    """A small untrained model of chests, calibrated on the small protocol: no sample of its agrees with a measurement."""
    one = {"factor": 1.4, "coverage_raw": 0.8, "coverage": 0.9, "chi2_99": 1.1, "samples": 2, "subjects": 3, "slices": 9, "command": "c"}
    card = {**CARD, "anatomy": ["chest"], "calibration": {"small": one}}
    bundle.save(tmp_path / "chest", *states(), card, attribution([ENTRY]))
    (tmp_path / "small.yaml").write_text("views: 24\nnoise: {gaussian_percent: 3.5}\ngrid: 128\n")
    return tmp_path / "chest"


def deft(model: Path, *arguments: object) -> int:
    """Two quick samples, from the folder that the model's protocol lies in."""
    return main(["--protocol", str(model.parent / "small.yaml"), "--model", str(model), "--samples", "2", "--steps", "2", "--device", "cpu",
                 *map(str, arguments)])


def scanned(part: str, folder: Path, mm: float = 0.431) -> Path:
    """The example head as a file that names another part of the body, or another pixel size."""
    ds = pydicom.dcmread(io.example("ct"))
    ds.BodyPartExamined, ds.PixelSpacing = part, [f"{mm:.4f}"] * 2
    ds.save_as(folder / f"{part}.dcm")
    return folder / f"{part}.dcm"


def test_a_head_or_another_pixel_size_is_refused_by_a_card_of_chests(chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert deft(chest, scanned("HEAD", tmp_path), "--quiet", "--out", out) == 8
    line = capsys.readouterr().err
    assert "anatomy head: the model accepts chest" in line and "--out-of-scope-ok" in line and len(line.splitlines()) == 1
    assert deft(chest, scanned("CHEST", tmp_path, mm=0.8), "--quiet", "--out", out) == 8
    assert "pixel size 3.2 mm: the model accepts 0.7 to 2.2 mm" in capsys.readouterr().err
    assert not out.exists()


def test_what_contradicts_the_data_is_written_marked_and_ends_with_9(chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A head that passes for a chest: the card cannot know, chi2 can."""
    out, source = tmp_path / "out", scanned("CHEST", tmp_path)
    assert deft(chest, source, "--format", "both", "--out", out) == 9
    *_, done, error = capsys.readouterr().err.strip().splitlines()
    assert done.startswith("done in") and "expected 1 +- 0.0" in done and "(samples)" in done and "(FBP)" in done
    assert error.startswith("deft_med: error: quality check failed: chi2 of the samples is up to") and "--quality-ok" in error
    record = json.loads((out / "run.json").read_text())
    assert record["provenance"]["quality"] == "failed" and any("above 1.1, the highest of 9 slices of" in w for w in record["warnings"])
    assert record["trust"]["quality"]["above"] == [1] and record["trust"]["quality"]["chi2"][0] > 2 and record["trust"]["prior"]["rms"] > 0
    assert set(record["profile"]) == {"prior", "h", "operators", "rest"}
    assert "CHECK FAILED" in (out / "report.html").read_text("utf-8")
    for name, marked in (("dicom", True), ("dicom_std", True), ("dicom_fbp", False)):
        series = pydicom.dcmread(next((out / name).glob("*.dcm")))
        assert ("CHECK FAILED" in series.SeriesDescription) is marked is ("QUALITY CHECK FAILED" in series.DerivationDescription)
        assert series.SeriesDescription.startswith("SIMULATED RESEARCH")
    assert "the 90 % interval is the image +-" in pydicom.dcmread(next((out / "dicom_std").glob("*.dcm"))).DerivationDescription
    half, std = (io.read(out / f"volume_{name}.nii.gz").volume.data for name in ("interval", "std"))
    assert record["trust"]["interval"]["calibrated_on"] == "small"
    assert np.allclose(half, record["trust"]["interval"]["half_width_in_std"] * std, rtol=1e-4)
    assert deft(chest, source, "--quality-ok", "--quiet", "--overwrite", "--out", out) == 0
    assert json.loads((out / "run.json").read_text())["provenance"]["quality"] == "failed", "the flag changes the code alone"


def test_the_help_says_what_9_is() -> None:
    text = parser().format_help()
    assert "9 done, but chi2" in text and "--quality-ok" in text


@pytest.mark.slow
@pytest.mark.parametrize("wait", [1.0, 4.0, 12.0])  # among the imports, at the simulation, among the samples
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(number: int, code: int, wait: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deft_med.reconstruct", "--example", "ct", "--samples", "50", "--out", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
    time.sleep(wait)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code and b"nothing was written" in error
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("Doe^John")

    monkeypatch.setattr("deft_med.pipeline.reconstruct", broken)
    assert fbp("--example", "ct", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "unexpected ValueError in test_command.py, line" in error and "Doe" not in error and len(error.strip().splitlines()) == 1
    monkeypatch.setenv("DEFT_MED_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Doe"):
        fbp("--example", "ct", "--out", tmp_path / "out")


OTHERS = "ct_sparse60 ct_sparse23 ct_sparse18 ct_low_dose ct_missing_wedge".split()


@pytest.mark.parametrize("name", ["ct_limited_angle", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_acquisitions_of_the_shipped_model_are_in_its_scope(name: str) -> None:
    card, volume = bundle.load("ct")[0], io.read(io.example("ct")).volume
    assert bundle.check(card, simulate(volume, protocol(name), seed=0), anatomy="head") == []
