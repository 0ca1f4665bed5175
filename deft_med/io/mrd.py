"""ISMRMRD / MRD (github.com/ismrmrd): readouts with a header each, put on a Cartesian grid [slice, coil, readout, phase].

Rows are the readout and columns the phase encoding, as in fastMRI. Noise readouts whiten the coils or, without them, the noise in the
edges of the readout; what is measured twice is averaged. `readouts` says which readouts count and where the picture lies, as Gadgetron
places it; readouts along a trajectory of their own go to `trajectory`.
"""

from __future__ import annotations

import h5py
import numpy as np
from numpy.typing import NDArray

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import encoding, hdf5
from deft_med.io.readouts import Indices, Readouts, sort
from deft_med.io.source import Source
from deft_med.volume import Scan
from operators.geometry import Cartesian, Grid


def read(group: h5py.Group, *, digest: str, max_bytes: int) -> Source:
    """The measurements in an open ISMRMRD group (members ``data`` and ``xml``).

    Raises:
        UnsupportedError: no XML, echo-planar readouts, samples off the grid, slices sampled differently, values that are not finite, and
            what `readouts.sort` and `trajectory.read` refuse.
        CorruptError: XML that is not well-formed, readouts shorter than their headers say.
        ResourceError: more than ``max_bytes``.
    """
    if "xml" not in group:
        raise UnsupportedError("the ISMRMRD file has no header XML, so its matrix is not known; convert the raw data again")
    header = encoding.parse(hdf5.header(group, "xml", max_bytes))
    if header.trajectory == "epi":
        raise UnsupportedError("the ISMRMRD file has a trajectory that is not supported: epi; expected cartesian, radial, spiral, "
                               "goldenangle or other: regrid its readouts first")  # fmt: skip
    readouts = sort(group, header, max_bytes)
    off_grid = header.trajectory == "unknown" and readouts.picked["trajectory_dimensions"].any()
    if header.trajectory not in ("cartesian", "unknown") or off_grid:
        from deft_med.io import trajectory

        return trajectory.read(readouts, digest=digest, max_bytes=max_bytes)
    return _cartesian(readouts, digest, max_bytes)


def _cartesian(readouts: Readouts, digest: str, max_bytes: int) -> Source:
    notes = readouts.notes
    first = _first(readouts)
    rank, affine_of = readouts.place()
    y, counts = _grid(readouts, first, rank[readouts.slices], max_bytes)
    mask = counts > 0
    if (mask != mask[0]).any():
        raise UnsupportedError("the slices of the ISMRMRD file differ in what is sampled; one mask for all is supported: split the file")
    whole = bool((mask[0].all(0) | ~mask[0].any(0)).all())
    plan = encoding.layout(readouts.header, mask.shape[1:], whole=whole)
    if not whole:
        notes.append("readouts not sampled from end to end (asymmetric echo): their oversampling stays")
    np.divide(y, counts[:, None], out=y, where=mask[:, None])
    matrix, sigma = readouts.whitener(), None
    if matrix is None and whole:  # as one readout saw it: averages are quieter
        single = (y[k] * np.sqrt(counts[k], dtype=np.float32) for k in range(len(y)))
        matrix, sigma = encoding.from_edges([encoding.edges(image, mask[0].any(0), plan.rows) for image in single], notes)
    if whole:
        y = np.stack([encoding.narrow(image, plan.rows) for image in y])
    sampled = np.broadcast_to(mask[0].any(0), (plan.rows, mask.shape[2])) if whole else mask[0]
    if matrix is not None:
        sigma = encoding.whiten(y, matrix)
    noise = None
    if sigma is not None:
        level = sigma * np.where(mask, counts, 1)[:, None] ** -0.5
        noise = (level.min(2, keepdims=True) if whole else level).astype(np.float32)
    grid = Grid(shape=(plan.rows, mask.shape[2]), spacing=plan.spacing or (1.0, 1.0))
    affine = affine_of(grid) if plan.spacing is not None else None
    try:
        scan = Scan(y, Cartesian.of(sampled), grid, noise, affine=affine, crop=plan.crop)
    except ValueError as error:
        raise UnsupportedError(f"the ISMRMRD file does not fit together: {error}") from None  # our own words: fields and numbers
    return Source("mrd", scan=scan, digest=digest, notes=tuple(notes), placed=affine is not None, sized=plan.spacing is not None)


def _first(readouts: Readouts) -> NDArray[np.int64]:
    """Row and column (readouts, 2) of the grid at which each readout begins."""
    header, picked = readouts.header, readouts.picked
    width, height = header.encoded.matrix[1], header.encoded.matrix[0]
    samples, centre = picked["number_of_samples"].astype(np.int64), picked["center_sample"].astype(np.int64)
    if not centre.any() and (samples == height).all():
        centre = samples // 2
        readouts.notes.append("the readouts do not say where k = 0 is: taken for their middle")
    rows = height // 2 - centre + picked["discard_pre"]
    last = height // 2 - centre + samples - picked["discard_post"]
    if header.centre is None:
        readouts.notes.append("the header does not say which line is k = 0: taken for the middle one")
    columns = picked["idx"]["kspace_encode_step_1"].astype(np.int64)
    columns = columns + (width // 2 - header.centre if header.centre is not None else 0)
    if (rows < 0).any() or (last > height).any() or (last <= rows).any() or (columns < 0).any() or (columns >= width).any():
        raise UnsupportedError(f"readouts of the ISMRMRD file lie outside its encoded matrix of {height} x {width}; check the header XML")
    return np.stack([rows, columns], 1)


def _grid(
    readouts: Readouts, first: NDArray[np.int64], slices: Indices, max_bytes: int
) -> tuple[NDArray[np.complex64], NDArray[np.int32]]:
    """Sums of the readouts on the grid [slice, coil, row, column] and how many lie on each point [slice, row, column]."""
    (height, width), coils, heads = readouts.header.encoded.matrix[:2], readouts.coils, readouts.heads
    count = int(slices.max()) + 1
    if count * coils * height * width * 8 > max_bytes:
        raise ResourceError(f"the k-space matrix needs more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    lines = np.zeros((count, width, coils, height), np.complex64)  # a readout is contiguous
    counts = np.zeros((count, width, height), np.int32)
    for (row, column), k, (index, data) in zip(first, slices, readouts.samples(readouts.image), strict=True):
        data = data[:, int(heads["discard_pre"][index]) : data.shape[1] - int(heads["discard_post"][index])]
        lines[k, column, :, row : row + data.shape[1]] += data
        counts[k, column, row : row + data.shape[1]] += 1
    return np.ascontiguousarray(lines.transpose(0, 2, 3, 1)), counts.transpose(0, 2, 1)
