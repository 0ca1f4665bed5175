"""Low-contrast detectability in CT: disks put into images before they are measured, and what is left of them in a reconstruction.

One number speaks everywhere: the amplitude of a disk at a place p in an image e, in HU,

    a(p, e) = <t, e> / <t, t>,     t the disk at p as the grid shows it, every pixel the share of it that the disk covers,

the non-prewhitening matched filter scaled so that a disk of c HU, seen perfectly, answers c. With e the reconstruction less the
reference without disks, a(present) - a(absent) over c is the contrast recovered, d' the distance of the two scores in units of their
standard deviation, and an amplitude above `FALSE` where nothing was put is a false disk. Background and place are known to this
observer: it ranks methods and does not replace readers.

The two scans of a pair share their noise. Measurements are linear in attenuation, so the scan with disks is the scan without them
plus the simulator's own line integrals of the disks: what `simulate` would make of the changed image, but for the noise level, which
there would follow the image (Gaussian: by 1e-4 and less; photon counts: what 200 HU over 8 mm takes from a ray, 3 % of its counts).
Several disks share a slice to save runs, `APART` diameters from each other.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from deft_med.config import Protocol
from deft_med.errors import UsageError
from deft_med.metrics import body_mask
from deft_med.problem import Problem, pose
from deft_med.simulate import measured_by, reconstruction_grid, simulate
from deft_med.study import digest
from deft_med.volume import Scan, Volume
from operators.ct import MU_WATER
from operators.geometry import Grid

DIAMETER = 8.0  # mm
CONTRASTS = (20.0, 60.0, 200.0)  # HU
TISSUE = (-50.0, 150.0)  # HU of soft tissue: fat, lung and bone are outside
MARGIN = 2.0  # mm of soft tissue around a disk
APART = 4.0  # diameters between the centres of two disks of a slice
FALSE = 30.0  # HU: half the amplitude of a disk of 60 HU
FINE = 16  # lines a pixel that a disk's area is summed over

Run = Callable[[str, Problem], Tensor]  # (method, problem of one slice) -> u (1, C, ny, nx)
Source = tuple[str, int, Volume]  # subject, number of the slice, one slice in HU


def disk(shape: Sequence[int], spacing: Sequence[float], centre: Sequence[float], diameter: float = DIAMETER) -> np.ndarray:
    """The share of every pixel (row, column) that a disk covers, 0 to 1: also the area mean of the same disk on a finer grid.

    ``centre`` = (y, x) in mm from the corner of the field of view, which grids of any pixel size share; ``spacing`` = (dy, dx) in mm.
    """
    (rows, columns), (dy, dx), (y, x) = shape, spacing, centre
    depth = (np.arange(rows * FINE) + 0.5) / FINE * dy - y
    half = np.sqrt(np.maximum((diameter / 2) ** 2 - depth**2, 0))[:, None]  # of the chord that a line cuts out of the disk
    edges = np.arange(columns + 1) * dx - x
    shared = np.clip(np.minimum(edges[1:], half) - np.maximum(edges[:-1], -half), 0, None) / dx
    return shared.reshape(rows, FINE, columns).mean(1)


def insert(volume: Volume, places: Iterable[Sequence[float]], contrast: float, diameter: float = DIAMETER) -> Volume:
    """The volume with disks of ``contrast`` HU at ``places`` (y, x) in mm, in every slice, edges weighted by area."""
    return volume.with_data(volume.data + contrast * _disks(volume, places, diameter))


def _disks(volume: Volume, places: Iterable[Sequence[float]], diameter: float) -> np.ndarray:
    total = np.zeros(volume.shape[1:])
    for place in places:
        total += disk(volume.shape[1:], volume.spacing[1:], place, diameter)
    return total


def measured_with(scan: Scan, volume: Volume, places: Iterable[Sequence[float]], contrast: float, diameter: float = DIAMETER) -> Scan:
    """``simulate``'s scan of ``volume`` (one slice, line integrals) with disks put in before the measurement, the noise unchanged."""
    grid = Grid(shape=volume.shape[1:], spacing=volume.spacing[1:])
    operator = measured_by(grid, scan.acquisition, fine=grid.shape != scan.grid.shape)
    lines = operator(torch.from_numpy(_disks(volume, places, diameter) * (MU_WATER * contrast / 1000)).float()[None])
    made = np.isfinite(np.broadcast_to(0.0 if scan.noise is None else scan.noise, scan.y.shape))
    assert scan.reference is not None
    return replace(scan, y=scan.y + np.where(made, lines.numpy(), 0), reference=insert(scan.reference, places, contrast, diameter))


def room(image: np.ndarray, spacing: Sequence[float], diameter: float = DIAMETER) -> np.ndarray:
    """Pixels (row, column) of an image in HU where a disk's centre may lie: it and a margin around it are soft tissue of the body."""
    low, high = TISSUE
    soft = np.pad((image >= low) & (image <= high) & body_mask(image), 1)
    depth = ndimage.distance_transform_edt(soft, sampling=tuple(spacing))[1:-1, 1:-1]
    return depth > diameter / 2 + MARGIN + math.hypot(*spacing)  # a centre anywhere in its pixel, a neighbour's whole area


