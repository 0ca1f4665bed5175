"""Laws that hold for every method, checked where the answer is known: the Gaussian laboratory."""

import math

import pytest
import torch

from deft_med.guidance import dds
from deft_med.htransform import Deft, HTransform, wiener
from deft_med.metrics import coverage
from deft_med.network import UNet
from deft_med.prior import Prior, denoising_loss, scalings
from deft_med.sample import ddim, dpm, heun, renoise, start
from deft_med.schedule import edm_to_vp, sigmas, vp_to_edm
from deft_med.testing import Laboratory
from operators.linear import LinearOperator


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory.ct(n=16, views=20)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(lab: Laboratory, levels: list[float], seed: int = 0):
    x0 = lab.draw(len(levels), generator(seed))
    likelihood = lab.measure(x0, generator(seed + 1))
    sigma = torch.tensor(levels, dtype=torch.float64)
    x = x0 + sigma[:, None, None, None] * torch.randn(x0.shape, dtype=x0.dtype, generator=generator(seed + 2))
    return x0, likelihood, x, sigma


def test_tweedie_conditioned(lab: Laboratory) -> None:
    """D(x, sigma | y) = D(x, sigma) + sigma^2 grad_x ln p_sigma(y | x)."""
    _, likelihood, x, sigma = noisy(lab, [0.05, 0.3, 2.0, 40.0])
    x.requires_grad_()
    (h,) = torch.autograd.grad(lab.log_evidence(x, sigma, likelihood.y).sum(), x)
    with torch.no_grad():
        expected = lab.posterior(likelihood.y)(x, sigma)
        tweedie = lab.prior(x, sigma) + sigma[:, None, None, None] ** 2 * h
    assert (tweedie - expected).abs().max() < 1e-7


def test_the_prior_denoiser_has_the_least_error(lab: Laboratory) -> None:
    x0 = lab.draw(400, generator())
    for level in (0.1, 0.5, 3.0):
        sigma = torch.full((400,), level, dtype=torch.float64)
        x = x0 + level * torch.randn(x0.shape, dtype=x0.dtype, generator=generator(1))
        least = (lab.spectrum * level**2 / (lab.spectrum + level**2)).mean()
        assert (lab.prior(x, sigma) - x0).square().mean() == pytest.approx(float(least), rel=0.02)


def test_score_is_the_gradient_of_the_log_probability(lab: Laboratory) -> None:
    x0, likelihood, _, _ = noisy(lab, [1.0, 1.0])
    u = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(u).sum(), u)
    assert torch.allclose(gradient, likelihood.score(x0), atol=1e-9)
    assert likelihood.chi2(x0).mean() == pytest.approx(1, abs=0.15)


def test_residual_is_in_image_units_and_s_img_is_its_noise(lab: Laboratory) -> None:
    x0, likelihood, _, _ = noisy(lab, [1.0] * 64)
    alone = likelihood.residual(x0)  # nothing but noise is left
    assert alone.square().mean().sqrt() == pytest.approx(float(likelihood.s_img[0]), rel=0.1)
    assert float(likelihood.s_img[0]) == float(likelihood.s_img[-1])
    blob = torch.zeros_like(x0[:1])
    blob[..., 5:11, 5:11] = 1
    clean = lab.given(lab.operator(x0[:1] + blob))
    assert clean.residual(x0[:1])[0, 0, 7:9, 7:9].mean() == pytest.approx(1, abs=0.1)


def test_converged_dds_is_the_closed_form_under_a_white_prior() -> None:
    """With C = sd^2 the posterior is Gaussian with Cov[x0 | x] = r^2: DDS, PiGDM and the closed form are the same thing."""
    white = Laboratory.ct(n=16, views=12, length=0.0)
    _, likelihood, x, sigma = noisy(white, [0.05, 0.5, 5.0, 80.0])
    posterior = dds(white.prior, likelihood, sd=white.sd, iterations=600, tolerance=1e-13)
    assert (posterior(x, sigma) - white.posterior(likelihood.y)(x, sigma)).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "steps"), [("ode", 200), ("ancestral", 600), ("heun", 40), ("dpm", 40), ("dpm-sde", 60)])
