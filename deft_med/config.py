"""YAML -> frozen dataclasses; an unknown key is an error. Protocols (how a study is acquired) are described here."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import yaml

from deft_med.errors import UsageError
from operators.geometry import Cartesian, FanBeam, Grid, ParallelBeam, ThickSlices, Trajectory, uniform_angles

if TYPE_CHECKING:
    from torch import Generator

T = TypeVar("T")
PATTERNS = ("equispaced", "random", "poisson", "radial")
FOLDER = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Noise:
    """Measurement noise: Gaussian of ``gaussian_percent`` of the slice's mean noiseless sinogram, or transmission counts with
    ``photons`` per ray and ``electronic`` counts of read-out noise.

    With ``counts`` the scan keeps its counts, for their own likelihood in place of their logarithm's; rays at ``ceiling`` are saturated.
    """

    gaussian_percent: float | None = None
    photons: float | None = None
    electronic: float = 0.0
    counts: bool = False
    ceiling: float | None = None

    def __post_init__(self) -> None:
        if (self.gaussian_percent is None) == (self.photons is None):
            raise UsageError("noise wants exactly one of gaussian_percent and photons")
        level = self.photons if self.gaussian_percent is None else self.gaussian_percent
        if not (level and level > 0 and self.electronic >= 0):
            raise UsageError(f"noise levels are positive numbers, got {level} and electronic {self.electronic}")
        if self.counts and self.photons is None or self.ceiling is not None and not (self.counts and self.ceiling > 0):
            raise UsageError("noise counts want photons, and a ceiling in counts wants counts: true")


@dataclass(frozen=True)
class Metal:
    """Disks of ``diameter_mm`` at random places inside the body; rays through them are not measured."""

    disks: int = 2
    diameter_mm: float = 8.0

    def __post_init__(self) -> None:
        if not (self.disks >= 1 and self.diameter_mm > 0):
            raise UsageError(f"metal wants disks >= 1 and diameter_mm > 0, got {self.disks} and {self.diameter_mm}")


@dataclass(frozen=True)
class Protocol:
    """How a study is acquired. Detector bins are one pixel wide and span the diagonal, as many views over ``coverage_deg`` as named.

    ``source_origin_mm`` and ``origin_detector_mm`` make it a fan beam (bins one pixel wide at the isocentre). Views at angles in the
    range ``missing_deg`` are left out: a limited angle whose orientation is free. Rays through ``metal`` are not measured.
    """

    name: str
    views: int
    noise: Noise
    coverage_deg: float = 180.0
    grid: int = 256
    description: str = ""
    source_origin_mm: float | None = None
    origin_detector_mm: float | None = None
    curved: bool = False
    missing_deg: tuple[float, float] | None = None
    metal: Metal | None = None

    def __post_init__(self) -> None:
        if self.views < 1 or not 0 < self.coverage_deg <= 360 or self.grid < 16:
            raise UsageError(f"protocol {self.name}: wants views >= 1, 0 < coverage_deg <= 360 and grid >= 16")
        if (self.source_origin_mm is None) != (self.origin_detector_mm is None):
            raise UsageError(f"protocol {self.name}: a fan beam wants source_origin_mm and origin_detector_mm")
        if self.missing_deg is not None:
            first, last = self.missing_deg
            turn = 180 if self.source_origin_mm is None else 360
            if self.coverage_deg != turn or not 0 <= first < last <= turn or not self._angles():
                raise UsageError(f"protocol {self.name}: missing_deg wants two angles between 0 and coverage_deg, which is {turn} then, "
                                 "with views outside them")

    modality: ClassVar[str] = "CT"

    def beam(self, grid: Grid) -> ParallelBeam | FanBeam:
        """The rays of this protocol for a reconstruction grid."""
        pixel = max(grid.spacing)
        angles = self._angles()
        detectors = math.ceil(math.hypot(*(n * s / pixel for n, s in zip(grid.shape, grid.spacing, strict=True))))
        if self.source_origin_mm is None or self.origin_detector_mm is None:
            return ParallelBeam(angles=angles, detectors=detectors, pitch=pixel)
        magnified = pixel * (self.source_origin_mm + self.origin_detector_mm) / self.source_origin_mm
        return FanBeam(angles=angles, detectors=math.ceil(1.15 * detectors), pitch=magnified, source_origin=self.source_origin_mm,
                       origin_detector=self.origin_detector_mm, curved=self.curved)

    def _angles(self) -> tuple[float, ...]:
        """Angles in rad; those before a missing range stand behind the others, a turn on, so that the covered range is in one piece."""
        turn = math.radians(self.coverage_deg)
        angles = uniform_angles(self.views, turn)
        if self.missing_deg is None:
            return angles
        first, last = (math.radians(a) - 1e-9 for a in self.missing_deg)
        return (*(a for a in angles if a >= last), *(a + turn for a in angles if a < first))


@dataclass(frozen=True)
class KSpaceProtocol:
    """How an MR study is acquired: a pattern of k-space at an acceleration, simulated coils, noise per real component.

    ``pattern`` is equispaced, random, poisson or radial (spokes of twice the matrix); ``noise_percent`` is of the slice's
    maximum. Lines run along the image's ``axis`` (1: columns are phase-encoded). A ``phaseless`` study loses the phase of its k-space, and
    its coils are known random phase masks: coded diffraction.
    """

    name: str
    pattern: str
    acceleration: float
    coils: int = 8
    noise_percent: float = 2.0
    axis: int = 1
    grid: int = 256
    description: str = ""
    phaseless: bool = False

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise UsageError(f"protocol {self.name}: pattern is one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if not (self.acceleration >= 1 and self.coils >= 1 and self.noise_percent > 0 and self.axis in (0, 1) and self.grid >= 16):
            raise UsageError(f"protocol {self.name}: wants acceleration >= 1, coils >= 1, noise_percent > 0, axis 0 or 1, grid >= 16")
        if self.phaseless and self.coils < 2:
            raise UsageError(f"protocol {self.name}: phases cannot be found from one code: wants coils >= 2")

    modality: ClassVar[str] = "MR"

    def acquisition(self, shape: tuple[int, int], generator: "Generator") -> Cartesian | Trajectory:
        """The points of k-space for a matrix (rows, columns)."""
        from operators import patterns  # late: they bring torch, which a card is read without

        if self.pattern == "radial":
            return patterns.radial(shape, max(1, round(math.pi / 2 * max(shape) / self.acceleration)))
        if self.pattern == "poisson":
            side = min(24, min(shape) // 4)
            return patterns.poisson_disc(shape, self.acceleration, generator=generator, calibration=(side, side))
        lines = patterns.equispaced if self.pattern == "equispaced" else patterns.random
        return lines(shape, self.acceleration, generator=generator, axis=self.axis)


@dataclass(frozen=True)
class SliceProtocol:
    """CT images seen through thick slices: means over ``factor`` rows or, with ``fwhm`` (in rows), over a Gaussian profile, with noise.

    The rows of the images that are studied run through-plane: give coronal or sagittal ones (`volume.Volume.reformat`).
    """

    name: str
    factor: int
    noise_hu: float
    fwhm: float | None = None
    grid: int = 256
    description: str = ""

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.noise_hu > 0 and (self.fwhm is None or self.fwhm > 0) and self.grid >= 16):
            raise UsageError(f"protocol {self.name}: wants factor >= 1, noise_hu > 0, fwhm > 0 or none, and grid >= 16")

    modality: ClassVar[str] = "CT"

    def acquisition(self, shape: tuple[int, int]) -> ThickSlices:
        """The slices of an image (rows, columns); UsageError where it has fewer rows than one slice."""
        if shape[0] < self.factor:
            raise UsageError(f"protocol {self.name}: an image of {shape[0]} rows has no slice of {self.factor}: give more rows")
        return ThickSlices(rows=shape[0], columns=shape[1], factor=self.factor, fwhm=self.fwhm)


def protocol(source: str | Path) -> Protocol | KSpaceProtocol | SliceProtocol:
    """A protocol by its file or by its name among the shipped ones; one with a ``pattern`` is for MR, one with a ``factor`` for thick
    slices. Errors as for ``load``."""
    content = _read(source, Protocol)
    if "pattern" in content:
        return build(content, KSpaceProtocol)
    return build(content, SliceProtocol) if "factor" in content else build(content, Protocol)


def load(source: str | Path, kind: type[T]) -> T:
    """Read a YAML file, or the shipped one of that name, into a dataclass.

    Raises UsageError for a name that does not exist, text that is no YAML mapping, an unknown or missing key, a wrong type.
    """
    return build(_read(source, kind), kind)


def find(source: str | Path, kind: type) -> Path:
    """The YAML file of that path or, in the folder of configs/ that a kind names as its ``room``, of that name; else UsageError."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        room = FOLDER / getattr(kind, "room", "")
        path = room / f"{source}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in room.glob("*.yaml")))
            raise UsageError(f"no {kind.__name__.lower()} of that name: give a .yaml file or one of {known}")
    if not path.is_file():
        raise UsageError(f"no such configuration file (expected YAML for a {kind.__name__.lower()})")
    return path


def _read(source: str | Path, kind: type) -> dict:
    path = find(source, kind)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"the configuration wants a mapping of keys to values, got {type(content).__name__}")
    if kind is Protocol:
        content.setdefault("name", path.stem)
    return content


def build(content: Any, kind: type[T], where: str = "") -> T:
    """A dataclass from nested mappings, its types checked; UsageError names the key that is wrong."""
    if not isinstance(content, dict):
        raise UsageError(f"{where or 'the configuration'} wants a mapping of keys to values, got {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, content)) - set(fields))
    if unknown:
        raise UsageError(f"unknown key {', '.join(unknown)} in {where or 'the configuration'}: known are {', '.join(fields)}")
    missing = [n for n, f in fields.items()
               if n not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise UsageError(f"missing key {', '.join(missing)} in {where or 'the configuration'}")
    return kind(**{key: _value(value, hints[key], f"{where}.{key}" if where else key) for key, value in content.items()})


def _value(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(value, hint, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise UsageError(f"{where} wants {len(inner)} values, got {len(value)}")
        return tuple(_value(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise UsageError(f"{where} wants {getattr(hint, '__name__', hint)}, got {value!r}")
