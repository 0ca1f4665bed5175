"""The ISMRMRD header, which fastMRI files carry too: matrices, lengths and where k = 0 is; and what follows for the grid.

XML is parsed by the standard library after DOCTYPE and ENTITY are refused, so that nothing is ever expanded or fetched. Of the header
only numbers and the words listed here are taken. Arrays are (..., readout, phase): rows are the readout, columns the phase encoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from deft_med.errors import CorruptError, UnsupportedError
from deft_med.volume import central

if TYPE_CHECKING:
    from torch import Tensor

    from operators.whiten import Edges

Mixture = NDArray[np.complex128]  # (C, C): new coils out of old ones

LONGEST_XML = 2**22
BIGGEST_SIDE = 8192
TRAJECTORIES = ("cartesian", "epi", "radial", "goldenangle", "spiral", "other")
CALIBRATIONS = ("embedded", "interleaved", "separate", "external", "other")
SAME_PIXEL = 0.02  # pixel sizes of the two spaces that differ by less are one
NARROWEST = 4  # samples on either side of the picture: with fewer there is no air to speak of
ENOUGH = 100  # samples of noise for each coil: whitening by their covariance loses 1 % of the signal to noise
CENTRE = 24  # of k-space along both axes: coil maps are smooth and fit in
NO_NOISE = 1e-7  # of the largest sample: float32 rounding, as in simulated data without noise


@dataclass(frozen=True)
class Space:
    """A matrix (readout, phase, partition) and its lengths in mm, or None where the header has none."""

    matrix: tuple[int, int, int]
    fov: tuple[float, float, float] | None

    def across(self) -> Space:
        """The same as one who looks along the readout sees it: (phase, partition, readout)."""
        fov = None if self.fov is None or not self.fov[2] > 0 else (*self.fov[1:], self.fov[0])
        return Space((*self.matrix[1:], self.matrix[0]), fov)


@dataclass(frozen=True)
class Header:
    """What is taken of an ISMRMRD header.

    Attributes:
        encoded, recon: the space that was encoded, and the picture's.
        centre, last: the phase step of k = 0, and the highest step; None where the header does not say.
        trajectory: one of TRAJECTORIES, or "unknown".
        calibration: one of CALIBRATIONS, or "".
        bandwidth: the receiver's relative noise bandwidth, 1 where the header does not say.
    """

    encoded: Space
    recon: Space
    centre: int | None
    last: int | None
    trajectory: str
    calibration: str
    bandwidth: float

    def of_slices(self, shape: tuple[int, int]) -> tuple[Header, bool]:
        """The header of k-space slices ``shape``, and whether these lie across the readout of a 3D scan: phase and partition encodes.

        The encoding limits are not those of partitions: across the readout there are none.
        """
        if self.encoded.matrix[:2] == shape or self.encoded.matrix[1:] != shape:
            return self, False
        return replace(self, encoded=self.encoded.across(), recon=self.recon.across(), centre=None, last=None), True


@dataclass(frozen=True)
class Layout:
    """The grid that a k-space matrix becomes.

    Attributes:
        rows: readout samples once the oversampling is gone.
        crop: (rows, columns) of the picture, or None where it is the grid.
        spacing: (dy, dx) in mm, or None.
    """

    rows: int
    crop: tuple[int, int] | None
    spacing: tuple[float, float] | None


def parse(xml: bytes | str) -> Header:
    """The header in ``xml``.

    Raises:
        CorruptError: not well-formed XML, or not UTF-8.
        UnsupportedError: DOCTYPE or ENTITY, too long, no encoding or several, matrices that are no numbers.
    """
    try:
        words = xml.decode("utf-8-sig") if isinstance(xml, bytes) else xml.removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise CorruptError("the header XML is damaged: it is not UTF-8; write the file again") from None
    words = words.rstrip("\0")
    if len(words) > LONGEST_XML:
        raise UnsupportedError(f"the header XML is longer than {LONGEST_XML // 2**20} MiB; an ISMRMRD header has some kilobytes")
    if "<!DOCTYPE" in words.upper() or "<!ENTITY" in words.upper():
        raise UnsupportedError("the header XML declares a DOCTYPE or entities, which are never expanded; expected "
                               "a plain ISMRMRD header: take the declaration out")  # fmt: skip
    try:
        root = ElementTree.fromstring(words)
    except (ElementTree.ParseError, ValueError, RecursionError):
        raise CorruptError("the header XML is damaged: it is not well-formed; write the file again") from None
    encodings = _children(root, "encoding")
    if _name(root) != "ismrmrdHeader" or not encodings:
        raise UnsupportedError("the header XML holds no encoding; expected an ismrmrdHeader with encodedSpace and reconSpace: "
                               "convert the raw data again")  # fmt: skip
    if len(encodings) > 1:
        raise UnsupportedError(f"the header XML lists {len(encodings)} encodings; one is supported: split the file, one encoding each")
    encoding = encodings[0]
    step = _child(_child(encoding, "encodingLimits"), "kspace_encoding_step_1")
    trajectory = _text(encoding, "trajectory").lower()
    calibration = _text(_child(encoding, "parallelImaging"), "calibrationMode").lower()
    bandwidth = _number(_child(root, "acquisitionSystemInformation"), "relativeReceiverNoiseBandwidth")
    return Header(
        encoded=_space(encoding, "encodedSpace"), recon=_space(encoding, "reconSpace"), centre=_step(step, "center"),
        last=_step(step, "maximum"), trajectory=trajectory if trajectory in TRAJECTORIES else "unknown",
        calibration=calibration if calibration in CALIBRATIONS else "", bandwidth=bandwidth if bandwidth and bandwidth > 0 else 1.0,
    )  # fmt: skip


def layout(header: Header, shape: tuple[int, int], *, whole: bool) -> Layout:
    """The grid of a k-space matrix ``shape`` = (readout, phase); the oversampling stays unless the readout is ``whole``."""
    encoded, recon = header.encoded, header.recon
    lengths = None if encoded.fov is None or recon.fov is None else (encoded.fov, recon.fov)
    part = [1.0, 1.0]
    if lengths is not None:
        part = [min(1.0, lengths[1][axis] / lengths[0][axis]) for axis in (0, 1)]
    elif encoded.matrix[0] == 2 * recon.matrix[0]:
        part[0] = 0.5
    picture = []
    for axis in (0, 1):
        pixels = max(1, round(shape[axis] * part[axis]))
        stated = recon.matrix[axis]
        picture.append(min(stated if abs(stated / pixels - 1) < SAME_PIXEL else pixels, shape[axis]))
    rows = max(picture[0], round(shape[0] * part[0])) if whole else shape[0]
    crop = (picture[0], picture[1])
    spacing = None if encoded.fov is None else (encoded.fov[0] / shape[0], encoded.fov[1] / shape[1])
    return Layout(rows, None if crop == (rows, shape[1]) else crop, spacing)


def narrow(y: NDArray[np.complex64], rows: int) -> NDArray[np.complex64]:
    """k-space (..., readout, phase) of the central ``rows`` of the readout's field of view: exact, orthonormal, zero columns stay zero."""
    if rows == y.shape[-2]:
        return y
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(y, -2), axis=-2, norm="ortho"), -2)
    image = central(image, (rows, y.shape[-1]))
    return np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, -2), axis=-2, norm="ortho"), -2).astype(np.complex64)


