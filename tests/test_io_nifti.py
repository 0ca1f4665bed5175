"""NIfTI in and out: same values, same place, axes that nibabel names the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bad_inputs import coil_images, fft2c, nifti_bytes, npy, series
from test_io_dicom import POSES, pose

from deft_med.errors import OutputError, UnsupportedError
from deft_med.io import read, write
from deft_med.volume import Volume


def out(volume: Volume, path: Path) -> Path:
    write(volume, path, format="nifti", simulated=True)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    volume = read(series(tmp_path)).volume
    assert volume is not None
    volume = volume.with_data(volume.data + 0.125)
    back = read(out(volume, tmp_path / f"volume{suffix}"))
    assert back.kind == "nifti" and back.volume is not None and back.headers == []
    np.testing.assert_array_equal(back.volume.data, volume.data)
    np.testing.assert_allclose(back.volume.affine, volume.affine, atol=1e-4)
    assert "taken for HU" in back.describe()


def test_nibabel_names_the_axes_of_a_supine_patient(tmp_path: Path) -> None:
    volume = read(series(tmp_path)).volume
    assert volume is not None
    image = nib.load(out(volume, tmp_path / "volume.nii.gz"))
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.get_data_dtype() == np.float32 and image.header.get_xyzt_units() == ("mm", "sec")
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    # column 17, row 12 of slice 2 in RAS mm, by the numbers of the DICOM slices
    np.testing.assert_allclose(image.affine @ [17, 12, 2, 1], [8 - 17 * 0.5, 12 - 12 * 0.75, -95, 1], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[17, 12, 2], volume.data[2, 12, 17])


@pytest.mark.parametrize("name", POSES)
def test_every_pose_keeps_its_points(name: str, tmp_path: Path) -> None:
    """Reading turns the axes to left, back, up; a voxel's place and value stay together."""
    volume = read(pose(name, tmp_path)[0]).volume
    assert volume is not None
    back = read(out(volume, tmp_path / "volume.nii")).volume
    assert back is not None
    for index in ([17, 12, 2, 1], [3, 30, 0, 1]):
        i, j, k = np.rint(np.linalg.solve(back.affine, volume.affine @ index)[:3]).astype(int)
        assert back.data[k, j, i] == volume.data[index[2], index[1], index[0]]
        np.testing.assert_allclose(back.affine @ [i, j, k, 1], volume.affine @ index, atol=1e-3)
    assert back.affine[0, 0] > 0 and back.affine[1, 1] > 0 and back.affine[2, 2] > 0


@pytest.mark.parametrize(("modality", "shape", "spacing"), [("CT", (6, 5, 7), (2.0, 1.0, 3.0)), ("MR", (7, 6, 5), (3.0, 2.0, 1.0))])
def test_a_sagittal_file_comes_in_axial_or_as_acquired(modality: str, shape: tuple, spacing: tuple, tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    affine = np.array([[0, 0, 3.0, -4], [1, 0, 0, -9], [0, 2.0, 0, 5], [0, 0, 0, 1]])  # first axis to the front, second up, third right
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "scan.nii")
    volume = read(tmp_path / "scan.nii", modality=modality).volume
    assert volume is not None and volume.shape == shape and volume.spacing == spacing
    assert np.linalg.det(volume.affine[:3, :3]) > 0
    ras = affine @ [1, 2, 3, 1]
    i, j, k = np.rint(np.linalg.solve(volume.affine, ras * [-1, -1, 1, 1])[:3]).astype(int)
    assert volume.data[k, j, i] == data[1, 2, 3]


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_scaled_integers_two_axes_and_a_fourth_of_one(image_class: type, tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.int16).reshape(4, 6)
    image = image_class(data, np.diag([-1, -1, 1, 1]))
    image.header.set_slope_inter(2.0, -1000.0)
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    volume = read(tmp_path / "scan.nii").volume
    assert volume is not None and volume.shape == (1, 6, 4)
    np.testing.assert_array_equal(volume.data[0], data.T * 2.0 - 1000)
    (tmp_path / "four.nii").write_bytes(nifti_bytes((4, 5, 3, 1)))
    four = read(tmp_path / "four.nii").volume
    assert four is not None and four.shape == (3, 5, 4)


def test_no_orientation_is_said(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24.0, dtype=np.float32).reshape(4, 6, 1), None)
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    assert "left and right are not known" in read(tmp_path / "scan.nii").describe()


def test_units_other_than_mm_are_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24.0, dtype=np.float32).reshape(4, 6, 1), np.eye(4))
    image.header.set_xyzt_units("meter", "sec")
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    with pytest.raises(UnsupportedError, match="in meter, not in mm"):
        read(tmp_path / "scan.nii")


def test_no_spacing_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24.0, dtype=np.float32).reshape(4, 6, 1), np.eye(4))
    image.set_sform(np.diag([0.0, 1, 1, 1]), code=1)
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    with pytest.raises(UnsupportedError, match="no usable spacing"):
        read(tmp_path / "scan.nii")


