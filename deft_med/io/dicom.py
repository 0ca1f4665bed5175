"""CT and MR images from DICOM: one file is one slice, a folder is one series, and nothing about its geometry is guessed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from deft_med.errors import CorruptError, DeftMedError, ResourceError, UnsupportedError
from deft_med.io.gate import MAX_BYTES, broken, kind_of, regular
from deft_med.io.header import (
    DICOMDIR,
    UNREADABLE,
    Plane,
    check_slice,
    dataset,
    is_lossy,
    is_mr,
    kind_name,
    quiet_pydicom,
    rescale,
    text,
    whole,
)
from deft_med.io.source import Source
from deft_med.volume import Volume

AIR = -1024.0  # HU of what lies outside the scan
PHASE_LIKE = 0.1  # an MR image whose lowest value is further below 0 than this share of its highest is no magnitude
NO_TISSUE = -1500.0  # HU: no measured attenuation is so low; some scanners mark the outside so without saying it
MOST_FILES = 20_000
TILT = np.tan(np.radians(0.05))


def read_file(path: Path, *, allow_lossy: bool = False, max_bytes: int = MAX_BYTES) -> Source:
    """The slice in one DICOM file as a volume of one slice; errors as `read_folder`."""
    return _read([path], what=["the input"], allow_lossy=allow_lossy, max_bytes=max_bytes)


def read_folder(folder: Path, *, allow_lossy: bool = False, max_bytes: int = MAX_BYTES) -> Source:
    """The one CT or MR series in a folder and its subfolders, sorted along the slices' normal (PS3.3 C.7.6.2.1.1).

    Files that are not DICOM are passed over and counted.

    Raises:
        UnsupportedError: no DICOM inside, several series, no axial CT slice or MR magnitude, missing or duplicated or tilted slices.
        CorruptError: an empty, truncated or damaged DICOM file.
        ResourceError: more files or bytes than allowed.
        UsageError: a pipe, socket or device in the folder.
    """
    paths: list[Path] = []
    others = 0
    candidates = _files(folder)
    for index, path in enumerate(candidates):
        what = f"file {index + 1} of {len(candidates)}"
        regular(path, what)
        try:
            found = kind_of(path, what) == "dicom"
        except DeftMedError:
            if path.suffix.lower() in (".dcm", ".dicom", ".ima"):
                raise
            found = False
        paths += [path] if found else []
        others += not found
    if not paths:
        raise UnsupportedError(f"the folder holds no DICOM file ({others} other files); give the folder of one series")
    names = [f"file {index + 1} of {len(paths)}" for index in range(len(paths))]
    source = _read(paths, what=names, allow_lossy=allow_lossy, max_bytes=max_bytes)
    return source if not others else _noted(source, f"{others} files that are not DICOM passed over")


def _files(folder: Path) -> list[Path]:
    """Files under a folder in a fixed order; hidden ones and links to folders are passed over."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in sorted(names) if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise ResourceError(f"the folder holds more than {MOST_FILES} files; give the folder of one series")
    return found


