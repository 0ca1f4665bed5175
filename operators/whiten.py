"""Noise of a multi-coil scan: its covariance, its level from the data alone, and its whitening.

Everything is per real component: noise n = a + ib with a, b of standard deviation sigma has E|n|^2 = 2 sigma^2, and a covariance here is
E[n n^H] / 2. K-space is (coil, ky, kx), zero where it was not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.coils import Calibration, calibrate, hankel

_OUTER = 0.1  # part of the samples that counts as periphery
_LARGEST, _COLUMNS = 6, 400  # largest side of the calibration matrix's windows, and about the most columns it may have
_FULL = 0.85  # above this part of the rank taken by signal, too little is left to see the noise in
_ROUNDS = 12
_SAME = 0.1  # of the power: by so much two parts of one noise may differ (a receiver's filter falls off towards the ends)
_LOUD = 4.0  # times its power: by so much the lines about k = 0 may exceed the noise, which is not taken from them
_SHARE = 1e-6  # of a coil's power that no other coil explains: with less it is a copy, and whitening would blow up rounding


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level and where it comes from.

    Attributes:
        sigma: standard deviation per real component, in the unit of k-space.
        how: 'noise scan', 'calibration' or 'periphery'.
        upper_bound: whether signal may be counted as noise: the truth is then at or below sigma, but for chance.
        cross_check: another estimate over this one; nan when there is none.
    """

    sigma: float
    how: str
    upper_bound: bool
    cross_check: float = math.nan


@dataclass(frozen=True)
class Edges:
    """What lies beside the object, see `edges`.

    Attributes:
        covariance: complex128 (C, C), per real component.
        samples: how many it was taken from.
        signal: whether there is more than noise, so that the covariance is none of the noise.
    """

    covariance: Tensor
    samples: int
    signal: bool


def covariance(noise: Tensor) -> Tensor:
    """Covariance (C, C) of noise readouts (C, n), per real component; at least as many samples as coils.

    Raises:
        ValueError: noise not complex (C, n), fewer samples than coils, or values that are not finite.
    """
    if noise.ndim != 2 or not noise.is_complex():
        raise ValueError(f"noise readouts are complex (coil, sample), got {noise.dtype} {tuple(noise.shape)}")
    if noise.shape[1] < noise.shape[0]:
        raise ValueError(f"the covariance of {noise.shape[0]} coils wants as many samples or more, got {noise.shape[1]}")
    if not torch.isfinite(torch.view_as_real(noise)).all():
        raise ValueError("the noise readouts hold values that are not finite")
    wide = noise.to(torch.complex128)
    return (wide @ wide.conj().T / (2 * noise.shape[1])).to(noise.dtype)


def whitener(cov: Tensor) -> Tensor:
    """L^-1, complex128 (C, C), of a covariance (C, C) L L^H: the mixture of the coils whose noise is independent, with unit sigma.

    Raises:
        ValueError: the covariance is not square, Hermitian and positive definite, or a coil is a copy of others.
    """
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"the noise covariance is (coil, coil), got {tuple(cov.shape)}")
    wide = cov.to(torch.complex128)
    factor, failed = torch.linalg.cholesky_ex((wide + wide.conj().T) / 2)
    skew = float((wide - wide.conj().T).abs().max()) > 1e-4 * float(wide.abs().max())
    if int(failed) or skew or bool((factor.diagonal().abs().square() < _SHARE * wide.diagonal().abs()).any()):
        raise ValueError("the noise covariance is not Hermitian and positive definite: a dead or doubled coil?")
    return torch.linalg.solve_triangular(factor, torch.eye(len(wide), dtype=wide.dtype, device=wide.device), upper=False)


