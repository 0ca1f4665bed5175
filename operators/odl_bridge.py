"""The bridge to ODL, both ways: spaces, geometries, ray transforms, operators. The only file that imports odl.

ODL's geometries and spaces are what our ray matrix stands on: `geometry` carries the ray formulas of ODL's `Parallel2dGeometry` and
`FanBeamGeometry` (a test holds the two equal to 1e-12), `from_odl_geometry` makes a ray transform's beam out of an ODL geometry, and
`odl_ray_transform` gives ODL's own `RayTransform` with our projector behind ODL's `impl=`. The formulas are carried, rather than asked
of ODL at run time, because importing ODL takes seconds and changes global settings; here it is imported on first use, and what it
changes (numpy's print options, the variable SCIPY_ARRAY_API) is put back.

ODL indexes an image (x, y), we index it (row, column) = (y, x): this file transposes, and no other does.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.ct import RayTransform
from operators.geometry import Beam, FanBeam, Grid, ParallelBeam
from operators.linear import LinearOperator

_DTYPES = {torch.float32: "float32", torch.complex64: "complex64"}


@functools.cache
def _odl() -> Any:
    """The odl module, with its side effects undone."""
    options, variable = np.get_printoptions(), os.environ.get("SCIPY_ARRAY_API")
    try:
        import odl
        import odl.applications.tomo  # noqa: F401
    finally:
        np.set_printoptions(**options)
        if variable is None:
            os.environ.pop("SCIPY_ARRAY_API", None)
        else:
            os.environ["SCIPY_ARRAY_API"] = variable
    return odl


def odl_space(grid: Grid) -> Any:
    """The ODL space of images on a grid: `uniform_discr` indexed (x, y), in mm, with plain sums as inner product."""
    half = np.array([grid.shape[1] * grid.spacing[1], grid.shape[0] * grid.spacing[0]]) / 2
    return _odl().uniform_discr(-half, half, (grid.shape[1], grid.shape[0]), dtype="float32", weighting=1.0)


def from_odl_space(space: Any) -> Grid:
    """The grid of an ODL image space.

    Raises:
        ValueError: the space is not two-dimensional and uniform, or not centred on the isocentre.
    """
    partition = getattr(space, "partition", None)
    if partition is None or partition.ndim != 2 or not partition.is_uniform:
        raise ValueError(f"a grid needs a uniform two-dimensional space, got {space!r}")
    if not np.allclose(partition.mid_pt, 0, atol=1e-6 * float(np.max(partition.extent))):
        raise ValueError(f"a grid is centred on the isocentre, the space's centre is {partition.mid_pt}")
    dx, dy = (float(s) for s in partition.cell_sides)
    return Grid(shape=(int(partition.shape[1]), int(partition.shape[0])), spacing=(dy, dx))


def odl_geometry(beam: Beam) -> Any:
    """The ODL geometry of a beam.

    Raises:
        ValueError: the angles do not rise, or there is only one; ODL's partitions can hold neither.
    """
    angles = np.asarray(beam.angles)
    if angles.size < 2 or (np.diff(angles) <= 0).any():
        raise ValueError("an ODL geometry needs two or more rising angles")
    odl = _odl()
    tomo = odl.applications.tomo
    views = odl.nonuniform_partition(angles)
    scale = 1 / beam.source_detector if isinstance(beam, FanBeam) and beam.curved else 1.0
    half = beam.detectors * beam.pitch / 2
    bins = odl.uniform_partition((beam.offset - half) * scale, (beam.offset + half) * scale, beam.detectors)
    if isinstance(beam, ParallelBeam):
        return tomo.Parallel2dGeometry(views, bins)
    curvature = beam.source_detector if beam.curved else None
    return tomo.FanBeamGeometry(views, bins, beam.source_origin, beam.origin_detector, det_curvature_radius=curvature)


def from_odl_geometry(geometry: Any) -> Beam:
    """The beam of an ODL geometry, so that `RayTransform(from_odl_space(space), from_odl_geometry(geometry))` is made of ODL's own.

    Raises:
        ValueError: not a parallel or fan-beam geometry in the plane, uneven bins, a shifted or tilted set-up, or a detector arc that is
            not centred on the source.
    """
    tomo = _odl().applications.tomo
    if not isinstance(geometry, tomo.Parallel2dGeometry | tomo.FanBeamGeometry):
        raise ValueError(f"expected a Parallel2dGeometry or a FanBeamGeometry, got {type(geometry).__name__}")
    bins = geometry.det_partition
    if not bins.is_uniform:
        raise ValueError("the detector's bins must be evenly spaced")
    angles = tuple(float(a) for a in geometry.angles)
    detectors, pitch, offset = int(bins.shape[0]), float(bins.cell_sides[0]), float(bins.mid_pt[0])
    if isinstance(geometry, tomo.Parallel2dGeometry):
        beam: Beam = ParallelBeam(angles=angles, detectors=detectors, pitch=pitch, offset=offset)
    else:
        radius = geometry.det_curvature_radius
        distance = float(geometry.src_radius + geometry.det_radius)
        if radius is not None and not math.isclose(float(radius), distance, rel_tol=1e-9):
            raise ValueError(f"the detector's arc must be centred on the source ({distance} mm away), its radius is {radius} mm")
        scale = 1.0 if radius is None else distance
        beam = FanBeam(
            angles=angles,
            detectors=detectors,
            pitch=pitch * scale,
            offset=offset * scale,
            source_origin=float(geometry.src_radius),
            origin_detector=float(geometry.det_radius),
            curved=radius is not None,
        )
    if not _same_rays(geometry, beam):
        raise ValueError("the geometry is shifted or tilted against ODL's standard set-up, which a beam cannot say")
    return beam


def odl_rays(geometry: Any) -> tuple[np.ndarray, np.ndarray]:
    """A point on each ray and its unit direction, (views, detectors, 2), as ODL's geometry itself places them."""
    angles, bins = geometry.angles, geometry.det_partition.grid.coord_vectors[0]
    ends = geometry.det_point_position(angles[:, None], bins[None, :])
    if hasattr(geometry, "src_position"):
        points = np.broadcast_to(np.asarray(geometry.src_position(angles))[:, None, :], ends.shape)
        directions = ends - points
    else:
        points = ends
        directions = -np.asarray(geometry.det_to_src(angles[:, None], bins[None, :]))
    return points, directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def _same_rays(geometry: Any, beam: Beam) -> bool:
    points, directions = beam.rays()
    others, ways = odl_rays(geometry)
    across = (others - points)[..., 0] * directions[..., 1] - (others - points)[..., 1] * directions[..., 0]
    return bool(np.allclose(ways, directions, atol=1e-9) and np.allclose(across, 0, atol=1e-6 * beam.pitch))


