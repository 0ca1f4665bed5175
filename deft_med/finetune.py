"""Zero-shot training of the h-transform: one measurement, no pairs (arXiv 2406.01781, proposition G.1 and appendix G.3).

The reference process P is the prior's ancestral sampler on levels s_0 > s_1 > ... > s_n; the controlled process Q has D + u in the
place of D, with u = sigma^2 h(x, D, g, sigma, ...). From level s to t both are Gaussian with the same variance,

    x' = m(x, D + u) + t sqrt(a) z,     m(x, D) = D + (t / s)^2 (x - D),     a = 1 - (t / s)^2,

and both end in x0 = D(x, s_n). On a path, with v = x' - m(x, D) the step taken beyond the prior's, the log-weight

    L = ln dQ/dP - ln p(y | x0) = sum_k (u . v - a |u|^2 / 2) / t^2 - ln p(y | x0)

is the same on all paths under the optimal h: -ln p(y), but for the grid. Three objectives have that h as their minimiser:

    relative-entropy   E_Q[sum_k a |u|^2 / (2 t^2) - ln p(y | x0)] = KL(Q | posterior paths) - ln p(y)
    vargrad            Var[L] over recorded paths of any process; here Q itself with its control stopped
    balance            E[(L + ln Z)^2] over the same paths, ln Z learned along

The last two need no gradient through D, A or the path; on Q's own paths their gradient is in expectation twice that of the first,
but far noisier where Var[L] is large. All gradients here hold the graph of one step at a time.

On that slice below, where Var[L] starts at 1e13, the same 16 iterations with the last two take a third of the time and are a matter of
luck: balance reached 28.3 dB at a rate of 0.1 and stayed below 10 at 0.05 and 0.02, vargrad learned nothing at any of the three.

`online` is how a measurement is trained on: relative entropy, and of h the scalar weight w of the residual alone. On one CT slice of
128 x 128 (60 views, 3.5 % noise), 34 s on one core took a sample from 10 dB (h = 0) to 28, where the h of the bundle, trained on
pairs, has 30. 40 iterations found no more, nor did a fresh network trained along for three minutes at a rate of 1e-3; at 5e-3 samples
reached 29.5 dB while the cost stayed twice as high. From the bundle's h the cost falls by a quarter, and a sample loses 1 dB: on 16
levels the cheapest control is not the nearest to the posterior.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from deft_med.htransform import HTransform
from deft_med.likelihood import Gaussian
from deft_med.sample import ddim, start
from deft_med.schedule import SIGMA_MAX, Denoiser, sigmas

LEVELS, ITERATIONS = 17, 16  # of `online`
OBJECTIVES = ("relative-entropy", "vargrad", "balance")
Control = Callable[..., Tensor]  # (x, D, g, sigma (B,), s_img (B,), log_ratio) -> sigma^2 h: an `HTransform` or what has its face


@dataclass(frozen=True)
class Paths:
    """B recorded trajectories, without gradient: states x_0 ... x_n, and D, g = B(y - A D) and u at the first n of them."""

    levels: Tensor
    x: list[Tensor]
    d: list[Tensor]
    g: list[Tensor]
    u: list[Tensor]
    log_prob: Tensor
    x0: Tensor
    likelihood: Gaussian

    def step(self, k: int) -> tuple[float, float, float]:
        """s, t and a of step k."""
        s, t = self.levels[k].item(), self.levels[k + 1].item()
        return s, t, 1 - (t / s) ** 2

    def control(self, h: Control, k: int) -> Tensor:
        """u of step k under h, with its gradient."""
        return h(self.x[k], self.d[k], self.g[k], _at(self.levels[k], self.x[k]), self.likelihood.s_img, self.likelihood.log_ratio)

    def increment(self, k: int, u: Tensor) -> Tensor:
        """Step k's share of ln dQ/dP (B,) for the control u: (u . v - a |u|^2 / 2) / t^2."""
        s, t, a = self.step(k)
        v = self.x[k + 1] - _mean(self.x[k], self.d[k], s, t)
        return (u * (v - 0.5 * a * u)).flatten(1).sum(1) / t**2

    def cost(self) -> Tensor:
        """What each path paid (B,): sum_k a |u|^2 / (2 t^2) - ln p(y | x0)."""
        steps = zip(map(self.step, range(len(self.u))), self.u, strict=True)
        return sum((0.5 * a / t**2 * u.square().flatten(1).sum(1) for (_, t, a), u in steps), -self.log_prob)


