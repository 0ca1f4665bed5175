"""Measurements drawn afresh at every training step, over ranges of acquisitions: one network then serves them all."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from deft_med.config import Noise
from deft_med.intensity import Affine, Window, low_resolution, scale_of
from deft_med.likelihood import Gaussian
from deft_med.simulate import coil_maps, measured_by, smooth, smooth_phase, unresolved, with_noise
from operators import patterns
from operators.analytic import FilteredBackprojection
from operators.ct import RayTransform
from operators.geometry import Cartesian, Grid, ParallelBeam, Trajectory, uniform_angles
from operators.mri import Complex, Fourier, encoding
from operators.noise import gaussian
from operators.sense import approximate_inverse

WHOLE = 256  # matrix of a whole image; training may also see it at half that


@dataclass(frozen=True)
class Acquisitions:
    """Ranges that measurements are drawn from, afresh at every step. Views and coverage are log-uniform and uniform over a fixed
    set of ``geometries`` (their ray matrices stay in memory); noise is drawn per image, transmission with ``photon_share``.
    A share ``focus`` of the steps is spent on ``focus_views`` over half a turn, the default protocol's geometry; ``full_views`` over
    half a turn (low-dose scans) are one geometry more."""

    views: tuple[int, int] = (18, 180)
    coverage_deg: tuple[float, float] = (90.0, 180.0)
    gaussian_percent: tuple[float, float] = (0.5, 8.0)
    photons: tuple[float, float] = (5e3, 1e5)
    electronic: float = 10.0
    photon_share: float = 0.4
    geometries: int = 16
    focus: float = 0.3
    focus_views: int = 60
    full_views: int = 360


class Rays:
    """Draws CT likelihoods for images of one size from ``Acquisitions``; its operators are built once, for 1 mm pixels."""

    def __init__(self, size: int, ranges: Acquisitions, *, filter: str, seed: int = 0) -> None:
        self.size, self.ranges, self.filter, self.window = size, ranges, filter, Window()
        self.grid = Grid(shape=(size, size), spacing=(1.0, 1.0))
        draws = torch.rand(ranges.geometries, 3, generator=Generator().manual_seed(seed), dtype=torch.float64).tolist()
        self.beams = [self._beam(ranges.focus_views, 180.0, 0.0)]
        for r in draws:
            views = _between(ranges.views, r[0])
            low, high = ranges.coverage_deg
            coverage = high if r[1] < 0.5 else low + 2 * (r[1] - 0.5) * (high - low)  # half of them cover all there is
            self.beams.append(self._beam(views, coverage, r[2] * math.pi))
        self.beams.append(self._beam(ranges.full_views, 180.0, 0.0))
        self._built: dict[int, tuple[RayTransform, RayTransform, FilteredBackprojection]] = {}

    def _beam(self, views: float, coverage_deg: float, first: float) -> ParallelBeam:
        views = max(2, round(views * self.size / WHOLE))  # so that M/N stays when whole images are shown at half size
        return ParallelBeam(angles=uniform_angles(views, math.radians(coverage_deg), first),
                            detectors=math.ceil(math.sqrt(2) * self.size), pitch=1.0)

    def operators(self, index: int) -> tuple[RayTransform, RayTransform, FilteredBackprojection]:
        """(the simulator's, the solver's, the approximate inverse) of one geometry."""
        if index not in self._built:
            solver = RayTransform(self.grid, self.beams[index])
            self._built[index] = measured_by(self.grid, self.beams[index]), solver, FilteredBackprojection(solver, window=self.filter)
        return self._built[index]

    def measure(self, u: Tensor, pixel: Tensor, noises: list[Noise], generator: Generator, geometry: int = 0) -> Gaussian:
        """The likelihood of u (B, 1, n, n) with pixels of ``pixel`` (B,) mm, measured afresh."""
        simulator, solver, inverse = self.operators(geometry)
        pixel = pixel[:, None, None, None].to(u)
        lines = self.window.fold(simulator, pixel)(u)
        measured = [with_noise(line, noise, generator) for line, noise in zip(lines, noises, strict=True)]
        y, sigma = torch.stack([y for y, _ in measured]), torch.stack([s.expand_as(y) for y, s in measured])
        beyond = unresolved(torch.zeros_like(pixel), pixel)  # what a source finer than the training image would have added
        y = gaussian(y, beyond.expand_as(y), generator=generator)
        return Gaussian(self.window.fold(solver, pixel), y, unresolved(sigma, pixel), inverse)

    def draw(self, u: Tensor, pixel: Tensor, generator: Generator) -> Gaussian:
        r = torch.rand(2 + 2 * len(u), generator=generator, dtype=torch.float64).tolist()
        geometry = 0 if r[0] < self.ranges.focus else 1 + int(r[1] * (len(self.beams) - 1))
        return self.measure(u, pixel, [self._noise(a, b) for a, b in zip(r[2::2], r[3::2], strict=True)], generator, geometry)

    def _noise(self, which: float, level: float) -> Noise:
        photon = which < self.ranges.photon_share
        value = _between(self.ranges.photons if photon else self.ranges.gaussian_percent, level)
        return Noise(photons=value, electronic=self.ranges.electronic) if photon else Noise(gaussian_percent=value)


@dataclass(frozen=True)
class KSpaceRanges:
    """Ranges that k-space is drawn from. Acceleration is log-uniform, noise (in units of the image's own scale) too. Patterns are drawn
    once, ``patterns`` of them: a share ``focus`` equispaced lines at 4, the default protocol's, a share ``radial`` spokes, of the others
    a share ``poisson`` Poisson discs and the rest lines (equispaced or random). Coil maps are known up to a smooth relative error as
    calibration leaves it, ``map_error`` (log-uniform), and in a share ``cropped`` of the draws only where the object is. Of a share
    ``narrowed`` of the Cartesian patterns one edge of k-space was not measured (partial Fourier), or both (zero padding)."""

    acceleration: tuple[float, float] = (2.0, 10.0)
    coils: tuple[int, ...] = (1, 4, 8, 16)
    noise: tuple[float, float] = (0.003, 0.1)
    map_error: tuple[float, float] = (0.001, 0.02)
    patterns: int = 96
    focus: float = 0.25
    radial: float = 0.08
    cropped: float = 0.5
    narrowed: float = 0.0
    poisson: float = 1 / 3


class KSpace:
    """Draws MR likelihoods for complex images (B, 2, n, n) of one size; every image has its own coil maps and noise."""

    def __init__(self, size: int, ranges: KSpaceRanges, *, inverse: str = "sense", seed: int = 0) -> None:
        self.size, self.ranges, self.inverse = size, ranges, inverse
        generator = Generator().manual_seed(seed)
        self.patterns = [self._pattern(k, generator) for k in range(ranges.patterns)]

    def _pattern(self, number: int, generator: Generator) -> Cartesian | Trajectory:
        r = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        shape, acceleration = (self.size, self.size), _between(self.ranges.acceleration, r[0])
        if number < self.ranges.focus * self.ranges.patterns:
            return patterns.equispaced(shape, 4.0, axis=number % 2, generator=generator)
        spokes = math.ceil((1 - self.ranges.radial) * self.ranges.patterns)
        if number >= spokes:  # few of them: evenly over the range
            acceleration = _between(self.ranges.acceleration, (number - spokes + r[0]) / (self.ranges.patterns - spokes))
            return patterns.radial(shape, math.ceil(math.pi / 2 * self.size / acceleration), golden=r[1] < 0.5, start=2 * math.pi * r[2])
        if (number * self.ranges.poisson + 1e-6) % 1 < self.ranges.poisson:  # evenly spread
            side = max(8, round(24 * self.size / WHOLE * (0.5 + r[1])))
            return self._narrowed(patterns.poisson_disc(shape, acceleration, calibration=(side, side), generator=generator), generator)
        lines = patterns.equispaced if number % 3 == 1 else patterns.random
        return self._narrowed(lines(shape, acceleration, axis=int(2 * r[1]), generator=generator), generator)

    def _narrowed(self, pattern: Cartesian, generator: Generator) -> Cartesian:
        r = torch.rand(4, generator=generator, dtype=torch.float64).tolist() if self.ranges.narrowed else [1.0]
        if r[0] >= self.ranges.narrowed:
            return pattern
        mask, axis, edge = pattern.mask, int(2 * r[1]), round(self.size * (0.05 + 0.35 * r[2]))
        mask = mask if axis == 0 else mask.T
        mask[:edge] = False
        if r[3] < 0.5:
            mask[-min(edge, self.size // 3):] = False
        return Cartesian.of(mask if axis == 0 else mask.T)

    def measure(self, u: Tensor, pattern: Cartesian | Trajectory, maps: Tensor, sigma: Tensor, generator: Generator,
                known: Tensor | None = None) -> Gaussian:
        """The likelihood of u (B, 2, n, n) seen by ``maps`` (B, C, n, n) through ``pattern`` with noise ``sigma`` (B,).

        ``known`` are the maps that the likelihood has, where they are not the true ones.
        """
        channels = Complex((self.size, self.size))
        lines = (encoding(pattern, maps) @ channels)(u)
        physics = encoding(pattern, maps if known is None else known)
        deviation = sigma.reshape(-1, *[1] * (lines.ndim - 1)).to(u).expand(lines.shape)
        y = gaussian(lines, deviation, generator=generator)
        if isinstance(pattern, Cartesian):
            y = y * torch.from_numpy(pattern.mask)
        return Gaussian(Affine(physics @ channels, 1.0, 0.0), y, deviation, channels.H @ approximate_inverse(physics, self.inverse),
                        count=2 * maps.shape[1] * pattern.samples, ratio=1 / pattern.acceleration,
                        seen=None if known is None else (known != 0).any(1, keepdim=True))

    def draw(self, u: Tensor, pixel: Tensor, generator: Generator) -> Gaussian:
        r = torch.rand(len(u) + 2, generator=generator, dtype=torch.float64).tolist()
        coils = self.ranges.coils[int(r[0] * len(self.ranges.coils))]
        pattern = self.patterns[int(r[1] * len(self.patterns))]  # one a step, so that M / N is one number
        sigma = torch.tensor([_between(self.ranges.noise, k) for k in r[2:]])
        maps = coil_maps(len(u), coils, (self.size, self.size), generator)
        return self.measure(u, pattern, maps, sigma, generator, self.calibrated(maps, u, generator) if coils > 1 else None)

    def calibrated(self, maps: Tensor, u: Tensor, generator: Generator) -> Tensor:
        """The maps as a calibration finds them: a little wrong, and often zero outside the object."""
        count, coils, *shape = maps.shape
        r = torch.rand(3, count, 1, 1, 1, generator=generator)
        field = smooth(torch.randn(2, count, coils, 12, 12, generator=generator), (shape[0], shape[1]))
        found = maps * (1 + _between(self.ranges.map_error, r[0]) * torch.complex(*field))
        found = found / found.abs().square().sum(1, keepdim=True).sqrt()
        reach = self.size // 32  # the kernels of a calibration see no finer
        brightness = F.avg_pool2d(torch.linalg.vector_norm(u, dim=1, keepdim=True), 2 * reach + 1, 1, reach)
        return found * ((brightness > 0.03 + 0.07 * r[1]) | (r[2] >= self.ranges.cropped))


def _between(ends: tuple[float, float], share):
    """The point at ``share``, a number or a tensor, of the way on a logarithmic scale."""
    return ends[0] * (ends[1] / ends[0]) ** share


def tissue_phase(magnitude: Tensor, share: float, generator: Generator) -> Tensor:
    """Phase (B, 1, n, n) in rad that turns where the tissue changes, in a ``share`` of the images; zero in the others.

    Fat and water differ by their chemical shift times the echo time, and tissues by susceptibility: the phase of a scan is not smooth at
    the scalp's fat. Here what is brighter than a random threshold, in half of the images only near the edge of the object, is turned
    by an angle of 0.9 rad standard deviation.
    """
    r = torch.rand(len(magnitude), 4, generator=generator)[..., None, None]
    angle = 0.9 * torch.randn(len(magnitude), 1, 1, 1, generator=generator) * (r[:, :1] < share)
    brightness = magnitude / magnitude.flatten(1).quantile(0.99, dim=1).clamp(min=1e-6)[:, None, None, None]
    bright = torch.sigmoid((brightness - (0.2 + 0.8 * r[:, 1:2])) / (0.03 + 0.12 * r[:, 2:3]))
    reach = 2 * (magnitude.shape[-1] // 16) + 1
    rim = F.avg_pool2d((brightness > 0.08).float(), reach, 1, reach // 2, count_include_pad=False) < 0.8
    return angle * bright * (rim | (r[:, 3:] < 0.5))


def complex_images(magnitude: Tensor, generator: Generator, tissue: float = 0.0) -> Tensor:
    """Magnitudes (B, 1, n, n) >= 0 as complex images (B, 2, n, n) at the scale that a scan can know (`scale_of`).

    Contrast is bent by a power in one half of them. Of a random phase (`tissue_phase` in a share ``tissue`` of them) it is left what a
    scan's own low resolution image, with its noise, does not know (`problem.pose` turns the coil maps by the same).
    """
    count, size = len(magnitude), magnitude.shape[-1]
    r = torch.rand(count, 4, generator=generator)[..., None, None]
    bent = magnitude.clamp(min=0).pow(torch.where(r[:, :1] < 0.5, 1.0, torch.exp((r[:, 1:2] - 0.5) * 1.2)))
    phase = smooth_phase(count, (size, size), generator)[:, None]
    if tissue > 0:
        phase = phase + tissue_phase(magnitude, tissue, generator)
    image = torch.polar(bent, phase)
    kspace = Fourier((size, size))(image)
    scale = scale_of(kspace)[:, None, None, None]
    noise = torch.randn(2, *kspace.shape, generator=generator) * scale * _between((0.003, 0.1), r[:, 3:])
    image = image * torch.exp(-1j * low_resolution(kspace + torch.complex(*noise)).angle())
    jitter = torch.exp((r[:, 2:3] - 0.5) * 0.3)
    return torch.cat([image.real, image.imag], 1) / scale * jitter