def test_a_detached_header_is_refused(tmp_path: Path) -> None:
    data = bytearray(nifti_bytes())
    data[344:348] = b"ni1\0"
    (tmp_path / "scan.hdr").write_bytes(data[:352])
    with pytest.raises(UnsupportedError, match="two-file NIfTI"):
        read(tmp_path / "scan.hdr")


def test_the_sidecar_carries_the_unit_and_bytes_repeat(tmp_path: Path) -> None:
    volume = read(series(tmp_path)).volume
    assert volume is not None
    about = {"Views": 60.0}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(volume, tmp_path / name / "volume.nii.gz", format="nifti", simulated=True, kind="FBP", about=about)
    record = json.loads((tmp_path / "a" / "volume.json").read_text())
    assert record["Units"] == "HU" and record["Simulated"] is True and record["Kind"] == "FBP" and record["Views"] == 60
    assert (tmp_path / "a" / "volume.nii.gz").read_bytes() == (tmp_path / "b" / "volume.nii.gz").read_bytes()
    header = gzip.decompress((tmp_path / "a" / "volume.nii.gz").read_bytes())[:352]
    assert header[148:228].strip(b"\0") == b""  # descrip


def test_write_refuses(tmp_path: Path) -> None:
    sheared = np.array([[1.0, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match="sheared affine"):
        out(Volume(np.zeros((1, 2, 2)), sheared), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="ends in .nii"):
        out(Volume(np.zeros((1, 2, 2)), np.eye(4)), tmp_path / "a.dcm")
    with pytest.raises(OutputError, match="NIfTI volume could not be written"):
        out(Volume(np.zeros((1, 2, 2)), np.eye(4)), tmp_path / "no" / "a.nii")


# ------------------------------------------------------------------------------------------------------------------------- MR
def magnitude(path: Path, side: str | None = None, low: float = 0.0) -> Path:
    data = np.linspace(low, 900, 6 * 5 * 3, dtype=np.float32).reshape(6, 5, 3)
    path.write_bytes(nib.Nifti1Image(data, np.diag([-1.0, -1.5, 2.0, 1.0])).to_bytes())
    if side is not None:
        path.with_suffix(".json").write_text(side)
    return path


@pytest.mark.parametrize(
    ("low", "side", "stated", "modality"),
    [
        (0, None, None, "MR"),
        (-499, None, None, "MR"),
        (-500, None, None, "CT"),
        (-500, None, "MR", "MR"),
        (0, None, "CT", "CT"),
        (0, '{"Units": "HU"}', None, "CT"),
        (-900, '{"Units": "a.u."}', None, "MR"),
        (-900, '{"Modality": "MR", "Manufacturer": "x"}', None, "MR"),
        (0, '{"Units": "HU"}', "MR", "MR"),
        (0, '{"Units": "furlong"}', None, "MR"),
        (0, "[1]", None, "MR"),
        (0, "{", None, "MR"),
    ],
)
def test_ct_or_mr(low: float, side: str | None, stated: str | None, modality: str, tmp_path: Path) -> None:
    source = read(magnitude(tmp_path / "scan.nii", side, low), modality=stated)
    assert source.modality == modality and source.volume is not None
    assert source.volume.unit == ("HU" if modality == "CT" else "a.u.")
    assert ("taken for HU" if modality == "CT" else "taken for an MR magnitude") in source.describe()
    assert ("negative values" in source.describe()) == (modality == "MR" and low < 0)
    assert ("are these CT numbers?" in source.describe()) == (modality == "CT" and low > -500)


def test_an_unknown_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="modality must be 'CT', 'MR' or None"):
        read(magnitude(tmp_path / "scan.nii"), modality="PET")


def test_an_mr_volume_comes_back(tmp_path: Path) -> None:
    source = read(magnitude(tmp_path / "scan.nii"))
    assert source.volume is not None and source.placed
    back = read(out(source.volume, tmp_path / "volume.nii.gz"))
    assert back.modality == "MR" and back.volume is not None and json.loads((tmp_path / "volume.json").read_text())["Units"] == "a.u."
    np.testing.assert_array_equal(back.volume.data, source.volume.data)


def test_an_unknown_place_is_written_as_unknown(tmp_path: Path) -> None:
    like = read(npy(tmp_path, fft2c(coil_images())))
    assert like.scan is not None
    volume = Volume(np.random.default_rng(0).random((2, 48, 20)), like.scan.lps, "a.u.")
    write(volume, tmp_path / "volume.nii.gz", like, format="nifti", kind="PHASE", simulated=False)
    record = json.loads((tmp_path / "volume.json").read_text())
    assert record["Geometry"].startswith("unknown") and record["PixelSize"].startswith("unknown") and record["Coordinates"] == "none"
    image = nib.load(tmp_path / "volume.nii.gz")
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 0 and image.header.get_xyzt_units()[0] == "unknown"
    back = read(tmp_path / "volume.nii.gz")
    assert back.volume is not None and not back.placed and "left and right are not known" in back.describe()
    np.testing.assert_array_equal(back.volume.data, volume.data)
