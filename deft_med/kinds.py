"""The four kinds of network that fit() trains: what each of them is, the loss it learns from, and how it is validated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from deft_med import bundle
from deft_med.amortised import Conditional, Supervised
from deft_med.config import Noise, load
from deft_med.data import Augmentation, Pool, crops, draw_images
from deft_med.draws import WHOLE, Acquisitions, KSpace, KSpaceRanges, Rays, complex_images
from deft_med.errors import UsageError
from deft_med.fit import Recipe, Stage
from deft_med.htransform import FORMS, Deft, HTransform, precision
from deft_med.likelihood import Gaussian
from deft_med.network import UNet
from deft_med.prior import Prior, denoising_loss
from deft_med.schedule import SIGMA_MAX, draw, draw_vp, perturb
from deft_med.simulate import coil_maps

KINDS = ("prior", "htransform", "supervised", "conditional")
MODALITIES = {"CT": 1, "MR": 2}  # and their image channels


@dataclass(frozen=True)
class Network:
    """Shape of a U-Net: channels per level, width of its embedding, residual blocks per level."""

    widths: tuple[int, ...]
    dim: int = 128
    blocks: int = 1


@dataclass(frozen=True)
class Data:
    """Array files made by ``deft_med.data``: one to train on, one to tune on; never the same subjects."""

    train: str
    tune: str


@dataclass(frozen=True)
class Training:
    """A training's configuration, as the YAML file in configs/train says it."""

    room: ClassVar[str] = "train"
    kind: str
    network: Network
    recipe: Recipe
    modality: str = "CT"
    data: Data | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    acquisitions: Acquisitions = field(default_factory=Acquisitions)
    kspace: KSpaceRanges = field(default_factory=KSpaceRanges)
    prior: str | None = None  # for kind htransform: folder of the prior's training, or a bundle (the name of one that ships, its folder)
    start: str | None = None  # the same, of a training of the same network whose weights this one goes on from
    loss: str = "edm"  # or epsilon: the paper's uniform t and unweighted eps
    form: str = ""  # of an h-transform or a supervised network: wiener, or by default that of the loss
    noisy: float = 0.0  # share of draws moved to the last decade of sigma
    sd: float = 0.5  # root mean square of u
    octaves: tuple[tuple[float, ...], ...] = ()  # and that of its octaves, per channel, finest first (`octaves.deviations`)
    levels: tuple[float, float, float] = (0.5, -1.0, 1.4)  # of sigma: share that is log-uniform; mean, deviation of ln sigma of the rest
    inverse: str = "sense"  # MR: what a residual goes through, sense or adjoint
    filter: str = "shepp-logan"  # window of the backprojection that is fed: one that vanishes (hann) loses what was measured there

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.modality not in MODALITIES:
            raise ValueError(f"modality is one of {', '.join(MODALITIES)}, got {self.modality!r}")
        if self.inverse not in ("sense", "adjoint"):
            raise ValueError(f"inverse is sense or adjoint, got {self.inverse!r}")
        if self.loss not in ("edm", "epsilon"):
            raise ValueError(f"loss is edm or epsilon, got {self.loss!r}")
        if self.form not in ("", *FORMS):
            raise ValueError(f"form is one of {', '.join(FORMS)}, got {self.form!r}")
        if (self.kind == "htransform") != (self.prior is not None):
            raise ValueError("kind htransform wants prior: FOLDER, the other kinds want none")


def bare(config: Training) -> nn.Module:
    """The module that a configuration describes, untrained."""
    inputs, scalars = {"prior": (1, 1), "htransform": (3, 3), "supervised": (1, 2), "conditional": (2, 3)}[config.kind]
    channels = MODALITIES[config.modality]
    shape = config.network
    network = UNet(inputs * channels, channels, shape.widths, scalars=scalars, blocks=shape.blocks, dim=shape.dim)
    if config.kind == "htransform":
        return HTransform(network, sd=config.sd, octaves=config.octaves, form=config.form or config.loss)
    if config.kind == "supervised":
        return Supervised(network, sd=config.sd, octaves=config.octaves, form=config.form or config.loss)
    return (Prior if config.kind == "prior" else Conditional)(network, sd=config.sd, octaves=config.octaves)