def edges(y: NDArray[np.complex64], columns: NDArray[np.bool_], rows: int) -> Edges | None:
    """The noise of one slice (coil, readout, phase) in what a wide readout sees beside the ``rows`` of the picture.

    None where the readout is hardly wider than those, where there are fewer samples than coils, or nothing but rounding.
    """
    if y.shape[-2] < rows + 2 * NARROWEST or not columns.any():
        return None
    import torch

    from operators import whiten

    mask = np.ascontiguousarray(np.broadcast_to(columns, y.shape[-2:]))
    try:
        found = whiten.edges(torch.from_numpy(np.ascontiguousarray(y)), torch.from_numpy(mask), 0, rows)
    except ValueError:
        return None
    rounding = NO_NOISE * float(np.abs(y).max())
    return found if float(found.covariance.diagonal().real.mean()) > rounding**2 else None


def from_edges(slices: Sequence[Edges | None], notes: list[str]) -> tuple[Mixture | None, float | None]:
    """How to whiten the coils by the `edges` of the slices, or else their mean sigma per real component, or neither; with a note.

    The noise of a scan is one, so all slices whose edges hold noise alone count together. Nothing is whitened by a covariance of so
    few samples that its own error would cost more than a hundredth of the signal to noise, nor by one with a dead or doubled coil.
    """
    seen = [one for one in slices if one is not None]
    if not seen:
        return None, None
    clean = [one for one in seen if not one.signal]
    if not clean:
        notes.append("signal reaches into the edges of the readout, so the noise is not known from them: coils not whitened")
        return None, None
    import torch

    samples = sum(one.samples for one in clean)
    covariance = torch.stack([one.covariance * (one.samples / samples) for one in clean]).sum(0)
    coils = len(covariance)
    matrix = None if coils == 1 else mixture(covariance, samples)
    if matrix is not None:
        notes.append("whitened by the noise in the edges of the readout")
        return matrix, None
    why = "" if coils == 1 else ": too few samples, or a dead coil: not whitened"
    notes.append(f"noise level from the edges of the readout{why}")
    return None, math.sqrt(float(covariance.diagonal().real.mean()))


