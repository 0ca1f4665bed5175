"""reconstruct(): the walk of one scan, from measurements to an image with its uncertainty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deft_med import metrics, trust
from deft_med.bundle import Model
from deft_med.errors import UsageError
from deft_med.finetune import ITERATIONS, sample_online, unsuited
from deft_med.guidance import dds
from deft_med.likelihood import Gaussian
from deft_med.network import use_half
from deft_med.problem import Problem, pose, with_known_noise
from deft_med.sample import dpm, renoise, start
from deft_med.schedule import Denoiser, sigmas
from deft_med.simulate import slice_generator
from deft_med.stopwatch import Clock, shares
from deft_med.trust import DOUBTFUL
from deft_med.volume import Scan, Volume

CLASSICAL = {"CT": ("fbp", "tv"), "MR": ("zero-filled", "cg-sense", "wavelet", "tv")}
DRAWN = ("deft", "deft-online")  # on the model's prior
METHODS = {modality: (*DRAWN, *names) for modality, names in CLASSICAL.items()}
ESTIMATES = ("average", "point", "mean", "sample")
UNITS = {"CT": "HU", "MR": "a.u."}
STEPS, SAMPLES = 10, 8  # by `--sweep`: the average is within 0.06 dB of that of 100 steps, the samples' deviation within 6 %
POINT, POINT_STEPS = 2, 20  # images behind a point estimate, within 0.2 dB of the average of SAMPLES; 10 steps would cost up to 0.35 dB
TOGETHER = 8  # samples of a slice that are computed in one batch
START = 3.0  # noise level around the posterior mean where samples start: far above the posterior's own spread


@dataclass(frozen=True)
class Reconstruction:
    """What a run made: images in the scan's unit (HU, or a.u. for an MR magnitude) on its grid, and how they were made.

    ``beside`` holds the classical methods that every result is shown with, the baseline first; ``std`` is the posterior standard
    deviation per pixel (None for one sample), ``interval`` half the width of the interval about ``volume``, ``phase`` that of an
    MR image in rad; ``metrics`` holds per-slice
    lists for every method where there is a reference; ``chi2`` the data misfit of mean, samples and the methods beside: 1 is
    "expected" for a sample, up to "deviation" = sqrt(2 / M), M "measurements" in all slices. ``trust`` says what interval and chi2 are
    worth (`deft_med.trust`), ``profile`` where the method's seconds went.
    """

    volume: Volume
    std: Volume | None
    beside: dict[str, Volume]
    reference: Volume | None
    method: str
    estimate: str
    samples: int
    metrics: dict
    chi2: dict
    timing: dict
    provenance: dict
    simulated: bool
    steps: int = 1
    title: str = ""
    warnings: tuple[str, ...] = ()
    cross_check: dict | None = None
    interval: Volume | None = None
    phase: Volume | None = None
    trust: dict = field(default_factory=dict)
    profile: dict = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The classical method that speaks for all of them: fbp or zero-filled."""
        return next(iter(self.beside))

    @property
    def failed(self) -> bool:
        """Whether the check of quality failed."""
        return self.quality == "failed"

    @property
    def quality(self) -> str:
        """What the check of quality says: passed, failed or not checked (`deft_med.trust.judge`)."""
        return self.trust.get("quality", {}).get("check", "not checked")


