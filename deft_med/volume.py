"""Arrays that know where they are and in what unit: `Volume`, an image, and `Scan`, measurements.

Patient coordinates are DICOM's LPS (x to the patient's left, y to posterior, z to the head) in mm. Both values are also the
researcher's door: build them out of plain numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from operators.geometry import Cartesian, FanBeam, ParallelBeam, ThickSlices, Trajectory

if TYPE_CHECKING:
    from operators.geometry import Grid

Floats = NDArray[np.float32]
Complexes = NDArray[np.complex64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Volume:
    """An image stack with its place in the patient.

    Attributes:
        data: float32 [slice, row, column].
        affine: float64 (4, 4), maps (column, row, slice, 1) of a voxel's centre to LPS mm (the affine of PS3.3 C.7.6.2.1.1).
        unit: what the values are: "HU", "a.u." (MR), "1", ...
        first: where its first slice stands in the series that it is a part of (`part`), counted from 0.

    Raises:
        ValueError: data of another rank, empty or not finite; an affine of another shape, singular or not finite; no unit.
    """

    data: Floats
    affine: Matrix
    unit: str = "HU"
    first: int = 0

    def __post_init__(self) -> None:
        data = _floats("Volume.data", self.data)
        if data.ndim != 3 or data.size == 0:
            raise ValueError(f"Volume.data must be [slice, row, column] with at least one voxel, got shape {data.shape}")
        if not isinstance(self.unit, str) or not self.unit:
            raise ValueError(f"Volume.unit must be a word such as 'HU' or '1', got {self.unit!r}")
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "affine", _affine("Volume.affine", self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        return self.data.shape  # type: ignore[return-value]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(dz, dy, dx): distance between slices, rows and columns in mm."""
        dx, dy, dz = (round(float(d), 9) for d in np.linalg.norm(self.affine[:3, :3], axis=0))
        return dz, dy, dx

    def part(self, first: int, last: int) -> Volume:
        """Slices first to last - 1, where they lie."""
        return replace(self, data=self.data[first:last], affine=_onward(self.affine, first), first=self.first + first)

    def with_data(self, data: ArrayLike, unit: str | None = None) -> Volume:
        """The same place with other values [slice, row, column]; ValueError if the shape differs."""
        other = replace(self, data=np.asarray(data), unit=self.unit if unit is None else unit)
        if other.shape != self.shape:
            raise ValueError(f"with_data needs shape {self.shape}, got {other.shape}: use resample_to to change the grid")
        return other

    def reformat(self, plane: str) -> Volume:
        """The same voxels of an axial volume as "coronal" images [row, slice, column] or "sagittal" ones [column, slice, row].

        ValueError for another plane.
        """
        orders = {"coronal": (1, 0, 2), "sagittal": (2, 0, 1)}
        if plane not in orders:
            raise ValueError(f"reformat needs 'coronal' or 'sagittal', got {plane!r}")
        order = orders[plane]
        return Volume(self.data.transpose(order), self.affine[:, [*(2 - axis for axis in reversed(order)), 3]], self.unit)

    def coarsen(self, factor: int) -> Volume:
        """Area mean over ``factor`` x ``factor`` pixels in every slice; the edges of the field of view stay.

        The first pixel's centre moves by (factor - 1) / 2 pixels along both axes. ValueError unless ``factor`` is a whole number
        of at least 1 that divides rows and columns.
        """
        _, rows, columns = self.shape
        if int(factor) != factor or factor < 1 or rows % int(factor) or columns % int(factor):
            raise ValueError(f"coarsen needs a whole factor that divides {rows} x {columns}, got {factor!r}: resample_to takes any size")
        return self.resample_to((rows // int(factor), columns // int(factor)))

    def resample_to(self, shape: Sequence[int]) -> Volume:
        """Exact area mean of every slice on a grid of ``shape`` = (rows, columns) over the same field of view.

        Every new pixel is the mean of the old ones weighted by the area that they share (separable, so two small matrices).
        ValueError unless ``shape`` is two positive whole numbers.
        """
        if len(shape) != 2 or any(int(n) != n or n < 1 for n in shape):
            raise ValueError(f"resample_to needs (rows, columns), two positive whole numbers, got {tuple(shape)}")
        rows, columns = (int(n) for n in shape)
        if (rows, columns) == self.shape[1:]:
            return self
        down, across = _overlap(self.shape[1], rows), _overlap(self.shape[2], columns).T
        data = np.empty((self.shape[0], rows, columns), np.float32)
        for index, image in enumerate(self.data):
            data[index] = down @ image.astype(np.float64) @ across
        fx, fy = self.shape[2] / columns, self.shape[1] / rows
        affine = self.affine @ np.diag([fx, fy, 1.0, 1.0])
        affine[:3, 3] = self.affine[:3, 3] + (fx - 1) / 2 * self.affine[:3, 0] + (fy - 1) / 2 * self.affine[:3, 1]
        return Volume(data, affine, self.unit)


@dataclass(frozen=True, eq=False)
class Counts:
    """What a transmission scan's detector read, beside the line integrals taken from it.

    Attributes:
        values: counts, float32, shaped like the scan's y; read-out noise makes them real, starved rays may be below zero.
        photons: photons per ray before the object.
        electronic: standard deviation of the read-out noise in counts.
        ceiling: the most that the detector can tell: rays at it are saturated; None for no limit.

    Raises:
        ValueError: counts that are not finite or above the ceiling, photons or ceiling not positive, a negative electronic noise.
    """

    values: Floats
    photons: float
    electronic: float = 0.0
    ceiling: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _floats("Counts.values", self.values))
        if not self.photons > 0 or not self.electronic >= 0 or (self.ceiling is not None and not self.ceiling > 0):
            raise ValueError("Counts wants photons > 0, electronic >= 0 and a ceiling > 0 or None, "
                             f"got {self.photons}, {self.electronic} and {self.ceiling}")
        if self.ceiling is not None and self.values.size and self.values.max() > self.ceiling:
            raise ValueError(f"Counts.values must not exceed the ceiling {self.ceiling:g}, got {self.values.max():g}")

    def part(self, index: Any) -> Counts:
        """The counts of ``values[index]``."""
        return replace(self, values=self.values[index])


@dataclass(frozen=True, eq=False)
class Scan:
    """Measurements, the geometry that made them, and the grid to reconstruct on.

    Attributes:
        y: CT: float32 [slice, view, detector], line integrals of the attenuation (1, no unit); (views, detectors) is one slice.
            MR: complex64 [slice, coil, ky, kx] on the grid, k = 0 at n // 2, exactly 0 where nothing was measured
            ([slice, coil, sample] along a trajectory); one axis less is one slice. Exactly 0 also where `noise` is infinite.
            Through thick slices: float32 [image, slice, column] in HU.
        acquisition: what was measured: `operators.geometry` ParallelBeam, FanBeam or ThickSlices (CT), Cartesian or Trajectory (MR).
        grid: `operators.geometry.Grid` of the reconstruction; for MR, of the k-space matrix, (1, 1) mm where its size is not known.
        noise: standard deviation of y (MR: of its real and of its imaginary part), an array that broadcasts to y, or None where it
            is not known. CT: inf where a ray was not measured.
        noise_is: "given", or how it was found from the data, for the record.
        reference: the true image, where there is one: HU on the grid, or the magnitude ("a.u.") on the picture.
        affine: float64 (4, 4), maps (column, row, slice, 1) of the grid to LPS mm; None where the place is not known.
        simulated: True where y was computed from an image.
        protocol: name of the simulated protocol, for the record.
        maps: MR: coil maps, complex64 [slice, coil, row, column] on the grid, brought to unit sum of squares in use, or None.
        mu_water: CT: attenuation of water at the scan's energy, 1/mm; None is 0.0192 (about 70 keV).
        crop: MR: (rows, columns) of the picture, the central part of the grid (`central`); None is all of it.
        counts: CT: the `Counts` that y and noise were taken from, to be reconstructed by their own likelihood; None where only y is known.
        first: where its first slice stands in the scan that it is a part of (`part`), counted from 0: its noise is drawn by that.
        phaseless: MR: y is |A x| plus real noise (imaginary part 0), and ``maps`` are the known codes of a coded diffraction experiment.

    Raises:
        ValueError: shapes that do not fit each other, values that are not finite, noise that is not positive, fields of one modality in
            the other.
    """

    y: NDArray[Any]  # Floats in CT, Complexes in MR: `modality` says which
    acquisition: Any  # Beam in CT, Cartesian or Trajectory in MR
    grid: Grid
    noise: Floats | None = None
    reference: Volume | None = None
    affine: Matrix | None = None
    simulated: bool = False
    protocol: str | None = None
    maps: Complexes | None = None
    crop: tuple[int, int] | None = None
    mu_water: float | None = None
    noise_is: str = "given"
    counts: Counts | None = None
    phaseless: bool = False
    first: int = 0

    def __post_init__(self) -> None:
        check = _check_ct if self.modality == "CT" else _check_mr
        y = check(self)
        object.__setattr__(self, "y", y)
        if self.noise is not None:
            object.__setattr__(self, "noise", _check_noise(self, y))
        if self.affine is not None:
            object.__setattr__(self, "affine", _affine("Scan.affine", self.affine))
        if self.reference is not None and self.reference.shape != (len(y), *self.picture):
            raise ValueError(f"Scan.reference must have shape {(len(y), *self.picture)}, got {self.reference.shape}")

    @property
    def modality(self) -> str:
        """CT or MR, by the acquisition."""
        return "CT" if isinstance(self.acquisition, ParallelBeam | FanBeam | ThickSlices) else "MR"

    def part(self, first: int, last: int) -> Scan:
        """The measurements of slices first to last - 1."""
        noise = self.noise
        if noise is not None and noise.ndim == self.y.ndim and len(noise) > 1:
            noise = noise[first:last]
        place = self.lps if self.affine is None and self.modality == "CT" else self.affine  # of an MR scan the size may not be known
        return replace(self, y=self.y[first:last], noise=noise, reference=self.reference and self.reference.part(first, last),
                       first=self.first + first, affine=None if place is None else _onward(place, first),
                       maps=None if self.maps is None else self.maps[first:last],
                       counts=self.counts and self.counts.part(slice(first, last)))

    @property
    def picture(self) -> tuple[int, int]:
        """(rows, columns) of what is shown and written: the crop or, without one, the grid."""
        return self.grid.shape if self.crop is None else self.crop

    @property
    def lps(self) -> Matrix:
        """The picture's place: (column, row, slice, 1) to LPS mm.

        Without an affine it lies about the origin: columns to the left, rows to the back, slices of 1 mm.
        """
        (rows, columns), (dy, dx) = self.picture, self.grid.spacing
        if self.affine is None:
            affine = np.diag([dx, dy, 1.0, 1.0])
            affine[:2, 3] = -(columns - 1) / 2 * dx, -(rows - 1) / 2 * dy
            return affine
        if self.crop is None:
            return self.affine
        first = [_first(n, c) for n, c in zip(reversed(self.grid.shape), (columns, rows), strict=True)]
        affine = self.affine.copy()
        affine[:3, 3] += self.affine[:3, :2] @ first
        return affine


def central(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The central part, of ``shape``, of an array's last axes: index n // 2 stays the centre, so that k = 0 and x = 0 stay theirs."""
    cut: tuple[Any, ...] = tuple(slice(_first(n, c), _first(n, c) + c) for n, c in zip(array.shape[-len(shape) :], shape, strict=True))
    return array[(Ellipsis, *cut)]


def _onward(affine: Matrix, slices: int) -> Matrix:
    """The affine of what begins so many slices later."""
    moved = affine.copy()
    moved[:3, 3] += slices * affine[:3, 2]
    return moved


def _first(length: int, part: int) -> int:
    """Where the central ``part`` of ``length`` begins; ValueError if it is longer."""
    if not 1 <= part <= length:
        raise ValueError(f"the central part of {length} must be 1 to {length} long, got {part}")
    return length // 2 - part // 2


def _check_ct(scan: Scan) -> Floats:
    if scan.maps is not None or scan.crop is not None or scan.phaseless:
        raise ValueError("Scan.maps, Scan.crop and Scan.phaseless are of MR; leave them out for CT")
    if scan.mu_water is not None and not 0 < scan.mu_water < 1:
        raise ValueError(f"Scan.mu_water is water's attenuation in 1/mm, about 0.02, got {scan.mu_water:g}")
    y = _floats("Scan.y", scan.y)
    if y.ndim == 2:
        y = y[None]
    expected, thick = tuple(scan.acquisition.shape), isinstance(scan.acquisition, ThickSlices)
    if y.ndim != 3 or len(y) == 0 or y.shape[1:] != expected:
        axes = ("[image, slice, column]", "(slices, columns)") if thick else ("[slice, view, detector]", "(views, detectors)")
        raise ValueError(f"Scan.y must be {axes[0]} with {axes[1]} = {expected}, got shape {y.shape}")
    if thick and scan.grid.shape != (scan.acquisition.rows, scan.acquisition.columns):
        raise ValueError(f"Scan.grid must have the rows and columns of the thick slices, got {scan.grid.shape}")
    if scan.counts is not None:
        values = scan.counts.values if scan.counts.values.ndim == 3 else scan.counts.values[None]
        if thick or values.shape != y.shape:
            raise ValueError(f"Scan.counts belong to rays and must be shaped like y {y.shape}, got {values.shape}")
        object.__setattr__(scan, "counts", replace(scan.counts, values=values))
    return y


def _check_mr(scan: Scan) -> Complexes:
    y = _complexes("Scan.y", scan.y)
    geometry = scan.acquisition
    if not isinstance(geometry, Cartesian | Trajectory):
        raise ValueError(f"Scan.acquisition must be ParallelBeam, FanBeam, Cartesian or Trajectory, got {type(geometry).__name__}")
    expected = geometry.shape if isinstance(geometry, Cartesian) else (geometry.samples,)
    if y.ndim == 1 + len(expected):
        y = y[None]
    if y.ndim != 2 + len(expected) or 0 in y.shape or y.shape[2:] != expected:
        axes = "ky, kx" if len(expected) == 2 else "sample"
        raise ValueError(f"Scan.y must be [slice, coil, {axes}] ending in {expected}, got shape {y.shape}")
    if scan.grid.shape != geometry.shape:
        raise ValueError(f"Scan.grid must have the shape of the k-space matrix {geometry.shape}, got {scan.grid.shape}")
    if isinstance(geometry, Cartesian) and y[..., ~geometry.mask].any():
        raise ValueError("Scan.y must be exactly 0 where the mask says that nothing was measured")
    if scan.counts is not None:
        raise ValueError("Scan.counts are of CT; leave them out for MR")
    if scan.phaseless and (y.imag.any() or scan.maps is None):
        raise ValueError("a phaseless Scan holds magnitudes (imaginary part exactly 0) and must bring its codes as Scan.maps")
    if scan.maps is not None:
        maps = _complexes("Scan.maps", scan.maps)
        if maps.shape != (*y.shape[:2], *scan.grid.shape):
            raise ValueError(f"Scan.maps must have shape {(*y.shape[:2], *scan.grid.shape)}, got {maps.shape}")
        object.__setattr__(scan, "maps", maps)
    if scan.crop is not None:
        rows, columns = (int(n) for n in scan.crop)
        for length, part in zip(scan.grid.shape, (rows, columns), strict=True):
            if not 1 <= part <= length:
                raise ValueError(f"Scan.crop must lie within the grid {scan.grid.shape}, got {(rows, columns)}")
        object.__setattr__(scan, "crop", (rows, columns))
    return y


def _check_noise(scan: Scan, y: NDArray[Any]) -> Floats:
    """The noise of a scan; in CT it may be infinite where y is 0 for want of a measurement."""
    given = np.asarray(scan.noise)
    missing = np.isposinf(given) if scan.modality == "CT" and given.dtype.kind == "f" else np.zeros(given.shape, bool)
    noise = _floats("Scan.noise", np.where(missing, 1, given) if missing.any() else given)
    try:
        np.broadcast_to(noise, y.shape)
    except ValueError:
        raise ValueError(f"Scan.noise must broadcast to the shape of y {y.shape}, got shape {noise.shape}") from None
    if not (noise > 0).all():
        raise ValueError("Scan.noise is a standard deviation and must be positive everywhere; give None where it is not known")
    if missing.any():
        there = np.broadcast_to(missing, y.shape)
        if y[there].any() or there.all((1, 2)).any():
            raise ValueError("Scan.noise is infinite where a ray was not measured: y must be exactly 0 there, and some rays of every "
                             "slice must be measured")
        noise = np.where(missing, np.float32(np.inf), noise)
    return noise


def _complexes(name: str, values: ArrayLike) -> Complexes:
    """A contiguous complex64 array of finite numbers, or ValueError."""
    array = np.asarray(values)
    if array.dtype.kind != "c":
        raise ValueError(f"{name} must hold complex numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        array = np.asarray(array, dtype=np.complex64, order="C")
    return _finite(name, array)


def _finite(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} values that are not (NaN or infinite)")
    return array


def _floats(name: str, values: ArrayLike) -> Floats:
    """A contiguous float32 array of finite real numbers, or ValueError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        # a scalar stays a scalar: ascontiguousarray would make it one axis
        array = np.asarray(array, dtype=np.float32, order="C")
    return _finite(name, array)


def _affine(name: str, values: ArrayLike) -> Matrix:
    """A float64 (4, 4) matrix that places voxels in mm, or ValueError."""
    affine = np.array(values, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ValueError(f"{name} must be a finite (4, 4) matrix with last row 0 0 0 1, got shape {affine.shape}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ValueError(f"{name} must not be singular: its columns are the steps along column, row and slice in mm")
    return affine


def _overlap(source: int, target: int) -> Matrix:
    """(target, source): the share of every new cell that each old cell covers; rows sum to one."""
    ratio = source / target
    edges = np.arange(target + 1) * ratio
    low = np.maximum(edges[:-1, None], np.arange(source)[None])
    high = np.minimum(edges[1:, None], np.arange(1, source + 1)[None])
    weights = np.clip(high - low, 0, None)
    weights[weights < 1e-9 * math.ceil(ratio)] = 0
    return weights / weights.sum(1, keepdims=True)
