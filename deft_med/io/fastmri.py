"""fastMRI's layout (github.com/facebookresearch/fastMRI): kspace (slices, coils, readout, phase) or (slices, readout, phase).

Zero-padded columns are no measurements: a column counts where the mask of a test file has it, where the header's encoding limits reach,
and where it holds anything at all. Slices are read one by one, and the readout's oversampling goes at once.
"""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
from numpy.typing import NDArray

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import encoding, hdf5
from deft_med.io.source import Source
from deft_med.volume import Scan, Volume, central
from operators.geometry import Cartesian, Grid

REFERENCES = ("reconstruction_rss", "reconstruction_esc")


def read(file: h5py.File, *, digest: str, max_bytes: int) -> Source:
    """The measurements in an open fastMRI file; its reconstruction, where there is one, is the reference.

    Raises:
        UnsupportedError: k-space that is real, not of 3 or 4 axes, not finite or all zero; a mask of another length or without a
            sample; header XML with entities or several encodings; a reference that does not fit.
        CorruptError: header XML that is not well-formed.
        ResourceError: more than ``max_bytes``.
    """
    raw = hdf5.dataset(file, "kspace", 2 * max_bytes)  # the oversampling goes slice by slice
    if raw.dtype.kind != "c":
        raise UnsupportedError(f"kspace holds {raw.dtype.name} numbers; expected complex ones: a magnitude image is no k-space")
    if raw.ndim not in (3, 4) or 0 in raw.shape:
        raise UnsupportedError(f"kspace has shape {raw.shape}; expected (slices, coils, readout, phase) or (slices, readout, phase)")
    slices, height, width = raw.shape[0], raw.shape[-2], raw.shape[-1]
    coils = raw.shape[1] if raw.ndim == 4 else 1
    notes: list[str] = []
    header = encoding.parse(hdf5.header(file, "ismrmrd_header", max_bytes)) if "ismrmrd_header" in file else None
    first = _slice(raw, 0)
    rows = (first != 0).any((0, 2))
    if header is None:
        plan = encoding.Layout(height, None, None)
        notes.append("no header XML: zero-padding known from zero columns only")
    else:
        if header.trajectory not in ("cartesian", "unknown"):
            raise UnsupportedError(f"the header XML says trajectory {header.trajectory}; fastMRI k-space is Cartesian")
        plan = encoding.layout(header, (height, width), whole=bool(rows.all()))
        if not rows.all():
            notes.append("readout not sampled from end to end: its oversampling stays")
    stated = _columns(file, header, width, max_bytes)
    if slices * coils * plan.rows * width * 8 > max_bytes:
        raise ResourceError(f"kspace needs more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    y = np.empty((slices, coils, plan.rows, width), np.complex64)
    filled, sigmas = np.zeros(width, bool), []
    for index in range(slices):
        image = first if index == 0 else _slice(raw, index)
        image[..., ~stated] = 0
        here = (image != 0).any((0, 1))
        if index and filled.any() and here.any() and (here != filled).any():
            raise UnsupportedError("the slices differ in their sampled columns; one mask for all is supported: give each as a file")
        filled |= here
        sigmas.append(encoding.edge_noise(image, np.broadcast_to(here, (height, width)), plan.rows))
        y[index] = encoding.narrow(image, plan.rows)
    columns = stated & filled
    if not columns.any():
        raise UnsupportedError("kspace is zero in every sampled column; there is nothing to reconstruct")
    mask = np.broadcast_to(columns, (plan.rows, width)) if plan.rows != height else rows[:, None] & columns
    noise = None
    if all(sigma is not None for sigma in sigmas):
        noise = np.array(sigmas, np.float32)[:, None, None, None]
        notes.append("noise level from the edges of the readout")
    grid = Grid(shape=(plan.rows, width), spacing=plan.spacing or (1.0, 1.0))
    y *= mask  # rows that only other slices hold
    scan = Scan(y, Cartesian.of(mask), grid, noise, crop=plan.crop)
    scan = _with_reference(scan, file, max_bytes)
    return Source("fastmri", scan=scan, digest=digest, notes=tuple(notes), placed=False, sized=plan.spacing is not None)


def _slice(raw: h5py.Dataset, index: int) -> NDArray[np.complex64]:
    """One slice, complex64 (coil, readout, phase)."""
    with np.errstate(over="ignore"):
        image = np.asarray(raw[index], np.complex64)
    if not np.isfinite(image).all():
        raise UnsupportedError(f"kspace holds values that are not finite (NaN), in slice {index + 1} of {len(raw)}; export it again")
    return image.reshape(-1, *image.shape[-2:])


def _columns(file: h5py.File, header: encoding.Header | None, width: int, max_bytes: int) -> NDArray[np.bool_]:
    """Columns (width,) that may have been sampled: by the mask of a test file and by the header's encoding limits."""
    columns = np.ones(width, bool)
    if "mask" in file:
        stored = hdf5.dataset(file, "mask", max_bytes)
        if stored.size != width or stored.dtype.kind not in "biuf":
            raise UnsupportedError(f"the mask has {stored.size} entries of {stored.dtype.name}, k-space {width} columns; expected one each")
        columns &= np.asarray(stored[()]).ravel() > 0
        if not columns.any():
            raise UnsupportedError("the mask has no sampled column; expected at least one")
    if header is not None and header.centre is not None and header.last is not None and header.encoded.matrix[1] == width:
        left = width // 2 - header.centre
        columns[: max(left, 0)] = False
        columns[max(left + header.last + 1, 0) :] = False
    return columns


def _with_reference(scan: Scan, file: h5py.File, max_bytes: int) -> Scan:
    """The scan with the file's own reconstruction, cut to the picture (or the picture to it, where that is smaller)."""
    name = next((name for name in REFERENCES if name in file), None)
    if name is None:
        return scan
    stored = hdf5.dataset(file, name, max_bytes)
    if stored.ndim != 3 or len(stored) != len(scan.y) or 0 in stored.shape or stored.dtype.kind not in "iuf":
        raise UnsupportedError(f"{name} has shape {stored.shape}; expected ({len(scan.y)}, rows, columns) of real numbers")
    data = np.asarray(stored[()], np.float32)
    if not np.isfinite(data).all():
        raise UnsupportedError(f"{name} holds values that are not finite (NaN); export it again")
    rows, columns = (min(a, b) for a, b in zip(scan.picture, data.shape[1:], strict=True))
    scan = replace(scan, crop=None if (rows, columns) == scan.grid.shape else (rows, columns))
    return replace(scan, reference=Volume(central(data, (rows, columns)), scan.lps, "a.u."))
