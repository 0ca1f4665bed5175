"""The noise level from the data alone."""

import pytest
import torch

from operators.ct import RayTransform
from operators.geometry import Grid, ParallelBeam, uniform_angles
from operators.noise import estimate, transmission


@pytest.mark.parametrize(("sigma", "accuracy"), [(0.02, 0.8), (0.1, 0.15), (0.5, 0.05)])
def test_the_noise_level_is_found_in_a_sinogram(sigma: float, accuracy: float) -> None:
    n = 96
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    body = 0.02 * ((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1) + 0.02 * (((x - 0.3) / 0.1) ** 2 + (y / 0.2) ** 2 < 1)
    beam = ParallelBeam(angles=uniform_angles(40), detectors=139, pitch=2.0)
    lines = RayTransform(Grid(shape=(n, n), spacing=(2.0, 2.0)), beam)(body.float())
    noisy = lines + sigma * torch.randn(2, *lines.shape, generator=torch.Generator().manual_seed(0))
    found = estimate(noisy)
    assert found.shape == noisy.shape
    assert float(found[0].square().mean().sqrt()) == pytest.approx(sigma, rel=accuracy)


@pytest.mark.parametrize("photons", [5e3, 2e4, 1e5])
def test_the_dose_is_found_in_a_transmission_sinogram(photons: float) -> None:
    n = 128
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    body = 0.02 * ((x / 0.9) ** 2 + (y / 0.6) ** 2 < 1) + 0.01 * (((x - 0.3) / 0.1) ** 2 + (y / 0.2) ** 2 < 1)
    beam = ParallelBeam(angles=uniform_angles(60), detectors=182, pitch=2.0)
    lines = RayTransform(Grid(shape=(n, n), spacing=(2.0, 2.0)), beam)(body.float())
    noisy, _ = transmission(lines, photons, 10.0, generator=torch.Generator().manual_seed(0))
    found = estimate(noisy)
    counts = photons * torch.exp(-lines)
    true = torch.sqrt(counts + 100) / counts
    for low, high in ((-1, 0.1), (0.1, 2), (2, 4)):
        rays = (lines > low) & (lines <= high)
        assert float((found[rays] / true[rays]).median()) == pytest.approx(1, abs=0.25)


def test_too_few_detectors() -> None:
    with pytest.raises(ValueError, match="five detectors"):
        estimate(torch.zeros(3, 4))
