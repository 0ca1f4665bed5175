"""Compare methods on the same simulated scans: a table, its JSON and figures, mean over subjects. Resumable per slice and method.

METHODS is a list with commas. CT: fbp[:WINDOW[:CUTOFF]], tv[:WEIGHT]; MR: zero-filled, cg-sense, wavelet, tv. supervised:DIR and
conditional:DIR are networks trained on pairs (a training's folder). On the model's prior: deft[:mean|:sample|:K] (K: mean of K samples;
deft-dc, deft+dc without and with data-consistency steps), and without training dps, pigdm, dds, ddnm, diffpir, red-diff,
reconstruction and, with the extra peers, deepinv-dps, deepinv-diffpir, each with [:K]; deft-online trains its own h on the measurement
(one weight of the residual per noise level, no network), for one sample. All of them take settings, :NAME=VALUE: steps, and those of
deft_med/guidance.py and deft_med/methods.py.

--tune chooses the settings that a method's text leaves open on the tune subjects, by the grid of configs/plans/benchmark.yaml, the same
number for each. Slow methods (over 200 evaluations a sample, or backpropagation through the prior) run on six slices, of six subjects
where there are as many, with one sample; a second table shows all methods on those.
"""

import argparse
import sys
from typing import Any


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m deft_med.benchmark", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", metavar="DATA", help="folder of images, or of the files that --manifest lists")
    p.add_argument("--manifest", help="JSON list with file, subject, split")
    p.add_argument("--split", default="val")
    p.add_argument("--only", default="", metavar="TEXT", help="take only files of the manifest whose path contains TEXT")
    p.add_argument("--protocol", default="ct_sparse60", metavar="NAME|FILE")
    p.add_argument("--model", metavar="NAME|DIR", help="default: the shipped one of the protocol's modality")
    p.add_argument("--methods", default="deft:mean,deft:sample,deft:4,deft:8", metavar="A,B,C")
    p.add_argument("--samples", type=int, metavar="K", help="samples of a method that names none (default: 8 for deft, 1 for the others)")
    p.add_argument("--slices", type=int, default=3, help="at most this many slices of a subject, evenly spaced (default: %(default)s)")
    p.add_argument("--subjects", type=int, help="at most this many subjects")
    p.add_argument("--tune", action="store_true", help="choose settings on the manifest's tune subjects first")
    p.add_argument("--tune-on", default="tune", metavar="SPLIT[:TEXT]",
                   help="the split of the tune subjects, and in the place of --only a TEXT for their paths (default: %(default)s)")
    p.add_argument("--plan", default="benchmark", metavar="NAME|FILE", help="what --tune tries, and what slow methods run on")
    p.add_argument("--reference", metavar="METHOD", help="what the others are compared with (default: DEFT's default)")
    p.add_argument("--sweep", metavar="N,N,...", help="deft with these numbers of steps, on the slices of the slow methods")
    p.add_argument("--lesions", type=int, default=0, metavar="N",
                   help="put N disks of 8 mm and 20, 60 and 200 HU into the scans, and see what the methods leave of them (CT)")
    p.add_argument("--lesions-slow", action="store_true", help="also by the slow methods: four images a slice")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument("--threads", type=int)
    p.add_argument("--out", default="runs/benchmark", metavar="DIR",
                   help="folder of results.jsonl, tuned.json, table.md, table.json and figures (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from deft_med.errors import DeftMedError

    try:
        run(arguments)
    except DeftMedError as error:
        print(f"deft_med: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from deft_med import lesions
    from deft_med.bench import Bench
    from deft_med.config import load
    from deft_med.config import protocol as protocol_of
    from deft_med.errors import UsageError
    from deft_med.methods import parse
    from deft_med.pipeline import device_of
    from deft_med.subjects import entries
    from deft_med.tuning import Plan

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    counts = arguments.samples, arguments.slices, arguments.subjects
    if any(count is not None and count < 1 for count in counts):
        raise UsageError(f"samples and slices are at least 1, as are subjects, got {', '.join(map(str, counts))}")
    if arguments.lesions < 0:
        raise UsageError(f"--lesions wants a number of disks, got {arguments.lesions}")
    protocol, plan, out = protocol_of(arguments.protocol), load(arguments.plan, Plan), Path(arguments.out)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    if not methods:
        raise UsageError(f"--methods names none, got {arguments.methods!r}")
    if arguments.lesions:
        lesions.check(protocol)
    reference = arguments.reference
    if reference and reference not in methods:
        raise UsageError(f"--reference is one of --methods, got {reference!r}")
    model = arguments.model or {"CT": "ct", "MR": "mri"}[protocol.modality]
    bench = Bench(model, samples=arguments.samples, seed=arguments.seed, device=device_of(arguments.device))
    for method in methods:
        bench.settings(method)  # what cannot run is said before anything does
    steps = _numbers(arguments.sweep)
    out.mkdir(parents=True, exist_ok=True)
    manifest = Path(arguments.manifest) if arguments.manifest else None

    def listed(split: str, only: str) -> list[dict]:
        found = [e for e in entries(Path(arguments.data), manifest, split) if only in e["image"]]
        if not found:
            raise UsageError(f"no images of the split {split} have {only!r} in their path: say another split or --only")
        return found

    reported = listed(arguments.split, arguments.only)

    tuned: dict[str, Any] = {}
    if arguments.tune:
        split, _, only = arguments.tune_on.partition(":")
        others = listed(split, only or arguments.only) if manifest else reported
        if {e["subject"] for e in others} & {e["subject"] for e in reported}:
            raise UsageError("--tune wants a manifest with subjects to tune on, and other ones to report on: see --tune-on")
        tuned = tune(bench, methods, others, protocol, plan, arguments, out)
    renamed = {m: tuned.get(m, {}).get("becomes", m) for m in methods}
    methods = list(dict.fromkeys(renamed.values()))
    count = arguments.samples if (arguments.samples or 1) > 1 else 8  # a spread wants two
    pairs = {n: (f"deft:sample:steps={n}", f"deft:{count}:steps={n}") for n in steps}
    survey = _survey(bench, reported, protocol, plan, arguments, out / "results.jsonl", "benchmark")
    slow = [m for m in methods if parse(m).slow]
    survey.measure([m for m in methods if m not in slow], [*slow, *(m for pair in pairs.values() for m in pair)], arguments.slices)
    ran = {r["method"] for r in survey.records}
    put = [m for m in methods if m in ran and (arguments.lesions_slow or m not in slow)]
    disks = survey.lesions(put, arguments.slices, arguments.lesions, out / "lesions.jsonl") if arguments.lesions else []
    report(survey, methods, slow, pairs, renamed.get(reference, reference), tuned, arguments.split, out, disks)


def tune(bench: Any, methods: list[str], listed: list[dict], protocol: Any, plan: Any, arguments: argparse.Namespace, out: Any) -> dict:
    """Method -> what tuning chose for it, also in DIR/tuned.json; its records are in DIR/tuning.jsonl."""
    import json

    from deft_med.methods import parse
    from deft_med.tuning import candidates, chosen, subject_mean

    tried = {m: found for m in methods if (found := candidates(m, plan, protocol.modality))}
    texts = list(dict.fromkeys(text for found in tried.values() for text in found))
    slow = [text for m, found in tried.items() if parse(m).slow for text in found]
    survey = _survey(bench, listed, protocol, plan, arguments, out / "tuning.jsonl", "tuning")
    slices = max(plan.slices, -(-plan.slow_subjects // len(survey.subjects)))  # as many of few subjects as of many
    survey.measure([text for text in texts if text not in slow], slow, slices)
    results = {}
    for method, found in tried.items():
        asked = survey.few if parse(method).slow else survey.asked
        subjects = sorted({subject for subject, _ in asked})
        of = {text: [r for r in survey.records if r["method"] == text and (r["subject"], r["slice"]) in asked] for text in found}
        if not any(of.values()):  # it was skipped
            continue
        psnr = {text: subject_mean(rows, subjects) for text, rows in of.items()}
        results[method] = chosen(method, found, psnr, plan) | {"subjects": len(subjects), "slices": len(asked)}
    told = {"protocol": protocol.name, "split": arguments.tune_on, "seed": arguments.seed, "budget": plan.budget, "methods": results}
    (out / "tuned.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return results


def _survey(bench: Any, listed: list[dict], protocol: Any, plan: Any, arguments: argparse.Namespace, file: Any, label: str) -> Any:
    from deft_med.survey import Survey

    return Survey(bench, listed, protocol, file, subjects=arguments.subjects, few=plan.slow_subjects, seed=arguments.seed,
                  tell=lambda line: print(f"{label}: {line}", file=sys.stderr))


def report(survey: Any, methods: list[str], slow: list[str], pairs: dict[int, tuple[str, str]], reference: str | None, tuned: dict,
           split: str, out: Any, disks: list[dict]) -> None:
    """Tables, their JSON and figures, from the records of a survey."""
    import json

    import torch

    from deft_med import __version__, chart, lesions, scores
    from deft_med.errors import UsageError

    protocol = survey.protocol
    records, few = (scores.common(survey.records, places) for places in (survey.asked, survey.few))
    fast = [m for m in methods if m not in slow and any(r["method"] == m for r in records)]
    if not any(r["method"] in methods for r in records):
        raise UsageError("none of the methods runs on this protocol: see what was said of each")
    reference = reference or scores.reference_of(fast or methods)
    region = {"CT": "body", "MR": "head"}[protocol.modality]
    told: dict[str, Any] = {
        "protocol": protocol.name, "split": split, "seed": survey.seed, "reference": reference, "deft_med": __version__,
        "torch": torch.__version__, "device": survey.bench.device.type, "threads": torch.get_num_threads(),
        "metrics": scores.WORDS[protocol.modality], "tuned": {m: found["settings"] for m, found in tuned.items()}}
    text = [f"{protocol.name}, split {split}: {_counted(len(survey.subjects), 'subject')}, {_counted(len(survey.asked), 'slice')}, "
            f"seed {survey.seed}.",
            f"{scores.WORDS[protocol.modality]}. {scores.NOTES.format(region=region)}",
            f"Times: {told['device']}, threads: {told['threads']}, torch {torch.__version__}.", ""]
    few_words = f"{_counted(len(survey.few), 'slice')} of {_counted(len({subject for subject, _ in survey.few}), 'subject')}"
    if fast:
        told["rows"] = scores.summary(records, fast, reference)
        text += [scores.table(told["rows"], protocol.modality, reference)]
    if alike := scores.consistency(records, fast):
        told["consistency"] = alike
        text += ["Whether the estimates of one method agree:", "", scores.consistency_table(alike)]
    if any(r["method"] in slow for r in records):
        told["few"] = scores.summary(few, methods, reference)
        text += [f"Slow methods (over 200 evaluations a sample, or backpropagation through the prior), and the others on the same "
                 f"{few_words}:", "", scores.table(told["few"], protocol.modality, reference)]
    if pairs:
        told["sweep"] = scores.sweep(few, pairs)
        text += [f"DEFT by steps, on {few_words}:", "", scores.sweep_table(told["sweep"])]
    if disks:
        order = {m: k for k, m in enumerate(methods)}
        rows = sorted(lesions.summary(disks, reference), key=lambda r: (order[r["method"]], r["contrast"]))
        told["lesions"] = [{key: value if value == value else None for key, value in r.items()} for r in rows]  # NaN is no JSON
        text += ["Lesions:", "", lesions.table(rows)]
    if tuned:
        edges = [f"{found['becomes']} ({', '.join(found['edge'])})" for found in tuned.values() if found["edge"]]
        text += [f"Tuned on {_counted(max(found['subjects'] for found in tuned.values()), 'other subject')}, one sample, by mean PSNR, "
                 f"{_counted(len(tuned), 'method')}: {', '.join(found['becomes'] for found in tuned.values())}."
                 + (f" At the edge of what was tried: {', '.join(edges)}." if edges else ""), ""]
    (out / "table.md").write_text("\n".join(text), "utf-8")
    (out / "table.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    shown = scores.summary(records, methods, reference)
    title = f"{protocol.name}, split {split}; " + scores.WORDS[protocol.modality].partition(", full frame")[0].replace(" and SSIM", "")
    chart.quality(out / "quality.png", shown, reference, title, "cpu_seconds" if told["device"] == "cpu" else "seconds")
    if any(r.get("ranks") for r in shown):
        chart.ranks(out / "ranks.png", shown)
    if told.get("sweep"):
        chart.sweep(out / "sweep.png", told["sweep"], f"DEFT by steps, {protocol.name}, {few_words}; shaded: ±0.1, and 85 to 95 %")
    print("\n".join(text))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _numbers(text: str | None) -> list[int]:
    """The steps of a sweep; UsageError for what is none."""
    from deft_med.errors import UsageError

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise UsageError(f"--sweep wants numbers of steps, 2 or more, with commas, got {text!r}")
    return sorted({int(part) for part in parts})


if __name__ == "__main__":
    sys.exit(main())
