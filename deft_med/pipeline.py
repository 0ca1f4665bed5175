"""reconstruct(): the walk of one scan, from measurements to an image with its uncertainty."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deft_med import metrics
from deft_med.bundle import Model
from deft_med.errors import UsageError
from deft_med.guidance import dds
from deft_med.intensity import Window
from deft_med.likelihood import Gaussian
from deft_med.network import use_half
from deft_med.sample import dpm, start
from deft_med.schedule import Denoiser, sigmas
from deft_med.simulate import slice_generator, unresolved
from deft_med.volume import Scan, Volume
from operators.analytic import FilteredBackprojection
from operators.ct import encode
from operators.noise import estimate as estimate_noise
from operators.variational import TVRecord, tv

METHODS = ("deft", "fbp", "tv")
ESTIMATES = ("average", "mean", "sample")
BASELINE = "hann"  # window of the FBP that stands beside every result
AIR = -1.0  # u of air: nothing is thinner
TV_WEIGHT = 3.0  # of the variation of u against |y - A u|^2 / (2 s^2); chosen on the tune subjects
STEPS, SAMPLES = 20, 8
START = 3.0  # noise level around the posterior mean where samples start: far above the posterior's own spread (u = HU / 1000)


@dataclass(frozen=True)
class Reconstruction:
    """What a run made: images in HU on the scan's grid, and how they were made.

    ``std`` is the posterior standard deviation per pixel (None for one sample); ``metrics`` holds per-slice lists for the method
    and for FBP where there is a reference; ``chi2`` the data misfit of mean, samples, FBP (1 is expected for a sample).
    """

    volume: Volume
    std: Volume | None
    baseline: Volume
    reference: Volume | None
    method: str
    estimate: str
    samples: int
    metrics: dict
    chi2: dict
    timing: dict
    provenance: dict
    simulated: bool
    title: str = ""
    warnings: tuple[str, ...] = ()


def reconstruct(scan: Scan, model: Model | None = None, *, method: str = "deft", estimate: str = "average", steps: int = STEPS,
                samples: int = SAMPLES, seed: int = 0, device: str = "auto",
                progress: Callable[[int, int], None] | None = None) -> Reconstruction:
    """Reconstruct a scan.

    Args:
        scan: measurements with geometry, grid and noise (estimated from the data where it is None).
        model: prior and h-transform, from ``bundle.load_model``; only method 'deft' needs one.
        method: 'deft', 'fbp' or 'tv'.
        estimate: 'average' of ``samples`` posterior samples, posterior 'mean' in one evaluation, or one 'sample'.
        steps: denoiser evaluations per sample, the first of which (the posterior mean) all samples of a slice share.
        progress: called as progress(done, total) after each evaluation.

    Slice k, sample j draw from (seed, k, j), and every item is computed by itself: a slice does not depend on its batch.
    Raises UsageError for an unknown method, estimate or device and for method 'deft' without a model.
    """
    _check(method, estimate, model, steps, samples)
    clock = _Clock()
    place = _place(device)
    window = model.window if model is not None else Window()
    with clock("operator"), torch.no_grad():
        likelihood = likelihood_of(scan, window, place, filter=BASELINE if model is None else model.filter)
    with clock("fbp"), torch.no_grad():
        fbp = likelihood.inverted_by(FilteredBackprojection(likelihood.forward.operator, window=BASELINE)).direct()
    warnings: tuple[str, ...] = ()
    count = samples if method == "deft" and estimate == "average" else 1
    with clock(method), torch.no_grad():
        if method == "fbp":
            drawn = fbp[:, None]
        elif method == "tv":
            image, record = total_variation(likelihood, fbp)
            drawn = image[:, None]
            if not record.converged:
                gap = float(record.gap.max())
                warnings += (f"total variation stopped at a relative gap of {gap:.2g} after {record.iterations} iterations",)
        else:
            assert model is not None
            use_half(model.to(place).deft, place)
            drawn = draw_posterior(likelihood, model, steps=1 if estimate == "mean" else steps, samples=count, seed=seed, progress=progress)
    with clock("quality"), torch.no_grad():
        mean = drawn.mean(1)
        std = drawn.std(1) if count > 1 else None
        chi2 = {"mean": likelihood.chi2(mean), "fbp": likelihood.chi2(fbp)}
        if method == "deft" and estimate != "mean":
            chi2["samples"] = torch.stack([likelihood.chi2(s) for s in drawn.unbind(1)]).mean(0)
        if scan.reference is not None:
            chi2["reference"] = likelihood.chi2(window.normalise(torch.from_numpy(scan.reference.data)[:, None].to(place)))
        volume, baseline = (_volume(window.restore(u), scan) for u in (mean, fbp))
        measured = {}
        if scan.reference is not None:
            measured = {method: metrics.ct_metrics(volume.data, scan.reference.data),
                        "fbp": metrics.ct_metrics(baseline.data, scan.reference.data)}
    if scan.noise is None:
        warnings += ("the noise level was estimated from the data",)
    provenance = {"method": method, "estimate": estimate, "steps": steps if method == "deft" else None, "samples": count, "seed": seed,
                  "device": place.type, "protocol": scan.protocol, "noise": "estimated" if scan.noise is None else "given"}
    return Reconstruction(
        volume=volume, std=None if std is None else _volume(std * window.scale, scan), baseline=baseline, reference=scan.reference,
        method=method, estimate=estimate, samples=count, metrics=measured, timing=clock.seconds,
        chi2={key: float(value.mean()) for key, value in chi2.items()} | {"expected": 1.0}, provenance=provenance,
        simulated=scan.simulated, warnings=warnings)


def total_variation(likelihood: Gaussian, x0: Tensor, weight: float = TV_WEIGHT) -> tuple[Tensor, TVRecord]:
    """argmin |y - A u|^2 / (2 s^2) + weight TV(u) over u >= air, and how far it converged: the classical method beside DEFT."""
    forward = likelihood.forward
    shift = forward(torch.zeros_like(x0))
    return tv(forward.operator * forward.a, likelihood.y - shift, weight, sigma=likelihood.sigma, x0=x0.clamp(min=AIR), lower=AIR,
              max_iterations=1500)


def posterior_denoiser(likelihood: Gaussian, model: Model, consistency: int | None = None) -> Denoiser:
    """DEFT's denoiser for these measurements, followed by ``consistency`` CG steps towards the data (the card's number by default)."""
    deft, count = model.deft.given(likelihood), model.consistency if consistency is None else consistency
    return dds(deft, likelihood, sd=model.trust, iterations=count) if count else deft


def draw_posterior(likelihood: Gaussian, model: Model, *, steps: int = STEPS, samples: int = 1, seed: int = 0, first: int = 0,
                   consistency: int | None = None, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Samples (S, K, 1, ny, nx): the posterior mean in one evaluation at sigma_max, then K runs of steps - 1 levels around it.

    With steps = 1 it is that mean, (S, 1, 1, ny, nx). Slice k, sample j draw from (seed, first + k, j), and every item is computed
    alone, so that its pixels do not depend on what else is reconstructed.
    """
    slices, shape = len(likelihood.y), likelihood.forward.operator.domain_shape
    levels = sigmas(max(1, steps - 1), low=model.sigma_min, high=START)
    done, total, items = 0, slices * (1 + (samples * (steps - 1) if steps > 1 else 0)), []

    def tick(*_: object) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for index in range(slices):
        denoiser = posterior_denoiser(likelihood.take(torch.tensor([index])), model, consistency)
        x = start((1, 1, *shape), model.sigma_max, [slice_generator(seed, first + index, purpose="start")], device=likelihood.y.device)
        mean = denoiser(x, x.new_full((1,), model.sigma_max))
        tick()
        if steps == 1:
            items.append(mean)
            continue
        for sample in range(samples):
            generators = [slice_generator(seed, first + index, sample, purpose="sample")]
            x = start(mean.shape, START, generators, mean, device=mean.device)
            items.append(dpm(denoiser, x, levels, eta=model.eta, generators=generators, callback=tick))
    return torch.cat(items).reshape(slices, -1, 1, *shape)


