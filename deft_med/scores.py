"""From records to a table: means over subjects with their spread, paired differences with their confidence, and what they were measured on.

A record is what ``Bench.measure`` yields with ``subject`` and ``slice``. Subjects weigh alike, each the mean of its slices. Only numbers
enter: a run that gave none is counted, and named in the table.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from deft_med.methods import POSTERIOR, parse

WORDS = {"CT": "PSNR and SSIM: range 2000 HU, both sides clipped to [-1000, 1000] HU, full frame, and inside the reference's body mask",
         "MR": "PSNR and SSIM of magnitudes: range the maximum of the reference volume, full frame, and inside the reference's head mask"}
NUMBERS = {  # a record's key: its column and its decimals
    "psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "psnr_body": ("PSNR {region}", 2), "ssim_body": ("SSIM {region}", 3),
    "psnr_scalp": ("PSNR scalp", 2), "psnr_brain": ("PSNR brain", 2), "chi2": ("chi2", 3),
    "chi2_samples": ("chi2 samples", 3), "coverage": ("in 90 %", 3), "nfe": ("NFE", 0), "seconds": ("s / slice", 2),
    "cpu_seconds": ("CPU-s / slice", 2), "peak_mb": ("peak MB", 0), "rise_mb": ("rise MB", 0)}  # fmt: skip
PAIRED = ("psnr", "psnr_body", "ssim", "ssim_body")  # also those that are shown with their spread
NOTES = """± is the standard deviation between subjects. Averages and the sample of one method share their samples; a time with a * is a
share of the largest, drawn together: drawn alone it is up to twice as much. chi2: of the image shown, and of the samples that it averages
(1 is expected of a sample, less of a mean). In 90 %: pixels of the {region} whose reference lies within t sqrt(1 + 1/K) std of the image,
the average of K samples (MR: the magnitude of the complex average). Scalp: what of a head lies within 15 mm of its edge; brain: the rest.
NFE: evaluations of the prior, or of a method's own network, for one image. Peak: resident size of the whole process while the method ran,
rise: what the method added to it (on CUDA: what torch had allocated)."""


def values(records: Iterable[Mapping], key: str) -> dict[str, float]:
    """Mean of a number over the slices of every subject that has it."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.get(key) is not None and math.isfinite(record[key]):
            found.setdefault(record["subject"], []).append(record[key])
    return {subject: float(np.mean(each)) for subject, each in sorted(found.items())}


def row(records: Sequence[Mapping], method: str) -> dict:
    """A method's numbers: {"mean", "sd"} over subjects for every key of `NUMBERS`, None where there is none, and what they count."""
    mine = [r for r in records if r["method"] == method]
    found: dict[str, Any] = {"method": method, "slices": len(mine), "subjects": len({r["subject"] for r in mine}),
                             "samples": max((r.get("samples", 0) for r in mine), default=0),
                             "drawn_with": max((r.get("drawn_with", 0) for r in mine), default=0),
                             "without_result": sum(r.get("psnr") is None for r in mine),
                             "not_converged": sum(not r.get("converged", True) for r in mine)}
    for key in NUMBERS:
        each = list(values(mine, key).values())
        found[key] = {"mean": float(np.mean(each)), "sd": float(np.std(each, ddof=1)) if len(each) > 1 else None} if each else None
    ranked = [r for r in mine if r.get("ranks")]
    if ranked:
        of = [np.mean([r["ranks"] for r in ranked if r["subject"] == subject], 0) for subject in sorted({r["subject"] for r in ranked})]
        found["ranks"] = [float(share) for share in np.mean(of, 0)]
    return found


