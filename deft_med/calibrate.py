"""Measure what a model's intervals and chi2 are worth, on subjects that it was not trained on, and write it on its card.

Every chosen slice is measured under each protocol and sampled; FILE keeps what came out slice by slice, so that a run that was ended
goes on where it was, and grows when it is run again with more protocols. Tune subjects calibrate; val subjects are for tables: "after" is
the coverage of every subject by the factor of the others, "by the card" that by the factor which the model had before. The factor
multiplies the half-width t sqrt(1 + 1/K) std of an interval.
"""

import argparse
import sys
from typing import Any

POINTS = 500  # quantiles that stand for the pixels of a slice


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m deft_med.calibrate", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", metavar="DATA", help="folder of images, or of the files that --manifest lists")
    p.add_argument("--manifest", help="JSON list with file, subject, split")
    p.add_argument("--split", default="tune", help="default: %(default)s")
    p.add_argument("--only", default="", metavar="TEXT", help="take only files of the manifest whose path contains TEXT")
    p.add_argument("--protocol", default="ct_sparse60", metavar="P[,P2]", help="names or files (default: %(default)s)")
    p.add_argument("--model", metavar="NAME|DIR", help="default: --into or the shipped one of the protocol's modality")
    p.add_argument("--samples", type=int, default=8, metavar="K", help="samples per slice, 2 or more (default: %(default)s)")
    p.add_argument("--steps", type=int, metavar="N", help="denoiser evaluations per sample (default: that of deft_med.reconstruct)")
    p.add_argument("--slices", type=int, default=3, help="at most this many slices of a subject, evenly spaced (default: %(default)s)")
    p.add_argument("--subjects", type=int, help="at most this many subjects")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument("--threads", type=int)
    p.add_argument("--out", required=True, metavar="FILE", help="JSON file of records and calibration, for deft_med.export --calibration")
    p.add_argument("--into", metavar="DIR", help="write the calibration on the card of this bundle; its weights are not touched")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from deft_med.errors import DeftMedError

    try:
        found = run(arguments)
    except DeftMedError as error:
        print(f"deft_med: error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    return 0


def run(arguments: argparse.Namespace) -> dict:
    from pathlib import Path

    import torch

    from deft_med import bundle
    from deft_med.config import protocol as protocol_of
    from deft_med.errors import UsageError
    from deft_med.network import use_half
    from deft_med.pipeline import STEPS, device_of
    from deft_med.study import chosen_slices, digest
    from deft_med.subjects import entries

    arguments.steps = STEPS if arguments.steps is None else arguments.steps
    if arguments.samples < 2 or arguments.steps < 2 or arguments.slices < 1:
        raise UsageError(f"--samples and --steps are at least 2 and --slices at least 1, got {arguments.samples}, {arguments.steps} and "
                         f"{arguments.slices}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    protocols = [protocol_of(name.strip()) for name in arguments.protocol.split(",")]
    if len({p.modality for p in protocols}) > 1:
        raise UsageError("the protocols are of CT and of MR, a model is for one of them: calibrate one modality at a time")
    modality = protocols[0].modality
    name = arguments.model or arguments.into or {"CT": "ct", "MR": "mri"}[modality]
    model = bundle.load_model(name)
    if model.card.modality != modality:
        raise UsageError(f"the model is for {model.card.modality}, the protocols for {modality}: choose another --model or --protocol")
    if arguments.into and bundle.load(arguments.into)[0].sha256 != model.card.sha256:
        raise UsageError("--into names a bundle of other weights than --model: leave --model out")
    place = device_of(arguments.device)
    use_half(model.to(place).deft, place)
    listed = entries(Path(arguments.data), Path(arguments.manifest) if arguments.manifest else None, arguments.split)
    listed = [e for e in listed if arguments.only in e["image"]]
    subjects = sorted({e["subject"] for e in listed})[:arguments.subjects]
    if not subjects:
        raise UsageError("no image is left by --split and --only: say other ones")
    out = Path(arguments.out)
    settings = settings_of(model.card, arguments)
    records = [r for r in earlier(out) if r["settings"] == settings]
    have = {(r["protocol"], r["subject"], r["slice"]) for r in records}
    for number, subject in enumerate(subjects):
        for key, volume in chosen_slices([e for e in listed if e["subject"] == subject], arguments.slices, modality):
            for protocol in protocols:
                if (protocol.name, subject, key) in have:
                    continue
                made = measure(volume, protocol, model, seed=digest(arguments.seed, subject, key), samples=arguments.samples,
                               steps=arguments.steps, device=place)
                records.append({"protocol": protocol.name, "subject": subject, "slice": key, "settings": settings, **made})
                written(out, {"records": records})
        print(f"{number + 1}/{len(subjects)} subjects", file=sys.stderr)
    only = f"--only {arguments.only} " if arguments.only else ""
    command = (f"python -m deft_med.calibrate DATA --split {arguments.split} {only}--protocol {{}} --samples {arguments.samples} "
               f"--steps {arguments.steps} --slices {arguments.slices} --seed {arguments.seed}")
    found = summarised(records, command, model.card)
    written(out, found | {"records": records})
    if arguments.into:
        bundle.recalibrate(arguments.into, found["calibration"])
    return found


def settings_of(card, arguments: argparse.Namespace) -> dict:
    """What a record depends on beside slice and protocol: others are measured afresh."""
    import dataclasses

    return {"model": card.sha256, "sampling": dataclasses.asdict(card.sampling),
            **{name: getattr(arguments, name) for name in ("split", "samples", "steps", "seed")}}


def measure(volume, protocol, model, *, seed: int, samples: int, steps: int, device: Any = "cpu") -> dict:
    """One slice: chi2 of the samples, and over the body (MR: head) of the reference the quantiles of ``metrics.misses`` and the ranks.

    They are None where there is no body. The interval is about what the command publishes, and of its unit.
    """
    import numpy as np
    import torch

    from deft_med.metrics import MASKS, misses, rank_histogram
    from deft_med.pipeline import posed, solve
    from deft_med.simulate import simulate

    scan = simulate(volume, protocol, seed=seed)
    with torch.no_grad():
        problem = posed(scan, 0, model, device)
        drawn, _ = solve(problem, "deft", model, steps=steps, samples=samples, seed=seed)
        chi2 = float(np.mean([float(problem.likelihood.chi2(u)[0]) for u in drawn.unbind(1)]))
        mean, each = problem.picture(drawn.mean(1))[0], problem.picture(drawn[0])
    assert scan.reference is not None
    ref = scan.reference.data[0]
    body = MASKS[scan.modality](ref)
    made = {"chi2": chi2, "misses": None, "ranks": None}
    if not body.any():
        return made
    missed = misses(mean, each.std(0, ddof=1), samples, ref, mask=body)
    quantiles = np.quantile(missed, (np.arange(POINTS) + 0.5) / POINTS, method="inverted_cdf").clip(max=1e6)
    return made | {"misses": [float(f"{v:.4g}") for v in quantiles], "ranks": [round(float(v), 6) for v in rank_histogram(each, ref, body)]}


def summarised(records: list[dict], command: str = "", card: Any = None) -> dict:
    """{"calibration", "ranks", "chi2", "card"} by protocol and, of several, over "all", subjects of a protocol weighing alike, and slices
    of a subject.

    "card": the factor that the ``card`` has for these protocols already, and the share of pixels that its intervals hold here.
    """
    from deft_med.card import ALL

    protocols = sorted({r["protocol"] for r in records})
    groups = {name: [r for r in records if r["protocol"] == name] for name in protocols} | ({ALL: records} if len(protocols) > 1 else {})
    made: dict[str, dict] = {"calibration": {}, "ranks": {}, "chi2": {}, "card": {}}
    for name, rows in groups.items():
        known = None if card is None else card.calibrated(name)[1]
        one = fitted(rows, None if known is None else known.factor)
        made["calibration"][name] = one["calibration"] | {"command": command.format(",".join(protocols) if name == ALL else name)}
        made["ranks"][name], made["chi2"][name], made["card"][name] = one["ranks"], one["chi2"], one["card"]
    return made


def fitted(rows: list[dict], known: float | None = None) -> dict:
    """Factor, coverages, ranks and percentiles of chi2 from the records of one protocol, or of several; with a ``known`` factor also
    the coverage that it reaches."""
    import numpy as np

    from deft_med.errors import UsageError
    from deft_med.metrics import LEVEL, calibration_factor, weighted_quantile

    seen = [r for r in rows if r["misses"] is not None]
    if not seen:
        raise UsageError("no slice holds a body to calibrate in: choose other images")
    people = [(r["subject"], r["protocol"]) for r in seen]
    weights = np.array([1 / people.count(one) for one in people])
    missed, chi2 = np.array([r["misses"] for r in seen]), np.array([r["chi2"] for r in seen])

    def factor(chosen: np.ndarray) -> float:
        return calibration_factor(missed[chosen], LEVEL, np.repeat(weights[chosen], POINTS))

    everyone = np.ones(len(seen), bool)
    after = np.empty(len(seen))
    for subject in {one for one, _ in people}:
        theirs = np.array([one == subject for one, _ in people])
        after[theirs] = (missed[theirs] <= factor(everyone if theirs.all() else ~theirs)).mean(1)

    def mean(values: np.ndarray) -> list[float]:
        return np.average(values, axis=0, weights=weights).round(4).tolist()

    percentiles = {str(q): round(weighted_quantile(chi2, q / 100, weights), 4) for q in (1, 50, 90, 99)}
    calibration = {"factor": round(factor(everyone), 4), "coverage_raw": mean((missed <= 1).mean(1)), "coverage": mean(after),
                   "chi2_99": percentiles["99"], "samples": seen[0]["settings"]["samples"], "subjects": len({one for one, _ in people}),
                   "slices": len({(one, r["slice"]) for (one, _), r in zip(people, seen, strict=True)}), "level": LEVEL}
    by_card = None if known is None else {"factor": known, "coverage": mean((missed <= known).mean(1))}
    return {"calibration": calibration, "ranks": mean(np.array([r["ranks"] for r in seen])), "chi2": percentiles, "card": by_card}


def earlier(path) -> list[dict]:
    """The records of a file that an earlier run wrote; none where there is no file. UsageError for another file."""
    import json

    from deft_med.errors import UsageError

    if not path.exists():
        return []
    try:
        return json.loads(path.read_text("utf-8"))["records"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError("--out names a file that deft_med.calibrate did not write: name another one") from error


def written(path, content: dict) -> None:
    """The file, replaced as a whole: a run may end at any time."""
    import json
    import os

    from deft_med.errors import OutputError

    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content, allow_nan=False) + "\n", "utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OutputError("the file that --out names cannot be written: name another one") from error


def table(found: dict) -> str:
    """What was found, for people."""
    lines = ["| protocol | factor | coverage raw | after | by the card | chi2 1 / 50 / 90 / 99 % | subjects | slices | ranks |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, one in found["calibration"].items():
        chi2 = " / ".join(f"{found['chi2'][name][q]:.3f}" for q in ("1", "50", "90", "99"))
        ranks = " ".join(f"{100 * v:.0f}" for v in found["ranks"][name])
        card = found["card"][name]
        known = "-" if card is None else f"{card['coverage']:.3f} ({card['factor']:.3g})"
        lines.append(f"| {name} | {one['factor']:.3f} | {one['coverage_raw']:.3f} | {one['coverage']:.3f} | {known} | {chi2} | "
                     f"{one['subjects']} | {one['slices']} | {ranks} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
