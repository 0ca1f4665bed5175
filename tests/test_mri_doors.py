"""MR files through the command: two layouts of one measurement, what stands in the first line, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from bad_inputs import BAD_INPUTS, CANARY, RADIAL, fastmri, mr_header, mrd, mrd_readouts, npy, radial_readouts
from mri_phantom import closed_form, grid_points, picture

from deft_med import io
from deft_med.phantom import mr_phantom
from deft_med.reconstruct import main

ismrmrd = pytest.importorskip("ismrmrd", reason="the MRD files of these tests are written by the public ismrmrd package")

PICTURE = (96, 96)
FULL = (192, 96)  # the readout is sampled over twice the picture's field of view
PIXEL = 1.6
LINES = np.isin(np.arange(96), [*range(0, 96, 3), *range(38, 58)])


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    """The lopsided phantom from its closed form, 6 coils, with noise; [slice, coil, readout, phase]; a third of the lines."""
    y = closed_form(grid_points(FULL), PICTURE, coils=6).reshape(1, 6, *FULL) / 2**0.5
    rng = np.random.default_rng(0)
    y = y + 0.02 * (rng.standard_normal(y.shape) + 1j * rng.standard_normal(y.shape))
    return (y * LINES).astype(np.complex64)


def as_fastmri(folder: Path, y: np.ndarray) -> Path:
    return fastmri(folder, kspace=y, mask=LINES, ismrmrd_header=mr_header(*FULL, picture=PICTURE, pixel=PIXEL), reconstruction_rss=None)


def as_mrd(folder: Path, y: np.ndarray) -> Path:
    """Axial: rows, the readout, run to the back and columns to the left, as the picture of a file without a place is shown."""
    place = dict(read_dir=(0, 1.0, 0), phase_dir=(1.0, 0, 0), slice_dir=(0, 0, 1.0))
    return mrd(folder, mrd_readouts(y, np.flatnonzero(LINES), **place), mr_header(*FULL, picture=PICTURE, pixel=PIXEL))


def command(path: Path, out: Path, *arguments: str) -> int:
    return main([str(path), "--out", str(out), "--device", "cpu", *arguments])


def image(out: Path) -> np.ndarray:
    volume = io.read(out / "volume.nii.gz", modality="MR").volume
    assert volume is not None
    return volume.data


def line_of(capsys: pytest.CaptureFixture) -> str:
    """The one line that a refusal writes."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("deft_med: error: ") and CANARY not in lines[0]
    return lines[0].removeprefix("deft_med: error: ")


# -------------------------------------------------------------------------------------------------------- two layouts, one picture
@pytest.mark.parametrize("method", ["cg-sense", "deft"])
def test_fastmri_and_mrd_become_the_same_image(method: str, kspace: np.ndarray, tmp_path: Path) -> None:
    """Two public layouts of one measurement, neither of which our own writer made: the same pixels, of the phantom that was measured."""
    found = []
    for layout in (as_fastmri, as_mrd):
        out = tmp_path / f"{layout.__name__}_out"
        (tmp_path / layout.__name__).mkdir()
        quick = ("--samples", "2", "--steps", "4", "--quality-ok")
        assert command(layout(tmp_path / layout.__name__, kspace), out, "--method", method, "--quiet", *quick) == 0
        found.append(image(out)[0])
        record = json.loads((out / "run.json").read_text())
        assert record["provenance"]["source"] == layout.__name__[3:] and not record["provenance"]["simulated"]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5 * found[0].max())
    truth = picture(PICTURE, coils=6)
    errors = [np.linalg.norm(found[0] - other) / np.linalg.norm(truth) for other in (truth, truth[::-1], truth[:, ::-1], truth.T)]
    assert errors[0] < 0.15 and min(errors[1:]) > 2 * errors[0], errors


