"""Photon counts of a transmission scan: drawn with their read-out noise and their ceiling, and as line integrals."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.noise import _binomial, gaussian


def draw(
    line_integrals: Tensor, photons: float, electronic: float = 0.0, ceiling: float | None = None, *, generator: torch.Generator
) -> Tensor:
    """min(Poisson(photons exp(-p)) + electronic n, ceiling): what a detector reads behind line integrals p (*batch, views, detectors).

    Args:
        line_integrals: p, dimensionless.
        photons: photons per ray before the object.
        electronic: standard deviation of the read-out noise in counts; with it counts are real and may be negative.
        ceiling: the most that the detector can tell, in counts; None for no limit.

    Raises:
        ValueError: photons or ceiling not positive, or a negative electronic noise.
    """
    if not photons > 0 or electronic < 0 or (ceiling is not None and not ceiling > 0):
        raise ValueError(f"counts want photons > 0, electronic >= 0 and ceiling > 0, got {photons}, {electronic} and {ceiling}")
    counts = torch.poisson(photons * torch.exp(-line_integrals), generator=generator)
    if electronic:
        counts = gaussian(counts, electronic, generator=generator)
    return counts if ceiling is None else counts.clamp(max=ceiling)


def line_integrals(counts: Tensor, photons: float, electronic: float = 0.0) -> tuple[Tensor, Tensor]:
    """(ln(photons / counts), its deviation to first order) of counts (*batch, views, detectors), as `noise.transmission` gives them.

    A starved ray is held at one count; the deviation looks at the neighbours' counts too. A saturated ray answers
    ln(photons / ceiling): its true line integral lies at or below that.
    """
    expected = _binomial(_binomial(counts).mT).mT.clamp(min=1.0)
    return torch.log(photons / counts.clamp(min=1.0)), torch.sqrt(expected + electronic**2) / expected
