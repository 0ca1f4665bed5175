"""Zero-shot training of h, checked where the optimal control and the evidence have closed forms: the Gaussian laboratory."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deft_med.finetune import (
    OBJECTIVES,
    Paths,
    balance,
    entropy_gradient,
    finetune,
    log_variance,
    log_weight,
    online,
    rollout,
    weight_gradient,
)
from deft_med.htransform import Deft, HTransform
from deft_med.likelihood import Gaussian
from deft_med.network import UNet
from deft_med.prior import Prior
from deft_med.schedule import sigmas
from deft_med.testing import Laboratory


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory.ct(n=8, views=4, relative_noise=0.1)


@pytest.fixture(scope="module")
def likelihood(lab: Laboratory) -> Gaussian:
    return lab.measure(lab.draw(1, generator()), generator(1))


def optimum(lab: Laboratory, likelihood: Gaussian):
    """The control of the closed form: u = E[x0 | x, y] - E[x0 | x]."""
    posterior = lab.posterior(likelihood.y)
    return lambda x, d, g, sigma, s_img, log_ratio: posterior(x, sigma) - d


def nothing(x: Tensor, d: Tensor, *_: object) -> Tensor:
    return torch.zeros_like(d)


def evidence(lab: Laboratory, likelihood: Gaussian) -> float:
    """ln p(y) with the constant that `Gaussian.log_prob` leaves out: y ~ N(A mean, A C A^T + s^2)."""
    spread = lab.matrix @ lab.covariance @ lab.matrix.T / lab.s**2 + torch.eye(len(lab.matrix), dtype=torch.float64)
    residual = (likelihood.y.flatten() - lab.mean * lab.matrix.sum(1)) / lab.s
    return float(-0.5 * residual @ torch.linalg.solve(spread, residual) - 0.5 * torch.logdet(spread))


def test_the_optimal_control_makes_the_log_weight_a_constant(lab: Laboratory, likelihood: Gaussian) -> None:
    """Var[L] falls like the grid's step to 0, where h = 0 leaves it at 1e5, and -L is the evidence."""
    paths = {n: rollout(lab.prior, optimum(lab, likelihood), likelihood, sigmas(n, low=0.02)[:-1], batch=200, generator=generator(2))
             for n in (25, 50, 200)}
    variance = {n: float(log_weight(p).var()) for n, p in paths.items()}
    alone = rollout(lab.prior, nothing, likelihood, sigmas(50, low=0.02)[:-1], batch=200, generator=generator(2))
    assert variance[50] < 1e-3 * log_weight(alone).var()
    assert variance[50] < 0.5 * variance[25] and variance[200] < 0.3 * variance[50]
    gap = {n: float(-log_weight(p).mean()) - evidence(lab, likelihood) for n, p in paths.items()}
    assert abs(gap[200]) < 0.75 and abs(gap[200]) < 0.4 * abs(gap[50]) < 0.4 * abs(gap[25])
    weighted = float(torch.logsumexp(-log_weight(paths[200]), 0)) - torch.tensor(200.0).log()
    assert weighted == pytest.approx(evidence(lab, likelihood), abs=0.3)  # by importance weights: the first-order grid's own share is left
    assert alone.cost() == pytest.approx(-alone.log_prob)
    # the relative entropy is the mean of L: the martingale between them has mean zero
    assert paths[200].cost().mean() == pytest.approx(float(log_weight(paths[200]).mean()), abs=1.0)


class Around(torch.nn.Module):
    """An affine h of three parameters, p0 u* + p1 c g + p2 c, c = sigma^2 / (1 + sigma^2): optimal at (1, 0, 0)."""

    def __init__(self, lab: Laboratory, likelihood: Gaussian, start: list[float]) -> None:
        super().__init__()
        self.best, self.p = optimum(lab, likelihood), torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor, d: Tensor, g: Tensor, sigma: Tensor, s_img: Tensor, log_ratio: float) -> Tensor:
        c = (sigma.square() / (1 + sigma.square()))[:, None, None, None]
        return self.p[0] * self.best(x, d, g, sigma, s_img, log_ratio) + c * (self.p[1] * g + self.p[2])


