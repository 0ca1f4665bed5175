"""The inverse problem of one slice in the networks' unit u: what a modality is, to everything behind this page.

CT: u = HU / 1000, line integrals or counts, filtered backprojection; or thick slices, interpolation. MR: u = image / s as two real
channels, k-space through coil maps, where s (`intensity.scale_of`) and, where the scan does not bring them, coil maps and noise level come
from the measurements alone; or magnitudes through known codes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft_med.errors import UnsupportedError
from deft_med.intensity import Affine, Window, low_resolution, scale_of
from deft_med.likelihood import Gaussian
from deft_med.nonlinear import Magnitudes, Transmission
from deft_med.simulate import unresolved
from deft_med.volume import Scan, central
from operators import coils, whiten
from operators.analytic import FilteredBackprojection
from operators.ct import MU_WATER, encode
from operators.geometry import Cartesian, ThickSlices, Trajectory
from operators.mri import Complex, Fourier, NonCartesianMRI, encoding
from operators.noise import estimate, gaussian
from operators.sense import WeightedAdjoint, approximate_inverse
from operators.slices import SliceInterpolation, SliceMean
from operators.solve import cg_sense
from operators.variational import Record, tv, wavelet

FILTER = "hann"  # window of the FBP that stands beside every result
AIR = -1.0  # u of air: nothing is thinner
TV_WEIGHT = 3.0  # CT: of the variation of u against |y - A u|^2 / (2 s^2); chosen on the tune subjects
SENSE = 30.0  # MR: CG-SENSE's weight over sigma^2: three over the mean square of u
SPARSE = {"wavelet": 0.3, "tv": 0.2}  # MR: weight times sigma, both for u; like SENSE from a slice of the tune subject
BRIGHT = 1.7  # scale of an MR image (`intensity.scale_of`) over its root mean square: 1.6 to 2.0 in heads
FEWEST = 8  # lines that ESPIRiT can do with
CALIBRATION = (24, 24)  # centre of a gridded k-space that coil maps are taken from
SUPPORT = 0.8  # eigenvalue above which ESPIRiT sees the object; at 0.95 edges are lost and chi2 of the best image doubles
ITERATIONS, MR_ITERATIONS = 1500, 300

Classical = Callable[..., tuple[Tensor, str]]  # (weight=, where a method has one) -> u (1, C, ny, nx), and a warning or nothing


@dataclass(frozen=True)
class Problem:
    """One slice: its likelihood, the classical methods for it, and the way back to the scan's unit.

    ``baselines`` name the classical methods that stand beside every result, the first one before all.
    """

    likelihood: Any  # a `likelihood.Likelihood`: Gaussian where the forward model is linear
    classical: Mapping[str, Classical]
    baselines: tuple[str, ...]
    picture: Callable[[Tensor], np.ndarray]  # u (K, C, ny, nx) -> [K, row, column] in the scan's unit
    predict: Callable[[Any, Tensor], Tensor]  # acquisition and u -> what it would measure, without noise
    deviation: Callable[[Tensor], Tensor]  # noise of a measurement -> by how much a prediction from the true image misses it
    phase: Callable[[Tensor], np.ndarray] | None = None  # u (K, 2, ny, nx) of MR -> [K, row, column] in rad, as the coil maps have it
    image: Callable[[np.ndarray], Tensor] | None = None  # picture's way back, where nothing was lost: (row, column) -> u (1, C, ny, nx)


def pose(scan: Scan, index: int = 0, *, window: Window | None = None, filter: str = FILTER, inverse: str = "sense",
         device: str | torch.device = "cpu") -> Problem:
    """The problem of slice ``index`` of a scan whose noise is known (`with_known_noise`).

    ``window`` and ``filter`` belong to CT: u = (HU - offset) / scale, and the backprojection's filter in the residual; ``inverse`` to MR:
    what its residual goes through (`operators.sense.approximate_inverse`).
    """
    assert scan.noise is not None
    y = torch.from_numpy(scan.y[index:index + 1])
    noise = torch.from_numpy(np.broadcast_to(scan.noise, scan.y.shape)[index:index + 1].copy())
    if scan.phaseless:
        return _phaseless(scan, index, y, noise, device)
    if isinstance(scan.acquisition, ThickSlices):
        return _slices(scan, y, noise, window or Window(), device)
    if scan.modality == "CT":
        return _ct(scan, index, y, noise, window or Window(), filter, device)
    return _mr(scan, index, y, noise, inverse, device)


def with_known_noise(scan: Scan) -> Scan:
    """The scan itself or, where it does not know its noise, the same with an estimate from its data.

    It is an upper bound where signal may be counted in it: in MR scans with one or two coils, along trajectories with up to four.
    """
    if scan.noise is not None:
        return scan
    if scan.phaseless or isinstance(scan.acquisition, ThickSlices):
        raise UnsupportedError("the noise of magnitudes and of thick slices cannot be told from the data: give the scan its noise")
    words = "estimated from the data"
    if scan.modality == "CT":
        return replace(scan, noise=estimate(torch.from_numpy(scan.y)).numpy(), noise_is=words)
    measured = scan.y.reshape(len(scan.y), -1).any(1)  # an empty slice has the others' noise
    if not measured.any():
        raise UnsupportedError("k-space holds nothing but zeros (expected measurements)")
    found = [whiten.level(*_calibration(y, scan)) for y in torch.from_numpy(scan.y[measured])]
    sigma = np.full(len(scan.y), np.mean([level.sigma for level in found]), np.float32)
    sigma[measured] = [level.sigma for level in found]
    sigma /= _gain(scan)
    few = False
    if isinstance(scan.acquisition, Trajectory):
        radius = np.linalg.norm(scan.acquisition.points, axis=1)
        outermost = scan.y[..., radius >= np.quantile(radius, 0.9)]
        outer = np.sqrt(np.mean(np.abs(outermost) ** 2, axis=(1, 2)) / 2)
        sigma = np.where(measured, np.minimum(sigma, outer), sigma)
        few = scan.y.shape[1] <= 4
    if few or any(level.upper_bound for level in found):
        words += ", as an upper bound: it may count signal"
    return replace(scan, noise=sigma.reshape(-1, *[1] * (scan.y.ndim - 1)), noise_is=words)


def _ct(scan: Scan, index: int, y: Tensor, noise: Tensor, window: Window, filter: str, device: str | torch.device) -> Problem:
    operator = encode(scan.grid, scan.acquisition, device)  # type: ignore[arg-type]
    sigma = unresolved(noise, max(scan.grid.spacing))
    mu = MU_WATER if scan.mu_water is None else scan.mu_water
    lines = Gaussian(window.fold(operator, mu_water=mu), bridged(y, noise)[:, None].to(device), sigma[:, None].to(device),
                     FilteredBackprojection(operator, window=filter))
    likelihood: Gaussian | Transmission = lines
    if scan.counts is not None:
        read = torch.from_numpy(scan.counts.values[index:index + 1])[:, None].to(device)
        likelihood = Transmission(lines, read, scan.counts.photons, scan.counts.electronic, scan.counts.ceiling)

    def fbp() -> tuple[Tensor, str]:
        return lines.inverted_by(FilteredBackprojection(operator, window=FILTER)).direct(), ""

    def variation(weight: float = TV_WEIGHT) -> tuple[Tensor, str]:
        return _told(*total_variation(lines, fbp()[0], weight))

    return Problem(likelihood, {"fbp": fbp, "tv": variation}, ("fbp",),
                   lambda u: window.restore(u)[:, 0].cpu().numpy(),
                   lambda acquisition, u: window.fold(encode(scan.grid, acquisition, device), mu_water=mu)(u)[:, 0],
                   lambda noise: unresolved(noise, max(scan.grid.spacing)),
                   image=lambda hu: window.normalise(torch.from_numpy(hu)[None, None]).to(device))


def bridged(y: Tensor, noise: Tensor) -> Tensor:
    """Sinograms y (*batch, views, detectors) with what was not measured interpolated linearly along the detector (Kalender et al.,
    Radiology 164(2), 1987): a guess for the direct reconstruction, which no likelihood looks at. A view without any ray stays 0."""
    missing = torch.isinf(noise).expand(y.shape)
    if not missing.any():
        return y
    rows, gone, bins = y.clone().reshape(-1, y.shape[-1]).numpy(), missing.reshape(-1, y.shape[-1]).numpy(), np.arange(y.shape[-1])
    for row, hole in zip(rows, gone, strict=True):
        if hole.any() and not hole.all():
            row[hole] = np.interp(bins[hole], bins[~hole], row[~hole])
    return torch.from_numpy(rows).reshape(y.shape)


def _slices(scan: Scan, y: Tensor, noise: Tensor, window: Window, device: str | torch.device) -> Problem:
    means = SliceMean(scan.acquisition).to(device)
    likelihood = Gaussian(Affine(means, window.scale, window.offset), y[:, None].to(device), noise[:, None].to(device),
                          SliceInterpolation(scan.acquisition).to(device))

    def interpolated() -> tuple[Tensor, str]:
        return likelihood.direct(), ""

    def variation(weight: float = TV_WEIGHT) -> tuple[Tensor, str]:
        return _told(*total_variation(likelihood, interpolated()[0], weight))

    return Problem(likelihood, {"interpolation": interpolated, "tv": variation},
                   ("interpolation",), lambda u: window.restore(u)[:, 0].cpu().numpy(),
                   lambda acquisition, u: SliceMean(acquisition).to(device)(window.restore(u))[:, 0], lambda noise: noise,
                   image=lambda hu: window.normalise(torch.from_numpy(hu)[None, None]).to(device))


def total_variation(likelihood: Gaussian | Transmission, x0: Tensor, weight: float = TV_WEIGHT) -> tuple[Tensor, Record]:
    """CT: argmin |y - A u|^2 / (2 s^2) + weight TV(u) over u >= air, and how far it converged.

    Of counts it is their logarithm's, without the saturated rays: they would say that air is dense.
    """
    y, sigma, forward = likelihood.y, likelihood.sigma, likelihood.forward
    if isinstance(likelihood, Transmission):
        y = likelihood.lines.y
        sigma = sigma if likelihood.saturated is None else sigma.masked_fill(likelihood.saturated, torch.inf)
    shift = forward(torch.zeros_like(x0))
    return tv(forward.operator * forward.a, y - shift, weight, sigma=sigma, x0=x0.clamp(min=AIR), lower=AIR, max_iterations=ITERATIONS)


def _mr(scan: Scan, index: int, y: Tensor, noise: Tensor, inverse: str, device: str | torch.device) -> Problem:
    kspace, _, region = _calibration(y[0], scan)
    scale = float(scale_of(kspace)) or 1.0
    kspace, y, noise = kspace / scale, y / scale, noise / scale  # from here on in the networks' unit, whatever a file's is
    level = float(_measured(noise, scan).square().mean().sqrt())
    maps = coil_maps(kspace, region, level * _gain(scan)) if scan.maps is None else torch.from_numpy(scan.maps[index])
    rss = torch.linalg.vector_norm(maps, dim=0)
    maps = maps / torch.where(rss > 0, rss, 1.0)  # the networks' scale is the root sum of squares
    turn = torch.exp(1j * (maps.conj() * low_resolution(kspace)).sum(0).angle())  # and their images are real, about
    y, noise, maps, turn = y.to(device), noise.to(device), (maps * turn).to(device), turn.to(device)
    acquisition: Cartesian | Trajectory = scan.acquisition  # type: ignore[assignment]
    physics = encoding(acquisition, maps)
    channels = Complex(acquisition.shape)
    seen = (maps != 0).any(0) & bool(kspace.any())  # where no coil sees, a regulariser alone would fill in the image
    likelihood = Gaussian(Affine(physics @ channels, 1.0, 0.0), y, noise, channels.H @ approximate_inverse(physics, inverse),
                          count=2 * len(maps) * acquisition.samples, ratio=1 / acquisition.acceleration, seen=seen[None, None])

    def zero_filled() -> tuple[Tensor, str]:
        return likelihood.inverted_by(channels.H @ WeightedAdjoint(physics)).direct(), ""

    def sense(weight: float = SENSE) -> tuple[Tensor, str]:
        return channels.H(cg_sense(physics, y, weight * level**2, iterations=50)), ""

    def sparse(method: Callable[..., tuple[Tensor, Record]], name: str) -> Callable[[], tuple[Tensor, str]]:
        def answer(weight: float = SPARSE[name]) -> tuple[Tensor, str]:
            image, record = method(physics, y, weight / level, sigma=noise, max_iterations=MR_ITERATIONS)
            return _told(channels.H(image * seen), record)

        return answer

    def picture(u: Tensor) -> np.ndarray:
        magnitude = torch.linalg.vector_norm(u, dim=1) * scale
        return central(magnitude.cpu().numpy(), scan.picture)

    def phase(u: Tensor) -> np.ndarray:
        return central((torch.complex(u[:, 0], u[:, 1]) * turn).angle().cpu().numpy(), scan.picture)

    classical = {"zero-filled": zero_filled, "cg-sense": sense,
                 "wavelet": sparse(wavelet, "wavelet"), "tv": sparse(tv, "tv")}
    return Problem(likelihood, classical, ("zero-filled", "cg-sense", "wavelet"), picture,
                   lambda other, u: (encoding(other, maps) @ channels)(scale * u), lambda noise: noise, phase)


def _phaseless(scan: Scan, index: int, y: Tensor, noise: Tensor, device: str | torch.device) -> Problem:
    """Magnitudes of k-space through known codes; the unit of u comes from their energy, which an isometry keeps."""
    codes = torch.from_numpy(scan.maps[index])  # type: ignore[index]
    codes = (codes / torch.linalg.vector_norm(codes, dim=0).clamp(min=1e-30)).to(device)
    acquisition: Cartesian | Trajectory = scan.acquisition  # type: ignore[assignment]
    measured, level = _measured(y.real, scan), _measured(noise, scan)
    power = float((measured.square() - level.square()).sum()) / math.prod(acquisition.shape) * acquisition.acceleration
    scale = BRIGHT * math.sqrt(max(power, 0.0)) or 1.0
    physics, channels = encoding(acquisition, codes), Complex(acquisition.shape)
    likelihood = Magnitudes(Affine(physics @ channels, scale, 0.0), y.real.to(device), noise.to(device),
                            channels.H @ WeightedAdjoint(physics), count=len(codes) * acquisition.samples,
                            ratio=1 / acquisition.acceleration)

    def projections() -> tuple[Tensor, str]:
        return likelihood.direct(), ""

    return Problem(likelihood, {"projections": projections}, ("projections",),
                   lambda u: central(torch.linalg.vector_norm(u, dim=1).mul(scale).cpu().numpy(), scan.picture),
                   lambda other, u: (encoding(other, codes) @ channels)(scale * u).abs().to(torch.complex64), lambda noise: noise)


def coil_maps(kspace: Tensor, region: coils.Calibration, sigma: float = 0.0) -> Tensor:
    """ESPIRiT maps of a k-space's calibration region or, where that is too small or shows only noise, low-resolution ones."""
    if len(kspace) == 1:
        return torch.ones_like(kspace)
    if not kspace.any():
        return torch.full_like(kspace, len(kspace) ** -0.5)
    lines = min(coils.calibrate(kspace, region).shape[1:])
    if lines >= FEWEST:
        with contextlib.suppress(ValueError):  # nothing above the noise: an empty slice
            maps = coils.espirit(kspace, region, kernel=min(6, lines // 2), sigma=sigma, crop=SUPPORT)
            if maps.any():
                return maps
    return coils.low_resolution(kspace, region)


def _calibration(y: Tensor, scan: Scan) -> tuple[Tensor, Tensor, coils.Calibration]:
    """(k-space (C, ky, kx), its mask, the region to calibrate from) of one slice; a trajectory's is gridded."""
    if isinstance(scan.acquisition, Trajectory):
        centre = torch.zeros(scan.grid.shape, dtype=torch.bool)
        central(centre, CALIBRATION)[:] = True  # beyond it the grid's noise is another
        return _gridded(y, scan.acquisition), centre, CALIBRATION
    mask = torch.from_numpy(scan.acquisition.mask)  # type: ignore[union-attr]
    ny, nx = mask.shape
    if not mask[ny // 2, nx // 2]:
        raise UnsupportedError("the centre of k-space was not sampled (expected a full centre to take coil maps and scale from): "
                               "reconstruct a scan with calibration lines")
    return y, mask, None


def _gridded(y: Tensor, trajectory: Trajectory) -> Tensor:
    """Samples (C, M) as k-space (C, ky, kx): a fit, not the adjoint, whose centre is 1.5 % off, which coil maps would take over."""
    return Fourier(trajectory.shape)(cg_sense(NonCartesianMRI(trajectory), y[:, None], 1e-3, iterations=30))


@functools.lru_cache(maxsize=8)
def _gridded_noise(trajectory: Trajectory) -> float:
    unit = gaussian(torch.zeros(1, trajectory.samples, dtype=torch.complex64), 1.0, generator=torch.Generator().manual_seed(0))
    centre = coils.calibrate(_gridded(unit, trajectory), CALIBRATION)
    return float(centre.abs().square().mean() / 2) ** 0.5


def _gain(scan: Scan) -> float:
    """Deviation of unit noise where coil maps are calibrated: 1 on the grid, less where many samples of a trajectory meet."""
    return _gridded_noise(scan.acquisition) if isinstance(scan.acquisition, Trajectory) else 1.0


def _measured(noise: Tensor, scan: Scan) -> Tensor:
    """The noise of the points that were measured: elsewhere it means nothing."""
    if isinstance(scan.acquisition, Cartesian):
        full = noise.expand(*noise.shape[:-2], *scan.acquisition.shape)
        return full[..., torch.from_numpy(scan.acquisition.mask)]
    return noise


def _told(image: Tensor, record: Record) -> tuple[Tensor, str]:
    if record.converged:
        return image, ""
    return image, f"stopped at a relative gap of {float(record.gap.max()):.2g} after {record.iterations} iterations"
