"""Likelihoods by their laws: rays that were not measured, photon counts, magnitudes without phase, and any differentiable model."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from deft_med.guidance import METHODS, dds, sample_with, sharpness
from deft_med.htransform import Deft, HTransform
from deft_med.intensity import Affine
from deft_med.likelihood import Gaussian, Likelihood
from deft_med.network import UNet
from deft_med.nonlinear import Magnitudes, Nonlinear, Transmission, _expected_deviance
from deft_med.prior import Prior
from deft_med.simulate import phase_codes
from deft_med.testing import Laboratory
from operators import counts
from operators.geometry import Cartesian
from operators.mri import Complex, encoding
from operators.noise import transmission
from operators.sense import WeightedAdjoint

BY_GRADIENT = [name for name, method in METHODS.items() if not (method.linear or method.solves)]
BY_SOLVES = [name for name, method in METHODS.items() if method.solves]
STEPS = {"dps": 150, "diffpir": 15, "reconstruction": 60, "red-diff": 100, "dds": 30, "pigdm": 60}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory.ct(n=16, views=16)


def behind(lab: Laboratory) -> Affine:
    """u -> line integrals up to 4 or so."""
    return Affine(lab.operator, 0.2, 0.22)


def counted(lab: Laboratory, x0: torch.Tensor, photons: float, electronic: float = 0.0, ceiling: float | None = None, seed: int = 1):
    forward = behind(lab)
    read = counts.draw(forward(x0), photons, electronic, ceiling, generator=generator(seed))
    y, sigma = counts.line_integrals(read, photons, electronic)
    return Transmission(Gaussian(forward, y, sigma, lab.inverse), read, photons, electronic, ceiling)


def coded(noise: float = 0.02, n: int = 16, codes: int = 4, items: int = 1) -> tuple[Magnitudes, torch.Tensor]:
    """Magnitudes of a white complex image through phase masks, and the image."""
    physics = encoding(Cartesian.of(np.ones((n, n), bool)), phase_codes(1, codes, (n, n), generator(3))[0])
    channels = Complex((n, n))
    forward, u = Affine(physics @ channels, 2.0, 0.0), 0.3 * torch.randn(items, 2, n, n, generator=generator(7), dtype=torch.float64)
    z = forward(u)
    y = z.abs() + noise * torch.randn(z.shape, generator=generator(8), dtype=torch.float64)
    return Magnitudes(forward, y, torch.full((1, 1, 1, 1), noise, dtype=torch.float64), channels.H @ WeightedAdjoint(physics)), u


def slope(function, u: torch.Tensor, v: torch.Tensor, h: float = 1e-5) -> torch.Tensor:
    """Central difference along v."""
    return (function(u + h * v) - function(u - h * v)) / (2 * h)


def check_score(likelihood: Likelihood, u: torch.Tensor) -> None:
    """The score is the gradient of log_prob, by autograd and by finite differences."""
    v = torch.randn(u.shape, generator=generator(11), dtype=u.dtype)
    score = likelihood.score(u)
    torch.testing.assert_close(score, Likelihood.score(likelihood, u), rtol=1e-8, atol=1e-10)
    found = (score * v).flatten(1).sum(1)
    torch.testing.assert_close(found, slope(likelihood.log_prob, u, v), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- what was not measured
def holes(lab: Laboratory) -> tuple[Gaussian, torch.Tensor, torch.Tensor]:
    """Two items with other rays missing, what they are of, and the mask of the measured ones."""
    x0 = lab.draw(2, generator())
    whole = lab.measure(x0, generator(1))
    there = torch.rand(whole.y.shape, generator=generator(2)) > torch.tensor([0.3, 0.5]).reshape(2, 1, 1, 1)
    sigma = torch.where(there, lab.s, torch.inf).to(whole.y)
    return Gaussian(whole.forward, torch.where(there, whole.y, 7.0), sigma, lab.inverse), x0, there


def test_infinite_noise_means_not_measured(lab: Laboratory) -> None:
    likelihood, x0, there = holes(lab)
    u = lab.draw(2, generator(3))
    left = torch.where(there, likelihood.y - lab.operator(u), 0)
    torch.testing.assert_close(likelihood.misfit(u), (left / lab.s).square().flatten(1).sum(1))
    torch.testing.assert_close(likelihood.score(u), lab.operator.H(left) / lab.s**2)
    torch.testing.assert_close(likelihood.residual(u), lab.inverse(left))
    check_score(likelihood, u)
    assert likelihood.count.tolist() == there.flatten(1).sum(1).tolist()
    assert likelihood.chi2(x0).tolist() == pytest.approx([1, 1], abs=4 * math.sqrt(2 / int(likelihood.count.min())))
    noise = torch.randn((1, *likelihood.y.shape[1:]), dtype=torch.float64, generator=generator())
    expected = lab.inverse(torch.where(there, lab.s * noise, 0)).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(likelihood.s_img, expected)
    one = likelihood.take(torch.tensor([1, 1]))
    assert one.count.tolist() == [int(there[1].sum())] * 2
    torch.testing.assert_close(one.chi2(u[1:].expand(2, -1, -1, -1)), likelihood.chi2(u)[1:].expand(2))


def test_what_stands_for_a_missing_ray_is_seen_by_direct_alone(lab: Laboratory) -> None:
    likelihood, x0, there = holes(lab)
    other = Gaussian(likelihood.forward, torch.where(there, likelihood.y, -3.0), likelihood.sigma, lab.inverse)
    for word in ("misfit", "score", "residual", "log_prob", "chi2"):
        assert torch.equal(getattr(likelihood, word)(x0), getattr(other, word)(x0)), word
    assert torch.equal(likelihood.s_img, other.s_img)
    torch.testing.assert_close(likelihood.direct(), lab.inverse(likelihood.y))
    assert not torch.allclose(likelihood.direct(), other.direct())


def test_dds_with_missing_rays_is_the_posterior_of_the_others() -> None:
    white = Laboratory.ct(n=12, views=8, length=0.0)
    x0 = white.draw(1, generator())
    y = white.measure(x0, generator(1)).y
    there = torch.rand(y.shape, generator=generator(2)) > 0.4
    likelihood = Gaussian(Affine(white.operator, 1.0, 0.0), y, torch.where(there, white.s, torch.inf).to(y), white.inverse)
    sigma = torch.tensor([3.0], dtype=torch.float64)
    found = dds(white.prior, likelihood, sd=white.sd, iterations=500, tolerance=1e-13)(torch.zeros_like(x0), sigma)
    rows, r2 = white.matrix[there.flatten()], 9 * white.sd**2 / (9 + white.sd**2)
    d = white.prior(torch.zeros_like(x0), sigma).flatten()
    system = rows.T @ rows / white.s**2 + torch.eye(len(d), dtype=torch.float64) / r2
    best = d + torch.linalg.solve(system, rows.T @ (y.flatten()[there.flatten()] - rows @ d) / white.s**2)
    torch.testing.assert_close(found.flatten(), best, rtol=0, atol=1e-7)


def test_where_all_was_measured_nothing_changes(lab: Laboratory) -> None:
    likelihood = lab.measure(lab.draw(1, generator()), generator(1))
    assert likelihood.measured is None and likelihood.count == math.prod(lab.operator.range_shape)
    blank = torch.zeros(1, 1, lab.n, lab.n, dtype=torch.float64)
    assert torch.equal(likelihood.direct(), likelihood.residual(blank))


# ------------------------------------------------------------------------------------------------------- photon counts
def test_counts_and_their_logarithm_are_those_of_transmission() -> None:
    p = 3 * torch.rand(4, 9, 30, generator=generator())
    read = counts.draw(p, 200.0, 4.0, generator=generator(1))
    for found, known in zip(counts.line_integrals(read, 200.0, 4.0), transmission(p, 200.0, 4.0, generator=generator(1)), strict=True):
        torch.testing.assert_close(found, known)
    assert float(counts.draw(p, 200.0, 4.0, 150.0, generator=generator(1)).max()) == 150
    with pytest.raises(ValueError, match="counts want photons > 0"):
        counts.draw(p, 0.0, generator=generator())
    with pytest.raises(ValueError, match="electronic >= 0 and ceiling > 0"):
        counts.draw(p, 10.0, 0.0, -1.0, generator=generator())


def test_the_deviance_is_poissons(lab: Laboratory) -> None:
    """Differences of log_prob are those of the Poisson law itself, of counts shifted by the variance of the read-out."""
    u = lab.draw(3, generator())
    for photons, electronic in ((40.0, 0.0), (300.0, 5.0)):
        likelihood = counted(lab, u, photons, electronic)
        mean = photons * torch.exp(-behind(lab)(u.flip(0))) + electronic**2, photons * torch.exp(-behind(lab)(u)) + electronic**2
        n = (likelihood.y + electronic**2).clamp(min=0)
        exact = [(torch.xlogy(n, m) - m).flatten(1).sum(1) for m in mean]
        torch.testing.assert_close(likelihood.log_prob(u.flip(0)) - likelihood.log_prob(u), exact[0] - exact[1])


@pytest.mark.parametrize(("photons", "electronic", "ceiling"), [(3.0, 0.0, None), (100.0, 8.0, None), (100.0, 8.0, 60.0), (1e5, 0.0, 3e4)])
def test_the_score_of_counts_is_their_gradient(lab: Laboratory, photons: float, electronic: float, ceiling: float | None) -> None:
    x0 = lab.draw(2, generator())
    likelihood = counted(lab, x0, photons, electronic, ceiling)
    check_score(likelihood, x0)
    check_score(likelihood, lab.draw(2, generator(4)))


def test_a_saturated_ray_counts_by_poissons_tail(lab: Laboratory) -> None:
    lines = counted(lab, lab.draw(1, generator()), 1e5).lines
    for ceiling in (20.0, 300.0, 4000.0):
        mean = ceiling + np.linspace(-4, 4, lines.y.numel()).reshape(lines.y.shape) * ceiling**0.5
        likelihood = Transmission(lines, torch.full_like(lines.y, ceiling), 1e5, 0.0, ceiling)
        value, _ = likelihood.terms(torch.from_numpy(np.log(1e5 / mean)))
        np.testing.assert_allclose(value.numpy(), -2 * scipy.stats.poisson.logsf(ceiling - 1, mean), rtol=1e-3, atol=1e-8)


def test_many_counts_are_a_gaussian(lab: Laboratory) -> None:
    x0 = lab.draw(1, generator())
    forward, near = behind(lab), x0 + 1e-4 * torch.randn(8, *x0.shape[1:], dtype=torch.float64, generator=generator(3))
    p = forward(x0)
    n = counts.draw(p, 1e8, generator=generator(1))
    likelihood = Transmission(Gaussian(forward, (1e8 / n).log(), (0.5 * p).exp() / 1e4, lab.inverse), n, 1e8)
    several = likelihood.take(torch.zeros(8, dtype=torch.long))
    poisson, gaussian = (of.log_prob(near) - of.log_prob(x0.expand_as(near)) for of in (several, several.lines))
    assert float(gaussian.abs().median()) > 1
    torch.testing.assert_close(poisson, gaussian, rtol=0.02, atol=0.02 * float(gaussian.abs().max()))


@pytest.mark.parametrize(("photons", "electronic", "ceiling"),
                         [(2.0, 0.0, None), (40.0, 0.0, None), (300.0, 5.0, None), (300.0, 5.0, 150.0), (40.0, 0.0, 15.0)])
def test_chi2_of_counts_is_one_for_the_truth(lab: Laboratory, photons: float, electronic: float, ceiling: float | None) -> None:
    x0 = lab.draw(24, generator())
    chi2 = counted(lab, x0, photons, electronic, ceiling).chi2(x0)
    scatter = float(chi2.std()) / len(x0) ** 0.5
    assert float(chi2.mean()) == pytest.approx(1, abs=max(4 * scatter, 0.01)) and scatter < 0.04


def test_the_expected_deviance_is_a_sum() -> None:
    means = [1e-3, 0.1, 1.0, 7.9, 8.1, 30.0]
    exact = []
    for mean in means:
        n = np.arange(400)
        deviance = 2 * (n * np.log(np.maximum(n, 1) / mean) - n + mean)
        exact.append(float((scipy.stats.poisson.pmf(n, mean) * deviance).sum()))
    assert _expected_deviance(torch.tensor(means, dtype=torch.float64)).tolist() == pytest.approx(exact, rel=2e-3)


def test_rays_without_a_count_and_images_far_away_stay_finite(lab: Laboratory) -> None:
    x0 = lab.draw(1, generator()).float()
    lines = Gaussian(behind(lab), torch.full((1, 1, *lab.operator.range_shape), 2.0), torch.ones(1, 1, 1, 1), lab.inverse)
    for electronic in (0.0, 10.0):
        read = torch.zeros_like(lines.y)
        read[..., ::3], read[..., 1::3] = 500.0, -30.0
        likelihood = Transmission(lines, read, 1e3, electronic, 500.0)
        for u in (x0, x0 - 20, x0 + 400):
            assert torch.isfinite(likelihood.misfit(u)).all() and torch.isfinite(likelihood.score(u)).all()
            assert torch.isfinite(likelihood.expected(u)).all()


def test_the_residual_of_counts_is_that_of_their_logarithm_but_for_saturated_rays(lab: Laboratory) -> None:
    x0 = lab.draw(1, generator())
    free, cut = counted(lab, x0, 300.0, 5.0), counted(lab, x0, 300.0, 5.0, 120.0)
    assert torch.equal(free.residual(x0), free.lines.residual(x0)) and torch.equal(free.s_img, free.lines.s_img)
    assert free.log_ratio == free.lines.log_ratio and free.shape == (1, 16, 16)
    assert torch.equal(free.direct(), free.lines.direct())
    thin, thick = torch.full_like(x0, -1.1), torch.full_like(x0, 5.0)  # nothing there; everything dense
    cut.saturated = torch.ones_like(cut.saturated)
    assert not cut.residual(thin).any()  # as bright as they say, or brighter
    torch.testing.assert_close(cut.residual(thick), lab.inverse((cut.lines.y - cut.forward(thick)).clamp(max=0)) / 0.2)
    assert int(free.count) == cut.lines.count > int(cut.inverted_by(lab.inverse).count)  # saturated rays are not counted
    assert cut.inverted_by(lab.inverse).residual(thick).shape == x0.shape
    check_score(cut, x0)


def test_counts_have_rays_that_were_not_measured_too(lab: Laboratory) -> None:
    x0 = lab.draw(1, generator())
    whole = counted(lab, x0, 300.0, 5.0)
    there = torch.rand(whole.y.shape, generator=generator(2)) > 0.4
    lines = Gaussian(whole.forward, whole.lines.y, whole.sigma.masked_fill(~there, torch.inf), lab.inverse)
    likelihood = Transmission(lines, whole.counts, 300.0, 5.0)
    value, _ = whole.terms(whole.forward(x0))
    torch.testing.assert_close(likelihood.misfit(x0), (value * there).flatten(1).sum(1))
    check_score(likelihood, x0)
    assert float(likelihood.chi2(x0)) == pytest.approx(1, abs=0.3) and int(likelihood.count) == int(there.sum())


def test_step_sizes_see_the_curvature_of_the_gaussian_beside(lab: Laboratory) -> None:
    likelihood = counted(lab, lab.draw(1, generator()), 300.0, 5.0, 200.0)
    assert float(sharpness(likelihood)) == pytest.approx(float(sharpness(likelihood.lines)), rel=1e-6)
    magnitudes, _ = coded()
    assert float(sharpness(magnitudes)) == pytest.approx((2.0 / 0.02) ** 2, rel=1e-4)  # |A| = 1, a = 2


@pytest.mark.parametrize("name", BY_GRADIENT + BY_SOLVES)
def test_methods_reconstruct_counts(lab: Laboratory, name: str) -> None:
    """From the prior's mean the misfit falls at least tenfold, and the error falls too."""
    x0 = lab.draw(1, generator(5))
    likelihood, blank = counted(lab, x0, 1e3, 10.0, 700.0), torch.full_like(x0, lab.mean)
    found = sample_with(name, lab.prior, likelihood, generators=[generator(1)], steps=STEPS[name])
    assert float(likelihood.misfit(found)) < 0.1 * float(likelihood.misfit(blank))
    assert float((found - x0).square().mean()) < 0.7 * float((blank - x0).square().mean())