def gradient(objective: str, lab: Laboratory, h: torch.nn.Module, paths: Paths, steps: list[int] | None = None) -> Tensor:
    parameters = list(h.parameters())
    for p in parameters:
        p.grad = None
    if objective == "relative-entropy":
        entropy_gradient(lab.prior, h, paths, parameters, steps)
    else:
        loss = log_variance if objective == "vargrad" else functools.partial(balance, ln_z=float(-log_weight(paths).mean()))
        weight_gradient(loss, h, paths, parameters, steps)
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_vanish_at_the_optimum(objective: str, lab: Laboratory, likelihood: Gaussian) -> None:
    def norm(start: list[float], steps: int) -> float:
        h = Around(lab, likelihood, start)
        paths = rollout(lab.prior, h, likelihood, sigmas(steps, low=0.02)[:-1], batch=64, generator=generator(3))
        return float(gradient(objective, lab, h, paths).norm())

    coarse, fine = (norm([1.0, 0.0, 0.0], steps) for steps in (50, 100))
    assert fine < 0.05 * norm([0.5, 0.0, 0.0], 50) and coarse < 2e-3 * norm([0.0, 0.0, 0.0], 50)
    assert fine < 0.6 * coarse  # what is left is the grid's


def test_vargrad_is_twice_the_relative_entropy_on_its_own_paths(lab: Laboratory, likelihood: Gaussian) -> None:
    """In expectation: means over batches agree within their standard errors, which are small against the gradient itself."""
    h, levels = Around(lab, likelihood, [0.9, 0.02, 0.02]), sigmas(8, low=0.1)[:-1]
    found: dict[str, list[Tensor]] = {objective: [] for objective in OBJECTIVES}
    for seed in range(12):
        paths = rollout(lab.prior, h, likelihood, levels, batch=200, generator=generator(seed))
        for objective in OBJECTIVES:
            found[objective].append(gradient(objective, lab, h, paths))
    mean = {o: torch.stack(values).mean(0) for o, values in found.items()}
    error = {o: torch.stack(values).std(0) / len(values) ** 0.5 for o, values in found.items()}
    entropy = 2 * mean["relative-entropy"]
    for objective in ("vargrad", "balance"):
        assert ((mean[objective] - entropy).abs() < 4 * (error[objective] + 2 * error["relative-entropy"])).all()
        assert (error[objective] < 0.1 * entropy.norm()).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradients_are_those_of_autograd(objective: str, lab: Laboratory, likelihood: Gaussian) -> None:
    """A step at a time gives what one graph over all steps gives; single steps with their weight average to it: no bias."""
    h, levels = Around(lab, likelihood, [0.7, 0.05, -0.1]), sigmas(6, low=0.1)[:-1]
    paths = rollout(lab.prior, h, likelihood, levels, batch=16, generator=generator(4))
    full = gradient(objective, lab, h, paths)
    pairs = [gradient(objective, lab, h, paths, list(steps)) for steps in itertools.combinations(range(5), 2)]
    assert torch.allclose(torch.stack(pairs).mean(0), full, rtol=1e-9, atol=1e-9)
    assert max((pair - full).norm() for pair in pairs) > 0.01 * full.norm()
    h.zero_grad()
    if objective != "relative-entropy":
        weights = log_weight(paths, h)
        assert torch.allclose(weights, log_weight(paths))
        (log_variance(weights) if objective == "vargrad" else balance(weights, -weights.mean().detach())).backward()
    else:
        _through(lab, h, paths).backward()
    assert torch.allclose(h.p.grad, full, rtol=1e-6)


def _through(lab: Laboratory, h: torch.nn.Module, paths: Paths) -> Tensor:
    """The mean cost as one graph over all steps, with the zero-mean term that leaves the state derivative of L."""
    frozen = Around(lab, paths.likelihood.take(torch.tensor([0])), h.p.tolist()).requires_grad_(False)
    x, total = paths.x[0], 0.0
    for k in range(len(paths.u)):
        s, t, a = paths.step(k)
        v_noise = paths.x[k + 1] - (1 - a) * paths.x[k] - a * (paths.d[k] + paths.u[k])
        sigma = torch.full((len(x),), s, dtype=x.dtype)
        d = lab.prior(x, sigma)
        seen = (x, d, paths.likelihood.residual(d), sigma, paths.likelihood.s_img, 0.0)
        u, fixed = h(*seen), frozen(*seen)
        after = (1 - a) * x + a * (d + u) + v_noise
        v = after - (1 - a) * x - a * d
        total = total + (fixed * v - 0.5 * a * fixed.square()).flatten(1).sum(1) / t**2
        x = after
    x0 = lab.prior(x, torch.full((len(x),), float(paths.levels[-1]), dtype=x.dtype))
    return (total - paths.likelihood.log_prob(x0)).mean()


