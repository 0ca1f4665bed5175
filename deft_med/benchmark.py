"""Compare methods on the same simulated scans: mean over subjects and their spread, as a table. Resumable per slice and method.

METHODS is a list with commas: for CT fbp or fbp:WINDOW[:CUTOFF], tv or tv:WEIGHT; for MR (a protocol with a pattern) zero-filled,
cg-sense, wavelet, tv; supervised:DIR (a training's folder); without training dps, pigdm, dds, ddnm, diffpir, red-diff, reconstruction,
each as NAME[:K][:steps=N][:SETTING=VALUE] (mean of K samples, one by default; deft_med/guidance.py says the settings); deft:mean,
deft:sample, deft:K (mean of K samples), with the data-consistency steps that the card says; deft+dc:... with four of them, deft-dc:...
without. --eta, --trust and --mirrored replace the card's, for tuning. Tune on tune subjects, report on val subjects.
"""

import argparse
import dataclasses
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
    p.add_argument("--slices", type=int, default=3, help="at most this many slices of a subject, evenly spaced (default: %(default)s)")
    p.add_argument("--subjects", type=int, help="at most this many subjects")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--eta", type=float, help="noise of the sampler instead of the card's")
    p.add_argument("--trust", type=float, help="deviation that data consistency allows, instead of the card's")
    p.add_argument("--mirrored", type=int, choices=[0, 1], help="whether evaluations take turns between mirror images")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int)
    p.add_argument("--out", default="runs/benchmark", metavar="DIR", help="folder of results.jsonl and table.md (default: %(default)s)")
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
    import json
    import time
    from pathlib import Path

    import torch

    from deft_med.config import protocol as protocol_of
    from deft_med.simulate import simulate
    from deft_med.subjects import entries

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    protocol, out = protocol_of(arguments.protocol), Path(arguments.out)
    arguments.model = arguments.model or {"CT": "ct", "MR": "mri"}[protocol.modality]
    listed = entries(Path(arguments.data), Path(arguments.manifest) if arguments.manifest else None, arguments.split)
    listed = [e for e in listed if arguments.only in e["image"]]
    methods = [name.strip() for name in arguments.methods.split(",")]
    subjects = sorted({e["subject"] for e in listed})[:arguments.subjects]
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    bench, begun = Bench(arguments), time.monotonic()
    settings = {m: bench.settings(m) for m in methods}
    done = [r for r in done if (r["protocol"], r["seed"]) == (protocol.name, arguments.seed) and r["settings"] == settings.get(r["method"])]
    have = {(r["subject"], r["slice"], r["method"]) for r in done}
    asked = set()
    for number, subject in enumerate(subjects):
        for key, volume in chosen_slices([e for e in listed if e["subject"] == subject], arguments.slices, protocol.modality):
            asked.add((subject, key))
            missing = [m for m in methods if (subject, key, m) not in have]
            if not missing:
                continue
            scan = simulate(volume, protocol, seed=digest(arguments.seed, subject, key))
            for record in bench.measure(scan, missing):
                record |= {"subject": subject, "slice": key, "protocol": protocol.name, "seed": arguments.seed,
                           "settings": settings[record["method"]]}
                done.append(record)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        left = (time.monotonic() - begun) / (number + 1) * (len(subjects) - number - 1)
        print(f"{number + 1}/{len(subjects)} subjects, {left / 60:.0f} min left", file=sys.stderr)
    text = table([r for r in done if (r["subject"], r["slice"]) in asked], methods)
    (out / "table.md").write_text(text, "utf-8")
    print(text)


