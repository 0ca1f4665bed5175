"""NIfTI in and out. A NIfTI file has no unit for its values and no patient: the side-car JSON carries the unit, nothing carries a name.

Nor has it a modality. `read` takes the caller's word; else the side-car's ("Units" HU or a.u., or "Modality" CT or MR, as dcm2niix
writes it); else the values': CT where any is -500 or less, for that is air in HU and no magnitude, otherwise MR. A note says which.

Volumes are turned to columns left, rows posterior, slices up (LPS), whatever the order in the file, so that a slice is axial. Only an MR
volume with thicker sagittal or coronal slices keeps them, as they were acquired: they stand upright, seen from the left or the front.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io.gate import MAX_BYTES, broken, content, inflate, kind_of, nifti_version, writing
from deft_med.io.source import Source
from deft_med.volume import Volume

UNREADABLE = (HeaderDataError, ImageFileError)
AIR_BELOW = -500.0  # HU
THICK = 1.2  # thickness of a slice over the larger side of its pixels, from which it is known which way a volume was cut
LONGEST_SIDECAR = 2**20
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(path: Path, *, max_bytes: int = MAX_BYTES, modality: str | None = None) -> Source:
    """A 2D or 3D NIfTI-1 or -2 file, plain or gzipped, as a volume of upright slices in HU (CT) or a.u. (MR).

    Args:
        modality: "CT" or "MR"; without it the rule above.

    Raises:
        CorruptError: no NIfTI header, or fewer bytes than the header says.
        UnsupportedError: 4D, colour or complex, a sheared or missing affine, no spacing, NaN.
        ResourceError: the header asks for more than ``max_bytes``.
    """
    packed = kind_of(path) == "gzip"
    data = content(path)
    unpack = (lambda stop: inflate(data, wbits=31, cap=max_bytes, what="the input", stop=stop)) if packed else (lambda stop: data[:stop])
    head = unpack(544)
    version = nifti_version(head)
    if not version:
        raise UnsupportedError("the input is a gzip file, but not of a NIfTI image; unpack it first (gunzip)")
    image_class = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    with broken("the NIfTI header", also=UNREADABLE), _quiet_nibabel():
        header = image_class.header_class(head[: 348 if version == 1 else 540])
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header["vox_offset"])
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if dtype.kind not in "iuf":
        raise UnsupportedError("the NIfTI image holds colours or complex numbers; give one of HU values or MR magnitudes")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UnsupportedError(f"the NIfTI image has {len(shape)} axes; give a volume of two or three (split a 4D series first)")
    voxels = float(np.prod([float(n) for n in shape]))
    if voxels * max(dtype.itemsize, 4) + max(offset, 0) > max_bytes:
        raise ResourceError(f"the NIfTI header asks for {voxels:.3g} voxels, over {max_bytes / 2**30:.1f} GiB; crop it or raise max_bytes")
    needed = max(offset, 0) + int(voxels) * dtype.itemsize
    blob = unpack(needed)
    if len(blob) < needed:
        raise CorruptError(f"the NIfTI file is truncated: {len(blob)} bytes, {needed} expected; copy or export it again")
    with broken("the NIfTI image", also=UNREADABLE), _quiet_nibabel(), np.errstate(all="ignore"):
        image = image_class.from_bytes(blob)
        array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape + (1,) * (3 - len(shape)))
        affine = np.array(image.affine, dtype=np.float64)
        placed = bool(int(image.header["sform_code"]) or int(image.header["qform_code"]))
        unit = image.header.get_xyzt_units()[0]
    modality, note = _modality(array, path, modality)
    volume = _upright(array, affine, unit, "HU" if modality == "CT" else "a.u.")
    notes = [note]
    if not placed:
        notes.append("the file states no orientation: left and right are not known")
    if modality == "CT" and volume.data.min() > -500:
        notes.append("no air (nothing below -500 HU): are these CT numbers?")
    if modality == "MR" and volume.data.min() < 0:
        notes.append("negative values: is this a magnitude image?")
    return Source("nifti", volume=volume, digest=hashlib.sha256(data).hexdigest(), notes=tuple(notes), placed=placed)


def _modality(array: np.ndarray, path: Path, stated: str | None) -> tuple[str, str]:
    """CT or MR by the rule of this module, and the note that says why."""
    if stated is None:
        stated = _beside(path)
    if stated is not None:
        return stated, "values taken for HU" if stated == "CT" else "values taken for an MR magnitude"
    if (array <= AIR_BELOW).any():
        return "CT", "values taken for HU"
    return "MR", f"values taken for an MR magnitude (none is {AIR_BELOW:.0f} or less, as air in HU)"


def _beside(path: Path) -> str | None:
    """What the side-car JSON says of the modality; None where there is none, or it does not say."""
    beside = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    try:
        if not beside.is_file() or beside.stat().st_size > LONGEST_SIDECAR:
            return None
        found = json.loads(beside.read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return {"HU": "CT", "a.u.": "MR"}.get(str(found.get("Units")), {"CT": "CT", "MR": "MR"}.get(str(found.get("Modality"))))


def _upright(array: np.ndarray, affine: np.ndarray, unit: str, of: str) -> Volume:
    """[i, j, k] with a RAS affine as a Volume, its values in the unit ``of``, turned as this module says."""
    if unit not in ("mm", "unknown"):
        raise UnsupportedError(f"the NIfTI image measures space in {unit}, not in mm; convert its header")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UnsupportedError(f"the NIfTI image holds {bad} values that are not finite (NaN); fill them, air is -1000 HU")
    if array.min() == array.max():
        raise UnsupportedError("every voxel of the NIfTI image has the same value; there is nothing to reconstruct")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 1e-6 or lengths.max() > 1e3:
        raise UnsupportedError("the NIfTI image has no usable spacing or orientation (zero, NaN or huge); set its affine")
    unit_axes = affine[:3, :3] / lengths
    if np.abs(unit_axes.T @ unit_axes - np.eye(3)).max() > 1e-3:
        raise UnsupportedError("the NIfTI image has a sheared affine (as a tilted gantry leaves); resample it to a right-angled grid")
    found = nib.orientations.io_orientation(affine)
    thickness = [0.0, 0.0, 0.0]  # along left-right, front-back, up-down
    for length, axis in zip(lengths, found[:, 0].astype(int), strict=True):
        thickness[axis] = length
    codes = "LPS"
    if of == "a.u." and max(thickness) > THICK * sorted(thickness)[1]:
        codes = ("PIR", "LIP", "LPS")[int(np.argmax(thickness))]
    turn = nib.orientations.ornt_transform(found, nib.orientations.axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(array, turn)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    return Volume(turned.transpose(2, 1, 0), LPS_TO_RAS @ affine, of)


def write(
    volume: Volume, path: Path, *, about: Mapping[str, str | bool | float] | None = None, placed: bool = True, sized: bool = True
) -> None:
    """``volume`` as float32 NIfTI-1 at ``path`` (.nii or .nii.gz), and ``about`` with its unit as JSON beside it.

    Where its place in the patient (``placed``) or the size of a pixel (``sized``) is not known, side-car and header say so.

    Raises:
        ValueError: the affine is sheared, which the qform cannot say, or the name does not end in .nii or .nii.gz.
        OutputError, ResourceError: not writable, or the disk is full.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith(".nii"):
        raise ValueError("a NIfTI file's name ends in .nii or .nii.gz")
    affine = LPS_TO_RAS @ volume.affine
    unit_axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(unit_axes.T @ unit_axes - np.eye(3)).max() > 1e-3:
        raise ValueError("a sheared affine cannot be written as NIfTI: resample to a right-angled grid")
    with _quiet_nibabel():
        if placed:
            image = nib.Nifti1Image(np.ascontiguousarray(volume.data.transpose(2, 1, 0)), affine)
            image.set_sform(affine, code=1)
            image.set_qform(affine, code=1)
        else:
            # without a transform rows run upwards (NIfTI's method 1, as viewers draw it): turned, so that the picture stands as here
            image = nib.Nifti1Image(np.ascontiguousarray(volume.data[:, ::-1].transpose(2, 1, 0)), None)
            image.header.set_zooms(volume.spacing[::-1])
        image.header.set_xyzt_units("mm" if sized else "unknown", "sec")
        with writing("the NIfTI volume"):
            nib.save(image, path)
    place = {} if placed else {"Geometry": "unknown: the source gives no place in the patient; left and right are not known"}
    size = {} if sized else {"PixelSize": "unknown: written as 1 mm"}
    record = {"Units": volume.unit, "Coordinates": "RAS mm" if placed else "none", **place, **size,
              "IntendedUse": "research only, not for clinical use", **(about or {})}  # fmt: skip
    words = json.dumps(record, indent=2, sort_keys=True) + "\n"
    with writing("the NIfTI side-car"):
        path.with_name(name.removesuffix(".nii") + ".json").write_text(words, encoding="utf-8")


@contextlib.contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """nibabel logs what it repairs in a header, to stderr; the checks above say what matters."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
