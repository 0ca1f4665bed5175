"""Train a prior, an h-transform, or a network to compare them with; CONFIG is a YAML file or the name of one in configs/train.

Images come from --data FOLDER: with --manifest (a JSON list of file, subject, split, licence, doi) its splits train and tune, else
the subfolders train/ and tune/, one subject a folder. They are packed into two array files in the training's folder, which is all
that a machine without medical readers needs to go on from. Writes state.safetensors (to --resume), best.safetensors, log.jsonl,
loss.png and samples.png.
"""

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m deft_med.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config", metavar="CONFIG")
    p.add_argument("--data", metavar="FOLDER", help="images to train and tune on; not needed where the configuration names array files")
    p.add_argument("--manifest", metavar="FILE", help="JSON list that splits them by subject")
    p.add_argument("--tune", default="", metavar="A,B", help="subjects of the manifest's train split to tune on instead")
    p.add_argument("--out", metavar="DIR", help="folder of the training (default: runs/NAME)")
    p.add_argument("--resume", action="store_true", help="go on where a killed or timed-out training stopped")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop, resumable, after this long")
    p.add_argument("--threads", type=int, help="CPU threads")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from deft_med.errors import DeftMedError, OutputError, UsageError

    try:
        run(arguments)
    except DeftMedError as error:
        return _fail(str(error), error.exit_code)
    except FileExistsError as error:
        return _fail(str(error), OutputError.exit_code)
    except ValueError as error:  # a configuration whose parts do not fit each other
        return _fail(str(error), UsageError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted: go on with --resume", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"deft_med: error: {message}", file=sys.stderr)
    return code


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from deft_med.config import find, load
    from deft_med.fit import fit
    from deft_med.kinds import Training, assemble, trained
    from deft_med.network import use_half

    source = find(arguments.config, Training)
    config = load(source, Training)
    out = Path(arguments.out or Path("runs") / source.stem)
    if (out / "state.safetensors").exists() and not arguments.resume:
        raise FileExistsError(f"{out.name} holds a training already: say --resume, or name another folder with --out")
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    prior = None if config.prior is None else trained(config.prior)[1]
    out.mkdir(parents=True, exist_ok=True)
    train, tune = pools(arguments, config, out)
    module, objective, validate = assemble(config, train.to(device), tune.to(device), prior=prior)  # type: ignore[arg-type]
    for part in (module, prior):
        if part is not None:
            use_half(part.to(device), device)
    (out / "config.yaml").write_text(source.read_text("utf-8"), "utf-8")

    def say(record: dict) -> None:
        hidden = ("step", "seconds", "eta", "rate")
        values = "  ".join(f"{key} {value:.4g}" for key, value in record.items() if key not in hidden)
        print(f"step {record['step']}/{config.recipe.steps}  {values}  ETA {record['eta'] / 60:.0f} min", file=sys.stderr, flush=True)

    fit(module, objective, config.recipe, out, validate=validate, resume=arguments.resume, device=device, log=say,
        seconds=arguments.seconds)
    pictures(out, config)


def pools(arguments: argparse.Namespace, config, out):
    """(train, tune): packed from --data at the first call, from the array files afterwards."""
    from pathlib import Path

    from deft_med.data import Pool
    from deft_med.errors import UsageError

    files = {split: out / f"{split}.safetensors" for split in ("train", "tune")}
    if arguments.data is not None:
        from deft_med.subjects import entries, pool

        folder, manifest = Path(arguments.data), Path(arguments.manifest) if arguments.manifest else None
        held = {name for name in arguments.tune.split(",") if name}
        for split, file in files.items():
            if not file.exists():
                listed = entries(folder if manifest else folder / split, manifest, "train" if held else split)
                listed = [e for e in listed if not held or (e["subject"] in held) == (split == "tune")]
                pool(listed, modality=config.modality).save(file)
    elif config.data is not None:
        files = {"train": Path(config.data.train), "tune": Path(config.data.tune)}
    missing = [split for split, file in files.items() if not file.is_file()]
    if missing:
        raise UsageError(f"no images to {' and '.join(missing)} on: say --data FOLDER (with train/ and tune/ in it, or with --manifest)")
    return Pool.load(files["train"]), Pool.load(files["tune"])


def pictures(out, config) -> None:
    """loss.png from the log; samples.png: draws of a trained prior."""
    import json

    import torch

    from deft_med import report
    from deft_med.draws import WHOLE
    from deft_med.kinds import MODALITIES, trained
    from deft_med.sample import dpm, start
    from deft_med.schedule import sigmas

    records = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    for record in records:
        octaves = {key.removeprefix("sigma_"): record[key] for key in record if key.startswith("sigma_")}
        if octaves:
            record["validation"] = octaves
    report.loss_curve(out / "loss.png", records)
    if config.kind == "prior":
        prior = trained(out)[1]
        generators = [torch.Generator().manual_seed(k) for k in range(4)]
        with torch.no_grad():
            x = start((4, MODALITIES[config.modality], WHOLE, WHOLE), prior.sigma_max, generators)
            images = dpm(prior, x, sigmas(40), eta=1.0, generators=generators)
            images = images[:, 0] * 1000 if config.modality == "CT" else 1000 * torch.linalg.vector_norm(images, dim=1)
        report.sample_grid(out / "samples.png", list(images.numpy()), [f"sample {k}" for k in range(4)],
                           window=(400, 40) if config.modality == "CT" else (1400, 700))


if __name__ == "__main__":
    sys.exit(main())
