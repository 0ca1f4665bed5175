"""Writing a derived CT series: read back it is the same image in the same place, and a new object of the same patient and study."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from bad_inputs import CANARY, CT_IMAGE, MR_IMAGE, coil_images, ct_slice, fft2c, mr_header, mr_series, mrd, mrd_readouts, npy, save, series
from test_io_dicom import POSES, pose
from test_volume import corners

from deft_med.errors import OutputError, ResourceError, UsageError
from deft_med.io import Source, read, write
from deft_med.io.header import text
from deft_med.volume import Volume

WHEN = datetime(2021, 2, 3, 4, 5, 6, tzinfo=UTC)
HOW: dict[str, Any] = dict(format="dicom", kind="DEFT", description="60 views", derivation="DEFT, 20 steps", simulated=True,
                           uid_entropy=["config", "weights", "0"], when=WHEN)  # fmt: skip


def image(source: Source) -> Volume:
    """A reconstruction on half the matrix: neither whole numbers nor the source's."""
    assert source.volume is not None
    half = source.volume.coarsen(2)
    return half.with_data(half.data * 0.9 + 0.3)


def written(source: Source, folder: Path, volume: Volume | None = None, **changes: Any) -> list[pydicom.Dataset]:
    write(image(source) if volume is None else volume, folder, source, **{**HOW, **changes})
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def errors_of(path: Path) -> list[str]:
    """What dciodvfy calls an error, in both of its forms."""
    lines: list[str] = []
    for options in ([], ["-new"]):
        done = subprocess.run(["dciodvfy", *options, str(path)], capture_output=True, text=True, errors="replace", check=False)
        lines += [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Fatal"))]
    return lines


@pytest.mark.parametrize("name", POSES)
def test_the_round_trip_keeps_values_and_places(name: str, tmp_path: Path) -> None:
    source = read(pose(name, tmp_path)[0])
    out = image(source)
    written(source, tmp_path / "out")
    back = read(tmp_path / "out").volume
    assert back is not None and source.volume is not None
    np.testing.assert_array_equal(back.data, np.rint(out.data))
    np.testing.assert_allclose(back.affine, out.affine, atol=1e-4)
    np.testing.assert_allclose(corners(back), corners(source.volume), atol=1e-3)


def test_highdicom_reads_the_series_onto_the_same_grid(tmp_path: Path) -> None:
    source = read(pose("HFP", tmp_path)[0])
    made, out = written(source, tmp_path / "out"), image(source)
    other = highdicom.get_volume_from_series(made)
    for k in range(4):
        point = other.affine @ [k, 3, 5, 1]
        index = np.linalg.solve(out.affine, point)[:3]
        np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
        np.testing.assert_array_equal(np.rint(out.data[int(np.rint(index[2]))]), other.array[k])


def test_patient_study_and_frame_stay_and_the_rest_is_new(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    made = written(source, tmp_path / "out")
    kept = "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime AccessionNumber FrameOfReferenceUID \
        PatientPosition KVP ImageOrientationPatient".split()
    old = {h.SOPInstanceUID for h in source.headers} | {h.SeriesInstanceUID for h in source.headers}
    assert len({ds.SOPInstanceUID for ds in made}) == 5 and len({ds.SeriesInstanceUID for ds in made}) == 1
    for index, (ds, header) in enumerate(zip(made, source.headers, strict=True)):
        for keyword in kept:
            assert ds[keyword].value == header[keyword].value, keyword
        assert not {ds.SOPInstanceUID, ds.SeriesInstanceUID} & old
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == CT_IMAGE
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.InstanceNumber == index + 1 and ds.SeriesNumber == 201
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
        assert [item.Manufacturer for item in ds.ContributingEquipmentSequence] == ["Maker", "deft_med"]
        assert ds.Manufacturer == "deft_med" and ds.ConvolutionKernel == "DEFT" and ds.LossyImageCompression == "00"
        assert (ds.SeriesDate, ds.ContentTime, ds.StudyDate) == ("20210203", "040506", "20200102")
        assert (ds.PixelSpacing[0], ds.PixelSpacing[1]) == (1.5, 1.0) and ds.preamble == bytes(128)


def test_a_study_says_simulated_everywhere(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    for ds in written(source, tmp_path / "out"):
        assert ds.SeriesDescription == "SIMULATED RESEARCH deft_med 60 views"
        assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL", "SIMULATED", "DEFT"]
        assert ds.ImageComments == "simulated acquisition, not for clinical use"
    for ds in written(source, tmp_path / "measured", simulated=False, kind="FBP"):
        assert ds.SeriesDescription.startswith("RESEARCH") and ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL", "FBP"]
        assert ds.ImageComments == "research use only, not for clinical use" and "DerivationCodeSequence" not in ds


def test_only_the_whitelist_travels(tmp_path: Path) -> None:
    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.private_block(0x0099, "MAKER", create=True).add_new(1, "LO", "private")
        ds.add_new(0x60000022, "LO", "overlay")
        ds.PatientComments, ds.OperatorsName, ds.PixelPaddingValue = "a comment", "an operator", -2000
        ds.PatientWeight = ""
        method = pydicom.Dataset()
        method.CodeValue, method.CodingSchemeDesignator, method.CodeMeaning = "113100", "DCM", "Basic Application Confidentiality Profile"
        method.private_block(0x0099, "MAKER", create=True).add_new(1, "LO", "private")
        ds.DeidentificationMethodCodeSequence = [method]

    ds = written(read(series(tmp_path, 3, change)), tmp_path / "out")[0]
    assert not any(element.tag.is_private or element.tag.group == 0x6000 for element in ds.iterall())
    assert ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    for keyword in ("PatientComments", "OperatorsName", "PixelPaddingValue", "PatientWeight", "InstitutionName"):
        assert keyword not in ds


def test_the_same_run_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    written(source, tmp_path / "a")
    written(source, tmp_path / "b")
    for a, b in zip(sorted((tmp_path / "a").iterdir()), sorted((tmp_path / "b").iterdir()), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
    first = written(source, tmp_path / "c", when=None)[0]
    assert first.SOPInstanceUID == pydicom.dcmread(tmp_path / "a" / "0001.dcm").SOPInstanceUID


@pytest.mark.parametrize("change", [dict(uid_entropy=["config", "1"]), dict(kind="TV"), dict(simulated=False), "pixels", "place"])
def test_another_run_gives_other_uids(change: Any, tmp_path: Path) -> None:
    source = read(series(tmp_path))
    volume = image(source)
    if change == "pixels":
        data = volume.data.copy()
        data[2, 3, 4] += 1
        volume = volume.with_data(data)
    elif change == "place":
        volume = Volume(volume.data, volume.affine + np.eye(4, k=3) * 0.5)
    a = written(source, tmp_path / "a")
    b = written(source, tmp_path / "b", volume, **(change if isinstance(change, dict) else {}))
    assert a[0].SeriesInstanceUID != b[0].SeriesInstanceUID
    assert not {d.SOPInstanceUID for d in a} & {d.SOPInstanceUID for d in b}
    assert a[0].StudyInstanceUID == b[0].StudyInstanceUID


def test_a_spread_has_steps_of_a_tenth_and_is_no_hu(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    volume = image(source)
    spread = volume.with_data(np.abs(volume.data) / 10 + 0.26)
    made = written(source, tmp_path / "out", spread, kind="STDDEV")
    values = np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in made])
    assert np.abs(values - spread.data).max() <= 0.05 + 1e-4
    assert made[0].RescaleType == "US" and made[0].ImageType[-1] == "STDDEV" and (made[0].WindowCenter, made[0].WindowWidth) == (50, 100)


def test_clipped_pixels_are_counted(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    data = image(source).data.copy()
    data[0, 0, :3] = 1e5
    assert write(image(source).with_data(data), tmp_path / "out", source, **HOW) == 3
    assert pydicom.dcmread(tmp_path / "out" / "0001.dcm").pixel_array.max() == 32767


def test_windows_and_lossy_history_are_the_sources(tmp_path: Path) -> None:
    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.WindowCenter, ds.WindowWidth, ds.LossyImageCompression = [40, 300], [80, 1500], "01"
        ds.LossyImageCompressionRatio = 12.5

    ds = written(read(series(tmp_path, 2, change), allow_lossy=True), tmp_path / "out")[0]
    assert list(ds.WindowCenter) == [40, 300] and list(ds.WindowWidth) == [80, 1500]
    assert ds.LossyImageCompression == "01" and ds.LossyImageCompressionRatio == 12.5


def test_times_are_in_the_zone_of_the_source(tmp_path: Path) -> None:
    source = read(series(tmp_path, 2, lambda k, ds: setattr(ds, "TimezoneOffsetFromUTC", "-0500")))
    assert written(source, tmp_path / "out")[0].ContentTime == "230506"
    odd = read(series(tmp_path / "out", 2, lambda k, ds: setattr(ds, "TimezoneOffsetFromUTC", "+9999")))
    assert written(odd, tmp_path / "odd")[0].ContentTime == "040506"


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    source = read(series(tmp_path, 1))
    tag = pydicom.tag.Tag("SpiralPitchFactor")
    source.headers[0]._dict[tag] = pydicom.dataelem.RawDataElement(tag, "FD", 3, b"abc", 0, False, True)
    assert "SpiralPitchFactor" not in written(source, tmp_path / "out")[0]
    assert text(source.headers[0], "SpiralPitchFactor") == ""


def test_names_in_other_alphabets_survive(tmp_path: Path) -> None:
    def change(k: int, ds: pydicom.Dataset) -> None:
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 192", "Łukasz^Ægir=山田^太郎"

    source = read(series(tmp_path, 2, change))
    ds = written(source, tmp_path / "out", description="π\\steps\n2", derivation="σ" * 2000)[0]
    assert str(ds.PatientName) == "Łukasz^Ægir=山田^太郎"
    assert ds.SeriesDescription == "SIMULATED RESEARCH deft_med ?/steps 2" and len(ds.DerivationDescription) == 1024


def test_without_a_source_it_is_a_new_study_of_nobody(tmp_path: Path) -> None:
    volume = image(read(series(tmp_path)))
    write(volume, tmp_path / "out", **HOW)
    made = [pydicom.dcmread(path) for path in sorted((tmp_path / "out").iterdir())]
    assert made[0].PatientName == "" and made[0].StudyInstanceUID.startswith("2.25.") and "SourceImageSequence" not in made[0]
    assert len({ds.StudyInstanceUID for ds in made}) == 1
    back = read(tmp_path / "out").volume
    assert back is not None
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [(dict(kind="MAGIC"), "kind must be one of"), (dict(format="jpeg"), "format must be 'dicom' or 'nifti'")],
)
def test_write_refuses(change: dict, words: str, tmp_path: Path) -> None:
    source = read(series(tmp_path))
    with pytest.raises(ValueError, match=words):
        write(image(source), tmp_path / "out", source, **{**HOW, **change})


def test_write_refuses_a_volume_that_does_not_fit(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    with pytest.raises(ValueError, match="a header for each slice: 1 slices, 5 headers"):
        write(Volume(np.zeros((1, 4, 4)), np.eye(4)), tmp_path / "out", source, **HOW)
    with pytest.raises(ValueError, match="written in HU"):
        write(Volume(np.zeros((1, 4, 4)), np.eye(4), "1"), tmp_path / "out", **HOW)


def test_nothing_is_overwritten_and_no_place_is_an_error(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    written(source, tmp_path / "out")
    with pytest.raises(OutputError, match="DICOM series could not be written: File exists") as caught:
        written(source, tmp_path / "out")
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(OutputError, match="output folder could not be written"):
        written(source, tmp_path / "no" / "such" / "parent")


def test_a_full_disk_is_a_matter_of_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    source = read(series(tmp_path))
    monkeypatch.setattr("pydicom.dataset.Dataset.save_as", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        written(source, tmp_path / "out")


def test_no_output_but_dicom_names_the_patient(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    write(image(source), tmp_path / "out.nii.gz", source, **{**HOW, "format": "nifti"})
    import gzip

    for data in (gzip.decompress((tmp_path / "out.nii.gz").read_bytes()), (tmp_path / "out.json").read_bytes()):
        assert CANARY.encode() not in data and b"1.2.3" not in data


def test_corners_of_an_oblique_slice_in_the_files_own_digits(head_ct: Path, tmp_path: Path) -> None:
    """The head CT's orientation has four digits; the result repeats them, so its corners are the source's to a micrometre."""
    before = pydicom.dcmread(head_ct)
    after = written(read(head_ct), tmp_path / "out")[0]
    assert list(after.ImageOrientationPatient) == list(before.ImageOrientationPatient)
    places = []
    for ds in (before, after):
        iop, ipp, (dy, dx) = np.array(ds.ImageOrientationPatient, float), np.array(ds.ImagePositionPatient, float), ds.PixelSpacing
        edges = [(i - 0.5, j - 0.5) for i in (0, ds.Columns) for j in (0, ds.Rows)]
        places.append([ipp + iop[:3] * float(dx) * i + iop[3:] * float(dy) * j for i, j in edges])
    np.testing.assert_allclose(places[0], places[1], atol=1e-4)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed")
@pytest.mark.parametrize("kind", ["DEFT", "FBP", "TV", "STDDEV"])
@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("origin", ["made", "head", "small", "nobody", "knee"])
def test_dciodvfy_finds_no_error(origin: str, kind: str, simulated: bool, tmp_path: Path, head_ct: Path, small_ct: Path) -> None:
    if origin in ("made", "nobody"):
        path = series(tmp_path, 2)
    else:
        path = {"head": head_ct, "small": small_ct, "knee": tmp_path / "knee.dcm"}[origin]
    if origin == "knee":
        save(ct_slice(BodyPartExamined="KNEE"), path)
    source = read(path)
    write(image(source), tmp_path / "out", None if origin == "nobody" else source, **{**HOW, "kind": kind, "simulated": simulated})
    assert errors_of(tmp_path / "out" / "0001.dcm") == []


@pytest.mark.data
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed")
def test_the_chest_series_comes_out_clean_and_in_place(data_dir: Path, tmp_path: Path) -> None:
    source = read(data_dir / "dicom" / "ct_chest_12_slices")
    made, out = written(source, tmp_path / "out"), image(source)
    assert source.volume is not None
    for path in sorted((tmp_path / "out").iterdir()):
        assert errors_of(path) == []
    back = read(tmp_path / "out").volume
    assert back is not None
    np.testing.assert_allclose(corners(back), corners(source.volume), atol=1e-3)
    other = highdicom.get_volume_from_series(made)
    index = np.linalg.solve(out.affine, other.affine @ [0, 100, 50, 1])[:3]
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    assert np.rint(out.data[int(np.rint(index[2])), 100, 50]) == other.array[0, 100, 50]


# ------------------------------------------------------------------------------------------------------------------------- MR
def test_an_mr_series_of_the_same_patient(tmp_path: Path) -> None:
    source = read(mr_series(tmp_path))
    out = image(source)
    made = written(source, tmp_path / "out")
    for ds, header in zip(made, source.headers, strict=True):
        assert (ds.SOPClassUID, ds.Modality) == (MR_IMAGE, "MR") and ds.file_meta.MediaStorageSOPClassUID == MR_IMAGE
        assert ds.ImageType == ["DERIVED", "SECONDARY", "OTHER", "SIMULATED", "DEFT"]
        assert ds.SeriesDescription == "SIMULATED RESEARCH deft_med 60 views" and ds.PatientName == header.PatientName
        for keyword in ("ScanningSequence", "SequenceVariant", "RepetitionTime", "EchoTime", "FlipAngle", "StudyInstanceUID"):
            assert ds[keyword].value == header[keyword].value
        assert "KVP" not in ds and "ConvolutionKernel" not in ds and "RescaleSlope" not in ds
        assert ds.RealWorldValueMappingSequence[0].RealWorldValueSlope == 1 and ds.WindowWidth >= 1
    back = read(tmp_path / "out")
    assert back.volume is not None and back.modality == "MR"
    np.testing.assert_array_equal(back.volume.data, np.rint(out.data))
    np.testing.assert_allclose(back.volume.affine, out.affine, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e6])
def test_small_and_large_values_are_scaled_and_the_file_says_how(scale: float, tmp_path: Path) -> None:
    source = read(mr_series(tmp_path))
    volume = image(source).with_data(image(source).data * scale)
    made = written(source, tmp_path / "out", volume)
    step = made[0].RealWorldValueMappingSequence[0].RealWorldValueSlope
    values = np.stack([ds.pixel_array for ds in made]) * step
    np.testing.assert_allclose(values, volume.data, atol=0.51 * step)
    assert max(ds.pixel_array.max() for ds in made) == 32767
    spread = written(source, tmp_path / "std", volume.with_data(volume.data / 50), kind="STDDEV")
    assert spread[0].ImageType[-1] == "STDDEV" and max(ds.pixel_array.max() for ds in spread) == 32767


def test_negative_magnitudes_are_clipped_and_an_empty_picture_is_written(tmp_path: Path) -> None:
    source = read(mr_series(tmp_path))
    volume = image(source)
    data = volume.data.copy()
    data[0, :2, :2] = -7
    assert write(volume.with_data(data), tmp_path / "out", source, **HOW) == 4
    assert write(volume.with_data(data * 0), tmp_path / "nothing", source, **HOW) == 0


def placed_scan(tmp_path: Path, **fields: Any) -> Source:
    return read(mrd(tmp_path, mrd_readouts(fft2c(coil_images()), **fields), mr_header()))


def test_a_measured_scan_with_a_place_is_a_new_study_of_nobody(tmp_path: Path) -> None:
    pytest.importorskip("ismrmrd", reason="the MRD file is written by the public ismrmrd package")
    source = placed_scan(tmp_path)
    assert source.scan is not None and source.placed
    volume = Volume(np.random.default_rng(0).random((2, 24, 16)), source.scan.lps, "a.u.")
    made = written(source, tmp_path / "out", volume, simulated=False, kind="CG_SENSE")
    assert made[0].PatientName == "" and made[0].ScanningSequence == "RM" and made[0].ImageType[-2:] == ["OTHER", "CG_SENSE"]
    assert made[0].EchoTime is None and CANARY not in str(made[0])
    back = read(tmp_path / "out").volume
    assert back is not None
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-4)
    if shutil.which("dciodvfy"):
        assert errors_of(tmp_path / "out" / "0001.dcm") == []


def test_without_a_place_there_is_no_dicom(tmp_path: Path) -> None:
    source = read(npy(tmp_path, fft2c(coil_images())))
    assert source.scan is not None
    volume = Volume(np.ones((2, 48, 20)), source.scan.lps, "a.u.")
    with pytest.raises(UsageError, match="no place in the patient, which DICOM needs"):
        write(volume, tmp_path / "out", source, **HOW)
    assert not (tmp_path / "out").exists()


def test_headers_of_the_other_modality_are_refused(tmp_path: Path) -> None:
    source = read(series(tmp_path))
    with pytest.raises(ValueError, match="headers are of another modality"):
        write(image(source).with_data(image(source).data, "a.u."), tmp_path / "out", source, **HOW)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed")
@pytest.mark.parametrize("kind", ["DEFT", "ZERO_FILLED", "TV", "WAVELET", "STDDEV"])
@pytest.mark.parametrize("origin", ["series", "MR_small.dcm", "examples_overlay.dcm", "nobody"])
def test_dciodvfy_finds_no_error_in_mr(kind: str, origin: str, tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    path = mr_series(tmp_path, 2) if origin in ("series", "nobody") else Path(str(get_testdata_file(origin, download=False)))
    source = read(path)
    write(image(source), tmp_path / "out", None if origin == "nobody" else source, **{**HOW, "kind": kind, "simulated": kind != "TV"})
    assert errors_of(tmp_path / "out" / "0001.dcm") == []
