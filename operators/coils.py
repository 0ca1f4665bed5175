"""Coil maps from the fully sampled centre of k-space, and coil compression.

K-space is (coil, ky, kx), zero where it was not measured, its centre at n // 2. Maps have unit sum of squares over the coils inside the
support of the object and are zero outside.

The common phase of the maps at a pixel is free. Here the first virtual coil, the combination of coils that holds most of the
calibration data's energy, is made real and positive at every pixel: the image then carries that coil's phase, and both are smooth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Region = tuple[slice, slice]
Calibration = Region | tuple[int, int] | int | None  # slices, the size of a centred rectangle, or found from the samples

LARGEST = 32  # samples per axis that the default calibration takes: beyond, there is more noise than knowledge of the coils
_CHUNK = 2**24  # entries of the pixels' matrices that are held at once


def calibration_region(mask: Tensor) -> Region:
    """The largest fully sampled rectangle centred at n // 2, as slices of (ky, kx); among equals, the squarest.

    Raises:
        ValueError: a mask without two axes, or whose centre was not sampled.
    """
    if mask.ndim != 2:
        raise ValueError(f"a sampling mask is (ky, kx), got {tuple(mask.shape)}")
    ny, nx = mask.shape
    sums = torch.zeros(ny + 1, nx + 1, dtype=torch.long, device=mask.device)
    sums[1:, 1:] = (mask != 0).long().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, n + 1, device=mask.device) for n in (ny, nx))
    top, left = (ny // 2 - rows // 2)[:, None], nx // 2 - columns // 2
    bottom, right = top + rows[:, None], left + columns
    area = rows[:, None] * columns
    full = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] == area
    if not full.any():
        raise ValueError("the centre of k-space was not sampled: there is nothing to calibrate with")
    square = torch.minimum(rows[:, None], columns).expand(ny, nx)
    best = int(torch.where(full, area * (max(ny, nx) + 1) + square, -1).argmax())
    height, width = best // nx + 1, best % nx + 1
    return _centred((ny, nx), (height, width))


def espirit(
    kspace: Tensor,
    calibration: Calibration = None,
    *,
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.95,
    sigma: float = 0.0,
) -> Tensor:
    """Coil maps by ESPIRiT: the vectors over the coils that the calibration data's own shift relations leave unchanged.

    Uecker et al., Magnetic Resonance in Medicine 71(3), 2014.

    Args:
        kspace: (C, ky, kx) complex.
        calibration: slices of (ky, kx), the size of a centred rectangle, or None: the fully sampled centre, at most 32 per axis.
        kernel: side of the square kernels, in samples.
        threshold: singular values of the calibration matrix below this part of the largest are taken as empty.
        crop: pixels whose eigenvalue is not above it lie outside the object; 0 keeps them all.
        sigma: noise per real component, if known; singular values that it explains are taken as empty too.

    Returns:
        (C, ny, nx) like kspace: unit sum of squares inside the object, zero outside.

    Raises:
        ValueError: see `eigenmaps`; a crop that is not in [0, 1).
    """
    if not 0 <= crop < 1:
        raise ValueError(f"crop must lie in [0, 1), got {crop}")
    maps, value = eigenmaps(kspace, calibration, kernel=kernel, threshold=threshold, sigma=sigma)
    return maps * (value > crop)


def eigenmaps(
    kspace: Tensor,
    calibration: Calibration = None,
    *,
    kernel: int = 6,
    threshold: float = 0.02,
    sigma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """ESPIRiT's first eigenvector and eigenvalue at every pixel, nothing cropped.

    A window of k-space, w(c, u) = k_c(q + u), is a sum over pixels of multiples of s_c(r) exp(-2 pi i u r / n). With P the projection
    on the space of all windows, s(r) is the eigenvector with eigenvalue 1 of the C x C matrix
    (1 / kernel^2) sum_uu' exp(2 pi i (u - u') r / n) P_uu', of which only the sums over equal u - u' are needed.

    Returns:
        maps (C, ny, nx) of unit sum of squares, and eigenvalues (ny, nx) in [0, 1], near 1 inside the object.

    Raises:
        ValueError: k-space not complex (C, ky, kx) or all zero there, a calibration region with unmeasured samples, outside of
            k-space or smaller than the kernel allows, or a threshold outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    data = calibrate(kspace, calibration)
    coils, ny, nx = kspace.shape
    if kernel < 1 or min(data.shape[1:]) < kernel + 1:
        raise ValueError(f"a kernel of {kernel} wants {kernel + 1} calibration samples per axis or more, got {tuple(data.shape[1:])}")
    windows = hankel(data.to(torch.complex128), kernel)
    power, basis = torch.linalg.eigh(windows.T @ windows.conj())
    noise = math.sqrt(2) * sigma * (math.sqrt(windows.shape[0]) + math.sqrt(windows.shape[1]))
    basis = basis[:, power > max(threshold * math.sqrt(float(power[-1])), noise) ** 2]
    if not basis.shape[1]:
        raise ValueError(f"the calibration data are not above the noise of {sigma:g}")

    lags = _lags((basis @ basis.conj().T).reshape(coils, kernel**2, coils, kernel**2), kernel).to(kspace.dtype)
    wave_y, wave_x = (_waves(n, kernel, lags) for n in (ny, nx))
    across = torch.einsum("cdij,xj->cdix", lags, wave_x)
    maps, value = torch.empty_like(kspace), kspace.real.new_empty(ny, nx)
    step = max(1, _CHUNK // (nx * coils**2))
    for row in range(0, ny, step):
        rows = slice(row, row + step)
        values, vectors = torch.linalg.eigh(torch.einsum("yi,cdix->yxcd", wave_y[rows], across) / kernel**2)
        maps[:, rows], value[rows] = vectors[..., -1].movedim(-1, 0), values[..., -1]
    return _turned(maps, data), value.clamp(0, 1)


def low_resolution(kspace: Tensor, calibration: Calibration = None, *, crop: float = 0.05) -> Tensor:
    """Coil maps as the coils' low-resolution images over their root sum of squares: needs nothing, knows nothing of edges.

    The calibration samples are tapered by a raised cosine, so that the images do not ring.

    Args:
        kspace, calibration: see `espirit`.
        crop: the object is where the root sum of squares is above this part of its 99th percentile.

    Returns:
        (C, ny, nx) like kspace: unit sum of squares inside the object, zero outside.

    Raises:
        ValueError: k-space not complex (C, ky, kx) or all zero there, or a calibration region with unmeasured samples or outside it.
    """
    region = _region(kspace, calibration)
    data = kspace[:, *region]
    tapers = [torch.hann_window(n + 2, periodic=False, dtype=data.real.dtype, device=data.device)[1:-1] for n in data.shape[1:]]
    centre = torch.zeros_like(kspace)
    centre[:, *region] = data * tapers[0][:, None] * tapers[1]
    images = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(centre, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))
    rss = images.abs().pow(2).sum(0).sqrt()
    flat = rss.flatten()
    bright = flat.kthvalue(max(1, round(0.99 * flat.numel()))).values
    return _turned(images / rss.clamp(min=1e-30), data) * (rss > crop * bright)