def reconstruct(scan: Scan, model: Model | None = None, *, method: str = "deft", estimate: str = "average", steps: int | None = None,
                samples: int | None = None, beside: Sequence[str] | None = None, seed: int = 0, device: str = "auto",
                progress: Callable[[int, int], None] | None = None) -> Reconstruction:
    """Reconstruct a scan, slice by slice.

    Args:
        scan: measurements with geometry, grid and noise (estimated from the data where it is None).
        model: prior and h-transform, from ``bundle.load_model``; for the methods 'deft' and 'deft-online'.
        method: 'deft'; 'deft-online', one sample by an h that is trained on each slice's measurements alone (`finetune.online`: no pairs,
            thirty times the work of a default run); for CT 'fbp' or 'tv'; for MR 'zero-filled', 'cg-sense', 'wavelet' or 'tv'.
        estimate: 'average' of ``samples`` posterior samples (8), with their spread; 'point', the average of ``samples`` images (2) whose
            noise is drawn anew at every level: the fast one, nearer to the posterior mean than samples are, without a spread; the
            posterior 'mean' in one evaluation; or one 'sample'.
        steps: denoiser evaluations per sample (10; 20 for 'point'), the first of which (the posterior mean) all samples of a slice share.
        beside: classical methods to show beside DEFT's result, of the method's modality. By default fbp; zero-filled, cg-sense and wavelet
            for MR, but zero-filled alone beside the fast estimates 'point' and 'mean', which would wait for the others.
        progress: called as progress(done, total) after each evaluation.

    Slice k, sample j draw from (seed, k, j), and every item is computed by itself: a slice does not depend on its batch.
    Raises UsageError for an unknown method, estimate or device, for 'deft' and 'deft-online' without a model, and for 'deft-online' on
    measurements that are not Gaussian.
    """
    samples = (POINT if estimate == "point" else SAMPLES) if samples is None else samples
    steps = (POINT_STEPS if estimate == "point" else STEPS) if steps is None else steps
    _check(scan, method, estimate, model, steps, samples)
    if unknown := set(beside or ()) - set(CLASSICAL[scan.modality]):
        raise UsageError(f"no classical method {', '.join(map(repr, sorted(unknown)))} for {scan.modality}: choose of "
                         f"{', '.join(CLASSICAL[scan.modality])} to show beside the result")
    estimate = "sample" if method == "deft-online" else "mean" if method == "deft" and steps == 1 else estimate
    place, warnings = device_of(device), []
    clock, inner = Clock(place), Clock(place)
    count = samples if method == "deft" and estimate in ("average", "point") else 1
    if model is not None:
        use_half(model.to(place).deft, place)
    scan = with_known_noise(scan)
    if scan.noise_is != "given":
        warnings.append(f"the noise level was {scan.noise_is}")
    slices, shown = len(scan.y), _Shown(progress, len(scan.y))
    results: dict[str, list[np.ndarray]] = {}
    chi2: dict[str, list[float]] = {}
    measurements = 0

    def keep(name: str, problem: Problem, u: Tensor) -> None:
        results.setdefault(name, []).append(problem.picture(u)[0])
        chi2.setdefault(name, []).append(float(problem.likelihood.chi2(u)[0]))

    for index in range(slices):
        with torch.no_grad():
            with clock("operator"):
                problem = posed(scan, index, model, place)
            measurements += int(torch.as_tensor(problem.likelihood.count).sum())
            for name in _beside(problem, method, estimate, beside):
                if name != method:
                    with clock(name):
                        u, warning = problem.classical[name]()
                    keep(name, problem, u)
                    warnings += [f"slice {scan.first + index + 1}: {name} {warning}"] if warning else []
            parts = {} if model is None else {"prior": model.deft.prior, "h": model.deft.h}
            with clock(method), inner.within(**parts):
                drawn, warning = solve(problem, method, model, steps=1 if estimate == "mean" else steps, samples=count, seed=seed,
                                       index=scan.first + index, zeta=zeta_of(estimate), progress=shown.of(index),
                                       watch=lambda d: inner.timed("evaluation", d))
                warnings += [f"slice {scan.first + index + 1}: {method} {warning}"] if warning else []
            with clock("quality"):
                keep("mean", problem, drawn.mean(1))
                if problem.phase is not None:
                    results.setdefault("phase", []).append(problem.phase(drawn.mean(1))[0])
                if count > 1 and estimate == "average":
                    results.setdefault("std", []).append(problem.picture(drawn[0]).std(0, ddof=1))
                if method in DRAWN and estimate != "mean":
                    each = [float(problem.likelihood.chi2(u)[0]) for u in drawn.unbind(1)]
                    chi2.setdefault("samples", []).append(sum(each) / len(each))
                if scan.reference is not None and problem.image is not None:
                    chi2.setdefault("reference", []).append(float(problem.likelihood.chi2(problem.image(scan.reference.data[index]))[0]))
    volumes = {name: _volume(np.stack(slices), scan) for name, slices in results.items()}
    volume, std, phase = volumes.pop("mean"), volumes.pop("std", None), volumes.pop("phase", None)
    phase = None if phase is None else replace(phase, unit="rad")
    measured = {}
    if scan.reference is not None:
        with clock("quality"):
            measure = {"CT": metrics.ct_metrics, "MR": metrics.mr_metrics}[scan.modality]
            measured = {name: measure(v.data, scan.reference.data) for name, v in {method: volume, **volumes}.items()}
    of = method if method not in DRAWN else "samples" if "samples" in chi2 else "mean"
    misfits = chi2.get("samples", chi2["mean"])
    known = None if model is None or method != "deft" or of != "samples" else model.card.calibration.get(scan.protocol or "")
    found: dict = {"quality": trust.judge(misfits, of, known, math.sqrt(2 * slices / measurements), first=scan.first + 1)}
    if words := trust.verdict(found["quality"], scan.protocol):
        warnings.append(words)
    least = min(range(slices), key=lambda k: misfits[k])
    if of == "samples" and misfits[least] < 1 / DOUBTFUL:
        warnings.append(f"slice {scan.first + least + 1}: chi2 is {misfits[least]:.2f} where 1 is expected: there is less noise than "
                        "assumed")
    compared = volumes or {method: volume}
    interval: Volume | None = None
    if method in DRAWN and model is not None:
        first = next(iter(compared))
        found["prior"] = {"rms": trust.changed(volume, compared[first], scan.modality, scan.reference), "unit": volume.unit,
                          "region": trust.REGIONS[scan.modality], "against": first}
        if std is not None:
            interval, found["interval"] = trust.interval(volume, std, count, model.card, scan.protocol, scan.reference)
    drawn_by = {"deft": {"estimate": estimate, "steps": 1 if estimate == "mean" else steps, "samples": count},
                "deft-online": {"estimate": estimate, "iterations": ITERATIONS, "samples": 1}}.get(method, {})
    provenance = {"method": method, **drawn_by, "seed": seed, "device": place.type, "protocol": scan.protocol, "noise": scan.noise_is}
    return Reconstruction(
        volume=volume, std=std, interval=interval, phase=phase, trust=found, beside=compared, reference=scan.reference, method=method,
        estimate=estimate, samples=count, steps=1 if estimate == "mean" else steps, metrics=measured, timing=clock.seconds,
        provenance=provenance,
        simulated=scan.simulated, warnings=tuple(warnings),
        profile=shares(inner.seconds, clock.seconds[method]) if method == "deft" else {},
        chi2={name: sum(values) / len(values) for name, values in chi2.items()}
        | {"expected": 1.0, "deviation": math.sqrt(2 / measurements), "measurements": measurements})


