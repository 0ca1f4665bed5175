"""Approximate inverses of MRI encodings, a linear operator each: regularised SENSE on the grid, the density-weighted adjoint off it."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from scipy.spatial import ConvexHull, QhullError, Voronoi, cKDTree
from torch import Tensor

from operators.geometry import Array, Trajectory
from operators.linear import LinearOperator
from operators.mri import CartesianMRI, NonCartesianMRI


class WeightedAdjoint(LinearOperator):
    """A.H W of an MRI operator, (*batch, C, ...) -> (*batch, ny, nx): zero-filled or gridded, at the image's own brightness.

    On the grid W is 1: for unit-norm maps and one coil A.H is then the pseudo-inverse, and z + B(y - A z) is z with its measured part
    replaced, which no other weighting gives (one that makes the mean diagonal of B A 1 overshoots by the acceleration). Off it W is
    `density`, and the mean diagonal is the part of the k-space plane that the trajectory reaches (pi / 4 for a full disk, whose corners
    no sample sees), so that a smooth image comes back at its value. Maps may have any sum of squares.

    Args:
        operator: a `CartesianMRI` or a `NonCartesianMRI`; for two real channels compose, `Complex(shape).H @ WeightedAdjoint(A)`.

    Raises:
        TypeError: another operator.
        ValueError: coil maps that are zero everywhere, or a trajectory on one line.
    """

    def __init__(self, operator: CartesianMRI | NonCartesianMRI) -> None:
        if not isinstance(operator, CartesianMRI | NonCartesianMRI):
            raise TypeError(f"the weighted adjoint needs a CartesianMRI or a NonCartesianMRI, got {type(operator).__name__}")
        super().__init__(operator.range_shape, operator.domain_shape, operator.range_dtype, operator.domain_dtype)
        self.batch_shape = operator.batch_shape
        self.operator = operator
        power = operator.maps.abs().double().square().sum(dim=-3)
        if not power.flatten(-2).any(dim=-1).all():
            raise ValueError("the coil maps are zero everywhere")
        support = power > 1e-3 * power.amax(dim=(-2, -1), keepdim=True)
        scale = support.sum(dim=(-2, -1), keepdim=True) / (power * support).sum(dim=(-2, -1), keepdim=True)
        if isinstance(operator, CartesianMRI):
            weights = torch.ones((), dtype=torch.float64)
        else:
            weights = torch.tensor(density(operator.trajectory))
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("_weights", weights.to(scale.device), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        real = x.real.dtype
        return self.operator._adjoint(x * self._weights.to(real)) * self._scale.to(real)

    def _adjoint(self, y: Tensor) -> Tensor:
        real = y.real.dtype
        return self.operator._forward(y * self._scale.to(real)) * self._weights.to(real)


class Unfold(LinearOperator):
    """(1 + w) (A.H A + w)^-1 of an image as a Chebyshev polynomial in A.H A, (*batch, ny, nx) to itself; self-adjoint."""

    def __init__(self, operator: CartesianMRI, weight: float, degree: int) -> None:
        super().__init__(operator.domain_shape, operator.domain_shape, operator.domain_dtype, operator.domain_dtype)
        self.batch_shape = operator.batch_shape
        self.normal = operator.gram
        largest = operator.maps.abs().square().sum(dim=-3).amax(dim=(-2, -1), keepdim=True)
        if not (largest > 0).all():
            raise ValueError("the coil maps are zero everywhere")
        self.register_buffer("_largest", largest.double(), persistent=False)
        # (1 + w) / (l + w) = 1 + (1 - l) / (l + w), exactly 1 at l = 1, where all was measured; l = (1 + x) / 2
        series = 1 + Chebyshev([0.5, -0.5]) * Chebyshev.interpolate(lambda x: 1 / ((1 + x) / 2 + weight), degree - 1)
        self._series: list[float] = series.coef.tolist()

    def _forward(self, x: Tensor) -> Tensor:
        """The series in 2 A.H A - 1 applied to x, by Clenshaw's recurrence."""
        x, double = (value / self._largest.to(x.real.dtype) for value in (x, 2))
        ahead, behind = self._series[-1] * x, torch.zeros_like(x)
        for coefficient in self._series[-2:0:-1]:
            ahead, behind = coefficient * x + 2 * (double * self.normal._forward(ahead) - ahead) - behind, ahead
        return self._series[0] * x + double * self.normal._forward(ahead) - ahead - behind

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