def chosen_slices(listed: list[dict], count: int, modality: str = "CT"):
    """(number, one-slice volume) of a subject: ``count`` evenly spaced ones of all slices in the order of the files."""
    import numpy as np

    from deft_med import io
    from deft_med.volume import Volume

    nifti = (".nii", ".nii.gz")
    sources = [io.read(e["image"], modality=modality if e["image"].endswith(nifti) else None) for e in listed]
    stacks = [source.volume for source in sources if source.volume is not None]
    places = [(v, k) for v in stacks for k in range(len(v.data))]
    picks = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)) if count > 1 else [len(places) // 2]
    for number in picks:
        volume, k = places[number]
        yield int(number), Volume(volume.data[k:k + 1], volume.affine, volume.unit)


def digest(seed: int, subject: str, key: int) -> int:
    """A seed of its own for every slice of every subject."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {subject} {key}".encode()).digest()[:4], "little")


class Bench:
    """Runs methods on one scan and measures them; models are loaded once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.models: dict[str, Any] = {}

    def settings(self, method: str) -> dict:
        """What a number depends on beside scan and method: rows of other settings are not reused."""
        name, _, detail = method.partition(":")
        if name == "supervised":
            import hashlib
            from pathlib import Path

            weights = Path(detail) / "best.safetensors"
            fed = self._supervised(detail)[0]
            return {"model": hashlib.sha256(weights.read_bytes()).hexdigest(), "fed": [fed.filter, fed.inverse]}
        from deft_med.guidance import METHODS

        if name in METHODS:
            return {"model": self._model().card.sha256["prior.safetensors"]}
        if not name.startswith("deft"):
            return {}
        card = self._model().card
        return {"model": card.sha256, "steps": self.arguments.steps, "sampling": dataclasses.asdict(card.sampling)}

    def measure(self, scan, methods: list[str]):
        import time

        import torch

        from deft_med.metrics import ct_metrics, mr_metrics
        from deft_med.problem import pose

        metrics = {"CT": ct_metrics, "MR": mr_metrics}[scan.modality]
        with torch.no_grad():
            problem = pose(scan)
            likelihood = problem.likelihood
            likelihood.direct()  # the ray matrix is built outside the clock
            kept: dict = {}
            for method in methods:
                wall, cpu = time.perf_counter(), time.process_time()
                image, extra = self._run(method, problem, kept)
                times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
                measured = metrics(problem.picture(image), scan.reference.data)
                values = {key.replace("_head", "_body"): of[0] for key, of in measured.items() if isinstance(of, list)}
                yield {"method": method, **values, "chi2": float(likelihood.chi2(image)[0]), **times, **extra}

    def _run(self, method: str, problem, kept: dict):
        from deft_med.guidance import METHODS
        from deft_med.pipeline import draw_posterior
        from deft_med.problem import TV_WEIGHT, total_variation
        from operators.analytic import approximate_inverse

        likelihood = problem.likelihood
        name, _, detail = method.partition(":")
        if name == "fbp":
            window, _, cutoff = (detail or "hann").partition(":")
            return self._filtered(likelihood, window, float(cutoff or 1)).direct(), {}
        if name in problem.classical and (name != "tv" or "fbp" not in problem.classical):
            image, warning = problem.classical[name]()
            return image, {"converged": not warning}
        if name == "tv":
            image, record = total_variation(likelihood, likelihood.direct(), float(detail or TV_WEIGHT))
            return image, {"converged": record.converged, "gap": float(record.gap.max()), "iterations": record.iterations}
        if name == "supervised":
            config, module = self._supervised(detail)
            if config.modality == "CT":
                return module(self._filtered(likelihood, config.filter)), {}
            encoding, channels = likelihood.forward.operator.left, likelihood.forward.operator.right
            return module(likelihood.inverted_by(channels.H @ approximate_inverse(encoding, config.inverse))), {}
        if name in METHODS:
            return self._guided(name, detail, likelihood)
        if name not in ("deft", "deft-dc", "deft+dc"):
            from deft_med.errors import UsageError

            raise UsageError(f"unknown method {method!r}: python -m deft_med.benchmark --help lists them")
        model = self._model()
        likelihood = self._filtered(likelihood, model.filter) if model.card.modality == "CT" else likelihood
        settings = {"consistency": {"deft": None, "deft-dc": 0, "deft+dc": 4}[name], "seed": self.arguments.seed}
        if detail == "mean":
            return draw_posterior(likelihood, model, steps=1, **settings)[:, 0], {"nfe": 1}
        count = 1 if detail == "sample" else int(detail)
        if len(kept.get(name, ())) < count:  # samples of a method are shared by its averages; the time is that of all of them
            import time

            begun = time.perf_counter(), time.process_time()
            kept[name] = draw_posterior(likelihood, model, steps=self.arguments.steps, samples=self._most(name), **settings)[0]
            most = len(kept[name])
            kept[name, "each"] = (time.perf_counter() - begun[0]) / most, (time.process_time() - begun[1]) / most
        samples, each = kept[name][:count], kept[name, "each"]
        spread = {"std": float(samples.std(0).square().mean().sqrt()) if count > 1 else None}
        return samples.mean(0, keepdim=True), {"nfe": 1 + count * (self.arguments.steps - 1), "seconds": count * each[0],
                                               "cpu_seconds": count * each[1], **spread}

    def _guided(self, name: str, detail: str, likelihood):
        """A method without training, on the model's prior."""
        from deft_med.errors import UsageError
        from deft_med.guidance import METHODS, sample_with
        from deft_med.simulate import slice_generator

        count = 1
        settings: dict[str, Any] = {}
        try:
            for part in filter(None, detail.split(":")):
                key, is_setting, value = part.partition("=")
                if is_setting:
                    settings[key] = float(value)
                else:
                    count = int(part)
            steps = int(settings.pop("steps", METHODS[name].steps))
            if "sd" in METHODS[name].settings:
                settings.setdefault("sd", self._model().deft.prior.sd)
            samples = sample_with(name, self._model().deft.prior, likelihood, steps=steps, **settings,
                                  generators=[slice_generator(self.arguments.seed, 0, k, purpose="sample") for k in range(count)])
        except ValueError as error:
            raise UsageError(f"method {name}:{detail}: {error}") from error
        spread = float(samples.std(0).square().mean().sqrt()) if count > 1 else None
        return samples.mean(0, keepdim=True), {"nfe": count * steps, "std": spread}

    @staticmethod
    def _filtered(likelihood, window: str, cutoff: float = 1.0):
        from operators.analytic import FilteredBackprojection

        return likelihood.inverted_by(FilteredBackprojection(likelihood.forward.operator, window=window, cutoff=cutoff))

    def _most(self, name: str) -> int:
        counts = [m.partition(":")[2] for m in self.arguments.methods.split(",") if m.partition(":")[0].strip() == name]
        return max([int(c) for c in counts if c.strip().isdigit()] or [1])

    def _model(self):
        from deft_med import bundle
        from deft_med.network import use_half

        if "deft" not in self.models:
            model = bundle.load_model(self.arguments.model)
            chosen = {key: getattr(self.arguments, key) for key in ("eta", "trust") if getattr(self.arguments, key) is not None}
            chosen |= {} if self.arguments.mirrored is None else {"mirrored": bool(self.arguments.mirrored)}
            sampling = dataclasses.replace(model.card.sampling, **chosen)
            self.models["deft"] = dataclasses.replace(model, card=dataclasses.replace(model.card, sampling=sampling))
            use_half(self.models["deft"].deft, "cpu")
        return self.models["deft"]

    def _supervised(self, folder: str):
        from deft_med.kinds import trained
        from deft_med.network import use_half

        if folder not in self.models:
            self.models[folder] = trained(folder)
            use_half(self.models[folder][1], "cpu")
        return self.models[folder]


def table(records: list[dict], methods: list[str]) -> str:
    """Markdown: mean over subjects (each the mean of its slices) and standard deviation between subjects."""
    import numpy as np

    subjects = sorted({r["subject"] for r in records})
    lines = [f"n = {len(subjects)} subjects, {len({(r['subject'], r['slice']) for r in records})} slices", "",
             "| method | PSNR | SSIM | PSNR body | SSIM body | chi2 | s / slice | CPU-s / slice |", "|---|---|---|---|---|---|---|---|"]
    for method in methods:
        rows = [r for r in records if r["method"] == method]
        if not rows:
            continue
        cells = []
        for key, digits in (("psnr", 2), ("ssim", 3), ("psnr_body", 2), ("ssim_body", 3), ("chi2", 3), ("seconds", 2), ("cpu_seconds", 2)):
            of = {s: [r[key] for r in rows if r["subject"] == s and r[key] is not None] for s in subjects}
            each = [float(np.mean(values)) for values in of.values() if values]
            spread = f" ± {np.std(each, ddof=1):.{digits}f}" if key in ("psnr", "ssim", "psnr_body", "ssim_body") and len(each) > 1 else ""
            cells.append(f"{np.mean(each):.{digits}f}{spread}" if each else "-")
        unfinished = sum(not r.get("converged", True) for r in rows)
        lines.append(f"| {method}{f' ({unfinished} not converged)' if unfinished else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