def _read(paths: list[Path], *, what: list[str], allow_lossy: bool, max_bytes: int) -> Source:
    headers, digests = [], []
    for path, name in zip(paths, what, strict=True):
        headers.append(dataset(path, name, pixels=False))
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    keep = [k for k, h in enumerate(headers) if text(h, "SOPClassUID") != DICOMDIR or len(headers) == 1]
    _check_one_series([headers[k] for k in keep])
    planes = {k: check_slice(headers[k], what[k], allow_lossy=allow_lossy) for k in keep}
    kept = _without_copies(headers, digests, list(planes))
    _check_alike(headers, planes, kept)
    order, affine = _stack(planes, kept)
    rows, columns = whole(headers[order[0]], "Rows"), whole(headers[order[0]], "Columns")
    assert rows and columns
    needed = len(order) * rows * columns * 4
    if needed > max_bytes:
        asked, allowed = needed / 2**30, max_bytes / 2**30
        raise ResourceError(f"the series needs {asked:.3g} GiB, more than {allowed:.3g} GiB; give fewer slices or raise max_bytes")
    with broken("the series"):
        data = np.empty((len(order), rows, columns), np.float32)
    outside = 0
    for position, k in enumerate(order):
        data[position], count = _values(paths[k], what[k], headers[k])
        outside += count
    if data.min() == data.max():
        raise UnsupportedError("every pixel of the image has the same value; there is nothing to reconstruct")
    mr = is_mr(headers[order[0]])
    notes = []
    if len(keep) > len(kept):
        notes.append(f"{len(keep) - len(kept)} identical copies passed over")
    if outside:
        notes.append(f"{outside} pixels outside the scan set to {'0' if mr else f'{AIR:.0f} HU'}")
    if mr and data.min() < -PHASE_LIKE * data.max():
        low, high = float(data.min()), float(data.max())
        raise UnsupportedError(f"the MR image goes from {low:.4g} to {high:.4g}, so it is no magnitude; give the magnitude series")
    if not mr and data.min() > -500:
        notes.append("no air (nothing below -500 HU): are these CT numbers?")
    lossy = any(is_lossy(headers[k]) for k in order)
    if lossy:
        notes.append("source with lossy compression")
    digest = hashlib.sha256("".join(digests[k] for k in order).encode()).hexdigest()
    kept_headers = [_public(headers[k]) for k in order]
    volume = Volume(data, affine, "a.u." if mr else "HU")
    return Source("dicom", volume=volume, headers=kept_headers, lossy=lossy, digest=digest, notes=tuple(notes))


def _check_one_series(headers: list[Dataset]) -> None:
    series = [text(h, "SeriesInstanceUID") for h in headers]
    if len(set(series)) > 1:
        groups = Counter((uid, kind_name(h)) for uid, h in zip(series, headers, strict=True))
        found = ", ".join(f"{count} x {kind}" for (_, kind), count in groups.most_common(6))
        raise UnsupportedError(f"the folder holds {len(set(series))} series ({found}); give a folder with one series, or one file")


def _without_copies(headers: list[Dataset], digests: list[str], keep: list[int]) -> list[int]:
    """Indices without byte-identical copies; UnsupportedError where two different files claim one SOP Instance UID."""
    first: dict[str, int] = {}
    for k in keep:
        uid = text(headers[k], "SOPInstanceUID")
        if uid in first and digests[first[uid]] != digests[k]:
            raise UnsupportedError("two different files carry the same SOP Instance UID; the series is ambiguous: export it again")
        first.setdefault(uid, k)
    return list(first.values())


def _check_alike(headers: list[Dataset], planes: dict[int, Plane], kept: list[int]) -> None:
    first = kept[0]
    for k in kept[1:]:
        for keyword, name in (("SOPClassUID", "kind"), ("Rows", "rows"), ("Columns", "columns"), ("PatientID", "patient"),
                              ("StudyInstanceUID", "study"), ("FrameOfReferenceUID", "frame of reference")):  # fmt: skip
            if text(headers[k], keyword) != text(headers[first], keyword):
                raise UnsupportedError(f"the slices of the series differ in {name}; give one consistent series")
        a, b = planes[first], planes[k]
        if not np.allclose(a.spacing, b.spacing, rtol=1e-4, atol=0):
            raise UnsupportedError("the slices of the series differ in pixel spacing; give one consistent series")
        if not np.allclose([a.along_row, a.along_column], [b.along_row, b.along_column], atol=1e-3):
            raise UnsupportedError("the slices of the series differ in orientation (a localizer among them?); give one consistent series")


