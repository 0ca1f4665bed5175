"""The four kinds of network that fit() trains: what each of them is, the loss it learns from, and how it is validated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from deft_med.amortised import Conditional, Supervised
from deft_med.config import Noise, load
from deft_med.data import Augmentation, Pool, draw_images
from deft_med.errors import UsageError
from deft_med.fit import Recipe, Stage
from deft_med.htransform import Deft, HTransform
from deft_med.intensity import Window
from deft_med.likelihood import Gaussian
from deft_med.network import UNet
from deft_med.prior import Prior, denoising_loss
from deft_med.schedule import draw, draw_vp, perturb
from deft_med.simulate import measured_by, unresolved, with_noise
from operators.analytic import FilteredBackprojection
from operators.ct import RayTransform
from operators.geometry import Grid, ParallelBeam, uniform_angles
from operators.noise import gaussian

KINDS = ("prior", "htransform", "supervised", "conditional")
WHOLE = 256  # matrix of a whole image; training may also see it at half that


@dataclass(frozen=True)
class Network:
    """Shape of a U-Net: channels per level, width of its embedding, residual blocks per level."""

    widths: tuple[int, ...]
    dim: int = 128
    blocks: int = 1


@dataclass(frozen=True)
class Acquisitions:
    """Ranges that measurements are drawn from, afresh at every step. Views and coverage are log-uniform and uniform over a fixed
    set of ``geometries`` (their ray matrices stay in memory); noise is drawn per image, transmission with ``photon_share``.
    A share ``focus`` of the steps is spent on ``focus_views`` over half a turn, the default protocol's geometry; ``full_views`` over
    half a turn (low-dose scans) are one geometry more."""

    views: tuple[int, int] = (18, 180)
    coverage_deg: tuple[float, float] = (90.0, 180.0)
    gaussian_percent: tuple[float, float] = (0.5, 8.0)
    photons: tuple[float, float] = (5e3, 1e5)
    electronic: float = 10.0
    photon_share: float = 0.4
    geometries: int = 16
    focus: float = 0.3
    focus_views: int = 60
    full_views: int = 360


@dataclass(frozen=True)
class Data:
    """Array files made by ``deft_med.data``: one to train on, one to tune on; never the same subjects."""

    train: str
    tune: str


@dataclass(frozen=True)
class Training:
    """A training's configuration, as the YAML file in configs/ says it."""

    kind: str
    network: Network
    recipe: Recipe
    data: Data | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    acquisitions: Acquisitions = field(default_factory=Acquisitions)
    prior: str | None = None  # folder of the prior's training, for kind htransform
    start: str | None = None  # folder of a training of the same network whose weights this one goes on from
    loss: str = "edm"  # or epsilon: the paper's uniform t and unweighted eps
    noisy: float = 0.0  # share of draws moved to the last decade of sigma
    sd: float = 0.5
    filter: str = "shepp-logan"  # window of the backprojection that is fed: one that vanishes (hann) loses what was measured there

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.loss not in ("edm", "epsilon"):
            raise ValueError(f"loss is edm or epsilon, got {self.loss!r}")
        if (self.kind == "htransform") != (self.prior is not None):
            raise ValueError("kind htransform wants prior: FOLDER, the other kinds want none")


