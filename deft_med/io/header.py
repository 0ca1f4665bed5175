"""One DICOM header, opened safely and checked: is this a CT or MR slice that we can place and scale?

The rules are those of PS3.3 C.7.6.2 (plane), C.7.6.3 (pixels), C.8.2.1, C.8.3.1 and C.11.1 (CT image, MR image, Modality LUT).
Values are read one by one, because pydicom converts them on access and throws then.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io.gate import BROKEN, FILE_BYTES, INFLATED_BYTES, broken, content, inflate

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
RAW_DATA = "1.2.840.10008.5.1.4.1.1.66"
DICOMDIR = "1.2.840.10008.1.3.10"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT", "1.2.840.10008.5.1.4.1.1.2.2": "CT", "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.3": "MR", "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}  # fmt: skip
UNREADABLE = (*BROKEN, InvalidDicomError, BytesLengthException)
# JPEG, near-lossless JPEG-LS, JPEG 2000, HTJ2K and JPEG XL syntaxes that may hold lossy pixels (PS3.5 section 10)
LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 53, 55, 81, 91, 93, 112, 203)}
# values of Image Type that say: not the attenuation of one slice
NOT_A_SLICE = {
    "LOCALIZER", "SCOUT", "MIP", "MINIP", "MIN_IP", "MAX_IP", "MAXIP", "PROJECTION IMAGE", "VOLREN", "SCREEN SAVE", "SCREEN_SAVE",
    "DOSE_INFO", "STDDEV", "PHI_MAP", "PASTED",
}  # fmt: skip
# of an MR image: not a magnitude, or several slices in one
NOT_A_MAGNITUDE = {
    "P", "PHASE", "PHASE MAP", "PHASE_MAP", "PHASE SUBTRACT", "R", "REAL", "I", "IMAGINARY", "MIXED", "VELOCITY", "VELOCITY MAP", "V",
    "MOSAIC", "ADC", "FA", "T1 MAP", "T2 MAP", "T2_STAR MAP", "DIFFUSION MAP", "DENSITY MAP",
}  # fmt: skip
BIGGEST_SIDE = 8192


@dataclass(frozen=True, eq=False)
class Plane:
    """Place of one slice: first pixel's centre (3,), unit vectors along a row and a column (3,), spacing (dy, dx), thickness; LPS mm."""

    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float | None

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.along_row, self.along_column)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """pydicom neither warns about values nor refuses them inside, whatever it is set to outside: its words may quote patient data."""
    settings = pydicom.config.settings
    before = settings.reading_validation_mode, settings.writing_validation_mode
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode, settings.writing_validation_mode = before


def dataset(path: Path, what: str, *, pixels: bool) -> Dataset:
    """A file's dataset, with or without what begins at its pixels; deflated files are inflated under a cap first.

    Raises:
        CorruptError: not readable as DICOM, or truncated before the data set.
        ResourceError: larger than FILE_BYTES as it lies, or than INFLATED_BYTES once inflated.
    """
    if path.stat().st_size > FILE_BYTES:
        raise ResourceError(f"{what} is larger than {FILE_BYTES // 2**20} MiB, a thousand CT slices; give the series as single slices")
    data = content(path)
    body, syntax = file_meta(data, what)
    if syntax == DeflatedExplicitVRLittleEndian:
        # handed on as Explicit VR Little Endian, which is what it is once inflated (PS3.5 A.5)
        squeezed, value = data[body:], b"1.2.840.10008.1.2.1\0"
        data = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
        data += inflate(squeezed, wbits=-15, cap=INFLATED_BYTES, what=what)
    with broken(what, also=UNREADABLE), quiet_pydicom():
        ds = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels)
        last = ds.get_item(max(ds.keys())) if len(ds) else None
    # pydicom takes what is left of a value that ends early
    if isinstance(last, RawDataElement) and last.length != 0xFFFFFFFF and len(last.value or b"") < last.length:
        raise CorruptError(f"{what} is truncated: its last value ends early; copy or export it again")
    return ds


def file_meta(data: bytes, what: str) -> tuple[int, str]:
    """Where the data set begins, and its transfer syntax: a walk over the File Meta Information (PS3.10 7.1).

    CorruptError where the file ends inside it or no transfer syntax is named.
    """
    at, syntax = 132, ""
    while True:
        if at == len(data) or len(data) < at + 8:
            raise CorruptError(f"{what} is truncated: it ends inside its first header ({len(data)} bytes); copy or export it again")
        group, element = struct.unpack_from("<HH", data, at)
        if group != 2:
            break
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN")
        length = int.from_bytes(data[at + 8 : at + 12] if long else data[at + 6 : at + 8], "little")
        start = at + (12 if long else 8)
        if element == 0x10:
            syntax = data[start : start + length].rstrip(b"\0 ").decode("ascii", "replace")
        at = start + length
    if not syntax:
        raise CorruptError(f"{what} names no transfer syntax, so its bytes have no meaning; export it again")
    return at, syntax