def compress(kspace: Tensor, coils: int, calibration: Calibration = None) -> tuple[Tensor, Tensor]:
    """The `coils` virtual coils that hold most of the calibration data's energy, strongest first.

    The rows of the matrix are orthonormal: white noise stays white and keeps its level. Noise that is not white is whitened first
    (`whiten.whiten`), so that energy counts in units of the noise and a loud coil does not pass for a strong one.

    Huang et al., Magnetic Resonance Imaging 26(1), 2008.

    Returns:
        virtual k-space (coils, ky, kx), zero where kspace is, and the matrix (coils, C) that maps coils to virtual coils.

    Raises:
        ValueError: `coils` outside 1..C, or see `low_resolution`.
    """
    data = calibrate(kspace, calibration)
    if not 1 <= coils <= len(kspace):
        raise ValueError(f"{len(kspace)} coils can be compressed to 1 to {len(kspace)}, not to {coils}")
    matrix = _virtual(data).conj().T[:coils].to(kspace.dtype)
    return torch.einsum("vc,cyx->vyx", matrix, kspace), matrix


def calibrate(kspace: Tensor, calibration: Calibration = None) -> Tensor:
    """The calibration samples (C, rows, columns) of k-space, see `espirit`.

    Raises:
        ValueError: k-space not complex (C, ky, kx), or a calibration region with unmeasured samples or outside of it.
    """
    return kspace[:, *_region(kspace, calibration)]


