"""Files in, files out: `read` chooses by content, `write` by the format named. No network is known here.

The libraries for one kind of file are loaded when that kind is met.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from deft_med.errors import UsageError
from deft_med.io.gate import MAX_BYTES, kind_of, regular, writing
from deft_med.io.source import Source
from deft_med.volume import Volume

__all__ = ["MAX_BYTES", "Source", "example", "read", "write"]

EXAMPLES = {"ct": "J2K_pixelrep_mismatch.dcm"}  # a 512 x 512 head CT, lossless JPEG 2000, in pydicom's wheel


def example(name: str) -> Path:
    """A real scan that ships with an installed library; UsageError for a name that does not exist or a file that is not there."""
    from pydicom.data import get_testdata_file

    file = get_testdata_file(EXAMPLES[name], download=False) if name in EXAMPLES else None
    if file is None:
        raise UsageError(f"no example of that name is installed: choose one of {', '.join(EXAMPLES)}, or install pydicom again")
    return Path(str(file))


def read(path: str | Path, *, allow_lossy: bool = False, max_bytes: int = MAX_BYTES, modality: str | None = None) -> Source:
    """A scan from a DICOM file or folder, a NIfTI file, a sinogram.npz or k-space (fastMRI, ISMRMRD, .npy), told apart by content.

    Args:
        path: a DICOM file is that slice alone; its folder is the series.
        modality: "CT" or "MR" for a NIfTI file, which does not say; `deft_med.io.nifti` has the rule without it.
        allow_lossy: take images that went through lossy compression; `Source.lossy` records it.
        max_bytes: limit for the decoded volume.

    Raises:
        ValueError: another modality.
        UsageError: no such path, or a pipe, socket or device.
        UnsupportedError: readable, but not for us.
        CorruptError: broken bytes.
        ResourceError: more than ``max_bytes``, or a file that inflates without end.
    """
    if modality not in (None, "CT", "MR"):
        raise ValueError(f"modality must be 'CT', 'MR' or None, got {modality!r}")
    path = Path(path)
    kind = "folder" if stat.S_ISDIR(regular(path).st_mode) else kind_of(path)
    if kind in ("folder", "dicom"):
        from deft_med.io import dicom

        reader = dicom.read_folder if kind == "folder" else dicom.read_file
        return reader(path, allow_lossy=allow_lossy, max_bytes=max_bytes)
    if kind == "zip":
        from deft_med.io import arrays

        return arrays.read(path, max_bytes=max_bytes)
    if kind == "hdf5":
        from deft_med.io import hdf5

        return hdf5.read(path, max_bytes=max_bytes)
    if kind == "npy":
        from deft_med.io import kspace

        return kspace.read(path, max_bytes=max_bytes)
    from deft_med.io import nifti

    return nifti.read(path, max_bytes=max_bytes, modality=modality)


def write(
    volume: Volume,
    path: str | Path,
    like: Source | None = None,
    *,
    format: str,
    kind: str = "DEFT",
    description: str = "reconstruction",
    derivation: str = "",
    simulated: bool,
    uid_entropy: Iterable[str] = (),
    when: datetime | None = None,
    about: Mapping[str, str | bool | float] | None = None,
) -> int:
    """``volume`` as a DICOM series in the folder ``path`` (made if absent) or as the NIfTI file ``path``; returns the pixels clipped.

    Args:
        volume: [slice, row, column] on its own grid; the slices are those of ``like``. DICOM takes "HU" (CT) and "a.u." (MR).
        like: the source; its headers give a DICOM series its patient, study and frame of reference. Without headers, but with a
            place in the patient, DICOM is a new study of nobody.
        format: "dicom" or "nifti".
        kind: "DEFT", "FBP", "TV", "STDDEV", "ZERO_FILLED", "CG_SENSE" or "WAVELET" (for NIfTI any word, as "PHASE").
        description, derivation, uid_entropy, when: see `deft_med.io.dicom_write.write_series`.
        simulated: the measurements were computed from an image; every output says so.
        about: more for the JSON beside a NIfTI file; no patient data.

    Raises:
        ValueError: another format, or arguments that do not fit each other.
        UsageError: DICOM of a source whose place in the patient is not known.
        OutputError, ResourceError: not writable, or the disk is full.
    """
    path = Path(path)
    if format == "dicom":
        from deft_med.io.dicom_write import write_series

        if like is not None and like.modality == "MR" and not like.placed:
            raise UsageError("the source gives no place in the patient, which DICOM needs: nothing written; say --format nifti")
        with writing("the output folder"):
            path.mkdir(exist_ok=True)
        return write_series(
            volume, path, like.headers if like is not None else [], kind=kind, description=description, derivation=derivation,
            simulated=simulated, uid_entropy=uid_entropy, when=when,
        )  # fmt: skip
    if format == "nifti":
        from deft_med.io import nifti

        known = {} if like is None else {"placed": like.placed, "sized": like.sized}
        words = {"Kind": kind, "Simulated": simulated, "Description": description, **(about or {})}
        nifti.write(volume, path, about=words, **known)
        return 0
    raise ValueError(f"format must be 'dicom' or 'nifti', got {format!r}")