Objective = Callable[[Generator, Stage], Tensor]
Validate = Callable[[], dict[str, float]]


def assemble(config: Training, train: Pool, tune: Pool, *, prior: Prior | None = None) -> tuple[nn.Module, Objective, Validate]:
    """The module to train, its objective and its validation, ready for ``fit``."""
    torch.manual_seed(config.recipe.seed)
    model = bare(config) if config.start is None else _started(config)
    physics: dict[int, Rays | KSpace] = {}

    def images(generator: Generator, stage: Stage) -> tuple[Tensor, Tensor]:
        if config.kind == "prior" and config.modality == "CT":
            return draw_images(train, stage.batch, stage.size, config.augmentation, generator)
        u, pixel = draw_images(train, stage.batch, WHOLE, config.augmentation, generator)  # a measurement sees the whole image
        if config.kind == "prior":
            return crops(complex_images(u, generator, config.augmentation.tissue), stage.size, generator), pixel
        factor = WHOLE // stage.size
        u = F.avg_pool2d(u, factor)
        return (u if config.modality == "CT" else complex_images(u, generator, config.augmentation.tissue)), pixel * factor

    def measured(u: Tensor, pixel: Tensor, generator: Generator) -> Gaussian:
        if u.shape[-1] not in physics:
            physics[u.shape[-1]] = _physics(config, u.shape[-1], config.recipe.seed)
        return physics[u.shape[-1]].draw(u, pixel, generator)

    def loss(estimate: Tensor, u: Tensor, sigma: Tensor, s_img: Tensor | None = None) -> Tensor:
        if config.loss == "epsilon":
            return ((estimate - u) / sigma[:, None, None, None]).square().flatten(1).mean(1)
        if config.form == "wiener" and s_img is not None:
            return precision(sigma, config.sd, s_img) * (estimate - u).square().flatten(1).mean(1)
        return denoising_loss(estimate, u, sigma, config.sd)

    def noised(u: Tensor, generator: Generator, stage: Stage) -> tuple[Tensor, Tensor]:
        if config.loss == "epsilon":
            sigma = draw_vp(len(u), generator=generator)
        else:
            sigma = draw(len(u), *config.levels, generator=generator, noisy=config.noisy, high=stage.highest)
        return perturb(u, sigma, torch.randn(u.shape, generator=generator)), sigma

    if config.kind == "prior":
        def objective(generator: Generator, stage: Stage) -> Tensor:
            u, _ = images(generator, stage)
            x, sigma = noised(u, generator, stage)
            return loss(model(x, sigma), u, sigma)

        return model, objective, _validation(lambda x, sigma, _: model(x, sigma), tune, range(-6, 7), config)

    if config.kind == "supervised":
        def supervised(generator: Generator, stage: Stage) -> Tensor:
            u, pixel = images(generator, stage)
            likelihood = measured(u, pixel, generator)
            high = likelihood.s_img.new_full((len(u),), SIGMA_MAX)  # nothing but the data says anything
            weight = precision(high, config.sd, likelihood.s_img) if config.form == "wiener" else config.sd**-2
            return weight * (model(likelihood) - u).square().flatten(1).mean(1)

        return model, supervised, _validation(lambda x, sigma, likelihood: model(likelihood), tune, (6,), config)

    posterior = model
    if config.kind == "htransform":
        if prior is None:
            raise ValueError("kind htransform wants a prior")
        posterior = Deft(prior, model)

    def conditioned(generator: Generator, stage: Stage) -> Tensor:
        u, pixel = images(generator, stage)
        likelihood = measured(u, pixel, generator)
        x, sigma = noised(u, generator, stage)
        return loss(posterior(x, sigma, likelihood), u, sigma, likelihood.s_img)

    return model, conditioned, _validation(posterior, tune, (-5, -3, -2, -1, 0, 2, 6), config)


def _physics(config: Training, size: int, seed: int) -> Rays | KSpace:
    if config.modality == "MR":
        return KSpace(size, config.kspace, inverse=config.inverse, seed=seed)
    return Rays(size, config.acquisitions, filter=config.filter, seed=seed)