def test_dds_around_counts_is_a_gauss_newton_step(lab: Laboratory) -> None:
    """What data consistency behind DEFT does; repeated, it comes to where the posterior's gradient is zero."""
    x0 = lab.draw(1, generator(5))
    likelihood, sigma = counted(lab, x0, 1e3, 10.0, 700.0), torch.tensor([1.0], dtype=torch.float64)
    centre, r2 = torch.full_like(x0, lab.mean), 0.5 * 0.5**2 * 2 / (1 + 0.5**2)
    u = centre
    for _ in range(12):  # argmin of the surrogate about u, with the prior N(centre, r2)
        data = lambda x, sigma: u  # noqa: B023
        step = dds(data, _Pulled(likelihood, centre, r2), sd=0.5, iterations=300, tolerance=1e-12)(u, sigma)
        u = step
    gradient = likelihood.score(u) - (u - centre) / r2
    assert gradient.norm() < 1e-3 * likelihood.score(centre).norm()


class _Pulled:
    """A likelihood with a Gaussian prior taken in as data: its score is the posterior's."""

    def __init__(self, likelihood: Transmission, centre: torch.Tensor, r2: float) -> None:
        self.likelihood, self.centre, self.r2 = likelihood, centre, r2
        self.forward, self.curvature = likelihood.forward, likelihood.curvature

    def score(self, u: torch.Tensor) -> torch.Tensor:
        return self.likelihood.score(u) - (u - self.centre) / self.r2


