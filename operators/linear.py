"""The contract that every operator keeps: batched, shape-checked, differentiable to any order, with an exact adjoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class _Apply(torch.autograd.Function):
    """One side of an operator; its derivative is the other side, as a node of the graph, so every order exists."""

    @staticmethod
    def forward(x: Tensor, operator: LinearOperator, adjoint: bool) -> Tensor:
        if x.numel() == 0:  # an empty batch: no author need think of it
            return operator._empty(x, adjoint)
        with torch.autocast(x.device.type, enabled=False):  # physics is never rounded to half precision
            return operator._adjoint(x) if adjoint else operator._forward(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.operator, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Apply.apply(grad, ctx.operator, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx, tangent, _operator, _adjoint):
        return _Apply.apply(tangent, ctx.operator, ctx.adjoint)

    @staticmethod
    def vmap(info, in_dims, x, operator, adjoint):
        return _Apply.apply(x.movedim(in_dims[0], 0), operator, adjoint), 0


class LinearOperator(nn.Module):
    """A linear map between tensors of fixed item shapes, behind any number of batch axes.

    An author writes `_forward` and `_adjoint`, which receive checked tensors of shape (*batch, *item) and know nothing of
    autograd. The adjoint is the one of `torch.vdot`: no cell volumes, no angle weights. float32 (complex64) operators also
    accept float64 (complex128) and then answer in double precision.

    Attributes:
        domain_shape, range_shape: shape of one item, batch axes excluded.
        domain_dtype, range_dtype: float32 or complex64.
        batch_shape: batch axes next to the item that the operator itself carries, one physics for each of their places; () as a rule.
    """

    batch_shape: tuple[int, ...] = ()

    def __init__(
        self,
        domain_shape: Sequence[int],
        range_shape: Sequence[int],
        domain_dtype: torch.dtype = torch.float32,
        range_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for dtype in (domain_dtype, range_dtype):
            if dtype not in _DOUBLE:
                raise ValueError(f"an operator is declared in float32 or complex64, got {dtype}")
        self.domain_shape = _shape(domain_shape)
        self.range_shape = _shape(range_shape)
        self.domain_dtype = domain_dtype
        self.range_dtype = range_dtype

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _forward")

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define _adjoint")

    @property
    def device(self) -> torch.device | None:
        """Where the operator lives, or None when it works on any device."""
        for tensor in (*self.buffers(), *self.parameters()):
            return tensor.device
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator: x (*batch, *domain_shape) -> (*batch, *range_shape); its gradient is the adjoint.

        Raises:
            TypeError: x is not a tensor, or not of the operator's dtype or its double precision.
            ValueError: the last axes of x are not `domain_shape`, or x is on another device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self._name()} takes a torch tensor, got {type(x).__name__}")
        if x.dtype not in (self.domain_dtype, _DOUBLE[self.domain_dtype]):
            raise TypeError(f"{self._name()} takes {self.domain_dtype} or {_DOUBLE[self.domain_dtype]}, got {x.dtype}")
        items = len(self.domain_shape)
        if x.ndim < items or tuple(x.shape[x.ndim - items :]) != self.domain_shape:
            raise ValueError(f"{self._name()} takes shape (*batch, {_inside(self.domain_shape)}), got {tuple(x.shape)}")
        carried = len(self.batch_shape)
        if carried and tuple(x.shape[: x.ndim - items][-carried:]) != self.batch_shape:
            raise ValueError(
                f"{self._name()} has its own physics for each of {self.batch_shape} items and takes shape "
                f"(*batch, {_inside((*self.batch_shape, *self.domain_shape))}), got {tuple(x.shape)}"
            )
        device = self.device
        if device is not None and x.device != device:
            raise ValueError(f"{self._name()} is on {device}, the tensor is on {x.device}: move one of them with .to()")
        return _Apply.apply(x, self, False)

    def _empty(self, x: Tensor, adjoint: bool) -> Tensor:
        given, wanted = (self.range_shape, self.domain_shape) if adjoint else (self.domain_shape, self.range_shape)
        dtype = self.domain_dtype if adjoint else self.range_dtype
        if x.dtype in _DOUBLE.values():
            dtype = _DOUBLE[dtype]
        return x.new_zeros((*x.shape[: x.ndim - len(given)], *wanted), dtype=dtype)

    def _name(self) -> str:
        return type(self).__name__

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The adjoint operator; `A.H.H is A`."""
        return Adjoint(self)

    @property
    def gram(self) -> LinearOperator:
        """A.H @ A."""
        return self.H @ self

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return Composition(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | complex) -> LinearOperator:
        return Scaled(self, factor) if isinstance(factor, int | float | complex) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1.0)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    @torch.no_grad()
    def norm(self, iterations: int = 100, tolerance: float = 1e-6) -> float:
        """Largest singular value, by power iteration on the gram from a positive start (a lower bound that converges)."""
        x = _draw((*self.batch_shape, *self.domain_shape), self.domain_dtype, self.device, seed=0, positive=True)
        x /= torch.linalg.vector_norm(x)
        value = 0.0
        for _ in range(iterations):
            x = self.H(self(x))
            length = float(torch.linalg.vector_norm(x))
            if length == 0.0:
                return 0.0
            x /= length
            if abs(length - value) <= tolerance * length:
                return math.sqrt(length)
            value = length
        return math.sqrt(value)

    @torch.no_grad()
    def adjoint_error(self, seed: int = 0) -> float:
        """Largest |<A x, y> - <x, A.H y>| / (|A x| |y|) over y = A x + noise and a random y, x of either kind, summed in double.

        A random pair alone forgives a wrong scale (its inner products are nearly zero); y = A x + noise does not.
        """
        worst = 0.0
        for positive in (True, False):
            x = _draw((*self.batch_shape, *self.domain_shape), self.domain_dtype, self.device, seed, positive)
            ax = self(x)
            noise = _draw(ax.shape, self.range_dtype, self.device, seed + 1, False)
            for y in (ax + 0.1 * ax.abs().mean() * noise, noise):
                left, right = _vdot(ax, y), _vdot(x, self.H(y))
                if not (x.is_complex() and y.is_complex()):  # one side real: the spaces are paired by the real part
                    left, right = left.real, right.real
                scale = float(torch.linalg.vector_norm(ax.abs().double()) * torch.linalg.vector_norm(y.abs().double()))
                gap = float(abs(left - right))
                worst = max(worst, gap / scale if scale else gap)
        return worst


