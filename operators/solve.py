"""Linear solvers over batches: every item has its own step sizes, and stops on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from operators.linear import LinearOperator


def cg(operator: LinearOperator, b: Tensor, x0: Tensor | None = None, *, iterations: int = 50, tolerance: float = 1e-6) -> Tensor:
    """Solve operator(x) = b for a self-adjoint, positive operator by conjugate gradients, each batch item by itself.

    Differentiable through its iterations. An item rests when |b - operator(x)| <= tolerance |b|; the loop ends when all rest, or
    after `iterations`. With a singular operator and b in its range it converges to the solution nearest to x0.

    Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49(6), 1952.

    Args:
        operator: maps a space to itself; `A.gram`, `A.gram + c * identity` and the like.
        b: (*batch, *domain_shape).
        x0: start, shaped like b; zero when None.

    Raises:
        ValueError: the operator's domain is not its range, x0 is not shaped like b, or a count or tolerance out of range.
    """
    if operator.domain_shape != operator.range_shape or operator.domain_dtype != operator.range_dtype:
        raise ValueError(f"cg needs an operator of a space to itself, got {operator.domain_shape} to {operator.range_shape}")
    _check(b, x0, iterations)
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    items = len(operator.domain_shape)
    x = torch.zeros_like(b) if x0 is None else x0
    r = b if x0 is None else b - operator(x)
    p, rr = r, _inner(r, r, items)
    goal = (tolerance**2) * _inner(b, b, items).detach()
    for _ in range(iterations):
        active = rr.detach() > goal
        if not active.any():
            break
        q = operator(p)
        curvature = _inner(p, q, items)
        active = active & (curvature.detach() > 0)
        one = torch.ones_like(rr)
        alpha = torch.where(active, rr / torch.where(active, curvature, one), 0 * one)
        x, r = x + alpha * p, r - alpha * q
        new = _inner(r, r, items)
        beta = torch.where(active, new / torch.where(active, rr, one), 0 * one)
        p, rr = torch.where(active, r + beta * p, p), torch.where(active, new, 0 * one)
    return x


def cg_sense(
    operator: LinearOperator,
    y: Tensor,
    weight: float = 0.0,
    *,
    x0: Tensor | None = None,
    iterations: int = 30,
    tolerance: float = 1e-4,
) -> Tensor:
    """argmin_x |y - A x|^2 + weight |x|^2, by conjugate gradients on the normal equations; CG-SENSE when A is a coil encoding.

    With weight 0 the number of iterations is the regulariser, and too many are worse than none. With noise sigma per real component
    and an image of mean square m per real component, weight = sigma^2 / m is the best linear estimate of a white image; for
    heads about three times that is best.

    Pruessmann et al., Magnetic Resonance in Medicine 46(4), 2001.

    Args:
        y: (*batch, *range_shape).
        weight: in units of A.H A, 0 or more.
        x0, iterations, tolerance: see `cg`.

    Returns:
        (*batch, *domain_shape).

    Raises:
        ValueError: a negative weight, and see `cg`.
    """
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    normal = operator.gram
    if weight:
        shape, dtype = operator.domain_shape, operator.domain_dtype
        normal = normal + _Identity(shape, shape, dtype, dtype) * weight
    return cg(normal, operator.H(y), x0, iterations=iterations, tolerance=tolerance)


class _Identity(LinearOperator):
    def _forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def _adjoint(self, y: Tensor) -> Tensor:
        return y.clone()


def sirt(
    operator: LinearOperator,
    y: Tensor,
    x0: Tensor | None = None,
    *,
    iterations: int = 100,
    relaxation: float = 1.0,
    lower: float | None = None,
) -> Tensor:
    """Simultaneous iterative reconstruction, x <- x + relaxation C A.H R (y - A x), R and C the inverse row and column sums.

    For operators without negative weights. Converges to the least-squares solution in the norm of R that is nearest to x0.
    Gilbert, J. Theor. Biol. 36(1), 1972.

    Args:
        y: (*batch, *range_shape).
        x0: start, (*batch, *domain_shape); zero when None.
        relaxation: in (0, 2).
        lower: smallest value allowed, for example 0; None for no bound.

    Raises:
        ValueError: x0's batch is not y's, a negative count, or a relaxation outside (0, 2).
    """
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation must lie in (0, 2), got {relaxation}")
    start = y.new_zeros((*y.shape[: y.ndim - len(operator.range_shape)], *operator.domain_shape))
    _check(start, x0, iterations)
    x = start if x0 is None else x0
    rows = _reciprocal(operator(y.new_ones(operator.domain_shape)))
    columns = _reciprocal(operator.H(y.new_ones(operator.range_shape)))
    for _ in range(iterations):
        x = x + relaxation * columns * operator.H(rows * (y - operator(x)))
        if lower is not None:
            x = x.clamp(min=lower)
    return x


def power_norm(operator: LinearOperator, *, iterations: int = 100, tolerance: float = 1e-6) -> float:
    """Largest singular value by power iteration; `LinearOperator.norm` as a function."""
    return operator.norm(iterations, tolerance)


def _check(b: Tensor, x0: Tensor | None, iterations: int) -> None:
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must be shaped {tuple(b.shape)}, got {tuple(x0.shape)}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")


def _inner(a: Tensor, b: Tensor, items: int) -> Tensor:
    """Real inner product of each item, (*batch, 1, ..., 1)."""
    return (a.conj() * b).real.sum(dim=tuple(range(-items, 0)), keepdim=True)


def _reciprocal(sums: Tensor) -> Tensor:
    return torch.where(sums > 1e-6 * sums.max(), 1 / sums.clamp(min=1e-30), 0.0)
