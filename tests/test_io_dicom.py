"""Reading CT from DICOM: places, values and padding as the standard says, nothing guessed."""

from __future__ import annotations

import warnings
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from bad_inputs import CANARY, ct_slice, mr_series, mr_slice, phantom, save, series

from deft_med.errors import UsageError
from deft_med.io import example, read

# Image Orientation (Patient) of axial slices for patients lying head or feet first, on the back or face down.
POSES = {
    "HFS": [1, 0, 0, 0, 1, 0],
    "HFP": [-1, 0, 0, 0, -1, 0],
    "FFS": [-1, 0, 0, 0, 1, 0],
    "FFP": [1, 0, 0, 0, -1, 0],
    "tilted HFS": [1, 0, 0, 0, 0.9272, -0.3746],
}


def pose(name: str, folder: Path, slices: int = 4) -> tuple[Path, list[pydicom.Dataset]]:
    """A right-angled series in a pose and its datasets; the spot of `phantom` is off the centre."""
    iop = np.array(POSES[name], float)
    normal = np.cross(iop[:3], iop[3:])
    made: list[pydicom.Dataset] = []

    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.ImageOrientationPatient = iop.tolist()
        ds.ImagePositionPatient = [f"{v:.10g}" for v in np.array([-8.0, -12.0, 50.0]) + 2.5 * k * normal]
        ds.PatientPosition = name[-3:]
        made.append(ds)

    return series(folder, slices, change), made


@pytest.mark.parametrize("name", POSES)
def test_an_off_centre_point_is_where_the_standard_puts_it(name: str, tmp_path: Path) -> None:
    home, made = pose(name, tmp_path)
    volume = read(home).volume
    assert volume is not None
    for ds in made:
        # PS3.3 C.7.6.2.1.1 in the file's own numbers: row index 12, column index 17 is on the spot
        iop, ipp = np.array(ds.ImageOrientationPatient, float), np.array(ds.ImagePositionPatient, float)
        row, column, value = 12, 17, phantom(int(ds.InstanceNumber) - 1)[12, 17]
        assert value >= 300
        point = ipp + iop[:3] * float(ds.PixelSpacing[1]) * column + iop[3:] * float(ds.PixelSpacing[0]) * row
        index = np.linalg.solve(volume.affine, [*point, 1])
        np.testing.assert_allclose(index[:2], [column, row], atol=1e-3)
        i, j, k = np.rint(index[:3]).astype(int)
        assert volume.data[k, j, i] == value