class Adjoint(LinearOperator):
    """The adjoint of an operator, as an operator."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.range_shape, operator.domain_shape, operator.range_dtype, operator.domain_dtype)
        self.batch_shape = operator.batch_shape
        self.operator = operator

    def _forward(self, x: Tensor) -> Tensor:
        return self.operator._adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator._forward(y)

    def _name(self) -> str:
        return f"the adjoint of {self.operator._name()}"

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self.operator


class Composition(LinearOperator):
    """left(right(x))."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.domain_shape != right.range_shape or left.domain_dtype != right.range_dtype:
            raise ValueError(
                f"cannot compose: {left._name()} takes {left.domain_shape} {left.domain_dtype}, "
                f"{right._name()} gives {right.range_shape} {right.range_dtype}"
            )
        super().__init__(right.domain_shape, left.range_shape, right.domain_dtype, left.range_dtype)
        self.batch_shape = _carried(left, right)
        self.left = left
        self.right = right

    def _forward(self, x: Tensor) -> Tensor:
        return self.left._forward(self.right._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.right._adjoint(self.left._adjoint(y))

    @property
    def gram(self) -> LinearOperator:
        """right.H @ left.gram @ right: what the left one knows about its gram is not lost."""
        return self.right.H @ (self.left.gram @ self.right)


class Sum(LinearOperator):
    """left(x) + right(x)."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if (left.domain_shape, left.range_shape) != (right.domain_shape, right.range_shape) or (
            left.domain_dtype,
            left.range_dtype,
        ) != (right.domain_dtype, right.range_dtype):
            raise ValueError(
                f"cannot add: {left._name()} maps {left.domain_shape} to {left.range_shape}, "
                f"{right._name()} maps {right.domain_shape} to {right.range_shape}, or their dtypes differ"
            )
        super().__init__(left.domain_shape, left.range_shape, left.domain_dtype, left.range_dtype)
        self.batch_shape = _carried(left, right)
        self.left = left
        self.right = right

    def _forward(self, x: Tensor) -> Tensor:
        return self.left._forward(x) + self.right._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.left._adjoint(y) + self.right._adjoint(y)


class Scaled(LinearOperator):
    """factor * operator(x)."""

    def __init__(self, operator: LinearOperator, factor: float | complex) -> None:
        if isinstance(factor, complex) and not (operator.domain_dtype.is_complex and operator.range_dtype.is_complex):
            raise ValueError(f"a complex factor needs a complex operator, {operator._name()} has a real side")
        super().__init__(operator.domain_shape, operator.range_shape, operator.domain_dtype, operator.range_dtype)
        self.batch_shape = operator.batch_shape
        self.operator = operator
        self.factor = factor

    def _forward(self, x: Tensor) -> Tensor:
        return self.factor * self.operator._forward(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        factor = self.factor.conjugate() if isinstance(self.factor, complex) else self.factor
        return factor * self.operator._adjoint(y)

    @property
    def gram(self) -> LinearOperator:
        return Scaled(self.operator.gram, abs(self.factor) ** 2)


def _carried(left: LinearOperator, right: LinearOperator) -> tuple[int, ...]:
    """The batch axes that two operators carry together."""
    if left.batch_shape and right.batch_shape and left.batch_shape != right.batch_shape:
        raise ValueError(f"{left._name()} carries {left.batch_shape} items, {right._name()} carries {right.batch_shape}")
    return left.batch_shape or right.batch_shape


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    result = tuple(int(n) for n in shape)
    if any(n < 1 for n in result):
        raise ValueError(f"every axis of an item has at least one element, got {result}")
    return result


def _inside(shape: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in shape)


def _draw(shape, dtype, device, seed: int, positive: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(shape, generator=generator) + 0.1 if positive else torch.randn(shape, dtype=dtype, generator=generator)
    return draw.to(device=device, dtype=dtype)


def _vdot(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float64)
    return torch.vdot(a.flatten().to(wide), b.flatten().to(wide)).cpu()
