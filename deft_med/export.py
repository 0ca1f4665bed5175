"""Make a bundle of a trained prior and h-transform: weights, card, licence, and the attribution of every image they saw."""

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m deft_med.export", description=__doc__)
    p.add_argument("prior", metavar="PRIOR", help="folder of the prior's training")
    p.add_argument("h", metavar="H", help="folder of the h-transform's training")
    p.add_argument("--card", required=True, metavar="FILE", help="YAML file with the card's own words, or the name of one in configs/cards")
    p.add_argument("--manifest", required=True, metavar="FILE",
                   help="JSON list of images with split, subject, licence, collection or source, doi where there is one")
    p.add_argument("--tune", default="", metavar="A,B", help="subjects of the train split that were tuned on instead")
    p.add_argument("--results", metavar="FILE", help="results.jsonl of deft_med.benchmark, for the numbers on the card")
    p.add_argument("--calibration", metavar="FILE", help="what deft_med.calibrate wrote, for intervals and chi2 on the card")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier bundle")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from deft_med.errors import DeftMedError

    try:
        card = make(arguments)
    except DeftMedError as error:
        print(f"deft_med: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{card.name} {card.version}: {card.prior.parameters:,} + {card.h.parameters:,} parameters "
          f"({100 * card.h.parameters / card.prior.parameters:.1f} %)")
    return 0


def make(arguments: argparse.Namespace):
    import dataclasses
    import json
    from pathlib import Path

    import yaml

    from deft_med import bundle
    from deft_med.attribution import attribution, collections
    from deft_med.config import FOLDER
    from deft_med.errors import UsageError
    from deft_med.intensity import Window
    from deft_med.kinds import MODALITIES, trained

    shipped = FOLDER / "cards" / f"{arguments.card}.yaml"
    text = shipped if shipped.is_file() else Path(arguments.card)
    if not text.is_file() or not Path(arguments.manifest).is_file():
        raise UsageError("--card wants a YAML file (or the name of one in configs/cards), --manifest a JSON file")
    words = yaml.safe_load(text.read_text("utf-8"))
    (prior_config, prior), (h_config, h) = trained(arguments.prior), trained(arguments.h)
    if (prior_config.kind, h_config.kind) != ("prior", "htransform"):
        raise UsageError(f"a bundle is a prior and an htransform, got {prior_config.kind} and {h_config.kind}")
    seen = [entry for entry in json.loads(Path(arguments.manifest).read_text("utf-8")) if entry["split"] == "train"]
    window = Window() if h_config.modality == "CT" else Window(scale=1.0, unit="a.u.")
    kept = set(filter(None, arguments.tune.split(",")))
    if unknown := kept - {entry["subject"] for entry in seen}:
        raise UsageError(f"--tune names {', '.join(sorted(unknown))}, which the manifest's train split does not hold")
    seen = [entry for entry in seen if entry["subject"] not in kept]
    calibration = {} if arguments.calibration is None else calibrated(Path(arguments.calibration))
    residual = {"window": h_config.filter} if h_config.modality == "CT" else {"inverse": h_config.inverse}
    card = words | {
        "window": dataclasses.asdict(window), "channels": MODALITIES[h_config.modality], "sigma_data": prior.sd,
        "octaves": prior_config.octaves,
        "sigma_min": prior.sigma_min, "sigma_max": prior.sigma_max, "prior": dataclasses.asdict(prior_config.network),
        "h": dataclasses.asdict(h_config.network) | {"residual": residual, "form": h_config.form or h_config.loss},
        "training_data": [dataclasses.asdict(c) for c in collections(seen)],
        "metrics": [] if arguments.results is None else measured(Path(arguments.results)),
        "calibration": calibration,
    }
    credit = attribution(seen, h_config.modality)
    return bundle.save(arguments.out, prior.state_dict(), h.state_dict(), card, credit, overwrite=arguments.overwrite)


def calibrated(path) -> dict:
    """The calibration in a file of deft_med.calibrate; UsageError for another file."""
    import json

    from deft_med.errors import UsageError

    try:
        return json.loads(path.read_text("utf-8"))["calibration"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("--calibration wants the JSON file that deft_med.calibrate wrote, whole") from error


def measured(results) -> list[dict]:
    """PSNR of the whole image per protocol and method, mean and deviation over subjects, from a benchmark's records."""
    import json

    import numpy as np

    records = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    records = [r for r in records if r["psnr"] is not None]  # of a run that gave no numbers
    found = []
    for protocol, method in sorted({(r["protocol"], r["method"]) for r in records}):
        rows = [r for r in records if (r["protocol"], r["method"]) == (protocol, method)]
        subjects = sorted({r["subject"] for r in rows})
        each = [float(np.mean([r["psnr"] for r in rows if r["subject"] == s])) for s in subjects]
        found.append({"name": f"PSNR {method}, {protocol}", "value": round(float(np.mean(each)), 2),
                      "sd": round(float(np.std(each, ddof=1)), 2) if len(each) > 1 else None, "n": len(each), "data": "val subjects",
                      "command": f"python -m deft_med.benchmark DATA --protocol {protocol} --methods {method}"})
    return found


if __name__ == "__main__":
    sys.exit(main())