class Gains(torch.nn.Module):
    """An affine h with a gain per level and singular value of A, and its share of sigma known: a white prior wants all gains at 1."""

    def __init__(self, lab: Laboratory, levels: Tensor) -> None:
        super().__init__()
        self.levels, self.lab = levels, lab
        self.values, self.vectors = torch.linalg.eigh(lab.matrix.T @ lab.matrix)
        self.gain = torch.nn.ParameterList(torch.zeros(len(self.values), dtype=torch.float64) for _ in levels[:-1])

    def forward(self, x: Tensor, d: Tensor, g: Tensor, sigma: Tensor, s_img: Tensor, log_ratio: float) -> Tensor:
        gain, level = self.gain[int((self.levels - sigma[0]).abs().argmin())], float(sigma[0])
        r2 = level**2 * self.lab.sd**2 / (level**2 + self.lab.sd**2)
        return (g.flatten(1) @ self.vectors * gain / (self.values + self.lab.s**2 / r2) @ self.vectors.T).reshape(x.shape)


@pytest.mark.parametrize(("objective", "batch"), [("relative-entropy", 16), ("vargrad", 64),
                                                  pytest.param("balance", 64, marks=pytest.mark.slow)])
def test_training_reaches_the_closed_form(objective: str, batch: int) -> None:
    """From h = 0, on one measurement: the posterior mean within a fifth of the prior's error, the cost within 2 of the closed form's."""
    ct = Laboratory.ct(n=8, views=4)
    lab = Laboratory(ct.operator, ct.operator.H, 0.6, length=0.0)
    likelihood, levels = lab.measure(lab.draw(1, generator()), generator(1)), sigmas(15, high=5.0, low=0.1)[:-1]
    h = Gains(lab, levels)
    history = finetune(lab.prior, h, likelihood, objective=objective, levels=levels, batch=batch, iterations=80, lr=0.15)
    trained, best = (rollout(lab.prior, control, likelihood, levels, batch=1000, generator=generator(9))
                     for control in (h, optimum(lab, likelihood)))
    mean = lab.posterior_mean(likelihood.y)[0]
    error, before = ((image - mean).square().mean().sqrt() for image in (trained.x0.mean(0), torch.full_like(mean, lab.mean)))
    assert error < 0.2 * before
    assert trained.cost().mean() < best.cost().mean() + 2
    assert history[-1]["cost"] < 0.5 * history[0]["cost"]
    if objective == "relative-entropy":  # the cost itself; the others fall to 0
        assert history[-1]["objective"] == pytest.approx(history[-1]["cost"])
    else:
        assert history[-1]["objective"] < 0.05 * history[0]["objective"]
    assert history[-1]["ln_z"] == pytest.approx(evidence(lab, likelihood), abs=10)
    assert history[-1]["evaluations"] == 80 * batch * len(levels) * (2 if objective == "relative-entropy" else 1)


def test_online_learns_the_weight_of_the_residual_for_one_measurement() -> None:
    """From nothing, under the exact prior: nearly all of the cost above the evidence goes, and paths end around the posterior mean."""
    lab = Laboratory.ct(n=16, views=12, window="hann")
    likelihood = lab.measure(lab.draw(1, generator()), generator(1))
    h, history = online(lab.prior, None, likelihood, iterations=16)
    levels, mean = sigmas(17)[:-1], lab.posterior_mean(likelihood.y)[0]
    trained, alone, best = (rollout(lab.prior, control, likelihood, levels, batch=50, generator=generator(9))
                            for control in (h, nothing, optimum(lab, likelihood)))
    spent, before, least = (float(paths.cost().mean()) for paths in (trained, alone, best))
    assert spent - least < 0.1 * (before - least)
    error, apart = (float((paths.x0.mean(0) - mean).square().mean().sqrt()) for paths in (trained, alone))
    assert error < 0.4 * apart
    assert [record["evaluations"] for record in history] == [68 * (k + 1) for k in range(16)]
    assert not any(p.requires_grad for p in h.parameters())


