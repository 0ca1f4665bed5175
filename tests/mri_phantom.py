"""A head of ellipses seen by a ring of coils, and its operator: enough MRI to test what comes before and after the operators."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import j1

from operators.linear import LinearOperator
from operators.noise import gaussian

# value, half axes, centre (y, x), all in half fields of view
ELLIPSES = [
    (1.0, 0.82, 0.66, 0.0, 0.0),
    (-0.35, 0.76, 0.60, 0.0, 0.0),
    (0.25, 0.30, 0.14, -0.05, 0.22),
    (0.25, 0.30, 0.14, -0.05, -0.22),
    (-0.2, 0.10, 0.35, 0.45, 0.0),
    (0.3, 0.06, 0.06, -0.45, 0.1),
    (0.3, 0.04, 0.04, -0.45, -0.12),
    (-0.3, 0.03, 0.05, 0.2, 0.25),
]


def plane(shape):
    return torch.meshgrid(*((torch.arange(n, dtype=torch.float64) - n // 2) / (n / 2) for n in shape), indexing="ij")


def head(shape):
    """A complex image with smooth phase, largest magnitude about 1."""
    y, x = plane(shape)
    image = torch.zeros(shape, dtype=torch.float64)
    for value, a, b, cy, cx in ELLIPSES:
        image += value * (((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1)
    return image * torch.exp(1j * (0.6 * y - 0.4 * x + 0.8 * x * y))


def ring(coils, shape):
    """Smooth coil maps (coils, ny, nx), unit sum of squares, the first virtual coil without zeros."""
    y, x = plane(shape)
    maps = []
    for c in range(coils):
        a = 2 * math.pi * c / coils
        dy, dx = y - 1.4 * math.sin(a), x - 1.4 * math.cos(a)
        maps.append(torch.exp(1j * (0.5 * a + 0.7 * torch.atan2(dy, dx).cos())) / (dy**2 + dx**2 + 0.3))
    stack = torch.stack(maps)
    return stack / stack.abs().pow(2).sum(0).sqrt()


def fourier(x):
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


def inverse(k):
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(k, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


def scan(shape, mask, coils=8, sigma=0.0, seed=0):
    """K-space (coils, ky, kx) of the head as continuous edges give it: made on a grid three times as fine, then cropped."""
    fine = (3 * shape[0], 3 * shape[1])
    whole = fourier(head(fine) * ring(coils, fine)) / 3
    rows, columns = (slice(f // 2 - n // 2, f // 2 - n // 2 + n) for f, n in zip(fine, shape))
    k = gaussian(whole[:, rows, columns], sigma, generator=torch.Generator().manual_seed(seed))
    return (k * mask).to(torch.complex64)


def scattered(shape, centre=24, density=0.45, seed=0):
    """A boolean mask like the real scan's: random points, sparser outwards, within the ellipse, and a full square centre."""
    y, x = plane(shape)
    radius = torch.hypot(y, x).numpy()
    chance = np.minimum(1.0, density * (0.13 / np.maximum(radius, 0.05)) ** 0.95) * (radius < 1)
    mask = torch.from_numpy(np.random.default_rng(seed).random(shape) < chance)
    rows, columns = (slice(n // 2 - centre // 2, n // 2 - centre // 2 + centre) for n in shape)
    mask[rows, columns] = True
    return mask


def equispaced(shape, step=4, centre=24):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, shape[1] // 2 % step :: step] = True
    mask[:, shape[1] // 2 - centre // 2 : shape[1] // 2 - centre // 2 + centre] = True
    return mask


class Sense(LinearOperator):
    """mask F (maps x): (ny, nx) to (coils, ny, nx)."""

    def __init__(self, maps, mask):
        super().__init__(maps.shape[1:], maps.shape, torch.complex64, torch.complex64)
        self.register_buffer("maps", maps)
        self.register_buffer("mask", mask)

    def _forward(self, x):
        return fourier(self.maps.to(x.dtype) * x[..., None, :, :]) * self.mask

    def _adjoint(self, y):
        return (self.maps.conj().to(y.dtype) * inverse(y * self.mask)).sum(-3)


# ------------------------------------------------------------------------------------------- closed forms, which no grid made
# value, half axes, centre (y, x), in half fields of view: no flip and no turn leaves it as it is
LOPSIDED = [(1.0, 0.80, 0.62, 0.02, 0.0), (-0.5, 0.70, 0.52, 0.02, 0.0), (0.5, 0.16, 0.20, -0.45, 0.12), (0.35, 0.24, 0.10, 0.22, -0.28)]
WAVE = math.pi / 2  # a coil's profile turns by it from the centre to the edge


def _waves(coils):
    """A coil's profile is 1 + 0.6 exp(i w . r): the wave vectors w (coils, 2) as (y, x)."""
    angles = 2 * math.pi * np.arange(coils) / coils
    return WAVE * np.stack([np.sin(angles), np.cos(angles)], 1)


def closed_form(points, shape, coils=4):
    """K-space (coils, samples), complex64, of the lopsided phantom at points (samples, 2), (ky, kx) in rad/pixel of an image of ``shape``.

    An ellipse's transform is 2 pi a b J1(q) / q, q the wave vector times the half axes; a profile's waves move it in k-space.
    """
    k = np.asarray(points, np.float64) * np.array(shape) / 2  # rad for half a field of view

    def transform(k):
        total = np.zeros(len(k), np.complex128)
        for value, a, b, cy, cx in LOPSIDED:
            q = np.hypot(a * k[:, 0], b * k[:, 1])
            airy = np.where(q > 1e-9, j1(q) / np.maximum(q, 1e-9), 0.5)
            total += value * 2 * math.pi * a * b * airy * np.exp(-1j * (k @ (cy, cx)))
        return total

    # sum over pixels / sqrt(ny nx) = integral over the field of view * sqrt(ny nx) / 4
    y = np.stack([transform(k) + 0.6 * transform(k - wave) for wave in _waves(coils)])
    return (y * math.sqrt(math.prod(shape)) / 4).astype(np.complex64)


def grid_points(shape):
    """(ny nx, 2): the points of the Cartesian k-space of ``shape``, row after row, as (ky, kx) in rad/pixel."""
    axes = [2 * math.pi * (np.arange(n) - n // 2) / n for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def picture(shape, coils=4, fine=8):
    """What the coils see of the lopsided phantom, root of the sum of squares: (ny, nx), area means of ``fine`` points along each axis."""
    axes = [((np.arange(n * fine) + 0.5) / fine - 0.5 - n // 2) / (n / 2) for n in shape]
    y, x = np.meshgrid(*axes, indexing="ij")
    image = sum(value * (((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1) for value, a, b, cy, cx in LOPSIDED)
    seen = sum(np.abs(1 + 0.6 * np.exp(1j * (v * y + u * x))) ** 2 for v, u in _waves(coils))
    return (image * np.sqrt(seen)).reshape(shape[0], fine, shape[1], fine).mean((1, 3))
