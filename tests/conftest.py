"""What every test may use: the folder of development images, and a fixed number of threads."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development images (never part of the repository): $DEFT_MED_DATA, or ../shared/data beside the working tree."""
    folder = Path(os.environ.get("DEFT_MED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no development images in {folder.name}: set DEFT_MED_DATA")
    return folder


@pytest.fixture(scope="session")
def head_ct() -> Path:
    """The 512 x 512 head CT that ships with pydicom: lossless JPEG 2000, 0.43 mm, padding -2000."""
    return _shipped("J2K_pixelrep_mismatch.dcm")


@pytest.fixture(scope="session")
def small_ct() -> Path:
    """A 128 x 128 cut-out of 85 mm that ships with pydicom: readable, and out of the scope of the shipped models."""
    return _shipped("CT_small.dcm")


def _shipped(name: str) -> Path:
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    assert path is not None, f"pydicom no longer ships {name}"
    return Path(str(path))
