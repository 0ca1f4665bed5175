"""Methods run: a method's image on the problem of one slice, and everything that is measured of it."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from deft_med import bundle, finetune, guidance, metrics, peers
from deft_med.bundle import Model
from deft_med.errors import UsageError
from deft_med.kinds import trained
from deft_med.likelihood import Gaussian
from deft_med.meter import Meter
from deft_med.methods import CLASSICAL, CONSISTENCY, GUIDED, ONLINE, POSTERIOR, TRAINED, Entry, parse
from deft_med.network import use_half
from deft_med.nonlinear import Transmission
from deft_med.pipeline import SAMPLES, TOGETHER, draw_posterior
from deft_med.problem import FILTER, Problem, pose
from deft_med.schedule import Denoiser, in_turns
from deft_med.simulate import slice_generator
from deft_med.volume import Scan
from operators.analytic import FilteredBackprojection
from operators.ct import RayTransform
from operators.sense import approximate_inverse


class Draws(NamedTuple):
    """Samples (K, C, ny, nx) of one problem with what they took; averages over fewer of them are theirs too."""

    samples: Tensor
    calls: float  # evaluations
    meter: Meter


class Bench:
    """Runs methods and measures them; models are loaded once. ``samples`` is what a sampler draws where its text leaves it open:
    by default one, and eight for deft and conditional; slow ones draw one."""

    def __init__(self, model: str = "ct", *, samples: int | None = None, seed: int = 0,
                 device: str | torch.device = "cpu") -> None:
        self.model, self.samples, self.seed, self.device = model, samples, seed, torch.device(device)
        self.loaded: dict[str, Any] = {}

    def count(self, entry: Entry) -> int:
        """Samples that a method averages; 0 where it draws none."""
        if not entry.samples or entry.count is not None:
            return entry.count or 0
        return 1 if entry.slow else self.samples or (SAMPLES if entry.name in POSTERIOR else 1)

    def effort(self, method: str) -> float:
        """A guess at what a method costs, in evaluations of the prior: for the time that is left."""
        entry = parse(method)
        return max(1, self.count(entry)) * max(1, entry.steps if entry.count != 0 else 1) * (3 if entry.through_prior else 1)

    def settings(self, method: str) -> dict:
        """What a number depends on beside scan and method: rows of other settings are not reused. Checks the method's text."""
        entry = parse(method)
        found: dict[str, Any] = {"samples": self.count(entry)} if entry.samples else {}
        if entry.folder:
            weights = Path(entry.folder) / "best.safetensors"
            config = self._trained(entry.folder)[0]
            found |= {"model": hashlib.sha256(weights.read_bytes()).hexdigest(), "fed": [config.filter, config.inverse]}
        if entry.name in POSTERIOR:
            card = self._model(entry).card
            found |= {"steps": entry.steps, "sampling": dataclasses.asdict(card.sampling)} | (
                {} if entry.folder else {"model": card.sha256, "residual": card.h.residual})
        if entry.name in GUIDED:
            method_ = GUIDED[entry.name]
            found |= {"model": self._model().card.sha256["prior.safetensors"], "steps": entry.steps,
                      "mirrored": len(self._model().mirrors) > 1, "settings": {**method_.settings, **method_.walk, **entry.settings}}
        if entry.name == "deft-online":
            card = self._model().card
            found |= {"model": card.sha256["prior.safetensors"], "residual": card.h.residual,
                      "settings": {**ONLINE, **entry.settings}}
        return found

    def refusal(self, method: str, problem: Problem) -> str:
        """Why a method cannot run on a problem, or nothing."""
        entry, likelihood = parse(method), problem.likelihood
        if entry.name in CLASSICAL and entry.name not in problem.classical:
            return f"{method}: skipped, the problem has only {', '.join(problem.classical)} of the classical methods"
        if entry.name in GUIDED and (why := guidance.unsuited(entry.name, GUIDED[entry.name], likelihood)):
            return f"{method}: skipped, {why}"
        if entry.name == "deft-online" and (why := finetune.unsuited(likelihood)):
            return f"{method}: skipped, {why}"
        if entry.name in TRAINED and not isinstance(likelihood, Gaussian | Transmission):
            return f"{method}: skipped, its network was fed backprojections or SENSE images, and {type(likelihood).__name__} has none"
        return ""

    def measure(self, scan: Scan, methods: Iterable[str], tell: Callable[[str], None] = lambda _: None, *,
                brightest: float | None = None) -> Iterator[dict]:
        """A record of every method on a scan of one slice: metrics, chi2, cost and, of several samples, calibration.

        ``brightest`` is the maximum of the volume that an MR slice is of, the range of its PSNR; the slice's own without it.
        """
        assert scan.reference is not None
        truth = scan.reference.data
        measures: Callable[..., dict] = metrics.ct_metrics
        if scan.modality == "MR":
            measures = functools.partial(metrics.mr_metrics, data_range=brightest, pixel_mm=max(scan.grid.spacing))
        region = metrics.MASKS[scan.modality](truth[0])
        with torch.no_grad():
            problem = pose(scan, device=self.device)
            problem.likelihood.direct()  # the ray matrix is built outside the clock
            kept: dict = {}
            for method in sorted(methods, key=lambda m: -self.count(parse(m))):  # averages share the samples of the largest
                if why := self.refusal(method, problem):
                    tell(why)
                    continue
                image, extra = self.run(method, problem, kept)
                record = {"method": method, **extra}
                if bool(image.isfinite().all()):
                    found = measures(problem.picture(image), truth)
                    record |= {key.replace("_head", "_body"): of[0] for key, of in found.items() if isinstance(of, list)}
                    record["chi2"] = float(problem.likelihood.chi2(image)[0])
                    if "samples" in extra:
                        record |= _calibration(problem, image, kept[_key(parse(method))].samples[:extra["samples"]], truth[0], region)
                else:
                    record |= {"psnr": None, "converged": False}
                yield record

    def run(self, method: str, problem: Problem, kept: dict) -> tuple[Tensor, dict]:
        """The image u (1, C, ny, nx) of a method and what it took; ``kept`` holds the samples of this problem from method to method."""
        entry = parse(method)
        count = self.count(entry)
        if not count:
            self._load(entry)
            with Meter(self.device) as meter, self._counted(entry) as calls:
                image, extra = self._once(entry, problem)
            return image, {**_cost(meter, 1), "nfe": calls(), **extra}
        key = _key(entry)
        if key not in kept or len(kept[key].samples) < count:
            self._load(entry)
            with Meter(self.device) as meter, self._counted(entry) as calls:
                drawn = self._draw(entry, problem.likelihood, count)
            kept[key] = Draws(drawn, calls(), meter)
        drawn, calls_, meter = kept[key]
        shared = 1 if entry.name in POSTERIOR else 0
        nfe = shared + (calls_ - shared) * count / len(drawn)
        spread = float(drawn[:count].std(0).square().mean().sqrt()) if count > 1 else None
        found = {**_cost(meter, count / len(drawn)), "nfe": nfe, "samples": count, "std": spread}
        if entry.name in POSTERIOR and count < len(drawn):  # others are drawn one by one
            found["drawn_with"] = len(drawn)  # alone it would have taken longer than its share
        return drawn[:count].mean(0, keepdim=True), found

    def _once(self, entry: Entry, problem: Problem) -> tuple[Tensor, dict]:
        """Methods that draw no samples."""
        likelihood = problem.likelihood
        if entry.name in POSTERIOR:
            return self._draw(entry, likelihood, 1, steps=1), {}
        if entry.name == "supervised":
            config, module = self._trained(entry.folder)
            return module(self._fed(likelihood, config.filter, config.inverse)), {}
        if entry.name == "fbp":
            return _filtered(likelihood, entry.words[0] if entry.words else FILTER, entry.settings.get("cutoff", 1.0)).direct(), {}
        image, warning = problem.classical[entry.name](**entry.settings)
        return image, {"converged": not warning}

    def _draw(self, entry: Entry, likelihood: Any, count: int, steps: int | None = None) -> Tensor:
        """Samples (K, C, ny, nx); with one step the posterior mean."""
        model = self._model(entry)
        if entry.name == "deft-online":
            said = {**ONLINE, **entry.settings}
            return finetune.sample_online(model.deft.prior, self._fed(likelihood, model.filter, model.inverse), rate=said["rate"],
                                          iterations=int(said["iterations"]), seed=self.seed,
                                          generator=slice_generator(self.seed, 0, purpose="sample"))
        if entry.name in GUIDED:
            settings = {key: value for key, value in entry.settings.items() if key != "steps"}
            if "sd" in GUIDED[entry.name].settings:
                settings.setdefault("sd", model.deft.prior.sd)
            generators = [slice_generator(self.seed, 0, k, purpose="sample") for k in range(count)]
            peer = entry.name in peers.PEERS  # they take one item; ours as many together as DEFT does
            groups = [[g] for g in generators] if peer else [generators[k:k + TOGETHER] for k in range(0, count, TOGETHER)]
            room = peers if peer else guidance
            try:  # mirrors take turns from the first one on, as DEFT's
                return torch.cat([room.sample_with(
                    entry.name, in_turns(model.deft.prior, model.mirrors), likelihood.take(torch.zeros(len(group), dtype=torch.long)),
                    steps=entry.steps, generators=group, **settings) for group in groups])
            except ValueError as error:
                raise UsageError(f"method {entry.text}: {error}") from error
        if entry.folder:
            config, module = self._trained(entry.folder)
            likelihood = self._fed(likelihood, config.filter, config.inverse)
            model = cast(Model, Amortised.of(model, module))
        else:
            likelihood = self._fed(likelihood, model.filter, model.inverse)
        return draw_posterior(likelihood, model, steps=entry.steps if steps is None else steps, samples=count, seed=self.seed,
                              consistency=self._consistency(entry), zeta=entry.settings.get("zeta"))[0]

    def _consistency(self, entry: Entry) -> int:
        fixed = CONSISTENCY[entry.name]
        return int(entry.settings.get("consistency", self._model(entry).consistency if fixed is None else fixed))

    @staticmethod
    def _fed(likelihood: Any, filter: str, inverse: str) -> Any:
        """The likelihood with the approximate inverse that a network on pairs was trained with."""
        operator = likelihood.forward.operator
        if not likelihood.y.is_complex():
            return _filtered(likelihood, filter)
        return likelihood.inverted_by(operator.right.H @ approximate_inverse(operator.left, inverse))

    def _model(self, entry: Entry | None = None) -> Model:
        if "model" not in self.loaded:
            model = bundle.load_model(self.model)
            use_half(model.to(self.device).deft, self.device)
            self.loaded["model"] = model
        model = self.loaded["model"]
        if entry is None or entry.name not in POSTERIOR:
            return model
        chosen: dict[str, Any] = {key: entry.settings[key] for key in ("eta", "trust") if key in entry.settings}
        if "mirrored" in entry.settings:
            chosen["mirrored"] = bool(entry.settings["mirrored"])
        return replace(model, card=replace(model.card, sampling=replace(model.card.sampling, **chosen)))

    def _trained(self, folder: str) -> tuple[Any, Any]:
        if folder not in self.loaded:
            config, module = trained(folder)
            use_half(module.to(self.device), self.device)
            self.loaded[folder] = config, module
        return self.loaded[folder]

    def _load(self, entry: Entry) -> nn.Module | None:
        """The network whose evaluations count, so that reading it is outside the clock."""
        if entry.samples and not entry.folder:
            return self._model().deft.prior
        if entry.folder and entry.samples:
            self._model()
        return self._trained(entry.folder)[1] if entry.folder else None

    def _counted(self, entry: Entry) -> "_Calls":
        return _Calls(self._load(entry))


