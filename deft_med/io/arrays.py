"""sinogram.npz: measurements as plain arrays, never pickles.

| key | what |
|---|---|
| y | [slice, view, detector] or [view, detector], line integrals of the attenuation, -log(I / I0) |
| angles | (views,) rad |
| pitch | distance between detector bins, mm |
| geometry | "parallel" (default) or "fan" |
| grid_shape, grid_spacing | (rows, columns) and (dy, dx) mm of the image to reconstruct |
| detectors | optional: number of bins, to check y against |
| offset | optional: position of the detector's centre, mm |
| source_origin, origin_detector, curved | for a fan: mm, mm, True or False |
| noise | optional: standard deviation of y, broadcasts to y |
| affine | optional: (4, 4), (column, row, slice, 1) to LPS mm |
| mu_water | optional: attenuation of water in 1/mm (default 0.0192) |
| simulated | optional: True where y was computed |
"""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io.gate import MAX_BYTES, broken, content, writing
from deft_med.io.source import Source
from deft_med.volume import Scan
from operators.geometry import FanBeam, Grid, ParallelBeam

REQUIRED = ("y", "angles", "pitch", "grid_shape", "grid_spacing")
OPTIONAL = ("geometry", "detectors", "offset", "source_origin", "origin_detector", "curved", "noise", "affine", "mu_water", "simulated")
UNREADABLE = (SyntaxError, tokenize.TokenError)  # what numpy throws at a damaged .npy header, beside ValueError
MOST_TURNS = 4 * np.pi
HIGHEST_LINE = 100.0


def read(path: Path, *, max_bytes: int = MAX_BYTES) -> Source:
    """The measurements in a sinogram.npz.

    Raises:
        CorruptError: a damaged or truncated archive.
        UnsupportedError: another archive, a missing or unknown key, pickled objects, shapes that do not fit, NaN, angles in degrees,
            counts instead of line integrals.
        ResourceError: more than ``max_bytes`` once unpacked.
    """
    arrays = _arrays(path, max_bytes)
    if "y" not in arrays:
        raise UnsupportedError("the input is a ZIP archive, but no sinogram.npz (it holds no y); unpack it and give what is inside")
    missing, unknown = sorted(set(REQUIRED) - set(arrays)), len(set(arrays) - set(REQUIRED) - set(OPTIONAL))
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else f"holds {unknown} unknown keys"
        raise UnsupportedError(f"the sinogram.npz {lacks}; it needs {', '.join(REQUIRED)} and may have {', '.join(OPTIONAL)}")
    try:
        scan = _scan(arrays)
    except ValueError as error:
        # our own words: every message of Scan, Grid and the beams names a field and numbers only
        raise UnsupportedError(f"the sinogram.npz does not fit together: {error}") from None
    return Source("sinogram", scan=scan, digest=hashlib.sha256(content(path)).hexdigest())


def write(scan: Scan, path: Path) -> None:
    """``scan`` as a sinogram.npz that `read` takes; its reference does not go with it. OutputError or ResourceError if not written."""
    beam = scan.acquisition
    fields: dict[str, Any] = {
        "y": scan.y, "angles": np.array(beam.angles), "pitch": beam.pitch, "offset": beam.offset, "detectors": beam.detectors,
        "geometry": "fan" if isinstance(beam, FanBeam) else "parallel", "grid_shape": np.array(scan.grid.shape),
        "grid_spacing": np.array(scan.grid.spacing), "simulated": scan.simulated,
    }  # fmt: skip
    if isinstance(beam, FanBeam):
        fields |= {"source_origin": beam.source_origin, "origin_detector": beam.origin_detector, "curved": beam.curved}
    optional = {"noise": scan.noise, "affine": scan.affine, "mu_water": scan.mu_water}
    fields |= {key: value for key, value in optional.items() if value is not None}
    with writing("the sinogram"), open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **fields)