def _stack(planes: dict[int, Plane], kept: list[int]) -> tuple[list[int], NDArray[np.float64]]:
    """Order of the slices along their normal and the affine of the stack; UnsupportedError where they are no regular right-angled stack."""
    normal = planes[kept[0]].normal
    order = sorted(kept, key=lambda k: float(planes[k].position @ normal))
    first, last = planes[order[0]], planes[order[-1]]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.along_row * first.spacing[1], first.along_column * first.spacing[0]
    affine[:3, 3] = first.position
    if len(order) == 1:
        affine[:3, 2] = normal * (first.thickness or 1.0)
        return order, affine
    positions = np.array([planes[k].position for k in order])
    heights = (positions - positions[0]) @ normal
    gaps = np.diff(heights)
    tolerance = max(1e-2, 0.01 * float(np.median(gaps)))
    if gaps.min() < 1e-3:
        count = int((gaps < 1e-3).sum())
        raise UnsupportedError(f"{count} slices lie where another one lies (duplicated position); give each position once")
    step = float(np.median(gaps))
    if step > 2 * gaps.min() - tolerance:
        step = float(gaps.min())
    if np.ptp(gaps) > tolerance:
        ratio = gaps / step
        if np.abs(gaps - np.round(ratio) * step).max() <= tolerance:
            where = int(np.argmax(ratio)) + 1
            missing = int(np.round(ratio).sum()) - len(gaps)
            raise UnsupportedError(f"{missing} slices are missing (widest gap: after slice {where} of {len(order)}); give the whole series")
        raise UnsupportedError(f"the slices are not evenly spaced ({gaps.min():.3g} to {gaps.max():.3g} mm); give a regular series")
    drift = positions - positions[0] - heights[:, None] * normal
    if np.linalg.norm(drift, axis=1).max() > max(2e-2, TILT * heights[-1]):
        angle = np.degrees(np.arctan(np.linalg.norm(drift[-1]) / heights[-1]))
        raise UnsupportedError(
            f"the stack is tilted or shifted (gantry tilt, {angle:.1f} degrees): its slices do not lie above each other; "
            "give single slices or a resampled series"
        )
    affine[:3, 2] = (last.position - first.position) / (len(order) - 1)
    return order, affine


def _values(path: Path, what: str, header: Dataset) -> tuple[NDArray[np.float32], int]:
    """HU or a.u. of one slice, float32 [row, column], and how many of its pixels lie outside the scan (set to AIR, or 0 in MR).

    Pixel Padding (PS3.3 C.7.5.1.1.2) is compared with the stored values, before the rescale, with the sign that they have.
    """
    full = dataset(path, what, pixels=True)
    if "PixelData" not in full:
        raise CorruptError(f"{what} is truncated: it ends before its pixels; copy or export it again")
    with broken(what, action="decoded", also=UNREADABLE), quiet_pydicom():
        stored = pydicom.pixels.pixel_array(full)
    if stored.shape != (whole(header, "Rows"), whole(header, "Columns")) or stored.dtype.kind not in "iu":
        raise CorruptError(f"{what} is damaged: its pixels decode to another shape than its header says; export it again")
    slope, intercept = rescale(header, what)
    values = stored.astype(np.float64) * slope + intercept
    mr = is_mr(header)
    outside = np.zeros(values.shape, bool) if mr else values < NO_TISSUE
    padding, limit = whole(full, "PixelPaddingValue"), whole(full, "PixelPaddingRangeLimit")
    if padding is not None:
        bounds = sorted(_signed(v, stored.dtype) for v in (padding, padding if limit is None else limit))
        outside |= (stored >= bounds[0]) & (stored <= bounds[1])
    values[outside] = 0.0 if mr else AIR
    if not mr and values.max() > 1e6:
        raise UnsupportedError(f"{what} holds values up to {values.max():.3g} HU; those are no CT numbers")
    return values.astype(np.float32), int(outside.sum())


def _signed(value: int, dtype: np.dtype) -> int:
    """A padding value as the stored pixels would show it: files give it with the wrong sign (US for SS and back)."""
    bits, low = 8 * dtype.itemsize, int(np.iinfo(dtype).min)
    return (value - low) % 2**bits + low


def _public(header: Dataset) -> Dataset:
    """The header without private attributes, overlays, icons and what cannot be read; its file meta goes with it."""
    with quiet_pydicom():
        for tag in list(header.keys()):
            try:
                keep = not tag.is_private and tag.group >> 8 != 0x60 and tag != 0x00880200 and header[tag].VR is not None
            except UNREADABLE:
                keep = False
            if not keep:
                del header[tag]
    return header


def _noted(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))
