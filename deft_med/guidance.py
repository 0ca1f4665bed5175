"""Methods without training: short functions that turn a denoiser and a likelihood into a posterior denoiser.

Each stands for an h = (D' - D) / sigma^2, its guess of grad_x ln p_sigma(y | x); r = y - A D, J = dD/dx. `METHODS` lists them with
their settings, `sample_with` runs any of them. In their fixed step sizes the data are scaled so that |A / s| = 1 (`sharpness`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from deft_med.likelihood import Gaussian
from deft_med.sample import Callback, ddim, renoise, start
from deft_med.schedule import SIGMA_MAX, SIGMA_MIN, Denoiser, edm_to_vp, per_item, sigmas, vp_to_edm
from operators.linear import LinearOperator
from operators.noise import gaussian
from operators.solve import cg


class Data(Protocol):
    """What methods that follow a gradient ask of a likelihood, linear or not: its words as `deft_med.likelihood.Gaussian` has them."""

    @property
    def y(self) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def within(self, u: Tensor) -> Tensor: ...
    def misfit(self, u: Tensor) -> Tensor: ...
    def log_prob(self, u: Tensor) -> Tensor: ...


def spread(sigma: Tensor, sd: float) -> Tensor:
    """r^2 = sigma^2 sd^2 / (sigma^2 + sd^2): Var[x0 | x] per pixel of a white Gaussian with deviation sd."""
    return sigma.square() * sd**2 / (sigma.square() + sd**2)


# ------------------------------------------------------------------------------------------------------------ tools
def _gradient(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Gradient of a function of images (B, ...) -> (B,), each item's own."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(function(u).sum(), u)[0]


def _pull(denoiser: Denoiser, x: Tensor, sigma: Tensor, direction: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """D and J^T direction(D): one evaluation of the prior and one pass back through it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        d = denoiser(x, sigma)
        return d.detach(), torch.autograd.grad(d, x, direction(d.detach()))[0]