def likelihood_of(scan: Scan, window: Window, device: str | torch.device = "cpu", *, filter: str = BASELINE) -> Gaussian:
    """The likelihood of a scan's images in u: its noise, and what its grid cannot resolve of the line integrals."""
    scan = with_known_noise(scan)
    y, noise = (torch.from_numpy(np.broadcast_to(values, scan.y.shape).copy())[:, None].to(device) for values in (scan.y, scan.noise))
    operator = encode(scan.grid, scan.acquisition, device)
    sigma = unresolved(noise, max(scan.grid.spacing))
    return Gaussian(window.fold(operator), y, sigma, FilteredBackprojection(operator, window=filter))


def with_known_noise(scan: Scan) -> Scan:
    """The scan itself or, where it does not know its noise, the same with an estimate from its data."""
    return scan if scan.noise is not None else replace(scan, noise=estimate_noise(torch.from_numpy(scan.y)).numpy())


def _volume(values: Tensor, scan: Scan) -> Volume:
    return Volume(values[:, 0].cpu().numpy().astype(np.float32), scan.lps, "HU")


def _check(method: str, estimate: str, model: Model | None, steps: int, samples: int) -> None:
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if estimate not in ESTIMATES:
        raise UsageError(f"unknown estimate {estimate!r}: choose one of {', '.join(ESTIMATES)}")
    if method == "deft" and model is None:
        raise UsageError("method deft wants a model: load one with deft_med.bundle.load, or choose method fbp or tv")
    if steps < 1 or samples < 1:
        raise UsageError(f"steps and samples are at least 1, got {steps} and {samples}")


def _place(device: str) -> torch.device:
    try:
        place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: choose auto, cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here: say --device cpu, or auto")
    return place


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun
