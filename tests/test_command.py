"""The command as a user meets it: exit codes, one clear line, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from bad_inputs import BAD_INPUTS, CANARY

from deft_med import io
from deft_med.errors import OutputError
from deft_med.publish import check_target, published
from deft_med.reconstruct import main

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
    (["--example", "ct", "--method", "wavelet"], 2, "for CT: choose one of deft, fbp, tv"),
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


def test_help_is_quick_and_light() -> None:
    code = ("import sys; from deft_med.reconstruct import parser; parser().format_help(); "
            "print([m for m in ('torch', 'monai', 'numpy', 'pydicom', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


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
    assert main(["--example", "mr", "--method", "cg-sense", "--cross-check", "--out", str(out)]) == 0
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert "held-out error" in last and "(zero-filled" in last and "nothing" not in last
    provenance = json.loads((out / "run.json").read_text())["provenance"]
    assert provenance["method"] == "cg-sense" and "samples" not in provenance
    assert set(json.loads((out / "run.json").read_text())["cross_check"]["methods"]) == {"zero-filled", "cg-sense"}


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