@dataclass(frozen=True)
class Amortised:
    """A conditional network in a model's place: the same sampler with the same settings, and no prior in it."""

    module: nn.Module
    eta: float
    trust: float
    consistency: int
    sigma_min: float
    sigma_max: float
    mirrors: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(model: Model, module: nn.Module) -> "Amortised":
        return Amortised(module, model.eta, model.trust, model.consistency, model.sigma_min, model.sigma_max, ((),))

    @property
    def deft(self) -> "Amortised":
        return self

    def given(self, likelihood: Gaussian, mirrors: Sequence[tuple[int, ...]] = ((),)) -> Denoiser:
        return lambda x, sigma: self.module(x, sigma, likelihood)


class _Calls:
    """Counts the images that a network answers while the block runs."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module, self.number = module, 0

    def __enter__(self) -> Callable[[], int]:
        self.hook = None if self.module is None else self.module.register_forward_hook(self._add)
        return lambda: self.number

    def _add(self, module: nn.Module, arguments: tuple, answer: Tensor) -> None:
        self.number += len(answer)

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            self.hook.remove()


def _key(entry: Entry) -> tuple:
    return entry.name, entry.folder, *sorted({**entry.settings, "steps": entry.steps}.items())


def _cost(meter: Meter, share: float) -> dict:
    return {"seconds": meter.seconds * share, "cpu_seconds": meter.cpu_seconds * share, "peak_mb": meter.peak, "rise_mb": meter.rise}


def _filtered(likelihood: Any, window: str, cutoff: float = 1.0) -> Any:
    """The likelihood with another filter in its backprojection, where it has one."""
    if not isinstance(likelihood.forward.operator, RayTransform):
        return likelihood
    return likelihood.inverted_by(FilteredBackprojection(likelihood.forward.operator, window=window, cutoff=cutoff))


def _calibration(problem: Problem, image: Tensor, samples: Tensor, truth: np.ndarray, region: np.ndarray) -> dict:
    """chi2 of the samples and, of several, the share of the region's pixels in the 90 % interval about ``image``, their average, and the
    ranks of the truth."""
    chi2 = float(np.mean([float(problem.likelihood.chi2(u[None])[0]) for u in samples]))
    if len(samples) < 2:
        return {"chi2_samples": chi2}
    pictures = problem.picture(samples)
    inside = metrics.coverage(problem.picture(image)[0], pictures.std(0, ddof=1), len(pictures), truth, mask=region)
    ranks = metrics.rank_histogram(pictures, truth, mask=region)
    if math.isnan(inside):
        return {"chi2_samples": chi2, "coverage": None, "ranks": None}
    return {"chi2_samples": chi2, "coverage": inside, "ranks": [float(share) for share in ranks]}
