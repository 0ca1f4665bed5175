"""Image -> Scan: the only place that knows the finer grid and the other ray model.

A retrospective study must not reconstruct with the operator that made its data. Measurements come from the source at its native
matrix (or, where that is no finer than the reconstruction grid, from every pixel split 2 x 2), as strip integrals over a
detector bin by three sub-rays; reconstruction uses Joseph's single ray on the reconstruction grid. MR studies are of the source's
own k-space, and thick slices are means of the reference's own rows, which is the custom and is said to be kind.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from deft_med.config import KSpaceProtocol, Metal, Noise, Protocol, SliceProtocol
from deft_med.volume import Counts, Scan, Volume
from operators import counts
from operators.ct import RayTransform, attenuation
from operators.geometry import FanBeam, Grid, ParallelBeam, Trajectory
from operators.mri import encoding
from operators.noise import gaussian, transmission
from operators.slices import SliceMean

SUBRAYS, SPLIT, CHUNK = 3, 2, 32
BODY = -500.0  # HU from which it is the body that metal is put into
UNRESOLVED = 0.0045  # line integral per mm of pixel: 0.0030 ... 0.0089 over ten subjects at 1.2 to 2 mm, rays through the body


def unresolved(sigma: Tensor, pixel: float | Tensor) -> Tensor:
    """Deviation of the measurements about what an image on the grid can say: sqrt(sigma^2 + tau^2), pixel in mm.

    tau = UNRESOLVED pixel is the root mean square difference between strip integrals of a 512 x 512 source and Joseph's ray through
    its area mean on 256 x 256. Beside 3.5 % noise it is nothing; at 1e5 photons it is half of sigma, and without it a likelihood
    demands more of the image than the grid can give.
    """
    return (sigma.square() + (UNRESOLVED * pixel) ** 2).sqrt()


def measured_by(grid: Grid, beam: ParallelBeam | FanBeam, *, fine: bool = False) -> RayTransform:
    """The simulator's line integrals of an image on ``grid``: sub-rays, and pixels split unless the grid is ``fine`` already."""
    return RayTransform(grid, beam, split=1 if fine else SPLIT, subrays=SUBRAYS)


def with_noise(lines: Tensor, noise: Noise, generator: Generator) -> tuple[Tensor, Tensor]:
    """Noisy measurements and the standard deviation per ray, from noiseless line integrals (..., views, detectors)."""
    if noise.photons is not None:
        return transmission(lines, noise.photons, noise.electronic, generator=generator)
    sigma = noise.gaussian_percent / 100 * lines.mean((-2, -1), keepdim=True)  # type: ignore[operator]
    return gaussian(lines, sigma, generator=generator), sigma


def slice_generator(seed: int, index: int, sample: int = 0, *, purpose: str) -> Generator:
    """Draws of one slice and one sample for one purpose: what is measured and what is sampled must not share a stream."""
    state = np.random.SeedSequence([seed, index, sample, *purpose.encode()]).generate_state(1, np.uint32)
    return Generator().manual_seed(int(state[0]))  # 32 bits: the CPU generator looks at no more


def reconstruction_grid(volume: Volume, size: int) -> tuple[int, int]:
    """Matrix of the reconstruction: the source's own or, where that is larger, ``size`` along its longer side."""
    rows, columns = volume.data.shape[1:]
    factor = max(1.0, max(rows, columns) / size)
    return round(rows / factor), round(columns / factor)


def simulate(volume: Volume, protocol: Protocol | KSpaceProtocol | SliceProtocol, *, seed: int = 0) -> Scan:
    """A retrospective study: the measurements that ``protocol`` would have made of ``volume`` (HU, or an MR magnitude)."""
    if isinstance(protocol, SliceProtocol):
        return _simulate_slices(volume, protocol, seed)
    return _simulate_ct(volume, protocol, seed) if isinstance(protocol, Protocol) else _simulate_mr(volume, protocol, seed)


