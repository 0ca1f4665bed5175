"""The gate in front of every reader: what a file is, by content, and how much of it may be read.

Nothing here trusts a name, a declared length or a library's patience: pipes are refused before they are opened, compressed bytes
are inflated in pieces up to a cap, and what a library throws at broken bytes becomes one of our errors without its text.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deft_med.errors import CorruptError, OutputError, ResourceError, UnsupportedError, UsageError
from deft_med.io import vendor

MAX_BYTES = 4 * 2**30  # of one decoded volume
FILE_BYTES = 2**30  # of one DICOM file as it lies
INFLATED_BYTES = 2**28  # of one deflated DICOM file: five hundred CT slices
PIECE = 2**16

# What libraries and decoders throw at bytes that are not what they claim, beside exceptions of their own.
BROKEN = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, EOFError, OverflowError, RecursionError,
    AssertionError, RuntimeError, UnicodeError, struct.error, zlib.error,
)  # fmt: skip

# Files that people hand over under another name; each is whole, and none is a scan.
PICTURES = {
    b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture", b"%PDF": "a PDF document",
    b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture",
}  # fmt: skip
NRRD, META = b"NRRD", b"ObjectType"


def regular(path: Path, what: str = "the input") -> os.stat_result:
    """The file's stat, or UsageError where there is none, it may not be read, or it is a pipe, a socket or a device."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UsageError(f"{what}: no such path; give a DICOM file or folder, NIfTI, sinogram.npz, or k-space (.h5, .npy)") from None
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a path"
        raise UsageError(f"{what} cannot be looked at: {reason}") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UsageError(f"{what} is a pipe, a socket or a device; give a regular file or a folder")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{what} may not be read: check its permissions")
    return status


def content(path: Path, count: int = 0) -> bytes:
    """The first ``count`` bytes of a regular file, or all of them; UsageError if the system does not give them."""
    try:
        with open(path, "rb", buffering=0 if count else -1) as file:
            return file.read(count) if count else file.read()
    except OSError as error:
        raise UsageError(f"the input cannot be read: {os.strerror(error.errno or errno.EIO)}") from None


def kind_of(path: Path, what: str = "the input") -> str:
    """What a regular file is by its first bytes: "dicom", "nifti", "gzip", "zip", "hdf5" or "npy".

    Raises:
        CorruptError: empty, text, or bytes of no kind known here.
        UnsupportedError: a picture, a document, a scanner's raw data, a headerless DICOM dataset, a detached NIfTI header.
    """
    head = content(path, 544)
    wanted = "expected DICOM, NIfTI, sinogram.npz or k-space (.h5, .npy)"
    if not head:
        raise CorruptError(f"{what} is empty (0 bytes); {wanted}: copy or export it again")
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return "hdf5"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if nifti_version(head):
        return "nifti"
    if head[344:348] == b"ni1\0":
        raise UnsupportedError(f"{what} is the header of a two-file NIfTI; save the image as one .nii or .nii.gz file")
    for magic, name in {**PICTURES, NRRD: "an NRRD file", META: "a MetaImage file"}.items():
        if head.startswith(magic):
            raise UnsupportedError(f"{what} is {name}; {wanted}")
    if head[:4] in (b"\x08\0\x05\0", b"\x08\0\0\0", b"\x08\0\x08\0", b"\x02\0\0\0", b"\x02\0\x10\0"):
        raise UnsupportedError(f"{what} looks like a DICOM dataset without the preamble of Part 10; convert it (dcmconv +F) or export it")
    raw = vendor.by_content(head)
    if raw:
        raise UnsupportedError(f"{what} is {raw}")
    raw = vendor.by_ending(path.suffix)
    if raw:
        raise UnsupportedError(f"{what} is of no kind known here; by its name's ending it may be {raw}")
    text = all(byte in b"\t\n\r\f" or byte >= 32 for byte in head)
    raise CorruptError(f"{what} is {'text' if text else 'of no known kind, or damaged'} (no DICM mark, no NIfTI header); {wanted}")


def nifti_version(head: bytes) -> int:
    """1 or 2 for the first bytes of a single-file NIfTI, else 0."""
    if head[344:348] == b"n+1\0" and 348 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")):
        return 1
    if head[4:8] == b"n+2\0" and 540 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")):
        return 2
    return 0


def inflate(data: bytes, *, wbits: int, cap: int, what: str, stop: int | None = None) -> bytes:
    """``data`` inflated in pieces (wbits as in `zlib`), no more than ``stop`` bytes of it where given.

    Raises:
        ResourceError: more than ``cap`` bytes came out; no more than that is ever held.
        CorruptError: not deflated data, or it ends early.
    """
    out = bytearray()
    while data:
        inflater, at, rest = zlib.decompressobj(wbits), 0, b""
        while (rest or at < len(data)) and not inflater.eof:
            piece, at = (rest, at) if rest else (data[at : at + PIECE], at + PIECE)
            try:
                out += inflater.decompress(piece, 16 * PIECE)
            except zlib.error:
                raise CorruptError(f"{what} is damaged: its compressed bytes do not inflate; copy or export it again") from None
            rest = inflater.unconsumed_tail
            if stop is not None and len(out) >= stop:
                return bytes(out[:stop])
            if len(out) > cap:
                raise ResourceError(
                    f"{what}: {len(data)} compressed bytes inflate to more than {cap // 2**20} MiB; refused. "
                    "Raise max_bytes if you know the file"
                )
        if not inflater.eof:
            raise CorruptError(f"{what} is truncated: its compressed bytes end early; copy or export it again")
        # a gzip file may have several members; raw deflate has one, then at most a padding byte
        data = (inflater.unused_data + data[at:]) if wbits > 15 else b""
        data = data if data[:2] == b"\x1f\x8b" else b""
    return bytes(out)


def digest(path: Path) -> str:
    """sha256 of a file, read in pieces; UsageError if the system does not give it."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"the input cannot be read: {os.strerror(error.errno or errno.EIO)}") from None


@contextmanager
def broken(what: str, *, action: str = "read", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a library throws inside into CorruptError or ResourceError without its text, and keeps its warnings quiet.

    ``also`` names a library's own exceptions. A library's message may quote a patient's name, so neither it nor its traceback goes on.
    """
    caught: tuple[type[BaseException], ...] = (*BROKEN, *also, OSError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise ResourceError(f"{what} needs more memory than there is; give fewer slices") from None
    except caught as error:
        # the system's own errors have a number; a library's, and a seek to where nothing is, are the file's fault
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UsageError(f"{what} cannot be read: {os.strerror(error.errno)}") from None
        kind = type(error).__name__
        raise CorruptError(f"{what} is damaged and could not be {action} ({kind}); copy or export it again") from None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns what the system says while writing into ResourceError (disk full) or OutputError (anything else)."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "unknown reason"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"{what} could not be written: {reason}; free some space or choose another --out") from None
        raise OutputError(f"{what} could not be written: {reason}; choose another --out") from None
