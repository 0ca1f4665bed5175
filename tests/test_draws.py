"""Measurements as training draws them: what the likelihood says about the image that they were made of."""

import pytest
import torch

from deft_med.draws import KSpace, KSpaceRanges, complex_images, tissue_phase
from deft_med.intensity import scale_of
from deft_med.simulate import coil_maps
from operators.mri import Fourier

FEW = KSpaceRanges(patterns=6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disks(count: int = 2, n: int = 64) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    image = ((x / 0.7) ** 2 + (y / 0.8) ** 2 < 1) * 0.8 + ((x - 0.2) ** 2 + y**2 < 0.05) * 0.4
    return image.float().expand(count, 1, n, n).clone()


def test_an_image_comes_at_the_scale_that_its_k_space_tells() -> None:
    u = complex_images(disks(), seeded())
    assert u.shape == (2, 2, 64, 64)
    magnitude = torch.linalg.vector_norm(u, dim=1)
    assert 0.5 < float(magnitude.amax()) < 2
    again = complex_images(1000 * disks(), seeded())  # the unit of the source does not matter, but for the bent contrast
    assert float(torch.linalg.vector_norm(again, dim=1).amax()) == pytest.approx(float(magnitude.amax()), rel=0.05)


def test_the_scale_does_not_depend_on_coils_or_on_what_is_left_out() -> None:
    n = 64
    image = torch.complex(disks(1, n)[:, 0], torch.zeros(1, n, n))
    full = Fourier((n, n))(image)[:, None]
    maps = coil_maps(1, 6, (n, n), seeded())
    coils = Fourier((6, n, n))(maps * image[:, None])
    mask = torch.zeros(n, dtype=torch.bool)
    mask[::4] = True
    mask[n // 2 - 12:n // 2 + 12] = True
    assert float(scale_of(coils)) == pytest.approx(float(scale_of(full)), rel=0.05)
    assert torch.equal(scale_of(coils * mask[:, None]), scale_of(coils))


@pytest.mark.parametrize(("coils", "radial"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_the_truth_fits_its_k_space(coils: int, radial: float) -> None:
    if radial:
        pytest.importorskip("finufft")
    physics = KSpace(64, KSpaceRanges(patterns=6, coils=(coils,), map_error=(1e-6, 1e-5), focus=0.0, radial=radial))
    u = complex_images(disks(), seeded())
    likelihood = physics.draw(u, torch.ones(2), seeded(1))
    assert likelihood.y.shape[:2] == (2, coils)
    assert likelihood.chi2(u).tolist() == pytest.approx([1, 1], abs=4 * (2 / likelihood.count) ** 0.5)
    assert likelihood.residual(u).shape == u.shape
    assert (likelihood.s_img > 0).all()
    seen = torch.ones(()) if likelihood.seen is None else likelihood.seen.float().flatten(1).mean(1)
    noise = (likelihood.residual(u).square().flatten(1).mean(1) / seen).sqrt()
    assert noise.tolist() == pytest.approx(likelihood.s_img.tolist(), rel=0.25)


@pytest.mark.parametrize("cropped", [0.0, 1.0])
def test_calibrated_maps_end_with_the_object(cropped: float) -> None:
    physics = KSpace(64, KSpaceRanges(patterns=6, coils=(4,), cropped=cropped))
    u = complex_images(disks(), seeded())
    likelihood = physics.draw(u, torch.ones(2), seeded(1))
    picture = likelihood.direct().square().sum(1)
    assert bool((picture[:, :4, :4] == 0).all()) == bool(cropped)
    assert float(picture[:, 32, 32].min()) > 0.1
    assert likelihood.chi2(u).tolist() == pytest.approx([1, 1], abs=0.2)


def test_the_score_is_the_gradient_of_the_likelihood() -> None:
    physics = KSpace(64, FEW)
    u = complex_images(disks(), seeded())
    likelihood = physics.draw(u, torch.ones(2), seeded(1))
    guess = (0.5 * u).requires_grad_(True)
    (gradient,) = torch.autograd.grad(likelihood.log_prob(guess).sum(), guess)
    torch.testing.assert_close(gradient, likelihood.score(guess.detach()), rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_residual_by_its_short_way_is_that_through_k_space() -> None:
    u, seen = complex_images(disks(), seeded()), set()
    for seed in range(8):
        likelihood = KSpace(64, FEW).draw(u, torch.ones(2), seeded(seed))
        far = likelihood.inverse(likelihood.known(likelihood.y - likelihood.forward(0.9 * u))) / likelihood.forward.a
        torch.testing.assert_close(likelihood.residual(0.9 * u), far, rtol=1e-3, atol=1e-4 * float(far.abs().max()))
        seen.add(likelihood._round_trip is None)
    assert False in seen


def test_patterns_are_repeatable_and_spread_over_the_range() -> None:
    ranges = KSpaceRanges(patterns=12)
    physics, again = KSpace(96, ranges), KSpace(96, ranges)
    assert physics.patterns == again.patterns
    accelerations = [pattern.acceleration for pattern in physics.patterns]
    assert max(accelerations) > 4
    assert min(accelerations) < 4


@pytest.mark.parametrize(("share", "discs"), [(1 / 3, 8), (0.5, 12), (0.0, 0), (1.0, 24)])
def test_a_share_of_the_patterns_are_poisson_discs(share: float, discs: int) -> None:
    physics = KSpace(64, KSpaceRanges(patterns=24, focus=0.0, radial=0.0, poisson=share))
    masks = [pattern.mask for pattern in physics.patterns]
    assert sum(not (mask == mask[:1]).all() and not (mask == mask[:, :1]).all() for mask in masks) == discs


def test_the_phase_of_tissue_turns_what_is_bright_and_nothing_else() -> None:
    magnitude = torch.zeros(6, 1, 64, 64)
    magnitude[..., 16:48, 16:48] = 0.1
    magnitude[..., 16:20, 16:48] = 1.0  # fat at the rim
    phase = tissue_phase(magnitude, 1.0, seeded())
    assert (phase[..., 17, 32].abs() > 0.1).sum() >= 4 and phase[..., 0, 0].abs().max() < 0.1
    assert (phase[..., 17, 32].abs() >= phase[..., 32, 32].abs()).all()
    assert not tissue_phase(magnitude, 0.0, seeded()).any()
    # not a smooth one: a scan's own low resolution image does not take it out
    plain, turned = (complex_images(magnitude, seeded(), tissue) for tissue in (1e-9, 1.0))
    assert turned[:, 1].square().mean() > 2 * plain[:, 1].square().mean()


def test_what_is_known_of_an_item_goes_with_it() -> None:
    u = complex_images(disks(), seeded())
    likelihood = KSpace(64, FEW).draw(u, torch.ones(2), seeded(1))
    before = likelihood.residual(u)[[1, 1]], likelihood.score(u)[[1, 1]]
    twice = likelihood.take(torch.tensor([1, 1]))
    for far, near in zip(before, (twice.residual(u[[1, 1]]), twice.score(u[[1, 1]])), strict=True):
        torch.testing.assert_close(near, far)