def text(header: Dataset, keyword: str) -> str:
    """An attribute as text, multiple values joined by a backslash; "" where it is absent, empty or not readable."""
    with quiet_pydicom():
        try:
            value = header.get(keyword)
        except UNREADABLE:
            return ""
    if value is None:
        return ""
    return "\\".join(str(v).strip() for v in value) if isinstance(value, pydicom.multival.MultiValue | list) else str(value).strip()


def numbers(header: Dataset, keyword: str, count: int = 1) -> tuple[float, ...] | None:
    """An attribute as ``count`` finite numbers, or None where it is absent, of another number, text, NaN or infinite."""
    parts = text(header, keyword).split("\\")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def whole(header: Dataset, keyword: str) -> int | None:
    """An attribute as one whole number, or None."""
    value = numbers(header, keyword)
    return int(value[0]) if value and value[0] == int(value[0]) else None


def check_slice(header: Dataset, what: str, *, allow_lossy: bool) -> Plane:
    """The place of a slice whose header says that its pixels can be read as HU (CT) or magnitude (MR); order: kind, pixels, scale, place.

    Raises:
        UnsupportedError: another kind of object or image, no decoder, lossy without leave, a bad rescale, no or odd geometry.
        CorruptError: a header without a class, Rows 0 and the like.
    """
    _check_kind(header, what)
    _check_pixels(header, what, allow_lossy=allow_lossy)
    rescale(header, what)
    return _plane(header, what)


def kind_name(header: Dataset) -> str:
    """The standard's name for the kind of object, without UIDs: "MR Image Storage" and so on."""
    uid = UID(text(header, "SOPClassUID"), validation_mode=pydicom.config.IGNORE)
    return uid.name if uid and uid.name != uid else "an object of an unknown kind"


def _check_kind(header: Dataset, what: str) -> None:
    sop_class = text(header, "SOPClassUID")
    if not sop_class:
        raise CorruptError(f"{what} is truncated or damaged: its header does not say what kind of object it is; export it again")
    if sop_class in ENHANCED:
        kind = ENHANCED[sop_class]
        raise UnsupportedError(f"{what} is an enhanced (multi-frame) {kind}; not supported yet: export the series as single slices")
    if sop_class == RAW_DATA:
        raw = any(tag.group in (0x7029, 0x7031, 0x7033) for tag in header.keys())
        kind = "raw CT projections (DICOM-CT-PD)" if raw else "raw scanner data of a private format"
        raise UnsupportedError(f"{what} holds {kind}; not supported yet: give the reconstructed CT series or a sinogram.npz")
    if sop_class == DICOMDIR:
        raise UnsupportedError(f"{what} is a DICOMDIR, an index; give the folder of one series")
    if sop_class not in (CT_IMAGE, MR_IMAGE):
        raise UnsupportedError(f"{what} is not a CT or MR image but {kind_name(header)}; give a CT or MR series")
    if whole(header, "NumberOfFrames") not in (1, None) or (text(header, "NumberOfFrames") and whole(header, "NumberOfFrames") is None):
        raise UnsupportedError(f"{what} has several frames (or a frame count that is no number), a slice has one; export single slices")
    words = {word.strip().upper() for word in text(header, "ImageType").split("\\")}
    odd = sorted(words & NOT_A_SLICE)
    if odd:
        raise UnsupportedError(f"{what} is no plain slice: its Image Type says {', '.join(odd)}; take it out of the series")
    odd = sorted((words | {text(header, "ComplexImageComponent").upper()}) & NOT_A_MAGNITUDE) if is_mr(header) else []
    if odd:
        raise UnsupportedError(f"{what} is no magnitude of one MR slice: its Image Type says {', '.join(odd)}; give the magnitude series")