class Projector:
    """Our ray transform as a projector that ODL can drive: pass an instance as `RayTransform(space, geometry, impl=Projector(A))`."""

    def __init__(self, ray_transform: RayTransform) -> None:
        self.ray_transform = ray_transform

    def call_forward(self, x: Any, out: Any = None, **_: Any) -> Any:
        """Project an ODL image, (x, y)-indexed."""
        space = x.space
        grid = (self.ray_transform.grid.shape[1], self.ray_transform.grid.shape[0])
        if space.shape != grid:
            raise ValueError(f"the projector's grid is {grid} in (x, y), the image is {space.shape}")
        y = self.ray_transform(_tensor(x).T.contiguous())
        return _store(out if out is not None else self.range.zero(), y)

    def call_backward(self, x: Any, out: Any = None, **_: Any) -> Any:
        """Backproject an ODL sinogram; ODL's adjoint is of its weighted inner products, ours of plain sums."""
        image = self.ray_transform.H(_tensor(x)).T
        target = out if out is not None else self.domain.zero()
        return _store(target, image * (_weight(x.space) / _weight(target.space)))

    domain: Any = None
    range: Any = None


def odl_ray_transform(ray_transform: RayTransform, space: Any = None, geometry: Any = None) -> Any:
    """`odl.applications.tomo.RayTransform` with our projector behind it, on given ODL objects or on those of the operator.

    Raises:
        ValueError: the space or the geometry is not the operator's.
    """
    odl = _odl()
    space = odl_space(ray_transform.grid) if space is None else space
    geometry = odl_geometry(ray_transform.beam) if geometry is None else geometry
    if from_odl_space(space).shape != ray_transform.grid.shape or geometry.partition.shape != ray_transform.range_shape:
        raise ValueError(f"space {space.shape} and geometry {geometry.partition.shape} are not those of {ray_transform}")
    projector = Projector(ray_transform)
    weighted = np.isclose(_weight(space), space.cell_volume) and not np.isclose(_weight(space), 1.0)
    if weighted:
        operator = odl.applications.tomo.RayTransform(space, geometry, impl=projector)
    else:
        tensors = space.tspace_type(geometry.partition.shape, dtype=space.dtype, weighting=1.0)
        sinograms = odl.DiscretizedSpace(geometry.partition, tensors, axis_labels=["$\\varphi$", "$s$"])
        operator = odl.applications.tomo.RayTransform(space, geometry, proj_space=sinograms, impl=projector)
    projector.domain, projector.range = operator.domain, operator.range
    return operator