def _at(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x).expand(len(x))


def _mean(x: Tensor, d: Tensor, s: float, t: float) -> Tensor:
    return d + (t / s) ** 2 * (x - d)


def rollout(prior: Denoiser, h: Control, likelihood: Gaussian, levels: Tensor, *, batch: int, generator: Generator) -> Paths:
    """Simulate the controlled process from levels[0] n; ValueError for several measurements, or levels that do not decrease to t > 0."""
    if len(likelihood.y) != 1:
        raise ValueError(f"fine-tuning is for one measurement, got {len(likelihood.y)}: choose one with likelihood.take")
    if levels.ndim != 1 or len(levels) < 2 or not (levels[1:] < levels[:-1]).all() or levels[-1] <= 0:
        raise ValueError(f"two or more levels that decrease and end above 0 (sigmas(...)[:-1]), got {levels.tolist()}")
    many = likelihood.take(torch.zeros(batch, dtype=torch.long, device=likelihood.y.device))
    seen, generators = [], [generator] * batch

    def controlled(x: Tensor, sigma: Tensor) -> Tensor:
        d = many.within(prior(x, sigma))
        g = many.residual(d)
        u = h(x, d, g, sigma, many.s_img, many.log_ratio)
        seen.append((x, d, g, u))
        return d + u

    with torch.no_grad():
        x = start((batch, *many.shape), float(levels[0]), generators, device=many.s_img.device, dtype=many.s_img.dtype)
        last = ddim(controlled, x, levels, eta=1.0, generators=generators)
        x0 = many.within(prior(last, _at(levels[-1], x)))
        states, d, g, u = (list(images) for images in zip(*seen, strict=True))
        return Paths(levels, [*states, last], d, g, u, many.log_prob(x0), x0, many)


def log_weight(paths: Paths, h: Control | None = None) -> Tensor:
    """L (B,) of recorded paths under h, with gradient through h alone; without h under the control that made them."""
    return sum((paths.increment(k, u if h is None else paths.control(h, k)) for k, u in enumerate(paths.u)), -paths.log_prob)


def log_variance(weights: Tensor) -> Tensor:
    """VarGrad's objective: the variance of L over the batch, without bias."""
    return weights.var()


def balance(weights: Tensor, ln_z: Tensor | float) -> Tensor:
    """Trajectory balance: mean of (L + ln Z)^2."""
    return (weights + ln_z).square().mean()


def weight_gradient(loss: Callable[[Tensor], Tensor], h: Control, paths: Paths, parameters: Sequence[Tensor],
                    steps: Iterable[int] | None = None) -> Tensor:
    """Add the gradient of loss(L) to the .grad of ``parameters``, step by step; returns the loss.

    dloss/dL is known from the paths: a step's share needs no other step, and of ``steps`` drawn uniformly (weighted with n over their
    number) the gradient is unbiased.
    """
    weights = log_weight(paths).requires_grad_()
    value = loss(weights)
    (slope,) = torch.autograd.grad(value, weights)
    chosen = list(range(len(paths.u)) if steps is None else steps)
    for k in chosen:
        (slope * paths.increment(k, paths.control(h, k)) * (len(paths.u) / len(chosen))).sum().backward(inputs=parameters)
    return value.detach()


