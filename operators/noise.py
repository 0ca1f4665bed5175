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


def estimate(y: Tensor) -> Tensor:
    """Standard deviation of white noise in sinograms whose noise is not known, one number per sinogram, from the data alone.

    Fourth differences along the detector remove what is smooth in an object's shadow (variance of white noise times 70); their
    median absolute value, over 0.6745, ignores the few rays that graze an edge. It reads a little high where there is little noise.

    Args:
        y: (*batch, views, detectors), five detectors or more.

    Returns:
        (*batch, views, detectors), the same number for every ray of a sinogram, never below 1e-6 of the largest measurement.

    Raises:
        ValueError: fewer than five detectors.
    """
    if y.shape[-1] < 5:
        raise ValueError(f"the noise level wants five detectors or more, got {y.shape[-1]}")
    d = y[..., :-4] - 4 * y[..., 1:-3] + 6 * y[..., 2:-2] - 4 * y[..., 3:-1] + y[..., 4:]
    level = d.abs().flatten(-2).median(-1).values / (0.6745 * 70**0.5)
    floor = 1e-6 * y.abs().flatten(-2).amax(-1)
    return torch.maximum(level, floor.clamp(min=1e-12))[..., None, None].expand_as(y)
