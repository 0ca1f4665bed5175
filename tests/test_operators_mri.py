"""MRI operators: the contract, the textbook formula, the fused against the composed, and the approximate inverse."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from operators import _nufft, patterns
from operators.geometry import Cartesian, Trajectory
from operators.mri import CartesianMRI, Coils, Complex, Fourier, Mask, NonCartesianMRI
from operators.sense import SenseInverse, WeightedAdjoint, density, root_sum_of_squares
from operators.solve import cg, cg_sense
from operators.testing import check_operator

ODD, EVEN, MIXED = (21, 25), (22, 26), (24, 15)
C64, C128 = torch.complex64, torch.complex128


def coils(shape, count=4, turn=0.0):
    """Smooth maps of unit sum of squares, (count, ny, nx)."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    near = [torch.exp(-((y - 1.2 * math.sin(a)) ** 2 + (x - 1.2 * math.cos(a)) ** 2) / 2) for a in angles]
    maps = torch.stack([torch.polar(n, a + x * math.cos(a) + y * math.sin(a)) for n, a in zip(near, angles, strict=True)])
    return maps / root_sum_of_squares(maps)


def lines(shape, axis=1):
    return patterns.equispaced(shape, 2, axis=axis)


def points(shape):
    return patterns.poisson_disc(shape, 3, calibration=(4, 4), generator=torch.Generator().manual_seed(0))


def several(shape):
    """Maps and masks of three acquisitions."""
    return torch.stack([coils(shape, turn=t) for t in (0.0, 0.4, 0.9)]), torch.stack(
        [torch.from_numpy(p.mask) for p in (lines(shape), points(shape), lines(shape, 0))]
    ).unsqueeze(1)


def batched(shape):
    maps, masks = several(shape)
    return CartesianMRI(masks, maps)


CARTESIAN = {
    "complex": lambda: Complex(MIXED),
    "fourier, odd": lambda: Fourier(ODD),
    "fourier, even": lambda: Fourier(EVEN),
    "fourier, mixed, coils": lambda: Fourier((2, *MIXED)),
    "mask": lambda: Mask(points(MIXED)),
    "coils": lambda: Coils(coils(MIXED)),
    "cartesian, odd": lambda: CartesianMRI(points(ODD), coils(ODD)),
    "cartesian, even": lambda: CartesianMRI(lines(EVEN), coils(EVEN, 1)),
    "cartesian, mixed": lambda: CartesianMRI(lines(MIXED, 0), coils(MIXED)),
    "cartesian, one coil": lambda: CartesianMRI(points(EVEN)),
    "composed": lambda: Mask(points(ODD), 4) @ Fourier((4, *ODD)) @ Coils(coils(ODD)),
    "gram, points": lambda: CartesianMRI(points(MIXED), coils(MIXED)).gram,
    "gram, columns": lambda: CartesianMRI(lines(ODD), coils(ODD)).gram,
    "gram, rows": lambda: CartesianMRI(lines(EVEN, 0), coils(EVEN)).gram,
    "two channels": lambda: CartesianMRI(lines(MIXED), coils(MIXED)) @ Complex(MIXED),
    "two channels, gram": lambda: (CartesianMRI(lines(MIXED), coils(MIXED)) @ Complex(MIXED)).gram,
    "batched": lambda: batched(ODD),
    "batched, gram": lambda: batched(MIXED).gram,
    "batched maps": lambda: CartesianMRI(lines(EVEN), several(EVEN)[0]),
    "batched masks": lambda: CartesianMRI(several(EVEN)[1].squeeze(1), coils(EVEN)) @ Complex(EVEN),
    "batched, composed": lambda: Mask(several(ODD)[1], 4) @ Fourier((4, *ODD)) @ Coils(several(ODD)[0]),
    "inverse": lambda: WeightedAdjoint(CartesianMRI(points(MIXED), 2 * coils(MIXED))),
    "inverse, two channels": lambda: Complex(ODD).H @ WeightedAdjoint(CartesianMRI(points(ODD), coils(ODD))),
    "inverse, batched": lambda: WeightedAdjoint(batched(EVEN)),
    "sense inverse": lambda: SenseInverse(CartesianMRI(points(MIXED), 2 * coils(MIXED))),
    "sense inverse, batched": lambda: Complex(EVEN).H @ SenseInverse(batched(EVEN)),
}
NUFFT = {
    "radial": lambda: NonCartesianMRI(patterns.radial(ODD, 11), coils(ODD)),
    "spiral": lambda: NonCartesianMRI(patterns.spiral(EVEN, 3), coils(EVEN)),
    "one coil": lambda: NonCartesianMRI(patterns.radial(MIXED, 11)),
    "gram": lambda: NonCartesianMRI(patterns.radial(MIXED, 11), coils(MIXED)).gram,
    "batched": lambda: NonCartesianMRI(patterns.radial(MIXED, 11), several(MIXED)[0]),
    "batched, gram": lambda: NonCartesianMRI(patterns.radial(ODD, 11), several(ODD)[0]).gram,
    "two channels": lambda: NonCartesianMRI(patterns.radial(EVEN, 11), coils(EVEN)) @ Complex(EVEN),
    "inverse": lambda: WeightedAdjoint(NonCartesianMRI(patterns.radial(ODD, 11), coils(ODD))),
}