def _reference(config: Training, u: Tensor, pixel: Tensor) -> Gaussian:
    """The measurements that a training is validated with: the default protocol's."""
    generator, physics = Generator().manual_seed(1), _physics(config, u.shape[-1], 0)
    if isinstance(physics, Rays):
        return physics.measure(u, pixel, [Noise(gaussian_percent=3.5)] * len(u), generator)
    maps = coil_maps(len(u), 8, (u.shape[-1], u.shape[-1]), generator)
    known = physics.calibrated(maps, u, generator)
    return physics.measure(u, physics.patterns[0], maps, torch.full((len(u),), 0.05), generator, known)


def _validation(estimate: Callable[[Tensor, Tensor, Gaussian | None], Tensor], tune: Pool, octaves: Iterable[int],
                config: Training) -> Validate:
    """Error per octave of sigma on slices of every tune subject, with fixed noise: root mean square in units of u."""
    subject = tune.subject[WHOLE]
    each = math.ceil(8 / len(subject.unique()))
    rows = [int(rows[k * len(rows) // each]) for s in subject.unique() for rows in [(subject == s).nonzero()[:, 0]] for k in range(each)]
    u = tune.images[WHOLE][rows].float().div(1000).clamp(config.augmentation.background, 3)[:, None]
    pixel = tune.spacing[WHOLE][rows]
    if config.modality == "MR":
        u = complex_images(u, Generator().manual_seed(0))
    kept: list[Gaussian] = []

    def validate() -> dict[str, float]:
        likelihood = None
        if config.kind != "prior":
            if not kept:
                kept.append(_reference(config, u, pixel))
            likelihood = kept[0]
        errors = {}
        for k in octaves:
            sigma = torch.full((len(u),), 2.0**k)
            x = perturb(u, sigma, torch.randn(u.shape, generator=Generator().manual_seed(1000 + k)))
            with torch.no_grad():
                errors[f"sigma_{2.0**k:g}"] = float((estimate(x, sigma, likelihood) - u).square().mean().sqrt())
        return errors | {"score": sum(map(math.log, errors.values())) / len(errors)}

    return validate


def _started(config: Training) -> nn.Module:
    """The module with the weights of an earlier training or bundle; UsageError when that was another network.

    Octaves may have other deviations: the network then sees and answers rescaled ones, and learns that in tens of steps.
    """
    earlier, module = trained(str(config.start), config.kind)
    for name in ("kind", "network", "sd", "form"):
        if (was := getattr(earlier, name)) != (now := getattr(config, name)):
            raise UsageError(f"start names a training of {name} {was!r}: this one says {now!r}")
    if len(earlier.octaves) != len(config.octaves):
        raise UsageError(f"start names a training of {len(earlier.octaves)} octaves: this one says {len(config.octaves)}")
    begun = bare(config)
    begun.load_state_dict(module.state_dict(), strict=True)
    return begun.train()


def trained(folder: str | Path, kind: str = "prior") -> tuple[Training, Any]:
    """Configuration and module of a training's folder, with the weights that validated best; or ``kind``, prior or htransform, of a
    bundle: the name of one that ships, or its folder."""
    path = Path(folder)
    if (path / "best.safetensors").is_file():
        config = load(path / "config.yaml", Training)
        module = bare(config)
        module.load_state_dict(load_file(path / "best.safetensors"), strict=True)
        return config, module.eval()
    if kind in ("prior", "htransform") and (str(folder) in bundle.available() or (path / "card.json").is_file()):
        return _bundled(str(folder), kind)
    raise UsageError(f"no training of that name (expected config.yaml and best.safetensors, or a bundle): train {path.name} first")


def _bundled(name: str, kind: str) -> tuple[Training, Any]:
    model = bundle.load_model(name)
    card = model.card
    shape, module = (card.prior, model.deft.prior) if kind == "prior" else (card.h, model.deft.h)
    config = Training(kind=kind, network=Network(shape.widths, shape.dim, shape.blocks), recipe=Recipe(stages=()), modality=card.modality,
                      prior=name if kind == "htransform" else None, sd=card.sigma_data, octaves=card.octaves,
                      form=card.h.form if kind == "htransform" and card.h.form == "wiener" else "",
                      filter=card.h.residual.get("window", "shepp-logan"), inverse=card.h.residual.get("inverse", "sense"))
    return config, module.requires_grad_(True)
