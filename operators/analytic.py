"""Filtered backprojection, the approximate inverse of a ray transform, as one linear operator.

It is for parallel and fan beams: full, short and limited scans, any angles. Ramp filter and fan weights: Kak and
Slaney, "Principles of Computerized Tomographic Imaging", 1988, sections 3.3 and 3.4. Short scan: Parker, "Optimal short
scan convolution reconstruction for fan beam CT", Med. Phys. 9(2), 1982, in our orientation of the detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from operators import _sparse
from operators._sparse import Chunk
from operators.ct import RayTransform
from operators.geometry import Array, Beam, FanBeam, Grid, ParallelBeam
from operators.linear import LinearOperator

# Response at a fraction of the cut-off frequency; the ramp itself comes on top.
WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ram-lak": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi / 2 * f),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}

_GAP = 2.5  # a gap wider than this many times every other gap is a range that was not measured
_CHUNK = 2**21  # pixel-view pairs per chunk of the backprojection matrix


class FilteredBackprojection(LinearOperator):
    """Filtered backprojection of a ray transform's measurements: weights, ramp filter, weighted backprojection.

    Takes (*batch, views, detectors), dimensionless, and gives (*batch, ny, nx) in 1/mm: an object of known attenuation comes back at
    its value when the scan covers what it must (180 degrees in parallel beam, 180 degrees plus the fan in fan beam). A limited scan
    is backprojected over the angles that were measured. It is linear, so it has an adjoint and gradients as every operator.

    Parallel beam, f = pixel pitch / area * A.H(dtheta * ramp(y)); bins wider than a pixel, and fan beams, are backprojected pixel by
    pixel with linear interpolation along the detector instead.

    Args:
        ray_transform: the operator that measured.
        window: one of `WINDOWS`.
        cutoff: fraction of the Nyquist frequency above which nothing passes, in (0, 1].

    Raises:
        TypeError: not a `RayTransform`.
        ValueError: an unknown window, or a cutoff outside (0, 1].
    """

    def __init__(self, ray_transform: RayTransform, window: str = "ram-lak", cutoff: float = 1.0) -> None:
        if not isinstance(ray_transform, RayTransform):
            raise TypeError(f"filtered backprojection needs a RayTransform, got {type(ray_transform).__name__}")
        if window not in WINDOWS:
            raise ValueError(f"unknown window {window!r}, known are {', '.join(WINDOWS)}")
        if not 0 < cutoff <= 1:
            raise ValueError(f"cutoff is a fraction of the Nyquist frequency in (0, 1], got {cutoff}")
        super().__init__(ray_transform.range_shape, ray_transform.domain_shape)
        self.ray_transform = ray_transform
        self.window = window
        self.cutoff = cutoff
        grid, beam = ray_transform.grid, ray_transform.beam
        before, step, kernel = _fan_filter(beam) if isinstance(beam, FanBeam) else _parallel_filter(beam)
        after = 1.0
        self._by_pixel = isinstance(beam, FanBeam) or beam.pitch > 1.001 * min(grid.spacing)
        if not self._by_pixel:
            after = beam.pitch / (grid.spacing[0] * grid.spacing[1])
        self._matrix = None
        self.register_buffer("_before", torch.from_numpy(before), persistent=False)
        self.register_buffer("_response", after * step * _response(kernel, window, cutoff), persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return self._backproject(self._filter(x * self._before.to(x.dtype)))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._filter(self._project(y)) * self._before.to(y.dtype)

    def _filter(self, y: Tensor) -> Tensor:
        n, padded = y.shape[-1], 2 * (self._response.shape[-1] - 1)
        return torch.fft.irfft(torch.fft.rfft(y, n=padded) * self._response.to(y.dtype), n=padded)[..., :n]

    def _backproject(self, q: Tensor) -> Tensor:
        if not self._by_pixel:
            return self.ray_transform._adjoint(q)
        out = self._projector().forward(q.reshape(-1, q.shape[-2] * q.shape[-1]))
        return out.reshape(*q.shape[:-2], *self.range_shape)

    def _project(self, x: Tensor) -> Tensor:
        if not self._by_pixel:
            return self.ray_transform._forward(x)
        out = self._projector().adjoint(x.reshape(-1, x.shape[-2] * x.shape[-1]))
        return out.reshape(*x.shape[:-2], *self.domain_shape)

    def _projector(self):
        if self._matrix is None:
            grid, beam = self.ray_transform.grid, self.ray_transform.beam
            pixels, bins = grid.shape[0] * grid.shape[1], beam.shape[0] * beam.shape[1]
            bound = 2 * pixels * len(beam.angles)
            if 8 * bound <= _sparse.MEMORY_CAP:
                self._matrix = _sparse.cached(
                    ("backprojection", grid, beam),
                    lambda: _sparse.assemble(backprojection_chunks(grid, beam), (pixels, bins), bound),
                )
            else:
                self._matrix = _sparse.StreamedMatrix(lambda: backprojection_chunks(grid, beam), (pixels, bins))
        return self._matrix

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_matrix": None}


def fbp(ray_transform: RayTransform, y: Tensor, *, window: str = "ram-lak", cutoff: float = 1.0) -> Tensor:
    """Reconstruct y (*batch, views, detectors) as an image (*batch, ny, nx) in 1/mm; see `FilteredBackprojection`."""
    return FilteredBackprojection(ray_transform, window, cutoff).to(y.device)(y)


def view_weights(angles: tuple[float, ...], period: float) -> Array:
    """The angle in rad that each view stands for on a circle of `period`, (views,).

    Half the distance to either neighbour; equal angles share their cell; one gap much wider than all others was not measured, and the
    views beside it are given there the half step that they have on their other side.
    """
    folded = np.mod(np.asarray(angles), period)
    folded[folded > period - 1e-9] = 0.0  # a rounding error below a full turn
    order = np.argsort(folded, kind="stable")
    ordered = folded[order]
    group = np.concatenate([[0], np.cumsum(np.diff(ordered) > 1e-7)])
    unique = ordered[np.concatenate([[True], np.diff(group) > 0])]
    if unique.size == 1:
        return np.full(folded.size, period / folded.size)
    gaps = np.append(np.diff(unique), unique[0] + period - unique[-1])  # gap k follows view k
    widest = int(np.argmax(gaps))
    after, before = gaps.copy(), np.roll(gaps, 1)
    if gaps[widest] > _GAP * np.delete(gaps, widest).max():
        after[widest] = before[widest]
        before[(widest + 1) % unique.size] = after[(widest + 1) % unique.size]
    cell = (after + before) / 2
    weights = np.empty(folded.size)
    weights[order] = (cell / np.bincount(group))[group]
    return weights


def parker_weights(beam: FanBeam) -> Array:
    """Redundancy weights of a fan-beam scan, (views, detectors): the two measurements of a line sum to one.

    A full turn counts every line twice: 1/2. A scan over pi + 2 delta starts and ends smoothly: with gamma the fan angle and b the
    source angle from the start, sin^2(pi/4 b / (delta + gamma)) for b < 2 (delta + gamma), sin^2(pi/4 (pi + 2 delta - b) /
    (delta - gamma)) for b > pi + 2 gamma, else 1 (gamma is positive along the detector axis). Up to a half turn nothing is
    measured twice in the main, and every weight is 1.
    """
    turn, source = _arc(beam)
    if turn >= 2 * math.pi - 1e-6:
        return np.full(beam.shape, 0.5)
    if turn <= math.pi:
        return np.ones(beam.shape)
    delta = (turn - math.pi) / 2
    b, gamma = source[:, None], beam.fan_angles()[None, :]
    rise, fall = np.maximum(delta + gamma, 1e-12), np.maximum(delta - gamma, 1e-12)
    weights = np.ones(beam.shape)
    start, end = b < 2 * rise, b > math.pi + 2 * gamma
    weights = np.where(start, np.sin(np.pi / 4 * np.minimum(b / rise, 2)) ** 2, weights)
    weights = np.where(end, np.sin(np.pi / 4 * np.clip((turn - b) / fall, 0, 2)) ** 2, weights)
    return weights


def _arc(beam: FanBeam) -> tuple[float, Array]:
    """Length of the arc that the views stand for, and each view's place on it, both in rad."""
    angles = np.asarray(beam.angles)
    cells = view_weights(beam.angles, 2 * math.pi)
    total = float(cells.sum())
    if total >= 2 * math.pi - 1e-6:
        return 2 * math.pi, np.mod(angles - angles[0], 2 * math.pi)
    folded = np.mod(angles, 2 * math.pi)
    ordered = np.sort(folded)
    gaps = np.append(np.diff(ordered), ordered[0] + 2 * math.pi - ordered[-1])
    first = int(np.argmax(gaps) + 1) % ordered.size  # the arc starts after the widest gap
    place = np.mod(folded - ordered[first] + 1e-9, 2 * math.pi) - 1e-9
    return total, place + cells[int(np.argmin(place))] / 2