def hankel(data: Tensor, kernel: int) -> Tensor:
    """Every kernel x kernel window of (C, ky, kx) as a row: (windows, C kernel^2)."""
    windows = data.unfold(1, kernel, 1).unfold(2, kernel, 1)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, len(data) * kernel**2)


def _region(kspace: Tensor, calibration: Calibration) -> Region:
    if kspace.ndim != 3 or not kspace.is_complex():
        raise ValueError(f"k-space is complex (coil, ky, kx), got {kspace.dtype} {tuple(kspace.shape)}")
    shape = (kspace.shape[1], kspace.shape[2])
    mask = (kspace != 0).any(0)
    if calibration is None:
        found = calibration_region(mask)
        return _centred(shape, tuple(min(s.stop - s.start, LARGEST) for s in found))
    pair = (calibration, calibration) if isinstance(calibration, int) else calibration
    region = pair if isinstance(pair[0], slice) else _centred(shape, pair)
    rows, columns = (range(*s.indices(n)) for s, n in zip(region, shape, strict=True))
    if not (len(rows) and len(columns)) or any(s.start < 0 or s.stop > n for s, n in zip(region, shape, strict=True)):
        raise ValueError(f"the calibration region {region} does not lie in k-space of {shape}")
    if not mask[region].all():
        raise ValueError(f"the calibration region {region} has {int((~mask[region]).sum())} samples that were not measured")
    return region


def _centred(shape: tuple[int, int], size: tuple[int, ...]) -> Region:
    starts = [n // 2 - int(s) // 2 for n, s in zip(shape, size, strict=True)]
    return slice(starts[0], starts[0] + int(size[0])), slice(starts[1], starts[1] + int(size[1]))


def _lags(projection: Tensor, kernel: int) -> Tensor:
    """Sums of (C, u, C, u') over equal differences u - u': (C, C, 2 kernel - 1, 2 kernel - 1)."""
    coils, side = len(projection), 2 * kernel - 1
    offset = torch.arange(kernel, device=projection.device)
    y, x = (o.flatten() for o in torch.meshgrid(offset, offset, indexing="ij"))
    index = (y[:, None] - y + kernel - 1) * side + x[:, None] - x + kernel - 1
    pairs = projection.permute(0, 2, 1, 3).reshape(coils**2, -1)
    return pairs.new_zeros(coils**2, side**2).index_add_(1, index.flatten(), pairs).reshape(coils, coils, side, side)


def _waves(n: int, kernel: int, like: Tensor) -> Tensor:
    pixel = torch.arange(n, dtype=torch.float64, device=like.device) - n // 2
    lag = torch.arange(1 - kernel, kernel, dtype=torch.float64, device=like.device)
    return torch.exp(2j * math.pi / n * pixel[:, None] * lag).to(like.dtype)


def _virtual(data: Tensor) -> Tensor:
    """Principal directions over the coils (C, C), strongest first, in columns."""
    flat = data.flatten(1).to(torch.complex128)
    return torch.linalg.eigh(flat @ flat.conj().T)[1].flip(-1)


def _turned(maps: Tensor, data: Tensor) -> Tensor:
    """The maps, with the phase of the first virtual coil taken out."""
    virtual = torch.einsum("c,cyx->yx", _virtual(data)[:, 0].conj().to(maps.dtype), maps)
    return maps * torch.exp(-1j * virtual.angle())