def sharpness(likelihood: Data, iterations: int = 50) -> Tensor:
    """|A / s|^2 (B,): the largest curvature of misfit / 2, by power iteration at one fixed image where A is not linear."""
    noise = torch.randn(2, 1, *likelihood.shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    u, v = noise.to(likelihood.y.device, likelihood.y.real.dtype).expand(2, len(likelihood.y), *likelihood.shape)
    length = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    with torch.enable_grad():
        u = (0.5 * u).requires_grad_()
        slope = torch.autograd.grad(0.5 * likelihood.misfit(u).sum(), u, create_graph=True)[0]
        for _ in range(iterations):
            v = torch.autograd.grad(slope, u, v / length, retain_graph=True)[0]
            length = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    return length.detach().flatten()


class _Curvature(LinearOperator):
    """A^H A / s^2 + 1 / r^2, the Hessian of DDS's objective: self-adjoint and positive."""

    def __init__(self, likelihood: Gaussian, r2: Tensor) -> None:
        super().__init__(likelihood.forward.operator.domain_shape, likelihood.forward.operator.domain_shape)
        self.likelihood, self.r2 = likelihood, r2

    def _forward(self, x: Tensor) -> Tensor:
        return self.likelihood.curvature(x) + x / self.r2

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


def _towards(likelihood: Gaussian, score: Tensor, r2: Tensor, iterations: int, tolerance: float) -> Tensor:
    """z - d for z = argmin |y - A z|^2 / s^2 + |z - d|^2 / r^2 by CG from d, given the likelihood's score at d:
    r^2 A^H (r^2 A A^H + s^2)^-1 (y - A d), and A^+ (y - A d) where r is infinite."""
    return cg(_Curvature(likelihood, per_item(r2, score)), score, iterations=iterations, tolerance=tolerance)


# ----------------------------------------------------------------------------------------- by a solve; A must be linear
def dds(denoiser: Denoiser, likelihood: Gaussian, *, sd: float = 0.5, iterations: int = 5, tolerance: float = 0.0) -> Denoiser:
    """Decomposed diffusion sampling: D' = argmin_z |y - A z|^2 / s^2 + |z - D|^2 / r^2, by CG from D.

    Converged, it is PiGDM with the Jacobian r^2 / sigma^2: h = (D' - D) / sigma^2 with
    D' - D = r^2 A^H (r^2 A A^H + s^2)^-1 (y - A D). Chung et al. 2024 (arXiv 2303.05754), whose sampler is DDIM with eta 0.85, here with
    the noise levels setting the trust.
    ``sd`` says what D leaves open: r^2 = sigma^2 sd^2 / (sigma^2 + sd^2). Around a posterior denoiser a small one corrects it only
    where the data are sure.
    """
    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        d = denoiser(x, sigma)
        return d + _towards(likelihood, likelihood.score(d), spread(sigma, sd), iterations, tolerance)

    return posterior


def pigdm(denoiser: Denoiser, likelihood: Gaussian, *, sd: float = 0.5, iterations: int = 20, tolerance: float = 0.0) -> Denoiser:
    """Pseudoinverse guidance: h = J^T A^H (r^2 A A^H + s^2)^-1 (y - A D), the score of y | x ~ N(A D, r^2 A A^H + s^2).

    Song et al. 2023 (ICLR, OpenReview 9_gsMA8MRKQ; not on arXiv). Exact for a white Gaussian prior of deviation ``sd``. The
    solve is the image-space twin that `dds` makes, A^H (r^2 A A^H + s^2)^-1 = (r^2 A^H A + s^2)^-1 A^H, by ``iterations`` of CG. Here
    D' = D + sigma^2 h; the paper's samplers scale h by r^2 in place of sigma^2, with r^2 = sigma^2 / (1 + sigma^2).
    """
    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        r2 = spread(sigma, sd)
        d, pulled = _pull(denoiser, x, sigma, lambda d: _towards(likelihood, likelihood.score(d), r2, iterations, tolerance))
        return d + per_item(sigma.square() / r2, x) * pulled

    return posterior


def ddnm(denoiser: Denoiser, likelihood: Gaussian, *, iterations: int = 5, tolerance: float = 0.0) -> Denoiser:
    """Null-space projection: D' = D + L A^+ (y - A D), so h = L A^+ (y - A D) / sigma^2: the data rule the range, D the null space.

    A^+ is ``iterations`` of CG from zero on the whitened normal equations, stopped early for noise: B = FBP is no pseudo-inverse.
    L = min(1, sigma / |A^+ n|), |.| the root mean square over pixels: below the noise that A^+ propagates the data are trusted less.
    A simplified DDNM+ (Wang et al. 2023, arXiv 2212.00490), which compares with the noise of the coming step and lowers it. With a
    singular value decomposition L differs by singular value, as in DDRM (Kawar et al. 2022, arXiv 2201.11793); `dds` with r = sigma is
    that without one, softly.
    """
    def inverse(score: Tensor) -> Tensor:
        return _towards(likelihood, score, score.new_full((), torch.inf), iterations, tolerance)

    noise = gaussian(torch.zeros_like(likelihood.y).cpu(), 1.0, generator=Generator().manual_seed(0)).to(likelihood.y)
    noise = inverse(likelihood.forward.adjoint(noise / likelihood.sigma)).square().flatten(1).mean(1).sqrt()

    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        d = denoiser(x, sigma)
        return d + per_item((sigma / noise).clamp(max=1), d) * inverse(likelihood.score(d))

    return posterior


def diffpir(denoiser: Denoiser, likelihood: Data, *, weight: float = 1.0, iterations: int = 5, tolerance: float = 1e-4) -> Denoiser:
    """Plug-and-play restoration: D' = argmin_z |y - A z|^2 + rho |z - D|^2 with rho = weight s^2 / sigma^2; h = (D' - D) / sigma^2.

    Zhu et al. 2023 (arXiv 2305.08995), algorithm 1; ``weight`` is its lambda. Divided by s^2 it is `dds` with r^2 = sigma^2 / weight, which
    grows without bound where dds knows that no pixel strays further than sd; its sampler (`renoise`) draws other noise. The solve is
    ``iterations`` of CG from D, fewer where ``tolerance`` is met: few are faster and better here than many. A likelihood that is not
    linear takes ``iterations`` gradient steps on -ln p(y | z) + |z - D|^2 / (2 r^2).
    """
    curvature = None if isinstance(likelihood, Gaussian) else sharpness(likelihood)

    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        d, r2 = denoiser(x, sigma), sigma.square() / weight
        if isinstance(likelihood, Gaussian):
            return d + _towards(likelihood, likelihood.score(d), r2, iterations, tolerance)
        z, pull = d, per_item(1 / r2, d)
        step = 1 / per_item(curvature + 1 / r2, d)
        for _ in range(iterations):
            z = z + step * (_gradient(likelihood.log_prob, z) + pull * (d - z))
        return z

    return posterior


# ----------------------------------------------------------------------------------------- by a gradient; any likelihood
def dps(denoiser: Denoiser, likelihood: Data, levels: Tensor, *, zeta: float = 0.5) -> Denoiser:
    """Diffusion posterior sampling as published: after each ancestral step x_{i-1} -= (zeta / |r|) grad_{x_i} |r|^2, r = y - A D(x_i).

    Chung et al. 2023 (arXiv 2209.14687), algorithm 1; its principle is h = -J^T grad_D |y - A D|^2 / (2 noise^2), p(y | x0) at x0 = D.
    The published images are a x in the variance-preserving frame, a_s^2 = 1 / (1 + s^2), and the ancestral step from level s to t is
    x <- D + (t/s)^2 (x - D) + noise. So `ddim` with eta 1 takes the published step with D' = D + s^2 h,
    h = -zeta grad_x |r|^2 / (|r| a_s a_t (s^2 - t^2)): that step size hangs on the grid ``levels``, and fewer steps mean a smaller h.
    Here |r| is of data whitened and scaled to |A / s| = 1, where zeta is comparable with the paper's 0.3 to 1; it must be tuned.
    """
    norm = sharpness(likelihood).sqrt()

    def residual(d: Tensor) -> Tensor:  # |r|; grad |r|^2 / |r| = 2 grad |r|
        return likelihood.misfit(d).clamp(min=1e-20).sqrt()

    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        grid = levels.to(sigma)
        t = grid[(grid[:-1] - sigma[:, None]).abs().argmin(1) + 1]
        shrink = (edm_to_vp(sigma) * edm_to_vp(t)).sqrt() * (1 - (t / sigma).square())
        d, pulled = _pull(denoiser, x, sigma, lambda d: _gradient(residual, d) * per_item(2 / norm, d))
        return d - per_item(zeta / shrink, d) * pulled

    return posterior


def reconstruction(denoiser: Denoiser, likelihood: Data, *, weight: float = 1.5) -> Denoiser:
    """Reconstruction guidance: D' = D - (weight / 2) grad_x |y - A D|^2, so h = -weight grad_x |y - A D|^2 / (2 sigma^2).

    Ho et al. 2022 (arXiv 2204.03458). It takes y | x for N(A D, sigma^2 / weight): a fixed step towards the data, whatever
    their noise, here of data whitened and scaled to |A / s| = 1: where J is near 1, weights below 2 are stable.
    """
    scale = weight / (2 * sharpness(likelihood))

    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        d, pulled = _pull(denoiser, x, sigma, lambda d: _gradient(likelihood.misfit, d))
        return d - per_item(scale, d) * pulled

    return posterior


def red_diff(denoiser: Denoiser, likelihood: Data, x: Tensor, levels: Tensor, *, weight: float = 64.0, rate: float = 0.03,
             generators: Sequence[Generator] = (), callback: Callback | None = None) -> Tensor:
    """Regularisation by denoising diffusion: an image u, by Adam on -ln p(y | u) + (weight / 2) |u - D(u + sigma n)|^2 with D held fixed.

    Mardani et al. 2023 (arXiv 2305.04391), algorithm 1: variational inference with a narrow Gaussian about u. Its term
    lambda sigma (eps(x) - n)^T u pulls by weight (u - D), since eps(x) - n = (u - D) / sigma. There is no path and no sample; the h is
    grad ln p(y | u) itself, at sigma = 0, set against weight (D - u) as the score of the prior, which is never differentiated. D at
    ``levels[0]`` from ``x`` is the start, then one step a level. For a Gaussian prior N(m, C) and a constant level the fixed point is
    argmin |y - A u|^2 / s^2 + weight (u - m)^T sigma^2 (C + sigma^2)^-1 (u - m): with weight 1 / sigma^2 the MAP estimate (for a
    Gaussian also the posterior mean) under the prior blurred by sigma.
    """
    u = denoiser(x, x.new_full((len(x),), float(levels[0]))).detach().clone()  # Adam writes into it
    adam = torch.optim.Adam([u], lr=rate, betas=(0.9, 0.99))
    for step, level in enumerate(levels[1:-1].tolist()):
        noisy = start(u.shape, level, generators, u, device=u.device, dtype=u.dtype)
        d = denoiser(noisy, x.new_full((len(x),), level)).detach()
        u.grad = weight * (u - d) - _gradient(likelihood.log_prob, u)
        adam.step()
        if callback is not None:
            callback(step, d)
    return u


# ------------------------------------------------------------------------------------------------------- all of them
def vp_sigmas(steps: int, *, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> Tensor:
    """``steps`` decreasing levels, evenly spaced in the time of the linear variance-preserving schedule, then 0: the grid of DPS's step."""
    table = vp_to_edm((1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0))
    table = table[(table > low * (1 - 1e-3)) & (table < high * (1 + 1e-3))].log()
    time = torch.linspace(len(table) - 1, 0, steps, dtype=torch.float64)
    before = time.floor().long().clamp(max=len(table) - 2)
    return torch.cat([torch.lerp(table[before], table[before + 1], time - before).exp(), table.new_zeros(1)])


@dataclass(frozen=True)
class Method:
    """How a method is run: ``make`` builds its denoiser with ``settings``, ``sampler`` walks with the settings ``walk``.

    Without a sampler ``make`` is an optimiser over images. ``steps`` is the default number of evaluations of the prior, one a step;
    ``through_prior`` says that each also goes back through it, about twice the time and much more memory.
    """

    make: Callable[..., Any]
    settings: Mapping[str, float]
    sampler: Callable[..., Tensor] | None = None
    walk: Mapping[str, float] = field(default_factory=dict)
    steps: int = 100
    through_prior: bool = False
    linear: bool = False  # asks for a linear forward model
    solves: bool = False  # solves with the likelihood's curvature: of a linear model, or as Gauss and Newton do of counts and magnitudes
    levels: Callable[..., Tensor] = sigmas
    knows_levels: bool = False


METHODS: dict[str, Method] = {
    "dps": Method(dps, {"zeta": 0.5}, ddim, {"eta": 1.0}, 1000, through_prior=True, levels=vp_sigmas, knows_levels=True),
    "pigdm": Method(pigdm, {"sd": 0.5, "iterations": 20}, ddim, {"eta": 1.0}, through_prior=True, solves=True),
    "dds": Method(dds, {"sd": 0.5, "iterations": 5}, ddim, {"eta": 0.85}, 50, solves=True),
    "ddnm": Method(ddnm, {"iterations": 5}, ddim, {"eta": 0.85}, linear=True),
    "diffpir": Method(diffpir, {"weight": 1.0, "iterations": 5}, renoise, {"zeta": 0.3}),
    "red-diff": Method(red_diff, {"weight": 64.0, "rate": 0.03}, steps=1000),
    "reconstruction": Method(reconstruction, {"weight": 1.5}, ddim, {"eta": 1.0}, 250, through_prior=True),
}


def unsuited(name: str, method: Method, likelihood: Data) -> str:
    """Why a method cannot take a likelihood, or nothing."""
    if method.linear and not isinstance(likelihood, Gaussian):
        return f"{name} asks for a linear forward model with Gaussian noise, got {type(likelihood).__name__}"
    if method.solves and not hasattr(likelihood, "curvature"):
        return f"{name} solves with the likelihood's curvature, which {type(likelihood).__name__} does not know: choose dps or diffpir"
    return ""


def sample_with(name: str, denoiser: Denoiser, likelihood: Data, *, generators: Sequence[Generator], steps: int | None = None,
                sigma_max: float = SIGMA_MAX, sigma_min: float = SIGMA_MIN, callback: Callback | None = None, **settings: float) -> Tensor:
    """Images (K, C, ny, nx) by one of `METHODS`, one per generator, in ``steps`` evaluations each from pure noise at sigma_max.

    ``likelihood`` has one item, and images are made one after the other, or K items. ``settings`` replace the method's own, those of its
    sampler included. Where no measurement can see the image it is zero. Raises ValueError for an unknown method or setting, and for a
    likelihood that does not suit it.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if why := unsuited(name, method, likelihood):
        raise ValueError(why)
    if unknown := settings.keys() - method.settings.keys() - method.walk.keys():
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}: choose from {', '.join([*method.settings, *method.walk])}")
    if len(likelihood.y) == 1 < len(generators):
        return torch.cat([sample_with(name, denoiser, likelihood, generators=[g], steps=steps, sigma_max=sigma_max, sigma_min=sigma_min,
                                      callback=callback, **settings) for g in generators])
    levels = method.levels(method.steps if steps is None else steps, low=sigma_min, high=sigma_max)
    made, walk = ({key: type(value)(settings.get(key, value)) for key, value in table.items()} for table in (method.settings, method.walk))
    y, run = likelihood.y, {"generators": generators, "callback": callback}

    def inside(x: Tensor, sigma: Tensor) -> Tensor:
        return likelihood.within(denoiser(x, sigma))

    with torch.no_grad():
        x = start((len(y), *likelihood.shape), float(levels[0]), generators, device=y.device, dtype=y.real.dtype)
        if method.sampler is None:
            return likelihood.within(method.make(inside, likelihood, x, levels, **made, **run))
        grid = {"levels": levels} if method.knows_levels else {}
        return likelihood.within(method.sampler(method.make(inside, likelihood, **grid, **made), x, levels, **walk, **run))
