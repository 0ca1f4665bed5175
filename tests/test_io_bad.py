"""Every bad input ends in its error class, with one clear line, nobody's name, and its bytes as they were."""

from __future__ import annotations

import gzip
import hashlib
import resource
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from bad_inputs import BAD_INPUTS, CANARY, coil_images, ct_slice, deflated, fft2c, nifti_bytes, npy, save, series

from deft_med.errors import CorruptError, DeftMedError, ResourceError, UnsupportedError, UsageError
from deft_med.io import read
from deft_med.io.gate import broken, content

# What the line must say, beside its exit code.
WORDS = {
    "no such path": "no such path", "fifo": "pipe", "empty file": "empty", "text renamed .dcm": "is text",
    "noise renamed .dcm": "no known kind", "PNG renamed .dcm": "PNG", "ZIP without a sinogram": "no y",
    "preamble only": "inside its first header", "truncated in meta": "inside its first header",
    "truncated in header": "ends early", "truncated pixels": "ends early", "no pixels": "before its pixels",
    "no transfer syntax": "no transfer syntax", "no preamble": "preamble of Part 10", "deflate bomb": "inflate to more than",
    "no PixelSpacing": "Pixel Spacing", "no position": "Image Position", "skewed orientation": "right angle",
    "sagittal": "not an axial slice", "RescaleSlope NaN": "bad rescale", "Modality LUT": "Modality LUT",
    "RescaleType not HU": "another quantity", "Rows 0": "Rows 0", "Rows 65535": "65535 x 65535", "one row": "at least 2 x 2",
    "BitsStored 17": "bits allocated", "PixelRepresentation 7": "have a sign", "constant": "same value",
    "values like counts": "no CT numbers", "RGB": "colour", "several frames": "several frames", "ultrasound": "Ultrasound",
    "MR phase": "says P;", "MR phase by its values": "no magnitude", "MR imaginary part": "IMAGINARY", "MR mosaic": "MOSAIC",
    "MR bad rescale": "bad rescale", "MR slices of two echoes": "duplicated position", "enhanced MR": "multi-frame) MR",
    "CT among MR": "differ in kind", "enhanced CT": "multi-frame", "CT-PD": "DICOM-CT-PD", "private raw data": "private format",
    "unknown class": "unknown kind", "DICOMDIR": "index", "no class": "what kind of object", "localizer": "LOCALIZER",
    "missing decoder": "no decoder", "unknown syntax": "not known", "lossy once": "allow-lossy",
    "broken JPEG 2000": "could not be decoded", "folder without DICOM": "no DICOM file", "two series in a folder": "2 series",
    "localizer inside a series": "LOCALIZER", "two orientations": "orientation", "missing slice": "1 slices are missing",
    "uneven slices": "not evenly spaced", "duplicated position": "duplicated position", "one UID twice": "same SOP Instance UID",
    "tilted stack": "tilted", "two patients": "patient", "two pixel spacings": "pixel spacing",
    "NIfTI truncated": "truncated", "NIfTI 4D": "4 axes", "NIfTI NaN": "not finite", "NIfTI sheared": "sheared",
    "NIfTI complex": "complex", "NIfTI constant": "same value", "NIfTI huge": "voxels", "gzip of text": "not of a NIfTI",
    "gzip truncated": "end early", "gzip broken": "do not inflate", "npz with pickled objects": "pickled",
    "npz with wrong shapes": "Scan.y", "npz with NaN": "y must hold finite", "npz with noise 0": "positive everywhere",
    "npz in degrees": "radians", "npz of counts": "photon counts", "npz without pitch": "lacks pitch",
    "npz with unknown key": "1 unknown keys", "npz of an unknown geometry": "'parallel' or 'fan'",
    "npz fan without source": "source_origin is needed", "npz with half a pixel": "whole numbers",
    "npz with two pitches": "one number", "npz truncated": "ZIP archive is damaged", "npz that lies": "asks for more bytes",
    "npz bomb": "unpacks to more", "many missing slices": "3 slices are missing", "npz with a wrong checksum": "BadZipFile",
    "HDF5 truncated": "truncated", "HDF5 with other groups": "neither kspace", "HDF5 with an external link": "external link",
    "HDF5 with a soft link": "soft link", "HDF5 virtual": "virtual data set", "HDF5 outside": "virtual data set",
    "HDF5 with a plugin": "filter 32015", "HDF5 bomb": "unpacks to over 8 GiB", "HDF5 of references": "references",
    "HDF5 hollow": "claims",
    "fastMRI real": "expected complex", "fastMRI NaN": "slice 2 of 2", "fastMRI of two axes": "shape (4, 5)",
    "fastMRI zero": "zero in every sampled column", "fastMRI mask too short": "19 entries", "fastMRI mask of zeros": "no sampled column",
    "fastMRI of two masks": "differ in their sampled columns", "fastMRI XML malformed": "not well-formed",
    "fastMRI XML not UTF-8": "not UTF-8", "fastMRI XML without encoding": "no encoding", "fastMRI XML of zero size": "reconSpace",
    "fastMRI XML entity bomb": "DOCTYPE", "fastMRI XML is a number": "not one string", "fastMRI radial": "radial",
    "fastMRI two encodings": "2 encodings", "fastMRI other reference": "reconstruction_rss has shape",
    "fastMRI NaN reference": "reconstruction_rss holds values", "MRD without XML": "no header XML", "MRD malformed XML": "not well-formed",
    "MRD entity bomb": "DOCTYPE", "MRD spiral": "hold no trajectory", "MRD two encodings": "2 encodings",
    "MRD two encoding spaces": "several encoding spaces", "MRD of numbers": "no ISMRMRD acquisitions", "MRD NaN": "readout 25 of 40",
    "MRD short readout": "288 numbers", "MRD off the grid": "48 x 16", "MRD reversed": "reversed", "MRD only noise": "no imaging readout",
    "MRD echo-planar": "not supported: epi", "MRD radial in 3D": "3D (kz)", "MRD radial in 1D": "1 numbers to a sample",
    "MRD radial in another unit": "is none that is known", "MRD radial that reaches half way": "is none that is known",
    "MRD radial NaN": "readout 8 of 10", "MRD radial of two trajectories": "different trajectories",
    "MRD radial all discarded": "discard all", "MRD radial of coarse pixels": "no larger ones in reconSpace",
    "MRD radial with short points": "in traj, not 2 x 24",
    "npy real": "expected complex", "npy NaN": "1 values that are not finite", "npy zero": "zero everywhere", "npy of two axes": "(4, 5)",
    "npy with pickled objects": "pickled", "npy truncated": "23040 expected", "npy with a broken side-car": "does not parse",
    "npy with a list beside": "no object", "npy with other axes": "axes do not fit", "npy with another shape": "[3, 48, 20]",
    "npy with k = 0 in the corner": "k = 0 in the middle", "npy with an unknown mask": "'nonzero' or 'all'",
    "npy with a bad length": "fov_mm", "npy with a bad sigma": "noise_sigma", "npy of two masks": "different places",
    "twix VB": "siemens_to_ismrmrd", "twix VD": "siemens_to_ismrmrd", "P-file": "ge_to_ismrmrd", "Philips list": "philips_to_ismrmrd",
    "Philips raw by its name": "philips_to_ismrmrd",
}  # fmt: skip


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(path.stat().st_mode) else "special"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_refused(name: str, tmp_path: Path) -> None:
    make, code = BAD_INPUTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what the makers write
        path = make(tmp_path)
    before, start = fingerprint(tmp_path), time.monotonic()
    with pytest.raises(DeftMedError) as caught:
        read(path)
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    assert WORDS.get(name, "") in message
    assert time.monotonic() - start < 5
    assert fingerprint(tmp_path) == before
    assert "\n" not in message and 30 < len(message) < 300, message
    chain: BaseException | None = caught.value
    while chain is not None:  # what a traceback would show
        assert CANARY not in str(chain) and str(tmp_path) not in str(chain) and "19011213" not in str(chain)
        chain = None if chain.__suppress_context__ else chain.__context__