@pytest.mark.parametrize("name", POSES)
def test_highdicom_sees_the_same_points(name: str, tmp_path: Path) -> None:
    home, made = pose(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = highdicom.get_volume_from_series(made)
    volume = read(home).volume
    assert volume is not None
    for k in range(4):
        # highdicom's indices are (slice, row, column), its slices may run the other way
        point = other.affine @ [k, 12, 17, 1]
        i, j, n = np.rint(np.linalg.solve(volume.affine, point)[:3]).astype(int)
        np.testing.assert_allclose(volume.affine @ [i, j, n, 1], point, atol=1e-2)
        np.testing.assert_array_equal(volume.data[n], other.array[k])


def test_rescale_is_of_each_slice(tmp_path: Path) -> None:
    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = 1 + k, -100 * k

    volume = read(series(tmp_path, 3, change)).volume
    assert volume is not None
    for k in range(3):
        np.testing.assert_allclose(volume.data[k], np.where((raw := phantom(k) * (1.0 + k) - 100 * k) < -1500, -1024, raw))


@pytest.mark.parametrize(("signed", "padding", "limit"), [(1, -2000, None), (0, 63536, None), (1, -2000, -1990), (0, 0, None)])
def test_padding_is_found_in_stored_values_whatever_its_sign(signed: int, padding: int, limit: int | None, tmp_path: Path) -> None:
    stored = (phantom() + (0 if signed else 1024)).astype(np.int16 if signed else np.uint16)
    stored[:3] = np.array(padding).astype(stored.dtype)
    ds = ct_slice(PixelRepresentation=signed, RescaleIntercept=0 if signed else -1024, PixelData=stored.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # with the wrong value representation on purpose where it is signed data
        ds.add_new("PixelPaddingValue", "US" if signed else "SS", padding % 65536 if signed else (padding + 32768) % 65536 - 32768)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS", limit)
            stored[2] = limit
            ds.PixelData = stored.tobytes()
    source = read(save(ds, tmp_path / "scan.dcm"))
    assert source.volume is not None
    assert (source.volume.data[0, :3] == -1024).all() and source.volume.data[0, 3:].max() == 300
    np.testing.assert_array_equal(source.volume.data[0, 3:], phantom()[3:])
    assert "outside the scan" in source.describe()


def test_undeclared_padding_is_found_too(tmp_path: Path) -> None:
    stored = phantom()
    stored[0] = -2000
    source = read(save(ct_slice(PixelData=stored.tobytes()), tmp_path / "scan.dcm"))
    assert source.volume is not None and (source.volume.data[0, 0] == -1024).all() and source.volume.data.min() == -1024


def test_monochrome1_is_not_inverted_and_no_window_is_applied(tmp_path: Path) -> None:
    source = read(save(ct_slice(PhotometricInterpretation="MONOCHROME1", WindowCenter=40, WindowWidth=80), tmp_path / "scan.dcm"))
    assert source.volume is not None
    np.testing.assert_array_equal(source.volume.data[0], phantom())


def test_one_file_is_one_slice(tmp_path: Path) -> None:
    home = series(tmp_path)
    source = read(sorted(home.iterdir())[0])
    assert source.volume is not None and source.volume.shape == (1, 32, 32) and source.volume.spacing == (2.5, 0.75, 0.5)
    assert len(source.headers) == 1 and "PixelData" not in source.headers[0]


def test_copies_other_files_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    home = series(tmp_path)
    one = sorted(home.iterdir())[0]
    (home / "copy.dcm").write_bytes(one.read_bytes())
    (home / "report.pdf").write_bytes(b"%PDF-1.4")
    (home / ".hidden").write_bytes(b"x")
    (home / "deeper").mkdir()
    save(ct_slice(5), home / "deeper" / "one.dcm")
    source = read(home)
    assert source.volume is not None and source.volume.shape[0] == 6
    assert "1 identical copies" in source.describe() and "1 files that are not DICOM" in source.describe()


def test_a_dicomdir_is_not_followed(tmp_path: Path) -> None:
    home = series(tmp_path)
    save(ct_slice(9, SOPClassUID="1.2.840.10008.1.3.10"), home / "DICOMDIR")
    volume = read(home).volume
    assert volume is not None and volume.shape[0] == 5


def test_headers_follow_the_slices_and_the_digest_the_bytes(tmp_path: Path) -> None:
    home = series(tmp_path)
    source = read(home)
    assert [int(h.InstanceNumber) for h in source.headers] == [1, 2, 3, 4, 5]
    again = read(home)
    assert source.digest == again.digest and len(source.digest) == 64
    assert read(next(home.iterdir())).digest != source.digest
    assert CANARY not in source.describe() and "2020" not in source.describe()


def test_private_attributes_do_not_come_in(tmp_path: Path) -> None:
    ds = ct_slice()
    ds.private_block(0x0099, CANARY, create=True).add_new(1, "LO", CANARY)
    header = read(save(ds, tmp_path / "scan.dcm")).headers[0]
    assert not any(element.tag.is_private for element in header)


def test_reading_leaves_pydicoms_settings(tmp_path: Path) -> None:
    settings = pydicom.config.settings
    before = settings.reading_validation_mode, settings.writing_validation_mode
    read(series(tmp_path))
    assert (settings.reading_validation_mode, settings.writing_validation_mode) == before


def test_an_unreadable_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be looked at"):
        read(tmp_path / ("x" * 5000))
    with pytest.raises(UsageError, match="cannot be looked at"):
        read("a\0b")


def test_odd_values_are_noted(tmp_path: Path) -> None:
    ds = ct_slice(RescaleIntercept=1024)
    assert "are these CT numbers?" in read(save(ds, tmp_path / "scan.dcm")).describe()


def test_examples_by_name(head_ct: Path) -> None:
    assert example("ct") == head_ct
    with pytest.raises(UsageError, match="choose one of ct"):
        example("mr")


def test_the_head_ct_that_ships_with_pydicom(head_ct: Path) -> None:
    """Lossless JPEG 2000, signed, padded with -2000 without saying so: air is air and brain is brain."""
    source = read(head_ct)
    assert source.volume is not None and source.volume.shape == (1, 512, 512)
    data = source.volume.data[0]
    assert data.min() >= -1060 and (data == -1024).mean() > 0.2
    assert abs(np.median(data[(data > -1023) & (data < -900)]) + 1000) < 30
    brain = data[200:300, 200:300]
    assert 20 < np.median(brain) < 45
    assert source.volume.spacing == (5.0, 0.431, 0.431) and not source.lossy


def test_the_small_ct_that_ships_with_pydicom(small_ct: Path) -> None:
    source = read(small_ct)
    assert source.volume is not None and source.volume.spacing == (5.0, 0.661468, 0.661468)
    assert source.volume.data.min() == -896 and source.volume.data.max() == 1167


@pytest.mark.data
def test_the_chest_series(data_dir: Path) -> None:
    source = read(data_dir / "dicom" / "ct_chest_12_slices")
    assert source.volume is not None and source.volume.shape == (12, 512, 512)
    np.testing.assert_allclose(source.volume.affine[:3, 3], [-228.036842, -93.0631599, -339])
    assert source.volume.spacing == (5.0, 0.841796875, 0.841796875)
    assert -1030 < np.percentile(source.volume.data, 5) < -950


# ------------------------------------------------------------------------------------------------------------------------- MR
def test_an_mr_series(tmp_path: Path) -> None:
    source = read(mr_series(tmp_path))
    assert source.kind == "dicom" and source.modality == "MR" and source.volume is not None and source.volume.unit == "a.u."
    assert source.describe() == "MR series (DICOM), 5 slices 32 x 32, 0.75 x 0.5 mm, slice step 2.5 mm, a.u."
    for k in range(5):
        np.testing.assert_array_equal(source.volume.data[k], phantom(k) + 1000.0)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [0.6, 0.8, 0, 0, 0, -1]])