def as_odl(operator: LinearOperator) -> Any:
    """An operator as ODL sees it: a ray transform as ODL's own `RayTransform` (images (x, y)-indexed), any other on tensor spaces.

    Tensor spaces have plain sums as inner product and our indices, float32 or complex64; nothing is copied on the way.
    """
    if isinstance(operator, RayTransform):
        return odl_ray_transform(operator)
    return _wrapped(operator)


def _wrapped(operator: LinearOperator) -> Any:
    odl = _odl()

    def space(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return (odl.cn if dtype.is_complex else odl.rn)(shape, dtype=_DTYPES[dtype])

    base: Any = odl.Operator

    class Wrapped(base):
        def __init__(self, inner: LinearOperator, domain: Any, range: Any) -> None:
            super().__init__(domain, range, linear=True)
            self.inner = inner

        def _call(self, x: Any) -> Any:
            given = _view(x)
            values = self.inner(given).resolve_conj().numpy()
            return self.range.element(values.copy() if np.may_share_memory(values, given.numpy()) else values)

        @property
        def adjoint(self) -> Any:
            return Wrapped(self.inner.H, self.range, self.domain)

    domain, range = space(operator.domain_shape, operator.domain_dtype), space(operator.range_shape, operator.range_dtype)
    return Wrapped(operator, domain, range)


def from_odl(operator: Any) -> LinearOperator:
    """Any linear ODL operator as ours: batched, differentiable to any order, with the adjoint of plain sums.

    A two-dimensional image space with axes x and y is transposed to (row, column); everything else keeps its indices. It runs on
    the CPU, one item at a time, in single precision.

    Raises:
        ValueError: not linear, without an adjoint, or on spaces whose inner product is not a constant times the plain sum.
        TypeError: not an ODL operator.
    """
    if not isinstance(operator, _odl().Operator):
        raise TypeError(f"expected an ODL operator, got {type(operator).__name__}")
    if not operator.is_linear:
        raise ValueError(f"only a linear operator can be wrapped, {type(operator).__name__} is not")
    return _FromODL(operator)


class _FromODL(LinearOperator):
    def __init__(self, operator: Any) -> None:
        spaces = (operator.domain, operator.range)
        dtypes = (torch.complex64 if np.issubdtype(space.dtype, np.complexfloating) else torch.float32 for space in spaces)
        super().__init__(*(_shape(space) for space in spaces), *dtypes)
        self._ratio = _weight(operator.domain) / _weight(operator.range)
        self._operator, self._backward = operator, operator.adjoint

    def _forward(self, x: Tensor) -> Tensor:
        return self._each(self._operator, x, self.domain_shape, self.range_shape, self.range_dtype)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._ratio * self._each(self._backward, y, self.range_shape, self.domain_shape, self.domain_dtype)

    @staticmethod
    def _each(operator: Any, x: Tensor, given: tuple[int, ...], wanted: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = []
        for item in x.reshape(-1, *given):
            item = item.T if _is_image(operator.domain) else item
            result = _tensor(operator(_store(operator.domain.zero(), item)))
            out.append(result.T if _is_image(operator.range) else result)
        precise = torch.promote_types(dtype, x.real.dtype if not dtype.is_complex else dtype)
        return torch.stack(out).reshape(*x.shape[: x.ndim - len(given)], *wanted).to(x.device, precise)


def _is_image(space: Any) -> bool:
    labels = [str(label).strip("$") for label in getattr(space, "axis_labels", ())]
    return labels == ["x", "y"]


def _shape(space: Any) -> tuple[int, ...]:
    return tuple(space.shape)[::-1] if _is_image(space) else tuple(space.shape)


def _weight(space: Any) -> float:
    if not getattr(space, "is_weighted", False):
        return 1.0
    constant = getattr(space.weighting, "const", None)
    if constant is None:
        raise ValueError(f"only a constant weighting can be undone, {type(space.weighting).__name__} is not one")
    return float(constant)


def _tensor(element: Any) -> Tensor:
    return torch.from_numpy(np.array(element.asarray()))


def _view(element: Any) -> Tensor:
    """An element's own memory as a tensor; operators never write into their input."""
    data = element.data
    return torch.from_numpy(data) if isinstance(data, np.ndarray) and data.flags.writeable else _tensor(element)


def _store(element: Any, values: Tensor) -> Any:
    """Write a tensor into an ODL element and return it."""
    element[:] = values.detach().cpu().numpy().astype(element.space.dtype, copy=False)
    return element
