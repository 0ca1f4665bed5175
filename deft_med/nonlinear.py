"""Likelihoods that are not linear and Gaussian: photon counts, magnitudes without phase, any differentiable forward model.

All have the words of `likelihood.Gaussian`, so that DEFT's h, DPS, reconstruction guidance, DiffPIR by its gradient and RED-diff take
them as they are.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Generator, Tensor

from deft_med.intensity import Affine
from deft_med.likelihood import Gaussian, Likelihood
from deft_med.schedule import per_item
from operators.linear import LinearOperator
from operators.noise import gaussian

MOMENTS = 8.0  # mean count from which Poisson's expected deviance is its series
SPECTRAL, PROJECTIONS = 100, 60  # iterations of a start without phases


class Nonlinear(Likelihood):
    """y = F(u) + sigma n for any differentiable F, (B, C, y, x) -> (B, ...) real.

    Args:
        forward: F; torch operations, twice differentiable where methods ask for step sizes (`guidance.sharpness`).
        y: measurements.
        sigma: noise deviation, broadcastable to y.
        shape: (C, y, x) of an image.
        inverse: G with G(F(u)) near u, for ``residual`` g = G(y) - G(F(u)), ``direct`` G(y) and ``s_img``; methods that follow a gradient
            do without.
        ratio: what networks are told of M / N; by default just that.

    Raises ValueError when the residual is asked for without an inverse.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], y: Tensor, sigma: Tensor, shape: tuple[int, ...],
                 inverse: Callable[[Tensor], Tensor] | None = None, *, ratio: float | None = None) -> None:
        self.forward, self.y, self.sigma, self.image, self.inverse = forward, y, sigma.expand_as(y), tuple(shape), inverse
        self.count = math.prod(y.shape[1:])
        self.ratio = self.count / math.prod(shape) if ratio is None else ratio

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image

    def misfit(self, u: Tensor) -> Tensor:
        """|(y - F(u)) / sigma|^2 per item (B,)."""
        return ((self.y - self.forward(u)) / self.sigma).square().flatten(1).sum(1)

    def residual(self, u: Tensor) -> Tensor:
        return self._back(self.y) - self._back(self.forward(u))

    def direct(self) -> Tensor:
        return self._back(self.y)

    @property
    def s_img(self) -> Tensor:
        """Root mean square over pixels of what one fixed draw of the noise changes in G(y), (B,)."""
        noisy = self.y + self.sigma * _unit(self.y)
        return (self._back(noisy) - self._back(self.y)).square().flatten(1).mean(1).sqrt()

    def take(self, index: Tensor) -> "Nonlinear":
        return Nonlinear(self.forward, self.y[index], self.sigma[index], self.image, self.inverse, ratio=self.ratio)

    def _back(self, y: Tensor) -> Tensor:
        if self.inverse is None:
            raise ValueError("this likelihood has no approximate inverse: give one, or use a method by gradient such as dps")
        return self.inverse(y)


class Pointwise(Likelihood):
    """ln p(y | A u) of measurements that each depend on their own number of A u alone, in any way.

    Value and gradient of ``misfit`` are exact. Its second derivative, which only step sizes and solves look at, is that of a Gaussian
    beside it, 2 A^H A / sigma^2: positive everywhere, and known before any image is (optimisation transfer by paraboloids: Erdogan and
    Fessler, Phys. Med. Biol. 44(11), 1999). `guidance.dds` around a denoiser is then one Gauss-Newton step.
    """

    forward: Affine
    sigma: Tensor
    inverse: LinearOperator

    @abstractmethod
    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """-2 ln p(y | z) of every measurement, without its constant, and its derivative (of complex z: by its parts, as one number)."""

    @property
    def shape(self) -> tuple[int, ...]:
        image = self.forward.operator.domain_shape
        return image if len(image) > 2 else (1, *image)

    def misfit(self, u: Tensor) -> Tensor:
        """-2 ln p(y | u) per item (B,)."""
        z = self.forward(u)
        value, slope = self.terms(z.detach())
        step = z - z.detach()  # zero, but not its derivatives
        return (value + (slope.conj() * step).real + (step.conj() * step).real / self.sigma.square()).flatten(1).sum(1)

    def score(self, u: Tensor) -> Tensor:
        """grad_u ln p(y | u) = -A^H slope / 2."""
        with torch.no_grad():
            return self.forward.adjoint(-0.5 * self.terms(self.forward(u))[1])

    def curvature(self, u: Tensor) -> Tensor:
        """A^H A u / sigma^2: the Hessian of misfit / 2 without what bends the measurements, as Gauss and Newton take it."""
        return self.forward.adjoint(self.forward.linear(u) / self.sigma.to(u) ** 2)


