"""Reconstruct a CT or MR scan with DEFT, its uncertainty beside it. Research use only, not a medical device.

INPUT is a measurement: sinogram.npz, k-space as fastMRI or ISMRMRD (MRD) HDF5 or as complex .npy. Or it is an image: a DICOM file
(that slice), a folder of one DICOM series, a NIfTI file. An image holds no measurements: it is studied retrospectively under
--protocol, and everything that is written says SIMULATED.

Exit codes: 0 done; 1 a bug; 2 usage; 3 input readable but not for us; 4 input broken; 6 resources; 7 output in the way; 8 the model does
not fit; 9 done, but chi2 is above what the model's card knows of this protocol or, where it knows nothing, above 2 (means and classical
fits: 3): results are written, marked CHECK FAILED, and want a look before use; 130, 143 interrupted or terminated. A batch may take 0 and 9
for "results are there" and everything else for "they are not".
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

DEFAULTS = {"CT": ("ct_sparse60", "ct"), "MR": ("mri_cartesian_4x", "mri")}  # protocol and model
BASELINES = {"fbp": "FBP", "tv": "TV", "cg-sense": "CG-SENSE"}
EVERY = 60.0  # seconds between lines of progress where there is no terminal


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m deft_med.reconstruct", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", nargs="?", metavar="INPUT", help="DICOM file, folder of one series, NIfTI, sinogram.npz, k-space .h5 or .npy")
    p.add_argument("--example", choices=["ct", "mr"],
                   help="instead of INPUT: a head CT slice that ships with pydicom, or an analytic MR phantom")
    p.add_argument("--out", default="reconstruction", metavar="DIR", help="output folder (default: %(default)s)")
    p.add_argument("--slices", metavar="A[:B]", help="only slice A, or slices A to B, counted from 1: the same pixels as among all")
    p.add_argument("--protocol", metavar="NAME|FILE", help="acquisition to simulate (default: ct_sparse60 or mri_cartesian_4x)")
    p.add_argument("--model", metavar="NAME|DIR", help="prior and h-transform (default: the shipped one, ct or mri)")
    p.add_argument("--method", default="deft", choices=["deft", "deft-online", "fbp", "tv", "zero-filled", "cg-sense", "wavelet"],
                   help="deft; deft-online, one sample by an h that is trained on this scan alone (slow); fbp or tv for CT; zero-filled, "
                   "cg-sense, wavelet or tv for MR (default: %(default)s)")
    p.add_argument("--estimate", default="average", choices=["average", "point", "mean", "sample"],
                   help="average of --samples posterior samples; point: nearly the same image in half of the evaluations, without "
                   "its uncertainty; posterior mean in one evaluation; or one sample (default: %(default)s)")
    p.add_argument("--steps", type=int, metavar="N", help="denoiser evaluations per sample (default: 10; 20 for point)")
    p.add_argument("--samples", type=int, metavar="K", help="samples to average (default: 8; 2 images for point)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: one per core)")
    p.add_argument("--format", choices=["dicom", "nifti", "both"], help="default: dicom for a DICOM input, else nifti")
    p.add_argument("--modality", choices=["CT", "MR"], help="what a NIfTI file holds, where its values do not tell")
    p.add_argument("--beside", metavar="A,B", help="classical methods to show beside deft (default: fbp; zero-filled, cg-sense and wavelet "
                   "for MR, zero-filled alone beside the fast estimates)")
    p.add_argument("--phase", action="store_true", help="MR: also write the phase, in rad, as volume_phase.nii.gz")
    p.add_argument("--cross-check", action="store_true",
                   help="also predict 5 %% of the measurements from the others, by every method (or by a classical --method and baseline)")
    p.add_argument("--overwrite", action="store_true", help="replace the output of an earlier run")
    p.add_argument("--allow-lossy", action="store_true", help="accept a source that went through lossy compression; recorded")
    p.add_argument("--out-of-scope-ok", action="store_true", help="run a scan that the model's card does not cover; recorded")
    p.add_argument("--quality-ok", action="store_true",
                   help="end with 0, not 9, where the check of quality fails; the result is written and marked either way")
    p.add_argument("--quiet", action="store_true", help="no progress, no lines but errors")
    p.add_argument("--json", action="store_true", help="print run.json to standard output at the end")
    p.add_argument("--version", action="store_true", help="print the version and exit")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from deft_med import __version__
    from deft_med.errors import DeftMedError

    if arguments.version:
        print(f"deft_med {__version__}")
        return 0
    before = {number: signal.signal(number, _stopped) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(arguments)
        return 0
    except DeftMedError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory: give fewer slices, or a smaller protocol grid", 6)
    except Exception as error:
        if os.environ.get("DEFT_MED_TRACEBACK"):
            raise
        return _unexpected(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(line: str, stream: Any) -> None:
    """A line, or nothing where nobody reads any more: a result is not lost for that."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stopped(number: int, _: object) -> None:
    """End at once, leaving nothing: an exception could be swallowed by whatever library is at work."""
    if "deft_med.publish" in sys.modules:
        sys.modules["deft_med.publish"].abandon()
    os.write(2, f"deft_med: error: {'interrupted' if number == signal.SIGINT else 'terminated'}: nothing was written\n".encode())
    os._exit(128 + number)


