"""A check that needs no reference: hold out some measurements, reconstruct from the rest, predict what was held out."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft_med.bundle import Model
from deft_med.pipeline import SAMPLES, STEPS, posed, solve, zeta_of
from deft_med.problem import with_known_noise
from deft_med.simulate import slice_generator
from deft_med.volume import Scan
from operators.coils import LARGEST, calibration_region
from operators.geometry import Cartesian, ThickSlices, Trajectory

SHARE = 0.05
FEW = 8  # views or lines: with fewer held out, chance decides which method predicts them best


def hold_out(scan: Scan, share: float = SHARE, seed: int = 0) -> tuple[Scan, Scan]:
    """(kept, held): a random ``share`` of the measurements taken away, and those.

    CT and lines of k-space are held out view by view and line by line, since neighbours know each other, trajectories in short runs,
    scattered points one by one.
    The centre of k-space, which tells coils and scale, always stays. ValueError when there is too little to hold anything out.
    """
    generator = slice_generator(seed, 0, purpose="hold out")
    acquisition = scan.acquisition
    if isinstance(acquisition, Cartesian):
        gone = _of_mask(acquisition.mask, share, generator)
        return tuple(replace(scan, y=scan.y * part, acquisition=Cartesian.of(part))  # type: ignore[return-value]
                     for part in (acquisition.mask & ~gone, gone))
    if isinstance(acquisition, ThickSlices):
        raise ValueError("thick slices share no rows: what is held out of them cannot be predicted")
    parts: list[tuple[Any, Any]]
    if isinstance(acquisition, Trajectory):
        points = acquisition.points
        gone = _of_trajectory(points, max(acquisition.shape), share, generator)
        parts = [(Trajectory.of(acquisition.shape, points[part]), (..., part)) for part in (~gone, gone)]
    else:
        angles = np.asarray(acquisition.angles)
        gone = np.isin(np.arange(len(angles)), _some(np.arange(len(angles)), share, generator))
        parts = [(replace(acquisition, angles=tuple(angles[part].tolist())), (slice(None), part)) for part in (~gone, gone)]
    noise = np.broadcast_to(scan.noise, scan.y.shape)  # type: ignore[arg-type]
    return tuple(replace(scan, y=scan.y[part], noise=noise[part], acquisition=a,  # type: ignore[return-value]
                         counts=None if scan.counts is None else scan.counts.part(part)) for a, part in parts)


def cross_check(scan: Scan, model: Model | None, methods: Sequence[str], *, share: float = SHARE, steps: int = STEPS,
                samples: int = SAMPLES, estimate: str = "average", seed: int = 0, device: str = "cpu") -> dict:
    """How well each method predicts held-out measurements from the others, over all slices.

    ``error``: RMS of predicted minus measured over RMS of measured; ``sigmas``: the same RMS in standard deviations of the noise,
    1 where nothing but noise is left; ``behind``: error minus that of the best method, ``behind_se`` its standard error over the views,
    lines or points that were held out, the same ones for both (None for a single one; what else changes from scan to scan it does not
    know). Returns {"share", "units": how many of these were held out of a slice, "methods": {name: {"error", "sigmas", "behind",
    "behind_se"}}}.
    """
    kept, held = hold_out(with_known_noise(scan), share, seed)
    noise = np.broadcast_to(held.noise, held.y.shape)  # type: ignore[arg-type]
    misses: dict[str, list[Tensor]] = {method: [] for method in methods}
    sums: dict[str, list[float]] = {method: [0.0] * 3 for method in methods}
    for index in range(len(held.y)):
        problem = posed(kept, index, model, device)
        measured, there = torch.from_numpy(held.y[index]), torch.from_numpy(held.y[index] != 0)
        sigma = problem.deviation(torch.from_numpy(noise[index].copy()))
        for method in methods:
            with torch.no_grad():
                drawn, _ = solve(problem, method, model, steps=steps, samples=samples, seed=seed, index=index, zeta=zeta_of(estimate))
                left = (problem.predict(held.acquisition, drawn.mean(1))[0].cpu() - measured).abs() * there
            parts = 2 if measured.is_complex() else 1
            of = [float((measured.abs() * there).square().sum()), float((left / sigma.expand(measured.shape))[there].square().sum()),
                  parts * int(there.sum())]
            sums[method] = [a + b for a, b in zip(sums[method], of, strict=True)]
            misses[method].append(_by_unit(left.square(), held.acquisition))
    of_unit = {name: torch.cat(parts).double() for name, parts in misses.items()}
    error = {name: math.sqrt(float(each.sum()) / sums[name][0]) for name, each in of_unit.items()}
    best = min(error, key=lambda name: error[name])

    def behind_se(name: str) -> float | None:  # by the delta method: d error = d (sum of squares) / (2 error measured)
        each = (of_unit[name] / error[name] - of_unit[best] / error[best]) / 2
        return float(each.std() * math.sqrt(len(each))) / sums[name][0] if len(each) > 1 else None

    found = {name: {"error": error[name], "sigmas": math.sqrt(sums[name][1] / sums[name][2]), "behind": error[name] - error[best],
                    "behind_se": behind_se(name)} for name in of_unit}
    return {"share": share, "units": units(held), "methods": found}


def _by_unit(values: Tensor, acquisition: Any) -> Tensor:
    """Sums over what knows each other: a view, a line of k-space, a run of a trajectory, the coils of a point."""
    if isinstance(acquisition, Cartesian):
        values, mask = values.sum(0), torch.from_numpy(acquisition.mask)
        if _scattered(acquisition.mask):
            return values[mask]
        return values.sum(0 if mask.any(0).sum() < mask.any(1).sum() else 1)
    if isinstance(acquisition, Trajectory):
        return torch.stack([run.sum() for run in values.sum(0).split(_run_length(max(acquisition.shape)))])
    return values.sum(-1)


def units(scan: Scan) -> int:
    """How many things a scan's measurements are made of that do not know each other: views, lines of k-space, or points."""
    acquisition = scan.acquisition
    if isinstance(acquisition, Cartesian):
        return int(acquisition.samples if _scattered(acquisition.mask) else min(acquisition.mask.any(axis).sum() for axis in (0, 1)))
    return int(acquisition.samples) if isinstance(acquisition, Trajectory) else len(acquisition.angles)  # type: ignore[union-attr]