class Transmission(Pointwise):
    """Photon counts n ~ Poisson(I0 exp(-p)) + electronic e N(0, 1), cut off at a ceiling, of line integrals p = A u.

    Read-out noise is taken in as counts: n + e^2 ~ Poisson(I0 exp(-p) + e^2), right in mean and variance, and exact for e = 0 (Snyder
    et al., J. Opt. Soc. Am. A 12(2), 1995; in tomography Yavuz and Fessler, Med. Image Anal. 2(4), 1998). A ray at the ceiling C is
    censored: it says n >= C, by Poisson's tail in the approximation of Peizer and Pratt (J. Am. Stat. Assoc. 63, 1968), right to 1e-3 of
    -2 ln P. Starved rays, zero counts and below, need no exception. The misfit is the deviance, 0 where every ray's mean is its count.

    Args:
        lines: the Gaussian likelihood of ln(I0 / n) (`operators.counts.line_integrals`): A, B, s_img, M / N and the residual that
            networks know are its own. Of a saturated ray the residual is what lies above ln(I0 / C), and 0 below.
        counts: n, shaped like lines.y.
        photons, electronic, ceiling: I0, e and C in counts; None for no ceiling.
    """

    def __init__(self, lines: Gaussian, counts: Tensor, photons: float, electronic: float = 0.0, ceiling: float | None = None) -> None:
        self.lines, self.counts = lines, counts
        self.photons, self.electronic, self.ceiling = photons, electronic, ceiling
        self.forward, self.sigma, self.inverse = lines.forward, lines.sigma, lines.inverse
        self.y, self.count, self.ratio = counts, lines.count, lines.ratio
        self.saturated = None if ceiling is None else counts >= ceiling
        if self.saturated is not None:  # a saturated ray has no deviance to speak of
            self.count = (lines.sigma.isfinite() & ~self.saturated).flatten(1).sum(1).clamp(min=1)

    @property
    def s_img(self) -> Tensor:
        """Propagated noise of the line integrals (B,)."""
        return self.lines.s_img

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Deviance of every ray at the line integrals z, and its derivative."""
        beam, mean = self._means(z)
        shifted = (self.counts + self.electronic**2).clamp(min=0)
        some = torch.where(shifted > 0, shifted, 1)  # of no counts the deviance is 2 mean
        value = torch.where(shifted > 0, some * _gap(mean / some), 2 * mean)
        slope = 2 * beam * (shifted / mean - 1)
        if self.saturated is not None:
            root, turn = self._root(mean)
            tail = torch.special.log_ndtr(root)
            hazard = torch.exp(-0.5 * root.square() - tail) / math.sqrt(2 * math.pi)
            value = torch.where(self.saturated, -2 * tail, value)
            slope = torch.where(self.saturated, 2 * hazard * turn * beam, slope)
        return self.lines.known(value), self.lines.known(slope)

    def _means(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(I0 exp(-z), the same and what read-out adds), finite and never zero."""
        beam = self.photons * torch.exp(-z.clamp(-20, 60))
        return beam, beam + self.electronic**2

    def _root(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """r(mean) with Phi(r) = P(n >= C), and dr / dmean: the deviance's signed root at C - 1/2, its sign's factor at C - 1/3."""
        top = self.ceiling - 0.5 + self.electronic**2  # type: ignore[operator]
        over = mean / top - 1
        near = over.abs() < 0.01
        apart = torch.where(near, 1, over)
        steep = torch.where(near, 1 - over / 3 + 7 / 36 * over.square(), _gap(mean / top).sqrt() / apart.abs()) * top**0.5
        bend = torch.where(near, top**-0.5 * (7 / 18 * over - 1 / 3), (top / (mean * steep) - steep / top) / apart)  # dsteep / dmean
        shifted = over - 1 / (6 * top)
        return shifted * steep, steep / top + shifted * bend

    def expected(self, u: Tensor) -> Tensor:
        """The misfit that u would have on average over fresh measurements of it, (B,): near M, less where rays starve or saturate."""
        _, mean = self._means(self.forward(u))
        each = _expected_deviance(mean)
        if self.ceiling is not None:
            z = -self._root(mean)[0]  # the truth lies below the ceiling by so many deviations
            below, above = torch.special.ndtr(z), torch.special.ndtr(-z)
            density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
            each = each * (below - z * density) - 2 * above * torch.special.log_ndtr(-z)
        return self.lines.known(each).flatten(1).sum(1)

    def chi2(self, u: Tensor) -> Tensor:
        """The deviance over what is expected of it at u, per item (B,): near 1 for the truth and for a posterior sample."""
        return self.misfit(u) / self.expected(u)

    def residual(self, u: Tensor) -> Tensor:
        """g = B(ln(I0 / n) - A u), in the units of u."""
        left = self.lines.known(self.lines.y - self.forward(u))
        if self.saturated is not None:
            left = torch.where(self.saturated, left.clamp(max=0), left)
        return self.inverse(left) / self.forward.a

    def direct(self) -> Tensor:
        """B ln(I0 / n): the classical reconstruction of the counts' logarithm."""
        return self.lines.direct()

    def inverted_by(self, inverse: LinearOperator) -> "Transmission":
        """The same counts with another approximate inverse."""
        return Transmission(self.lines.inverted_by(inverse), self.counts, self.photons, self.electronic, self.ceiling)

    def take(self, index: Tensor) -> "Transmission":
        return Transmission(self.lines.take(index), self.counts[index], self.photons, self.electronic, self.ceiling)


class Magnitudes(Pointwise):
    """y = |A u| + sigma n, real: phase retrieval, with A a complex operator.

    Amplitudes rather than intensities: the square root of a photon count has nearly one variance for all counts, and the misfit is of
    second order in u, where that of intensities is of fourth. A phase that all of A u shares is not seen: u and exp(i c) u fit alike (of
    a real image, u and -u), and nothing in an estimate says which; compare magnitudes, or turn one onto the other. A single Fourier
    transform cannot tell shifts and the turned conjugate apart either; codes can (Candes, Li and Soltanolkotabi, Appl. Comput.
    Harmon. Anal. 39(2), 2015).

    ``residual`` is the step of Gerchberg and Saxton (Optik 35, 1972): g = B(y exp(i arg A u) - A u), which also is the gradient where
    B = A^H. Args as of `likelihood.Gaussian`; y is real.
    """

    def __init__(self, forward: Affine, y: Tensor, sigma: Tensor, inverse: LinearOperator, *, count: int | None = None,
                 ratio: float | None = None, s_img: Tensor | None = None) -> None:
        self.forward, self.y, self.sigma, self.inverse = forward, y, sigma.expand_as(y), inverse
        self.count = math.prod(y.shape[1:]) if count is None else count
        self.ratio = self.count / math.prod(inverse.range_shape) if ratio is None else ratio
        if s_img is not None:
            self.s_img = s_img

    @cached_property
    def s_img(self) -> Tensor:
        """Propagated noise (B,): B of one fixed draw along the phases of another."""
        noise = torch.polar(self.sigma, math.pi * _unit(self.y).expand_as(self.y)) * _unit(self.y, seed=1)
        return (self.inverse(noise) / self.forward.a).square().flatten(1).mean(1).sqrt()

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """((|z| - y) / sigma)^2 and its derivative 2 (z - y exp(i arg z)) / sigma^2."""
        aligned = self.y * _phase(z)
        return ((z.abs() - self.y) / self.sigma).square(), 2 * (z - aligned) / self.sigma.square()

    def residual(self, u: Tensor) -> Tensor:
        """g = B(y exp(i arg A u) - A u), in the units of u."""
        z = self.forward(u)
        return self.inverse(self.y * _phase(z) - z) / self.forward.a

    def direct(self) -> Tensor:
        """Alternating projections u <- u + g from a spectral start, the image whose intensities go most with the data's.

        The start is the largest eigenvector of A^H diag(w) A by power iteration, w = (v - 1) / (v + sqrt(d) - 1) for intensities v over
        their mean and d measurements per complex pixel (Mondelli and Montanari, Found. Comput. Math. 19(3), 2019); with v itself four
        codes are too few. The phase of all of it is arbitrary.
        """
        bright = self.y.square()
        bright = bright / per_item(bright.flatten(1).sum(1).clamp(min=1e-30) / self.count, bright)
        root = math.sqrt(max(2 * self.count / math.prod(self.inverse.range_shape), 1.5))
        weight = (bright - 1) / (bright + root - 1) + 1 / (root - 1)  # none below zero: the largest eigenvalue leads
        u = torch.randn((1, *self.shape), generator=Generator().manual_seed(0)).to(self.y).expand(len(self.y), *self.shape)
        for _ in range(SPECTRAL):
            u = self.inverse(weight * self.forward.linear(u))
            u = u / per_item(_length(u), u)
        u = u * per_item(_length(self.y) / _length(self.forward.linear(u)), u)
        for _ in range(PROJECTIONS):
            u = u + self.residual(u)
        return u

    def inverted_by(self, inverse: LinearOperator) -> "Magnitudes":
        """The same measurements with another approximate inverse."""
        return Magnitudes(self.forward, self.y, self.sigma, inverse, count=self.count, ratio=self.ratio)

    def take(self, index: Tensor) -> "Magnitudes":
        return Magnitudes(self.forward.take(index), self.y[index], self.sigma[index], self.inverse, count=self.count, ratio=self.ratio,
                          s_img=self.s_img[index])


def _unit(y: Tensor, seed: int = 0) -> Tensor:
    """One fixed draw of unit noise, the same for every item."""
    return gaussian(torch.zeros((1, *y.shape[1:]), dtype=y.dtype), 1.0, generator=Generator().manual_seed(seed)).to(y)


def _phase(z: Tensor) -> Tensor:
    """exp(i arg z), 1 where z is 0."""
    length = z.abs()
    return torch.where(length > 0, z / length.clamp(min=torch.finfo(length.dtype).tiny), 1)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm per item (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).clamp(min=1e-30)


def _gap(ratio: Tensor) -> Tensor:
    """2 (t - ln(1 + t)) with 1 + t = ratio: Poisson's deviance over the count, for a mean of ratio counts; near 0, where the terms
    cancel, by its series."""
    t = ratio - 1
    series = t.square() * (1 - t * (2 / 3 - t * (1 / 2 - t * (2 / 5 - t / 3))))
    return torch.where(t.abs() < 0.02, series, 2 * (t - ratio.log()))


def _expected_deviance(mean: Tensor) -> Tensor:
    """E[2 (n ln(n / mean) - n + mean)] for n ~ Poisson(mean): 1 + 1 / (6 mean) + 1 / (6 mean^2) + ..., summed where means are small."""
    small = mean.clamp(1e-6, MOMENTS)
    total = torch.zeros_like(mean)
    for n in range(40):
        chance = torch.exp(n * small.log() - small - math.lgamma(n + 1))
        total = total + chance * 2 * ((n * (math.log(n) - small.log()) if n else 0) - n + small)
    return torch.where(mean > MOMENTS, 1 + 1 / (6 * mean) + 1 / (6 * mean.square()), total)
