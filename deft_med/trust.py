"""How far a result may be trusted: its interval, its chi2 against the model's card, and what the prior changed of the classical inverse."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import bdtr, ndtri  # scipy.stats would take seconds to load

from deft_med.card import ALL, Calibration, Card
from deft_med.metrics import LEVEL, MASKS, coverage, reach
from deft_med.volume import Volume

REGIONS = {"CT": "body", "MR": "head"}
DOUBTFUL = 2.0  # chi2 that samples of no sound slice reach
SMOOTHED = 3.0  # the same of means and regularised images: where a slice shows nothing but noise, theirs reaches 2.6
DIRECT = ("fbp", "zero-filled")  # one formula and no fit: they need not meet the measurements
GROSS = 5.0  # deviations of noise above the card's limit: one slice is enough to fail
PEOPLE = 3  # tune subjects at least behind a limit of chi2: one says nothing of others
SELDOM = 0.01  # the share of slices that may lie above a 99th percentile, and how often a sound run may fail the check


def interval(volume: Volume, std: Volume, k: int, card: Card, protocol: str | None, reference: Volume | None = None) -> tuple[Volume, dict]:
    """Half-width of the interval volume +- half-width per pixel, in the unit of the scan, and what it is worth.

    factor t_{k-1} sqrt(1 + 1/k) std, with the factor that the card has for the protocol, or for all; without one it is 1 and
    ``calibrated_on`` is None. ``coverage``: the share of the body (MR: head) whose reference it holds, where there is a reference.
    """
    name, found = card.calibrated(protocol)
    level, factor = (LEVEL, 1.0) if found is None else (found.level, found.factor)
    width = factor * reach(k, level)
    made: dict[str, Any] = {"level": level, "half_width_in_std": width, "factor": factor, "samples": k, "calibrated_on": name or None}
    if found is not None:
        made |= {"calibrated_with_samples": found.samples, "coverage_on_tune_subjects": found.coverage}
    if reference is not None:
        held = coverage(volume.data, std.data, k, reference.data, level, MASKS[card.modality](reference.data), factor)
        made["coverage"] = None if math.isnan(held) else held
    return Volume(width * std.data, std.affine, std.unit), made


def worth(made: dict) -> str:
    """What an `interval` is worth, in words."""
    if made["calibrated_on"] is None:
        return "not calibrated"
    on = "several other protocols" if made["calibrated_on"] == ALL else made["calibrated_on"]
    other = "" if made["samples"] == made["calibrated_with_samples"] else f", with {made['calibrated_with_samples']} samples"
    return f"calibrated on {on}{other}"


def judge(chi2: Sequence[float], of: str, found: Calibration | None = None, deviation: float = 0.0, first: int = 1) -> dict:
    """The chi2 of what a method drew, slice by slice, against the card's 99th percentile for this very protocol.

    Consistency steps may hold that below 1: the limit is never lower than what a true posterior sample stays below in 99 of 100
    slices, 1 + 2.33 ``deviation`` with deviation sqrt(2 / M) of a slice's M measurements. Where no card knows (``found`` is None:
    measured data, another protocol; or of fewer than PEOPLE subjects) the limit is DOUBTFUL, of what is no sample SMOOTHED.

    ``of``: "samples", "mean", or the name of a classical method; `DIRECT` ones, which need not meet the data, cannot fail.
    Slices count from ``first``. Returns {"chi2", "of", "first", "limit", "because": where the limit is from, "above": the slices above it,
    "check": "passed", "failed" or "not checked"}. A check fails where more slices are above than 1 in 100 is by chance (in one sound run
    of 100), or where one is above the card's limit by more than GROSS deviations.
    """
    limit = gross = DOUBTFUL if of == "samples" else SMOOTHED
    because = "which no sound image reaches" + (": the model's card knows nothing nearer" if of == "samples" else "")
    if found is not None and found.subjects >= PEOPLE:
        limit = max(found.chi2_99, 1 + ndtri(1 - SELDOM) * deviation)
        gross = limit + GROSS * deviation
        which = "the 99th percentile" if found.slices >= 1 / SELDOM else "the highest"
        because = (f"{which} of {found.slices} slices of tune subjects" if limit == found.chi2_99 else
                   f"below which noise alone leaves 99 % of true images; the {found.slices} slices of tune subjects stayed below "
                   f"{found.chi2_99:.3g}")
    above = [number for number, value in enumerate(chi2, first) if not value <= limit]
    many = bool(above) and bdtr(len(above) - 1, len(chi2), SELDOM) >= 1 - SELDOM
    failed = many or any(not chi2[k - first] <= gross for k in above)
    return {"chi2": list(chi2), "of": of, "first": first, "limit": limit, "because": because, "above": above,
            "check": "not checked" if of in DIRECT else "failed" if failed else "passed"}


def verdict(made: dict, protocol: str | None) -> str:
    """What a `judge` found, in words; empty where no slice is above."""
    above = made["above"]
    if not above:
        return ""
    shown = ", ".join(map(str, above[:8])) + ("" if len(above) <= 8 else f" and {len(above) - 8} more")
    worst = max(made["chi2"][k - made["first"]] for k in above)
    of = f"the {made['of']}" if made["of"] in ("samples", "mean") else made["of"]
    under = f", under {protocol}" if protocol else ""
    return (f"chi2 of {of} is up to {worst:.3g} in slice{'s' * (len(above) > 1)} {shown} ({len(above)} of {len(made['chi2'])}), above "
            f"{made['limit']:.3g}, {made['because']}{under}: the image contradicts the measurements there, or their noise, coil maps or "
            "geometry are not what was assumed")


def changed(volume: Volume, classical: Volume, modality: str, reference: Volume | None = None) -> float | None:
    """RMS of the result minus the classical inverse in the body (MR: head), in the unit of the scan; None where there is no body."""
    mask = MASKS[modality]((reference or volume).data)
    difference = (volume.data.astype(np.float64) - classical.data)[mask]
    return float(np.sqrt(np.mean(difference**2))) if difference.size else None