@pytest.mark.parametrize("name", CARTESIAN)
def test_contract(name):
    check_operator(CARTESIAN[name](), tolerance=1e-6)


@pytest.mark.parametrize("name", NUFFT)
def test_contract_off_the_grid(name):
    pytest.importorskip("finufft")
    check_operator(NUFFT[name](), tolerance=1e-6)


def matrix(shape, k):
    """The textbook sum: exp(-i k . r) / sqrt(ny nx), complex128 (samples, pixels)."""
    r = np.argwhere(np.ones(shape)) - (shape[0] // 2, shape[1] // 2)
    return torch.from_numpy(np.exp(-1j * (k.astype(float) @ r.T)) / math.sqrt(math.prod(shape)))


def grid(shape):
    return 2 * np.pi * (np.argwhere(np.ones(shape)) - (shape[0] // 2, shape[1] // 2)) / shape


@pytest.mark.parametrize("shape", [ODD, EVEN, MIXED, (1, 7), (2, 3)])
def test_the_transform_is_the_textbook_sum_and_unitary(shape):
    x = torch.randn(2, *shape, dtype=C128)
    y = Fourier(shape)(x)
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ matrix(shape, grid(shape)).T)
    torch.testing.assert_close(Fourier(shape).H(y), x)
    torch.testing.assert_close(torch.linalg.vector_norm(y), torch.linalg.vector_norm(x))
    delta = torch.zeros(shape, dtype=C64)
    delta[shape[0] // 2, shape[1] // 2] = 1
    torch.testing.assert_close(Fourier(shape)(delta), torch.full(shape, 1 / math.sqrt(math.prod(shape)), dtype=C64))


@pytest.mark.parametrize("shape", [ODD, EVEN, MIXED])
@pytest.mark.parametrize("pattern", [lines, points, lambda s: lines(s, 0)], ids=["columns", "points", "rows"])
def test_the_fused_operator_is_the_composition(shape, pattern):
    maps = coils(shape)
    fused, composed = CartesianMRI(pattern(shape), maps), Mask(pattern(shape), 4) @ Fourier((4, *shape)) @ Coils(maps)
    for dtype, tolerance in ((C64, 1e-6), (C128, 1e-12)):
        x = torch.randn(3, *shape, dtype=dtype)
        assert relative(fused(x), composed(x)) < tolerance
        assert relative(fused.gram(x), composed.H(composed(x))) < tolerance
        assert relative(fused.H(fused(x)), composed.H(composed(x))) < tolerance
    assert not fused(x)[..., ~torch.from_numpy(pattern(shape).mask)].any()
    assert fused.norm() <= 1 + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_adjoint_gap_in_complex64(seed):
    shape = (101, 120)
    assert CartesianMRI(points(shape), coils(shape)).adjoint_error(seed) < 1e-6
    pytest.importorskip("finufft")
    assert NonCartesianMRI(patterns.radial(shape, 30), coils(shape)).adjoint_error(seed) < 1e-6


def test_two_channels_are_a_complex_image():
    shape = MIXED
    A = CartesianMRI(lines(shape), coils(shape))
    x = torch.randn(3, 2, *shape, requires_grad=True)
    y = (A @ Complex(shape))(x)
    torch.testing.assert_close(y, A(torch.view_as_complex(x.movedim(1, -1).contiguous())))
    data = y.detach() + 0.1 * torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y - data).abs().square().sum() / 2, x)
    expected = A.H((y - data).detach())
    assert relative(gradient, torch.stack([expected.real, expected.imag], dim=1)) < 1e-5
    z = torch.randn(shape, dtype=C64, requires_grad=True)
    (gradient,) = torch.autograd.grad((A(z) - data[0]).abs().square().sum() / 2, z)
    assert relative(gradient, A.H((A(z) - data[0]).detach())) < 1e-5
    torch.testing.assert_close(Complex(shape).H(Complex(shape)(x)), x)


def test_every_item_of_a_batch_has_its_own_maps_and_mask():
    maps, masks = several(ODD)
    together = CartesianMRI(masks, maps)
    assert together.batch_shape == (3,) and together.domain_shape == ODD
    x = torch.randn(2, 3, *ODD, dtype=C64)
    y = together(x)
    for i in range(3):
        alone = CartesianMRI(masks[i, 0], maps[i])
        assert torch.equal(y[:, i], alone(x[:, i]))
        assert torch.equal(together.H(y)[:, i], alone.H(y[:, i]))
        torch.testing.assert_close(together.gram(x)[:, i], alone.gram(x[:, i]))
        torch.testing.assert_close(WeightedAdjoint(together)(y)[:, i], WeightedAdjoint(alone)(y[:, i]))
    with pytest.raises(
        ValueError, match=r"CartesianMRI has its own physics for each of \(3,\) items and takes shape \(\*batch, 3, 21, 25\)"
    ):
        together(x[0, 0])
    with pytest.raises(ValueError, match=r"carries \(3,\) items, CartesianMRI carries \(2,\)"):
        together + CartesianMRI(masks[:2], maps[:2])
    assert together.norm() == pytest.approx(max(CartesianMRI(masks[i, 0], maps[i]).norm() for i in range(3)), rel=1e-3)


def test_the_state_follows_the_device_and_survives_a_copy():
    operator = CartesianMRI(lines(EVEN), coils(EVEN))
    again, x = copy.deepcopy(operator), torch.randn(EVEN, dtype=C64)
    assert torch.equal(again.gram(x), operator.gram(x))
    for one in [again, again.gram, WeightedAdjoint(again), Fourier(EVEN)]:
        assert {b.device.type for b in one.to("meta").buffers()} == {"meta"}
    assert "4 coils, 22 x 26" in repr(operator)


@pytest.mark.parametrize("shape", [ODD, EVEN, MIXED])
def test_off_the_grid_it_is_the_textbook_sum(shape):
    pytest.importorskip("finufft")
    trajectory, maps = patterns.radial(shape, 9), coils(shape)
    operator = NonCartesianMRI(trajectory, maps)
    x = torch.randn(2, *shape, dtype=C128)
    expected = (x.unsqueeze(1) * maps).flatten(-2) @ matrix(shape, trajectory.points).T
    assert relative(operator(x.to(C64)), expected) < 1e-4
    assert relative(operator(x), expected) < 1e-8
    assert relative(operator.gram(x), operator.H(operator(x))) < 1e-8
    assert relative(operator.gram(x.to(C64)), operator.H(operator(x))) < 1e-5
    assert relative(NonCartesianMRI(trajectory, maps, eps=1e-6)(x.to(C64)), expected) < 1e-5
    y = operator(x.to(C64))
    assert torch.equal(operator(x[1].to(C64)), y[1]), "an image does not depend on its batch"
    assert "4 coils" in repr(copy.deepcopy(operator))


def test_on_the_grid_the_two_agree():
    pytest.importorskip("finufft")
    trajectory, maps = Trajectory.of(MIXED, grid(MIXED)), coils(MIXED)
    x = torch.randn(MIXED, dtype=C64)
    y = CartesianMRI(Cartesian.of(np.ones(MIXED, dtype=bool)), maps)(x)
    assert relative(NonCartesianMRI(trajectory, maps)(x), y.flatten(-2)) < 1e-4
    assert density(trajectory) == pytest.approx(1.0, abs=1e-3)


def test_plans_are_shared():
    pytest.importorskip("finufft")
    trajectory = patterns.radial((12, 13), 5)
    for turn in (0.0, 1.0):
        operator = NonCartesianMRI(trajectory, coils((12, 13), turn=turn))
        before = _nufft.plan.cache_info()
        operator(torch.zeros(12, 13, dtype=C64))
    assert _nufft.plan.cache_info().hits == before.hits + 1


def disk(shape):
    y, x = torch.meshgrid(*(torch.arange(n) - n // 2 for n in shape), indexing="ij")
    return torch.sigmoid((0.3 * min(shape) - torch.hypot(y - 4.0, x + 3.0)) / 2).to(C64)


CURVES = {
    "radial, uniform": lambda s: patterns.radial(s, math.ceil(math.pi / 2 * max(s)), golden=False),
    "radial, golden": lambda s: patterns.radial(s, math.ceil(math.pi / 2 * max(s))),
    "radial, no oversampling": lambda s: patterns.radial(s, math.ceil(math.pi / 2 * max(s)), max(s)),
    "spiral, one": lambda s: patterns.spiral(s, 1),
    "spirals": lambda s: patterns.spiral(s, 16),
}


@pytest.mark.parametrize("name", CURVES)
def test_with_full_coverage_the_inverse_returns_a_disk(name):
    pytest.importorskip("finufft")
    shape = (65, 64)
    trajectory, x = CURVES[name](shape), disk(shape)
    assert density(trajectory).sum() / math.prod(shape) == pytest.approx(math.pi / 4, rel=0.01)
    operator = NonCartesianMRI(trajectory, coils(shape))
    assert relative(WeightedAdjoint(operator)(operator(x)), x) < 0.1
    double = NonCartesianMRI(trajectory, 2 * coils(shape))  # whatever the maps' scale
    assert relative(WeightedAdjoint(double)(double(x)), x) < 0.1


def test_a_sparse_radial_scan_keeps_the_brightness():
    pytest.importorskip("finufft")
    operator = NonCartesianMRI(patterns.radial((64, 64), 20), coils((64, 64)))
    x = disk((64, 64))
    inside = WeightedAdjoint(operator)(operator(x))[x.abs() > 0.999].real
    assert float(inside.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("pattern", [lines, points])
def test_on_the_grid_it_replaces_what_was_measured(pattern):
    shape = (12, 10)
    maps = 3 * coils(shape)
    maps[:, :4] = 0  # nothing is seen outside the object
    operator = CartesianMRI(pattern(shape), maps)
    inverse = WeightedAdjoint(operator) @ operator
    diagonal = torch.diagonal(inverse(torch.eye(120, dtype=C64).reshape(120, *shape)).reshape(120, 120)).reshape(shape)
    assert complex(diagonal[4:].mean()) == pytest.approx(float(operator.mask.float().mean()), abs=1e-5)  # what it knows
    assert not diagonal[:4].any()
    full = CartesianMRI(Cartesian.of(np.ones(shape, dtype=bool)), coils(shape))
    x = torch.randn(shape, dtype=C64)
    torch.testing.assert_close(WeightedAdjoint(full)(full(x)), x)


@pytest.mark.parametrize("pattern", [lines, points])
def test_the_sense_inverse_is_regularised_sense_and_linear(pattern):
    shape = (24, 22)
    operator = CartesianMRI(pattern(shape), 3 * coils(shape))
    inverse, weight = SenseInverse(operator, degree=14), 0.05
    largest = float(operator.maps.abs().square().sum(0).max())
    y = torch.randn(operator.range_shape, dtype=C64)
    expected = (1 + weight) * cg_sense(operator, y, weight * largest, iterations=200, tolerance=1e-8)
    assert relative(inverse(y), expected) < 0.02
    torch.testing.assert_close(inverse(2j * y), 2j * inverse(y))
    x = torch.randn(3, *shape, dtype=C64)
    torch.testing.assert_close(inverse.round_trip(x), inverse(operator(x)), rtol=1e-4, atol=1e-4)
    alone = CartesianMRI(pattern(shape))
    y = torch.randn(alone.range_shape, dtype=C64) * alone.mask
    torch.testing.assert_close(SenseInverse(alone)(y), alone.H(y), rtol=1e-4, atol=1e-5)


def test_coinciding_samples_share_their_area():
    once = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [0.9, 0.9], [-0.9, 0.8], [0.9, -0.9], [-0.9, -0.9]])
    twice = np.concatenate([once, once[:1]])
    single, shared = density(Trajectory.of((8, 8), once)), density(Trajectory.of((8, 8), twice))
    assert shared[0] == shared[-1] == pytest.approx(single[0] / 2)
    few = density(Trajectory.of((8, 8), np.array([[0, 0], [1, 0], [0, 1]])))
    assert few == pytest.approx(np.full(3, 64 / (2 * math.pi) ** 2 / 2 / 3))
    with pytest.raises(ValueError, match="lie on one line"):
        density(patterns.radial((8, 8), 1))


def test_conjugate_gradients_solve_with_the_gram():
    shape = (24, 20)
    operator = CartesianMRI(lines(shape), coils(shape, 6))
    x = torch.randn(2, *shape, dtype=C64)
    assert relative(cg(operator.gram, operator.H(operator(x)), iterations=200), x) < 1e-2


def test_root_sum_of_squares():
    x = torch.randn(2, *EVEN, dtype=C64)
    torch.testing.assert_close(root_sum_of_squares(Coils(coils(EVEN))(x)), x.abs())


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_nufft, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs finufft: pip install finufft"):
        NonCartesianMRI(patterns.radial(EVEN, 3))
    for device, name in (("cpu", "finufft"), ("cuda", "cufinufft")):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ValueError, match=rf"needs {name}: pip install"):
            _nufft._library(torch.device(device))


def test_errors():
    maps, trajectory = coils(EVEN), patterns.radial(EVEN, 3)
    full = torch.ones(EVEN, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs the last two axes"):
        Fourier((3,))
    with pytest.raises(TypeError, match="mask must be a Cartesian pattern or a boolean tensor, got torch.float32"):
        CartesianMRI(full.float(), maps)
    with pytest.raises(TypeError, match="mask must be a Cartesian pattern or a boolean tensor, got list"):
        Mask([True])
    with pytest.raises(ValueError, match=r"mask must be \(ny, nx\)"):
        Mask(full.expand(2, 2, *EVEN))
    with pytest.raises(ValueError, match="the mask samples nothing"):
        CartesianMRI(torch.stack([full, ~full]), maps)
    with pytest.raises(TypeError, match="coil maps must be a complex tensor, got torch.float32"):
        Coils(maps.real)
    with pytest.raises(ValueError, match="coil maps must be finite"):
        Coils(maps * math.nan)
    with pytest.raises(ValueError, match=r"coil maps must be \(C, ny, nx\)"):
        Coils(maps[0])
    with pytest.raises(ValueError, match="do not belong together"):
        CartesianMRI(full[1:], maps)
    with pytest.raises(ValueError, match="do not belong together"):
        CartesianMRI(full.expand(3, *EVEN), maps.expand(2, *maps.shape))
    with pytest.raises(TypeError, match="trajectory must be a Trajectory, got Tensor"):
        NonCartesianMRI(full, maps)
    with pytest.raises(ValueError, match=r"the trajectory is of images \(22, 26\)"):
        NonCartesianMRI(trajectory, maps[:, 1:])
    with pytest.raises(ValueError, match=r"eps must lie in \[1e-6, 0.1\]"):
        NonCartesianMRI(trajectory, maps, eps=1e-9)
    with pytest.raises(TypeError, match="needs a CartesianMRI or a NonCartesianMRI, got Fourier"):
        WeightedAdjoint(Fourier(EVEN))
    with pytest.raises(TypeError, match="needs a CartesianMRI, got Fourier"):
        SenseInverse(Fourier(EVEN))
    for inverse in (WeightedAdjoint, SenseInverse):
        with pytest.raises(ValueError, match="zero everywhere"):
            inverse(CartesianMRI(full, 0 * maps))
    with pytest.raises(ValueError, match="weight and degree must be positive"):
        SenseInverse(CartesianMRI(full, maps), degree=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CARTESIAN)
def test_contract_on_cuda(name):
    check_operator(CARTESIAN[name]().to("cuda"), tolerance=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NUFFT)
def test_contract_off_the_grid_on_cuda(name):
    pytest.importorskip("cufinufft")
    check_operator(NUFFT[name]().to("cuda"), tolerance=1e-6)


def relative(value, expected):
    return float(torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected))
