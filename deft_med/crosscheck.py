"""A check that needs no reference: hold out some measurements, reconstruct from the rest, predict what was held out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from deft_med.bundle import Model
from deft_med.pipeline import SAMPLES, STEPS, posed, solve
from deft_med.problem import with_known_noise
from deft_med.simulate import slice_generator, unresolved
from deft_med.volume import Scan
from operators.coils import calibration_region
from operators.geometry import Cartesian, Trajectory

SHARE, LARGEST = 0.05, 32


def hold_out(scan: Scan, share: float = SHARE, seed: int = 0) -> tuple[Scan, Scan]:
    """(kept, held): a random ``share`` of the measurements taken away, and those.

    CT and lines of k-space are held out view by view and line by line, since neighbours know each other, trajectories in short runs,
    scattered points one by one.
    The centre of k-space, which tells coils and scale, always stays. ValueError when there is too little to hold anything out.
    """
    generator = slice_generator(seed, 0, purpose="hold out")
    acquisition = scan.acquisition
    if isinstance(acquisition, Trajectory):
        return _of_trajectory(scan, acquisition, share, generator)
    if isinstance(acquisition, Cartesian):
        mask = acquisition.mask
        rows, columns = mask.any(1), mask.any(0)
        lines = None
        if (mask == np.outer(rows, columns)).all():  # whole lines along the axis that holds more of them
            lines = 0 if columns.mean() <= rows.mean() else 1
        free = mask.copy()
        free[_protected(mask)] = False
        units = free if lines is None else (mask.any(lines) & (free == mask).all(lines))
        held = _some(np.flatnonzero(units), share, generator)
        taken = np.zeros(units.size, bool)
        taken[held] = True
        gone = taken.reshape(mask.shape) if lines is None else np.broadcast_to(np.expand_dims(taken, lines), mask.shape)
        parts = (mask & ~gone, mask & gone)
        return tuple(replace(scan, y=scan.y * part, acquisition=Cartesian.of(part)) for part in parts)  # type: ignore[return-value]
    held = _some(np.arange(len(acquisition.angles)), share, generator)
    out = np.isin(np.arange(len(acquisition.angles)), held)
    return tuple(_views(scan, part) for part in (~out, out))  # type: ignore[return-value]


def cross_check(scan: Scan, model: Model | None, methods: Sequence[str], *, share: float = SHARE, steps: int = STEPS,
                samples: int = SAMPLES, seed: int = 0, device: str = "cpu") -> dict:
    """How well each method predicts held-out measurements from the others, over all slices.

    ``error``: RMS of predicted minus measured over RMS of measured; ``sigmas``: the same RMS in standard deviations of the noise,
    1 where nothing but noise is left. Returns {"share", "methods": {name: {"error", "sigmas"}}}.
    """
    kept, held = hold_out(with_known_noise(scan), share, seed)
    noise = np.broadcast_to(np.asarray(held.noise), held.y.shape)
    sums: dict[str, list[float]] = {}
    for index in range(len(held.y)):
        problem = posed(kept, index, model, device)
        measured, sigma = torch.from_numpy(held.y[index]), torch.from_numpy(noise[index].copy())
        if scan.modality == "CT":
            sigma = unresolved(sigma, max(scan.grid.spacing))
        there = measured.abs() > 0
        for method in methods:
            with torch.no_grad():
                drawn, _ = solve(problem, method, model, steps=steps, samples=samples, seed=seed, index=index)
                left = (problem.predict(held.acquisition, drawn.mean(1))[0].cpu() - measured).abs()[there]
            parts = 2 if measured.is_complex() else 1
            found = [float(left.square().sum()), float(measured.abs()[there].square().sum()),
                     float((left / sigma.expand(measured.shape)[there]).square().sum()), parts * int(there.sum())]
            sums[method] = [a + b for a, b in zip(sums.get(method, [0.0] * 4), found, strict=True)]
    return {"share": share, "methods": {name: {"error": (a / b) ** 0.5, "sigmas": (c / n) ** 0.5} for name, (a, b, c, n) in sums.items()}}


def _protected(mask: np.ndarray) -> tuple[slice, slice]:
    """The part of the full centre that coil maps and scale are taken from, at most 32 points a side."""
    region = calibration_region(torch.from_numpy(mask))
    cut = []
    for part, n in zip(region, mask.shape, strict=True):
        size = min(part.stop - part.start, LARGEST)
        cut.append(slice(n // 2 - size // 2, n // 2 - size // 2 + size))
    return cut[0], cut[1]


def _some(units: np.ndarray, share: float, generator: torch.Generator) -> np.ndarray:
    count = max(1, round(share * len(units)))
    if len(units) < 2:
        raise ValueError("there is nothing to hold out: all measurements belong to the centre")
    return units[torch.randperm(len(units), generator=generator)[:count].numpy()]


def _views(scan: Scan, part: np.ndarray) -> Scan:
    angles = tuple(np.asarray(scan.acquisition.angles)[part].tolist())  # type: ignore[union-attr]
    noise = None if scan.noise is None else np.broadcast_to(scan.noise, scan.y.shape)[:, part]
    return replace(scan, y=scan.y[:, part], noise=noise, acquisition=replace(scan.acquisition, angles=angles))  # type: ignore[type-var]


def _of_trajectory(scan: Scan, trajectory: Trajectory, share: float, generator: torch.Generator) -> tuple[Scan, Scan]:
    points = trajectory.points
    run = np.arange(len(points)) // max(1, max(trajectory.shape) // 4)  # samples along a spoke lie closer than the grid's
    outside = np.linalg.norm(points, axis=1) > np.pi * 24 / max(trajectory.shape)
    out = np.isin(run, _some(np.unique(run[outside]), share, generator)) & outside
    parts = [replace(scan, y=scan.y[..., part], acquisition=Trajectory.of(trajectory.shape, points[part]),
                     noise=None if scan.noise is None else np.broadcast_to(scan.noise, scan.y.shape)[..., part]) for part in (~out, out)]
    return parts[0], parts[1]
