"""k-space as a plain array with its side-car, and raw data that is recognised and sent to its converter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_inputs import P_FILE, coil_images, fft2c, npy, npy_differing, twix

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import kspace, read, vendor

KSPACE = fft2c(coil_images())
SIDE = {"axes": ["coil", "ky", "kx"], "shape": [3, 48, 20], "dtype": "complex64", "mask": "nonzero", "fov_mm": None, "noise_sigma": None,
        "centre": "array centre (n//2)", "source": "somewhere", "licence": "BSD-3-Clause"}  # fmt: skip


@pytest.mark.parametrize("array", [KSPACE, KSPACE[0], KSPACE.astype(np.complex128), np.asfortranarray(KSPACE)])
def test_without_a_sidecar(array: np.ndarray, tmp_path: Path) -> None:
    mask = np.arange(20) % 2 == 0
    source = read(npy(tmp_path, array * mask))
    scan = source.scan
    assert source.kind == "kspace" and source.modality == "MR" and scan is not None and scan.y.dtype == np.complex64
    np.testing.assert_allclose(scan.y, (array if array.ndim == 4 else array[None]) * mask, rtol=1e-6)
    assert (scan.acquisition.mask == mask).all() and scan.grid.spacing == (1, 1) and scan.affine is None and scan.noise is None
    assert not source.sized and not source.placed
    line = source.describe()
    assert "matrix 48 x 20, 2-fold accelerated, pixel size unknown" in line and "measured is what is not zero" in line


def test_what_the_sidecar_says(tmp_path: Path) -> None:
    source = read(npy(tmp_path, KSPACE[0], SIDE))
    assert not source.sized and source.notes == () and "pixel size unknown" in source.describe()
    source = read(npy(tmp_path, KSPACE[0], SIDE | {"fov_mm": [96, 30.0], "noise_sigma": 0.25, "mask": "all"}))
    scan = source.scan
    assert scan is not None and scan.grid.spacing == (2.0, 1.5) and scan.noise is not None and float(scan.noise) == 0.25
    assert scan.acquisition.mask.all() and source.sized and "2 x 1.5 mm" in source.describe()


def test_a_stray_zero_is_no_other_mask(tmp_path: Path) -> None:
    array = KSPACE.copy()
    array[0, :, 3, 4] = 0
    scan = read(npy(tmp_path, array)).scan
    assert scan is not None and scan.acquisition.mask.all()
    with pytest.raises(UnsupportedError, match="sampled at different places"):
        read(npy(tmp_path, npy_differing()))


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="k-space needs more than"):
        read(npy(tmp_path, KSPACE), max_bytes=20_000)
    monkeypatch.setattr(kspace, "LONGEST_SIDECAR", 10)
    with pytest.raises(UnsupportedError, match="larger than 1 MiB"):
        read(npy(tmp_path, KSPACE[0], SIDE))


@pytest.mark.parametrize(("head", "words"), [(twix("VB"), "siemens_to_ismrmrd"), (twix("VD"), "siemens_to_ismrmrd"), (P_FILE, "ge_to")])
def test_raw_data_by_content(head: bytes, words: str) -> None:
    assert words in vendor.by_content(head[:544])


@pytest.mark.parametrize("head", [b"", bytes(544), bytes(128) + b"DICM" + bytes(400), np.random.default_rng(0).bytes(544), b"text " * 100])
def test_other_bytes_are_no_raw_data(head: bytes) -> None:
    assert vendor.by_content(head) == ""


@pytest.mark.parametrize(("suffix", "words"), [(".dat", "siemens"), (".7", "ge_to"), (".LAB", "philips"), (".nii", "")])
def test_endings_are_hints(suffix: str, words: str) -> None:
    assert words in vendor.by_ending(suffix) and bool(vendor.by_ending(suffix)) == bool(words)


@pytest.mark.data
def test_the_real_brain(data_dir: Path) -> None:
    """8 coils, 2D Poisson-disc with a full centre of 24 x 24 at (115, 90)."""
    source = read(data_dir / "kspace" / "brain_8ch_undersampled.npy")
    scan = source.scan
    assert scan is not None and scan.y.shape == (1, 8, 230, 180) and scan.acquisition.samples == 5148
    assert scan.acquisition.mask[103:127, 78:102].all()
    assert source.describe() == "k-space (array), 1 slice, 8 coils, matrix 230 x 180, 8.04-fold accelerated, pixel size unknown"
