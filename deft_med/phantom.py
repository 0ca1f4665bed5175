"""An analytic MR phantom: ellipses seen by receive coils, with k-space from the closed form, so that no grid made it."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import j1

from operators.patterns import equispaced

# centre (x, y), half axes, angle in rad, value: a head in a field of view of [-1, 1]
HEAD = (
    (0.0, 0.0, 0.74, 0.92, 0.0, 1.0), (0.0, 0.01, 0.67, 0.85, 0.0, -0.55), (-0.22, -0.05, 0.10, 0.32, 0.30, -0.25),
    (0.22, -0.05, 0.10, 0.32, -0.30, -0.25), (0.0, -0.45, 0.16, 0.12, 0.0, 0.18), (-0.38, 0.42, 0.09, 0.07, 0.5, 0.22),
    (0.36, 0.45, 0.05, 0.12, -0.4, 0.15), (0.03, 0.62, 0.025, 0.025, 0.0, 0.3), (-0.06, 0.62, 0.015, 0.015, 0.0, 0.3),
    (0.12, 0.62, 0.02, 0.035, 0.0, 0.3), (0.0, 0.25, 0.30, 0.05, 0.2, 0.12))  # fmt: skip
WAVES = 2  # coil profiles hold spatial frequencies up to this many half cycles over the field of view


def mr_phantom(shape: tuple[int, int] = (256, 192), coils: int = 8, acceleration: float = 3.0, noise: float = 0.012,
               seed: int = 0) -> NDArray[np.complex64]:
    """k-space (coils, ny, nx) of the head phantom, equispaced columns and a full centre measured, the rest exactly 0.

    A coil's profile is a short sum of plane waves, so the k-space of coil times ellipse is a sum of shifted Airy patterns,
    a b J1(|q|) / |q| with q the wave vector scaled by the half axes (Koay, Sarlls and Ozarslan, Magn. Reson. Med. 58(2), 2007).
    ``noise``: deviation per real component.
    """
    ny, nx = shape
    ky = (np.arange(ny) - ny // 2) * math.pi  # cycles over [-1, 1], as rad per unit
    kx = (np.arange(nx) - nx // 2) * math.pi
    half = np.arange(-WAVES, WAVES + 1) * math.pi / 2
    weights = _profiles(coils, half)
    y = np.zeros((coils, ny, nx), np.complex128)
    for v, qy in enumerate(half):
        for h, qx in enumerate(half):
            pattern = _ellipses(ky[:, None] - qy, kx[None] - qx)
            y += weights[:, v, h, None, None] * pattern
    # pixel (ny // 2, nx // 2) is the origin; sum over pixels / sqrt(ny nx) = integral over [-1, 1]^2 * sqrt(ny nx) / 4
    y *= math.sqrt(ny * nx) / 4
    generator = torch.Generator().manual_seed(seed)
    mask = equispaced(shape, acceleration, centre_lines=24, generator=generator).mask
    random = np.random.default_rng(seed)
    y += noise * (random.standard_normal(y.shape) + 1j * random.standard_normal(y.shape))
    return (y * mask).astype(np.complex64)


def _ellipses(ky: NDArray, kx: NDArray) -> NDArray:
    total = np.zeros(np.broadcast_shapes(ky.shape, kx.shape), np.complex128)
    for x0, y0, a, b, angle, value in HEAD:
        cos, sin = math.cos(angle), math.sin(angle)
        q = np.hypot(a * (cos * kx + sin * ky), b * (-sin * kx + cos * ky))
        airy = np.where(q > 1e-9, j1(q) / np.maximum(q, 1e-9), 0.5)
        total += value * 2 * math.pi * a * b * airy * np.exp(-1j * (kx * x0 + ky * y0))
    return total


def _profiles(coils: int, half: NDArray) -> NDArray:
    """Weights (coils, 2 W + 1, 2 W + 1) of the plane waves that fit a ring of smooth coils over the head."""
    axis = np.linspace(-1, 1, 40)
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    inside = (x / 0.8) ** 2 + (y / 0.95) ** 2 < 1
    y, x = y[inside], x[inside]
    waves = np.exp(1j * (half[:, None, None] * y + half[None, :, None] * x)).reshape(-1, len(y)).T
    fits = []
    for coil in range(coils):
        angle = 2 * math.pi * coil / coils
        profile = np.exp(-((x - 1.1 * math.cos(angle)) ** 2 + (y - 1.1 * math.sin(angle)) ** 2) / 1.2 + 1j * (angle + 0.5 * x - 0.3 * y))
        fits.append(np.linalg.lstsq(np.vstack([waves, 1e-2 * np.eye(waves.shape[1])]),
                                    np.concatenate([profile, np.zeros(waves.shape[1])]), rcond=None)[0])
    return np.stack(fits).reshape(coils, len(half), len(half))