def _ramp(n: int, pitch: float) -> Array:
    """The band-limited ramp at the distances 0..n-1 bins: 1 / (4 pitch^2), then -1 / (pi k pitch)^2 at odd k."""
    k = np.arange(n)
    with np.errstate(divide="ignore"):
        kernel = np.where(k % 2 == 1, -1.0 / (np.pi * k * pitch) ** 2, 0.0)
    kernel[0] = 1 / (4 * pitch**2)
    return kernel


def _parallel_filter(beam: ParallelBeam) -> tuple[Array, float, Array]:
    return view_weights(beam.angles, math.pi)[:, None], beam.pitch, _ramp(beam.detectors, beam.pitch)


def _fan_filter(beam: FanBeam) -> tuple[Array, float, Array]:
    gamma = beam.fan_angles()[None, :]
    # flat: R_s / sqrt(R_s^2 + u^2) = cos(gamma), u on the line through the isocentre; curved: R_s cos(gamma)
    before = view_weights(beam.angles, 2 * math.pi)[:, None] * parker_weights(beam) * np.cos(gamma)
    if not beam.curved:
        pitch = beam.pitch * beam.source_origin / beam.source_detector
        return before, pitch, _ramp(beam.detectors, pitch)
    step = beam.pitch / beam.source_detector
    kernel = _ramp(beam.detectors, step)
    k = np.arange(1, beam.detectors)
    kernel[1:] *= (k * step / np.sin(k * step)) ** 2
    return before * beam.source_origin, step, kernel


