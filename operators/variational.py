"""Total variation and wavelets to a stated accuracy: the classical baselines, solved until their gap says so.

    min_x  1/2 |(A x - y) / sigma|^2 + weight R(x)

    R = TV:        sum over pixels of sqrt(|x_i+1,j - x_ij|^2 + |x_i,j+1 - x_ij|^2)
    R = wavelets:  the l1 norm of the orthogonal wavelet coefficients' details, averaged over all shifts of the image

Both are sums of lengths of D x, for real and complex images alike; one solver serves them: the primal-dual method of Chambolle and Pock
(J. Math. Imaging Vis. 40, 2011) in a metric of its own. A step in x is divided by a circulant M >= t A.H A + s D.H D that follows the
operator's mean spectrum, which flattens the ramp-like spectrum of CT. The data term is taken exactly, ray by ray, so that a
transmission scan's very uneven sigma does not shorten the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.linear import LinearOperator

_CHECK = 10  # iterations between two looks at the gap
_DATA = 0.2  # dual step of the data, in the geometric mean of 1 / sigma^2
_DATA_COMPLEX = 0.04  # and that of encodings, whose spectrum is nearly flat: a third of the iterations that 0.2 takes
_POWER = 40  # power iterations that bound the operator by the metric
_MARGIN = 1.05  # and what they may have missed
_BOUND = 2.0  # dual step of the lower bound, in dual steps of the gradient


@dataclass(frozen=True)
class Record:
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
) -> tuple[Tensor, Record]:
    """Minimise 1/2 |(A x - y) / sigma|^2 + weight TV(x) until the relative duality gap of every item is below `tolerance`.

    The gap needs a bound on where the minimiser can lie: it is a true bound on the distance to the minimum over all images whose
    values stay within twice the value range of the returned one (and above `lower`).

    Args:
        operator: A; the last two axes of its domain are the image.
        y: measurements (*batch, *range_shape), minus any constant part of an affine model.
        weight: of the total variation, one number or one per item (*batch,), in 1 / unit of x. For MRI with maps of unit sum of squares,
            0.2 / sigma is near the best from 4 to 8 fold and over noise levels; for `wavelet` 0.3 / sigma.
        sigma: noise per ray, broadcasts against y; inf leaves a ray out.
        x0: start (*batch, *domain_shape).
        lower: smallest value allowed; None for no bound.
        tolerance: relative duality gap.
        max_iterations: after which it returns what it has, `converged` False.

    Returns:
        (x, record), x shaped (*batch, *domain_shape).

    Raises:
        ValueError: a domain without two image axes, an operator with batch axes of its own, x0 of the wrong shape, a weight, sigma or
            tolerance that is not positive, or a lower bound for a complex image.
    """
    return _minimise(operator, y, weight, _Differences(), sigma, x0, lower, tolerance, max_iterations)


def wavelet(
    operator: LinearOperator,
    y: Tensor,
    weight: float | Tensor,
    *,
    sigma: float | Tensor = 1.0,
    x0: Tensor | None = None,
    lower: float | None = None,
    levels: int = 4,
    tolerance: float = 1e-2,
    max_iterations: int = 500,
) -> tuple[Tensor, Record]:
    """Minimise 1/2 |(A x - y) / sigma|^2 + weight |W x|_1, W the details of Daubechies' orthogonal wavelets of four taps.

    The norm is the mean over all cyclic shifts of the image, so that the result has no blocks and does not depend on the grid's corner:
    what cycle spinning approximates. The coarsest averages are free. Images of any size, periodic at their edges. With a full
    unitary A every shift's details would be lowered by weight sigma^2.

    Daubechies, Comm. Pure Appl. Math. 41(7), 1988; Coifman and Donoho, Wavelets and Statistics, 1995.

    Args:
        levels: octaves of detail, 1 or more, at most as many as halve the shorter side down to one pixel.
        operator, y, weight, sigma, x0, lower, tolerance, max_iterations: see `tv`.

    Returns:
        (x, record), x shaped (*batch, *domain_shape).

    Raises:
        ValueError: see `tv`; a number of levels out of range.
    """
    shortest = min(operator.domain_shape[-2:])
    if levels < 1 or 2**levels > shortest:
        raise ValueError(f"levels must lie in 1 to {int(math.log2(shortest))} for an image {operator.domain_shape}, got {levels}")
    return _minimise(operator, y, weight, _Wavelets(levels), sigma, x0, lower, tolerance, max_iterations)


def _minimise(operator, y, weight, analysis, sigma, x0, lower, tolerance, max_iterations) -> tuple[Tensor, Record]:
    items = len(operator.domain_shape)
    if items < 2:
        raise ValueError(f"a variational method needs an image domain of two axes or more, got {operator.domain_shape}")
    if lower is not None and operator.domain_dtype.is_complex:
        raise ValueError("a complex image has no lower bound")
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if operator.batch_shape:
        raise ValueError(f"items that stop by themselves need one physics for all; this operator carries {operator.batch_shape}")
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
        problem = _Problem(operator, y.reshape(-1, *operator.range_shape), precision, weights, analysis, lower, start)
        x, gap, objective, iterations = problem.solve(tolerance, max_iterations)
    converged = bool((gap <= tolerance).all())
    return x.reshape(*batch, *operator.domain_shape), Record(gap.reshape(batch), objective.reshape(batch), iterations, converged)


class _Problem:
    """The state of the items that still move; what has converged is put aside."""

    def __init__(self, operator, y, precision, weight, analysis, lower, start) -> None:
        self.analysis = analysis
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
        typical = typical * (_DATA_COMPLEX if start.is_complex() else _DATA)
        self.step = typical.view(-1, *[1] * (y.ndim - 1))
        self.sigma = weight / (analysis.jump * spread.clamp(min=1e-30))
        self.kappa = _BOUND * self.sigma if lower is not None else torch.zeros_like(self.sigma)
        self.metric = typical.view(-1, *[1] * len(self.dims)) * metric + self.sigma * analysis.spectrum(start) + self.kappa
        self.x = start if lower is None else start.clamp(min=lower)
        self.q = precision * (operator(self.x) - y)
        self.p = torch.zeros_like(analysis.apply(start))
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
        x = self.x - self._filter(self.operator.H(self.q) + self.analysis.adjoint(self.p) + self.u, self.metric)
        ahead = 2 * x - self.x
        q = self.q + self.step * (self.operator(ahead) - self.y)
        self.q = q * (self.precision / (self.precision + self.step))
        p = self.p + self.sigma * self.analysis.apply(ahead)
        self.p = p / (self.analysis.length(p) / self.weight).clamp(min=1)
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
        """Relative gap and objective: the data's and the norm's own gaps, plus the most that a move within the box could still gain."""
        wide = torch.float64
        residual = self.operator(x) - self.y
        slope = self.analysis.apply(x)
        data = 0.5 * (self.precision * residual.abs().pow(2)).flatten(1).sum(1, dtype=wide)
        variation = (self.weight * self.analysis.length(slope)).sum(0).flatten(1).sum(1, dtype=wide)
        aligned = (slope.conj() * self.p).real.sum(0).flatten(1).sum(1, dtype=wide)
        conflict = (self.precision * residual - self.q).abs().pow(2) / (2 * self.precision).clamp(min=1e-30)
        conflict = conflict.flatten(1).sum(1, dtype=wide)
        z = self.operator.H(self.q) + self.analysis.adjoint(self.p)
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


class _Differences:
    """D of total variation: the two differences at a pixel have one length."""

    jump = 0.015  # the dual step is weight / (this part of the value range): the size of jump that the halves of a step agree on

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return _gradient(x)

    @staticmethod
    def adjoint(p: Tensor) -> Tensor:
        return _divergence(p)

    @staticmethod
    def length(field: Tensor) -> Tensor:
        return field.abs().pow(2).sum(0, keepdim=True).sqrt()

    @staticmethod
    def spectrum(x: Tensor) -> Tensor:
        """Of the periodic grad.H grad, which bounds ours."""
        wy, wx = (2 - 2 * torch.cos(2 * math.pi * torch.fft.fftfreq(n, dtype=x.real.dtype, device=x.device)) for n in x.shape[-2:])
        return wy[:, None] + wx


class _Wavelets:
    """D of wavelets: three details per octave at every pixel, over 4^octave, for each of the 4^octave shifts has its own."""

    jump = 0.008

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.filters: Tensor | None = None

    def _filters(self, x: Tensor) -> Tensor:
        if self.filters is None:
            (ly, hy), (lx, hx) = (_octaves(n, self.levels) for n in x.shape[-2:])
            bands = [
                torch.stack([hy[j][:, None] * lx[j], ly[j][:, None] * hx[j], hy[j][:, None] * hx[j]]) / 4 ** (j + 1)
                for j in range(self.levels)
            ]
            dtype = torch.promote_types(x.dtype, torch.complex64)
            self.filters = torch.cat(bands).to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 2), *x.shape[-2:])
        return self.filters

    def apply(self, x: Tensor) -> Tensor:
        out = torch.fft.ifft2(self._filters(x) * torch.fft.fft2(x))
        return out if x.is_complex() else out.real

    def adjoint(self, p: Tensor) -> Tensor:
        out = torch.fft.ifft2((self._filters(p[0]).conj() * torch.fft.fft2(p)).sum(0))
        return out if p.is_complex() else out.real

    @staticmethod
    def length(field: Tensor) -> Tensor:
        return field.abs()

    def spectrum(self, x: Tensor) -> Tensor:
        return self._filters(x).abs().pow(2).sum(0)


def _octaves(n: int, levels: int) -> tuple[list[Tensor], list[Tensor]]:
    """Responses of Daubechies' four taps at the n frequencies: the averages and the details of each octave."""
    root = math.sqrt(3)
    taps = torch.tensor([1 + root, 3 + root, 3 - root, 1 - root], dtype=torch.float64) / (4 * math.sqrt(2))
    omega = 2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64)
    average = torch.ones(n, dtype=torch.complex128)
    low, high = [], []
    for j in range(levels):
        wave = torch.exp(-1j * (2**j * omega[:, None]) * torch.arange(4))
        high.append(average * (wave @ (taps.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0])).to(wave.dtype)))
        average = average * (wave @ taps.to(wave.dtype))
        low.append(average)
    return low, high


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