def _simulate_ct(volume: Volume, protocol: Protocol, seed: int) -> Scan:
    """Line integrals of a volume in HU, air clamped at -1000.

    The reference is the area mean of the source on the reconstruction grid; slice k draws its noise from (seed, k).
    """
    source = volume.with_data(np.maximum(volume.data, -1000.0))
    shape = reconstruction_grid(source, protocol.grid)
    reference = source.resample_to(shape)
    grid = Grid(shape=shape, spacing=reference.spacing[1:])
    beam = protocol.beam(grid)
    fine = source.data.shape[1:] != shape
    operator = measured_by(Grid(shape=source.data.shape[1:], spacing=source.spacing[1:]), beam, fine=fine)
    y, sigma, read, noise = [], [], [], protocol.noise
    for first in range(0, len(source.data), CHUNK):
        lines = operator(attenuation(torch.from_numpy(source.data[first:first + CHUNK])))
        for index, line in enumerate(lines):
            generator = slice_generator(seed, volume.first + first + index, purpose="measure")
            if noise.counts:
                assert noise.photons is not None
                read.append(counts.draw(line, noise.photons, noise.electronic, noise.ceiling, generator=generator))
                noisy, deviation = counts.line_integrals(read[-1], noise.photons, noise.electronic)
            else:
                noisy, deviation = with_noise(line, noise, generator)
            if protocol.metal is not None:
                generator = slice_generator(seed, volume.first + first + index, purpose="metal")
                trace = metal_trace(torch.from_numpy(reference.data[first + index]), grid, beam, protocol.metal, generator)
                noisy, deviation = noisy.masked_fill(trace, 0), deviation.expand_as(noisy).masked_fill(trace, torch.inf)
            y.append(noisy)
            sigma.append(deviation)
    kept = Counts(torch.stack(read).numpy(), noise.photons, noise.electronic, noise.ceiling) if read and noise.photons else None
    return Scan(y=torch.stack(y).numpy(), acquisition=beam, grid=grid, noise=torch.stack(sigma).numpy(), reference=reference,
                affine=reference.affine, simulated=True, protocol=protocol.name, counts=kept, first=volume.first)