class SenseInverse(LinearOperator):
    """(1 + w) (A.H A + w)^-1 A.H of a Cartesian encoding, (*batch, C, ny, nx) -> (*batch, ny, nx): coils unfold what the pattern folds.

    Regularised SENSE with a fixed weight w on [0, 1], the spectrum of A.H A for maps of unit sum of squares, as a polynomial (`Unfold`):
    unlike conjugate gradients it is linear in y, with an exact adjoint. What was fully measured comes back as it is, noise is
    amplified (1 + w) / (2 sqrt(w)) times at most, and with one coil it is A.H. Pruessmann et al., Magn. Reson. Med. 42(5), 1999.

    Args:
        weight: w; 0.05 unfolds four- to eightfold acceleration at usual noise.
        degree: of the polynomial; 8 is within 7 % of the inverse at w = 0.05.

    Raises:
        TypeError: another operator. ValueError: coil maps that are zero everywhere, or a weight or degree that is not positive.
    """

    def __init__(self, operator: CartesianMRI, *, weight: float = 0.05, degree: int = 8) -> None:
        if not isinstance(operator, CartesianMRI):
            raise TypeError(f"the SENSE inverse needs a CartesianMRI, got {type(operator).__name__}")
        if not weight > 0 or degree < 1:
            raise ValueError(f"weight and degree must be positive, got {weight} and {degree}")
        super().__init__(operator.range_shape, operator.domain_shape, operator.range_dtype, operator.domain_dtype)
        self.batch_shape = operator.batch_shape
        self.operator, self.unfold = operator, Unfold(operator, weight, degree)

    @property
    def round_trip(self) -> LinearOperator:
        """B A, what comes back of an image, by the gram: k-space is not visited."""
        return self.unfold @ self.unfold.normal

    def _forward(self, x: Tensor) -> Tensor:
        return self.unfold._forward(self.operator._adjoint(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator._forward(self.unfold._forward(y))


def approximate_inverse(operator: CartesianMRI | NonCartesianMRI, kind: str = "sense") -> SenseInverse | WeightedAdjoint:
    """B of an MRI operator, what a residual in k-space means in the image: ``kind`` sense, on the grid alone, or adjoint."""
    sense = kind == "sense" and isinstance(operator, CartesianMRI)
    return SenseInverse(operator) if sense else WeightedAdjoint(operator)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=8)
def density(trajectory: Trajectory) -> Array:
    """Area of k-space that each sample stands for, in cells of the Cartesian grid, float64 (samples,).

    Voronoi cells; coinciding samples share theirs, and a cell that leaves the region sampled takes the area of the nearest that does
    not. It is the ramp of a radial scan, full or sparse. Rasche et al., IEEE Trans. Med. Imaging 18(5), 1999.

    Raises:
        ValueError: the points lie on one line.
    """
    points, place, count = np.unique(np.round(trajectory.points.astype(np.float64), 5), axis=0, return_inverse=True, return_counts=True)
    try:
        cells, hull = Voronoi(points), ConvexHull(points)
    except (QhullError, ValueError) as error:
        raise ValueError(f"the {len(points)} points of the trajectory lie on one line: no sample stands for an area") from error
    ridges = np.asarray(cells.ridge_vertices)
    outside = _outside(cells.vertices, hull.equations)
    leaves = (ridges < 0).any(axis=1) | outside[ridges].any(axis=1)
    area, closed = np.zeros(len(points)), np.ones(len(points), dtype=bool)
    for side in cells.ridge_points.T:  # a cell is the triangles between its point and its edges
        a, b = (cells.vertices[ridges[:, end]] - points[side] for end in (0, 1))
        np.add.at(area, side, np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2)
        closed[side[leaves]] = False
    if not closed.any():  # a handful of points: equal parts of the region
        area[:] = hull.volume / len(points)
    else:
        area[~closed] = area[closed][cKDTree(points[closed]).query(points[~closed])[1]]
    result = (area / count)[place.ravel()] * math.prod(trajectory.shape) / (2 * math.pi) ** 2
    result.flags.writeable = False
    return result


def _outside(points: Array, equations: Array) -> Array:
    """True for points (n, 2) outside a convex region given by its edges n . x + b <= 0, (edges, 3)."""
    result = np.linalg.norm(points, axis=1) > -equations[:, 2].max()  # the rest lies within the inscribed circle
    doubtful = np.flatnonzero(result)
    for part in np.array_split(doubtful, 1 + len(doubtful) * len(equations) // 10**7):
        result[part] = (points[part] @ equations[:, :2].T + equations[:, 2]).max(axis=1) > 1e-9
    return result


def root_sum_of_squares(images: Tensor) -> Tensor:
    """sqrt(sum_c |images_c|^2), (*batch, C, ny, nx) -> (*batch, ny, nx)."""
    return torch.linalg.vector_norm(images, dim=-3)
