"""Samplers: plain functions of any denoiser; they know no network and no measurement.

A sampler may not narrow the posterior. First-order steps do: with 20 levels from 80 to 0.01 the exact denoiser of a Gaussian gives
0.86 (``ddim``, eta 0) and 0.75 (eta 1) of its deviation; ``dpm`` gives 1.04, and 1.01 when it starts at 3 (tests/test_laboratory.py).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from deft_med.schedule import Denoiser

Callback = Callable[[int, Tensor], None]


def _normal(like: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Standard normal noise, every item from its own generator, so that an item does not depend on its batch."""
    return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generators]).to(like.device)


def start(shape: Sequence[int], sigma: float, generators: Sequence[Generator], x0: Tensor | None = None, *,
          device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """x = x0 + sigma n (B, C, H, W); without x0 the start of a full run, sigma n.

    Raises ValueError when there is not one generator per item.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"one generator per item: got {len(generators)} for {shape[0]} items")
    blank = torch.zeros(tuple(shape), device=device, dtype=dtype)
    return (blank if x0 is None else x0) + sigma * _normal(blank, generators)


def ddim(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, eta: float = 1.0, generators: Sequence[Generator] = (),
         callback: Callback | None = None) -> Tensor:
    """Denoising diffusion implicit model sampling (Song et al. 2021, equation 12, in the EDM frame).

    From level s to t < s:  x <- D + sqrt(t^2 - up^2) (x - D) / s + up z,  up = eta t sqrt(1 - t^2 / s^2).
    eta 0 is deterministic, eta 1 ancestral. First order: both reach the posterior only as the steps shrink.
    ``sigmas`` (n + 1,) decrease and end in 0; ``callback(step, D)`` is called after each evaluation.
    """
    for step, (s, t) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        d = denoiser(x, x.new_full((len(x),), s))
        up = eta * t * (1 - (t / s) ** 2) ** 0.5
        x = d + (max(0.0, t**2 - up**2) ** 0.5 / s) * (x - d)  # up = t may be above t by rounding
        if up > 0:
            x = x + up * _normal(x, generators)
        if callback is not None:
            callback(step, d)
    return x


def renoise(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, zeta: float = 0.3, generators: Sequence[Generator] = (),
            callback: Callback | None = None) -> Tensor:
    """DiffPIR's sampler: from level s to t, x <- D' + t (sqrt(1 - zeta) (x - D') / s + sqrt(zeta) n). Zhu et al. 2023, algorithm 1.

    It is `ddim` with eta^2 = zeta / (1 - t^2 / s^2) at each step: where steps are short more than the ancestral noise (eta 1), so that,
    unlike ddim's, its limit of many steps is not the reverse diffusion.
    """
    for step in range(len(sigmas) - 1):
        s, t = sigmas[step : step + 2].tolist()
        tell = None if callback is None else lambda _, d, step=step: callback(step, d)
        x = ddim(denoiser, x, sigmas[step : step + 2], eta=math.sqrt(zeta / (1 - (t / s) ** 2)), generators=generators, callback=tell)
    return x


def dpm(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, eta: float = 0.0, generators: Sequence[Generator] = (),
        callback: Callback | None = None) -> Tensor:
    """Second-order multistep sampling at one evaluation a step (DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095).

    In l = ln(1 / sigma) the denoiser is extrapolated linearly from this level and the last one. eta > 0 adds the noise of the
    stochastic form (SDE-DPM-Solver++), eta 0 is deterministic; the spread is that of the posterior either way.
    """
    last, width = None, 0.0
    for step, (s, t) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        d = denoiser(x, x.new_full((len(x),), s))
        if t == 0:
            x = d
        else:
            h = math.log(s / t)
            gain = -math.expm1(-(1 + eta) * h)
            ahead = d if last is None else d + (d - last) * (h / (2 * width))
            x = (t / s) * math.exp(-eta * h) * x + gain * ahead
            if eta > 0:
                x = x + t * math.sqrt(-math.expm1(-2 * eta * h)) * _normal(x, generators)
            last, width = d, h
        if callback is not None:
            callback(step, d)
    return x


def heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, churn: float = 0.0, generators: Sequence[Generator] = (),
         callback: Callback | None = None) -> Tensor:
    """Second-order sampling (Karras et al. 2022, algorithms 1 and 2): two evaluations a step but the last.

    ``churn`` > 0 raises the noise by up to sqrt(2) - 1 before each step (S_churn over the number of steps).
    """
    steps = len(sigmas) - 1
    for step, (s, t) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        if churn > 0:
            raised = s * (1 + min(churn / steps, 2**0.5 - 1))
            x = x + (raised**2 - s**2) ** 0.5 * _normal(x, generators)
            s = raised
        d = denoiser(x, x.new_full((len(x),), s))
        slope = (x - d) / s
        ahead = x + (t - s) * slope
        if t > 0:
            again = (ahead - denoiser(ahead, x.new_full((len(x),), t))) / t
            ahead = x + (t - s) * 0.5 * (slope + again)
        x = ahead
        if callback is not None:
            callback(step, d)
    return x
