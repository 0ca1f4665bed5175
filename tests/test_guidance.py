"""The zero-shot methods against closed forms and against their own equations, in the Gaussian laboratory; on MRI; on data not linear."""

import pytest
import torch

from deft_med.guidance import METHODS, ddnm, dds, diffpir, dps, pigdm, reconstruction, red_diff, sample_with, sharpness, vp_sigmas
from deft_med.intensity import Affine
from deft_med.likelihood import Gaussian
from deft_med.sample import ddim, renoise, start
from deft_med.schedule import edm_to_vp, in_turns, sigmas
from deft_med.simulate import coil_maps
from deft_med.testing import Laboratory
from operators import patterns
from operators.mri import Complex, encoding
from operators.sense import WeightedAdjoint

LEVELS = [0.05, 0.5, 5.0, 80.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory.ct(n=16, views=8)


@pytest.fixture(scope="module")
def white() -> Laboratory:
    return Laboratory.ct(n=16, views=8, length=0.0)


def noisy(lab: Laboratory, levels: list[float] = LEVELS):
    x0 = lab.draw(len(levels), generator())
    sigma = torch.tensor(levels, dtype=torch.float64)
    x = x0 + sigma[:, None, None, None] * torch.randn(x0.shape, dtype=x0.dtype, generator=generator(2))
    return lab.measure(x0, generator(1)), x, sigma


def jacobian(lab: Laboratory, level: float) -> torch.Tensor:
    """dD/dx, dense."""
    return lab.covariance @ torch.linalg.inv(lab.covariance + level**2 * torch.eye(lab.n**2, dtype=torch.float64))


def flat(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(1)


# ------------------------------------------------------------------------------------------------------- each against its equation
def test_pigdm_is_exact_under_a_white_prior_and_dds_is_pigdm(white: Laboratory) -> None:
    likelihood, x, sigma = noisy(white)
    exact = white.posterior(likelihood.y)(x, sigma)
    settings = {"sd": white.sd, "iterations": 600, "tolerance": 1e-13}
    guided, decomposed = (method(white.prior, likelihood, **settings)(x, sigma) for method in (pigdm, dds))
    assert (guided - exact).abs().max() < 1e-7
    assert (decomposed - guided).abs().max() < 1e-7


def test_pigdm_is_its_equation(lab: Laboratory) -> None:
    """h = J^T A^T (r^2 A A^T + s^2)^-1 (y - A D), dense; and better than the prior even where the covariance is not r^2."""
    likelihood, x, sigma = noisy(lab)
    found = pigdm(lab.prior, likelihood, sd=0.4, iterations=600, tolerance=1e-13)(x, sigma)
    d, eye = lab.prior(x, sigma), torch.eye(lab.matrix.shape[0], dtype=torch.float64)
    for k, level in enumerate(LEVELS):
        r2 = level**2 * 0.4**2 / (level**2 + 0.4**2)
        r = flat(likelihood.y)[k] - lab.matrix @ flat(d)[k]
        h = jacobian(lab, level).T @ lab.matrix.T @ torch.linalg.solve(r2 * lab.matrix @ lab.matrix.T + lab.s**2 * eye, r)
        torch.testing.assert_close(flat(found)[k], flat(d)[k] + level**2 * h, atol=1e-7, rtol=1e-7)


def test_dps_takes_the_published_step(lab: Laboratory) -> None:
    """One ancestral VP step and its correction, transcribed with dense matrices, against ddim with eta 1 around dps."""
    likelihood, _, _ = noisy(lab, [1.0])
    levels, zeta = vp_sigmas(20), 0.7
    assert sharpness(likelihood).sqrt() == pytest.approx(float(torch.linalg.matrix_norm(lab.matrix, 2)) / lab.s, rel=1e-3)
    scale = lab.s * sharpness(likelihood).sqrt()  # data over |A|, as the paper's operators have norm one
    matrix, y = lab.matrix / scale, flat(likelihood.y)[0] / scale
    for k in (0, 7, 15, 19):
        s, t = levels[k], levels[k + 1]
        x = s * torch.randn(1, 1, lab.n, lab.n, dtype=torch.float64, generator=generator(k))
        found = ddim(dps(lab.prior, likelihood, levels, zeta=zeta), x, levels[k : k + 2], eta=1.0, generators=[generator(9)])
        now, then = edm_to_vp(s), edm_to_vp(t)  # alpha bar
        alpha, image = now / then, now.sqrt() * x.flatten()
        centre, j = lab.mean, jacobian(lab, float(s))
        d = centre + j @ (image / now.sqrt() - centre)
        r = y - matrix @ d
        mean = then.sqrt() * (1 - alpha) / (1 - now) * d + alpha.sqrt() * (1 - then) / (1 - now) * image
        noise = torch.randn(1, lab.n, lab.n, dtype=torch.float64, generator=generator(9)).flatten()
        ancestral = mean + ((1 - then) / (1 - now) * (1 - alpha)).sqrt() * noise
        gradient = -2 * (j / now.sqrt()).T @ matrix.T @ r  # of |r|^2 with respect to the noisy VP image
        expected = (ancestral - zeta / torch.linalg.vector_norm(r) * gradient) / then.sqrt()
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-8)
        # as an h: D' = D + s^2 h
        h = -zeta * (j.T @ matrix.T @ (-2 * r)) / (torch.linalg.vector_norm(r) * (now * then).sqrt() * (s**2 - t**2))
        changed = dps(lab.prior, likelihood, levels, zeta=zeta)(x, s[None]).flatten()
        torch.testing.assert_close((changed - d) / s**2, h, rtol=1e-7, atol=1e-12)


def test_reconstruction_guidance_is_its_gradient(lab: Laboratory) -> None:
    likelihood, x, sigma = noisy(lab)
    d, norm2 = lab.prior(x, sigma), lab.s**2 * sharpness(likelihood)
    found = reconstruction(lab.prior, likelihood, weight=1.2)(x, sigma)
    for k, level in enumerate(LEVELS):
        r = flat(likelihood.y)[k] - lab.matrix @ flat(d)[k]
        step = 1.2 * jacobian(lab, level).T @ lab.matrix.T @ r / norm2[k]
        torch.testing.assert_close(flat(found)[k], flat(d)[k] + step, rtol=1e-8, atol=1e-10)


def test_ddnm_projects_on_data_without_noise(lab: Laboratory) -> None:
    _, x, sigma = noisy(lab)
    y = lab.operator(lab.draw(len(x), generator()))
    clean = Gaussian(Affine(lab.operator, 1.0, 0.0), y, y.new_full((1, 1, 1, 1), 1e-9), lab.inverse)
    d, found = lab.prior(x, sigma), ddnm(lab.prior, clean, iterations=400, tolerance=1e-12)(x, sigma)
    assert (lab.operator(found) - y).abs().max() < 1e-6 * y.abs().max()
    change, inverse = flat(found - d), torch.linalg.pinv(lab.matrix, rtol=1e-10)
    torch.testing.assert_close(change, change @ (inverse @ lab.matrix).T, atol=1e-6, rtol=0)  # the null space is the prior's


def test_ddnm_trusts_noisy_data_less_below_their_own_noise(lab: Laboratory) -> None:
    """From sigma to 2 sigma the step doubles where sigma is under the propagated noise, and is whole where it is above."""
    likelihood, x, _ = noisy(lab, [1.0])
    still = lambda x, sigma: x  # the same D at every level
    step = lambda level: flat(ddnm(still, likelihood)(x, x.new_full((1,), level)) - x)
    torch.testing.assert_close(step(2e-3), 2 * step(1e-3))
    torch.testing.assert_close(step(80.0), step(40.0))
    assert step(1e-3).norm() < 0.02 * step(40.0).norm()


def test_diffpir_minimises_its_objective(lab: Laboratory) -> None:
    likelihood, x, sigma = noisy(lab)
    found = diffpir(lab.prior, likelihood, weight=3.0, iterations=800, tolerance=1e-12)(x, sigma)
    d = lab.prior(x, sigma)
    for k, level in enumerate(LEVELS):
        rho = 3.0 * lab.s**2 / level**2
        system = lab.matrix.T @ lab.matrix + rho * torch.eye(lab.n**2, dtype=torch.float64)
        best = torch.linalg.solve(system, lab.matrix.T @ flat(likelihood.y)[k] + rho * flat(d)[k])
        residual = lambda z: (flat(likelihood.y)[k] - lab.matrix @ z).square().sum() + rho * (z - flat(d)[k]).square().sum()  # noqa: B023
        assert residual(flat(found)[k]) <= residual(best) * (1 + 1e-9)
    assert (flat(found)[0] - flat(d)[0]).norm() < (flat(found)[1] - flat(d)[1]).norm()  # less noise left, less to change


def test_diffpir_without_a_linear_model_takes_gradient_steps_to_the_same_place(lab: Laboratory) -> None:
    likelihood, x, sigma = noisy(lab, [0.02, 0.05])
    exact = diffpir(lab.prior, likelihood, iterations=400, tolerance=1e-12)(x, sigma)
    stepped = diffpir(lab.prior, Words(likelihood), iterations=600)(x, sigma)
    assert (stepped - exact).abs().max() < 1e-6


def test_renoise_is_ddim_with_its_own_eta() -> None:
    levels, target = sigmas(6, high=5.0), torch.full((2, 1, 4, 4), 0.3)
    x, zeta, seen = torch.randn(2, 1, 4, 4, generator=generator()), 0.4, []
    found = renoise(lambda x, sigma: 0.5 * (x + target), x, levels[:2], zeta=zeta, generators=[generator(1), generator(2)])
    s, t = levels[:2].tolist()
    n = torch.stack([torch.randn(1, 4, 4, generator=generator(k)) for k in (1, 2)])
    d = 0.5 * (x + target)
    torch.testing.assert_close(found, d + t * ((1 - zeta) ** 0.5 * (x - d) / s + zeta**0.5 * n))
    renoise(lambda x, sigma: target, x, levels, generators=[generator(1), generator(2)], callback=lambda k, d: seen.append(k))
    assert seen == list(range(6))


def test_red_diff_rests_at_the_map_of_the_blurred_prior(lab: Laboratory) -> None:
    """At a constant level sigma with weight 1 / sigma^2: the MAP, for a Gaussian also the posterior mean, with covariance C + sigma^2."""
    likelihood, _, _ = noisy(lab, [1.0])
    sigma, count = 0.2, 16
    levels = torch.tensor([80.0, *[sigma] * 800, 0.0], dtype=torch.float64)
    generators, x = [generator(k) for k in range(count)], torch.zeros(count, 1, lab.n, lab.n, dtype=torch.float64)
    many = likelihood.take(torch.zeros(count, dtype=torch.long))
    precision = torch.linalg.inv(lab.covariance + sigma**2 * torch.eye(lab.n**2, dtype=torch.float64))
    residual = flat(likelihood.y)[0] - lab.mean * lab.matrix.sum(1)
    best = lab.mean + torch.linalg.solve(precision + lab.matrix.T @ lab.matrix / lab.s**2, lab.matrix.T @ residual / lab.s**2)
    found = red_diff(lab.prior, many, x, levels, weight=1 / sigma**2, rate=0.02, generators=generators)
    away = flat(found).mean(0) - best
    begin = lab.mean - best
    assert away.norm() < 0.05 * begin.norm()


# ---------------------------------------------------------------------------------------------------------- all by one function
class Words:
    """A likelihood in words only, as one that is not linear has them: y, shape, within, misfit and log_prob."""

    def __init__(self, other: Gaussian) -> None:
        self.y, self.shape, self.misfit, self.log_prob, self.within = other.y, other.shape, other.misfit, other.log_prob, other.within


class Saturated:
    """y = tanh(A u / 8) + s n: a detector that saturates."""

    def __init__(self, lab: Laboratory, x0: torch.Tensor, s: float) -> None:
        self.operator, self.s, self.shape = lab.operator, s, (1, lab.n, lab.n)
        self.y = torch.tanh(lab.operator(x0) / 8)
        self.y = self.y + s * torch.randn(self.y.shape, dtype=self.y.dtype, generator=generator(1))

    def within(self, u: torch.Tensor) -> torch.Tensor:
        return u

    def misfit(self, u: torch.Tensor) -> torch.Tensor:
        return ((self.y - torch.tanh(self.operator(u) / 8)) / self.s).square().flatten(1).sum(1)

    def log_prob(self, u: torch.Tensor) -> torch.Tensor:
        return -0.5 * self.misfit(u)


STEPS = {"dps": 400, "red-diff": 400, "reconstruction": 150, "diffpir": 50, "pigdm": 50, "ddnm": 50}
# In units of the posterior's deviation, D at sigma 80 being 2.26 away from the true posterior mean: how far the mean of 24 samples may be
# from it (their own scatter alone is 0.2), and how wide the samples may lie (1 is exact). An optimiser such as red-diff has no spread.
BOUNDS = {"pigdm": (0.3, 0.8, 1.0), "dds": (0.3, 0.85, 1.0), "diffpir": (0.4, 0.8, 1.0), "dps": (0.4, 0.75, 0.95),
          "ddnm": (0.65, 0.7, 0.9), "reconstruction": (0.65, 0.9, 1.15), "red-diff": (0.55, 0.0, 0.4)}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_near_the_posterior(lab: Laboratory, name: str) -> None:
    likelihood, _, _ = noisy(lab, [1.0])
    many, generators = likelihood.take(torch.zeros(24, dtype=torch.long)), [generator(100 + k) for k in range(24)]
    centre, variance = lab.posterior_mean(likelihood.y), float(lab.eigenvalues.mean())
    first = lab.prior(start((24, 1, lab.n, lab.n), 80.0, generators, dtype=torch.float64), torch.full((24,), 80.0, dtype=torch.float64))
    unguided = ((first - centre).square().mean() / variance) ** 0.5
    samples = sample_with(name, lab.prior, many, generators=generators, steps=STEPS.get(name))
    error = float(((samples.mean(0) - centre).square().mean() / variance) ** 0.5)
    ratio = float((samples.var(0).mean() / variance) ** 0.5)
    print(f"{name}: {error:.2f} from the mean (D: {unguided:.2f}), spread {ratio:.2f}, chi2 {many.chi2(samples).mean():.2f}")
    far, narrow, wide = BOUNDS[name]
    assert error < far < unguided and narrow < ratio < wide


def scan(size: int = 16, seen: torch.Tensor | None = None) -> Gaussian:
    """A complex MR measurement: four coils, every second line."""
    maps = coil_maps(1, 4, (size, size), generator())
    physics = encoding(patterns.equispaced((size, size), 2.0, generator=generator(1)), maps)
    operator = physics @ Complex((size, size))
    clean = operator(0.3 * torch.randn(1, 2, size, size, generator=generator(2)))
    noise = torch.view_as_complex(torch.randn((*clean.shape, 2), generator=generator(3)))
    y = clean + 0.02 * noise * (clean != 0)
    return Gaussian(Affine(operator, 1.0, 0.0), y, torch.full((1, 1, 1, 1), 0.02), Complex((size, size)).H @ WeightedAdjoint(physics),
                    seen=seen)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_complex_measurements(name: str) -> None:
    likelihood = scan()
    prior = lambda x, sigma: x * (0.09 / (0.09 + sigma.square()))[:, None, None, None]
    steps, count = [], 80 if name == "dps" else 30  # its step size is for a thousand
    images = sample_with(name, prior, likelihood, generators=[generator(0), generator(1)], steps=count,
                         callback=lambda k, _: steps.append(k))
    assert images.shape == (2, 2, 16, 16) and images.dtype == torch.float32 and torch.isfinite(images).all()
    blank = likelihood.misfit(torch.zeros_like(images[:1]))
    assert max(float(likelihood.misfit(image[None])) for image in images) < 0.5 * blank
    assert not images.requires_grad and len(steps) == 2 * (count - (name == "red-diff"))
    again = sample_with(name, prior, likelihood, generators=[generator(1)], steps=count)
    assert torch.equal(again[0], images[1])  # an image does not depend on the others


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not (method.linear or method.solves)])
def test_methods_by_gradient_take_any_likelihood(lab: Laboratory, name: str) -> None:
    x0 = lab.draw(1, generator(5))
    likelihood = Saturated(lab, x0, 0.03)
    images = sample_with(name, lab.prior, likelihood, generators=[generator(1)], steps=30)
    blank = torch.full_like(x0, lab.mean)
    assert torch.isfinite(images).all() and likelihood.misfit(images) < 0.5 * likelihood.misfit(blank)


