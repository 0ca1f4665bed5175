"""fastMRI's layout (github.com/facebookresearch/fastMRI): kspace (slices, coils, readout, phase) or (slices, readout, phase).

Zero-padded columns are no measurements: a column counts where the mask of a test file has it, where the header's encoding limits reach,
and where it holds anything at all. Where both axes are phase encodings (a 3D scan, cut along its readout) single samples count. Slices
are read one by one, and the readout's oversampling goes at once; the noise in its edges, which goes with it, whitens the coils.
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

HOLES = 0.1  # share of the samples in sampled rows and columns that may be exactly 0; with more, single points were sampled
STRAY = 0.01  # share of such points that may differ from slice to slice
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
        raise UnsupportedError(f"kspace holds {raw.dtype.name} numbers; expected complex ones: a magnitude image is "
                               "no k-space, give it as DICOM or NIfTI for a study")  # fmt: skip
    if raw.ndim not in (3, 4) or 0 in raw.shape:
        raise UnsupportedError(f"kspace has shape {raw.shape}; expected (slices, coils, readout, phase) or (slices, readout, phase)")
    slices, height, width = raw.shape[0], raw.shape[-2], raw.shape[-1]
    coils = raw.shape[1] if raw.ndim == 4 else 1
    notes: list[str] = []
    header = encoding.parse(hdf5.header(file, "ismrmrd_header", max_bytes)) if "ismrmrd_header" in file else None
    header, across = header.of_slices((height, width)) if header is not None else (None, False)
    limits = _limits(header, width)
    stated = _columns(file, limits, width, max_bytes)
    points = _points(raw, stated)
    rows = points.any(1)
    scattered = _holes(points) > HOLES
    if scattered or across:
        notes.append("sampled point by point" if scattered else "cut across the readout")
    if header is None:
        plan = encoding.Layout(height, None, None)
        notes.append("no header XML: zero-padding known from zero columns only")
    else:
        if limits is None:
            notes.append("no usable encoding limits in the header: zero-padding known from zero columns only")
        if header.trajectory not in ("cartesian", "unknown"):
            raise UnsupportedError(f"the header XML says trajectory {header.trajectory}; expected cartesian in a file of this "
                                   "layout: write it as ISMRMRD, with its points")  # fmt: skip
        plan = encoding.layout(header, (height, width), whole=bool(rows.all()) and not (scattered or across))
        if not (rows.all() or scattered or across):
            notes.append("readout not sampled from end to end: its oversampling stays")
    if slices * coils * plan.rows * width * 8 > max_bytes:
        raise ResourceError(f"kspace needs more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    y = np.empty((slices, coils, plan.rows, width), np.complex64)
    filled, edges = np.zeros(width, bool), []
    for index in range(slices):
        image = _slice(raw, index)
        image[..., ~stated] = 0
        found = (image != 0).any(0)
        other = scattered or _holes(found) > HOLES  # of lines, rows may be padding in one slice and not in another
        if other and found.any() and (found != points).mean() > STRAY * points.mean():
            raise UnsupportedError("the slices differ in their sampled points; one mask for all is supported: give each as a file")
        here = found.any(0)
        if not scattered and filled.any() and here.any() and (here != filled).any():
            raise UnsupportedError("the slices differ in their sampled columns; one mask for all is supported: give each as a file")
        filled |= here
        edges.append(None if scattered or across else encoding.edges(image, here, plan.rows))
        y[index] = encoding.narrow(image, plan.rows)
    columns: NDArray[np.bool_] = stated & filled
    if not columns.any():
        raise UnsupportedError("kspace is zero in every sampled column; expected measurements: export it again")
    lines = np.broadcast_to(columns, (plan.rows, width)) if plan.rows != height else np.outer(rows, columns)
    mask = points if scattered else np.asarray(lines)
    grid = Grid(shape=(plan.rows, width), spacing=plan.spacing or (1.0, 1.0))
    y *= mask  # rows that only other slices hold
    matrix, sigma = encoding.from_edges(edges, notes)
    reference = _reference(file, slices, max_bytes)
    if matrix is not None:
        before = None if reference is None else encoding.brightness(y)
        sigma = encoding.whiten(y, matrix)
        if reference is not None and before is not None:
            reference = _seen_by(reference, before, encoding.brightness(y))
            notes.append("reference shaded as the whitened coils see it")
    noise = None if sigma is None else np.full((slices, 1, 1, 1), sigma, np.float32)
    scan = _with_reference(Scan(y, Cartesian.of(mask), grid, noise, crop=plan.crop), reference)
    return Source("fastmri", scan=scan, digest=digest, notes=tuple(notes), placed=False, sized=plan.spacing is not None)


def _slice(raw: h5py.Dataset, index: int) -> NDArray[np.complex64]:
    """One slice, complex64 (coil, readout, phase)."""
    with np.errstate(over="ignore"):
        image = np.asarray(raw[index], np.complex64)
    if not np.isfinite(image).all():
        raise UnsupportedError(f"kspace holds values that are not finite (NaN), in slice {index + 1} of {len(raw)}; export it again")
    return image.reshape(-1, *image.shape[-2:])


def _holes(points: NDArray[np.bool_]) -> float:
    """The share of the samples (height, width) in rows and columns that hold anything which hold nothing."""
    return 1.0 - float(points[np.ix_(points.any(1), points.any(0))].mean()) if points.any() else 0.0


def _points(raw: h5py.Dataset, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Samples (height, width) that hold anything in these columns of the first slice that does: one may be padding, or was lost."""
    for index in range(len(raw)):
        points: NDArray[np.bool_] = (_slice(raw, index) != 0).any(0) & columns
        if points.any():
            return points
    return np.zeros(raw.shape[-2:], bool)


