"""The noise level from the data alone."""

import pytest
import torch

from operators.ct import RayTransform
from operators.geometry import Grid, ParallelBeam, uniform_angles
from operators.noise import estimate


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
    assert found[0, 0, 0] == pytest.approx(sigma, rel=accuracy)


def test_too_few_detectors() -> None:
    with pytest.raises(ValueError, match="five detectors"):
        estimate(torch.zeros(3, 4))