def test_samplers_reach_mean_and_covariance(lab: Laboratory, name: str, steps: int) -> None:
    x0, likelihood, _, _ = noisy(lab, [1.0])
    count = 400
    many = likelihood.take(torch.zeros(count, dtype=torch.long))
    generators = [generator(100 + k) for k in range(count)]
    levels = sigmas(steps, low=0.002)
    x = start((count, 1, lab.n, lab.n), float(levels[0]), generators, dtype=torch.float64)
    exact = lab.posterior(many.y)
    samplers = {
        "ode": lambda: ddim(exact, x, levels, eta=0),
        "ancestral": lambda: ddim(exact, x, levels, eta=1, generators=generators),
        "heun": lambda: heun(exact, x, levels),
        "dpm": lambda: dpm(exact, x, levels),
        "dpm-sde": lambda: dpm(exact, x, levels, eta=0.5, generators=generators),
    }
    samples = samplers[name]()
    mean, variance = lab.posterior_mean(likelihood.y), float(lab.eigenvalues.mean())
    assert (samples.mean(0) - mean).square().mean() == pytest.approx(variance / count, rel=0.25)
    assert samples.var(0).mean() == pytest.approx(variance, rel=0.05)
    weakest, strongest = lab.eigenvectors[:, 0], lab.eigenvectors[:, -1]
    modes = samples.flatten(1) @ torch.stack([weakest, strongest], 1)
    assert modes[:, 1].var() == pytest.approx(float(lab.eigenvalues[-1]), rel=0.25)
    assert modes[:, 0].var() == pytest.approx(float(lab.eigenvalues[0]), rel=0.25)
    # samples explain the data as well as the truth does, their mean better
    assert many.chi2(samples).mean() == pytest.approx(1, abs=3 * math.sqrt(2 / likelihood.y.numel()))
    assert likelihood.chi2(samples.mean(0, keepdim=True)) < many.chi2(samples).mean()


def test_a_short_run_keeps_the_spread(lab: Laboratory) -> None:
    """Twenty evaluations: the posterior mean at 80, then 19 levels from 3. The default of the command."""
    _, likelihood, _, _ = noisy(lab, [1.0])
    count = 300
    many = likelihood.take(torch.zeros(count, dtype=torch.long))
    generators = [generator(100 + k) for k in range(count)]
    exact, levels = lab.posterior(many.y), sigmas(19, high=3.0)
    mean = exact(start((count, 1, lab.n, lab.n), 80.0, generators, dtype=torch.float64), torch.full((count,), 80.0, dtype=torch.float64))
    x = start(mean.shape, 3.0, generators, mean, dtype=torch.float64)
    variance = float(lab.eigenvalues.mean())
    assert dpm(exact, x, levels).var(0).mean() == pytest.approx(variance, rel=0.06)
    assert ddim(exact, x, levels, eta=1, generators=generators).var(0).mean() < 0.85 * variance  # first order narrows it
    anew = renoise(exact, x, levels, zeta=1.0, generators=generators)  # so does noise that is drawn anew, about the same mean
    assert anew.var(0).mean() < 0.8 * variance
    assert (anew.mean(0) - lab.posterior_mean(likelihood.y)).square().mean() < 3 * variance / count


def test_the_error_of_an_average_is_one_plus_one_over_k(lab: Laboratory) -> None:
    x0, likelihood, _, _ = noisy(lab, [1.0] * 40)
    spread = lab.eigenvectors * lab.eigenvalues.sqrt()
    for k in (1, 4, 8):
        draws = torch.randn(40, k, lab.n**2, dtype=torch.float64, generator=generator(k)) @ spread.T
        average = lab.posterior_mean(likelihood.y) + draws.mean(1).reshape(x0.shape)
        assert (average - x0).square().mean() == pytest.approx((1 + 1 / k) * float(lab.eigenvalues.mean()), rel=0.08)


def test_intervals_from_k_samples_cover_what_they_say(lab: Laboratory) -> None:
    x0, likelihood, _, _ = noisy(lab, [1.0] * 60)
    draws = torch.randn(60, 8, lab.n**2, dtype=torch.float64, generator=generator(5)) @ (lab.eigenvectors * lab.eigenvalues.sqrt()).T
    samples = lab.posterior_mean(likelihood.y).flatten(1)[:, None] + draws
    share = coverage(samples.mean(1).numpy(), samples.std(1).numpy(), 8, x0.flatten(1).numpy(), level=0.9)
    assert share == pytest.approx(0.9, abs=0.01)