class Measurements:
    """Draws likelihoods for images of one size from ``Acquisitions``; its operators are built once, for 1 mm pixels."""

    def __init__(self, size: int, ranges: Acquisitions, *, filter: str, seed: int = 0) -> None:
        self.size, self.ranges, self.filter, self.window = size, ranges, filter, Window()
        self.grid = Grid(shape=(size, size), spacing=(1.0, 1.0))
        draws = torch.rand(ranges.geometries, 3, generator=Generator().manual_seed(seed), dtype=torch.float64).tolist()
        self.beams = [self._beam(ranges.focus_views, 180.0, 0.0)]
        for r in draws:
            views = math.exp(math.log(ranges.views[0]) + r[0] * math.log(ranges.views[1] / ranges.views[0]))
            low, high = ranges.coverage_deg
            coverage = high if r[1] < 0.5 else low + 2 * (r[1] - 0.5) * (high - low)  # half of them cover all there is
            self.beams.append(self._beam(views, coverage, r[2] * math.pi))
        self.beams.append(self._beam(ranges.full_views, 180.0, 0.0))
        self._built: dict[int, tuple[RayTransform, RayTransform, FilteredBackprojection]] = {}

    def _beam(self, views: float, coverage_deg: float, first: float) -> ParallelBeam:
        views = max(2, round(views * self.size / WHOLE))  # so that M/N stays when whole images are shown at half size
        return ParallelBeam(angles=uniform_angles(views, math.radians(coverage_deg), first),
                            detectors=math.ceil(math.sqrt(2) * self.size), pitch=1.0)

    def operators(self, index: int) -> tuple[RayTransform, RayTransform, FilteredBackprojection]:
        """(the simulator's, the solver's, the approximate inverse) of one geometry."""
        if index not in self._built:
            solver = RayTransform(self.grid, self.beams[index])
            self._built[index] = measured_by(self.grid, self.beams[index]), solver, FilteredBackprojection(solver, window=self.filter)
        return self._built[index]

    def measure(self, u: Tensor, pixel: Tensor, noises: list[Noise], generator: Generator, geometry: int = 0) -> Gaussian:
        """The likelihood of u (B, 1, n, n) with pixels of ``pixel`` (B,) mm, measured afresh."""
        simulator, solver, inverse = self.operators(geometry)
        pixel = pixel[:, None, None, None].to(u)
        lines = self.window.fold(simulator, pixel)(u)
        measured = [with_noise(line, noise, generator) for line, noise in zip(lines, noises, strict=True)]
        y, sigma = torch.stack([y for y, _ in measured]), torch.stack([s.expand_as(y) for y, s in measured])
        beyond = unresolved(torch.zeros_like(pixel), pixel)  # what a source finer than the training image would have added
        y = gaussian(y, beyond.expand_as(y), generator=generator)
        return Gaussian(self.window.fold(solver, pixel), y, unresolved(sigma, pixel), inverse)

    def draw(self, u: Tensor, pixel: Tensor, generator: Generator) -> Gaussian:
        r = torch.rand(2 + 2 * len(u), generator=generator, dtype=torch.float64).tolist()
        geometry = 0 if r[0] < self.ranges.focus else 1 + int(r[1] * (len(self.beams) - 1))
        return self.measure(u, pixel, [self._noise(a, b) for a, b in zip(r[2::2], r[3::2], strict=True)], generator, geometry)

    def _noise(self, which: float, level: float) -> Noise:
        photon = which < self.ranges.photon_share
        low, high = self.ranges.photons if photon else self.ranges.gaussian_percent
        value = math.exp(math.log(low) + level * math.log(high / low))
        return Noise(photons=value, electronic=self.ranges.electronic) if photon else Noise(gaussian_percent=value)


def bare(config: Training) -> nn.Module:
    """The module that a configuration describes, untrained."""
    inputs, scalars = {"prior": (1, 1), "htransform": (3, 3), "supervised": (1, 2), "conditional": (2, 3)}[config.kind]
    network = UNet(inputs, 1, config.network.widths, scalars=scalars, blocks=config.network.blocks, dim=config.network.dim)
    if config.kind == "htransform":
        return HTransform(network, sd=config.sd, form=config.loss)
    if config.kind == "supervised":
        return Supervised(network)
    return (Prior if config.kind == "prior" else Conditional)(network, sd=config.sd)


Objective = Callable[[Generator, Stage], Tensor]
Validate = Callable[[], dict[str, float]]