@pytest.mark.parametrize("kind", ["counts", "magnitudes"])
def test_the_h_transform_takes_them_as_they_are(lab: Laboratory, kind: str) -> None:
    channels = 1 if kind == "counts" else 2
    prior = Prior(UNet(channels, channels, (8, 8), scalars=1, dim=16))
    deft = Deft(prior, HTransform(UNet(3 * channels, channels, (8, 8), scalars=3, dim=16)))
    if kind == "counts":
        likelihood = counted(lab, lab.draw(1, generator()).float(), 300.0, 5.0, 200.0)
    else:
        double, u = coded()
        likelihood = Magnitudes(double.forward, double.y.float(), double.sigma.float(), double.inverse)
    x = torch.randn(1, *likelihood.shape, generator=generator(1))
    with torch.no_grad():
        found = deft(x, torch.ones(1), likelihood)
    assert found.shape == x.shape and torch.isfinite(found).all()


# ------------------------------------------------------------------------------------------------------- magnitudes
def test_the_score_of_magnitudes_is_their_gradient() -> None:
    likelihood, u = coded(items=2)
    far = u + 0.5 * torch.randn(u.shape, generator=generator(1), dtype=u.dtype)
    for image in (u, far):
        check_score(likelihood, image)
        plain = ((likelihood.forward(image).abs() - likelihood.y) / likelihood.sigma).square().flatten(1).sum(1)
        torch.testing.assert_close(likelihood.misfit(image), plain)