def test_a_fresh_h_adds_a_tenth_of_the_residual() -> None:
    torch.manual_seed(0)
    lab = Laboratory.ct(n=16, views=20)
    prior, h = Prior(UNet(1, 1, (8, 8))), HTransform(UNet(3, 1, (8, 8), scalars=3))
    deft = Deft(prior.double(), h.double())
    _, likelihood, x, sigma = noisy(lab, [0.1, 3.0])
    d = prior(x, sigma)
    _, out, _ = scalings(sigma[:, None, None, None], 0.5)
    assert torch.allclose(deft(x, sigma, likelihood), d + 0.1 * out * likelihood.residual(d))


def test_both_forms_are_the_same_h() -> None:
    """sigma^2 h = c_out (net + w g) = -sigma eps_h: the two forms differ by the factor c_out / sigma and by nothing else."""
    torch.manual_seed(0)
    network = UNet(3, 1, (8, 8), scalars=3)
    torch.nn.init.normal_(network.outlet.weight, std=0.1)
    edm, paper = HTransform(network, form="edm"), HTransform(network, form="epsilon")
    paper.weight = edm.weight
    x, d, g = torch.randn(3, 2, 1, 16, 16)
    sigma, s_img = torch.tensor([0.2, 30.0]), torch.tensor([0.1, 0.2])
    _, out, _ = scalings(sigma[:, None, None, None], 0.5)
    left, right = (form(x, d, g, sigma, s_img, -1.0) for form in (edm, paper))
    assert torch.allclose(left / out, right / sigma[:, None, None, None], atol=1e-5)
    # the paper's epsilon: eps(x | y) = (x - D') / sigma = eps(x) + eps_h with eps_h = -(net + w g)
    eps_h = -right / sigma[:, None, None, None]
    assert torch.allclose((x - (d + right)) / sigma[:, None, None, None], (x - d) / sigma[:, None, None, None] + eps_h, atol=1e-5)


def test_h_rejects_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="one of wiener, edm, epsilon, got 'score'"):
        HTransform(UNet(3, 1, (8, 8), scalars=3), form="score")


class Identity(LinearOperator):
    """An image is measured as it is."""

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y.clone()


def test_a_fresh_h_of_the_wiener_form_is_the_posterior_of_white_noise_on_a_white_image() -> None:
    """Where the data are the image with white noise, D + c_g g needs no training: it is E[x0 | x, y], and c_h its deviation."""
    lab = Laboratory(Identity((8, 8), (8, 8)), Identity((8, 8), (8, 8)), 0.3, length=0.0, mean=0.0)
    _, likelihood, x, sigma = noisy(lab, [0.05, 0.5, 5.0, 80.0])
    likelihood.s_img = torch.full((4,), lab.s, dtype=torch.float64)  # not that of one draw over 64 pixels
    h = HTransform(UNet(3, 1, (8, 8), scalars=3), form="wiener").double()
    torch.nn.init.zeros_(h.weight.w.last.bias)
    deft = Deft(Prior(UNet(1, 1, (8, 8))).double(), h)
    torch.testing.assert_close(deft(x, sigma, likelihood), lab.posterior(likelihood.y)(x, sigma))
    _, left = wiener(scalings(sigma, lab.sd)[1], likelihood.s_img)
    precision = 1 / lab.sd**2 + 1 / lab.s**2 + 1 / sigma**2
    torch.testing.assert_close(left, precision**-0.5)


def test_h_is_told_how_noisy_the_data_are() -> None:
    """The same y declared with s and with 2 s gives different answers."""
    torch.manual_seed(0)
    lab = Laboratory.ct(n=16, views=20)
    network = UNet(3, 1, (8, 8), scalars=3)
    torch.nn.init.normal_(network.outlet.weight, std=0.1)
    for block in network.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    deft = Deft(Prior(UNet(1, 1, (8, 8))).double(), HTransform(network).double())
    _, likelihood, x, sigma = noisy(lab, [1.0])
    other = type(likelihood)(likelihood.forward, likelihood.y, 2 * likelihood.sigma, likelihood.inverse)
    assert other.s_img == pytest.approx(2 * likelihood.s_img)
    assert (deft(x, sigma, likelihood) - deft(x, sigma, other)).abs().max() > 1e-4


def test_the_prior_stays_frozen_and_keeps_its_gradient() -> None:
    lab = Laboratory.ct(n=16, views=20)
    network = UNet(1, 1, (8, 8))
    torch.nn.init.normal_(network.outlet.weight, std=0.1)
    deft = Deft(Prior(network).double(), HTransform(UNet(3, 1, (8, 8), scalars=3)).double())
    _, likelihood, x, sigma = noisy(lab, [1.0])
    deft(x, sigma, likelihood).sum().backward()
    assert all(p.grad is None for p in deft.prior.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in deft.h.parameters())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(deft.prior(x, sigma).sum(), x)
    assert gradient.abs().sum() > 0  # guidance through the prior needs it


