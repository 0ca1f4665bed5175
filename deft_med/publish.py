"""Publish a run: everything into a folder beside the target, renamed when it is whole; nothing is ever half-written."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deft_med.errors import OutputError, ResourceError

RECORD = "run.json"  # what tells a folder that a run made
_open: set[Path] = set()  # temporary folders of this process


def check_target(target: Path, overwrite: bool, record: str = RECORD) -> None:
    """Refuse, before any work, a target that is in the way or cannot be written; OutputError says what to do.

    An empty folder is in nobody's way. What is overwritten, when told to, holds the file ``record`` (so it was written by us).
    """
    if not _empty(target) and (target.exists() or target.is_symlink()):
        if not overwrite:
            raise OutputError("the output folder exists already: name another with --out, or say --overwrite")
        if not target.is_dir() or target.is_symlink() or not (target / record).is_file():
            raise OutputError("the output exists and was not written by deft_med: it is not overwritten; name another folder with --out")
    parent = target.absolute() if _empty(target) else target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _read_only(parent):
        raise OutputError("the output folder cannot be written: name a writable one with --out")


def _empty(target: Path) -> bool:
    """Whether it is a folder with nothing in it, but for what is being made there."""
    return (target.is_dir() and not target.is_symlink() and os.access(target, os.R_OK)
            and all(path in _open for path in target.absolute().iterdir()))


def _read_only(folder: Path) -> bool:
    """Whether writing fails in fact: root passes every access check, on a read-only disk too."""
    probe = folder / f".deft_med-{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return True
    return False


@contextmanager
def published(target: Path, overwrite: bool = False, record: str = RECORD) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well and vanishes when it does not.

    Raises OutputError when the target is in the way or not writable, ResourceError when the disk is full.
    """
    check_target(target, overwrite, record)
    target = target.absolute()
    empty = _empty(target)  # it stays the folder that somebody prepared: a mount, or with rights of its own
    beside = (target if empty else target.parent) / f".{target.name}.part-{uuid.uuid4().hex[:12]}"
    try:
        _open.add(beside)
        beside.mkdir(parents=True)
        yield beside
        if empty:
            check_target(target, False, record)
            for made in sorted(beside.iterdir(), key=lambda path: path.name == record):  # the record last: it says that all is there
                os.rename(made, target / made.name)
        elif target.exists():
            check_target(target, overwrite, record)
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:12]}")
            os.rename(target, old)
            os.rename(beside, target)
            shutil.rmtree(old)
        else:
            os.rename(beside, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError("the disk is full: free some space or name another folder with --out") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise OutputError("the output folder cannot be written: name a writable one with --out") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _open.discard(beside)


def abandon() -> None:
    """Remove what is half-written: for a process that is told to end now."""
    for folder in tuple(_open):
        shutil.rmtree(folder, ignore_errors=True)


def write_record(folder: Path, record: dict) -> None:
    """The run's record as JSON, NaN refused."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", "utf-8")