def assemble(config: Training, train: Pool, tune: Pool, *, prior: Prior | None = None) -> tuple[nn.Module, Objective, Validate]:
    """The module to train, its objective and its validation, ready for ``fit``."""
    torch.manual_seed(config.recipe.seed)
    model = bare(config) if config.start is None else _started(config)
    measurements: dict[int, Measurements] = {}

    def images(generator: Generator, stage: Stage) -> tuple[Tensor, Tensor]:
        if config.kind == "prior":
            return draw_images(train, stage.batch, stage.size, config.augmentation, generator)
        u, pixel = draw_images(train, stage.batch, WHOLE, config.augmentation, generator)  # a measurement sees the whole image
        factor = WHOLE // stage.size
        return F.avg_pool2d(u, factor), pixel * factor

    def measured(u: Tensor, pixel: Tensor, generator: Generator) -> Gaussian:
        if u.shape[-1] not in measurements:
            measurements[u.shape[-1]] = Measurements(u.shape[-1], config.acquisitions, filter=config.filter, seed=config.recipe.seed)
        return measurements[u.shape[-1]].draw(u, pixel, generator)

    def loss(estimate: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        if config.loss == "epsilon":
            return ((estimate - u) / sigma[:, None, None, None]).square().flatten(1).mean(1)
        return denoising_loss(estimate, u, sigma, config.sd)

    def noised(u: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        epsilon = config.loss == "epsilon"
        sigma = draw_vp(len(u), generator=generator) if epsilon else draw(len(u), generator=generator, noisy=config.noisy)
        return perturb(u, sigma, torch.randn(u.shape, generator=generator)), sigma

    if config.kind == "prior":
        def objective(generator: Generator, stage: Stage) -> Tensor:
            u, _ = images(generator, stage)
            x, sigma = noised(u, generator)
            return loss(model(x, sigma), u, sigma)

        return model, objective, _validation(lambda x, sigma, _: model(x, sigma), tune, range(-6, 7))

    if config.kind == "supervised":
        def supervised(generator: Generator, stage: Stage) -> Tensor:
            u, pixel = images(generator, stage)
            return (model(measured(u, pixel, generator)) - u).square().flatten(1).mean(1) / config.sd**2

        return model, supervised, _validation(lambda x, sigma, likelihood: model(likelihood), tune, (6,), config)

    posterior = model
    if config.kind == "htransform":
        if prior is None:
            raise ValueError("kind htransform wants a prior")
        posterior = Deft(prior, model)

    def conditioned(generator: Generator, stage: Stage) -> Tensor:
        u, pixel = images(generator, stage)
        likelihood = measured(u, pixel, generator)
        x, sigma = noised(u, generator)
        return loss(posterior(x, sigma, likelihood), u, sigma)

    return model, conditioned, _validation(posterior, tune, (-5, -3, -2, -1, 0, 2, 6), config)


def _validation(estimate: Callable[[Tensor, Tensor, Gaussian | None], Tensor], tune: Pool, octaves: Iterable[int],
                config: Training | None = None) -> Validate:
    """Error per octave of sigma on one slice of every tune subject, with fixed noise: root mean square in units of u."""
    subject = tune.subject[WHOLE]
    rows = [int((subject == s).nonzero()[0, 0]) for s in subject.unique()]
    u = tune.images[WHOLE][rows].float().div(1000).clamp(-1, 3)[:, None]
    pixel = tune.spacing[WHOLE][rows]
    kept: list[Measurements] = []

    def validate() -> dict[str, float]:
        likelihood = None
        if config is not None:
            if not kept:
                kept.append(Measurements(WHOLE, config.acquisitions, filter=config.filter))
            noises = [Noise(gaussian_percent=3.5)] * len(u)
            likelihood = kept[0].measure(u, pixel, noises, Generator().manual_seed(1))
        errors = {}
        for k in octaves:
            sigma = torch.full((len(u),), 2.0**k)
            x = perturb(u, sigma, torch.randn(u.shape, generator=Generator().manual_seed(1000 + k)))
            with torch.no_grad():
                errors[f"sigma_{2.0**k:g}"] = float((estimate(x, sigma, likelihood) - u).square().mean().sqrt())
        return errors | {"score": sum(map(math.log, errors.values())) / len(errors)}

    return validate


def _started(config: Training) -> nn.Module:
    """The module with the weights of an earlier training; UsageError when that was another network."""
    earlier, module = trained(str(config.start))
    if (earlier.kind, earlier.network) != (config.kind, config.network):
        raise UsageError(f"start names a training of kind {earlier.kind} with {earlier.network}: this one is {config.kind}, {config.network}")
    return module.train()


def trained(folder: str | Path) -> tuple[Training, Any]:
    """Configuration and module of a training's folder, with the weights that validated best."""
    path = Path(folder)
    if not (path / "best.safetensors").is_file():
        raise UsageError(f"no training of that name (expected config.yaml and best.safetensors): train {path.name} first")
    config = load(path / "config.yaml", Training)
    module = bare(config)
    module.load_state_dict(load_file(path / "best.safetensors"), strict=True)
    return config, module.eval()