def _scattered(mask: np.ndarray) -> bool:
    """Whether a pattern is of points, not of whole lines."""
    return bool((mask != np.outer(mask.any(1), mask.any(0))).any())


def _of_mask(mask: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    """The held-out part of a mask: whole lines where it is made of lines, along the axis that holds more of them."""
    rows, columns = mask.any(1), mask.any(0)
    free = mask.copy()
    free[tuple(_centred(part, n) for part, n in zip(calibration_region(torch.from_numpy(mask)), mask.shape, strict=True))] = False
    if _scattered(mask):
        held = np.zeros(mask.size, bool)
        held[_some(np.flatnonzero(free), share, generator)] = True
        return held.reshape(mask.shape)
    axis = 0 if columns.mean() <= rows.mean() else 1
    lines = np.flatnonzero(mask.any(axis) & (free == mask).all(axis))
    held = np.isin(np.arange(mask.shape[1 - axis]), _some(lines, share, generator))
    return mask & np.expand_dims(held, axis)


def _centred(part: slice, n: int) -> slice:
    """What of the full centre tells coils and scale."""
    size = min(part.stop - part.start, LARGEST)
    return slice(n // 2 - size // 2, n // 2 - size // 2 + size)


def _run_length(side: int) -> int:
    return max(1, side // 4)  # samples along a spoke lie closer than the grid's


def _of_trajectory(points: np.ndarray, side: int, share: float, generator: torch.Generator) -> np.ndarray:
    run = np.arange(len(points)) // _run_length(side)
    outside = np.linalg.norm(points, axis=1) > np.pi * 24 / side
    return np.isin(run, _some(np.unique(run[outside]), share, generator)) & outside


def _some(units: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    count = max(1, round(share * len(units)))
    if len(units) < 2:
        raise ValueError("there is nothing to hold out: all measurements belong to the centre")
    return units[torch.randperm(len(units), generator=generator)[:count].numpy()]