def _scan(arrays: dict[str, np.ndarray]) -> Scan:
    angles = _real(arrays, "angles").ravel()
    if np.ptp(angles) > MOST_TURNS:
        raise ValueError(f"angles span {np.ptp(angles):.4g} rad, more than two turns; give radians, not degrees")
    y = _real(arrays, "y")
    if y.max(initial=0.0) > HIGHEST_LINE:
        raise ValueError(f"y reaches {y.max():.4g}; give line integrals -log(I / I0), not photon counts or HU")
    detectors = int(_scalar(arrays, "detectors")) if "detectors" in arrays else int(y.shape[-1]) if y.ndim else 0
    pitch, offset = _scalar(arrays, "pitch"), _scalar(arrays, "offset", 0.0)
    common: dict[str, Any] = dict(angles=tuple(angles.tolist()), detectors=detectors, pitch=pitch, offset=offset)
    geometry = str(arrays["geometry"]) if "geometry" in arrays else "parallel"
    if geometry == "parallel":
        beam: ParallelBeam | FanBeam = ParallelBeam(**common)
    elif geometry == "fan":
        beam = FanBeam(source_origin=_scalar(arrays, "source_origin"), origin_detector=_scalar(arrays, "origin_detector"),
                       curved=bool(_scalar(arrays, "curved", 0.0)), **common)  # fmt: skip
    else:
        raise ValueError("geometry must be 'parallel' or 'fan'")
    shape = _real(arrays, "grid_shape").ravel()
    if (shape != np.round(shape)).any():
        raise ValueError("grid_shape must be two whole numbers (rows, columns)")
    grid = Grid(shape=tuple(int(n) for n in shape), spacing=tuple(_real(arrays, "grid_spacing").ravel().tolist()))  # type: ignore[arg-type]
    noise, affine = (_real(arrays, key) if key in arrays else None for key in ("noise", "affine"))
    simulated = bool(_scalar(arrays, "simulated", 0.0))
    mu_water = _scalar(arrays, "mu_water", 0.0) if "mu_water" in arrays else None
    return Scan(y, beam, grid, noise, affine=affine, simulated=simulated, mu_water=mu_water)


def _real(arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    array = arrays[key]
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{key} must hold finite real numbers (no NaN), got dtype {array.dtype} of shape {array.shape}")
    return array


def _scalar(arrays: dict[str, np.ndarray], key: str, default: float | None = None) -> float:
    if key not in arrays:
        if default is None:
            raise ValueError(f"{key} is needed for a fan beam")
        return default
    array = _real(arrays, key)
    if array.size != 1:
        raise ValueError(f"{key} must be one number, got shape {array.shape}")
    return float(array.reshape(()))


def _arrays(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Every .npy member of a ZIP archive; its shape is held against its size before anything is allocated."""
    found: dict[str, np.ndarray] = {}
    with broken("the ZIP archive", action="opened", also=(zipfile.BadZipFile, zipfile.LargeZipFile)):
        archive = zipfile.ZipFile(path)
    with archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        if sum(m.file_size for m in members) > max_bytes:
            raise ResourceError(f"the sinogram.npz unpacks to more than {max_bytes / 2**30:.1f} GiB; give fewer slices or raise max_bytes")
        for member in members:
            key = member.filename.removesuffix(".npy")
            if key in REQUIRED + OPTIONAL:
                found[key] = _member(archive, member, key)
            else:
                found[f"?{len(found)}"] = np.empty(0)
    return found


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> np.ndarray:
    what, also = f"{key} in the sinogram.npz", (zipfile.BadZipFile, *UNREADABLE)
    with broken(what, also=also), archive.open(member) as stream:
        shape, dtype = npy_header(stream)
        held = dtype.hasobject or np.prod([float(n) for n in shape]) * dtype.itemsize <= member.file_size
    if dtype.hasobject:
        raise UnsupportedError(f"{what} holds pickled objects, which are never loaded; save plain arrays")
    if not held:
        raise CorruptError(f"{what} is truncated: its shape asks for more bytes than it has; save it again")
    with broken(what, also=also), archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of the .npy file that a stream is at the start of; it stands behind the header then."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    return shape, dtype