def entropy_gradient(prior: Denoiser, h: Control, paths: Paths, parameters: Sequence[Tensor], steps: Iterable[int] | None = None) -> Tensor:
    """Add the gradient of the mean cost, through h's own paths, to the .grad of ``parameters``; returns the mean cost.

    A sweep carries dL/dx back from the end to the first of ``steps`` (as in `weight_gradient`, unbiased), evaluating each step again
    with its gradient. Of L's derivative only the part through the states is taken; what is left out has mean zero, and so under the
    optimal h no path gives a gradient (Roeder et al. 2017, arXiv 1703.09194).
    """
    chosen = set(range(len(paths.u)) if steps is None else steps)
    share, likelihood = len(paths.u) / len(chosen) / len(paths.x0), paths.likelihood
    x = paths.x[-1].detach().requires_grad_()
    (adjoint,) = torch.autograd.grad(-likelihood.log_prob(likelihood.within(prior(x, _at(paths.levels[-1], x)))).sum(), x)
    for k in range(len(paths.u) - 1, min(chosen) - 1, -1):
        s, t, a = paths.step(k)
        x = paths.x[k].detach().requires_grad_()
        d = likelihood.within(prior(x, _at(paths.levels[k], x)))
        u = h(x, d, likelihood.residual(d), _at(paths.levels[k], x), likelihood.s_img, likelihood.log_ratio)
        noise = paths.x[k + 1] - _mean(paths.x[k], paths.d[k] + paths.u[k], s, t)
        paid = 0.5 * a / t**2 * u.square().sum() + (adjoint * _mean(x, d + u, s, t)).sum()
        if k in chosen:
            (paid * share).backward(inputs=parameters, retain_graph=True)
        (adjoint,) = torch.autograd.grad(paid + (u * noise).sum() / t**2, x)
    return paths.cost().mean()


def finetune(prior: Denoiser, h: nn.Module, likelihood: Gaussian, *, objective: str = "relative-entropy", levels: Tensor, batch: int = 8,
             iterations: int = 100, lr: float = 1e-3, groups: Sequence[dict] | None = None, steps: int | None = None, seed: int = 0,
             clip: float = 1.0, progress: Callable[[dict], None] | None = None) -> list[dict]:
    """Train h in place for one measurement; returns a record per iteration, taken before its update, and calls ``progress`` with it.

    ``prior`` is D; h an `HTransform`, fresh or shipped, after ``requires_grad_(True)``; ``levels`` as ``sigmas(n)[:-1]``. With
    ``steps`` the gradient takes so many randomly drawn steps an iteration. Adam's ``lr``, or those of ``groups`` (Adam's own parameter
    groups, in the place of all of h's), fall to zero along half a cosine; gradients are clipped at norm ``clip``. Records hold
    ``objective``; whatever it is, ``cost`` (relative-entropy's), ``variance`` of L and ``ln_z``; ``evaluations`` of the prior so far;
    ``seconds``. Raises ValueError for what cannot be trained.
    """
    groups = [{"params": h.parameters()}] if groups is None else groups
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if not parameters:
        raise ValueError("h has nothing to train: call h.requires_grad_(True) on a loaded one")
    if batch < 2 or iterations < 1 or not (steps is None or 1 <= steps < len(levels)):
        raise ValueError(f"batch >= 2, iterations >= 1 and steps from 1 to {len(levels) - 1}, got {batch}, {iterations} and {steps}")
    generator, begun, n = Generator().manual_seed(seed), time.monotonic(), len(levels) - 1
    history, evaluations, ln_z = [], 0, torch.zeros(())
    optimiser = torch.optim.Adam(groups, lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for iteration in range(iterations):
        paths = rollout(prior, h, likelihood, levels, batch=batch, generator=generator)
        drawn = torch.randperm(n, generator=generator)[:steps].tolist() if steps else list(range(n))
        weights = log_weight(paths)
        ln_z = -weights.mean() if iteration == 0 or objective != "balance" else ln_z - 0.2 * (ln_z + weights.mean())  # descends balance
        optimiser.zero_grad(set_to_none=True)
        if objective == "relative-entropy":
            value = entropy_gradient(prior, h, paths, parameters, drawn)
        else:
            loss = log_variance if objective == "vargrad" else functools.partial(balance, ln_z=ln_z)
            value = weight_gradient(loss, h, paths, parameters, drawn)
        evaluations += batch * (n + 1 + (n + 1 - min(drawn) if objective == "relative-entropy" else 0))
        history.append({"iteration": iteration, "objective": float(value), "cost": float(paths.cost().mean()), "ln_z": float(ln_z),
                        "variance": float(weights.var()), "evaluations": evaluations, "seconds": time.monotonic() - begun})
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, clip)):
            optimiser.step()
        schedule.step()
        if progress is not None:
            progress(history[-1])
    return history