def _unexpected(error: Exception) -> int:
    """One line for what nobody foresaw: where it happened; not the error's own words, which may quote a header."""
    import traceback

    if isinstance(error, RuntimeError) and "alloc" in str(error):  # torch's way to say it
        return _fail("out of memory: give fewer slices, or a smaller protocol grid", 6)
    at = traceback.extract_tb(error.__traceback__)[-1]
    return _fail(f"unexpected {type(error).__name__} in {os.path.basename(at.filename)}, line {at.lineno}: a bug; please report it, with "
                 "what DEFT_MED_TRACEBACK=1 in the environment shows", 1)


def _fail(message: str, code: int) -> int:
    print(f"deft_med: error: {message}", file=sys.stderr)
    return code


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from deft_med.errors import UsageError
    from deft_med.publish import check_target

    begun = time.perf_counter()
    if (arguments.input is None) == (arguments.example is None):
        raise UsageError("give one INPUT (DICOM file or folder, NIfTI, sinogram.npz, k-space .h5 or .npy) or --example; --help says more")
    for name in ("steps", "samples", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is at least 1, got {getattr(arguments, name)}")
    if arguments.device not in ("auto", "cpu") and not arguments.device.startswith("cuda"):
        raise UsageError(f"unknown device {arguments.device!r}: choose auto, cpu or cuda")
    out = Path(arguments.out)
    check_target(out, arguments.overwrite)

    from deft_med.config import protocol as protocol_of
    from deft_med.io import example, read

    if arguments.example == "mr":
        source = phantom()
    else:
        path = example(arguments.example) if arguments.example else Path(arguments.input)
        source = read(path, allow_lossy=arguments.allow_lossy, modality=arguments.modality)
    if arguments.slices is not None:
        source = source.part(*chosen(arguments.slices, source.slices))
    say = (lambda line: None) if arguments.quiet else (lambda line: _print(line, sys.stderr))
    wanted = arguments.format or ("dicom" if source.kind == "dicom" else "nifti")
    if wanted != "nifti" and source.kind != "dicom" and not (source.modality == "MR" and source.placed):
        lacks = ("a place in the patient, which the input does not give" if source.modality == "MR" else
                 "a DICOM input, whose patient and study it copies")
        raise UsageError(f"DICOM output wants {lacks}: say --format nifti")
    from deft_med.pipeline import CLASSICAL, DRAWN, check_method, reconstruct

    check_method(arguments.method, source.modality)
    if arguments.phase and source.modality != "MR":
        raise UsageError(f"--phase is for MR, the input is {source.modality}: leave it out")
    protocol = protocol_of(arguments.protocol or DEFAULTS[source.modality][0])
    if source.scan is None:
        if protocol.modality != source.modality:
            raise UsageError(f"protocol {protocol.name} is for {protocol.modality}, the input is {source.modality}: "
                             "choose another --protocol")
        say(f"{source.describe()}: a finished image holds no measurements; retrospective study under {protocol.name} "
            f"({protocol.description}), everything is marked SIMULATED")
    else:
        say(f"{source.describe()}: {'computed measurements, everything is marked SIMULATED' if source.scan.simulated else 'measurements'}")
    if idle := unused(arguments, source):
        say(f"has no say here: {', '.join(idle)}")

    import torch

    from deft_med import bundle
    from deft_med.problem import with_known_noise
    from deft_med.simulate import simulate

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    scan = with_known_noise(source.scan or simulate(source.volume, protocol, seed=arguments.seed))  # type: ignore[arg-type]
    model, flags = None, []
    if arguments.method in DRAWN:
        model = bundle.load_model(arguments.model or DEFAULTS[source.modality][1])
        flags = bundle.check(model.card, scan, anatomy=source.anatomy)
        if flags and not arguments.out_of_scope_ok:
            from deft_med.errors import ModelError

            raise ModelError(f"the model's card does not cover this scan: {'; '.join(flags)}; choose another --model, --method tv, "
                             "or say --out-of-scope-ok to run it marked")
        for flag in flags:
            say(f"out of scope: {flag}")
    say(f"reconstructing {len(scan.y)} slice{'s' * (len(scan.y) > 1)} by {arguments.method}")
    bar, ready = _Bar(say, terminal=not arguments.quiet and sys.stderr.isatty()), time.perf_counter()
    result = reconstruct(
        scan, model, method=arguments.method, estimate=arguments.estimate, seed=arguments.seed, device=arguments.device, progress=bar,
        steps=arguments.steps, samples=arguments.samples,
        beside=None if arguments.beside is None else [name.strip() for name in arguments.beside.split(",") if name.strip()])
    bar.close()
    result = dataclasses.replace(result, timing={"reading": ready - begun, **result.timing})
    for warning in result.warnings:
        say(warning)
    if arguments.cross_check:
        from deft_med.crosscheck import FEW, cross_check

        beside = CLASSICAL[source.modality] if arguments.method == "deft" else result.beside
        methods = tuple(dict.fromkeys([*beside, arguments.method]))
        say(f"cross-check: once more from 95 % of the measurements, by {', '.join(methods)}")
        checking = time.perf_counter()
        try:
            checked = cross_check(scan, model, methods, steps=result.steps, samples=result.samples, estimate=result.estimate,
                                  seed=arguments.seed, device=result.provenance["device"])
            result = dataclasses.replace(result, cross_check=checked)
            words = "" if checked["units"] >= FEW else (
                f"the cross-check holds out {checked['units']} views or lines: which method is ahead may be chance")
        except ValueError as error:  # too little to hold out: the reconstruction stands
            words = f"no cross-check: {error}"
        result = dataclasses.replace(result, timing={**result.timing, "cross-check": time.perf_counter() - checking},
                                     warnings=(*result.warnings, *[words] * bool(words)))
        if words:
            say(words)
    record = publish(result, source, out, arguments, wanted, model, flags)
    if arguments.json:
        import json

        _print(json.dumps(record, indent=2), sys.stdout)
    say(summary(result, arguments.out, time.perf_counter() - begun))
    if result.failed and not arguments.quality_ok:
        from deft_med.errors import QualityError

        raise QualityError(f"quality check failed: {failure(result)}; the result is written, marked: look at it before use, or say "
                           "--quality-ok")


def chosen(text: str, count: int) -> tuple[int, int]:
    """Slices A to B as first and last + 1, counted from 0; UsageError for what is not there."""
    from deft_med.errors import UsageError

    one, colon, other = text.partition(":")
    numbers = [int(part) if part.isdecimal() else 0 for part in (one, other if colon else one)]
    if not 1 <= numbers[0] <= numbers[1] <= count:
        raise UsageError(f"--slices wants A or A:B between 1 and {count}, got {text!r}")
    return numbers[0] - 1, numbers[1]


def unused(arguments: argparse.Namespace, source: Any) -> list[str]:
    """Options that were given and change nothing."""
    deft, estimate = arguments.method == "deft", arguments.estimate
    drawn = deft or arguments.method == "deft-online"
    idle = {"protocol": source.scan is not None, "modality": source.kind != "nifti", "model": not drawn, "beside": not drawn,
            "estimate": not deft, "steps": not deft or estimate == "mean", "samples": not deft or estimate in ("mean", "sample")}
    usual = parser().get_default
    return [f"--{name}" for name, so in idle.items() if so and getattr(arguments, name) != usual(name)]


def failure(result) -> str:
    """Why the check of quality failed; empty where it did not."""
    from deft_med.trust import verdict

    return verdict(result.trust["quality"], result.provenance["protocol"]) if result.failed else ""


def phantom():
    """The analytic MR phantom, by way of an MRD file."""
    import tempfile
    from pathlib import Path

    from deft_med.io import mrd_write, read
    from deft_med.phantom import mr_phantom

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom.mrd"
        mrd_write.write(path, mr_phantom(), (0.9, 0.9))
        source = read(path)
    return dataclasses.replace(source, scan=dataclasses.replace(source.scan, simulated=True))  # type: ignore[type-var]


def publish(result, source, out, arguments, wanted: str, model, flags: list[str]) -> dict:
    """Write series, volume, report and record; returns the record."""
    import platform

    import numpy as np
    import torch

    from deft_med import __version__, io, report
    from deft_med.publish import published, write_record

    provenance = result.provenance | {
        "deft_med": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "model": None if model is None else f"{model.card.name} {model.card.version}",
        "model_sha256": None if model is None else model.card.sha256, "source": source.kind, "source_sha256": source.digest,
        "simulated": result.simulated, "slices": arguments.slices, "lossy_source": source.lossy, "out_of_scope": flags,
        "placed": source.placed, "sized": source.sized, "quality": result.quality,
    }
    what = f"Retrospective {source.modality} study" if result.simulated else f"{source.modality} reconstruction"
    title = f"{what}: {result.method.upper()}"
    result = dataclasses.replace(result, provenance=provenance, warnings=(*result.warnings, *flags), title=title)
    record = {"provenance": provenance, "metrics": result.metrics, "chi2": result.chi2, "trust": result.trust,
              "cross_check": result.cross_check, "seconds": result.timing, "profile": result.profile,
              "warnings": list(result.warnings), "notes": "research use only, not a medical device"}
    how = (f"deft_med {__version__}, method {result.method}, estimate {result.estimate}, {result.samples} samples, "
           f"seed {arguments.seed}, protocol {provenance['protocol']}")
    if result.failed:
        how = f"QUALITY CHECK FAILED: {failure(result)}; {how}"
    name, base, marked = result.method.upper(), result.baseline.replace("-", "_"), "CHECK FAILED, " if result.failed else ""
    forms = ("dicom", "nifti") if wanted == "both" else (wanted,)
    pictures = [("", name.replace("-", "_"), result.volume, f"{marked}{name} reconstruction", how, forms),
                (f"_{base}", base.upper(), result.beside[result.baseline], f"{base} baseline", f"deft_med {__version__}, {base}", forms)]
    if result.std is not None:
        width = interval_words(result)
        spread = f"posterior standard deviation of {result.samples} samples ({width})"
        pictures += [("_std", "STDDEV", result.std, f"{marked}standard deviation", f"{spread}, {how}", forms),  # times one number, it is:
                     ("_interval", "INTERVAL", result.interval, f"{marked}half-width of the interval", f"{width}, {how}", ("nifti",))]
    if arguments.phase and result.phase is not None:
        pictures.append(("_phase", "PHASE", result.phase, "phase", f"phase in rad, as the coil maps have it, {how}", ("nifti",)))
    with published(out, arguments.overwrite) as folder:
        for suffix, kind, volume, description, derivation, forms in pictures:
            for form in forms:
                file = folder / (f"dicom{suffix}" if form == "dicom" else f"volume{suffix}.nii.gz")
                record["clipped"] = record.get("clipped", 0) + io.write(
                    volume, file, source, format=form, kind=kind, description=description, derivation=derivation,
                    simulated=result.simulated, uid_entropy=[f"{key} {value}" for key, value in provenance.items()])
        report.reports(result, folder)
        write_record(folder, record)
    return record


def summary(result, out: str, seconds: float) -> str:
    """The last line: what was made, how good it is where that is known, where it lies; ``seconds`` from the command's start."""
    parts = [f"{result.method} {result.estimate if result.method == 'deft' else ''}".strip()]
    psnr = {name: measured["mean"]["psnr"] for name, measured in result.metrics.items()}
    if psnr and None not in psnr.values():
        others = {name: value for name, value in psnr.items() if name != result.method}
        parts.append(f"PSNR {psnr[result.method]:.2f} dB" + _best(others, max, ".2f"))
    if result.cross_check:
        found = result.cross_check["methods"]
        missed = {name: 100 * each["error"] for name, each in found.items()}
        others = {name: value for name, value in missed.items() if name != result.method}
        second = sorted(missed, key=lambda name: missed[name])[:2][-1]  # where ours is the best, its distance is the next one's
        worse = found[result.method if found[result.method]["behind"] else second]
        words = f"; they differ by {100 * worse['behind']:.1f} +- {100 * worse['behind_se']:.1f}" if worse["behind_se"] else ""
        parts.append(f"held-out error {missed[result.method]:.1f} %" + _best(others, min, ".1f", words))
    known = [("images" if result.estimate == "point" else "samples", "samples"), ("mean", "mean"),
             (BASELINES.get(result.baseline, result.baseline), result.baseline)]
    misfits = [f"{result.chi2[key]:.3f} ({name})" for name, key in known if key in result.chi2]
    parts.append(f"chi2 {', '.join(misfits)}, expected 1 +- {result.chi2['deviation']:.1g}")
    return f"done in {seconds:.1f} s: {', '.join(parts)}; open {out}/report.html"


def _best(others: dict[str, float], best, form: str, more: str = "") -> str:
    """The best of the other methods, in brackets."""
    if not others:
        return ""
    name = best(others, key=lambda name: others[name])
    return f" (best of the others: {BASELINES.get(name, name)} {others[name]:{form}}{more})"


def interval_words(result) -> str:
    """How to read the standard deviation as an interval."""
    from deft_med.trust import worth

    made = result.trust["interval"]
    return f"the {100 * made['level']:g} % interval is the image +- {made['half_width_in_std']:.4g} standard deviations, {worth(made)}"


class _Bar:
    """Progress with the time that is left: a bar on a terminal, elsewhere a line a minute."""

    bar: Any = None

    def __init__(self, say: Callable[[str], None], terminal: bool) -> None:
        self.say, self.terminal = say, terminal
        self.begun = self.told = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if not self.terminal:
            now = time.perf_counter()
            if now - self.told > EVERY:
                self.told = now
                left = (now - self.begun) * (total - done) / done
                self.say(f"{100 * done // total} % of {total} evaluations, about {left / 60:.0f} min left")
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="eval", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} evaluations, {remaining} left")
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