def _limits(header: encoding.Header | None, width: int) -> slice | None:
    """Columns between the header's encoding limits; None where it has none, or has them for another matrix."""
    if header is None or header.centre is None or header.last is None or header.encoded.matrix[1] != width:
        return None
    left = width // 2 - header.centre
    return slice(max(left, 0), max(left + header.last + 1, 0))


def _columns(file: h5py.File, limits: slice | None, width: int, max_bytes: int) -> NDArray[np.bool_]:
    """Columns (width,) that may have been sampled: by the mask of a test file and by the header's encoding limits."""
    columns = np.zeros(width, bool)
    columns[limits or slice(None)] = True
    if "mask" in file:
        stored = hdf5.dataset(file, "mask", max_bytes)
        if stored.size != width or stored.dtype.kind not in "biuf":
            raise UnsupportedError(f"the mask has {stored.size} entries of {stored.dtype.name}, k-space {width} columns; "
                                   "expected one each: write the mask along the phase encoding, the last axis")  # fmt: skip
        sampled = np.asarray(stored[()]).ravel() > 0
        if not sampled.any():
            raise UnsupportedError("the mask has no sampled column; expected at least one: leave the mask out, and what is not 0 counts")
        columns &= sampled
    return columns


def _reference(file: h5py.File, slices: int, max_bytes: int) -> NDArray[np.float32] | None:
    """The file's own reconstruction [slice, row, column], where it has one."""
    name = next((name for name in REFERENCES if name in file), None)
    if name is None:
        return None
    stored = hdf5.dataset(file, name, max_bytes)
    if stored.ndim != 3 or len(stored) != slices or 0 in stored.shape or stored.dtype.kind not in "iuf":
        raise UnsupportedError(f"{name} has shape {stored.shape}; expected ({slices}, rows, columns) of real numbers")
    data = np.asarray(stored[()], np.float32)
    if not np.isfinite(data).all():
        raise UnsupportedError(f"{name} holds values that are not finite (NaN); export it again")
    return data


def _seen_by(reference: NDArray[np.float32], before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    """The reference as the whitened coils would have shown it, by the `encoding.brightness` before and after.

    A root sum of squares is shaded by the coils that it sums, and whitening mixes and weighs them anew. The two shadings differ by a
    smooth factor that the object cancels out of, with a mean near 1 (whitening keeps the energy): for deviations of 1:3 and
    correlations of 0.4 it runs from 0.7 to 1.4, and a perfect reconstruction would score 21 dB against the reference as stored. So
    the reference takes the factor on and is still what this scan would show without noise and acceleration, in the file's unit.
    Leaving files with a reference unwhitened instead would show the same acquisition in two ways, and one coil changes nothing.
    """
    shape = tuple(min(a, b) for a, b in zip(reference.shape[1:], before.shape[1:], strict=True))
    before, after = central(before, shape), central(after, shape)
    return central(reference, shape) * np.divide(after, before, out=np.ones_like(after), where=before > 0)


def _with_reference(scan: Scan, reference: NDArray[np.float32] | None) -> Scan:
    """The scan with its reference, cut to the picture (or the picture to it, where that is smaller)."""
    if reference is None:
        return scan
    rows, columns = (min(a, b) for a, b in zip(scan.picture, reference.shape[1:], strict=True))
    scan = replace(scan, crop=None if (rows, columns) == scan.grid.shape else (rows, columns))
    return replace(scan, reference=Volume(central(reference, (rows, columns)), scan.lps, "a.u."))
