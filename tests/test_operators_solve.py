"""Solvers against direct solutions, and total variation against what its optimum must satisfy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from operators.ct import RayTransform
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles
from operators.linear import LinearOperator
from operators.solve import cg, power_norm, sirt
from operators.variational import _divergence, _gradient, tv

GRID = Grid(shape=(20, 24), spacing=(1.5, 1.5))
RAYS = RayTransform(GRID, ParallelBeam(angles=uniform_angles(40), detectors=33, pitch=1.4))


class Identity(LinearOperator):
    def __init__(self, shape=(20, 24), dtype=torch.float32):
        super().__init__(shape, shape, dtype, dtype)

    def _forward(self, x):
        return x.clone()

    _adjoint = _forward


def dense(operator):
    size = math.prod(operator.domain_shape)
    return operator(torch.eye(size, dtype=torch.float64).reshape(size, *operator.domain_shape)).reshape(size, -1).T


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SYSTEM = RAYS.gram + 3.0 * Identity()


def test_cg_solves_each_item_by_itself():
    b = drawn(2, 3, *GRID.shape) * torch.tensor([1.0, 1e-6, 1e6]).view(3, 1, 1)
    b[1, 0] = 0
    x = cg(SYSTEM, b, iterations=600, tolerance=1e-11)
    expected = torch.linalg.solve(dense(SYSTEM), b.reshape(6, -1).T).T.reshape(b.shape)
    for got, wanted in zip(x.reshape(6, -1), expected.reshape(6, -1), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    alone = cg(SYSTEM, b[0, 2], iterations=600, tolerance=1e-11)
    torch.testing.assert_close(alone, x[0, 2], rtol=1e-8, atol=1.0)
    assert torch.equal(cg(SYSTEM, b, x, iterations=5, tolerance=1e-6), x)  # a solution is left alone


def test_cg_is_differentiable():
    b = drawn(*GRID.shape).requires_grad_()
    v = drawn(*GRID.shape, seed=1)
    (gradient,) = torch.autograd.grad((cg(SYSTEM, b, iterations=300, tolerance=1e-12) * v).sum(), b)
    torch.testing.assert_close(gradient, cg(SYSTEM, v, iterations=300, tolerance=1e-12), rtol=1e-5, atol=1e-7)


def test_sirt_reaches_the_data():
    truth = torch.rand(2, *GRID.shape)
    y = RAYS(truth)
    x = sirt(RAYS, y, iterations=300, relaxation=1.9, lower=0.0)
    assert float((RAYS(x) - y).norm() / y.norm()) < 5e-3
    assert float(x.min()) >= 0
    assert torch.equal(sirt(RAYS, y, x, iterations=0), x)


def test_power_norm():
    assert power_norm(RAYS) == pytest.approx(float(torch.linalg.matrix_norm(dense(RAYS), 2)), rel=1e-4)


def test_solvers_are_checked():
    b = torch.zeros(GRID.shape)
    with pytest.raises(ValueError, match="cg needs an operator of a space to itself"):
        cg(RAYS, b)
    with pytest.raises(ValueError, match=r"x0 must be shaped \(20, 24\), got \(3,\)"):
        cg(SYSTEM, b, torch.zeros(3))
    with pytest.raises(ValueError, match="iterations must not be negative, got -1"):
        cg(SYSTEM, b, iterations=-1)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        cg(SYSTEM, b, tolerance=-1.0)
    with pytest.raises(ValueError, match="relaxation must lie in"):
        sirt(RAYS, torch.zeros(RAYS.range_shape), relaxation=2.0)


def phantom():
    x, y = np.meshgrid(GRID.x, GRID.y)
    return torch.from_numpy((np.hypot(x, y) < 12) * 1.0 + (np.hypot(x - 4, y + 3) < 4) * 0.5)


def objective(operator, x, y, weight, sigma, dims=(-2, -1)):
    return 0.5 * (((operator(x) - y) / sigma) ** 2).sum(dims) + weight * _gradient(x).pow(2).sum(0).sqrt().sum(dims)


@pytest.mark.parametrize("lower", [None, 0.0])
@pytest.mark.parametrize("uneven", [False, True])
def test_tv_reaches_the_minimum_that_its_gap_promises(lower, uneven):
    sigma = 0.5 * (1 + uneven * torch.rand(RAYS.range_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    y = RAYS(phantom()) + sigma * drawn(2, *RAYS.range_shape)
    weight = torch.tensor([5.0, 20.0])
    rough, record = tv(RAYS, y, weight, sigma=sigma, lower=lower, tolerance=3e-2, max_iterations=2000)
    fine, exact = tv(RAYS, y, weight, sigma=sigma, lower=lower, tolerance=1e-4, max_iterations=20_000)
    assert record.converged and exact.converged and exact.iterations > record.iterations
    assert record.gap.shape == (2,) and float(record.gap.max()) <= 3e-2
    values = [objective(RAYS, x, y, weight.double(), sigma) for x in (rough, fine)]
    torch.testing.assert_close(values[0], record.objective, rtol=1e-9, atol=0)
    assert (values[0] - values[1] <= record.gap * values[0]).all()
    for seed in range(4):  # no direction goes down
        step = 1e-3 * drawn(*GRID.shape, seed=seed)
        moved = fine + step if lower is None else (fine + step).clamp(min=lower)
        assert (objective(RAYS, moved, y, weight.double(), sigma) > values[1] * (1 - 1e-4)).all()
    if lower is not None:
        assert float(fine.min()) >= lower


def test_tv_does_not_depend_on_the_unit_or_the_batch():
    y = (RAYS(phantom()) + 0.5 * drawn(3, 1, *RAYS.range_shape)).float()
    x, _ = tv(RAYS, y, 10.0, sigma=0.5, tolerance=1e-3, max_iterations=3000)
    assert x.shape == (3, 1, *GRID.shape)
    scaled, _ = tv(0.01 * RAYS, y, 0.1, sigma=0.5, tolerance=1e-3, max_iterations=3000)
    assert float((0.01 * scaled - x).norm() / x.norm()) < 2e-3
    alone, _ = tv(RAYS, y[1, 0], 10.0, sigma=0.5, tolerance=1e-3, max_iterations=3000)
    assert float((alone - x[1, 0]).norm() / x[1, 0].norm()) < 1e-4
    _, warm = tv(RAYS, y, 10.0, sigma=0.5, tolerance=3e-2, x0=x)
    _, cold = tv(RAYS, y, 10.0, sigma=0.5, tolerance=3e-2)
    assert warm.iterations <= cold.iterations


def test_tv_denoises_complex_images():
    truth = phantom().float() * (1 + 1j)
    noisy = truth + 0.2 * torch.randn(GRID.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    clean, record = tv(Identity(dtype=torch.complex64), noisy, 0.15, tolerance=1e-2, max_iterations=2000)
    assert record.converged
    assert (clean - truth).abs().norm() < 0.6 * (noisy - truth).abs().norm()


def test_tv_says_when_it_did_not_converge():
    y = RAYS(phantom()) + drawn(*RAYS.range_shape)
    _, record = tv(RAYS, y, 1.0, tolerance=1e-9, max_iterations=3)
    assert not record.converged and record.iterations == 3 and float(record.gap) > 1e-9


def test_gradient_and_divergence_are_adjoint():
    x, p = drawn(7, 5), drawn(2, 7, 5, seed=1)
    assert float((_gradient(x) * p).sum()) == pytest.approx(float((x * _divergence(p)).sum()))


def test_tv_is_checked():
    y = torch.zeros(RAYS.range_shape)
    with pytest.raises(ValueError, match="image domain of two axes"):
        tv(Identity((5,)), torch.zeros(5), 1.0)
    with pytest.raises(ValueError, match="weight and sigma must be positive"):
        tv(RAYS, y, 0.0)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        tv(RAYS, y, 1.0, tolerance=0.0)
    with pytest.raises(ValueError, match=r"x0 must be shaped \(20, 24\)"):
        tv(RAYS, y, 1.0, x0=torch.zeros(3))
    with pytest.raises(ValueError, match="a complex image has no lower bound"):
        tv(Identity(dtype=torch.complex64), torch.zeros(GRID.shape, dtype=torch.complex64), 1.0, lower=0.0)


def test_tv_of_a_fan_beam_scan():
    fan = FanBeam(angles=uniform_angles(40, 2 * math.pi), detectors=40, pitch=2.0, source_origin=90.0, origin_detector=40.0)
    operator = RayTransform(GRID, fan)
    y = operator(phantom().float()) + 0.3 * drawn(*fan.shape).float()
    x, record = tv(operator, y, 3.0, sigma=0.3, lower=0.0)
    assert record.converged
    assert float((x - phantom()).norm() / phantom().norm()) < 0.25