@pytest.mark.parametrize("name", METHODS)
def test_where_no_coil_sees_the_image_is_zero(name: str) -> None:
    seen = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    seen[..., :5] = False
    flat = lambda x, sigma: torch.ones_like(x) + 0 * x  # a prior that paints everywhere, and can be gone back through
    image = sample_with(name, flat, scan(seen=seen), generators=[generator()], steps=4)
    assert (image[..., :5] == 0).all() and (image[..., 5:] != 0).all()


def test_diffpir_may_draw_all_of_its_noise_anew(lab: Laboratory) -> None:
    """zeta 1: t^2 - up^2 is zero, by rounding a little less."""
    likelihood, _, _ = noisy(lab, [1.0])
    image = sample_with("diffpir", lab.prior, likelihood, generators=[generator()], steps=20, zeta=1.0)
    assert image.is_floating_point() and torch.isfinite(image).all()


def test_mirrors_take_turns() -> None:
    ramp, mirrors = torch.arange(12.0).reshape(1, 1, 3, 4), ((), (-1,), (-2, -1))
    calls: list[torch.Tensor] = []
    denoiser = in_turns(lambda x, sigma: calls.append(x) or 2 * x + torch.arange(4.0), mirrors)
    answers = [denoiser(ramp, torch.ones(1)) for _ in range(4)]
    for call, answer, axes in zip(calls, answers, [*mirrors, ()], strict=True):
        assert torch.equal(call, ramp.flip(axes)) and torch.equal(answer, 2 * ramp + torch.arange(4.0).expand(1, 1, 3, 4).flip(axes))


def test_what_cannot_be_run(lab: Laboratory) -> None:
    likelihood, _, _ = noisy(lab, [1.0])
    with pytest.raises(ValueError, match="unknown method 'mcg': choose one of dps"):
        sample_with("mcg", lab.prior, likelihood, generators=[generator()])
    with pytest.raises(ValueError, match="dds has no setting zeta: choose from sd, iterations, eta"):
        sample_with("dds", lab.prior, likelihood, generators=[generator()], zeta=1.0)
    with pytest.raises(ValueError, match="pigdm solves with the likelihood.s curvature, which Words does not know"):
        sample_with("pigdm", lab.prior, Words(likelihood), generators=[generator()])


def test_the_levels_of_dps_are_the_linear_schedule() -> None:
    levels = vp_sigmas(1000, high=200.0)
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    torch.testing.assert_close(edm_to_vp(levels[:-1]).flip(0), (1 - beta).cumprod(0))
    short = vp_sigmas(10)
    assert len(short) == 11 and short[0] == pytest.approx(80, rel=0.01) and short[-2] == pytest.approx(0.01, rel=1e-3) and short[-1] == 0
    assert (short.diff() < 0).all()
