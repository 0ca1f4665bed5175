"""A check that needs no reference: hold out some measurements, reconstruct from the rest, predict what was held out."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deft_med.bundle import Model
from deft_med.pipeline import SAMPLES, STEPS, posed, solve, zeta_of
from deft_med.problem import with_known_noise
from deft_med.simulate import slice_generator
from deft_med.volume import Scan
from operators.coils import LARGEST, calibration_region
from operators.geometry import Cartesian, ThickSlices, Trajectory

SHARE = 0.05
FEW = 8  # units: with fewer held out, chance decides which method predicts them best


def hold_out(scan: Scan, share: float = SHARE, seed: int = 0) -> tuple[Scan, Scan, np.ndarray]:
    """(kept, held, unit): a random ``share`` of the measurements taken away, those, and the unit that each of them belongs to.

    Units do not know each other and are taken whole: views (unit (views, 1)), lines or, where samples are scattered, points of k-space
    (unit (ny, nx), -1 where nothing was taken), runs of a trajectory (unit (samples,)); they are numbered from 0 and the same in every
    slice. The centre of k-space, which tells coils and scale, always stays. ValueError when there is too little to hold anything out.
    """
    generator = slice_generator(seed, 0, purpose="hold out")
    acquisition = scan.acquisition
    if isinstance(acquisition, Cartesian):
        unit = _of_mask(acquisition.mask, share, generator)
        kept, held = (replace(scan, y=scan.y * part, acquisition=Cartesian.of(part)) for part in (acquisition.mask & (unit < 0), unit >= 0))
        return kept, held, unit
    if isinstance(acquisition, ThickSlices):
        raise ValueError("thick slices share no rows: what is held out of them cannot be predicted")
    parts: list[tuple[Any, Any]]
    if isinstance(acquisition, Trajectory):
        points = acquisition.points
        of = _of_trajectory(points, max(acquisition.shape), share, generator)
        unit = of[of >= 0]
        parts = [(Trajectory.of(acquisition.shape, points[part]), (..., part)) for part in (of < 0, of >= 0)]
    else:
        angles = np.asarray(acquisition.angles)
        of = _numbered(np.arange(len(angles)), _some(np.arange(len(angles)), share, generator))
        unit = of[of >= 0][:, None]
        parts = [(replace(acquisition, angles=tuple(angles[part].tolist())), (slice(None), part)) for part in (of < 0, of >= 0)]
    noise = np.broadcast_to(scan.noise, scan.y.shape)  # type: ignore[arg-type]
    kept, held = (replace(scan, y=scan.y[part], noise=noise[part], acquisition=a,
                          counts=None if scan.counts is None else scan.counts.part(part)) for a, part in parts)
    return kept, held, unit


def cross_check(scan: Scan, model: Model | None, methods: Sequence[str], *, share: float = SHARE, steps: int = STEPS,
                samples: int = SAMPLES, estimate: str = "average", seed: int = 0, device: str = "cpu") -> dict:
    """How well each method predicts held-out measurements from the others, over all slices.

    ``error``: RMS of predicted minus measured over RMS of measured; ``sigmas``: the same RMS in standard deviations of the noise,
    1 where nothing but noise is left; ``behind``: error minus that of the best method, ``behind_se`` its standard error over the units
    that were held out, the same ones for both (None for fewer than FEW; what else changes from scan to scan it does not know). Returns
    {"share", "units": how many were held out, "methods": {name: {"error", "sigmas", "behind", "behind_se"}}}.
    """
    kept, held, unit = hold_out(with_known_noise(scan), share, seed)
    noise = np.broadcast_to(held.noise, held.y.shape)  # type: ignore[arg-type]
    misses: dict[str, Any] = dict.fromkeys(methods, 0.0)
    misfit: dict[str, float] = dict.fromkeys(methods, 0.0)
    power, number = 0.0, 0
    for index in range(len(held.y)):
        problem = posed(kept, index, model, device)
        measured, there = torch.from_numpy(held.y[index]), torch.from_numpy(held.y[index] != 0)
        sigma = problem.deviation(torch.from_numpy(noise[index].copy())).expand(measured.shape)
        power += float((measured.abs() * there).square().sum())
        number += (2 if measured.is_complex() else 1) * int(there.sum())
        for method in methods:
            with torch.no_grad():
                drawn, _ = solve(problem, method, model, steps=steps, samples=samples, seed=seed, index=kept.first + index,
                                 zeta=zeta_of(estimate))
                left = (problem.predict(held.acquisition, drawn.mean(1))[0].cpu() - measured).abs() * there
            misfit[method] += float((left / sigma)[there].square().sum())
            misses[method] = misses[method] + _by_unit(left.square().double().numpy(), unit)
    error = {name: math.sqrt(float(each.sum()) / power) for name, each in misses.items()}
    best, count = min(error, key=lambda name: error[name]), int(unit.max()) + 1

    def behind_se(name: str) -> float | None:  # by the delta method: d error = d (sum of squares) / (2 error measured)
        each = (misses[name] / error[name] - misses[best] / error[best]) / 2
        return float(each.std(ddof=1) * math.sqrt(count)) / power if count >= FEW else None

    found = {name: {"error": error[name], "sigmas": math.sqrt(misfit[name] / number), "behind": error[name] - error[best],
                    "behind_se": behind_se(name)} for name in misses}
    return {"share": share, "units": count, "methods": found}


def _by_unit(squares: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Sums of squares (..., the axes of unit) over coils and over what makes a unit."""
    squares = squares.reshape(-1, *squares.shape[squares.ndim - unit.ndim:]).sum(0)
    unit = np.broadcast_to(unit, squares.shape)
    return np.bincount(unit[unit >= 0], squares[unit >= 0])


