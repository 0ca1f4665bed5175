"""Octaves of images, and the preconditioning that is built on them."""

import pytest
import torch
from torch import Tensor

from deft_med.amortised import Supervised
from deft_med.htransform import Deft, HTransform
from deft_med.network import UNet
from deft_med.octaves import deviations, scale_octaves
from deft_med.prior import Prior, scalings

SDS = ((0.1, 0.02), (0.3, 0.05), (2.0, 0.2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 16), (15, 18), (7, 5)])
def test_gains_of_one_change_nothing_and_one_gain_is_a_factor(shape: tuple[int, int]) -> None:
    x = noise(2, 3, *shape)
    torch.testing.assert_close(scale_octaves(x, torch.ones(4, 1, 1)), x)
    torch.testing.assert_close(scale_octaves(x, torch.full((1, 1, 1), 3.0)), 3 * x)


def test_octaves_are_orthogonal_projections_with_a_gain_for_each_item_and_channel() -> None:
    x = noise(2, 3, 16, 24)
    parts = [scale_octaves(x, torch.eye(4)[k][:, None, None]) for k in range(4)]
    torch.testing.assert_close(sum(parts), x)
    for k, part in enumerate(parts):
        for other in parts[:k]:
            assert abs(float((part * other).sum())) < 1e-3
        torch.testing.assert_close(scale_octaves(part, torch.eye(4)[k][:, None, None]), part)
    gains = noise(4, 2, 3, seed=1)
    wanted = sum(gains[k][..., None, None] * part for k, part in enumerate(parts))
    torch.testing.assert_close(scale_octaves(x, gains), wanted)
    assert (x - parts[-1])[0, 0, :8, :8].sum().abs() < 1e-4  # the last one is the mean of 8 x 8 pixels


def test_white_noise_has_the_same_deviation_in_every_octave() -> None:
    found = deviations(0.5 * noise(4, 2, 128, 128), 4)
    assert found.shape == (5, 2) and float((found / 0.5 - 1).abs().max()) < 0.1


def test_deviations_are_those_of_the_parts() -> None:
    x = noise(3, 1, 32, 32).cumsum(-1).cumsum(-2)
    for k, found in enumerate(deviations(x, 3)):
        part = scale_octaves(x, torch.eye(4)[k][:, None, None])
        share = 3 / 4 ** (k + 1) if k < 3 else 1 / 4**3  # of all coefficients
        assert float(found) == pytest.approx(float((part.square().mean() / share).sqrt()), rel=1e-4)


def test_a_fresh_prior_is_the_wiener_filter_of_its_octaves() -> None:
    prior, x, sigma = Prior(UNet(2, 2, (8, 8), dim=16), octaves=SDS), noise(2, 2, 16, 16), torch.tensor([0.05, 3.0])
    sds = torch.tensor(SDS)[:, None]
    torch.testing.assert_close(prior(x, sigma), scale_octaves(x, sds**2 / (sds**2 + sigma[None, :, None] ** 2)))


def test_one_octave_for_all_is_the_usual_preconditioning() -> None:
    torch.manual_seed(0)
    network = UNet(1, 1, (8, 8), dim=16)
    torch.nn.init.normal_(network.outlet.weight, std=0.1)
    x, sigma = noise(2, 1, 16, 16), torch.tensor([0.05, 3.0])
    skip, out, inp = scalings(sigma[:, None, None, None], 0.5)
    wanted = skip * x + out * network(inp * x, sigma.log()[:, None])
    torch.testing.assert_close(Prior(network, sd=0.5)(x, sigma), wanted)
    torch.testing.assert_close(Prior(network, sd=0.5, octaves=[[0.5]] * 3)(x, sigma), wanted)


def test_a_fresh_supervised_network_is_the_backprojection_or_its_wiener_filter() -> None:
    class Likelihood:
        s_img, log_ratio = torch.tensor([0.1, 0.02]), -1.0

        def direct(self) -> Tensor:
            return noise(2, 2, 16, 16, seed=5)

        def within(self, u: Tensor) -> Tensor:
            return u

    answers = {form: Supervised(UNet(2, 2, (8, 8), scalars=2, dim=16), sd=0.5, octaves=SDS, form=form)(Likelihood())  # type: ignore[arg-type]
               for form in ("edm", "wiener")}
    torch.testing.assert_close(answers["edm"], noise(2, 2, 16, 16, seed=5))
    signal, error = torch.tensor(SDS)[:, None] ** 2, (2 * Likelihood.s_img[:, None]) ** 2
    torch.testing.assert_close(answers["wiener"], scale_octaves(noise(2, 2, 16, 16, seed=5), signal / (signal + error)))


def test_a_fresh_h_adds_the_residual_in_proportion_to_what_the_prior_may_miss() -> None:
    class Likelihood:
        s_img, log_ratio = torch.tensor([0.1, 0.1]), -1.0

        def residual(self, d: Tensor) -> Tensor:
            return noise(2, 2, 16, 16, seed=5)

        def within(self, u: Tensor) -> Tensor:
            return u

    prior = Prior(UNet(2, 2, (8, 8), dim=16), octaves=SDS)
    deft = Deft(prior, HTransform(UNet(6, 2, (8, 8), scalars=3, dim=16), octaves=SDS))
    x, sigma = noise(2, 2, 16, 16), torch.tensor([0.05, 3.0])
    sds, level = torch.tensor(SDS)[:, None], sigma[None, :, None]
    out = level * sds / (level**2 + sds**2).sqrt()
    wanted = prior(x, sigma) + scale_octaves(Likelihood().residual(x), 0.1 * out)
    torch.testing.assert_close(deft(x, sigma, Likelihood()), wanted)  # type: ignore[arg-type]
