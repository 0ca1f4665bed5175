"""Image -> Scan: the only place that knows the finer grid and the other ray model.

A retrospective study must not reconstruct with the operator that made its data. Measurements come from the source at its native
matrix (or, where that is no finer than the reconstruction grid, from every pixel split 2 x 2), as strip integrals over a
detector bin by three sub-rays; reconstruction uses Joseph's single ray on the reconstruction grid.
"""

import numpy as np
import torch
from torch import Generator, Tensor

from deft_med.config import Noise, Protocol
from deft_med.volume import Scan, Volume
from operators.ct import RayTransform, attenuation
from operators.geometry import FanBeam, Grid, ParallelBeam
from operators.noise import gaussian, transmission

SUBRAYS, SPLIT, CHUNK = 3, 2, 32
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


def simulate(volume: Volume, protocol: Protocol, *, seed: int = 0) -> Scan:
    """A retrospective study: the measurements that ``protocol`` would have made of ``volume`` (HU, air clamped at -1000).

    The reference is the area mean of the source on the reconstruction grid; slice k draws its noise from (seed, k).
    """
    source = volume.with_data(np.maximum(volume.data, -1000.0))
    shape = reconstruction_grid(source, protocol.grid)
    reference = source.resample_to(shape)
    grid = Grid(shape=shape, spacing=reference.spacing[1:])
    beam = protocol.beam(grid)
    fine = source.data.shape[1:] != shape
    operator = measured_by(Grid(shape=source.data.shape[1:], spacing=source.spacing[1:]), beam, fine=fine)
    y, sigma = [], []
    for first in range(0, len(source.data), CHUNK):
        lines = operator(attenuation(torch.from_numpy(source.data[first:first + CHUNK])))
        for index, line in enumerate(lines):
            noisy, deviation = with_noise(line, protocol.noise, slice_generator(seed, first + index, purpose="measure"))
            y.append(noisy)
            sigma.append(deviation)
    return Scan(y=torch.stack(y).numpy(), acquisition=beam, grid=grid, noise=torch.stack(sigma).numpy(), reference=reference,
                affine=reference.affine, simulated=True, protocol=protocol.name)
