"""Samplers of other libraries on our prior and our operator, where these libraries are installed: deepinv's DPS and DiffPIR.

deepinv speaks of images v in [0, 1], of noise in v, and of measurements with one deviation by an operator of norm 1. With
v = (u - low) / width, data whitened and divided by the norm of A width / s, the scan is the same one:

    (y - A low) / (s norm) = (A width / (s norm)) v + n / norm.

Its samplers carry 2 v - 1, so that their noise level t stands for sigma = t width / 2 in u.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deft_med.errors import UsageError
from deft_med.guidance import Method, sharpness
from deft_med.likelihood import Gaussian
from deft_med.schedule import SIGMA_MAX, SIGMA_MIN, Denoiser, per_item

LOW, WIDTH = {1: -1.0, 2: -2.0}, 4.0  # by channels: CT from air to 3000 HU, MR's real and imaginary parts to twice its brightness


@functools.cache
def _deepinv() -> Any:
    """The library; UsageError where it is not installed.

    It wants torchvision, whose compiled part does not load beside a torch of another build. What is missing then are operators that
    nothing here calls: their names are enough for the import.
    """
    try:
        with contextlib.suppress(RuntimeError):
            return _imported()
        missing = torch.library.Library("torchvision", "DEF")
        for name in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
            missing.define(name)
        _KEPT.append(missing)
        return _imported()
    except ImportError as error:
        raise UsageError(f"deepinv is not installed with all that it needs ({error}): type "
                         "pip install -c requirements.lock deepinv==0.5.0, or leave out the methods deepinv-*") from error


_KEPT: list = []  # a definition lives as long as its library


def _imported() -> Any:
    import deepinv

    return deepinv


class InUnitRange(nn.Module):
    """Our denoiser as deepinv calls it: v (B, C, ny, nx) and its noise, a number or (B,) -> E[v0 | v].

    Levels that the prior was not trained for: above them the image is scaled to the highest one, where it is noise all the same;
    below them the lowest one is taken.
    """

    def __init__(self, denoiser: Denoiser, low: float, *, width: float = WIDTH, sigma_min: float = SIGMA_MIN,
                 sigma_max: float = SIGMA_MAX) -> None:
        super().__init__()
        self.denoiser, self.low, self.width, self.levels = denoiser, low, width, (sigma_min, sigma_max)

    def forward(self, v: Tensor, sigma: float | Tensor) -> Tensor:
        level = torch.as_tensor(sigma).to(v).reshape(-1).expand(len(v)) * self.width
        known = level.clamp(*self.levels)
        u = (v * self.width + self.low) * per_item((known / level).clamp(max=1), v)
        return (self.denoiser(u, known) - self.low) / self.width


class InUnitNorm:
    """Our measurements as deepinv has them: real y (1, M...), an operator of norm 1 on v, noise of deviation ``sigma``."""

    def __init__(self, likelihood: Gaussian, low: float, *, width: float = WIDTH) -> None:
        self.forward, self.complex = likelihood.forward, likelihood.y.is_complex()
        self.sigma = 1 / (width * float(sharpness(likelihood).sqrt()))
        self.weight = width * self.sigma / likelihood.sigma  # 0 where nothing was measured
        blank = likelihood.y.new_full((1, *likelihood.shape), low, dtype=likelihood.y.real.dtype)
        left = torch.where(self.weight > 0, likelihood.y - self.forward(blank), 0)
        self.y = self._real(left * self.weight / width)

    def _real(self, y: Tensor) -> Tensor:
        return torch.view_as_real(y) if self.complex else y

    def __call__(self, v: Tensor) -> Tensor:
        return self._real(self.forward.linear(v) * self.weight.to(v.dtype))

    def adjoint(self, y: Tensor) -> Tensor:
        y = torch.view_as_complex(y.contiguous()) if self.complex else y
        return self.forward.adjoint(y * self.weight.to(y.real.dtype))

    def physics(self, device: torch.device) -> Any:
        """deepinv's own object of the same operator."""
        physics = _deepinv().physics
        return physics.LinearPhysics(A=self, A_adjoint=self.adjoint, noise_model=physics.GaussianNoise(self.sigma), device=device)


def _dps(denoiser: InUnitRange, data: InUnitNorm, shape: tuple[int, ...], generator: Generator, *, steps: int, weight: float) -> Tensor:
    """deepinv.sampling.DPS: ancestral VP steps against the score of the prior less weight grad_v |y - A D(v)|, by backpropagation."""
    sampler = _deepinv().sampling.DPS(denoiser, num_steps=steps + 1, weight=weight, device=generator.device, rng=generator)
    return sampler(data.y, data.physics(generator.device), x_init=shape)


def _diffpir(denoiser: InUnitRange, data: InUnitNorm, shape: tuple[int, ...], generator: Generator, *, steps: int, weight: float,
             zeta: float) -> Tensor:
    """deepinv.sampling.DiffPIR: a proximal step from D at every level, then back to the next one; ``weight`` is its lambda_."""
    library = _deepinv()
    sampler = library.sampling.DiffPIR(denoiser, library.optim.data_fidelity.L2(), sigma=data.sigma, max_iter=steps, zeta=zeta,
                                       lambda_=weight, device=generator.device)
    with torch.random.fork_rng([generator.device] if generator.device.type == "cuda" else []):  # it draws from the global generator
        torch.manual_seed(generator.initial_seed())
        return sampler(data.y, data.physics(generator.device), x_init=torch.zeros(shape, device=generator.device))


PEERS: dict[str, Method] = {
    "deepinv-dps": Method(_dps, {"weight": 1000.0}, steps=1000, through_prior=True, linear=True),
    "deepinv-diffpir": Method(_diffpir, {"weight": 7.0, "zeta": 0.1}, linear=True),
}
"""Name -> how it is run; its default settings are the library's own but for the weight of DPS, which has no default that is of use."""


def sample_with(name: str, denoiser: Denoiser, likelihood: Gaussian, *, generators: Sequence[Generator], steps: int | None = None,
                **settings: float) -> Tensor:
    """Images (K, C, ny, nx) in u by one of `PEERS`, one per generator, for a likelihood of one item.

    Raises ValueError for an unknown method or setting and for another likelihood, UsageError where deepinv is not installed.
    """
    if name not in PEERS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(PEERS)}")
    method = PEERS[name]
    if not isinstance(likelihood, Gaussian):
        raise ValueError(f"{name} asks for a linear forward model with Gaussian noise, got {type(likelihood).__name__}")
    if unknown := settings.keys() - method.settings.keys():
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}: choose from {', '.join(method.settings)}")
    low, device = LOW[likelihood.shape[0]], likelihood.y.device
    data, inner = InUnitNorm(likelihood, low), InUnitRange(lambda x, sigma: likelihood.within(denoiser(x, sigma)), low)
    items = [method.make(inner, data, (1, *likelihood.shape), Generator(device).manual_seed(g.initial_seed()),
                         steps=method.steps if steps is None else steps, **{**method.settings, **settings}) for g in generators]
    return likelihood.within(torch.cat(items).to(likelihood.y.real.dtype) * WIDTH + low)