def mixture(covariance: Tensor, samples: int) -> Mixture | None:
    """The mixture (C, C) of the coils that whitens noise of this covariance; None where it is of too few samples or singular."""
    from operators import whiten

    if samples < ENOUGH * len(covariance):
        return None
    try:
        return whiten.whitener(covariance).numpy()
    except ValueError:
        return None


def whiten(y: NDArray[np.complex64], matrix: Mixture) -> float:
    """Mixes the coils of y [slice, coil, ...] in place, so that their noise is independent and of one sigma, which is returned.

    `mixture` makes that sigma 1 per real component. Then all of y gets the one factor that gives it its energy back, and sigma is this
    factor: pictures keep the file's brightness, whatever its unit is, and coils that were alike stay as they were.
    """
    energy = lambda image: float(np.square(np.abs(image), dtype=np.float64).sum())
    before = after = 0.0
    for index, image in enumerate(y):
        before += energy(image)
        y[index] = np.einsum("dc,c...->d...", matrix, image, optimize=True)
        after += energy(y[index])
    gain = math.sqrt(before / after)
    y *= np.float32(gain)
    return gain


def brightness(y: NDArray[np.complex64]) -> NDArray[np.float32]:
    """[slice, row, column]: root of the sum of squares over the coils, of images of k-space's centre [slice, coil, ky, kx]."""
    height, width = y.shape[-2:]
    window = np.zeros((height, width), np.float32)
    part = min(CENTRE, height), min(CENTRE, width)
    central(window, part)[:] = np.outer(*(np.hanning(n + 2)[1:-1] for n in part))
    found = np.empty((len(y), height, width), np.float32)
    for index, image in enumerate(y):
        coils = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(image * window, (-2, -1))), (-2, -1))
        found[index] = np.sqrt(np.square(np.abs(coils)).sum(0))
    return found


def _name(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _children(element: ElementTree.Element | None, name: str) -> list[ElementTree.Element]:
    return [] if element is None else [child for child in element if _name(child) == name]


def _child(element: ElementTree.Element | None, name: str) -> ElementTree.Element | None:
    return next(iter(_children(element, name)), None)


def _text(element: ElementTree.Element | None, name: str) -> str:
    child = _child(element, name)
    return "" if child is None else (child.text or "").strip()


def _number(element: ElementTree.Element | None, name: str) -> float | None:
    try:
        value = float(_text(element, name))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _step(element: ElementTree.Element | None, name: str) -> int | None:
    value = _number(element, name)
    return int(value) if value is not None and 0 <= value == int(value) < BIGGEST_SIDE else None


def _space(encoding: ElementTree.Element, name: str) -> Space:
    space = _child(encoding, name)
    sizes = [_number(_child(space, "matrixSize"), axis) for axis in "xyz"]
    if any(n is None or n != int(n) or not 1 <= n <= BIGGEST_SIDE for n in sizes[:2]):
        raise UnsupportedError(f"the header XML gives no usable matrix size in {name}; expected whole numbers from 1 to "
                               f"{BIGGEST_SIDE}: correct the header")  # fmt: skip
    lengths = [_number(_child(space, "fieldOfView_mm"), axis) for axis in "xyz"]
    known = all(v is not None and 0 < v < 1e5 for v in lengths[:2])
    depth = lengths[2] if lengths[2] is not None and lengths[2] > 0 else 0.0
    matrix: Any = tuple(int(n or 1) for n in sizes)
    return Space(matrix, (float(lengths[0] or 0), float(lengths[1] or 0), depth) if known else None)
