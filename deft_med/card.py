"""The card of a model: what it is, what it was trained on, what it may be used for; and the check of a scan against it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import build
from .errors import ModelError, UsageError
from .volume import Scan

JUDGED = {  # range of an acquisition: what it is called, and its unit
    "views": ("number of views", ""), "coverage_deg": ("angular coverage", "degrees"),
    "gaussian_percent": ("noise", "% of the mean line integral"), "photons": ("dose", "photons per ray"),
    "acceleration": ("acceleration", ""), "coils": ("number of coils", ""),
    "noise_of_scale_percent": ("noise", "% of the image scale")}  # fmt: skip
NOISES = ("gaussian_percent", "photons", "noise_of_scale_percent")
WEIGHTS = ("prior.safetensors", "h.safetensors")
ALL = "all"  # name of the calibration over all protocols
SLACK = 0.02  # by how much, relatively, a scan may leave a range: lengths and noise levels are rounded on the way
DOSED = 0.1  # the same for a dose, which is read off the rays' own scatter
GUESSED = 0.5  # the same for a noise level that was estimated


@dataclass(frozen=True)
class Network:
    """Shape of a `network.UNet`: channels per level, width of its embedding, residual blocks per level, number of parameters."""

    widths: tuple[int, ...]
    dim: int = 128
    blocks: int = 1
    parameters: int = 0


@dataclass(frozen=True)
class HNetwork(Network):
    """Shape of the h-transform, the ``residual`` it is fed (CT: window of the backprojection; MR: inverse), and its form
    (`htransform.HTransform`)."""

    residual: dict[str, str] = dataclasses.field(default_factory=lambda: {"window": "hann"})
    form: str = "edm"


@dataclass(frozen=True)
class WindowRange:
    """u = (value - offset) / scale."""

    offset: float
    scale: float
    unit: str


@dataclass(frozen=True)
class Acquisition:
    """Ranges of measurements that h was trained on; what is None is not judged.

    CT (geometry parallel or fan): views, covered angle, and noise as Gaussian percent or as photons per ray. MR (cartesian or
    trajectory): acceleration, coils, and noise in per cent of the image's scale (`intensity.scale_of`; a protocol's ``noise_percent``
    is of the slice's maximum).
    """

    geometry: str
    views: tuple[int, int] | None = None
    coverage_deg: tuple[float, float] | None = None
    gaussian_percent: tuple[float, float] | None = None
    photons: tuple[float, float] | None = None
    acceleration: tuple[float, float] | None = None
    coils: tuple[int, int] | None = None
    noise_of_scale_percent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Collection:
    """Training data by collection and licence, with numbers of subjects and slices."""

    collection: str
    licence: str
    doi: str
    subjects: int
    slices: int


@dataclass(frozen=True)
class Metric:
    """A measured number: what, where, mean and standard deviation over n subjects, and the command that measures it."""

    name: str
    value: float
    n: int
    data: str
    command: str
    sd: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample, chosen on the tune subjects.

    ``eta``: noise of the stochastic sampler, 0 for none. ``consistency``: conjugate gradient steps towards the data at every level;
    ``trust``: the deviation, in u, that they allow the denoiser; ``mirrored``: evaluations take turns between the four mirror images.
    """

    eta: float = 0.5
    consistency: int = 0
    trust: float = 0.2
    mirrored: bool = False


@dataclass(frozen=True)
class Calibration:
    """What intervals and chi2 of a protocol's samples are worth, measured on tune subjects (`deft_med.calibrate`), who weigh alike.

    ``factor`` multiplies the samples' standard deviation so that ``metrics.interval`` holds the reference in a share ``level`` of the
    body's pixels; ``coverage_raw`` is the share at factor 1, ``coverage`` that of each subject with a factor from the others (of one
    subject, with its own). ``chi2_99``: the 99th percentile over slices of the chi2 of the samples.
    """

    factor: float
    coverage_raw: float
    coverage: float
    chi2_99: float
    samples: int
    subjects: int
    slices: int
    command: str
    level: float = 0.9

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.chi2_99 > 0 and 0 < self.level < 1 and min(self.samples, self.subjects + 1, self.slices + 1) > 1):
            raise ModelError("the model's calibration is not valid: factor and chi2_99 want to be positive, level between 0 and 1, samples "
                             "2 or more, subjects and slices 1 or more")