class Silent(nn.Module):
    """A network with nothing to say: what is left of its HTransform is w g."""

    def forward(self, x: Tensor, scalars: Tensor) -> Tensor:
        return torch.zeros_like(x[:, : x.shape[1] // 3])


def online(prior: Denoiser, h: HTransform | None, likelihood: Gaussian, *, iterations: int = ITERATIONS, seed: int = 0,
           objective: str = "relative-entropy", rates: tuple[float, float] = (0.1, 0.0),
           progress: Callable[[dict], None] | None = None) -> tuple[HTransform, list[dict]]:
    """An h for one measurement and the records of its training (`finetune`); the h that is given stays as it is.

    h is where it starts: a shipped one or, with None, a fresh one of w g alone, for which nothing but the prior was ever trained.
    ``rates`` are Adam's for w and for h's network; what has the rate 0 is not trained. 16 steps from sigma_max, pairs of paths:
    68 evaluations of the prior an iteration, half of them with a gradient. Raises ValueError as `finetune` does.
    """
    with torch.random.fork_rng(devices=[]):  # a fresh h is random within, and the same for the same seed
        torch.manual_seed(seed)
        tuned = HTransform(Silent(), sd=getattr(prior, "sd", 0.5)) if h is None else copy.deepcopy(h)
    tuned.to(likelihood.s_img)
    parts = zip((tuned.weight, tuned.network), rates, strict=True)
    groups = [{"params": list(part.requires_grad_(rate > 0).parameters()), "lr": rate} for part, rate in parts]
    levels = _levels(prior)
    history = finetune(prior, tuned, likelihood, objective=objective, levels=levels, batch=2, iterations=iterations, groups=groups,
                       seed=seed, progress=progress)
    return tuned.requires_grad_(False), history


def sample_online(prior: Denoiser, likelihood: Gaussian, *, generator: Generator, iterations: int = ITERATIONS, rate: float = 0.1,
                  seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """One image (1, C, ny, nx) by the h that `online` makes of nothing but the measurement, on the levels that it was trained on.

    ``progress(done, total)`` is called after every iteration and at the end, with evaluations of the prior.
    """
    total = online_evaluations(iterations)

    def tell(record: dict) -> None:
        if progress is not None:
            progress(4 * LEVELS * (record["iteration"] + 1), total)

    with torch.enable_grad():
        h, _ = online(prior, None, likelihood, iterations=iterations, rates=(rate, 0.0), seed=seed, progress=tell)
    image = rollout(prior, h, likelihood, _levels(prior), batch=1, generator=generator).x0
    if progress is not None:
        progress(total, total)
    return image


def unsuited(likelihood: object) -> str:
    """Why `online` cannot take a likelihood, or nothing."""
    return "" if isinstance(likelihood, Gaussian) else (
        f"deft-online was tried with linear forward models and Gaussian noise only, not {type(likelihood).__name__}")


def online_evaluations(iterations: int) -> int:
    """Of the prior, for one image of `sample_online`: pairs of paths out and back, and the image's own."""
    return LEVELS * (4 * iterations + 1)


def _levels(prior: Denoiser) -> Tensor:
    return sigmas(LEVELS, high=getattr(prior, "sigma_max", SIGMA_MAX))[:-1]
