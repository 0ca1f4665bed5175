"""Coil maps against the maps that made the data, against sigpy, and on a real head."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import torch
from mri_phantom import equispaced, head, inverse, ring, scan, scattered

from operators.coils import calibrate, calibration_region, compress, eigenmaps, espirit, hankel, low_resolution

SHAPE = (95, 84)  # one odd, one even
MASK = scattered(SHAPE, centre=20)
INSIDE = head(SHAPE).abs() > 0.05


def kspace(sigma=0.002, coils=6, mask=MASK):
    return scan(SHAPE, mask, coils, sigma)


def away(a, b, where):
    """1 - |<a, b>|, the largest where asked."""
    return float((1 - (a.conj() * b).sum(0).abs())[where].max())


@pytest.mark.parametrize("shape", [(95, 84), (84, 95), (7, 8)])
@pytest.mark.parametrize("size", [(5, 4), (6, 7), (3, 3)])
def test_the_calibration_region_is_found(shape, size):
    mask = torch.zeros(shape, dtype=torch.bool)
    rows, columns = (slice(n // 2 - s // 2, n // 2 - s // 2 + s) for n, s in zip(shape, size))
    mask[rows, columns] = True
    mask[0, 0] = True  # samples elsewhere do not matter
    assert calibration_region(mask) == (rows, columns)


def test_the_calibration_region_of_lines_and_of_everything():
    assert calibration_region(equispaced(SHAPE, 4, 20)) == (slice(0, 95), slice(32, 52))
    assert calibration_region(torch.ones(5, 6, dtype=torch.bool)) == (slice(0, 5), slice(0, 6))
    assert calibrate(kspace()).shape == (6, 20, 20)
    assert calibrate(kspace(mask=torch.ones(SHAPE))).shape == (6, 32, 32)
    assert torch.equal(calibrate(kspace(), (8, 9)), kspace()[:, 47 - 4 : 47 + 4, 42 - 4 : 42 + 5])
    assert torch.equal(calibrate(kspace(), (slice(40, 50), slice(40, 44))), kspace()[:, 40:50, 40:44])


def test_windows_are_rows():
    data = torch.arange(2 * 4 * 5).reshape(2, 4, 5)
    rows = hankel(data, 3)
    assert rows.shape == (2 * 3, 2 * 9)
    assert torch.equal(rows[4].reshape(2, 3, 3), data[:, 1:4, 1:4])


@pytest.mark.parametrize("mask", [MASK, equispaced(SHAPE, 4, 20)], ids=["scattered", "lines"])
def test_espirit_finds_the_maps(mask):
    maps = espirit(kspace(mask=mask), kernel=5)
    support = maps.abs().sum(0) > 0
    assert away(maps, ring(6, SHAPE), INSIDE & support) < 1e-3
    assert float((INSIDE & ~support).sum() / INSIDE.sum()) < 0.005
    assert float(support.float().mean()) < 0.8  # the air beside the head is left out
    power = maps.abs().pow(2).sum(0)
    torch.testing.assert_close(power[support], torch.ones_like(power[support]))
    assert maps.dtype == torch.complex64


def test_low_resolution_maps_are_nearly_as_good():
    maps = low_resolution(kspace())
    support = maps.abs().sum(0) > 0
    assert float((1 - (maps.conj() * ring(6, SHAPE)).sum(0).abs())[INSIDE & support].mean()) < 5e-3
    assert float((INSIDE & ~support).sum() / INSIDE.sum()) < 0.02
    assert float(support.float().mean()) < 0.9
    power = maps.abs().pow(2).sum(0)
    torch.testing.assert_close(power[support], torch.ones_like(power[support]))


@pytest.mark.parametrize("method", [espirit, low_resolution])
def test_the_first_virtual_coil_is_real_and_the_maps_are_smooth(method):
    k = kspace()
    maps = method(k)
    _, matrix = compress(k, 1)
    virtual = torch.einsum("vc,cyx->vyx", matrix, maps)[0]
    assert float(virtual.imag.abs().max()) < 1e-5 and float(virtual.real.min()) > -1e-5
    support = maps.abs().sum(0) > 0
    step = (maps[:, 1:] - maps[:, :-1]).abs().pow(2).sum(0).sqrt()[(support & INSIDE)[1:] & (support & INSIDE)[:-1]]
    assert float(step.max()) < 0.2


def test_noise_that_is_known_is_not_taken_for_coils():
    k = kspace(0.1)
    blind, informed = (eigenmaps(k, kernel=5, sigma=sigma) for sigma in (0.0, 0.1))
    truth = ring(6, SHAPE)
    assert float(informed[1][~INSIDE].mean()) < float(blind[1][~INSIDE].mean())
    assert away(informed[0], truth, INSIDE) <= away(blind[0], truth, INSIDE)
    with pytest.raises(ValueError, match="not above the noise of 1e"):
        eigenmaps(k, sigma=1e9)


def test_espirit_agrees_with_sigpy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = pytest.importorskip("sigpy.mri.app")
        k = kspace()
        theirs = torch.from_numpy(app.EspiritCalib(k.numpy(), calib_width=20, thresh=0.02, kernel_width=6, crop=0, show_pbar=False).run())
    ours, value = eigenmaps(k, 20)
    inside = INSIDE & (value > 0.95)
    assert away(ours, theirs, inside) <= 1e-3


def test_compression_keeps_the_noise_white_and_the_energy():
    k = kspace(coils=8)
    small, matrix = compress(k, 5)
    assert small.shape == (5, *SHAPE) and matrix.shape == (5, 8)
    torch.testing.assert_close(matrix @ matrix.conj().T, torch.eye(5, dtype=torch.complex64), rtol=0, atol=1e-5)
    energy = small.abs().pow(2).sum((1, 2))
    assert float(energy.sum() / k.abs().pow(2).sum()) > 0.99
    assert (energy.diff() < 0).all()
    assert torch.equal((small != 0).any(0), MASK)
    back = torch.einsum("vc,vyx->cyx", compress(k, 8)[1].conj(), compress(k, 8)[0])
    torch.testing.assert_close(back, k, rtol=0, atol=1e-5)


def test_coils_are_checked():
    k = kspace()
    with pytest.raises(ValueError, match=r"k-space is complex \(coil, ky, kx\), got torch.float32"):
        espirit(k.real)
    with pytest.raises(ValueError, match=r"k-space is complex \(coil, ky, kx\)"):
        low_resolution(k[0])
    with pytest.raises(ValueError, match="has 1 samples that were not measured"):
        holed = k.clone()
        holed[:, SHAPE[0] // 2 + 1, SHAPE[1] // 2] = 0
        espirit(holed, 20)
    with pytest.raises(ValueError, match="does not lie in k-space of"):
        espirit(k, (96, 10))
    with pytest.raises(ValueError, match="does not lie in k-space of"):
        espirit(k, (slice(5, 5), slice(0, 3)))
    with pytest.raises(ValueError, match="a kernel of 6 wants 7 calibration samples per axis"):
        espirit(k, 6)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        espirit(k, threshold=1.0)
    with pytest.raises(ValueError, match=r"crop must lie in \[0, 1\)"):
        espirit(k, crop=1.0)
    with pytest.raises(ValueError, match="6 coils can be compressed to 1 to 6, not to 7"):
        compress(k, 7)
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        espirit(torch.zeros_like(k))
    with pytest.raises(ValueError, match=r"a sampling mask is \(ky, kx\)"):
        calibration_region(torch.ones(3, dtype=torch.bool))


@pytest.mark.data
def test_a_real_head(data_dir):
    k = torch.from_numpy(np.load(data_dir / "kspace" / "brain_8ch_undersampled.npy"))
    assert calibration_region((k != 0).any(0)) == (slice(103, 127), slice(78, 102))
    began = time.perf_counter()
    maps = espirit(k)
    assert time.perf_counter() - began < 15
    support = maps.abs().sum(0) > 0
    assert 0.6 < float(support.float().mean()) < 0.8
    assert 0.6 < float((low_resolution(k).abs().sum(0) > 0).float().mean()) < 0.85
    image = (maps.conj() * inverse(k)).sum(0).abs()
    rss = inverse(k).abs().pow(2).sum(0).sqrt()
    assert float((image.pow(2).sum() / rss.pow(2).sum()).sqrt()) > 0.98  # the object is inside
    step = (maps[:, 1:] - maps[:, :-1]).abs().pow(2).sum(0).sqrt()[support[1:] & support[:-1]]
    assert float(step.max()) < 0.1
    assert math.isfinite(float(maps.abs().sum()))
