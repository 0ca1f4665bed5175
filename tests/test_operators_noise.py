"""Noise draws: their moments, their repeatability, their limits."""

from __future__ import annotations

import math

import pytest
import torch

from operators.noise import gaussian, transmission


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gaussian_has_the_declared_deviation():
    y = torch.full((3, 20_000), 5.0)
    z = gaussian(y, torch.tensor([[1.0], [2.0], [0.0]]), generator=seeded())
    assert (z - y).std(1).tolist() == pytest.approx([1, 2, 0], rel=0.02)
    assert torch.equal(z, gaussian(y, torch.tensor([[1.0], [2.0], [0.0]]), generator=seeded()))


def test_gaussian_is_per_real_component():
    z = gaussian(torch.zeros(40_000, dtype=torch.complex64), 2.0, generator=seeded())
    assert float(z.real.std()) == pytest.approx(2, rel=0.02)
    assert float(z.imag.std()) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(("p", "electronic"), [(0.5, 0.0), (3.0, 0.0), (3.0, 10.0)])
def test_transmission_is_unbiased_and_knows_its_deviation(p, electronic):
    y, sigma = transmission(torch.full((100, 500), p), 1e4, electronic, generator=seeded())
    expected = math.sqrt(1e4 * math.exp(-p) + electronic**2) / (1e4 * math.exp(-p))
    assert float(y.mean()) == pytest.approx(p, abs=5e-3)
    assert float(y.std()) == pytest.approx(expected, rel=0.03)
    assert float(sigma.mean()) == pytest.approx(expected, rel=0.03)


def test_starved_rays_stay_finite():
    y, sigma = transmission(torch.full((10, 10), 50.0), 1e3, 5.0, generator=seeded())
    assert torch.isfinite(y).all()
    assert float(y.max()) == pytest.approx(math.log(1e3))
    assert float(sigma.max()) == pytest.approx(math.sqrt(26))


def test_a_starved_ray_takes_its_deviation_from_its_neighbours():
    p = torch.full((64, 200), 7.0)  # 18 counts on average, electronic noise of 10
    y, sigma = transmission(p, 2e4, 10.0, generator=seeded())
    expected = math.sqrt(2e4 * math.exp(-7) + 100) / (2e4 * math.exp(-7))
    assert float(sigma.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


def test_transmission_wants_a_sinogram():
    with pytest.raises(ValueError, match=r"axes \(views, detectors\), got shape \(3,\)"):
        transmission(torch.ones(3), 1e4, generator=seeded())


def test_noise_is_checked():
    y = torch.ones(3, 4)
    with pytest.raises(ValueError, match="sigma must not be negative, got -1"):
        gaussian(y, -1, generator=seeded())
    with pytest.raises(ValueError, match="photons must be positive"):
        transmission(y, 0, generator=seeded())
    with pytest.raises(ValueError, match="electronic noise must not be negative"):
        transmission(y, 10, -1, generator=seeded())
