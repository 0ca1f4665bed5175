"""Draws of measurement noise; the generator is always named, so that a measurement can be drawn again."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(y: Tensor, sigma: float | Tensor, *, generator: torch.Generator) -> Tensor:
    """y + sigma n with n standard normal (per real component when y is complex); sigma broadcasts against y, in y's unit.

    Raises:
        ValueError: a negative sigma.
    """
    if (torch.as_tensor(sigma) < 0).any():
        raise ValueError(f"sigma must not be negative, got {sigma}")
    if y.is_complex():
        noise = torch.view_as_complex(torch.randn((*y.shape, 2), dtype=y.real.dtype, device=y.device, generator=generator))
    else:
        noise = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
    return y + sigma * noise


def transmission(
    line_integrals: Tensor, photons: float | Tensor, electronic: float = 0.0, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Line integrals as a photon-counting scan measures them, and the standard deviation of each.

    counts = Poisson(photons exp(-p)) + electronic n, then y = ln(photons / counts) and, to first order,
    sigma = sqrt(counts + electronic^2) / counts. A starved ray is held at one count: it answers ln(photons) with
    sigma = sqrt(1 + electronic^2), so that it is nearly ignored rather than infinite.

    Args:
        line_integrals: p, dimensionless, any shape.
        photons: photons per ray before the object; broadcasts against p.
        electronic: standard deviation of the read-out noise in counts.

    Returns:
        (y, sigma), both shaped like p.

    Raises:
        ValueError: photons not positive, or a negative electronic noise.
    """
    photons = torch.as_tensor(photons, dtype=line_integrals.dtype, device=line_integrals.device)
    if not (photons > 0).all():
        raise ValueError(f"photons must be positive, got {photons}")
    if electronic < 0:
        raise ValueError(f"electronic noise must not be negative, got {electronic}")
    counts = torch.poisson(photons * torch.exp(-line_integrals), generator=generator)
    if electronic:
        counts = gaussian(counts, electronic, generator=generator)
    counts = counts.clamp(min=1.0)
    return torch.log(photons / counts), torch.sqrt(counts + electronic**2) / counts
