"""k-space as a plain array: complex .npy (coils, ky, kx) or (slices, coils, ky, kx), k = 0 at n // 2, and a JSON of the same stem.

| key | what |
|---|---|
| axes | ["coil", "ky", "kx"], with "slice" in front where there are several; must fit the array |
| shape | the array's shape, to check it against |
| mask | "nonzero" (default): measured is what is not 0 in any coil; "all" |
| fov_mm | [along ky, along kx] in mm, or null |
| noise_sigma | standard deviation per real component, or null |
| centre | "array centre (n//2)" |

Other keys (source, licence) are passed over. Without the file the size of a pixel is not known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io.arrays import UNREADABLE, npy_header
from deft_med.io.gate import MAX_BYTES, broken, content, digest
from deft_med.io.source import Source
from deft_med.volume import Scan
from operators.geometry import Cartesian, Grid

AXES = ["slice", "coil", "ky", "kx"]
CENTRES = ("array centre (n//2)", "array centre")
LONGEST_SIDECAR = 2**20
FAR = 10.0  # times the power in the middle of k-space that its ends never have
STRAY = 0.01  # share of samples that may be exactly 0 in one slice and not in another


def read(path: Path, *, max_bytes: int = MAX_BYTES) -> Source:
    """The k-space in a .npy file, with what its side-car says.

    Raises:
        CorruptError: a truncated file, or a side-car that is no JSON.
        UnsupportedError: pickled objects, real numbers, other axes, NaN, all zero, a side-car that does not fit.
        ResourceError: more than ``max_bytes``.
    """
    array = _array(path, max_bytes)
    side = _sidecar(path)
    if side.get("axes") not in (None, AXES[-array.ndim :]):
        raise UnsupportedError(f"the side-car's axes do not fit k-space of {array.ndim} axes; expected {AXES[-array.ndim :]}")
    if side.get("shape") not in (None, list(array.shape)):
        raise UnsupportedError(f"the side-car's shape is not that of k-space, {list(array.shape)}; give the two that belong together")
    if side.get("centre") not in (None, *CENTRES):
        raise UnsupportedError(f"the side-car's centre must be {CENTRES[0]!r}: k = 0 in the middle (numpy.fft.fftshift)")
    coils, *sides = array.shape[-3:]
    if coils > min(sides) and "axes" not in side:
        raise UnsupportedError(f"k-space of shape {array.shape} would have {coils} coils on {sides[0]} x {sides[1]} samples; expected "
                               f"{AXES[-array.ndim :]}: if the coils are last, numpy.moveaxis(kspace, -1, -3) puts them first")
    if axes := _shifted(array):
        raise UnsupportedError(f"k = 0 lies at an end of k-space's axes {axes}; expected it in the middle, at n // 2: save "
                               f"numpy.fft.fftshift(kspace, {axes})")  # fmt: skip
    y = array.reshape((1,) * (4 - array.ndim) + array.shape)
    mask = _mask(y, side.get("mask"))
    fov, sigma = _lengths(side, "fov_mm", 2), _lengths(side, "noise_sigma", 1)
    shape = (y.shape[2], y.shape[3])
    spacing = (1.0, 1.0) if fov is None else (fov[0] / shape[0], fov[1] / shape[1])
    noise = None if sigma is None else np.array(sigma[0], np.float32)
    scan = Scan(y, Cartesian.of(mask), Grid(shape=shape, spacing=spacing), noise)
    notes = () if side else ("no side-car JSON: measured is what is not zero",)
    return Source("kspace", scan=scan, digest=digest(path), notes=notes, placed=False, sized=fov is not None)


def _shifted(array: NDArray[np.complex64]) -> tuple[int, ...]:
    """Axes along which k = 0 lies at the ends, not in the middle: an eighth of each axis about it holds more there, by far."""
    def power(axes: tuple[int, ...]) -> float:
        part = array
        for axis in (-2, -1):
            n, half = array.shape[axis], max(1, array.shape[axis] // 16)
            part = part.take(np.arange(-half, half) % n if axis in axes else np.arange(n // 2 - half, n // 2 + half) % n, axis)
        return float((np.abs(part.astype(np.complex128)) ** 2).sum())

    found = {axes: power(axes) for axes in ((), (-2,), (-1,), (-2, -1))}
    most = max(found, key=lambda axes: found[axes])
    return most if found[most] > FAR * found[()] > 0 else ()


def _array(path: Path, max_bytes: int) -> NDArray[np.complex64]:
    with broken("the .npy file", also=UNREADABLE), open(path, "rb") as stream:
        shape, dtype = npy_header(stream)
        needed = math.prod(shape) * dtype.itemsize
        held = path.stat().st_size - stream.tell()
    if dtype.hasobject:
        raise UnsupportedError("the .npy file holds pickled objects, which are never loaded; save a complex array")
    if dtype.kind != "c":
        raise UnsupportedError(f"the .npy file holds {dtype.name} numbers; expected complex k-space: a magnitude image is "
                               "no measurement, give it as DICOM or NIfTI for a study")  # fmt: skip
    if len(shape) not in (3, 4) or 0 in shape:
        raise UnsupportedError(f"the .npy file has shape {shape}; expected (coils, ky, kx) or (slices, coils, ky, kx)")
    if needed > held:
        raise CorruptError(f"the .npy file is truncated: {held} bytes of samples, {needed} expected; copy it again")
    if math.prod(shape) * 8 > max_bytes or needed > 2 * max_bytes:
        raise ResourceError(f"k-space needs more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    with broken("the .npy file", also=UNREADABLE), open(path, "rb") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.complex64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UnsupportedError(f"k-space holds {bad} values that are not finite (NaN); write 0 where nothing was measured")
    return array


def _sidecar(path: Path) -> dict[str, Any]:
    """The JSON beside a file, or nothing."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    if beside.stat().st_size > LONGEST_SIDECAR:
        raise UnsupportedError("the side-car JSON is larger than 1 MiB; expected axes, shape, mask, fov_mm, noise_sigma and centre")
    try:
        found = json.loads(content(beside).decode())
    except (ValueError, RecursionError):
        raise CorruptError("the side-car JSON beside k-space is damaged: it does not parse; write it again or take it away") from None
    if not isinstance(found, dict):
        raise UnsupportedError("the side-car JSON beside k-space is no object; expected axes, shape, mask, fov_mm, noise_sigma and centre")
    return found


def _mask(y: NDArray[np.complex64], rule: object) -> NDArray[np.bool_]:
    """(ky, kx): what was measured, the same in every slice."""
    if rule not in (None, "nonzero", "all"):
        raise UnsupportedError("the side-car's mask must be 'nonzero' or 'all'")
    filled = (y != 0).any(1)
    mask = filled.any(0)
    if not mask.any():
        raise UnsupportedError("k-space is zero everywhere; expected measurements: export it again")
    if rule == "all":
        return np.ones_like(mask)
    if ((~filled & mask).sum((1, 2)) > STRAY * mask.sum()).any():
        raise UnsupportedError("the slices of k-space are sampled at different places; one mask for all is supported: give each as a file")
    return mask


def _lengths(side: dict[str, Any], key: str, count: int) -> tuple[float, ...] | None:
    value = side.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v > 0 for v in values)
    if len(values) != count or not good:
        raise UnsupportedError(f"the side-car's {key} must be {'one positive number' if count == 1 else 'two positive lengths'} or null")
    return tuple(float(v) for v in values)
