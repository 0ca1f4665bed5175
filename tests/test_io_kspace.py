"""k-space as a plain array with its side-car, raw data that is sent to its converter, and coils that are whitened alike at all doors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_inputs import P_FILE, coil_images, fastmri, fft2c, ifft2c, mr_header, mrd, mrd_readouts, npy, npy_differing, twix

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import Source, encoding, kspace, read, vendor
from deft_med.volume import Scan

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


def test_other_conventions_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"would have 48 coils on 20 x 3 samples.*moveaxis\(kspace, -1, -3\)"):
        read(npy(tmp_path, np.moveaxis(KSPACE[0], 0, -1)))
    stated = read(npy(tmp_path, np.moveaxis(KSPACE[0], 0, -1), {"axes": ["coil", "ky", "kx"]}))
    assert stated.scan is not None and stated.scan.y.shape == (1, 48, 20, 3), "who says it is believed"
    for axes in ((-2,), (-1,), (-2, -1)):
        with pytest.raises(UnsupportedError) as refused:
            read(npy(tmp_path, np.fft.ifftshift(KSPACE[0], axes)))
        assert f"numpy.fft.fftshift(kspace, {axes})" in str(refused.value)


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


# ------------------------------------------------------------------------------------------- coils whose noise is neither alike nor apart
COILS, HEIGHT, WIDTH = 8, 128, 96
DEVIATION = 0.3 * np.linspace(1, 3, COILS)[[3, 0, 6, 1, 7, 4, 2, 5]]
_phase = np.exp(0.7j * np.arange(COILS))  # correlations of 0.3 to 0.5, complex as they are
COVARIANCE = (0.3 + 0.2 * np.outer(_phase, _phase.conj()) + 0.5 * np.eye(COILS)) * np.outer(DEVIATION, DEVIATION)
CLEAN = fft2c(coil_images(2, COILS, HEIGHT, WIDTH))


def coloured(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Noise [..., coil, readout, phase] of COVARIANCE, per real component."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return np.einsum("dc,...crp->...drp", np.linalg.cholesky(COVARIANCE), white).astype(np.complex64)


NOISY = CLEAN + coloured(CLEAN.shape)
LINES = np.isin(np.arange(WIDTH), [*range(0, WIDTH, 3), *range(36, 60)])


def door(name: str, folder: Path, data: np.ndarray, header: str | None = None, **members: np.ndarray | None) -> Source:
    header = mr_header(HEIGHT, WIDTH) if header is None else header
    folder.mkdir(exist_ok=True)
    if name == "fastmri":
        return read(fastmri(folder, **{"kspace": data, "ismrmrd_header": header, "reconstruction_rss": None, **members}))
    pytest.importorskip("ismrmrd", reason="the MRD files of these tests are written by the public ismrmrd package")
    (folder / "file.mrd").unlink(missing_ok=True)
    return read(mrd(folder, mrd_readouts(data, np.flatnonzero(data.any((0, 1, 2)))), header))


def mixed(scan: Scan, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mixture of the coils that the reader chose, covariance of the noise per real component that it leaves), by the truth."""
    flat = lambda k: np.moveaxis(k, 1, 0).reshape(COILS, -1).astype(np.complex128)  # noqa: E731
    mixture = flat(scan.y) @ np.linalg.pinv(flat(encoding.narrow(data, scan.grid.shape[0])))
    return mixture, mixture @ COVARIANCE @ mixture.conj().T


@pytest.mark.parametrize("name", ["fastmri", "mrd"])
@pytest.mark.parametrize("full", [True, False])
def test_the_edges_of_the_readout_whiten_the_coils(name: str, full: bool, tmp_path: Path) -> None:
    data = NOISY * (True if full else LINES)
    source = door(name, tmp_path, data)
    scan = source.scan
    assert scan is not None and scan.noise is not None and "whitened by the noise in the edges" in source.describe()
    assert (scan.acquisition.mask == (True if full else LINES)).all() and np.ptp(scan.noise) == 0
    mixture, left = mixed(scan, data)
    np.testing.assert_allclose(left / scan.noise.max() ** 2, np.eye(COILS), atol=0.1)
    # the scan's sigma: what the true covariance makes of it, and the factor that keeps k-space's energy
    picture = encoding.narrow(data, scan.grid.shape[0])
    white = np.einsum("dc,scrp->sdrp", np.linalg.inv(np.linalg.cholesky(COVARIANCE)), picture)
    assert float(scan.noise.max()) == pytest.approx(np.linalg.norm(picture) / np.linalg.norm(white), rel=0.1)
    assert np.linalg.norm(scan.y) == pytest.approx(np.linalg.norm(picture), rel=1e-4)
    residual = scan.y - np.einsum("dc,scrp->sdrp", mixture, encoding.narrow(CLEAN, scan.grid.shape[0]) * scan.acquisition.mask)
    assert residual[..., scan.acquisition.mask].real.std() == pytest.approx(float(scan.noise.max()), rel=0.1)