def _check_pixels(header: Dataset, what: str, *, allow_lossy: bool) -> None:
    rows, columns = whole(header, "Rows"), whole(header, "Columns")
    if not rows or not columns or rows < 0 or columns < 0:
        raise CorruptError(f"{what} is truncated or damaged: its header gives no rows or columns (Rows 0 or missing); export it again")
    if max(rows, columns) > BIGGEST_SIDE:
        raise ResourceError(f"{what} claims {rows} x {columns} pixels, more than {BIGGEST_SIDE} along a side; refused")
    if min(rows, columns) < 2:
        raise UnsupportedError(f"{what} has {rows} x {columns} pixels; a slice has at least 2 x 2")
    samples, photometric = whole(header, "SamplesPerPixel"), text(header, "PhotometricInterpretation")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnsupportedError(f"{what} is a colour or palette picture, not one of measured values; give the original series")
    allocated, stored = whole(header, "BitsAllocated"), whole(header, "BitsStored")
    if allocated not in (8, 16, 32) or stored is None or not 1 <= stored <= allocated:
        raise CorruptError(f"{what} is damaged: bits allocated and stored do not fit each other; export it again")
    if whole(header, "PixelRepresentation") not in (0, 1):
        raise CorruptError(f"{what} is damaged: it does not say whether its pixels have a sign; export it again")
    if is_lossy(header) and not allow_lossy:
        raise UnsupportedError(f"{what} went through lossy compression; give the original, or --allow-lossy to go on and have it recorded")
    syntax = transfer_syntax(header)
    if not syntax.is_transfer_syntax or syntax.is_private:
        raise UnsupportedError(f"{what} is in a transfer syntax that is not known, so there is no decoder for it; export it uncompressed")
    if syntax.is_compressed and not syntax.is_deflated and not decodable(syntax):
        raise UnsupportedError(f"{what} is compressed as {syntax.name} and no decoder for that is installed; export it uncompressed")


def decodable(syntax: UID) -> bool:
    """Whether a decoder for a compressed transfer syntax is installed."""
    try:
        return pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def is_mr(header: Dataset) -> bool:
    """Whether the object is a classic MR image."""
    return text(header, "SOPClassUID") == MR_IMAGE


def is_lossy(header: Dataset) -> bool:
    """Whether the pixels were ever compressed with loss, by the transfer syntax or by Lossy Image Compression (0028,2110)."""
    return text(header, "LossyImageCompression") == "01" or transfer_syntax(header) in LOSSY


def transfer_syntax(header: Dataset) -> UID:
    """The file's transfer syntax, or an empty UID."""
    meta = getattr(header, "file_meta", None)
    return UID("" if meta is None else text(meta, "TransferSyntaxUID"), validation_mode=pydicom.config.IGNORE)


def rescale(header: Dataset, what: str) -> tuple[float, float]:
    """(slope, intercept) from stored values to HU; UnsupportedError where they are missing, not finite, zero or not of HU.

    An MR image has none of its own accord, so its values are the stored ones; where it has them all the same, they are used.
    """
    if "ModalityLUTSequence" in header:
        raise UnsupportedError(f"{what} has a Modality LUT instead of a rescale; expected RescaleSlope and RescaleIntercept to HU")
    if is_mr(header) and not text(header, "RescaleSlope") and not text(header, "RescaleIntercept"):
        return 1.0, 0.0
    slope, intercept = numbers(header, "RescaleSlope"), numbers(header, "RescaleIntercept")
    if slope is None or intercept is None or slope[0] == 0 or abs(slope[0]) > 1e4 or abs(intercept[0]) > 1e6:
        raise UnsupportedError(f"{what} has a bad rescale: RescaleSlope and RescaleIntercept must be finite, the slope not 0; export again")
    if not is_mr(header) and text(header, "RescaleType").upper() not in ("", "HU", "US", "UNSPECIFIED"):
        raise UnsupportedError(f"{what} holds another quantity than HU (RescaleType), as from spectral CT; give the HU series")
    return slope[0], intercept[0]


def _plane(header: Dataset, what: str) -> Plane:
    spacing = numbers(header, "PixelSpacing", 2)
    if spacing is None or min(spacing) <= 0 or max(spacing) > 100:
        raise UnsupportedError(f"{what} has no usable Pixel Spacing (missing, or not two positive lengths in mm): its size is not known")
    position, orientation = numbers(header, "ImagePositionPatient", 3), numbers(header, "ImageOrientationPatient", 6)
    if position is None or orientation is None:
        raise UnsupportedError(f"{what} has no Image Position or Image Orientation (Patient), so its place in the patient is not known")
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    if abs(row @ row - 1) > 2e-3 or abs(column @ column - 1) > 2e-3 or abs(row @ column) > 1e-3:
        raise UnsupportedError(f"{what} has an Image Orientation that is not two unit vectors at a right angle")
    # rounding in the file is taken out: exact unit vectors, so that the spacing is the file's own
    row = row / np.linalg.norm(row)
    column = column - (row @ column) * row
    column /= np.linalg.norm(column)
    if not is_mr(header) and abs(np.cross(row, column)[2]) < np.cos(np.pi / 4):
        raise UnsupportedError(f"{what} is not an axial slice (more than 45 degrees away); give the axial series")
    lengths = numbers(header, "SliceThickness"), numbers(header, "SpacingBetweenSlices")
    thickness = next((abs(v[0]) for v in lengths if v and 0 < abs(v[0]) < 1000), None)
    return Plane(np.array(position), row, column, (spacing[0], spacing[1]), thickness)
