"""Measurement noise: draws, whose generator is always named so that a measurement can be drawn again, and estimates from data."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
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
    sigma = sqrt(c + electronic^2) / c with the expected count c. What a scan knows of c are its own counts: their binomial mean over
    5 x 5 rays is taken, since a single starved ray's count says little (at 10 counts and 10 of electronic noise sigma from the ray
    itself is three times too large in the mean square). At the edge of dense metal the mean looks across it: sigma then reads low,
    and chi2 of the truth is 1.04 to 1.12 with a rod in the slice, 1.02 in a head. A starved ray is held at one count: it answers
    ln(photons), and where its neighbours are starved too sigma = sqrt(1 + electronic^2): nearly ignored rather than infinite.

    Args:
        line_integrals: p (*batch, views, detectors), dimensionless.
        photons: photons per ray before the object; broadcasts against p.
        electronic: standard deviation of the read-out noise in counts.

    Returns:
        (y, sigma), both shaped like p.

    Raises:
        ValueError: fewer than two axes, photons not positive, or a negative electronic noise.
    """
    if line_integrals.ndim < 2:
        raise ValueError(f"line integrals want axes (views, detectors), got shape {tuple(line_integrals.shape)}")
    photons = torch.as_tensor(photons, dtype=line_integrals.dtype, device=line_integrals.device)
    if not (photons > 0).all():
        raise ValueError(f"photons must be positive, got {photons}")
    if electronic < 0:
        raise ValueError(f"electronic noise must not be negative, got {electronic}")
    counts = torch.poisson(photons * torch.exp(-line_integrals), generator=generator)
    if electronic:
        counts = gaussian(counts, electronic, generator=generator)
    expected = _binomial(_binomial(counts).mT).mT.clamp(min=1.0)
    return torch.log(photons / counts.clamp(min=1.0)), torch.sqrt(expected + electronic**2) / expected


def _binomial(values: Tensor) -> Tensor:
    """Weighted mean (1 4 6 4 1) / 16 over the last axis; the ends are repeated."""
    rows = values.reshape(-1, 1, values.shape[-1])
    kernel = values.new_tensor([[[1.0, 4.0, 6.0, 4.0, 1.0]]]) / 16
    return F.conv1d(F.pad(rows, (2, 2), mode="replicate"), kernel).reshape(values.shape)


def estimate(y: Tensor, bins: int = 24) -> Tensor:
    """Standard deviation of every ray of sinograms whose noise is not known, from the data alone.

    var(p) = c + a exp(p) + b exp(2 p), all three >= 0: white noise, photon noise and electronic noise of a transmission scan
    (a = 1 / photons, b = electronic^2 / photons^2). Fourth differences along the detector remove what is smooth in an object's shadow
    (variance of white noise times 70); in ``bins`` groups of rays of like p their median absolute value, over 0.6745, ignores the few
    rays that graze an edge, and the three numbers are fitted to the groups. It reads high where there is little noise.

    Args:
        y: (*batch, views, detectors), five detectors or more.

    Returns:
        (*batch, views, detectors), never below 1e-6 of the sinogram's largest measurement.

    Raises:
        ValueError: fewer than five detectors.
    """
    if y.shape[-1] < 5:
        raise ValueError(f"the noise level wants five detectors or more, got {y.shape[-1]}")
    sigma = [_estimate_one(one, bins) for one in y.reshape(-1, *y.shape[-2:]).unbind(0)]
    return torch.stack(sigma).reshape(y.shape) if sigma else y.clone()


def _estimate_one(y: Tensor, bins: int) -> Tensor:
    smooth = _binomial(_binomial(y).mT).mT.double()
    d = (y[:, :-4] - 4 * y[:, 1:-3] + 6 * y[:, 2:-2] - 4 * y[:, 3:-1] + y[:, 4:]).double().flatten()
    p, order = smooth[:, 2:-2].flatten().sort()
    top = float(smooth.max())

    def terms(p: Tensor) -> Tensor:  # scaled by their values at the largest p, so that none overflows
        return torch.stack([torch.ones_like(p), (p - top).exp(), (2 * (p - top)).exp()], -1)

    levels, middles = [], []
    groups = min(bins, max(1, len(d) // 50))
    for values, where in zip(d[order].tensor_split(groups), p.tensor_split(groups), strict=True):
        levels.append((values.abs().median() / 0.6745) ** 2 / 70)
        middles.append(where.median())
    variance = torch.stack(levels).clamp(min=1e-24)
    rows = (terms(torch.stack(middles)) / variance[:, None]).cpu().numpy()  # relative errors: a bin's scatter grows with its level
    fitted, _ = nnls(rows, np.ones(len(rows)))
    sigma = (terms(smooth) @ torch.from_numpy(fitted).to(smooth)).sqrt()
    return sigma.clamp(min=max(1e-6 * float(y.abs().max()), 1e-12)).to(y.dtype)