def test_magnitudes_know_the_truth_up_to_one_phase() -> None:
    likelihood, u = coded(noise=0.05, n=24, items=3)
    assert likelihood.chi2(u).tolist() == pytest.approx([1] * 3, abs=4 * math.sqrt(2 / likelihood.count))
    turned = torch.view_as_complex(u.movedim(1, -1).contiguous()) * np.exp(0.7j)
    turned = torch.view_as_real(turned).movedim(-1, 1)
    torch.testing.assert_close(likelihood.chi2(turned), likelihood.chi2(u))
    torch.testing.assert_close(likelihood.chi2(-u), likelihood.chi2(u))


def test_the_residual_of_magnitudes_is_the_projection_and_the_gradient() -> None:
    likelihood, u = coded()
    scale = 2.0  # a; A is an isometry and B = A^H
    torch.testing.assert_close(likelihood.residual(u) * scale**2 / 0.02**2, likelihood.score(u))
    held = likelihood.take(torch.tensor([0, 0]))
    assert held.count == likelihood.count == 4 * 256 and held.ratio == likelihood.ratio == 2
    noise = 0.02 / 2 / 2**0.5  # of real noise, half the power to each channel; codes of unit sum of squares keep it
    assert held.s_img.tolist() == pytest.approx([noise] * 2, rel=0.1)
    assert torch.equal(likelihood.inverted_by(likelihood.inverse).residual(u), likelihood.residual(u))