def positions(image: np.ndarray, spacing: Sequence[float], *, count: int, seed: int, diameter: float = DIAMETER) -> np.ndarray:
    """Up to ``count`` random places (n, 2), (y, x) in mm, in the ``room`` of an image, `APART` diameters from each other.

    Fewer where there is no more room; the first ones do not depend on ``count``.
    """
    state = np.random.default_rng([seed, *b"lesions"])
    allowed = np.argwhere(room(image, spacing, diameter))
    found: list[np.ndarray] = []
    for pixel, shift in zip(state.permutation(allowed), state.random((len(allowed), 2)), strict=True):
        place = (pixel + shift) * np.asarray(spacing)
        if len(found) < count and all(np.hypot(*(place - other)) > APART * diameter for other in found):
            found.append(place)
    return np.array(found).reshape(-1, 2)


def amplitudes(error: np.ndarray, spacing: Sequence[float], places: Iterable[Sequence[float]], diameter: float = DIAMETER) -> np.ndarray:
    """Amplitude (n,) of a disk at every place of an image (row, column), in the image's unit."""
    templates = [disk(error.shape, spacing, place, diameter) for place in places]
    return np.array([(t * error).sum() / (t * t).sum() for t in templates])


def response(error: np.ndarray, spacing: Sequence[float], diameter: float = DIAMETER) -> np.ndarray:
    """Amplitude of a disk centred on every pixel (row, column); outside the image there is nothing."""
    shape = [2 * math.ceil(diameter / 2 / step) + 1 for step in spacing]
    t = disk(shape, spacing, [n * step / 2 for n, step in zip(shape, spacing, strict=True)], diameter)
    return ndimage.correlate(error, t / (t * t).sum(), mode="constant")


def false_disks(error: np.ndarray, allowed: np.ndarray, spacing: Sequence[float], *, threshold: float = FALSE,
                diameter: float = DIAMETER) -> int:
    """How many disks brighter than ``threshold`` an image (row, column) shows at the pixels ``allowed``, a diameter or more apart."""
    answer = np.where(allowed, response(error, spacing, diameter), -np.inf)
    places = np.argwhere(answer > threshold)
    found: list[np.ndarray] = []
    for index in np.argsort(-answer[tuple(places.T)], kind="stable"):
        place = places[index] * np.asarray(spacing)
        if all(np.hypot(*(place - other)) >= diameter for other in found):
            found.append(place)
    return len(found)


def detectability(present: np.ndarray, absent: np.ndarray) -> float:
    """d' = (mean present - mean absent) / sqrt((var present + var absent) / 2) of scores (n,); NaN for fewer than two, or no spread."""
    if len(present) < 2 or len(absent) < 2:
        return math.nan
    spread = math.sqrt((np.var(present, ddof=1) + np.var(absent, ddof=1)) / 2)
    return float(np.mean(present) - np.mean(absent)) / spread if spread > 0 else math.nan


def check(protocol: object) -> Protocol:
    """The protocol itself; UsageError for one that does not measure line integrals."""
    if not isinstance(protocol, Protocol) or protocol.noise.counts:
        raise UsageError("lesions are put into line integrals: choose a CT protocol such as ct_sparse60, one that keeps no counts")
    return protocol


def study(run: Run, sources: Iterable[Source], protocol: object, methods: Sequence[str], *, contrasts: Sequence[float] = CONTRASTS,
          count: int = 5, seed: int = 0, have: Collection[tuple] = (), device: str | torch.device = "cpu") -> Iterator[dict]:
    """Records of every method on every slice without disks (contrast 0) and with up to ``count`` of every contrast, as they are made.

    ``have`` holds (subject, slice, method, contrast) that need not be made again. A record has ``subject``, ``slice``, ``method``,
    ``contrast``, ``amplitudes`` at the places of the disks, in HU; without disks also ``false`` and ``area_mm2``, where they were looked
    for. Noise and places come from ``seed``, subject and slice. All methods see one ``problem`` before the next one is posed. Raises
    UsageError for a protocol that does not measure line integrals.
    """
    protocol = check(protocol)
    for subject, key, volume in sources:
        wanted = {c: missing for c in (0.0, *contrasts) if (missing := [m for m in methods if (subject, key, m, c) not in have])}
        own = digest(seed, subject, key)
        seen = volume.resample_to(reconstruction_grid(volume, protocol.grid))  # the reference, where there is soft tissue
        reference, spacing = seen.data[0], seen.spacing[1:]
        places, allowed = positions(reference, spacing, count=count, seed=own), room(reference, spacing)
        if not wanted or not len(places):
            continue
        absent = simulate(volume, protocol, seed=own)
        for contrast, missing in wanted.items():
            problem = pose(measured_with(absent, volume, places, contrast) if contrast else absent, device=device)
            for method in missing:
                with torch.no_grad():
                    error = problem.picture(run(method, problem))[0] - reference
                record = {"subject": subject, "slice": key, "method": method, "contrast": contrast,
                          "amplitudes": amplitudes(error, spacing, places).tolist()}
                if not contrast:
                    record |= {"false": false_disks(error, allowed, spacing), "area_mm2": float(allowed.sum() * math.prod(spacing))}
                yield record


