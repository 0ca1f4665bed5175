"""Noise levels are spoken here only: grids of sigma, the perturbation, training draws, and the VP <-> EDM dictionary.

Every image at noise level sigma is ``x = x0 + sigma n`` (the EDM frame, Karras et al. 2022, arXiv 2206.00364).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

SIGMA_MIN, SIGMA_MAX = 0.01, 80.0
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, [z,] y, x), sigma (B,)) -> x0hat: the joint of the building


def per_item(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,) or () shaped so that it multiplies x (B, ...)."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma


def in_turns(denoiser: Denoiser, mirrors: Sequence[tuple[int, ...]]) -> Denoiser:
    """The denoiser on images flipped along those axes, and its answers flipped back; from call to call the next of ``mirrors``."""
    turns = itertools.cycle(mirrors)

    def turned(x: Tensor, sigma: Tensor) -> Tensor:
        axes = next(turns)
        return denoiser(x.flip(axes), sigma).flip(axes)

    return turned


def perturb(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = x0 + sigma n for x0, n (B, ...) and sigma (B,)."""
    return x0 + per_item(sigma, x0) * noise


def sigmas(steps: int, *, low: float = SIGMA_MIN, high: float = SIGMA_MAX, rho: float = 7.0) -> Tensor:
    """Decreasing noise levels for ``steps`` evaluations, ending in 0: shape (steps + 1,), float64.

    Equation 5 of Karras et al. 2022. Raises ValueError when steps < 1 or the levels are not 0 < low <= high.
    """
    if steps < 1 or not 0 < low <= high:
        raise ValueError(f"noise levels want steps >= 1 and 0 < low <= high, got steps={steps}, low={low}, high={high}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


def draw(count: int, uniform: float = 0.5, mean: float = -1.0, std: float = 1.4, *, generator: Generator, low: float = SIGMA_MIN,
         high: float = SIGMA_MAX, noisy: float = 0.0) -> Tensor:
    """Training noise levels (count,): a share ``uniform`` log-uniform over [low, high], the rest lognormal(mean, std).

    The lognormal part sits where denoising is hard, the log-uniform part trains the noisy end where sampling starts; a share
    ``noisy`` of all draws is moved to the last decade, where D' is the posterior mean in one evaluation.
    """
    device = generator.device
    pick = torch.rand(count, generator=generator, device=device)
    flat = torch.rand(count, generator=generator, device=device)
    bell = torch.randn(count, generator=generator, device=device) * std + mean
    level = torch.where(pick < uniform, flat * math.log(high / low) + math.log(low), bell)
    if noisy > 0:
        late = torch.rand(count, generator=generator, device=device) < noisy
        level = torch.where(late, math.log(high) - flat * math.log(10), level)
    return level.exp().clamp(low, high)


def draw_vp(count: int, *, generator: Generator) -> Tensor:
    """Noise levels (count,) of t drawn uniformly from 1000 steps of the linear schedule 1e-4 ... 2e-2 (Ho et al. 2020): the
    paper's own training distribution."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    table = vp_to_edm((1 - beta).cumprod(0)).float().to(generator.device)
    return table[torch.randint(1000, (count,), generator=generator, device=generator.device)]


def vp_to_edm(alpha_bar: Tensor) -> Tensor:
    """sigma of the EDM frame for a variance-preserving level: x_t = sqrt(alpha_bar) x, sigma^2 = (1 - alpha_bar) / alpha_bar."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def edm_to_vp(sigma: Tensor) -> Tensor:
    """alpha_bar of the variance-preserving frame: 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma.square())
