"""ASTRA behind the ray transform: what is too large for a stored matrix, and CUDA tensors in place. The only file that imports astra.

On the CPU each image is handed to ASTRA without a copy; its parallel projector is the same interpolation as our matrix, and its
backprojection is the exact transpose, also in fan beam. On CUDA a whole batch of parallel slices is one call on torch's memory, but
ASTRA's backprojection is voxel-driven there and so not the exact adjoint: the stored matrix is preferred as long as it fits.

ASTRA is GPL-3 and optional; it is imported when a geometry needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.geometry import Beam, FanBeam, Grid, ParallelBeam

_lock = threading.Lock()  # ASTRA's choice of device is global


def serves(grid: Grid, beam: Beam, device: torch.device) -> bool:
    """Whether ASTRA is installed and can project this geometry on this device: square pixels, straight detector."""
    if importlib.util.find_spec("astra") is None:
        return False
    square = abs(grid.spacing[0] - grid.spacing[1]) <= 1e-6 * grid.spacing[0]
    straight = not (isinstance(beam, FanBeam) and beam.curved)
    if device.type == "cuda":
        return square and isinstance(beam, ParallelBeam)
    return device.type == "cpu" and square and straight


@functools.cache
def _astra() -> Any:
    import astra

    return astra


class AstraProjector:
    """The ray transform by ASTRA's projectors, applied to (batch, pixels) and (batch, rays) tensors where they are.

    Raises:
        ValueError: ASTRA does not serve this geometry on the tensor's device, or CUDA is asked of an ASTRA without it.
        RuntimeError: ASTRA returned without having written a result (it does not always say so itself).
    """

    def __init__(self, grid: Grid, beam: Beam) -> None:
        self.grid, self.beam = grid, beam
        self._cpu: int | None = None
        self._cuda: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, ny * nx) -> (batch, views * detectors)."""
        return self._run(x.reshape(-1, *self.grid.shape), self.beam.shape, forward=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """y (batch, views * detectors) -> (batch, ny * nx)."""
        return self._run(y.reshape(-1, *self.beam.shape), self.grid.shape, forward=False)

    def _run(self, source: Tensor, shape: tuple[int, int], forward: bool) -> Tensor:
        if not serves(self.grid, self.beam, source.device):
            raise ValueError(f"ASTRA does not project {type(self.beam).__name__} with these pixels on {source.device}")
        given = source.detach().to(torch.float32).contiguous()
        out = torch.zeros((given.shape[0], *shape), dtype=torch.float32, device=source.device)  # zeros: see `_written`
        (self._on_cuda if source.device.type == "cuda" else self._on_cpu)(given, out, forward)
        self._written(given, out, forward)
        return out.reshape(out.shape[0], -1).to(source.dtype)

    def _on_cpu(self, given: Tensor, out: Tensor, forward: bool) -> None:
        astra = _astra()
        if self._cpu is None:
            kind = "line_fanflat" if isinstance(self.beam, FanBeam) else "linear"
            self._cpu = astra.create_projector(kind, self._projection_geometry(), self._volume_geometry())
        make = astra.projector.direct_FP if forward else astra.projector.direct_BP
        for item, result in zip(given, out, strict=True):
            # ASTRA's first row is the largest y, ours the smallest: its image is ours with the y axis turned, as is its geometry
            make(self._cpu, item, out=result)

    def _on_cuda(self, given: Tensor, out: Tensor, forward: bool) -> None:
        astra = _astra()
        if not astra.use_cuda():
            raise ValueError("the tensor is on CUDA, but this ASTRA cannot use CUDA")
        batch = given.shape[0]
        with _lock, torch.cuda.device(given.device):
            if batch not in self._cuda:
                self._cuda[batch] = self._stacked(batch)
            torch.cuda.current_stream().synchronize()  # ASTRA runs on streams of its own and does not wait for ours
            astra.set_gpu_index(given.device.index or 0)
            if forward:
                astra.projector3d.direct_FP(self._cuda[batch], given, out=out)
            else:
                astra.projector3d.direct_BP(self._cuda[batch], given, out=out)
                out *= self.grid.spacing[0] ** 2 / self.beam.pitch  # measured against the matrix in the gpu tests

    def _vectors(self) -> np.ndarray:
        """Rays (or source), detector centre and detector step of each view, with y turned."""
        theta = np.asarray(self.beam.angles)
        c, s = np.cos(theta), -np.sin(theta)
        e, d = np.stack([c, s], 1), np.stack([np.sin(theta) * -1, -np.cos(theta)], 1)
        pitch, offset = self.beam.pitch, self.beam.offset
        if isinstance(self.beam, FanBeam):
            return np.hstack([-self.beam.source_origin * d, self.beam.origin_detector * d + offset * e, pitch * e])
        return np.hstack([d, offset * e, pitch * e])

    def _volume_geometry(self) -> Any:
        (ny, nx), (dy, dx) = self.grid.shape, self.grid.spacing
        return _astra().create_vol_geom(ny, nx, -nx * dx / 2, nx * dx / 2, -ny * dy / 2, ny * dy / 2)

    def _projection_geometry(self) -> Any:
        kind = "fanflat_vec" if isinstance(self.beam, FanBeam) else "parallel_vec"
        return _astra().create_proj_geom(kind, self.beam.detectors, self._vectors())

    def _stacked(self, batch: int) -> int:
        """Parallel slices as one volume: rays run within a slice, so each detector row sees its own slice only."""
        astra = _astra()
        (ny, nx), (dy, dx) = self.grid.shape, self.grid.spacing
        volume = astra.create_vol_geom(ny, nx, batch, -nx * dx / 2, nx * dx / 2, -ny * dy / 2, ny * dy / 2, -batch / 2, batch / 2)
        flat = self._vectors()
        zero = np.zeros((len(flat), 1))
        up = np.tile([0.0, 0.0, 1.0], (len(flat), 1))
        vectors = np.hstack([flat[:, 0:2], zero, flat[:, 2:4], zero, flat[:, 4:6], zero, up])
        geometry = astra.create_proj_geom("parallel3d_vec", batch, self.beam.detectors, vectors)
        return astra.create_projector("cuda3d", geometry, volume)

    def _written(self, given: Tensor, out: Tensor, forward: bool) -> None:
        """ASTRA 2.5's direct calls can fail without raising; nothing comes from something only where no ray meets the object."""
        if not given.numel() or bool(out.any()) or not bool((given != 0).any()):
            return
        inner = given[..., given.shape[-2] // 4 : -given.shape[-2] // 4, given.shape[-1] // 4 : -given.shape[-1] // 4]
        if bool((inner > 0).any()) and not bool((given < 0).any()):
            raise RuntimeError(f"ASTRA wrote no {'projection' if forward else 'backprojection'}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cpu": None, "_cuda": {}}

    def __del__(self) -> None:
        handles = [h for h in (getattr(self, "_cpu", None), *getattr(self, "_cuda", {}).values()) if h is not None]
        if handles:
            try:
                _astra().projector.delete(handles)
            except Exception:  # noqa: BLE001 - the interpreter may be closing
                return