def summary(records: Iterable[dict], reference: str | None = None) -> list[dict]:
    """One row per method and contrast, in the order in which they came.

    ``recovered``: mean over disks of (a present - a absent) / contrast; ``detectability``: d'; ``_se``: their standard errors, by leaving
    out one subject at a time (jackknife), for disks of one subject share its noise and its anatomy; NaN for a single subject.
    ``false_per_slice`` and ``false_per_1000_mm2``; ``disks``, ``slices``, ``subjects``: how many. With a ``reference`` method
    ``recovered_minus`` and ``detectability_minus``: the method less the reference on the disks that both have, with ``_se``.
    """
    found: dict[tuple, dict[tuple, dict]] = {}
    for record in records:
        found.setdefault((record["method"], record["contrast"]), {})[record["subject"], record["slice"]] = record
    pairs = {}
    for (method, contrast), of in found.items():
        without = found.get((method, 0.0), {})
        both = {k: np.array([r["amplitudes"], without[k]["amplitudes"]]) for k, r in of.items() if k in without}
        if contrast and both:
            pairs[method, contrast] = both
    rows = []
    for (method, contrast), own in pairs.items():
        without = found[method, 0.0]
        false = sum(r["false"] for r in without.values())
        row = {"method": method, "contrast": contrast, "disks": sum(scores.shape[1] for scores in own.values()), "slices": len(own),
               "subjects": len({subject for subject, _ in own})}
        for name, measure in (("recovered", lambda both, c=contrast: float(np.mean(both[0] - both[1])) / c),
                              ("detectability", lambda both: detectability(*both))):
            row[name], row[f"{name}_se"] = _jackknife(measure, own)
            if reference is not None and method != reference and (reference, contrast) in pairs:
                row[f"{name}_minus"], row[f"{name}_minus_se"] = _jackknife(measure, own, pairs[reference, contrast])
        rows.append(row | {"false_per_slice": false / len(without),
                           "false_per_1000_mm2": 1000 * false / sum(r["area_mm2"] for r in without.values())})
    return rows


def _jackknife(measure: Callable[[np.ndarray], float], own: dict[tuple, np.ndarray],
               other: dict[tuple, np.ndarray] | None = None) -> tuple[float, float]:
    """A measure of scores (present or absent, disk), or its difference from the other ones' on the same slices, and its standard error:
    sqrt((n - 1) / n sum (left out - their mean)^2) with one of n subjects left out at a time (Efron and Stein, Ann. Stat. 9(3), 1981)."""
    keys = [key for key in own if other is None or key in other]

    def value(chosen: list[tuple]) -> float:
        if not chosen:
            return math.nan
        made, *less = (measure(np.concatenate([scores[key] for key in chosen], axis=1)) for scores in (own, other) if scores is not None)
        return made - sum(less)

    subjects = sorted({subject for subject, _ in keys})
    left = np.array([value([key for key in keys if key[0] != subject]) for subject in subjects])
    return value(keys), math.sqrt((len(left) - 1) * left.var()) if len(left) > 1 else math.nan


def table(rows: Sequence[dict]) -> str:
    """Markdown of a ``summary``: a line per method; below them the differences from a reference, where there is one."""
    contrasts = sorted({r["contrast"] for r in rows})
    most = max(rows, key=lambda r: r["disks"], default={"disks": 0, "slices": 0, "subjects": 0})
    heads = [h for c in contrasts for h in (f"{c:g} HU: recovered", "d'")]
    lines = [f"n = {most['disks']} disks of {DIAMETER:g} mm in {most['slices']} slices of {most['subjects']} subjects, ± standard error "
             f"over subjects; false: places above {FALSE:g} HU without disks", "",
             f"| method | {' | '.join(heads)} | false / slice | false / 1000 mm² |", "|---" * (len(heads) + 3) + "|"]
    methods = dict.fromkeys(r["method"] for r in rows)

    def cells(of: dict[float, dict], suffix: str, sign: str = "") -> str:
        return " | ".join(f"{of[c][key + suffix]:{sign}.{digits}f} ± {of[c][key + suffix + '_se']:.{digits}f}"
                          if key + suffix in of.get(c, {}) else "-"
                          for c in contrasts for key, digits in (("recovered", 2), ("detectability", 1)))

    by_method = {method: {r["contrast"]: r for r in rows if r["method"] == method} for method in methods}
    for method, of in by_method.items():
        false = next(iter(of.values()))
        lines.append(f"| {method} | {cells(of, '')} | {false['false_per_slice']:.1f} | {false['false_per_1000_mm2']:.2f} |")
    compared = [method for method, of in by_method.items() if any("recovered_minus" in r for r in of.values())]
    if compared:
        reference = next(method for method in methods if method not in compared)
        lines += ["", f"Difference from {reference} on the same disks, ± standard error over subjects:", "",
                  f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|",
                  *(f"| {method} | {cells(by_method[method], '_minus', '+')} |" for method in compared)]
    return "\n".join(lines) + "\n"
