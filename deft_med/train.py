"""python -m deft_med.train CONFIG.yaml [--out DIR] [--resume]: train a prior, an h-transform, or a network to compare them with."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deft_med.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, or the name of one in configs/train")
    parser.add_argument("--out", help="folder of the training (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on where a killed or timed-out training stopped")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop, resumable, after this long")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args(argv)

    from pathlib import Path

    import torch

    from deft_med.config import FOLDER, load
    from deft_med.data import Pool
    from deft_med.fit import fit
    from deft_med.kinds import Training, assemble, bare, load_run
    from deft_med.network import use_half

    named = FOLDER / "train" / f"{arguments.config}.yaml"
    config = load(named if named.is_file() else arguments.config, Training)
    out = Path(arguments.out or Path("runs") / Path(arguments.config).stem)
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    prior = None
    if config.prior is not None:
        parent = load(Path(config.prior) / "config.yaml", Training)
        prior = bare(parent)
        prior.load_state_dict(load_run(config.prior), strict=True)
        use_half(prior, device)
    module, objective, validate = assemble(config, Pool.load(Path(config.data.train)), Pool.load(Path(config.data.tune)),
                                           prior=prior)  # type: ignore[arg-type]
    use_half(module, device)
    out.mkdir(parents=True, exist_ok=True)
    source = named if named.is_file() else Path(arguments.config)
    (out / "config.yaml").write_text(source.read_text("utf-8"), "utf-8")

    def say(record: dict) -> None:
        values = "  ".join(f"{key} {value:.4g}" for key, value in record.items() if key not in ("step", "seconds", "eta", "rate"))
        print(f"step {record['step']}/{config.recipe.steps}  {values}  ETA {record['eta'] / 60:.0f} min", file=sys.stderr, flush=True)

    fit(module, objective, config.recipe, out, validate=validate, resume=arguments.resume, device=device, log=say,
        seconds=arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