def test_mr_slices_lie_any_way(orientation: list[float], tmp_path: Path) -> None:
    normal = np.cross(orientation[:3], orientation[3:])

    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.ImageOrientationPatient = orientation
        ds.ImagePositionPatient = [f"{v:.10g}" for v in np.array([-8.0, -12.0, 50.0]) + 2.5 * k * normal]

    volume = read(mr_series(tmp_path, 4, change)).volume
    assert volume is not None
    np.testing.assert_allclose(volume.affine[:3, 2], 2.5 * normal, atol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 0], 0.5 * np.array(orientation[:3]), atol=1e-6)


def test_an_mr_rescale_is_used_where_there_is_one(tmp_path: Path) -> None:
    volume = read(save(mr_slice(RescaleSlope=0.5, RescaleIntercept=3, RescaleType="normalized"), tmp_path / "scan.dcm")).volume
    assert volume is not None
    np.testing.assert_allclose(volume.data[0], (phantom() + 1000) * 0.5 + 3)


def test_padding_in_mr_is_zero(tmp_path: Path) -> None:
    source = read(save(mr_slice(PixelPaddingValue=1300), tmp_path / "scan.dcm"))
    assert source.volume is not None and source.volume.data.max() == 1040 and "outside the scan set to 0" in source.describe()


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "examples_overlay.dcm"])
def test_the_mr_slices_that_ship_with_pydicom(name: str) -> None:
    from pydicom.data import get_testdata_file

    source = read(str(get_testdata_file(name, download=False)))
    assert source.modality == "MR" and source.volume is not None
    assert (source.volume.data.min(), source.volume.data.max()) == ((0, 1123) if "overlay" in name else (127, 2145))
