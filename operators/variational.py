"""Total variation to a stated accuracy: the classical baseline, solved until its gap says so.

    min_x  1/2 |(A x - y) / sigma|^2 + weight TV(x),    TV(x) = sum_ij sqrt((x_i+1,j - x_ij)^2 + (x_i,j+1 - x_ij)^2)

The primal-dual method of Chambolle and Pock (J. Math. Imaging Vis. 40, 2011) in a metric of its own: a step in x is divided by a
circulant M >= t A.H A + s grad.H grad that follows the operator's mean spectrum, which flattens the ramp-like spectrum of CT. The data
term is taken exactly, ray by ray, so that a transmission scan's very uneven sigma does not shorten the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.linear import LinearOperator

_CHECK = 10  # iterations between two looks at the gap
_DATA = 0.2  # dual step of the data, in the geometric mean of 1 / sigma^2
_POWER = 40  # power iterations that bound the operator by the metric
_MARGIN = 1.05  # and what they may have missed
_JUMP = 0.015  # the dual step is weight / (this part of the value range): the size of jump that the two halves of a step agree on
_BOUND = 2.0  # dual step of the lower bound, in dual steps of the gradient


@dataclass(frozen=True)
class TVRecord:
    """How a minimisation ended.

    Attributes:
        gap: relative duality gap of each item (*batch,): objective(x) exceeds the minimum by at most gap * objective(x).
        objective: value at the returned image (*batch,).
        iterations: of the slowest item.
        converged: whether every item reached the tolerance.
    """

    gap: Tensor
    objective: Tensor
    iterations: int
    converged: bool


def tv(
    operator: LinearOperator,
    y: Tensor,
    weight: float | Tensor,
    *,
    sigma: float | Tensor = 1.0,
    x0: Tensor | None = None,
    lower: float | None = None,
    tolerance: float = 1e-2,
    max_iterations: int = 500,
) -> tuple[Tensor, TVRecord]:
    """Minimise 1/2 |(A x - y) / sigma|^2 + weight TV(x) until the relative duality gap of every item is below `tolerance`.

    The gap needs a bound on where the minimiser can lie: it is a true bound on the distance to the minimum over all images whose
    values stay within twice the value range of the returned one (and above `lower`).

    Args:
        operator: A; the last two axes of its domain are the image.
        y: measurements (*batch, *range_shape), minus any constant part of an affine model.
        weight: of the total variation, one number or one per item (*batch,), in 1 / unit of x.
        sigma: noise per ray, broadcasts against y; inf leaves a ray out.
        x0: start (*batch, *domain_shape).
        lower: smallest value allowed; None for no bound.
        tolerance: relative duality gap.
        max_iterations: after which it returns what it has, `converged` False.

    Returns:
        (x, record), x shaped (*batch, *domain_shape).

    Raises:
        ValueError: a domain without two image axes, x0 of the wrong shape, a weight, sigma or tolerance that is not positive, or a
            lower bound for a complex image.
    """
    items = len(operator.domain_shape)
    if items < 2:
        raise ValueError(f"total variation needs an image domain of two axes or more, got {operator.domain_shape}")
    if lower is not None and operator.domain_dtype.is_complex:
        raise ValueError("a complex image has no lower bound")
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    batch = y.shape[: y.ndim - len(operator.range_shape)]
    real = y.real.dtype if y.is_complex() else y.dtype
    weights = torch.as_tensor(weight, dtype=real, device=y.device).expand(batch).reshape(-1, *[1] * items)
    deviation = torch.as_tensor(sigma, dtype=real, device=y.device)
    if not (weights > 0).all() or not (deviation > 0).all():
        raise ValueError("weight and sigma must be positive")
    if x0 is not None and tuple(x0.shape) != (*batch, *operator.domain_shape):
        raise ValueError(f"x0 must be shaped {(*batch, *operator.domain_shape)}, got {tuple(x0.shape)}")
    with torch.no_grad():
        precision = deviation.pow(-2).expand(y.shape).reshape(-1, *operator.range_shape)
        start = None if x0 is None else x0.reshape(-1, *operator.domain_shape)
        problem = _Problem(operator, y.reshape(-1, *operator.range_shape), precision, weights, lower, start)
        x, gap, objective, iterations = problem.solve(tolerance, max_iterations)
    converged = bool((gap <= tolerance).all())
    return x.reshape(*batch, *operator.domain_shape), TVRecord(gap.reshape(batch), objective.reshape(batch), iterations, converged)


class _Problem:
    """The state of the items that still move; what has converged is put aside."""

    def __init__(self, operator, y, precision, weight, lower, start) -> None:
        self.operator, self.y, self.precision, self.weight, self.lower = operator, y, precision, weight, lower
        self.dims = tuple(range(-len(operator.domain_shape), 0))
        metric = self._metric()
        constant = operator.H(precision * y)
        if start is None:  # the preconditioned steepest descent from zero, with the best length: nearly a backprojection filtered
            step = self._filter(constant, metric)
            curvature = self._inner(step, operator.H(precision * operator(step)))
            start = step * (self._inner(step, constant) / curvature.clamp(min=1e-30))
        spread = (start.abs() - start.abs().amin(self.dims, keepdim=True)).amax(self.dims, keepdim=True)
        flat = precision.flatten(1)
        typical = torch.where(flat > 0, flat, math.nan).log().nanmean(1).exp().nan_to_num(1.0)
        self.step = (_DATA * typical).view(-1, *[1] * (y.ndim - 1))
        self.sigma = weight / (_JUMP * spread.clamp(min=1e-30))
        self.kappa = _BOUND * self.sigma if lower is not None else torch.zeros_like(self.sigma)
        self.metric = (_DATA * typical).view(-1, *[1] * len(self.dims)) * metric + self.sigma * _laplacian(start) + self.kappa
        self.x = start if lower is None else start.clamp(min=lower)
        self.q = precision * (operator(self.x) - y)
        self.p = torch.zeros_like(_gradient(start))
        self.u = torch.zeros_like(start)

    def solve(self, tolerance: float, max_iterations: int):
        left = torch.arange(self.y.shape[0], device=self.y.device)
        x, gap = torch.empty_like(self.x), self.weight.new_full(left.shape, math.inf)
        objective, iteration = gap.clone(), 0
        while left.numel():
            for _ in range(min(_CHECK, max_iterations - iteration)):
                self._iterate()
                iteration += 1
            image = self.x if self.lower is None else self.x.clamp(min=self.lower)
            x[left] = image
            gap[left], objective[left] = self._gap(image)
            if iteration >= max_iterations:
                break
            moving = gap[left] > tolerance
            if not moving.all():
                left = left[moving]
                self._keep(moving)
        return x, gap, objective, iteration

    def _iterate(self) -> None:
        x = self.x - self._filter(self.operator.H(self.q) + _divergence(self.p) + self.u, self.metric)
        ahead = 2 * x - self.x
        q = self.q + self.step * (self.operator(ahead) - self.y)
        self.q = q * (self.precision / (self.precision + self.step))
        p = self.p + self.sigma * _gradient(ahead)
        self.p = p / (_length(p) / self.weight).clamp(min=1)
        if self.lower is not None:
            self.u = (self.u + self.kappa * (ahead - self.lower)).clamp(max=0)
        self.x = x

    def _metric(self) -> Tensor:
        """Spectrum of a circulant M with M >= A.H A: the operator's mean answer to noise by frequency, scaled up to bound it."""
        operator = self.operator
        generator = torch.Generator().manual_seed(0)
        real = self.precision.dtype
        dtype = torch.promote_types(real, torch.complex64) if operator.domain_dtype.is_complex else real
        noise = torch.randn(operator.domain_shape, dtype=dtype, generator=generator).to(self.y.device)
        ny, nx = operator.domain_shape[-2:]
        fy, fx = torch.fft.fftfreq(ny), torch.fft.fftfreq(nx)
        ring = (torch.hypot(fy[:, None], fx) * max(ny, nx)).round().long().flatten().to(self.y.device)
        power = torch.fft.fft2(operator.H(operator(noise))).abs().pow(2).reshape(-1, ny * nx).mean(0)
        size = torch.bincount(ring).clamp(min=1)
        rings = torch.zeros(size.numel(), dtype=real, device=self.y.device).index_add_(0, ring, power) / (size * ny * nx)
        spectrum = rings.sqrt()[ring].reshape(ny, nx)
        spectrum = spectrum.clamp(min=max(float(spectrum.median()) / 4, 1e-30))
        x, bound = noise + 3.0, 1.0
        for _ in range(_POWER):
            x = self._filter(operator.H(operator(x)), spectrum)
            bound = float(torch.linalg.vector_norm(x))
            x = x / max(bound, 1e-30)
        return max(_MARGIN * bound, 1e-30) * spectrum

    @staticmethod
    def _filter(x: Tensor, spectrum: Tensor) -> Tensor:
        out = torch.fft.ifft2(torch.fft.fft2(x) / spectrum)
        return out if x.is_complex() else out.real

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.conj() * b).real.sum(self.dims, keepdim=True)

    def _gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Relative gap and objective: the data's and TV's own gaps, plus the most that a move within the box could still gain."""
        wide = torch.float64
        residual = self.operator(x) - self.y
        slope = _gradient(x)
        data = 0.5 * (self.precision * residual.abs().pow(2)).flatten(1).sum(1, dtype=wide)
        variation = (self.weight * _length(slope)).flatten(1).sum(1, dtype=wide)
        aligned = (slope.conj() * self.p).real.sum(0).flatten(1).sum(1, dtype=wide)
        conflict = (self.precision * residual - self.q).abs().pow(2) / (2 * self.precision).clamp(min=1e-30)
        conflict = conflict.flatten(1).sum(1, dtype=wide)
        z = self.operator.H(self.q) + _divergence(self.p)
        if x.is_complex():
            gain = 2 * z.abs().flatten(1).sum(1, dtype=wide) * x.abs().flatten(1).amax(1)
        else:
            low, high = x.amin(self.dims, keepdim=True), x.amax(self.dims, keepdim=True)
            low, high = low - (high - low) / 2, high + (high - low) / 2
            if self.lower is not None:
                low = low.clamp(min=self.lower)
            gain = torch.maximum(z * (x - low), z * (x - high)).flatten(1).sum(1, dtype=wide)
        objective = data + variation
        gap = (conflict + variation - aligned + gain).clamp(min=0) / objective.clamp(min=1e-30)
        return gap.to(self.weight.dtype), objective.to(self.weight.dtype)

    def _keep(self, moving: Tensor) -> None:
        for name in ("y", "precision", "weight", "step", "sigma", "kappa", "metric", "x", "q", "u"):
            setattr(self, name, getattr(self, name)[moving])
        self.p = self.p[:, moving]


def _length(field: Tensor) -> Tensor:
    return field.abs().pow(2).sum(0).sqrt()


def _laplacian(x: Tensor) -> Tensor:
    """Spectrum of the periodic grad.H grad, which bounds ours."""
    wy, wx = (2 - 2 * torch.cos(2 * math.pi * torch.fft.fftfreq(n, dtype=x.real.dtype, device=x.device)) for n in x.shape[-2:])
    return wy[:, None] + wx


def _gradient(x: Tensor) -> Tensor:
    """Forward differences along the last two axes, zero at the far edge: (2, ...)."""
    out = x.new_zeros((2, *x.shape))
    torch.sub(x[..., 1:, :], x[..., :-1, :], out=out[0, ..., :-1, :])
    torch.sub(x[..., 1:], x[..., :-1], out=out[1, ..., :-1])
    return out


def _divergence(p: Tensor) -> Tensor:
    """The adjoint of `_gradient` (minus the divergence)."""
    out = torch.zeros_like(p[0])
    out[..., :-1, :] -= p[0, ..., :-1, :]
    out[..., 1:, :] += p[0, ..., :-1, :]
    out[..., :-1] -= p[1, ..., :-1]
    out[..., 1:] += p[1, ..., :-1]
    return out
