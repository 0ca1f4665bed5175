"""A survey: methods on the slices of many subjects, record by record in a file that a later run goes on from."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deft_med import lesions
from deft_med.bench import Bench
from deft_med.config import KSpaceProtocol, Protocol, SliceProtocol
from deft_med.methods import parse
from deft_med.problem import Problem
from deft_med.simulate import reconstruction_grid, simulate
from deft_med.study import chosen_places, digest
from deft_med.volume import Volume

DISKS = 5  # at most, in one slice


class Survey:
    """``records`` of all that was asked for; ``asked`` holds the (subject, slice) of the study, ``few`` those that slow methods run on.

    Args:
        listed: images with their subjects (`subjects.entries`), of which the first ``subjects`` take part.
        file: JSON lines. Records of other protocols, seeds, devices and settings stay in it and are not used.
        few: slow methods run on so many slices: the middle ones of as many evenly spaced subjects, or several of each where there are
            fewer subjects.
        tell: takes a line on how far the survey is, and one for every method that a problem does not suit.
    """

    def __init__(self, bench: Bench, listed: list[dict], protocol: Protocol | KSpaceProtocol | SliceProtocol, file: Path, *,
                 subjects: int | None = None, few: int = 6, seed: int = 0, tell: Callable[[str], None] = lambda _: None) -> None:
        self.bench, self.listed, self.protocol, self.file, self.seed, self.tell = bench, listed, protocol, file, seed, tell
        self.subjects = sorted({e["subject"] for e in listed})[:subjects]
        part = min(few, len(self.subjects))
        places = np.linspace(0, len(self.subjects) - 1, part).round().astype(int)
        self.chosen = {self.subjects[k]: few // part + (n < few % part) for n, k in enumerate(places)}  # subject -> slices
        self.records: list[dict] = []
        self.asked: set[tuple[str, int]] = set()
        self.few: set[tuple[str, int]] = set()
        self._told: set[str] = set()

    def measure(self, methods: Sequence[str], slow: Sequence[str], slices: int) -> None:
        """``methods`` on up to ``slices`` of every subject, ``slow`` ones on a few of those."""
        everything = list(dict.fromkeys([*methods, *slow]))
        settings, run = {m: self.bench.settings(m) for m in everything}, self._run
        self.records = self._earlier(self.file, settings)
        have = {(r["subject"], r["slice"], r["method"]) for r in self.records}
        begun, made = time.monotonic(), 0.0
        for number, subject in enumerate(self.subjects):
            own = list(chosen_places([e for e in self.listed if e["subject"] == subject], slices, self.protocol.modality))
            ranges: dict[int, float] = {}
            for key, stack, k in own:
                middle = key in {own[place][0] for place in _spread(len(own), self.chosen.get(subject, 0))}
                self.asked.add((subject, key))
                self.few |= {(subject, key)} if middle else set()
                missing = [m for m in (everything if middle else methods) if (subject, key, m) not in have]
                if not missing:
                    continue
                scan = simulate(_slice(stack, k), self.protocol, seed=digest(self.seed, subject, key))
                if scan.modality == "MR" and id(stack) not in ranges:
                    ranges[id(stack)] = brightest(stack, self.protocol.grid)
                for record in self.bench.measure(scan, missing, self._once, brightest=ranges.get(id(stack))):
                    record |= {"subject": subject, "slice": key, **run, "settings": settings[record["method"]]}
                    self.records.append(record)
                    _add(self.file, record)
                made += sum(map(self.bench.effort, missing))
            later = self.subjects[number + 1:]
            left = len(later) * slices * sum(map(self.bench.effort, methods))
            left += sum(self.chosen.get(subject, 0) for subject in later) * sum(map(self.bench.effort, slow))
            minutes = (time.monotonic() - begun) / made * left / 60 if made else 0.0
            self.tell(f"{number + 1}/{len(self.subjects)} subjects, about {minutes:.0f} min left")

    def lesions(self, methods: Sequence[str], slices: int, count: int, file: Path) -> list[dict]:
        """Records of `lesions.study` for ``methods``: ``count`` disks, shared alike among the subjects as far as they have room in
        ``slices`` of each. Disks and noise are the same for all methods; ``file`` is gone on from."""
        methods = sorted(methods, key=lambda m: -self.bench.count(parse(m)))  # averages share the samples of the largest
        settings, run, of = {m: self.bench.settings(m) for m in methods}, self._run, _Runner(self.bench)
        earlier, found, made = self._earlier(file, settings), [], 0
        for number, subject in enumerate(self.subjects):
            wanted = math.ceil((count - made) / (len(self.subjects) - number))
            for key, stack, k in chosen_places([e for e in self.listed if e["subject"] == subject], slices, self.protocol.modality):
                if wanted <= 0:
                    break
                put = min(DISKS, wanted)
                own = [r for r in earlier if (r["subject"], r["slice"], r["asked"]) == (subject, key, put)]
                have = {(subject, key, r["method"], r["contrast"]) for r in own}
                for record in lesions.study(of, [(subject, key, _slice(stack, k))], self.protocol, methods, count=put, seed=self.seed,
                                            have=have, device=self.bench.device):
                    record |= {"asked": put, **run, "settings": settings[record["method"]]}
                    own.append(record)
                    _add(file, record)
                found += own
                placed = len(own[0]["amplitudes"]) if own else 0
                wanted, made = wanted - placed, made + placed
            self.tell(f"lesions: {made} of {count} disks, {number + 1}/{len(self.subjects)} subjects")
        if made < count:
            self.tell(f"lesions: there was room for {made} of {count} disks, {DISKS} a slice: say more --slices or --subjects")
        return found

    @property
    def _run(self) -> dict:
        return {"protocol": self.protocol.name, "seed": self.seed, "device": self.bench.device.type}

    def _earlier(self, file: Path, settings: dict[str, dict]) -> list[dict]:
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        return [r for r in map(json.loads, lines) if r.items() >= self._run.items() and r["settings"] == settings.get(r["method"])]

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.tell(line)


class _Runner:
    """A bench's image of a problem by a method; samples of one problem are kept until the next one comes."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.kept = bench, dict[Any, Any]()
        self.problem: Problem | None = None

    def __call__(self, method: str, problem: Problem) -> Tensor:
        if problem is not self.problem:
            self.problem, self.kept = problem, {}
        return self.bench.run(method, problem, self.kept)[0]


def _add(file: Path, record: dict) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def brightest(volume: Volume, size: int) -> float:
    """The maximum of an MR study's reference volume: of the area means of its slices on the reconstruction grid."""
    return float(volume.resample_to(reconstruction_grid(volume, size)).data.max())


def _spread(length: int, count: int) -> set[int]:
    """Up to ``count`` evenly spaced places of a list; one is its middle."""
    return {length // 2} if count == 1 and length else set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist())


def _slice(volume: Volume, k: int) -> Volume:
    return Volume(volume.data[k:k + 1], volume.affine, volume.unit)
