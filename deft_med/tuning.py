"""How the methods of a benchmark are tuned: the same number of settings for each, one sample, tune subjects, chosen by mean PSNR."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from deft_med.errors import UsageError
from deft_med.methods import Entry, parse

PER_STEP = {"dps": ("zeta",)}  # settings that move the image once a step: h stays what it is where they go with 1 / steps


@dataclass(frozen=True)
class Plan:
    """What is tried, as configs/plans/benchmark.yaml says it: by method, up to ``budget`` settings; ``mr`` for ``grids`` where a
    setting means something else there.

    Tuning takes ``slices`` of each tune subject. Slow methods have one slice of ``slow_subjects`` subjects, in tuning and in the report,
    and ``slow_steps`` evaluations at most while they are tuned.
    """

    room: ClassVar[str] = "plans"
    grids: dict[str, tuple[dict[str, float], ...]] = field(default_factory=dict)
    mr: dict[str, tuple[dict[str, float], ...]] = field(default_factory=dict)
    budget: int = 8
    slices: int = 1
    slow_subjects: int = 6
    slow_steps: int = 200

    def __post_init__(self) -> None:
        if long := [name for name, grid in [*self.grids.items(), *self.mr.items()] if not 0 < len(grid) <= self.budget]:
            raise UsageError(f"the same budget for all: {', '.join(long)} must have 1 to {self.budget} settings to try")
        if min(self.slices, self.slow_subjects, self.slow_steps - 1) < 1:
            raise UsageError("slices and slow_subjects are 1 or more, slow_steps 2 or more")


def candidates(method: str, plan: Plan, modality: str = "CT") -> dict[str, dict[str, float]]:
    """Methods to try in place of one, each with its settings; none where nothing is to be tuned, or where the method names a setting.

    All draw one sample; slow ones in ``slow_steps`` evaluations at most.
    """
    entry = parse(method)
    grid = (plan.mr if modality == "MR" else {}).get(entry.name, plan.grids.get(entry.name, ()))
    said = any(key in entry.settings for settings in grid for key in settings)
    if said or entry.count == 0:
        return {}
    fewer = {"steps": float(_steps(entry, plan))} if entry.slow else {}
    return {entry.like(1 if entry.samples else None, {**fewer, **settings}): settings for settings in grid}


def chosen(method: str, tried: Mapping[str, Mapping[str, float]], psnr: Mapping[str, float], plan: Plan) -> dict:
    """What tuning says of a method: its settings, the method that has them (``becomes``), and everything that was tried.

    ``psnr`` is the mean over tune subjects by candidate; one that is not finite loses. ``edge`` names settings whose best value is the
    first or the last that was tried: better ones may lie outside.
    """
    entry = parse(method)
    best = max(tried, key=lambda text: psnr[text] if math.isfinite(psnr[text]) else -math.inf)
    ratio = _steps(entry, plan) / entry.steps if entry.slow else 1.0
    settings = {key: value * ratio if key in PER_STEP.get(entry.name, ()) else value for key, value in tried[best].items()}
    values = {key: sorted({other[key] for other in tried.values()}) for key in tried[best]}
    edge = [key for key, value in tried[best].items() if len(values[key]) > 1 and value in (values[key][0], values[key][-1])]
    return {"settings": settings, "becomes": entry.like(entry.count, settings), "psnr": _finite(psnr[best]), "edge": edge,
            "steps": _steps(entry, plan) if entry.slow else entry.steps,
            "tried": [{**settings, "psnr": _finite(psnr[text])} for text, settings in tried.items()]}


def subject_mean(rows: Iterable[Mapping], subjects: Sequence[str]) -> float:
    """Mean PSNR over subjects, each the mean of its slices; NaN where a slice has none."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["subject"], []).append(math.nan if row["psnr"] is None else row["psnr"])
    if set(found) != set(subjects):
        return math.nan
    return sum(sum(values) / len(values) for values in found.values()) / len(found)


def _steps(entry: Entry, plan: Plan) -> int:
    return min(entry.steps, plan.slow_steps)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
