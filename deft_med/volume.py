"""Arrays that know where they are and in what unit: `Volume`, an image, and `Scan`, measurements.

Patient coordinates are DICOM's LPS (x to the patient's left, y to posterior, z to the head) in mm. Both values are also the
researcher's door: build them out of plain numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from operators.geometry import Beam, Grid

Floats = NDArray[np.float32]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Volume:
    """An image stack with its place in the patient.

    Attributes:
        data: float32 [slice, row, column].
        affine: float64 (4, 4), maps (column, row, slice, 1) of a voxel's centre to LPS mm (the affine of PS3.3 C.7.6.2.1.1).
        unit: what the values are: "HU", "1", ...

    Raises:
        ValueError: data of another rank, empty or not finite; an affine of another shape, singular or not finite; no unit.
    """

    data: Floats
    affine: Matrix
    unit: str = "HU"

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

    def with_data(self, data: ArrayLike, unit: str | None = None) -> Volume:
        """The same place with other values [slice, row, column]; ValueError if the shape differs."""
        other = replace(self, data=np.asarray(data), unit=self.unit if unit is None else unit)
        if other.shape != self.shape:
            raise ValueError(f"with_data needs shape {self.shape}, got {other.shape}: use resample_to to change the grid")
        return other

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
class Scan:
    """Measurements, the geometry that made them, and the grid to reconstruct on.

    Attributes:
        y: float32 [slice, view, detector], line integrals of the attenuation (1, no unit); (views, detectors) is one slice.
        acquisition: the beam, `operators.geometry.ParallelBeam` or `FanBeam`.
        grid: `operators.geometry.Grid` of the reconstruction.
        noise: standard deviation of y, an array that broadcasts to y, or None where it is not known.
        reference: the true image on that grid (HU), where there is one.
        affine: float64 (4, 4), maps (column, row, slice, 1) of the grid to LPS mm; None where the place is not known.
        simulated: True where y was computed from an image.
        protocol: name of the simulated protocol, for the record.

    Raises:
        ValueError: shapes that do not fit each other, values that are not finite, noise that is not positive.
    """

    y: Floats
    acquisition: Beam
    grid: Grid
    noise: Floats | None = None
    reference: Volume | None = None
    affine: Matrix | None = None
    simulated: bool = False
    protocol: str | None = None

    def __post_init__(self) -> None:
        y = _floats("Scan.y", self.y)
        if y.ndim == 2:
            y = y[None]
        expected = tuple(self.acquisition.shape)
        if y.ndim != 3 or len(y) == 0 or y.shape[1:] != expected:
            raise ValueError(f"Scan.y must be [slice, view, detector] with (views, detectors) = {expected}, got shape {y.shape}")
        object.__setattr__(self, "y", y)
        if self.noise is not None:
            noise = _floats("Scan.noise", self.noise)
            try:
                np.broadcast_to(noise, y.shape)
            except ValueError:
                raise ValueError(f"Scan.noise must broadcast to the shape of y {y.shape}, got shape {noise.shape}") from None
            if not (noise > 0).all():
                raise ValueError("Scan.noise is a standard deviation and must be positive everywhere; give None where it is not known")
            object.__setattr__(self, "noise", noise)
        if self.affine is not None:
            object.__setattr__(self, "affine", _affine("Scan.affine", self.affine))
        if self.reference is not None and self.reference.shape != (len(y), *self.grid.shape):
            raise ValueError(f"Scan.reference must have shape {(len(y), *self.grid.shape)}, got {self.reference.shape}")

    @property
    def lps(self) -> Matrix:
        """``affine`` or, where that is None, the grid about the origin: columns to the left, rows to the back, slices of 1 mm."""
        if self.affine is not None:
            return self.affine
        (ny, nx), (dy, dx) = self.grid.shape, self.grid.spacing
        affine = np.diag([dx, dy, 1.0, 1.0])
        affine[:2, 3] = -(nx - 1) / 2 * dx, -(ny - 1) / 2 * dy
        return affine


def _floats(name: str, values: ArrayLike) -> Floats:
    """A contiguous float32 array of finite real numbers, or ValueError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        # a scalar stays a scalar: ascontiguousarray would make it one axis
        array = np.asarray(array, dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} values that are not (NaN or infinite)")
    return array


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