def test_schedules() -> None:
    levels = sigmas(20)
    assert len(levels) == 21 and levels[0] == pytest.approx(80) and levels[-2] == pytest.approx(0.01) and levels[-1] == 0
    assert (levels[:-1] > levels[1:]).all()
    assert torch.allclose(vp_to_edm(edm_to_vp(levels[:-1])), levels[:-1])
    with pytest.raises(ValueError, match="steps >= 1"):
        sigmas(0)
    with pytest.raises(ValueError, match="one generator per item"):
        start((2, 1, 4, 4), 1.0, [generator()])


class Linear(torch.nn.Module):
    """A network that is one matrix of its flattened inputs: for a Gaussian the best h is linear in (x, D, g)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.matrix, self.seen = torch.zeros(3 * n * n, n * n, dtype=torch.float64), None

    def forward(self, x: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        self.seen = x.flatten(1)
        return (self.seen @ self.matrix).reshape(len(x), 1, *x.shape[2:])


@pytest.mark.parametrize("form", ["wiener", "edm", "epsilon"])
@pytest.mark.parametrize("level", [0.1, 0.5, 3.0, 80.0])
def test_an_h_fitted_to_pairs_reaches_the_linear_optimum(form: str, level: float) -> None:
    """The minimiser of DEFT's loss over pairs (x0, y) is the exact posterior denoiser, in every form and at every noise level."""
    ct = Laboratory.ct(n=8, views=12)
    lab = Laboratory(ct.operator, ct.operator.H * (1 / 96), ct.s, mean=0.0)  # the adjoint as B: it keeps all that y says about x0

    class Exact(torch.nn.Module):
        sd = 0.5

        def forward(self, x, sigma):
            return lab.prior(x, sigma)

        def freeze(self):
            return self

    network = Linear(lab.n)
    deft = Deft(Exact(), HTransform(network, form=form).double())

    def pairs(count: int, seed: int):
        x0 = lab.draw(count, generator(seed))
        x = x0 + level * torch.randn(x0.shape, dtype=x0.dtype, generator=generator(seed + 1))
        return x0, x, torch.full((count,), level, dtype=torch.float64), lab.measure(x0, generator(seed + 2))

    with torch.no_grad():
        x0, x, sigma, likelihood = pairs(30000, 0)
        untrained = deft(x, sigma, likelihood)
        out = scalings(sigma[:1], 0.5)[1]
        scale = {"epsilon": sigma[:1], "edm": out, "wiener": wiener(out, 2 * likelihood.s_img[:1])[1]}[form]
        network.matrix = torch.linalg.lstsq(network.seen, ((x0 - untrained) / scale).flatten(1), rcond=1e-9, driver="gelsd").solution
        x0, x, sigma, likelihood = pairs(10000, 10)
        trained = deft(x, sigma, likelihood)
    error = (trained - x0).square().mean()
    assert lab.least_error(level) * 0.99 < error < lab.least_error(level) * 1.02
    assert denoising_loss(trained, x0, sigma, 0.5).mean() < denoising_loss(deft.prior(x, sigma), x0, sigma, 0.5).mean()
    exact = lab.posterior(likelihood.y)(x, sigma)
    assert (trained - exact).square().mean() < 0.02 * lab.least_error(level)


def test_mirrors_turn_the_networks_and_not_the_data() -> None:
    lab = Laboratory.ct(n=16, views=20)
    _, likelihood, x, sigma = noisy(lab, [0.7])
    torch.manual_seed(0)
    network, small = UNet(1, 1, (8, 8)), UNet(3, 1, (8, 8), scalars=3)
    deft = Deft(Prior(network).double(), HTransform(small).double())
    fresh = deft(x, sigma, likelihood)  # fresh networks answer alike in every mirror
    for mirror in ((-1,), (-2,), (-2, -1)):
        torch.testing.assert_close(deft(x, sigma, likelihood, mirror), fresh)
    for module in (network, small):
        torch.nn.init.normal_(module.outlet.weight, std=0.05)
    trained = [deft(x, sigma, likelihood, mirror) for mirror in ((), (-1,))]
    assert not torch.allclose(*trained)
    turns = deft.given(likelihood, ((), (-1,)))
    for call in range(3):
        assert torch.equal(turns(x, sigma), trained[call % 2])