def _of_mask(mask: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    """The held-out units of a mask: whole lines where it is made of lines, along the axis that holds more of them."""
    rows, columns = mask.any(1), mask.any(0)
    free = mask.copy()
    free[tuple(_centred(part, n) for part, n in zip(calibration_region(torch.from_numpy(mask)), mask.shape, strict=True))] = False
    if (mask != np.outer(rows, columns)).any():
        return _numbered(np.arange(mask.size), _some(np.flatnonzero(free), share, generator)).reshape(mask.shape)
    axis = 0 if columns.mean() <= rows.mean() else 1
    lines = np.flatnonzero(mask.any(axis) & (free == mask).all(axis))
    return np.where(mask, np.expand_dims(_numbered(np.arange(mask.shape[1 - axis]), _some(lines, share, generator)), axis), -1)


def _centred(part: slice, n: int) -> slice:
    """What of the full centre tells coils and scale."""
    size = min(part.stop - part.start, LARGEST)
    return slice(n // 2 - size // 2, n // 2 - size // 2 + size)


def _run_length(side: int) -> int:
    return max(1, side // 4)  # samples along a spoke lie closer than the grid's


def _of_trajectory(points: np.ndarray, side: int, share: float, generator: torch.Generator) -> np.ndarray:
    run = np.arange(len(points)) // max(1, side // 4)  # samples along a spoke lie closer than the grid's
    outside = np.linalg.norm(points, axis=1) > np.pi * 24 / side
    return np.where(outside, _numbered(run, _some(np.unique(run[outside]), share, generator)), -1)


def _some(units: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    count = max(1, round(share * len(units)))
    if len(units) < 2:
        raise ValueError("there is nothing to hold out: all measurements belong to the centre")
    return units[torch.randperm(len(units), generator=generator)[:count].numpy()]


def _numbered(of: np.ndarray, some: np.ndarray) -> np.ndarray:
    """For each place that belongs to ``of`` the number of that among ``some``; -1 for what is not."""
    some = np.sort(some)
    place = np.searchsorted(some, of).clip(max=len(some) - 1)
    return np.where(some[place] == of, place, -1)
