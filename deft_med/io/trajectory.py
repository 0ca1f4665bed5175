"""ISMRMRD off the grid: readouts (radial, spiral, golden angle, other) that bring their own points of k-space.

kx runs along read_dir, which is down the rows, and ky along phase_dir. The standard leaves their unit open, so it is told by how far
they reach: a scan fills the k-space of its pixels.

| kx and ky reach | unit | as written by |
|---|---|---|
| 0.5 | cycles per pixel | Gadgetron, MRIReco.jl, MRD's own phantom |
| N / 2 | cycles per field of view, the picture's or the encoded one | BART, MRpro |
| pi | rad per pixel | sigpy and finufft call it this |

The grid is the picture's (reconSpace); what lies beyond its field of view is not modelled. Readouts of the same points are averaged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import encoding
from deft_med.io.readouts import Readouts
from deft_med.io.source import Source
from deft_med.volume import Scan
from operators.geometry import Grid, Trajectory

FILLED = (0.6, 1.05)  # of the way to the edge of k-space that a trajectory's outermost points may lie, along either axis
WHOLE = 0.95  # of the way, along both axes, at which one of several units is believed
ROUNDING = 1e-6  # of a point on the edge


def read(readouts: Readouts, *, digest: str, max_bytes: int) -> Source:
    """The measurements of readouts along trajectories of their own, one trajectory for all slices.

    Raises:
        UnsupportedError: no points, points in 3D or not finite, a unit that their range does not tell, slices along different
            trajectories, pixels of the two spaces that do not fit, or finufft is not installed.
        CorruptError: fewer points or samples than the headers say.
        ResourceError: more than ``max_bytes``.
    """
    grid, sized = _grid(readouts.header)
    dimensions = np.unique(readouts.picked["trajectory_dimensions"])
    if "traj" not in (readouts.stored.dtype.names or ()) or 0 in dimensions:
        raise UnsupportedError(f"the ISMRMRD file is {readouts.header.trajectory} but (some of) its readouts hold no trajectory; write kx "
                               "and ky of every sample into traj, as the sequence played them")  # fmt: skip
    if len(dimensions) > 1 or dimensions[0] not in (2, 3):
        raise UnsupportedError(f"the trajectory has {' or '.join(map(str, dimensions))} numbers to a sample; expected 2: write "
                               "kx and ky into traj")  # fmt: skip
    _check_installed()
    count = int(readouts.slices.max()) + 1
    if count * readouts.coils * math.prod(grid.shape) * 8 > max_bytes:
        raise ResourceError(f"the images need more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    rank, affine_of = readouts.place()
    y, path, counts = _collect(readouts, np.argsort(rank))
    points = path / _per_cycle(path, grid, readouts) * 2 * np.pi
    inside = (np.abs(points) <= np.pi * (1 + ROUNDING)).all(1)
    if not inside.all():
        readouts.notes.append(f"{int((~inside).sum())} samples beyond the pixels' k-space passed over")
        y, points, counts = np.ascontiguousarray(y[..., inside]), points[inside], counts[..., inside]
    points = points.clip(-np.pi, np.pi)
    matrix, noise = readouts.whitener(), None
    if matrix is not None:
        noise = (encoding.whiten(y, matrix) * counts**-0.5).astype(np.float32)
    affine = affine_of(grid) if sized else None
    try:
        scan = Scan(y, Trajectory.of(grid.shape, points), grid, noise, affine=affine)
    except ValueError as error:
        raise UnsupportedError(f"the ISMRMRD file does not fit together: {error}") from None  # our own words: fields and numbers
    return Source("mrd", scan=scan, digest=digest, notes=tuple(readouts.notes), placed=affine is not None, sized=sized)


def _check_installed() -> None:
    """UnsupportedError, naming the extra, where there is no non-uniform FFT."""
    from operators import _nufft

    try:
        _nufft.check_installed()
    except ValueError as error:
        raise UnsupportedError(f"the ISMRMRD file is not Cartesian: {error}") from None


def _grid(header: encoding.Header) -> tuple[Grid, bool]:
    """The picture's grid, and whether its lengths are known.

    The readout of the encoded space says how large a pixel is: a picture interpolated to a finer matrix is not followed. The encoded
    space's other axis may count spokes.
    """
    encoded, recon = header.encoded, header.recon
    shape = recon.matrix[:2]
    if encoded.fov is None or recon.fov is None:
        return Grid(shape=shape, spacing=(1.0, 1.0)), False
    pixels = [space.fov[0] / space.matrix[0] for space in (encoded, recon) if space.fov]
    finer = pixels[0] / pixels[1]
    if finer < 1 - encoding.SAME_PIXEL:
        raise UnsupportedError(f"the header XML has pixels of {pixels[0]:.3g} mm along the readout in encodedSpace and of "
                               f"{pixels[1]:.3g} mm in reconSpace; expected no larger ones in reconSpace: correct the header")  # fmt: skip
    if finer > 1 + encoding.SAME_PIXEL:
        shape = max(1, round(shape[0] / finer)), max(1, round(shape[1] / finer))
    return Grid(shape=shape, spacing=(recon.fov[0] / shape[0], recon.fov[1] / shape[1])), True


def _collect(readouts: Readouts, order: NDArray[Any]) -> tuple[NDArray[np.complex64], NDArray[np.float32], NDArray[np.int64]]:
    """Samples [slice, coil, sample], slices in this ``order``, at points (sample, 2) as (kx, ky), and how many were averaged
    [slice, 1, sample]."""
    heads = readouts.heads
    found: list[dict[bytes, tuple[NDArray[np.complex64], int]]] = [{} for _ in order]
    both = zip(readouts.samples(readouts.image), readouts.points(readouts.image), strict=True)
    for k, ((index, data), (_, points)) in zip(readouts.slices, both, strict=True):
        if points.shape[1] == 3 and points[:, 2].any():
            raise UnsupportedError("the trajectory has 3 numbers to a sample, of 3D (kz) or of 2D with density weights (Gadgetron's); "
                                   "expected 2D: write kx and ky alone")  # fmt: skip
        kept = slice(int(heads["discard_pre"][index]), max(0, data.shape[1] - int(heads["discard_post"][index])))
        key = (points[kept, :2] + np.float32(0)).tobytes()  # -0 is 0
        sum_, count = found[k].get(key, (0, 0))
        found[k][key] = sum_ + data[:, kept], count + 1
    keys = [key for key in found[order[0]] if key]
    if not keys:
        raise UnsupportedError("the readouts of the ISMRMRD file discard all of their samples; check discard_pre and discard_post")
    if any(one.keys() != found[0].keys() for one in found):
        raise UnsupportedError("the slices of the ISMRMRD file follow different trajectories; one for all is supported: split the file")
    y = np.stack([np.concatenate([found[k][key][0] / np.float32(found[k][key][1]) for key in keys], 1) for k in order])
    path = np.concatenate([np.frombuffer(key, np.float32).reshape(-1, 2) for key in keys])
    counts = np.stack([np.repeat([found[k][key][1] for key in keys], [len(key) // 8 for key in keys]) for k in order])
    return y, path, counts[:, None]


def _per_cycle(path: NDArray[np.float32], grid: Grid, readouts: Readouts) -> NDArray[np.float64]:
    """What one cycle per pixel is in the unit of a path (sample, 2), along each axis; the unit goes to the notes.

    Of several units that fit, the only one in which the path fills k-space whole. UnsupportedError where none fits, or more than one.
    """
    encoded = readouts.header.encoded
    lengths = np.array(encoded.matrix[:2] if encoded.fov is None else encoded.fov[:2]) / grid.spacing
    known = {"cycles per pixel": np.ones(2), "cycles per field of view": np.array(grid.shape, np.float64),
             "cycles per encoded field of view": lengths,
             "cycles per encoded field of view of the readout": lengths[0] * grid.spacing[0] / grid.spacing,
             "rad per pixel": np.full(2, 2 * np.pi)}  # fmt: skip
    units: dict[str, NDArray[np.float64]] = {}
    for name, one in known.items():
        if all(np.abs(one / other - 1).max() > encoding.SAME_PIXEL for other in units.values()):
            units[name] = one
    reach = np.abs(path).max(0).astype(np.float64)
    fits = [name for name, one in units.items() if all(FILLED[0] < r <= FILLED[1] for r in 2 * reach / one)]
    whole = [name for name in fits if (2 * reach / units[name]).min() >= WHOLE]
    fits = whole if len(whole) == 1 else fits
    if len(fits) != 1:
        edges = ", ".join(f"{' and '.join(dict.fromkeys(f'{n:.3g}' for n in one / 2))} ({name})" for name, one in units.items())
        verdict = f"could be {' or '.join(fits)}" if fits else "is none that is known"
        raise UnsupportedError(f"the trajectory reaches {reach[0]:.3g} in kx and {reach[1]:.3g} in ky, so that its unit {verdict}; "
                               f"expected about {edges}: scale traj, or correct the matrix in the header XML")  # fmt: skip
    readouts.notes.append(f"trajectory read as {fits[0]}")
    return units[fits[0]]
