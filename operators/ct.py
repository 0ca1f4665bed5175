"""X-ray CT: line integrals of an attenuation image, and the two units in which such an image is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from operators import _astra, _rays, _sparse
from operators.geometry import Beam, FanBeam, Grid, ParallelBeam
from operators.linear import LinearOperator

MU_WATER = 0.0192  # 1/mm, water at the effective energy of a clinical scanner (about 70 keV)


def attenuation(hu: Tensor) -> Tensor:
    """Linear attenuation in 1/mm from Hounsfield units, mu = mu_water (1 + HU / 1000); nothing is thinner than air at -1000 HU."""
    return MU_WATER * (1 + hu.clamp(min=-1000) / 1000)


def hounsfield(mu: Tensor) -> Tensor:
    """Hounsfield units from linear attenuation in 1/mm; the inverse of `attenuation` above air, never clipped."""
    return 1000 * (mu / MU_WATER - 1)


class RayTransform(LinearOperator):
    """Line integrals of an image along the rays of a beam, y_i = sum_j w_ij x_j, with an exact adjoint.

    Takes (*batch, ny, nx) in 1/mm and gives (*batch, views, detectors), dimensionless. Below the memory cap the weights are one
    sparse matrix, built at the first call and shared by every operator of the same geometry in the process; above it ASTRA projects
    where it is installed and knows the geometry (in single precision; its fan beam weighs rays a little differently, about 1 %), else
    the matrix is rebuilt piece by piece at every call.

    Args:
        grid: the image's pixels.
        beam: where the rays run.
        split, subrays: a finer ray model (see `operators._rays.ray_matrix`); simulate with it what is reconstructed without.

    Raises:
        TypeError: grid is not a `Grid` or beam not a `ParallelBeam` or `FanBeam`.
        ValueError: split or subrays below one, or a fan-beam source inside the grid.
    """

    def __init__(self, grid: Grid, beam: Beam, *, split: int = 1, subrays: int = 1) -> None:
        if not isinstance(grid, Grid):
            raise TypeError(f"grid must be a Grid, got {type(grid).__name__}")
        if not isinstance(beam, ParallelBeam | FanBeam):
            raise TypeError(f"beam must be a ParallelBeam or a FanBeam, got {type(beam).__name__}")
        if split < 1 or subrays < 1:
            raise ValueError(f"split and subrays are whole numbers of at least 1, got {split} and {subrays}")
        if isinstance(beam, FanBeam) and beam.source_origin <= _radius(grid):
            raise ValueError(
                f"the source must stand outside the grid: source_origin is {beam.source_origin} mm, "
                f"the grid's corner is {_radius(grid):.1f} mm from the isocentre"
            )
        super().__init__(grid.shape, beam.shape)
        self.grid = grid
        self.beam = beam
        self.split = split
        self.subrays = subrays
        self._matrix: Any = None
        self.register_buffer("_anchor", torch.empty(0, dtype=torch.uint8), persistent=False)  # .to() moves it, and so us

    def _projector(self):
        if self._matrix is None:
            ways = {"split": self.split, "subrays": self.subrays}
            if _rays.estimated_bytes(self.grid, self.beam, **ways) <= _sparse.MEMORY_CAP:
                key = (self.grid, self.beam, self.split, self.subrays)
                self._matrix = _sparse.cached(key, lambda: _rays.ray_matrix(self.grid, self.beam, **ways))
            elif (self.split, self.subrays) == (1, 1) and _astra.serves(self.grid, self.beam, self._anchor.device):
                self._matrix = _astra.AstraProjector(self.grid, self.beam)
            else:
                shape = (self.beam.shape[0] * self.beam.shape[1], self.grid.shape[0] * self.grid.shape[1])
                self._matrix = _sparse.StreamedMatrix(lambda: _rays.ray_chunks(self.grid, self.beam, merge=False, **ways), shape)
        return self._matrix

    def _forward(self, x: Tensor) -> Tensor:
        return self._projector().forward(x.flatten(-2).reshape(-1, x.shape[-2] * x.shape[-1])).reshape(*x.shape[:-2], *self.range_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._projector().adjoint(y.flatten(-2).reshape(-1, y.shape[-2] * y.shape[-1])).reshape(*y.shape[:-2], *self.domain_shape)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_matrix": None}  # rebuilt from the geometry, never copied or pickled

    def extra_repr(self) -> str:
        return f"{self.grid}, {type(self.beam).__name__} {self.beam.shape[0]} views x {self.beam.shape[1]} detectors"


def encode(grid: Grid, acquisition: Beam, device: str | torch.device = "cpu") -> LinearOperator:
    """The operator that an acquisition implies on a grid, on `device`."""
    return RayTransform(grid, acquisition).to(device)


def _radius(grid: Grid) -> float:
    """Distance of the grid's corner from the isocentre in mm."""
    return 0.5 * ((grid.shape[0] * grid.spacing[0]) ** 2 + (grid.shape[1] * grid.spacing[1]) ** 2) ** 0.5
