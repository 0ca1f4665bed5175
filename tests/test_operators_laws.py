"""Every operator keeps the contract: one factory each, one line per law."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from operators import _sparse
from operators._rays import ray_chunks, ray_matrix
from operators.analytic import FilteredBackprojection
from operators.ct import RayTransform
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles
from operators.linear import LinearOperator
from operators.testing import check_operator

GRID = Grid(shape=(23, 30), spacing=(1.3, 1.1))
SQUARE = Grid(shape=(25, 20), spacing=(1.2, 1.2))
PARALLEL = ParallelBeam(angles=uniform_angles(17, math.pi, 0.2), detectors=31, pitch=1.1, offset=-1.7)
FAN = FanBeam(angles=uniform_angles(13, 4.1), detectors=29, pitch=1.9, source_origin=80.0, origin_detector=40.0, offset=1.0)
CURVED = FanBeam(angles=uniform_angles(13, 6.0), detectors=29, pitch=1.9, source_origin=80.0, origin_detector=0.0, curved=True)


class Dense(LinearOperator):
    """A complex matrix."""

    def __init__(self):
        super().__init__((3, 4), (5,), torch.complex64, torch.complex64)
        self.register_buffer("matrix", torch.randn(5, 12, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)))

    def _forward(self, x):
        return x.flatten(-2) @ self.matrix.to(x.dtype).T

    def _adjoint(self, y):
        return (y @ self.matrix.to(y.dtype).conj()).unflatten(-1, (3, 4))


class Embed(LinearOperator):
    """Real to complex: the adjoint takes the real part."""

    def __init__(self):
        super().__init__((3, 4), (3, 4), torch.float32, torch.complex64)

    def _forward(self, x):
        return torch.complex(x, 2 * x)

    def _adjoint(self, y):
        return y.real + 2 * y.imag


def streamed():
    operator = RayTransform(GRID, FAN, split=2, subrays=2)
    operator._matrix = _streamed(operator)
    return operator


def _streamed(operator):
    chunks = lambda: ray_chunks(GRID, FAN, split=2, subrays=2, merge=False)  # noqa: E731
    return _sparse.StreamedMatrix(chunks, (13 * 29, 23 * 30))


OPERATORS = {
    "parallel": lambda: RayTransform(GRID, PARALLEL),
    "parallel, other ray model": lambda: RayTransform(GRID, PARALLEL, split=2, subrays=3),
    "fan": lambda: RayTransform(GRID, FAN),
    "curved": lambda: RayTransform(GRID, CURVED),
    "fan, streamed": streamed,
    "fbp": lambda: FilteredBackprojection(RayTransform(SQUARE, PARALLEL), "hann", 0.9),
    "fbp, coarse bins": lambda: FilteredBackprojection(RayTransform(GRID, PARALLEL.__class__(**{**vars(PARALLEL), "pitch": 2.0}))),
    "fbp, fan short": lambda: FilteredBackprojection(RayTransform(GRID, FAN)),
    "fbp, curved": lambda: FilteredBackprojection(RayTransform(GRID, CURVED)),
    "adjoint": lambda: RayTransform(GRID, PARALLEL).H,
    "gram": lambda: RayTransform(GRID, PARALLEL).gram,
    "residual": lambda: FilteredBackprojection(RayTransform(GRID, FAN)) @ RayTransform(GRID, FAN),
    "sum": lambda: 2.0 * RayTransform(GRID, PARALLEL) + RayTransform(GRID, PARALLEL, split=2) * -0.5,
    "difference": lambda: RayTransform(GRID, PARALLEL) - 0.25 * RayTransform(GRID, PARALLEL, subrays=2),
    "complex": lambda: (1 + 2j) * Dense(),
    "real to complex": lambda: Dense() @ Embed(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_contract(name):
    check_operator(OPERATORS[name](), tolerance=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
def test_forward_mode_derivatives():
    operator = RayTransform(GRID, FAN)
    x, v = torch.rand(2, *GRID.shape), torch.rand(2, *GRID.shape)
    value, tangent = torch.func.jvp(operator, (x,), (v,))
    torch.testing.assert_close(value, operator(x))
    torch.testing.assert_close(tangent, operator(v))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beam", [PARALLEL, FAN, CURVED], ids=["parallel", "fan", "curved"])
def test_adjoint_gap_in_float32(beam, seed):
    assert RayTransform(GRID, beam).adjoint_error(seed) < 1e-6


def test_the_streamed_matrix_is_the_matrix():
    operator = RayTransform(GRID, FAN, split=2, subrays=2)
    x, y = torch.rand(3, *GRID.shape), torch.rand(3, *FAN.shape)
    torch.testing.assert_close(streamed()(x), operator(x))
    torch.testing.assert_close(streamed().H(y), operator.H(y))


def test_above_the_cap_nothing_is_stored(monkeypatch):
    monkeypatch.setattr(_sparse, "MEMORY_CAP", 1000)
    operator = RayTransform(GRID, CURVED)
    assert not isinstance(operator._projector(), _sparse.SparseMatrix)
    x = torch.rand(GRID.shape)
    monkeypatch.undo()
    torch.testing.assert_close(operator(x), RayTransform(GRID, CURVED)(x))


def test_the_cache_forgets_the_least_recently_used(monkeypatch):
    _sparse.clear_cache()
    one = RayTransform(GRID, PARALLEL)._projector()
    monkeypatch.setattr(_sparse, "MEMORY_CAP", int(1.5 * one.nbytes))
    RayTransform(GRID, PARALLEL, split=2)._projector()
    assert RayTransform(GRID, PARALLEL)._projector() is not one


def test_norm_is_the_largest_singular_value():
    operator = RayTransform(GRID, PARALLEL)
    matrix = torch.from_numpy(operator._projector().to_scipy(torch.float64).toarray())
    assert operator.norm() == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-4)
    assert (3 * operator).norm() == pytest.approx(3 * operator.norm(), rel=1e-5)
    assert (0.0 * operator).norm() == 0


def test_a_wrong_adjoint_is_found():
    class Wrong(Dense):
        def _adjoint(self, y):
            return 1.01 * super()._adjoint(y)

    with pytest.raises(AssertionError, match="adjoint: relative gap"):
        check_operator(Wrong())


def test_a_nonlinear_operator_is_found():
    class Bent(Dense):
        def _forward(self, x):
            return super()._forward(x) + 1e-3

    with pytest.raises(AssertionError, match="adjoint|zero|linear"):
        check_operator(Bent(), tolerance=1.0)


def test_autocast_leaves_physics_in_single_precision():
    operator = RayTransform(GRID, PARALLEL)
    x = torch.rand(GRID.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(x), RayTransform(GRID, PARALLEL)(x))
        assert operator(x).dtype == torch.float32
    assert operator.half()(x).dtype == torch.float32  # nothing in it to round


def test_errors_say_what_came_and_what_was_expected():
    operator = RayTransform(GRID, PARALLEL)
    with pytest.raises(ValueError, match=r"RayTransform takes shape \(\*batch, 23, 30\), got \(30, 23\)"):
        operator(torch.zeros(30, 23))
    with pytest.raises(ValueError, match=r"the adjoint of RayTransform takes shape \(\*batch, 17, 31\), got \(31,\)"):
        operator.H(torch.zeros(31))
    with pytest.raises(TypeError, match="takes a torch tensor, got list"):
        operator([[0.0]])
    with pytest.raises(TypeError, match="takes torch.float32 or torch.float64, got torch.float16"):
        operator(torch.zeros(GRID.shape, dtype=torch.float16))
    with pytest.raises(ValueError, match="is on cpu, the tensor is on meta"):
        operator(torch.zeros(GRID.shape, device="meta"))
    with pytest.raises(ValueError, match=r"cannot compose: RayTransform takes \(23, 30\) torch.float32"):
        operator @ operator
    with pytest.raises(ValueError, match="cannot add"):
        operator + operator.H
    with pytest.raises(ValueError, match="a complex factor needs a complex operator"):
        operator * 1j
    with pytest.raises(ValueError, match="declared in float32 or complex64, got torch.float64"):
        LinearOperator((1,), (1,), torch.float64)
    with pytest.raises(ValueError, match="every axis of an item has at least one element"):
        LinearOperator((0,), (1,))
    with pytest.raises(TypeError, match="unsupported operand"):
        operator @ 3
    with pytest.raises(NotImplementedError, match="LinearOperator does not define _forward"):
        LinearOperator((1,), (1,))(torch.zeros(1))
    with pytest.raises(NotImplementedError, match="LinearOperator does not define _adjoint"):
        LinearOperator((1,), (1,)).H(torch.zeros(1))


def test_the_matrix_above_the_cap_refuses_other_devices():
    with pytest.raises(ValueError, match="applied on the CPU only, the tensor is on meta"):
        _sparse.StreamedMatrix(lambda: iter(()), (1, 1)).forward(torch.zeros(1, 1, device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_contract_on_cuda(name):
    if "streamed" in name:
        pytest.skip("the streamed matrix is for the CPU")
    check_operator(OPERATORS[name]().to("cuda"), tolerance=1e-6)


def test_the_matrix_is_checked():
    many = np.broadcast_to(np.int32(0), 2**31)  # no memory behind it
    with pytest.raises(ValueError, match="2147483648 entries does not fit 32-bit indices"):
        _sparse.SparseMatrix(np.zeros(1), many, many, (1, 1))
    with pytest.raises(ValueError, match="split and subrays are whole numbers of at least 1, got 0 and 1"):
        ray_matrix(GRID, PARALLEL, split=0)


def test_an_image_does_not_depend_on_its_batch():
    """To rounding: on some CPUs the sparse product takes another kernel for eight columns than for fewer."""
    alike = functools.partial(torch.testing.assert_close, rtol=2e-6, atol=1e-5)
    operator = RayTransform(GRID, FAN)
    x = torch.rand(13, *GRID.shape)
    y = operator(x)
    back = operator.H(y)
    for k in (0, 5, 12):
        alike(operator(x[k]), y[k])
        alike(operator.H(y[k]), back[k])
        alike(operator(x[k : k + 3])[0], y[k])
