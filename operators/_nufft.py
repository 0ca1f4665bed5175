"""The non-uniform FFT: plans kept in the process, on finufft (CPU) or cufinufft (CUDA). The only file that imports them."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators.geometry import Trajectory

_FINE = 1.75  # fine grid over image: 4 times faster than 2 at 256 pixels; 1.25 amplifies rounding to an adjoint gap of 2e-6
_PLANS = 8  # transforms kept ready
_MISSING = "non-Cartesian MRI needs {0}: pip install {0}"


def check_installed() -> None:
    """Raise ValueError, saying what to install, where no such library is."""
    if find_spec("finufft") is None and find_spec("cufinufft") is None:
        raise ValueError(_MISSING.format("finufft"))


def _library(device: torch.device) -> Any:
    try:
        if device.type == "cuda":
            import cufinufft as library
        else:
            import finufft as library
    except ImportError as error:
        raise ValueError(_MISSING.format("cufinufft" if device.type == "cuda" else "finufft")) from error
    return library


@functools.lru_cache(maxsize=_PLANS)
def plan(
    trajectory: Trajectory, kind: int, coils: int, dtype: torch.dtype, device: str, eps: float, threads: int, double_grid: bool = False
) -> Any:
    """A transform of `coils` images at once, with its points set: type 2 image to samples, type 1 back."""
    where = torch.device(device)
    precision, real = ("complex64", np.float32) if dtype == torch.complex64 else ("complex128", np.float64)
    ways: dict[str, Any] = {"gpu_device_id": where.index or 0}
    if where.type != "cuda":
        ways = {"nthreads": threads, "upsampfac": _FINE}
    modes = tuple(2 * n for n in trajectory.shape) if double_grid else trajectory.shape
    made = _library(where).Plan(kind, modes, coils, eps, -1 if kind == 2 else 1, precision, **ways)
    points = [np.ascontiguousarray(axis) for axis in trajectory.points.T.astype(real)]
    made.setpts(*(torch.from_numpy(axis).to(where) if where.type == "cuda" else axis for axis in points))
    return made


def execute(plan: Any, values: Tensor, out: Tensor) -> None:
    """Run a plan from one contiguous tensor (coils, ...) into another."""
    if out.shape[0] == 1:
        values, out = values[0], out[0]
    if values.device.type == "cuda":
        plan.execute(values, out=out)
    else:
        plan.execute(values.numpy(), out=out.numpy())


@functools.lru_cache(maxsize=_PLANS)
def toeplitz_response(trajectory: Trajectory, device: str, threads: int) -> Tensor:
    """Frequency response of the Toeplitz convolution, real, float64 (2 ny, 2 nx)."""
    ny, nx = trajectory.shape
    transform = plan(trajectory, 1, 1, torch.complex128, device, 1e-9, threads, True)
    ones = torch.ones((1, trajectory.samples), dtype=torch.complex128, device=device)
    kernel = ones.new_empty((1, 2 * ny, 2 * nx))
    execute(transform, ones, kernel)
    kernel[:, 0, :] = kernel[:, :, 0] = 0  # the lags -ny and -nx, which no two pixels have: without them it is Hermitian
    return torch.fft.fft2(torch.fft.ifftshift(kernel[0])).real / (ny * nx)