def test_online_starts_from_a_shipped_h_and_leaves_it_alone(lab: Laboratory, likelihood: Gaussian) -> None:
    shipped = HTransform(network_of(0)).double().requires_grad_(False)
    before = [p.clone() for p in shipped.parameters()]
    for rates in ((0.1, 0.0), (0.1, 1e-3)):
        tuned, _ = online(lab.prior, shipped, likelihood, iterations=2, rates=rates)
        changed = [not all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
                   for old, new in ((shipped.weight, tuned.weight), (shipped.network, tuned.network))]
        assert changed == [rate > 0 for rate in rates]
    assert all(torch.equal(p, q) for p, q in zip(shipped.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="nothing to train"):
        online(lab.prior, shipped, likelihood, rates=(0.0, 0.0))


@pytest.mark.slow
@pytest.mark.data
def test_online_on_a_patient_beats_the_unconditional_start(data_dir: Path) -> None:
    """One tune slice at 128 x 128, 60 views, 3.5 % noise: about a minute on one core, without any h that was trained on pairs."""
    from deft_med import bundle
    from deft_med.config import Noise, Protocol
    from deft_med.metrics import ct_metrics
    from deft_med.network import use_half
    from deft_med.problem import pose
    from deft_med.simulate import simulate
    from deft_med.study import chosen_slices
    from deft_med.subjects import entries

    listed = [e for e in entries(data_dir, data_dir / "ct_manifest.json", "tune") if "ct512/" in e["image"]]
    (_, volume), = chosen_slices([e for e in listed if e["subject"] == listed[0]["subject"]], 1)
    scan = simulate(volume, Protocol(name="sparse", views=60, noise=Noise(gaussian_percent=3.5), grid=128))
    model = bundle.load_model("ct")
    use_half(model.deft, "cpu")
    problem, prior = pose(scan, filter=model.filter), model.deft.prior
    h, history = online(prior, None, problem.likelihood)

    def sampled(control) -> tuple[float, float]:
        paths = rollout(prior, control, problem.likelihood, sigmas(17)[:-1], batch=2, generator=generator(9))
        return float(paths.cost().mean()), ct_metrics(problem.picture(paths.x0[:1]), scan.reference.data)["psnr"][0]

    (before, start), (after, reached), (_, shipped) = (sampled(control) for control in (nothing, h, model.deft.h))
    print(f"cost {before:.3g} -> {after:.5g}, one sample {start:.1f} -> {reached:.1f} dB (shipped h {shipped:.1f}), "
          f"{history[-1]['evaluations']} evaluations, {history[-1]['seconds']:.0f} s")
    assert after < 0.01 * before and reached > start + 12 and reached > shipped - 4


def test_an_h_of_the_house_trains_on_a_few_drawn_steps() -> None:
    """A fresh HTransform over a frozen network prior: float32, a subset of steps, its records, and the prior untouched."""
    torch.manual_seed(0)
    network = UNet(1, 1, (8, 8))
    torch.nn.init.normal_(network.outlet.weight, std=0.05)
    prior, h, lab = Prior(network).freeze(), HTransform(UNet(3, 1, (8, 8), scalars=3)), Laboratory.ct(n=12, views=6)
    y = lab.measure(lab.draw(1, generator()), generator(1)).y
    likelihood = Gaussian(lab.given(y).forward, y.float(), torch.full((1, 1, 1, 1), lab.s), lab.inverse)
    kept, seen = [p.clone() for p in prior.parameters()], []
    for objective in OBJECTIVES:
        history = finetune(prior, h, likelihood, objective=objective, levels=sigmas(6)[:-1], batch=3, iterations=2, steps=2,
                           lr=1e-2, progress=seen.append)
        assert [record["iteration"] for record in history] == [0, 1] and history == seen[-2:]
    assert all(torch.equal(p, before) for p, before in zip(prior.parameters(), kept, strict=True))
    assert all(p.grad is not None and torch.isfinite(p).all() for p in h.parameters())
    again = [finetune(prior, torch.nn.Module.requires_grad_(HTransform(network_of(0))), likelihood, levels=sigmas(5)[:-1], batch=2,
                      iterations=2)[-1]["objective"] for _ in range(2)]
    assert again[0] == again[1]
    x = torch.randn(1, 1, 12, 12, generator=generator())
    assert Deft(prior, h)(x, torch.tensor([1.0]), likelihood).shape == x.shape


def network_of(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(3, 1, (8, 8), scalars=3)


def test_what_cannot_be_trained_is_said(lab: Laboratory, likelihood: Gaussian) -> None:
    h, levels = Around(lab, likelihood, [0.0, 0.0, 0.0]), sigmas(4)[:-1]
    train = functools.partial(finetune, lab.prior, h, likelihood, levels=levels)
    with pytest.raises(ValueError, match="choose one of relative-entropy, vargrad, balance"):
        train(objective="kl")
    with pytest.raises(ValueError, match="iterations >= 1 and steps from 1 to 3, got 1, 100 and None"):
        train(batch=1)
    with pytest.raises(ValueError, match="got 8, 100 and 4"):
        train(steps=4)
    with pytest.raises(ValueError, match="end above 0"):
        finetune(lab.prior, h, likelihood, levels=sigmas(4))
    with pytest.raises(ValueError, match="one measurement, got 2"):
        rollout(lab.prior, h, likelihood.take(torch.tensor([0, 0])), levels, batch=2, generator=generator())
    with pytest.raises(ValueError, match="nothing to train"):
        finetune(lab.prior, h.requires_grad_(False), likelihood, levels=levels)