def test_a_start_without_phases_finds_the_image() -> None:
    likelihood, u = coded(noise=0.02, n=24)
    found = likelihood.direct()
    assert float(likelihood.chi2(found)) < 1.2
    a, b = (torch.view_as_complex(x.movedim(1, -1).contiguous()) for x in (found, u))
    phase = (a.conj() * b).sum()
    assert float((a * phase / phase.abs() - b).abs().square().mean().sqrt()) < 0.1 * float(b.abs().square().mean().sqrt())


@pytest.mark.parametrize("name", BY_GRADIENT + BY_SOLVES)
def test_methods_find_phases(name: str) -> None:
    """From an empty image the misfit falls at least fivefold."""
    likelihood, _ = coded()
    prior = lambda x, sigma: x * (0.09 / (0.09 + sigma.square()))[:, None, None, None]
    found = sample_with(name, prior, likelihood, generators=[generator(1)], steps=STEPS[name])
    assert float(likelihood.misfit(found)) < 0.2 * float(likelihood.misfit(torch.zeros_like(found)))


def test_no_signal_has_no_phase() -> None:
    likelihood, u = coded()
    blank = torch.zeros_like(u)
    assert torch.isfinite(likelihood.score(blank)).all() and torch.isfinite(likelihood.residual(blank)).all()
    dark = Magnitudes(likelihood.forward, torch.zeros_like(likelihood.y), likelihood.sigma, likelihood.inverse)
    assert torch.isfinite(dark.direct()).all()


