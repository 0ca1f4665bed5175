"""Noise: what is put in is read back, per real component, from a noise scan, from a readout's edges, and from the data alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mri_phantom import equispaced, fourier, head, ring, scan, scattered

from operators.noise import gaussian
from operators.whiten import (
    NoiseLevel,
    covariance,
    edges,
    level,
    level_from_noise,
    level_from_periphery,
    whiten,
    whitener,
)

SHAPE = (115, 90)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return gaussian(torch.zeros(shape, dtype=torch.complex64), 1.0, generator=generator(seed))


MIX = unit(5, 5, seed=7) / 2 + torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0]))  # of five coils


def test_the_covariance_counts_one_real_component():
    noise = 0.3 * unit(4, 200_000)
    torch.testing.assert_close(covariance(noise), 0.09 * torch.eye(4, dtype=torch.complex64), rtol=0, atol=1e-3)
    assert covariance(MIX @ unit(5, 50_000)).dtype == torch.complex64
    torch.testing.assert_close(covariance(MIX @ unit(5, 200_000)), MIX @ MIX.conj().T, rtol=0, atol=0.2)


def test_whitened_noise_is_white_with_unit_sigma():
    cov = covariance(MIX @ unit(5, 100_000))
    mask = scattered((64, 64), 16)
    k = (MIX @ unit(5, 64 * 64, seed=1)).reshape(5, 64, 64) * mask
    white = whiten(k, cov)
    torch.testing.assert_close(covariance(white[:, mask]), torch.eye(5, dtype=torch.complex64), rtol=0, atol=0.15)
    parts = torch.view_as_real(white[:, mask])
    assert float(parts.std()) == pytest.approx(1.0, rel=0.03)
    assert torch.equal((white != 0).any(0), mask)
    torch.testing.assert_close(whiten(k, 4 * torch.eye(5)), k / 2)
    torch.testing.assert_close(whiten(k.flatten(1), cov), white.flatten(1))


def test_a_noise_scan():
    found = level_from_noise(0.02 * unit(8, 20_000))
    assert found == NoiseLevel(found.sigma, "noise scan", False, found.cross_check)
    assert found.sigma == pytest.approx(0.02, rel=0.01) and math.isnan(found.cross_check)


def beside(axis, image=(96, 90), wide=2.0, shift=0, coils=8):
    """Noiseless k-space (coils, ky, kx), undersampled, of a head in a field of view that is ``wide`` times as long along the readout."""
    shape, image = list(image), list(image)
    shape[axis] = round(wide * image[axis])
    whole = torch.zeros(coils, *shape, dtype=torch.complex64)
    middle = [slice(w // 2 - n // 2, w // 2 - n // 2 + n) for w, n in zip(shape, image)]
    whole[:, middle[0], middle[1]] = (head(image) * ring(coils, image)).to(torch.complex64)
    mask = equispaced(shape) if axis == 0 else equispaced(shape[::-1]).T
    return fourier(whole.roll(shift, axis + 1)) * mask, mask


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sigma", [0.005, 0.05])
@pytest.mark.parametrize("wide", [1.4, 2.0, 3.0])
def test_the_ends_of_an_oversampled_readout(axis, sigma, wide):
    k, mask = beside(axis, wide=wide)
    found = edges(gaussian(k, sigma, generator=generator()) * mask, mask, axis, inside=(96, 90)[axis])
    assert not found.signal and found.samples > 500
    assert float(found.covariance.diagonal().real.mean()) ** 0.5 == pytest.approx(sigma, rel=0.02)
    torch.testing.assert_close(found.covariance, sigma**2 * torch.eye(8, dtype=torch.complex128), rtol=0, atol=0.15 * sigma**2)
    for unit_of_k in (1e-25, 1e25):  # squares that float32 does not hold
        again = edges(gaussian(k, sigma, generator=generator()) * mask * unit_of_k, mask, axis, inside=(96, 90)[axis])
        assert not again.signal
        torch.testing.assert_close(again.covariance / unit_of_k**2, found.covariance, rtol=1e-4, atol=1e-4 * sigma**2)


@pytest.mark.parametrize("seed", range(8))
def test_noise_of_unlike_coils_is_not_taken_for_signal(seed):
    k, mask = beside(0, coils=5)
    mixed = torch.einsum("dc,cyx->dyx", MIX, unit(*k.shape, seed=seed)) * 0.01
    found = edges(k + mixed * mask, mask, 0)
    assert not found.signal
    white = covariance(whiten(mixed[:, mask], found.covariance))
    torch.testing.assert_close(white, torch.eye(5, dtype=torch.complex64), rtol=0, atol=0.1)


@pytest.mark.parametrize("shift", [30, 48, 96])  # partly in one end, folded over into both, and all of it in the ends
def test_an_object_in_the_ends_is_seen(shift):
    k, mask = beside(0, shift=shift)
    assert edges(gaussian(k, 0.005, generator=generator()) * mask, mask, 0).signal
    assert edges(scan(SHAPE, equispaced(SHAPE), 8, 0.005), equispaced(SHAPE), 0).signal  # no oversampling at all
    assert edges(gaussian(k, 0.3, generator=generator()) * mask, mask, 0).signal == (shift > 30)  # faint: by the lines about k = 0


def test_signal_in_one_quiet_coil_is_seen_and_a_dead_coil_is_none():
    k, mask = beside(0)
    k = gaussian(k, 1.0, generator=generator()) * mask * torch.tensor([1.0] * 7 + [0.01])[:, None, None]
    assert not edges(k, mask, 0).signal
    k[7] += 0.5 * beside(0, shift=48)[0][7]
    assert edges(k, mask, 0).signal
    k[7] = 0
    assert not edges(k, mask, 0).signal
    with pytest.raises(ValueError, match="a dead or doubled coil"):
        whitener(edges(k, mask, 0).covariance)
    k[7] = k[0] + k[1]
    with pytest.raises(ValueError, match="a dead or doubled coil"):
        whitener(edges(k, mask, 0).covariance)


@pytest.mark.parametrize("sigma", [0.001, 0.005, 0.02, 0.08])
@pytest.mark.parametrize("pattern", ["scattered", "lines"])
@pytest.mark.parametrize("coils", [4, 8])
def test_the_level_is_found_in_the_data(sigma, pattern, coils):
    mask = scattered(SHAPE) if pattern == "scattered" else equispaced(SHAPE)
    found = level(scan(SHAPE, mask, coils, sigma), mask)
    assert found.how == "calibration" and not found.upper_bound
    assert found.sigma == pytest.approx(sigma, rel=0.15)
    assert found.cross_check > 0.93


def test_the_level_follows_the_unit_and_the_centre_may_be_small():
    mask = scattered(SHAPE, centre=12)
    k = scan(SHAPE, mask, 8, 0.02)
    assert level(k, mask).sigma == pytest.approx(0.02, rel=0.15)
    assert level(1e4 * k, mask).sigma == pytest.approx(1e4 * level(k, mask).sigma, rel=1e-4)
    assert level(scan(SHAPE, scattered(SHAPE), 16, 0.01), scattered(SHAPE)).sigma == pytest.approx(0.01, rel=0.1)


def test_the_periphery_is_an_upper_bound():
    mask = scattered(SHAPE)
    for sigma in (0.005, 0.02, 0.2):
        found = level_from_periphery(scan(SHAPE, mask, 8, sigma), mask)
        assert found.upper_bound and found.how == "periphery" and found.sigma > 0.99 * sigma
    assert found.sigma == pytest.approx(0.2, rel=0.03)  # noise alone


def test_one_coil_falls_back_to_the_periphery():
    mask = scattered(SHAPE)
    k = scan(SHAPE, mask, 1, 0.05)
    assert level(k, mask) == level_from_periphery(k, mask) or level(k, mask).sigma == pytest.approx(0.05, rel=0.15)
    tiny = scattered(SHAPE, centre=4)
    data = scan(SHAPE, tiny, 8, 0.05)
    assert level(data, tiny, 1).how == "periphery" and level(data, tiny, 1).upper_bound


def test_noise_is_checked():
    k, mask = unit(4, 16, 16), torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"noise readouts are complex \(coil, sample\)"):
        covariance(torch.zeros(4, 9))
    with pytest.raises(ValueError, match="4 coils wants as many samples or more, got 3"):
        covariance(unit(4, 3))
    with pytest.raises(ValueError, match="not finite"):
        covariance(unit(4, 9) * math.nan)
    with pytest.raises(ValueError, match=r"4 coils have a covariance \(4, 4\), got \(3, 3\)"):
        whiten(k, torch.eye(3))
    with pytest.raises(ValueError, match="not Hermitian and positive definite"):
        whiten(k, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="not Hermitian and positive definite"):
        whiten(k, torch.eye(4) + torch.triu(torch.ones(4, 4), 1) / 9)
    with pytest.raises(ValueError, match=r"the readout axis is 0 \(ky\) or 1 \(kx\)"):
        edges(k, mask, 2)
    with pytest.raises(ValueError, match="no readout was sampled from end to end"):
        edges(k, scattered((16, 16), 4), 0)
    with pytest.raises(ValueError, match="all but 2 of 16 samples"):
        edges(k, mask, 0, 14)
    with pytest.raises(ValueError, match=r"is \(coil, coil\), got \(4,\)"):
        whitener(torch.ones(4))
    with pytest.raises(ValueError, match=r"k-space is complex \(coil, ky, kx\)"):
        level(k.real, mask)
    with pytest.raises(ValueError, match=r"boolean \(16, 16\), got torch.int64"):
        level(k, mask.long())
    with pytest.raises(ValueError, match="the mask is empty"):
        level(k, mask & False)


@pytest.mark.data
@pytest.mark.parametrize("sigma", [0.001, 0.004, 0.015, 0.06])
def test_the_level_with_the_real_mask(data_dir, sigma):
    mask = torch.from_numpy((np.load(data_dir / "kspace" / "brain_8ch_undersampled.npy") != 0).any(0))
    assert level(scan((230, 180), mask, 8, sigma), mask).sigma == pytest.approx(sigma, rel=0.05)


@pytest.mark.data
def test_the_level_of_a_real_head(data_dir):
    k = torch.from_numpy(np.load(data_dir / "kspace" / "brain_8ch_undersampled.npy"))
    found = level(k, (k != 0).any(0))
    assert found.how == "calibration" and 0.008 < found.sigma < 0.014 and 1 < found.cross_check < 1.3