def metal_trace(hu: Tensor, grid: Grid, beam: ParallelBeam | FanBeam, metal: Metal, generator: Generator) -> Tensor:
    """Rays (views, detectors) whose strips touch metal: disks wholly inside the body of an image in HU, at random places.

    The metal stands for what it hides: its rays are lost, the others know nothing of it (no scatter, no hardening), and the reference
    is the body without it. A slice without room for a disk has none.
    """
    radius = metal.diameter_mm / 2
    reach = [2 * math.ceil(radius / s) + 1 for s in grid.spacing]
    outside = F.max_pool2d((hu < BODY).float()[None, None], reach, 1, [n // 2 for n in reach])[0, 0]  # beyond the edge is not outside
    y, x = (torch.from_numpy(axis).to(hu) for axis in (grid.y, grid.x))
    room, disks = torch.nonzero(outside == 0), torch.zeros_like(hu)
    for pick in torch.randint(max(1, len(room)), (metal.disks,), generator=generator).tolist() if len(room) else []:
        row, column = room[pick].tolist()
        disks[torch.hypot((y - y[row])[:, None], x - x[column]) <= radius] = 1
    return measured_by(grid, beam)(disks) > 0


def _simulate_slices(volume: Volume, protocol: SliceProtocol, seed: int) -> Scan:
    """Thick slices of a volume in HU, air clamped at -1000: means over the rows of the reference, with white noise."""
    reference = volume.with_data(np.maximum(volume.data, -1000.0))
    reference = reference.resample_to(reconstruction_grid(reference, protocol.grid))
    acquisition = protocol.acquisition(reference.shape[1:])
    thick = SliceMean(acquisition)(torch.from_numpy(reference.data))
    y = [gaussian(one, protocol.noise_hu, generator=slice_generator(seed, k, purpose="measure"))
         for k, one in enumerate(thick, volume.first)]
    return Scan(y=torch.stack(y).numpy(), acquisition=acquisition, grid=Grid(shape=reference.shape[1:], spacing=reference.spacing[1:]),
                noise=np.full((1, 1, 1), protocol.noise_hu, np.float32), reference=reference, affine=reference.affine, simulated=True,
                protocol=protocol.name, first=volume.first)


def _simulate_mr(volume: Volume, protocol: KSpaceProtocol, seed: int) -> Scan:
    """k-space of a magnitude image with a smooth phase, through smooth coils, with complex noise; coil maps are not handed on.

    A magnitude is no measurement: its own k-space was filtered, combined and interpolated by a scanner, and holds no phase. What is
    reconstructed from it looks better than a real scan would (Shimron et al., PNAS 2022, "data crimes"). The noise follows each slice's
    own maximum, where a scanner's is one for all: faint end slices come out better than they would. A phaseless study hands its codes
    on, and its noise is that of the magnitudes.
    """
    shape = reconstruction_grid(volume, protocol.grid)
    reference = volume.with_data(np.maximum(volume.data, 0)).resample_to(shape)
    acquisition = protocol.acquisition(shape, slice_generator(seed, 0, purpose="pattern"))
    masks = phase_codes if protocol.phaseless else coil_maps
    maps = masks(1, protocol.coils, shape, slice_generator(seed, 0, purpose="coils"))[0]
    physics = encoding(acquisition, maps)
    y, sigma, faintest = [], [], 1e-3 * float(reference.data.max()) or 1.0  # an empty slice is measured too
    for index, magnitude in enumerate(torch.from_numpy(reference.data), volume.first):
        generator = slice_generator(seed, index, purpose="measure")
        image = torch.polar(magnitude, smooth_phase(1, shape, generator)[0])
        level = protocol.noise_percent / 100 * max(float(magnitude.max()), faintest)
        kspace = physics(image)
        kspace = gaussian(kspace.abs() if protocol.phaseless else kspace, level, generator=generator).to(kspace.dtype)
        y.append(kspace if isinstance(acquisition, Trajectory) else kspace * torch.from_numpy(acquisition.mask))
        sigma.append(level)
    noise = np.array(sigma, np.float32).reshape(-1, *[1] * y[0].ndim)
    codes = np.repeat(maps.numpy()[None], len(y), 0) if protocol.phaseless else None
    return Scan(y=torch.stack(y).numpy(), acquisition=acquisition, grid=Grid(shape=shape, spacing=reference.spacing[1:]), noise=noise,
                reference=reference, affine=reference.affine, simulated=True, protocol=protocol.name, maps=codes, first=volume.first,
                phaseless=protocol.phaseless)


def coil_maps(count: int, coils: int, shape: tuple[int, int], generator: Generator) -> Tensor:
    """Smooth random sensitivities (count, coils, ny, nx) of unit sum of squares: coils on a ring about the field of view, each
    falling off with the distance, with a slowly turning phase."""
    if coils == 1:
        return torch.ones(count, 1, *shape, dtype=torch.complex64)
    y, x = _axes(shape)
    r = torch.rand(count, coils, 5, generator=generator)
    ring = torch.rand(count, 2, generator=generator)
    angle = 2 * math.pi * (torch.arange(coils) + 0.5 * r[..., 0]) / coils + 2 * math.pi * ring[:, :1]
    radius = (1.1 + 0.5 * ring[:, 1:]) * (1 + 0.15 * (r[..., 1] - 0.5))
    cy, cx = ((radius * f(angle))[..., None, None] for f in (torch.sin, torch.cos))
    reach = (0.5 + 0.6 * r[..., 2])[..., None, None]
    fall = 1 / (1 + ((y - cy) ** 2 + (x - cx) ** 2) / reach**2) ** 1.5
    turn = (2 * r[..., 3:4, None] - 1) * 1.5 * y + (2 * r[..., 4:5, None] - 1) * 1.5 * x + angle[..., None, None]
    maps = torch.polar(fall, turn)
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def phase_codes(count: int, codes: int, shape: tuple[int, int], generator: Generator) -> Tensor:
    """Masks (count, codes, ny, nx) of independent uniform phases, of unit sum of squares."""
    return torch.polar(torch.tensor(codes**-0.5), 2 * math.pi * torch.rand(count, codes, *shape, generator=generator))


def smooth_phase(count: int, shape: tuple[int, int], generator: Generator) -> Tensor:
    """Random phases (count, ny, nx) in rad: a ramp, a bowl and a slow field, as coils and B0 leave them in an image, up to 0.25 rad of a
    finer one, and two bumps of up to 1.5 rad, as air leaves them in tissue. A quarter rad of what the central 24 x 24 samples cannot
    show is what head scans have."""
    y, x = _axes(shape)
    r = torch.rand(count, 6, generator=generator)[..., None, None]
    slow = smooth(torch.randn(count, 4, 4, generator=generator), shape)
    ramp = 4 * (r[:, 0] - 0.5) * y + 4 * (r[:, 1] - 0.5) * x
    fine = smooth(torch.randn(count, 24, 24, generator=generator), shape)
    r2 = torch.rand(count, 2, 4, generator=generator)[..., None, None]
    away = (y - 1.2 * (r2[:, :, 0] - 0.5)) ** 2 + (x - 1.2 * (r2[:, :, 1] - 0.5)) ** 2
    bumps = (3 * (r2[:, :, 2] - 0.5) * torch.exp(-away / (2 * (0.04 + 0.08 * r2[:, :, 3]) ** 2))).sum(1)
    slow = 0.8 * r[:, 4] * slow + 0.25 * r[:, 5] * fine + bumps
    return 2 * math.pi * r[:, 2] + ramp + 3 * (r[:, 3] - 0.5) * (x**2 + y**2) + slow


def smooth(field: Tensor, shape: tuple[int, int]) -> Tensor:
    """A coarse field (..., k, l) on a grid of ``shape`` by bicubic interpolation, as the product of two matrices."""
    rows, columns = (_bicubic(*ends) for ends in zip(field.shape[-2:], shape, strict=True))
    return rows @ field @ columns.T


@functools.lru_cache
def _bicubic(nodes: int, size: int) -> Tensor:
    """The matrix (size, nodes) of bicubic interpolation along one axis."""
    return F.interpolate(torch.eye(nodes)[None, None], (size, nodes), mode="bicubic")[0, 0]


def _axes(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(y, x) of every pixel, from -1 to 1 over the image."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[0]), torch.linspace(-1, 1, shape[1]), indexing="ij")
    return y, x