def _beside(problem: Problem, method: str, estimate: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The classical methods that a result is shown with, the one that speaks for all of them first."""
    if method in DRAWN and wanted is not None:
        return tuple(dict.fromkeys([problem.baselines[0], *wanted]))
    return problem.baselines if method in DRAWN and estimate in ("average", "sample") else problem.baselines[:1]


def posed(scan: Scan, index: int, model: Model | None, device: str | torch.device = "cpu") -> Problem:
    """The problem of a slice as a model sees it, or as the classical methods do."""
    if model is None:
        return pose(scan, index, device=device)
    return pose(scan, index, window=model.window, filter=model.filter, inverse=model.inverse, device=device)


def zeta_of(estimate: str) -> float | None:
    """How much of the noise an estimate draws anew at every level; None for posterior samples."""
    return 1.0 if estimate == "point" else None


def solve(problem: Problem, method: str, model: Model | None, *, steps: int, samples: int, seed: int, index: int = 0,
          zeta: float | None = None, progress: Callable[[int, int], None] | None = None,
          watch: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser) -> tuple[Tensor, str]:
    """One slice by one method: posterior samples (1, K, C, ny, nx), K = 1 for all but DEFT's, and a warning or nothing."""
    if method not in DRAWN:
        u, warning = problem.classical[method]()
        return u[:, None], warning
    assert model is not None
    if method == "deft-online":
        if why := unsuited(problem.likelihood):
            raise UsageError(f"{why}: choose --method deft")
        return sample_online(model.deft.prior, problem.likelihood, iterations=ITERATIONS, seed=seed + index, progress=progress,
                             generator=slice_generator(seed, index, 0, purpose="sample"))[:, None], ""
    return draw_posterior(problem.likelihood, model, steps=steps, samples=samples, seed=seed, first=index, zeta=zeta, progress=progress,
                          watch=watch), ""


def posterior_denoiser(likelihood: Gaussian, model: Model, consistency: int | None = None) -> Denoiser:
    """DEFT's denoiser for these measurements, followed by ``consistency`` CG steps towards the data (the card's number by default)."""
    deft = model.deft.given(likelihood, model.mirrors)
    count = model.consistency if consistency is None else consistency
    return dds(deft, likelihood, sd=model.trust, iterations=count) if count else deft


def draw_posterior(likelihood: Gaussian, model: Model, *, steps: int = STEPS, samples: int = 1, seed: int = 0, first: int = 0,
                   consistency: int | None = None, zeta: float | None = None, progress: Callable[[int, int], None] | None = None,
                   watch: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser) -> Tensor:
    """Samples (S, K, C, ny, nx): the posterior mean in one evaluation at sigma_max, then K runs of steps - 1 levels around it.

    With steps = 1 it is that mean, (S, 1, C, ny, nx). Slice k, sample j draw from (seed, first + k, j), and slices are computed one by
    one, so that their pixels do not depend on what else is reconstructed. Samples of a slice go ``TOGETHER``: a ray matrix that is read
    once serves them all. ``watch`` may stand between the samplers and the denoisers.

    With ``zeta`` the noise is drawn anew from level to level (`sample.renoise`): zeta 1 gives images nearer to the posterior mean than
    samples are, and so their average is there sooner; they say nothing of the posterior's spread.
    """
    slices, shape = len(likelihood.y), likelihood.shape
    levels = sigmas(max(1, steps - 1), low=model.sigma_min, high=START)
    walk = partial(dpm, eta=model.eta) if zeta is None else partial(renoise, zeta=zeta)
    done, total, items = 0, slices * (1 + (samples * (steps - 1) if steps > 1 else 0)), []

    def tick(count: int) -> None:
        nonlocal done
        for _ in range(count):
            done += 1
            if progress is not None:
                progress(done, total)

    for index in range(slices):
        one = likelihood.take(torch.tensor([index])) if slices > 1 else likelihood
        x = start((1, *shape), model.sigma_max, [slice_generator(seed, first + index, purpose="start")], device=likelihood.y.device)
        mean = watch(posterior_denoiser(one, model, consistency))(x, x.new_full((1,), model.sigma_max))
        tick(1)
        if steps == 1:
            items.append(mean)
            continue
        for low in range(0, samples, TOGETHER):
            generators = [slice_generator(seed, first + index, k, purpose="sample") for k in range(low, min(samples, low + TOGETHER))]
            count = len(generators)
            x = start((count, *shape), START, generators, mean, device=mean.device)
            same = one.take(torch.zeros(count, dtype=torch.long)) if count > 1 else one
            denoiser = watch(posterior_denoiser(same, model, consistency))  # of its own: mirrors take turns from the first call on
            items.append(walk(denoiser, x, levels, generators=generators, callback=lambda *_, n=count: tick(n)))
    return torch.cat(items).reshape(slices, -1, *shape)


def _volume(values: np.ndarray, scan: Scan) -> Volume:
    return Volume(values.astype(np.float32), scan.lps, UNITS[scan.modality])


def check_method(method: str, modality: str) -> None:
    """Raises UsageError for a method that the modality does not have."""
    if method not in METHODS[modality]:
        raise UsageError(f"unknown method {method!r} for {modality}: choose one of {', '.join(METHODS[modality])}")


def _check(scan: Scan, method: str, estimate: str, model: Model | None, steps: int, samples: int) -> None:
    check_method(method, scan.modality)
    if estimate not in ESTIMATES:
        raise UsageError(f"unknown estimate {estimate!r}: choose one of {', '.join(ESTIMATES)}")
    if method in DRAWN and model is None:
        raise UsageError(f"method {method} wants a model: load one with deft_med.bundle.load_model, or choose a classical method")
    if method in DRAWN and model is not None and model.card.modality != scan.modality:
        raise UsageError(f"the model is for {model.card.modality}, the scan is {scan.modality}: choose another model")
    if steps < 1 or samples < 1:
        raise UsageError(f"steps and samples are at least 1, got {steps} and {samples}")


def device_of(device: str) -> torch.device:
    """The device of a name, 'auto' for CUDA where there is one; UsageError for one that is not here."""
    try:
        place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: choose auto, cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here: say --device cpu, or auto")
    return place


class _Shown:
    """Progress over all slices from the progress of each."""

    def __init__(self, progress: Callable[[int, int], None] | None, slices: int) -> None:
        self.progress, self.slices = progress, slices

    def of(self, index: int) -> Callable[[int, int], None] | None:
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(index * total + done, self.slices * total)