def test_a_bomb_is_stopped_in_bounded_memory(tmp_path: Path) -> None:
    path = BAD_INPUTS["deflate bomb"][0](tmp_path)
    assert path.stat().st_size < 4e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ResourceError, match="refused"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600e3  # KiB


def test_a_huge_file_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_med.io.header.FILE_BYTES", 1000)
    with pytest.raises(ResourceError, match="thousand CT slices"):
        read(save(ct_slice(), tmp_path / "scan.dcm"))


def test_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(ct_slice(), tmp_path / "scan.dcm")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(UsageError, match="may not be read"):
            read(path)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        content(tmp_path)


@pytest.mark.parametrize(
    ("thrown", "caught", "words"),
    [
        (MemoryError(CANARY), ResourceError, "more memory than there is"),
        (RecursionError(CANARY), CorruptError, "it is damaged and could not be read \\(RecursionError\\)"),
        (PermissionError(13, CANARY), UsageError, "it cannot be read: Permission denied"),
    ],
)
def test_a_librarys_words_do_not_go_on(thrown: Exception, caught: type[Exception], words: str) -> None:
    with pytest.raises(caught, match=words) as info, broken("it"):
        raise thrown
    assert CANARY not in str(info.value) and info.value.__suppress_context__


def test_pixels_of_another_shape(tmp_path: Path, head_ct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = pydicom.dcmread(head_ct)
    ds.Rows = 300
    ds.save_as(tmp_path / "scan.dcm")
    with pytest.raises(CorruptError, match="could not be decoded"):
        read(tmp_path / "scan.dcm")
    monkeypatch.setattr("pydicom.pixels.pixel_array", lambda _: np.zeros((3, 4), np.int16))
    with pytest.raises(CorruptError, match="another shape than its header says"):
        read(head_ct)


def test_an_honest_deflated_file_is_read(tmp_path: Path) -> None:
    deflated(tmp_path)
    plain = save(ct_slice(), tmp_path / "plain.dcm")
    assert (read(tmp_path / "scan.dcm").volume.data == read(plain).volume.data).all()  # type: ignore[union-attr]


def test_limits_are_the_callers(tmp_path: Path) -> None:
    home = series(tmp_path)
    with pytest.raises(ResourceError, match="series needs"):
        read(home, max_bytes=10_000)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_med.io.dicom.MOST_FILES", 3)
    with pytest.raises(ResourceError, match="more than 3 files"):
        read(series(tmp_path))


def test_lossy_is_read_with_leave_and_recorded(tmp_path: Path) -> None:
    path = save(ct_slice(LossyImageCompression="01"), tmp_path / "scan.dcm")
    with pytest.raises(UnsupportedError, match="lossy"):
        read(path)
    source = read(path, allow_lossy=True)
    assert source.lossy and "lossy" in source.describe()


@pytest.mark.parametrize("kind", ["dicom", "deflated", "nifti", "gzip", "npz", "npy"])
def test_damaged_bytes_never_end_in_a_bug(kind: str, tmp_path: Path) -> None:
    """Random damage of the first two kilobytes: an image or one of our errors, nothing else, nothing on stderr."""
    make: dict[str, Callable[[], bytes]] = {
        "dicom": lambda: save(ct_slice(), tmp_path / "a").read_bytes(),
        "deflated": lambda: deflated(tmp_path).read_bytes(),
        "nifti": nifti_bytes,
        "gzip": lambda: gzip.compress(nifti_bytes(), mtime=0),
        "npy": lambda: npy(tmp_path, fft2c(coil_images())).read_bytes(),
        "npz": lambda: BAD_INPUTS["npz with NaN noise"][0](tmp_path).read_bytes(),
    }
    rng, good = np.random.default_rng(7), make[kind]()
    path = tmp_path / "damaged"
    for _ in range(150):
        data = bytearray(good)
        for at in rng.integers(0, min(len(data), 2000), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(200, 2000)] if rng.random() < 0.2 else data)
        try:
            read(path)
        except DeftMedError as error:
            assert error.exit_code in (3, 4, 6) and CANARY not in str(error)
