"""The contract of a linear operator as one check that anybody can run on theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.linear import Adjoint, LinearOperator


def check_operator(operator: LinearOperator, *, tolerance: float = 1e-6, seed: int = 0) -> None:
    """Hold an operator to the contract of `LinearOperator`, law by law.

    Checked in single and in double precision: the adjoint (with y = A x + noise, and with random pairs), linearity, batches of 0, 1
    and 2 axes, an empty batch, zero to zero, inputs left unchanged, the gradient of <A x, y> being A.H y, a second derivative through
    the first one, vmap, and errors for the wrong shape and dtype.

    Args:
        operator: the operator, on its device.
        tolerance: largest relative adjoint gap in float32; it belongs to the backend, and stands beside its name in a test.
        seed: of the drawn inputs.

    Raises:
        AssertionError: the first law that does not hold, named.
    """
    gap = operator.adjoint_error(seed)
    assert gap <= tolerance, f"adjoint: relative gap {gap:.1e}, allowed {tolerance:.1e}"
    assert operator.H.H is operator or isinstance(operator, Adjoint), "A.H.H must be A itself"
    for side, direct in (("forward", operator), ("adjoint", operator.H)):
        draw = _Draw(direct, seed)
        for double in (False, True):
            where = f"{side}, {'double' if double else 'single'} precision"
            _check_values(direct, draw, double, where)
            _check_derivatives(direct, draw, double, where)
        _check_errors(direct, draw, side)


class _Draw:
    """Seeded items of an operator's domain and range, where the operator lives."""

    def __init__(self, operator: LinearOperator, seed: int) -> None:
        self._operator = operator
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> Tensor:
        if double:
            dtype = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=dtype, generator=self._generator).to(self._operator.device or "cpu")

    def domain(self, *batch: int, double: bool = False) -> Tensor:
        return self((*batch, *self._operator.batch_shape, *self._operator.domain_shape), self._operator.domain_dtype, double)

    def range(self, *batch: int, double: bool = False) -> Tensor:
        return self((*batch, *self._operator.batch_shape, *self._operator.range_shape), self._operator.range_dtype, double)


def _check_values(operator: LinearOperator, draw: _Draw, double: bool, where: str) -> None:
    near = 1e-10 if double else 2e-5
    wanted = (*operator.batch_shape, *operator.range_shape)
    x = draw.domain(2, 3, double=double)
    before = x.clone()
    y = operator(x)
    assert torch.equal(x, before), f"{where}: the input was changed"
    assert tuple(y.shape) == (2, 3, *wanted), f"{where}: a batch (2, 3) came back as {tuple(y.shape)}"
    assert y.dtype == draw.range(double=double).dtype, f"{where}: gave {y.dtype}"
    for i in range(2):
        _close(operator(x[i]), y[i], near, f"{where}: one batch axis differs from two")
        for j in range(3):
            _close(operator(x[i, j]), y[i, j], near, f"{where}: no batch axis differs from two")
    assert operator(draw.domain(0, double=double)).shape == (0, *wanted), f"{where}: an empty batch"
    assert not operator(torch.zeros_like(x)).any(), f"{where}: zero must map to zero"
    many = draw.domain(19, double=double)
    _close(operator(many)[17], operator(many[17]), near, f"{where}: a large batch differs from its items")
    _close(operator(2.5 * x[0] - x[1]), 2.5 * y[0] - y[1], near, f"{where}: linearity")
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 3 else x.flip(-1).flip(-1)
    _close(operator(strided), y, near, f"{where}: strides must not matter")


def _check_derivatives(operator: LinearOperator, draw: _Draw, double: bool, where: str) -> None:
    near = 1e-10 if double else 2e-5
    x, y = draw.domain(2, double=double).requires_grad_(), draw.range(2, double=double)
    (gradient,) = torch.autograd.grad(_inner(operator(x), y), x)
    _close(gradient, operator.H(y), near, f"{where}: the gradient must be the adjoint")
    (gradient,) = torch.autograd.grad(_inner(operator(x), operator(x)) / 2, x, create_graph=True)
    gram = operator.H(operator(x.detach()))
    _close(gradient.detach(), gram, near, f"{where}: the gradient of |A x|^2 / 2 must be A.H A x")
    v = draw.domain(2, double=double)
    (second,) = torch.autograd.grad(_inner(gradient, v), x)
    _close(second, operator.H(operator(v)), near, f"{where}: the second derivative must be A.H A")
    mapped = torch.func.vmap(operator, in_dims=1, out_dims=1)(v.unsqueeze(0).expand(3, *v.shape))
    _close(mapped[0], operator(v), near, f"{where}: vmap")


def _check_errors(operator: LinearOperator, draw: _Draw, side: str) -> None:
    x = draw.domain()
    for wrong, error, law in (
        (x.new_zeros(*x.shape[:-1], x.shape[-1] + 1), ValueError, "a wrong shape must raise ValueError"),
        (x.new_zeros(x.shape[1:]), ValueError, "a missing axis must raise ValueError"),
        (torch.zeros(x.shape, dtype=torch.int64), TypeError, "integers must raise TypeError"),
        (torch.zeros(x.shape, dtype=torch.float32 if x.is_complex() else torch.complex64), TypeError, "real for complex must raise"),
        (x.cpu().numpy(), TypeError, "an array must raise TypeError"),
    ):
        try:
            operator(wrong)
        except error:
            continue
        raise AssertionError(f"{side}: {law}")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum().real


def _close(value: Tensor, expected: Tensor, tolerance: float, law: str) -> None:
    scale = float(torch.linalg.vector_norm(expected)) or 1.0
    error = float(torch.linalg.vector_norm(value - expected)) / scale
    assert error <= tolerance, f"{law} (relative difference {error:.1e}, allowed {tolerance:.1e})"