def paired(records: Sequence[Mapping], method: str, reference: str, key: str) -> dict | None:
    """Mean over subjects of (method - reference) on the slices that both have, with its 95 % confidence interval (Student's t).

    {"difference", "low", "high", "subjects"}; low and high are None for one subject. None where they share no slice.
    """
    left, right = ({(r["subject"], r["slice"]): r[key] for r in records if r["method"] == m and r.get(key) is not None}
                   for m in (method, reference))
    both = [{"subject": place[0], "d": left[place] - right[place]} for place in sorted(left.keys() & right.keys())]
    each = np.array(list(values(both, "d").values()))
    if not len(each):
        return None
    half = float(stdtrit(len(each) - 1, 0.975) * each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    middle = float(each.mean())
    low, high = (None, None) if half is None else (middle - half, middle + half)
    return {"difference": middle, "low": low, "high": high, "subjects": len(each)}


def summary(records: Sequence[Mapping], methods: Sequence[str], reference: str) -> list[dict]:
    """A row for every method that has records, with its paired differences from the reference."""
    rows = [row(records, m) for m in dict.fromkeys(methods)]
    return [r | {"paired": {key: paired(records, r["method"], reference, key) for key in PAIRED}} for r in rows if r["slices"]]


def reference_of(methods: Sequence[str]) -> str:
    """The method that others are compared with: DEFT's default where it is there, else its largest average, else the first method."""
    mine = [m for m in methods if parse(m).name == "deft"]
    for text in ("deft", "deft:8"):
        if text in mine:
            return text
    return max(mine, key=lambda m: parse(m).count or 0) if mine else methods[0]


def common(records: Sequence[Mapping], places: set[tuple[str, int]]) -> list[Mapping]:
    """The records of these (subject, slice)."""
    return [r for r in records if (r["subject"], r["slice"]) in places]


def table(rows: Sequence[Mapping], modality: str, reference: str) -> str:
    """Markdown of a ``summary``: the numbers, then the paired differences."""
    region = "body" if modality == "CT" else "head"
    shown = [k for k in NUMBERS if any(r[k] for r in rows)]
    heads = [NUMBERS[k][0].format(region=region) for k in shown]
    lines = [f"| method | subjects / slices | {' | '.join(heads)} |", "|---" * (len(shown) + 2) + "|"]
    for r in rows:
        lines.append(f"| {_marked(r)} | {r['subjects']} / {r['slices']} | {' | '.join(_cell(r[k], k, r['drawn_with']) for k in shown)} |")
    lines += ["", f"Difference from {reference} on the slices that both have, mean over n subjects with its 95 % confidence interval:", "",
              f"| method | n | PSNR (dB) | PSNR {region} (dB) | SSIM | SSIM {region} |", "|---" * 6 + "|"]
    for r in rows:
        if r["method"] != reference and r["paired"]["psnr"] is not None:
            cells = [_interval(r["paired"][k], NUMBERS[k][1]) for k in PAIRED]
            lines.append(f"| {r['method']} | {r['paired']['psnr']['subjects']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sweep_table(rows: Sequence[Mapping]) -> str:
    """Markdown of a sweep over steps (`sweep`)."""
    heads = {"steps": ("steps", 0), "nfe_one": ("NFE, one sample", 0), "one": ("PSNR, one sample", 2), "nfe": ("NFE, average", 0),
             "average": ("PSNR, average", 2), "std_ratio": ("std / std of most steps", 3), "chi2": ("chi2 samples", 3),
             "coverage": ("in 90 %", 3)}  # fmt: skip
    lines = [f"| {' | '.join(head for head, _ in heads.values())} |", "|---" * len(heads) + "|"]
    for r in rows:
        lines.append(f"| {' | '.join('-' if r[k] is None else f'{r[k]:.{digits}f}' for k, (_, digits) in heads.items())} |")
    return "\n".join(lines) + "\n"


def sweep(records: Sequence[Mapping], pairs: Mapping[int, tuple[str, str]]) -> list[dict]:
    """A row per number of steps: ``one`` sample and the ``average`` in PSNR, what they took, and whether the samples are those of the
    run with the most steps: ``std_ratio`` of their root mean square deviations, chi2, coverage. ``pairs``: steps -> both methods."""
    rows = []
    for steps, (one, average) in sorted(pairs.items()):
        first, many = row(records, one), row(records, average)
        if not (first["psnr"] and many["psnr"] and many["chi2_samples"]):
            continue
        spread = [{**r, "square": r["std"] ** 2} for r in records if r["method"] == average and r.get("std") is not None]
        rows.append({"steps": steps, "nfe_one": first["nfe"]["mean"], "one": first["psnr"]["mean"], "nfe": many["nfe"]["mean"],
                     "average": many["psnr"]["mean"], "chi2": many["chi2_samples"]["mean"],
                     "std": math.sqrt(np.mean(list(values(spread, "square").values()))),
                     "coverage": many["coverage"]["mean"] if many["coverage"] else None,
                     "subjects": many["subjects"], "slices": many["slices"]})
    return [r | {"std_ratio": r["std"] / rows[-1]["std"]} for r in rows]


def consistency(records: Sequence[Mapping], methods: Sequence[str]) -> list[dict]:
    """Whether the estimates of a sampler agree: what its average gains over one sample and its mean over the average, in dB of PSNR,
    beside what posterior samples and the posterior mean would.

    With the posterior's variance m, a sample has the squared error 2 m, an average of K (1 + 1 / K) m, the posterior mean m: an average
    that gains less has samples that are too alike, a mean below the average is none.
    """
    parsed = {m: parse(m) for m in methods}
    rows = []
    for method, entry in parsed.items():
        if entry.name not in POSTERIOR or (entry.count or 0) < 2 or "zeta" in entry.settings:  # those are no posterior samples
            continue
        k = entry.count or 0
        kin = {other.count: m for m, other in parsed.items()
               if (other.name, other.folder) == (entry.name, entry.folder) and (other.count == 0 or other.settings == entry.settings)}
        found = {"method": method, "samples": k, "expected": 10 * math.log10(2 * k / (k + 1)), "mean_expected": 10 * math.log10(1 + 1 / k),
                 "gain": paired(records, method, kin.get(1, ""), "psnr"), "mean": paired(records, kin.get(0, ""), method, "psnr")}
        if found["gain"] or found["mean"]:
            rows.append(found)
    return rows


def consistency_table(rows: Sequence[Mapping]) -> str:
    """Markdown of `consistency`."""
    lines = ["| method | average over one sample (dB) | of posterior samples | mean in one evaluation over average (dB) | "
             "of the posterior mean |", "|---" * 5 + "|"]
    for r in rows:
        lines.append(f"| {r['method']} | {_interval(r['gain'], 2)} | {r['expected']:+.2f} | {_interval(r['mean'], 2)} | "
                     f"{r['mean_expected']:+.2f} |")
    return "\n".join(lines) + "\n"


def _marked(r: Mapping) -> str:
    marks = [f"{r[key]} {key.replace('_', ' ')}" for key in ("not_converged", "without_result") if r[key]]
    return r["method"] + (f" ({', '.join(marks)})" if marks else "")


def _cell(found: Mapping | None, key: str, drawn_with: int = 0) -> str:
    if found is None:
        return "-"
    digits = NUMBERS[key][1]
    spread = f" ± {found['sd']:.{digits}f}" if key in PAIRED and found["sd"] is not None else ""
    return f"{found['mean']:.{digits}f}{spread}" + "*" * (drawn_with > 0 and key.endswith("seconds"))


def _interval(found: Mapping | None, digits: int) -> str:
    if found is None:
        return "-"
    words = f"{found['difference']:+.{digits}f}"
    return words if found["low"] is None else f"{words} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
