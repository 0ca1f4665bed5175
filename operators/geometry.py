"""Scanner geometry as frozen values, in mm and rad: where a ray runs in CT, where k-space is sampled in MRI, how thick slices are.

The formulas are those of ODL's `Parallel2dGeometry` and `FanBeamGeometry`; `operators.odl_bridge` converts both ways and a test
holds the two equal to 1e-12. They are carried here because importing ODL takes seconds and changes global settings, which a command
that reconstructs one slice should not pay for.

In the scanner plane +x = column index up and +y = row index up; the isocentre is the centre of the grid. At angle theta the detector
axis is e = (cos theta, sin theta) and rays run from source to detector along d = (-sin theta, cos theta).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray  # float64


def uniform_angles(views: int, coverage: float = math.pi, start: float = 0.0) -> tuple[float, ...]:
    """`views` equal steps over the half-open range [start, start + coverage) rad."""
    if int(views) != views or views < 1:
        raise ValueError(f"views must be a positive whole number, got {views!r}")
    return tuple(start + coverage * k / int(views) for k in range(int(views)))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A pixel grid centred on the isocentre.

    Attributes:
        shape: (rows ny, columns nx).
        spacing: (dy, dx) in mm.

    Raises:
        ValueError: a count below one, a length that is not positive and finite, or not two of each.
    """

    shape: tuple[int, int]
    spacing: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(_count("Grid.shape", n) for n in _pair("Grid.shape", self.shape)))
        object.__setattr__(self, "spacing", tuple(_length("Grid.spacing", s) for s in _pair("Grid.spacing", self.spacing)))

    @property
    def x(self) -> Array:
        """Column centres in mm (nx,)."""
        return (np.arange(self.shape[1]) - (self.shape[1] - 1) / 2) * self.spacing[1]

    @property
    def y(self) -> Array:
        """Row centres in mm (ny,)."""
        return (np.arange(self.shape[0]) - (self.shape[0] - 1) / 2) * self.spacing[0]