def whiten(kspace: Tensor, cov: Tensor) -> Tensor:
    """L^-1 k with cov = L L^H: k-space whose noise is independent between coils, with unit sigma per real component.

    Coil maps belong to the whitened k-space: estimate them from it. Samples that were not measured stay exactly zero.

    Args:
        kspace: (C, ...) complex.
        cov: (C, C), see `covariance`.

    Raises:
        ValueError: the covariance is not (C, C), Hermitian and positive definite.
    """
    coils = len(kspace)
    if cov.shape != (coils, coils):
        raise ValueError(f"{coils} coils have a covariance ({coils}, {coils}), got {tuple(cov.shape)}")
    return torch.einsum("dc,c...->d...", whitener(cov.to(kspace.device)).to(kspace.dtype), kspace)


def edges(kspace: Tensor, mask: Tensor, axis: int, inside: int | None = None) -> Edges:
    """The noise in the ends of an oversampled readout's field of view, beside the object.

    The transform is orthonormal, so this noise has the covariance of k-space. Only lines sampled from end to end are used, and of
    them not the quarter about k = 0, where an object's side lobes and ghosts would be. What is left must be the same in the outer and
    the inner half of the ends, and on the near and the far half of the lines, in every combination of the coils: noise is, an object
    that reaches into the ends or is folded over is not. Chance alone moves the eigenvalues of one half's covariance, over that of
    both, to 1 +- 2 s with s^2 = coils / samples (the Jacobi ensemble's edges); a tenth beyond that is called signal. So is a quarter
    about k = 0 of four times the power in any combination: objects in the ends then add some 5 % to the rest (on phantoms).

    Args:
        kspace: (C, ky, kx) complex.
        mask: (ky, kx) boolean.
        axis: of the readout, 0 for ky and 1 for kx.
        inside: central samples of the readout's field of view that the object may fill; None for half of them. At most the outer
            quarters count.

    Raises:
        ValueError: shapes that do not fit, an axis other than 0 or 1, no line sampled from end to end, nothing beside ``inside``, or
            fewer samples than coils.
    """
    _fit(kspace, mask)
    if axis not in (0, 1):
        raise ValueError(f"the readout axis is 0 (ky) or 1 (kx), got {axis}")
    whole = torch.nonzero(mask.all(axis))[:, 0]
    if not len(whole):
        raise ValueError("no readout was sampled from end to end: the noise beside the object cannot be seen")
    order = whole[(whole - mask.shape[1 - axis] // 2).abs().argsort()]
    lines = kspace.movedim(axis + 1, -1)[:, order]
    n = lines.shape[-1]
    end = min(n // 4, (n - (n // 2 if inside is None else inside)) // 2)
    if end < 2:
        raise ValueError(f"the object may fill all but {2 * end} of {n} samples: nothing is left beside it to see the noise in")
    profile = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(lines, dim=-1), norm="ortho"), dim=-1)
    ends = torch.stack([profile[..., :end], profile[..., n - end :].flip(-1)], dim=1).to(torch.complex128)  # (C, 2, lines, outermost first)
    central = len(order) // 4
    noise, middle = ends[:, :, central:], ends[:, :, :central]
    found, samples = covariance(noise.flatten(1)), noise[0].numel()
    halves = [_ratios(half, found) - 1 for half in (noise[..., : end // 2], noise[:, :, : noise.shape[2] // 2]) if half.numel()]
    most = _SAME + 2 * math.sqrt(len(found) / samples)
    signal = any(float(off.abs().max()) > most or abs(float(off.mean())) > _SAME for off in halves)
    return Edges(found, samples, signal or (central > 0 and float(_ratios(middle, found).max()) > _LOUD))


def _ratios(part: Tensor, cov: Tensor) -> Tensor:
    """Eigenvalues of the covariance of a part (C, ...) over another; a coil without noise tells nothing, and has 1."""
    floor = torch.eye(len(cov), dtype=cov.dtype, device=cov.device) * (1e-6 * cov.diagonal().real.mean()).clamp(min=1e-100)
    wide = part.flatten(1)
    inverse = torch.linalg.inv(torch.linalg.cholesky(cov + floor))
    return torch.linalg.eigvalsh(inverse @ (wide @ wide.conj().T * (len(wide) / (2 * wide.numel())) + floor) @ inverse.conj().T)


def level_from_noise(noise: Tensor) -> NoiseLevel:
    """The level of noise readouts (C, n), mean power over the coils."""
    return NoiseLevel(_rms(noise), "noise scan", False)


def level_from_periphery(kspace: Tensor, mask: Tensor) -> NoiseLevel:
    """The level of the outermost tenth of the samples, by radius in units of half the axes: an upper bound, for signal lives there too.

    Raises:
        ValueError: shapes that do not fit, or an empty mask.
    """
    _fit(kspace, mask)
    ky, kx = ((torch.arange(n, dtype=torch.float64, device=mask.device) - n // 2) / (n / 2) for n in mask.shape)
    radius = torch.hypot(ky[:, None], kx)[mask]
    outer = radius >= radius.sort().values[int((1 - _OUTER) * len(radius))]
    return NoiseLevel(_rms(kspace[:, mask][:, outer]), "periphery", True)


def level(kspace: Tensor, mask: Tensor, calibration: Calibration = None) -> NoiseLevel:
    """The level from undersampled data alone, for noise that is white and the same in every coil.

    The windows of the calibration region are linearly dependent, more so with more coils: the small singular values of their matrix are
    noise. Windows overlap, so the law of Marchenko and Pastur does not hold for them; instead the same matrix of unit noise, projected
    off the signal's singular vectors, says what median to expect. What counts as signal, above the largest singular value of pure
    noise at the estimated level, is iterated to a fixed point. Cross-checked by the periphery, which should read 1 or more.

    Where signal fills the matrix (one coil, a small centre) the periphery answers instead, as an upper bound.

    Raises:
        ValueError: shapes that do not fit, a mask that is empty, or see `coils.low_resolution`.
    """
    outer = level_from_periphery(kspace, mask)
    data = calibrate(kspace, calibration).to(torch.complex128)
    kernel = max(2, min(_LARGEST, (min(data.shape[1:]) + 1) // 3, int(math.sqrt(_COLUMNS / len(data)))))
    if min(data.shape[1:]) < kernel:
        return outer
    unit = torch.randn(data.shape, dtype=data.dtype, generator=torch.Generator().manual_seed(0)) * math.sqrt(2)
    noise = hankel(unit.to(data.device), kernel)
    u, s, vh = torch.linalg.svd(hankel(data, kernel), full_matrices=False)
    largest, size = float(torch.linalg.svdvals(noise)[0]), len(s)
    kept, sigma = size // 2, 0.0
    for _ in range(_ROUNDS):
        rest = noise - u[:, :kept] @ (u[:, :kept].conj().T @ noise)
        rest = rest - (rest @ vh[:kept].conj().T) @ vh[:kept]
        sigma = float(s[kept:].median() / torch.linalg.svdvals(rest)[: size - kept].median())
        signal = int((s > sigma * largest).sum())
        if signal == kept:
            break
        kept = min(signal, int(0.9 * size))
    if kept > _FULL * size or not sigma > 0 or sigma > 1.1 * outer.sigma:  # no estimate lies above an upper bound
        return outer
    return NoiseLevel(sigma, "calibration", False, outer.sigma / sigma)


def _fit(kspace: Tensor, mask: Tensor) -> None:
    if kspace.ndim != 3 or not kspace.is_complex():
        raise ValueError(f"k-space is complex (coil, ky, kx), got {kspace.dtype} {tuple(kspace.shape)}")
    if mask.dtype != torch.bool or mask.shape != kspace.shape[1:]:
        raise ValueError(f"the mask of this k-space is boolean {tuple(kspace.shape[1:])}, got {mask.dtype} {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError("the mask is empty: nothing was measured")


def _rms(noise: Tensor) -> float:
    return float(torch.view_as_real(noise).double().pow(2).mean().sqrt())