def test_both_doors_and_a_noise_scan_whiten_alike(tmp_path: Path) -> None:
    """The same acquisition as fastMRI (with and without its reconstruction) and as MRD (with and without a noise scan)."""
    rss = np.ones((2, HEIGHT // 2, WIDTH - 4), np.float32)
    sources = [door("fastmri", tmp_path, NOISY), door("fastmri", tmp_path, NOISY, reconstruction_rss=rss), door("mrd", tmp_path, NOISY)]
    scans = [source.scan for source in sources]
    assert all(scan is not None and scan.noise is not None for scan in scans)
    for scan in scans[1:]:
        np.testing.assert_allclose(scan.y, scans[0].y, atol=1e-4)
        np.testing.assert_allclose(scan.noise.max(), scans[0].noise.max(), rtol=1e-5)
    (tmp_path / "file.mrd").unlink()
    readouts = [(block, {"flags": [19]}) for block in coloured((60, COILS, HEIGHT, 1), seed=1)[..., 0]]
    source = read(mrd(tmp_path, readouts + mrd_readouts(NOISY), mr_header(HEIGHT, WIDTH)))
    assert source.scan is not None and source.scan.noise is not None and source.notes[-1] == "whitened by the noise readouts"
    np.testing.assert_allclose(source.scan.noise, scans[0].noise.max(), rtol=0.03)
    shown = [np.sqrt((np.abs(ifft2c(scan.y)) ** 2).sum(1)) for scan in (source.scan, scans[0])]
    assert np.linalg.norm(shown[0] - shown[1]) < 0.03 * np.linalg.norm(shown[1])


def test_averages_are_whitened_by_their_edges(tmp_path: Path) -> None:
    """Columns 40 to 55 are measured twice: the noise beside the object tells one readout's, and theirs is less by the root of two."""
    pytest.importorskip("ismrmrd")
    again = mrd_readouts(CLEAN + coloured(CLEAN.shape, seed=1), range(40, 56), idx_average=1)
    scan = read(mrd(tmp_path, mrd_readouts(NOISY) + again, mr_header(HEIGHT, WIDTH))).scan
    assert scan is not None and scan.noise is not None and scan.noise.shape == (2, 1, 1, WIDTH)
    once = door("mrd", tmp_path, NOISY).scan
    assert once is not None and once.noise is not None
    np.testing.assert_allclose(scan.noise[..., :40], once.noise.max(), rtol=0.03)
    np.testing.assert_allclose(scan.noise[..., 40:56], once.noise.max() / 2**0.5, rtol=0.03)


@pytest.mark.parametrize("name", ["fastmri", "mrd"])
def test_edges_that_hold_signal_are_not_taken_for_noise(name: str, tmp_path: Path) -> None:
    wide = fft2c(np.roll(coil_images(2, COILS, HEIGHT, WIDTH), HEIGHT // 3, 2))  # one end lies in the object
    source = door(name, tmp_path, wide + coloured(wide.shape))
    assert source.scan is not None and source.scan.noise is None and "signal reaches into the edges" in source.describe()
    np.testing.assert_allclose(source.scan.y, encoding.narrow(wide + coloured(wide.shape), HEIGHT // 2), atol=1e-4)
    # a slice whose edges are clean speaks for all
    wide[1] = CLEAN[1]
    source = door(name, tmp_path, wide + coloured(wide.shape))
    assert source.scan is not None and source.scan.noise is not None and "whitened" in source.describe()
    np.testing.assert_allclose(mixed(source.scan, wide + coloured(wide.shape))[1] / source.scan.noise.max() ** 2, np.eye(COILS), atol=0.15)


@pytest.mark.parametrize("name", ["fastmri", "mrd"])
def test_what_cannot_be_whitened_has_a_level_or_nothing(name: str, tmp_path: Path) -> None:
    few = fft2c(coil_images(1, COILS, 48, 20))
    source = door(name, tmp_path, few + coloured(few.shape), mr_header(48, 20))
    assert source.scan is not None and source.scan.noise is not None and "too few samples, or a dead coil" in source.describe()
    assert float(source.scan.noise.max()) == pytest.approx(np.sqrt(np.mean(DEVIATION**2)), rel=0.1)
    np.testing.assert_allclose(source.scan.y, encoding.narrow(few + coloured(few.shape), 24), atol=1e-4)
    dead = NOISY.copy()
    dead[:, 2] = 0
    source = door(name, tmp_path, dead)
    assert source.scan is not None and source.scan.noise is not None and "dead coil" in source.describe()
    plain = mr_header(HEIGHT, WIDTH).replace(f"<x>{HEIGHT // 2}</x>", f"<x>{HEIGHT}</x>").replace(f"<x>{HEIGHT * 0.75}</x>", "<x>192.0</x>")
    source = door(name, tmp_path, NOISY, plain)  # no oversampling
    assert source.scan is not None and source.scan.noise is None and source.scan.y.shape[2] == HEIGHT


def test_a_reference_follows_the_whitened_coils(tmp_path: Path) -> None:
    """A perfect reconstruction of the whitened scan is the reference, in the file's unit; of the one as stored it is not."""
    images = coil_images(2, COILS, HEIGHT, WIDTH)[:, :, HEIGHT // 4 : 3 * HEIGHT // 4]
    rss = np.sqrt((np.abs(images) ** 2).sum(1)).astype(np.float32)
    loud = CLEAN + 0.05 * coloured(CLEAN.shape)
    source = door("fastmri", tmp_path, loud, reconstruction_rss=rss[:, :, 2:-2])
    scan = source.scan
    assert scan is not None and scan.reference is not None and "reference shaded as the whitened coils see it" in source.describe()
    mixture, _ = mixed(scan, loud)
    seen = np.sqrt((np.abs(np.einsum("dc,scrp->sdrp", mixture, images)) ** 2).sum(1))[:, :, 2:-2]
    off = lambda image: np.linalg.norm(image - seen) / np.linalg.norm(seen)  # noqa: E731
    assert off(scan.reference.data) < 0.01 < 0.03 < off(rss[:, :, 2:-2])
    assert np.linalg.norm(scan.reference.data) == pytest.approx(np.linalg.norm(rss), rel=0.02)
    alone = door("fastmri", tmp_path, loud[:, 0], reconstruction_rss=rss).scan
    assert alone is not None and alone.reference is not None
    np.testing.assert_array_equal(alone.reference.data, rss[:, :, 2:-2])