@dataclass(frozen=True, kw_only=True)
class ParallelBeam:
    """Parallel rays, one detector row turning about the isocentre.

    Attributes:
        angles: view angles in rad, any order and spacing.
        detectors: number of detector bins.
        pitch: distance between bin centres in mm.
        offset: position of the detector's centre along its axis in mm.

    Raises:
        ValueError: a count below one, no angles, or a value that is not finite (or positive, for pitch).
    """

    angles: tuple[float, ...]
    detectors: int
    pitch: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        _check_detector(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(views, detectors)."""
        return len(self.angles), self.detectors

    def positions(self, subrays: int = 1) -> Array:
        """Detector positions along the axis in mm (detectors * subrays,); sub-rays share a bin's width evenly."""
        return _positions(self, subrays)

    def rays(self, views: slice = slice(None), subrays: int = 1) -> tuple[Array, Array]:
        """A point on each ray in mm and its unit direction, both (views, detectors * subrays, 2) as (x, y)."""
        e, d = _frame(self.angles[views])
        points = self.positions(subrays)[None, :, None] * e[:, None, :]
        return points, np.broadcast_to(d[:, None, :], points.shape)


@dataclass(frozen=True, kw_only=True)
class FanBeam:
    """Rays from a point source on a circle to a flat or curved detector.

    The source stands at R_s (sin theta, -cos theta). A curved detector is an arc about the source, so its bins are equal angles
    pitch / (R_s + R_d); `pitch` and `offset` are lengths along the detector's surface.

    Attributes:
        angles: source angles in rad, any order and spacing.
        detectors: number of detector bins.
        pitch: distance between bin centres along the detector, at the detector, in mm.
        source_origin: source to isocentre, R_s, in mm.
        origin_detector: isocentre to detector, R_d, in mm (0 is a detector through the isocentre).
        curved: arc about the source instead of a straight detector.
        offset: position of the detector's centre along its surface in mm.

    Raises:
        ValueError: a count below one, no angles, a value that is not finite or positive, or an arc beyond +-90 degrees.
    """

    angles: tuple[float, ...]
    detectors: int
    pitch: float
    source_origin: float
    origin_detector: float
    curved: bool = False
    offset: float = 0.0

    def __post_init__(self) -> None:
        _check_detector(self)
        object.__setattr__(self, "source_origin", _length("FanBeam.source_origin", self.source_origin))
        object.__setattr__(self, "origin_detector", _finite("FanBeam.origin_detector", self.origin_detector))
        if self.origin_detector < 0:
            raise ValueError(f"FanBeam.origin_detector must not be negative, got {self.origin_detector}")
        if not isinstance(self.curved, bool):
            raise ValueError(f"FanBeam.curved must be True or False, got {self.curved!r}")
        edge = self.detectors * self.pitch / 2 + abs(self.offset)
        if self.curved and edge >= self.source_detector * math.pi / 2:
            raise ValueError(f"a curved detector must stay within 90 degrees of the central ray, its edge is at {edge} mm of arc")

    @property
    def shape(self) -> tuple[int, int]:
        """(views, detectors)."""
        return len(self.angles), self.detectors

    @property
    def source_detector(self) -> float:
        """Source to detector, R_s + R_d, in mm."""
        return self.source_origin + self.origin_detector

    def positions(self, subrays: int = 1) -> Array:
        """Detector positions along the surface in mm (detectors * subrays,); sub-rays share a bin's width evenly."""
        return _positions(self, subrays)

    def fan_angles(self, subrays: int = 1) -> Array:
        """Angle between each ray and the central ray in rad (detectors * subrays,), positive along the detector axis."""
        u = self.positions(subrays) / self.source_detector
        return u if self.curved else np.arctan(u)

    def rays(self, views: slice = slice(None), subrays: int = 1) -> tuple[Array, Array]:
        """The source in mm and the unit direction of each ray, both (views, detectors * subrays, 2) as (x, y)."""
        e, d = _frame(self.angles[views])
        gamma = self.fan_angles(subrays)[None, :, None]
        directions = np.cos(gamma) * d[:, None, :] + np.sin(gamma) * e[:, None, :]
        return np.broadcast_to(-self.source_origin * d[:, None, :], directions.shape), directions


Beam = ParallelBeam | FanBeam


@dataclass(frozen=True, kw_only=True)
class Cartesian:
    """The points of a Cartesian k-space that are sampled; the zero frequency stands at (ny // 2, nx // 2).

    Attributes:
        shape: (ky rows ny, kx columns nx), the image's pixels too.
        sampled: the mask row after row, eight points to a byte (`numpy.packbits`), as hexadecimal digits; see `of`.

    Raises:
        ValueError: not hexadecimal, a length that is not the shape's, or no point sampled.
    """

    shape: tuple[int, int]
    sampled: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(_count("Cartesian.shape", n) for n in _pair("Cartesian.shape", self.shape)))
        held, wanted = len(_bytes("Cartesian.sampled", self.sampled)), -(-self.shape[0] * self.shape[1] // 8)
        if held != wanted:
            raise ValueError(f"Cartesian.sampled must hold {wanted} bytes for the shape {self.shape}, got {held}")
        if not self.mask.any():
            raise ValueError(f"Cartesian.sampled is empty: at least one of the {self.shape} points must be sampled")
        object.__setattr__(self, "sampled", np.packbits(self.mask).tobytes().hex())  # one spelling for one mask

    @classmethod
    def of(cls, mask: Array) -> Cartesian:
        """The pattern of a boolean mask (ny, nx).

        Raises:
            TypeError: not boolean.
            ValueError: not two axes, or nothing sampled.
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"a sampling mask is boolean, got {mask.dtype}")
        return cls(shape=_pair("a sampling mask's shape", mask.shape), sampled=np.packbits(mask).tobytes().hex())

    @property
    def mask(self) -> Array:
        """True where k-space is sampled, (ny, nx)."""
        points = self.shape[0] * self.shape[1]
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.sampled), np.uint8), count=points).astype(bool).reshape(self.shape)

    @property
    def samples(self) -> int:
        """Number of sampled points."""
        return int(self.mask.sum())

    @property
    def acceleration(self) -> float:
        """All points over the sampled ones, as achieved; padded columns count as points that were not sampled."""
        return self.shape[0] * self.shape[1] / self.samples


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Points of k-space off the grid, in rad/pixel: a pixel (row, column) turns by k . (row - ny // 2, column - nx // 2).

    Attributes:
        shape: the image's (rows ny, columns nx).
        sampled: (ky, kx) point after point as little-endian float32, in hexadecimal digits; see `of`.

    Raises:
        ValueError: not hexadecimal, no whole number of points, none, not finite, or beyond [-pi, pi].
    """

    shape: tuple[int, int]
    sampled: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(_count("Trajectory.shape", n) for n in _pair("Trajectory.shape", self.shape)))
        held = len(_bytes("Trajectory.sampled", self.sampled))
        if held == 0 or held % 8:
            raise ValueError(f"Trajectory.sampled must hold 8 bytes for each of one or more points, got {held}")
        if not (np.abs(self.points) <= np.float32(np.pi)).all():  # false for NaN too
            raise ValueError("Trajectory points must be finite and within [-pi, pi] rad/pixel")
        object.__setattr__(self, "sampled", self.sampled.lower())

    @classmethod
    def of(cls, shape: tuple[int, int], points: Array) -> Trajectory:
        """The trajectory through points (samples, 2) as (ky, kx) in rad/pixel, kept in float32.

        Raises:
            ValueError: not two columns, or out of range.
        """
        points = np.asarray(points)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"trajectory points must be (samples, 2) as (ky, kx), got {points.shape}")
        return cls(shape=shape, sampled=points.astype("<f4").tobytes().hex())

    @property
    def points(self) -> Array:
        """(ky, kx) in rad/pixel, float32 (samples, 2)."""
        return np.frombuffer(bytes.fromhex(self.sampled), "<f4").reshape(-1, 2).astype(np.float32)

    @property
    def samples(self) -> int:
        """Number of points."""
        return len(self.sampled) // 16

    @property
    def acceleration(self) -> float:
        """Cells of the Cartesian k-space over those that a sample falls into: oversampling along a readout gains nothing."""
        ny, nx = self.shape
        row, column = np.rint(self.points.T.astype(np.float64) * [[ny], [nx]] / (2 * np.pi)).astype(np.int64)
        return ny * nx / np.unique(row % ny * nx + column % nx).size