@dataclass(frozen=True)
class Card:
    """The card.json of a bundle. ``calibration`` is by protocol; "all" speaks for those that are not there;
    ``octaves`` are the deviations that the networks scale the octaves of an image by (`prior.Preconditioned`)."""

    name: str
    version: str
    modality: str
    anatomy: tuple[str, ...]
    window: WindowRange
    pixel_size_mm: tuple[float, float]
    field_of_view_mm: tuple[float, float]
    channels: int
    sigma_data: float
    sigma_min: float
    sigma_max: float
    prior: Network
    h: HNetwork
    protocols: tuple[Acquisition, ...]
    training_data: tuple[Collection, ...]
    metrics: tuple[Metric, ...]
    configs: tuple[str, ...]
    sha256: dict[str, str]
    licence: str
    deft_med: str
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    notes: str = ""
    calibration: dict[str, Calibration] = dataclasses.field(default_factory=dict)
    octaves: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", self.name):
            problems.append("name wants lower-case letters, digits, - and _")
        for where, pair in self._ranges():
            if not (0 < pair[0] <= pair[1] and math.isfinite(pair[1])):
                problems.append(f"{where} wants 0 < low <= high, got {pair[0]:g} and {pair[1]:g}")
        if not (self.sigma_data > 0 and 0 < self.sigma_min < self.sigma_max and self.window.scale > 0 and self.channels > 0):
            problems.append("sigma_data, sigma_min < sigma_max, window.scale and channels want to be positive")
        if not all(len(each) in (1, self.channels) and min(each) > 0 for each in self.octaves):
            problems.append("octaves wants positive deviations, one for each channel or one for all")
        if set(self.sha256) != set(WEIGHTS) or not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in self.sha256.values()):
            problems.append(f"sha256 wants one digest for each of {', '.join(WEIGHTS)}")
        if self.licence != "CC-BY-4.0":
            problems.append(f"licence wants CC-BY-4.0, got {self.licence!r}")
        if problems:
            raise ModelError("the model's card is not valid: " + "; ".join(problems))

    def _ranges(self) -> Iterable[tuple[str, tuple[float, float]]]:
        yield from (("pixel_size_mm", self.pixel_size_mm), ("field_of_view_mm", self.field_of_view_mm))
        for number, one in enumerate(self.protocols):
            for name in JUDGED:
                if getattr(one, name) is not None:
                    yield f"protocols[{number}].{name}", getattr(one, name)

    def calibrated(self, protocol: str | None) -> tuple[str, Calibration | None]:
        """The calibration for a protocol by its name or, where it is not on the card, that of "all"; ("", None) without any."""
        name = next((n for n in (protocol, ALL) if n in self.calibration), "")
        return name, self.calibration.get(name)

    def to_json(self) -> str:
        """The card as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"


def parse(content: Mapping[str, Any] | str | bytes) -> Card:
    """A card from its JSON text or its mapping; ModelError for text that is no JSON, an unknown or missing field, a wrong type."""
    if isinstance(content, (str, bytes)):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ModelError("the model's card.json is no JSON: the bundle is damaged, install it again") from error
    try:
        return build(content, Card)
    except UsageError as error:
        raise ModelError(f"the model's card.json is not a card of this version of deft_med: {error}") from error


# ----------------------------------------------------------------------------------------------------------- does it fit this scan?


def check(card: Card, scan: Scan, *, anatomy: str | None = None) -> list[str]:
    """What lies outside the card's scope in a scan: one sentence each, nothing when all is well.

    Unknown noise is not judged, estimated noise with a slack of one half; an unknown pixel size (no affine, MR) is not judged.
    """
    (ny, nx), (dy, dx) = scan.grid.shape, scan.grid.spacing
    estimated = scan.noise_is != "given"
    sized = scan.modality == "CT" or scan.affine is not None or (dy, dx) != (1.0, 1.0)
    found = _ct_numbers(scan, estimated) if scan.modality == "CT" else _mr_numbers(scan)
    return out_of_scope(card, modality=scan.modality, anatomy=anatomy, pixel_size_mm=(dy, dx) if sized else None,
                        field_of_view_mm=max(ny * dy, nx * dx) if sized else None, slack=GUESSED if estimated else SLACK, **found)


def _ct_numbers(scan: Scan, estimated: bool) -> dict[str, Any]:
    if type(scan.acquisition).__name__ == "ThickSlices":
        return {"geometry": "thick-slice"}
    angles = np.sort(np.asarray(scan.acquisition.angles))  # type: ignore[union-attr]
    views = len(angles)
    coverage = math.degrees(float(angles[-1] - angles[0])) * views / max(1, views - 1) if views > 1 else 0.0
    geometry = "parallel" if type(scan.acquisition).__name__ == "ParallelBeam" else "fan"
    found: dict[str, Any] = {"geometry": geometry, "views": views, "coverage_deg": coverage}
    if scan.noise is None:
        return found
    noise = np.broadcast_to(scan.noise, scan.y.shape)
    if np.isinf(noise).any():  # rays that were not measured
        return found | {"geometry": f"{geometry} but incomplete"}
    spread = float(noise.max() / noise.min()) / (1 + GUESSED * estimated)
    if spread < 1.5 or (noise.shape[0] > 1 and np.ptp(noise, axis=(1, 2)).max() == 0):  # one level, or one per slice
        return found | {"gaussian_percent": 100 * float(np.mean(noise.mean((1, 2)) / np.maximum(scan.y.mean((1, 2)), 1e-6)))}
    # air: least electronics
    return found | {"photons": float(np.quantile(np.exp(np.minimum(scan.y, 50)) / noise.astype(np.float64) ** 2, 0.9))}


def _mr_numbers(scan: Scan) -> dict[str, Any]:
    cartesian = type(scan.acquisition).__name__ == "Cartesian"
    found: dict[str, Any] = {"geometry": "cartesian" if cartesian else "trajectory", "coils": scan.y.shape[1],
                             "acceleration": scan.acquisition.acceleration}  # type: ignore[union-attr]
    if scan.noise is None or not cartesian:
        return found
    import torch  # late: the card itself is read without it

    from .intensity import scale_of

    scale = scale_of(torch.from_numpy(scan.y)).numpy()
    noise = np.broadcast_to(scan.noise, scan.y.shape)[..., scan.acquisition.mask].reshape(len(scan.y), -1).mean(1)  # type: ignore[union-attr]
    return found | {"noise_of_scale_percent": 100 * float(np.mean(noise / np.maximum(scale, 1e-30)))}


def out_of_scope(card: Card, *, modality: str, pixel_size_mm: tuple[float, float] | None = None, field_of_view_mm: float | None = None,
                 anatomy: str | None = None, geometry: str | None = None, slack: float = SLACK, **numbers: float | None) -> list[str]:
    """The same from numbers, named as in `JUDGED`: None is not judged. Of the card's protocols the one with the fewest objections
    speaks. TypeError for a number of another name."""
    if unknown := set(numbers) - set(JUDGED):
        raise TypeError(f"unknown numbers {sorted(unknown)}: known are {', '.join(JUDGED)}")
    found = []
    if modality != card.modality:
        found.append(f"modality {modality}: the model accepts {card.modality}")
    if anatomy is not None and anatomy.lower() not in {a.lower() for a in card.anatomy}:
        found.append(f"anatomy {anatomy.lower()}: the model accepts {', '.join(card.anatomy)}")
    for size in sorted(set(pixel_size_mm or ())):
        found += _outside("pixel size", size, card.pixel_size_mm, "mm")
    found += _outside("field of view", field_of_view_mm, card.field_of_view_mm, "mm")
    objections = []
    for one in card.protocols:
        these = [] if geometry in (None, one.geometry) else [f"{geometry} acquisition: the model accepts {one.geometry} ones"]
        for name, value in numbers.items():
            (what, unit), allowed = JUDGED[name], getattr(one, name)
            if value is None:
                continue
            if allowed is None:
                these += [f"{what} of this kind: the model was not trained on it"] if name in NOISES else []
                continue
            if name == "coverage_deg":  # more than a half turn of parallel rays measures nothing new
                value = min(value, allowed[1])
            least = DOSED if name == "photons" else SLACK
            these += _outside(what, value, allowed, unit, max(slack, least) if name in NOISES else SLACK)
        objections.append(these)
    return found + (min(objections, key=len) if objections else [])


def _outside(what: str, value: float | None, allowed: tuple[float, float], unit: str, slack: float = SLACK) -> list[str]:
    low, high = allowed
    if value is None or low * (1 - slack) <= value <= high * (1 + slack):
        return []
    return [f"{what} {value:.3g} {unit}".rstrip() + f": the model accepts {low:g} to {high:g} {unit}".rstrip()]