def _response(kernel: Array, window: str, cutoff: float) -> Tensor:
    """Frequency response (padded / 2 + 1,) of a symmetric kernel, padded so that nothing wraps around."""
    n = kernel.size
    padded = max(4, 1 << math.ceil(math.log2(2 * n)))
    circular = np.zeros(padded)
    circular[:n] = kernel
    circular[padded - n + 1 :] = kernel[:0:-1]
    response = torch.from_numpy(np.fft.rfft(circular).real.copy())
    fraction = torch.linspace(0, 1, padded // 2 + 1, dtype=torch.float64) / cutoff
    return torch.where(fraction <= 1 + 1e-12, response * WINDOWS[window](fraction.clamp(max=1)), 0.0)


def backprojection_chunks(grid: Grid, beam: Beam) -> Iterator[Chunk]:
    """Rows (pixels) of the pixel-driven backprojection (ny * nx, views * detectors): interpolate, and for a fan weigh by distance.

    Flat detector (R_s / L)^2 with L the pixel's depth along the central ray; curved 1 / L^2 with L its distance from the source.
    """
    theta = np.asarray(beam.angles)
    c, s = np.cos(theta), np.sin(theta)
    start = np.arange(len(theta), dtype=np.int64) * beam.detectors
    block = max(1, _CHUNK // len(theta))
    y, x = (a.ravel() for a in np.meshgrid(grid.y, grid.x, indexing="ij"))
    for first in range(0, x.size, block):
        px, py = x[first : first + block, None], y[first : first + block, None]
        along = px * c + py * s
        weight = np.ones_like(along)
        if isinstance(beam, FanBeam):
            depth = beam.source_origin - px * s + py * c
            if beam.curved:
                weight = 1 / (depth**2 + along**2)
                along = np.arctan2(along, depth) * beam.source_detector
            else:
                weight = (beam.source_origin / depth) ** 2
                along = along / depth * beam.source_detector
        position = (along - beam.offset) / beam.pitch + (beam.detectors - 1) / 2
        floor = np.floor(position)
        fraction = position - floor
        below = floor.astype(np.int64)
        weights = np.stack([weight * (1 - fraction), weight * fraction], axis=-1).astype(np.float32)
        bins = np.stack([below, below + 1], axis=-1)
        keep = (bins >= 0) & (bins < beam.detectors) & (weights > 0)
        columns = (start[:, None] + bins).astype(np.int32)
        yield np.count_nonzero(keep, axis=(1, 2)), columns[keep], weights[keep]