@dataclass(frozen=True, kw_only=True)
class ThickSlices:
    """Slices of several rows each, along the first axis of an image whose rows run through-plane (a coronal or sagittal one).

    Attributes:
        rows, columns: the image's.
        factor: distance between slices, in rows; the last slice may hold fewer.
        fwhm: full width at half maximum of a Gaussian slice profile, in rows; None for the plain mean of the ``factor`` rows.

    Raises:
        ValueError: a count below one, more rows to a slice than there are, or a width that is not positive and finite.
    """

    rows: int
    columns: int
    factor: int
    fwhm: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "factor"):
            object.__setattr__(self, name, _count(f"ThickSlices.{name}", getattr(self, name)))
        if self.factor > self.rows:
            raise ValueError(f"ThickSlices.factor must be at most the {self.rows} rows, got {self.factor}")
        if self.fwhm is not None:
            object.__setattr__(self, "fwhm", _length("ThickSlices.fwhm", self.fwhm))

    @property
    def slices(self) -> int:
        """Number of slices."""
        return -(-self.rows // self.factor)

    @property
    def shape(self) -> tuple[int, int]:
        """(slices, columns) of what is measured."""
        return self.slices, self.columns

    @property
    def centres(self) -> Array:
        """Slice centres in rows (slices,)."""
        first = self.factor * np.arange(self.slices)
        return (first + np.minimum(first + self.factor, self.rows) - 1) / 2


def _bytes(name: str, text) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be hexadecimal digits, got {repr(text)[:20]}") from error


def _frame(angles: Iterable[float]) -> tuple[Array, Array]:
    theta = np.asarray(tuple(angles), dtype=np.float64)
    c, s = np.cos(theta), np.sin(theta)
    return np.stack([c, s], axis=-1), np.stack([-s, c], axis=-1)


def _positions(beam: Beam, subrays: int) -> Array:
    n = beam.detectors * subrays
    return (np.arange(n) - (n - 1) / 2) * (beam.pitch / subrays) + beam.offset


def _check_detector(beam: Beam) -> None:
    name = type(beam).__name__
    try:
        angles = tuple(float(a) for a in beam.angles)
    except TypeError as error:
        raise ValueError(f"{name}.angles must be numbers in rad, got {beam.angles!r}") from error
    if not angles or not all(math.isfinite(a) for a in angles):
        raise ValueError(f"{name}.angles must be one or more finite numbers in rad, got {len(angles)} angles")
    object.__setattr__(beam, "angles", angles)
    object.__setattr__(beam, "detectors", _count(f"{name}.detectors", beam.detectors))
    object.__setattr__(beam, "pitch", _length(f"{name}.pitch", beam.pitch))
    object.__setattr__(beam, "offset", _finite(f"{name}.offset", beam.offset))


def _pair(name: str, values) -> tuple:
    try:
        result = tuple(values)
    except TypeError as error:
        raise ValueError(f"{name} must be two numbers (row, column), got {values!r}") from error
    if len(result) != 2:
        raise ValueError(f"{name} must be two numbers (row, column), got {result}")
    return result


def _count(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _finite(name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a finite number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def _length(name: str, value) -> float:
    number = _finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive (mm), got {value!r}")
    return number
