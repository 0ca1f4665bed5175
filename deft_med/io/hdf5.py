"""HDF5 in: fastMRI or ISMRMRD, told apart by what the file holds. Nothing outside the file is ever touched.

Links to other places, virtual and external data sets and filters that would load a plugin are refused before a value is read.
"""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io.gate import MAX_BYTES, broken, digest
from deft_med.io.source import Source

FILTERS = {1, 2, 3, 5, 6, 32000}  # deflate, shuffle, Fletcher-32, n-bit, scale-offset, LZF: all inside h5py
MOST_MEMBERS = 1000
DENSEST = 1100  # deflate packs no better


def read(path: Path, *, max_bytes: int = MAX_BYTES) -> Source:
    """The measurements in a fastMRI or ISMRMRD file.

    Raises:
        CorruptError: a truncated or damaged file, or XML that is not well-formed.
        UnsupportedError: neither layout, links, virtual data sets, unknown filters, and what `fastmri.read` and `mrd.read` refuse.
        ResourceError: more than ``max_bytes``.
    """
    from deft_med.io import fastmri, mrd

    with broken("the HDF5 file (truncated?)", action="opened"):
        file = h5py.File(path, "r", locking=False)
    with file, broken("the HDF5 file"):
        found = members(file)
        if "kspace" in found:
            return fastmri.read(file, digest=digest(path), max_bytes=max_bytes)
        groups = [name for name in found if isinstance(file[name], h5py.Group) and "data" in members(file[name])]
        if len(groups) > 1:
            raise UnsupportedError(f"the HDF5 file holds {len(groups)} ISMRMRD groups; one is supported: split the file")
        if groups:
            return mrd.read(file[groups[0]], digest=digest(path), max_bytes=max_bytes)
    raise UnsupportedError(
        f"the HDF5 file holds neither kspace (fastMRI) nor a group with data and xml (ISMRMRD), but {len(found)} other members; "
        "convert it (ge_to_ismrmrd, siemens_to_ismrmrd) or give k-space as .npy"
    )


def members(group: h5py.Group) -> list[str]:
    """Names of what lies in a group itself; UnsupportedError for a link to another place or too many members."""
    if len(group) > MOST_MEMBERS:
        raise UnsupportedError(f"the HDF5 file holds {len(group)} members in one group; no MR layout has more than {MOST_MEMBERS}")
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
            raise UnsupportedError(f"the HDF5 file holds {kind}, which is never followed; copy the data into one file (h5repack, h5copy)")
    return list(group)


def dataset(group: h5py.Group, name: str, max_bytes: int) -> h5py.Dataset:
    """A data set whose bytes lie in the file and unpack without a plugin, to no more than ``max_bytes`` (a chunk too).

    Raises:
        UnsupportedError: a group, a virtual or external data set, an unknown filter, object references.
        CorruptError: a record whose members overlap, which HDF5 itself crashes on.
        ResourceError: too large, or far larger than what lies in the file.
    """
    found = group[name]
    if not isinstance(found, h5py.Dataset):
        raise UnsupportedError(f"{name} in the HDF5 file is no data set; expected an array: write it again")
    if found.is_virtual or found.external:
        raise UnsupportedError(f"{name} in the HDF5 file is a virtual data set of other files; copy the data into one file (h5repack)")
    plist = found.id.get_create_plist()
    unknown = [code for code in (plist.get_filter(k)[0] for k in range(plist.get_nfilters())) if code not in FILTERS]
    if unknown:
        raise UnsupportedError(f"{name} in the HDF5 file is packed with filter {unknown[0]}, a plugin; repack it (h5repack -f GZIP=4)")
    if h5py.check_ref_dtype(found.dtype) is not None:
        raise UnsupportedError(f"{name} in the HDF5 file holds references; expected numbers: write them as one array")
    if not _sound(found.dtype):
        raise CorruptError(f"{name} in the HDF5 file is damaged: the members of its records overlap; copy the file again")
    sizes = [found.shape or (1,), found.chunks or (1,)]
    if max(math.prod(shape) for shape in sizes) * found.dtype.itemsize > max_bytes:
        raise ResourceError(f"{name} in the HDF5 file unpacks to over {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    claimed, held = found.size * found.dtype.itemsize, found.id.get_storage_size()
    if claimed > DENSEST * held + 2**20:
        raise ResourceError(f"{name} in the HDF5 file claims {claimed} bytes and holds {held}; refused: nothing real packs so well")
    return found


def _sound(dtype: np.dtype) -> bool:
    """Whether the members of a record lie behind each other and inside it, down to the last one."""
    if dtype.subdtype is not None:
        return _sound(dtype.subdtype[0])
    at = 0
    for member, offset in sorted((field[:2] for field in (dtype.fields or {}).values()), key=lambda field: field[1]):
        if offset < at or not _sound(member):
            return False
        at = offset + member.itemsize
    return at <= dtype.itemsize


def header(group: h5py.Group, name: str, max_bytes: int) -> bytes | str:
    """The XML in a data set of one string; UnsupportedError if it is none."""
    found = dataset(group, name, max_bytes)
    if h5py.check_string_dtype(found.dtype) is None or found.size != 1:
        raise UnsupportedError(f"{name} in the HDF5 file is not one string; expected the header XML: write it again")
    value = found[()] if found.shape == () else found[:].ravel()[0]
    return value if isinstance(value, bytes | str) else str(value)