# ------------------------------------------------------------------------------------------------------- any model
def detector(lab: Laboratory, x0: torch.Tensor, *, inverse: bool = True) -> Nonlinear:
    """A detector that bends: y = tanh(A u / 8) + s n."""
    bend = lambda u: torch.tanh(lab.operator(u) / 8)
    back = (lambda y: lab.inverse(8 * torch.atanh(y.clamp(-0.999, 0.999)))) if inverse else None
    y = bend(x0) + 0.03 * torch.randn(lab.operator(x0).shape, dtype=x0.dtype, generator=generator(1))
    return Nonlinear(bend, y, y.new_full((1, 1, 1, 1), 0.03), (1, lab.n, lab.n), back)


def test_any_differentiable_model_has_the_same_words(lab: Laboratory) -> None:
    x0 = lab.draw(2, generator())
    likelihood = detector(lab, x0)
    check_score(likelihood, lab.draw(2, generator(4)))
    assert likelihood.chi2(x0).tolist() == pytest.approx([1] * 2, abs=4 * math.sqrt(2 / likelihood.count))
    u = lab.draw(2, generator(6))
    torch.testing.assert_close(likelihood.residual(u), likelihood.direct() - likelihood.inverse(likelihood.forward(u)))
    assert likelihood.shape == (1, 16, 16) and likelihood.log_ratio == pytest.approx(math.log(likelihood.count / 256))
    assert float(likelihood.s_img[0]) > 0
    torch.testing.assert_close(likelihood.take(torch.tensor([1])).misfit(u[1:]), likelihood.misfit(u)[1:])
    with pytest.raises(ValueError, match="has no approximate inverse: give one, or use a method by gradient such as dps"):
        detector(lab, x0, inverse=False).residual(u)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_methods_by_gradient_take_any_model(lab: Laboratory, name: str) -> None:
    x0 = lab.draw(1, generator(5))
    likelihood = detector(lab, x0, inverse=False)
    with pytest.raises(ValueError, match="dds solves with the likelihood's curvature, which Nonlinear does not know: choose dps"):
        sample_with("dds", lab.prior, likelihood, generators=[generator(1)])
    found = sample_with(name, lab.prior, likelihood, generators=[generator(1)], steps=STEPS[name])
    assert float(likelihood.misfit(found)) < 0.5 * float(likelihood.misfit(torch.full_like(x0, lab.mean)))


@pytest.mark.parametrize("alike", [True, False])
def test_curvature_is_the_hessian_of_half_the_misfit(alike: bool) -> None:
    """By the gram where the noise is one for an item, by A and its adjoint elsewhere: the same thing."""
    lab = Laboratory.ct(n=12, views=9)
    x0 = lab.draw(2, torch.Generator().manual_seed(0))
    y = lab.operator(x0)
    sigma = torch.tensor([0.3, 0.7], dtype=y.dtype).reshape(2, 1, 1, 1).expand(y.shape)
    if not alike:
        sigma = sigma * (1 + torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
    likelihood = Gaussian(Affine(lab.operator, 1.7, 0.2), y, sigma, lab.inverse)
    u, v = torch.randn(2, *x0.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    _, hessian = torch.autograd.functional.hvp(lambda u: 0.5 * likelihood.misfit(u).sum(), u, v)
    torch.testing.assert_close(likelihood.curvature(v), hessian)
    assert (likelihood._level is not None) == alike