# ----------------------------------------------------------------------------------------------------------- what is said, and written
def test_k_space_without_a_sidecar_says_what_it_does_not_know(kspace: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cut = np.ascontiguousarray(kspace[0][:, 48:144])
    out = tmp_path / "out"
    assert command(npy(tmp_path, cut), out, "--method", "zero-filled") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == ("k-space (array), 1 slice, 6 coils, matrix 96 x 96, 2.13-fold accelerated, pixel size unknown; no side-car JSON: "
                     "measured is what is not zero: measurements")  # fmt: skip
    beside = json.loads((out / "volume.json").read_text())
    assert "left and right are not known" in beside["Geometry"] and not beside["Simulated"]


@pytest.mark.parametrize("layout", [as_fastmri, lambda folder, y: npy(folder, y[0])])
def test_dicom_without_a_place_is_refused(layout: Callable, kspace: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = layout(tmp_path, kspace)
    assert command(path, tmp_path / "out", "--method", "zero-filled", "--format", "dicom", "--quiet") == 2
    assert line_of(capsys) == "DICOM output wants a place in the patient, which the input does not give: say --format nifti"
    assert list(tmp_path.iterdir()) == [path]


def test_with_a_place_it_becomes_a_derived_series(kspace: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command(as_mrd(tmp_path, kspace), out, "--method", "cg-sense", "--format", "both", "--quiet") == 0
    (file,) = (out / "dicom").glob("*.dcm")
    made = pydicom.dcmread(file)
    assert made.Modality == "MR" and made.ImageType[:2] == ["DERIVED", "SECONDARY"] and made.PatientName == ""
    assert list(made.PixelSpacing) == [PIXEL, PIXEL] and list(made.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
    centre = np.array(made.ImagePositionPatient, float) + [48 * PIXEL, 48 * PIXEL, 0]
    np.testing.assert_allclose(centre, [10, 20, 0], atol=1e-3)  # the readouts' position is pixel (ny // 2, nx // 2)
    one, other = io.read(out / "dicom").volume, io.read(out / "volume.nii.gz", modality="MR").volume
    assert one is not None and other is not None
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)
    np.testing.assert_allclose(one.data / one.data.max(), other.data / other.data.max(), atol=1e-3)  # MR pixels have no unit
    if shutil.which("dciodvfy"):
        for series in sorted(out.glob("dicom*")):
            done = subprocess.run(["dciodvfy", str(series / file.name)], capture_output=True, text=True, errors="replace", check=False)
            assert "Error" not in done.stdout + done.stderr, done.stderr


def test_the_example_is_an_mrd_file_that_the_public_package_reads(tmp_path: Path) -> None:
    """--example mr: closed-form k-space through our writer; the samples that others find in it are the phantom's."""
    from deft_med.io import mrd_write

    y = mr_phantom((32, 24), coils=3, acceleration=1.0)
    mrd_write.write(tmp_path / "phantom.mrd", y, (0.9, 0.8))
    data = ismrmrd.Dataset(str(tmp_path / "phantom.mrd"), "dataset", create_if_needed=False)
    header = ismrmrd.xsd.CreateFromDocument(data.read_xml_header())
    space = header.encoding[0].reconSpace
    assert (space.matrixSize.x, space.matrixSize.y) == (32, 24) and space.fieldOfView_mm.y == pytest.approx(19.2)
    for k in range(data.number_of_acquisitions()):
        readout = data.read_acquisition(k)
        np.testing.assert_array_equal(readout.data, y[:, :, readout.idx.kspace_encode_step_1])
    data.close()


# ---------------------------------------------------------------------------------------------------------------- what is refused
REFUSED: dict[str, tuple[int, str, str]] = {  # exit code; what came; what to do about it
    "HDF5 truncated": (4, "truncated", "copy or export it again"),
    "HDF5 with other groups": (3, "neither kspace (fastMRI) nor a group with data and xml (ISMRMRD)", "give k-space as .npy"),
    "HDF5 with an external link": (3, "an external link, which is never followed", "h5repack"),
    "HDF5 virtual": (3, "a virtual data set", "h5repack"),
    "HDF5 with a plugin": (3, "filter 32015", "h5repack -f GZIP=4"),
    "fastMRI real": (3, "float32 numbers; expected complex", "give it as DICOM or NIfTI"),
    "fastMRI NaN": (3, "not finite (NaN), in slice 2 of 2", "export it again"),
    "MRD NaN": (3, "readout 25 of 40 holds values that are not finite (NaN)", "export it again"),
    "npy real": (3, "float32 numbers; expected complex", "give it as DICOM or NIfTI"),
    "npy NaN": (3, "1 values that are not finite (NaN)", "write 0 where nothing was measured"),
    "fastMRI mask too short": (3, "19 entries of bool, k-space 20 columns; expected one each", "write the mask along the phase encoding"),
    "fastMRI mask of zeros": (3, "no sampled column; expected at least one", "leave the mask out"),
    "npy zero": (3, "zero everywhere; expected measurements", "export it again"),
    "MRD without XML": (3, "no header XML", "convert the raw data again"),
    "MRD malformed XML": (4, "not well-formed", "write the file again"),
    "fastMRI XML malformed": (4, "not well-formed", "write the file again"),
    "MRD entity bomb": (3, "DOCTYPE or entities, which are never expanded", "take the declaration out"),
    "fastMRI XML entity bomb": (3, "DOCTYPE or entities, which are never expanded", "take the declaration out"),
    "MRD two encodings": (3, "2 encodings; one is supported", "split the file"),
    "MRD echo-planar": (3, "epi; expected cartesian", "regrid its readouts first"),
    "MRD spiral": (3, "hold no trajectory", "write kx and ky of every sample into traj"),
    "twix VB": (3, "Siemens raw data (twix)", "siemens_to_ismrmrd"),
    "twix VD": (3, "Siemens raw data (twix)", "siemens_to_ismrmrd"),
    "P-file": (3, "a GE P-file", "ge_to_ismrmrd"),
    "Philips list": (3, "Philips raw data", "philips_to_ismrmrd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_mr_file_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, came, then = REFUSED[name]
    (tmp_path / "in").mkdir()
    path = BAD_INPUTS[name][0](tmp_path / "in")
    assert main([str(path), "--out", str(tmp_path / "out")]) == code  # deft, the default
    line = line_of(capsys)
    assert came in line and then in line[line.index(came) :], line
    assert [found.name for found in tmp_path.iterdir()] == ["in"]


def test_spokes_without_the_extra_name_it(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators._nufft.find_spec", lambda name: None)
    path = mrd(tmp_path, radial_readouts(), RADIAL)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 3
    assert line_of(capsys).endswith("not Cartesian: non-Cartesian MRI needs finufft: pip install finufft")
    assert list(tmp_path.iterdir()) == [path]
