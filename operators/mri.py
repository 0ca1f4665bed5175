"""MRI: a complex image seen by receive coils and sampled in k-space, on the grid or along any trajectory.

y_c = M F S_c x with coil maps S_c, the centred orthonormal Fourier transform F (the zero of either space at n // 2) and a mask M; off
the grid y_c(k) = 1 / sqrt(ny nx) sum_j exp(-i k . r_j) S_c(r_j) x_j. Pruessmann et al., Magnetic Resonance in Medicine 42(5), 1999.

A centred transform is a plain one between two phase factors, alternating signs for an even size: they are folded into maps and mask
once, for odd sizes too, so that nothing is ever shifted. Images are complex64 (*batch, ny, nx), k-space (*batch, coils, ...); maps
and masks with a batch axis of their own stand for one acquisition per item, and the image's last batch axis must be as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from operators import _nufft
from operators.geometry import Array, Cartesian, Trajectory
from operators.linear import LinearOperator

_COMPLEX = torch.complex64


class Complex(LinearOperator):
    """Two real channels as one complex image, (*batch, 2, ny, nx) -> (*batch, ny, nx): channel 0 real, channel 1 imaginary.

    Linear over the real numbers; the adjoint, of the inner product Re <a, b>, takes real and imaginary part, and inverts it.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__((2, *shape), shape, torch.float32, _COMPLEX)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.complex(*x.unbind(-3))

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([y.real, y.imag], dim=-3)


class Fourier(LinearOperator):
    """The centred orthonormal Fourier transform over the last two axes of an item; unitary.

    Args:
        shape: (ny, nx), or with coils (C, ny, nx).

    Raises:
        ValueError: fewer than two axes.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, shape, _COMPLEX, _COMPLEX)
        if len(self.domain_shape) < 2:
            raise ValueError(f"the Fourier transform needs the last two axes (ny, nx), got {self.domain_shape}")
        before, after = _phases(self.domain_shape)
        self.register_buffer("_before", before, persistent=False)
        self.register_buffer("_after", after, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x * self._before.to(x.dtype), norm="ortho").mul_(self._after.to(x.dtype))

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.fft.ifft2(y * self._after.conj().to(y.dtype), norm="ortho").mul_(self._before.conj().to(y.dtype))


class Mask(LinearOperator):
    """Zero where k-space was not sampled; an orthogonal projection.

    Args:
        mask: a `Cartesian` pattern, or booleans (ny, nx), or one per item (B, ny, nx) or (B, 1, ny, nx).
        coils: number of coils; None for items without a coil axis.

    Raises:
        TypeError: not a pattern, or not boolean.
        ValueError: axes other than those, or nothing sampled.
    """

    def __init__(self, mask: Cartesian | Tensor, coils: int | None = None) -> None:
        mask, items = _mask(mask)
        shape = tuple(mask.shape[-2:]) if coils is None else (coils, *mask.shape[-2:])
        super().__init__(shape, shape, _COMPLEX, _COMPLEX)
        self.batch_shape = items
        self.register_buffer("mask", mask.squeeze(-3) if items and coils is None else mask, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return x * self.mask

    def _adjoint(self, y: Tensor) -> Tensor:
        return y * self.mask


class Coils(LinearOperator):
    """The image as each coil sees it, (*batch, ny, nx) -> (*batch, C, ny, nx).

    Args:
        maps: complex sensitivities (C, ny, nx), or one set per item (B, C, ny, nx).

    Raises:
        TypeError: maps are not a complex tensor.
        ValueError: axes other than those, or values that are not finite.
    """

    def __init__(self, maps: Tensor) -> None:
        maps, items = _maps(maps)
        super().__init__(maps.shape[-2:], maps.shape[-3:], _COMPLEX, _COMPLEX)
        self.batch_shape = items
        self.register_buffer("maps", maps, persistent=False)

    def _forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-3) * self.maps

    def _adjoint(self, y: Tensor) -> Tensor:
        return _combine(self.maps, y)


class CartesianMRI(LinearOperator):
    """Mask @ Fourier @ Coils in one: (*batch, ny, nx) -> (*batch, C, ny, nx), zero where nothing was sampled.

    With maps of unit sum of squares no singular value exceeds 1. `gram` never visits k-space twice: where the mask is constant along
    the readout it transforms along the phase-encoding axis only.

    Args:
        mask: a `Cartesian` pattern, or booleans (ny, nx), or one per item (B, ny, nx) or (B, 1, ny, nx).
        maps: complex sensitivities (C, ny, nx), or one set per item (B, C, ny, nx); one coil that sees everything when None.

    Raises:
        TypeError: mask is neither a pattern nor boolean, or maps are not a complex tensor.
        ValueError: nothing sampled, maps that are not finite, or shapes that do not belong together.
    """

    def __init__(self, mask: Cartesian | Tensor, maps: Tensor | None = None) -> None:
        mask, masks = _mask(mask)
        if maps is None:
            maps = torch.ones((1, *mask.shape[-2:]), dtype=_COMPLEX, device=mask.device)
        maps, sets = _maps(maps)
        if mask.shape[-2:] != maps.shape[-2:] or (masks and sets and masks != sets):
            raise ValueError(f"mask {tuple(mask.shape)} and coil maps {tuple(maps.shape)} do not belong together")
        if mask.device != maps.device:
            mask = mask.to(maps.device)
        super().__init__(maps.shape[-2:], maps.shape[-3:], _COMPLEX, _COMPLEX)
        self.batch_shape = masks or sets
        before, after = (phase.to(maps.device) for phase in _phases(self.domain_shape))
        self.register_buffer("maps", maps, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("_before", before, persistent=False)
        self.register_buffer("_after", after, persistent=False)
        self.register_buffer("_folded_maps", maps * before.to(_COMPLEX), persistent=False)
        self.register_buffer("_conj_maps", self._folded_maps.conj().resolve_conj(), persistent=False)
        self.register_buffer("_folded_mask", mask * after.to(_COMPLEX), persistent=False)

    @property
    def gram(self) -> LinearOperator:
        """A.H @ A, in image space."""
        return _CartesianGram(self)

    def _forward(self, x: Tensor) -> Tensor:
        def work(x: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
            return torch.fft.fft2(x.unsqueeze(-3) * maps, norm="ortho").mul_(mask)

        maps, _, mask = self._folded(x.dtype)
        return _each(work, x, 2, maps, mask)

    def _adjoint(self, y: Tensor) -> Tensor:
        def work(y: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
            return torch.fft.ifft2(y * mask, norm="ortho").mul_(maps).sum(dim=-3)

        _, maps, mask = self._folded(y.dtype)
        return _each(work, y, 3, maps, mask.conj())

    def _folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Maps, their conjugate, and mask, with their phase factors; kept in single precision, made at each call in double."""
        if dtype == _COMPLEX:
            return self._folded_maps, self._conj_maps, self._folded_mask
        maps = self.maps * self._before
        return maps, maps.conj(), self.mask * self._after

    def extra_repr(self) -> str:
        return f"{self.range_shape[0]} coils, {self.domain_shape[0]} x {self.domain_shape[1]}"


class _CartesianGram(LinearOperator):
    """sum_c conj(S_c) F^H M F S_c; self-adjoint. The outer phase factors cancel, and so does F along an axis that M ignores.

    Transforms along the last axis are the fastest by far: where only the other one is left, maps and images are turned.
    """

    def __init__(self, operator: CartesianMRI) -> None:
        super().__init__(operator.domain_shape, operator.domain_shape, _COMPLEX, _COMPLEX)
        self.batch_shape = operator.batch_shape
        self.operator = operator
        mask = operator.mask
        self._axes: tuple[int, ...] = (-2, -1)
        self._turned = False
        if bool((mask == mask[..., :1, :]).all()):
            self._axes, mask = (-1,), mask[..., :1, :]
        elif bool((mask == mask[..., :1]).all()):
            self._axes, self._turned, mask = (-1,), True, mask[..., :1].mT
        self.register_buffer("_mask", mask.to(_COMPLEX), persistent=False)
        self.register_buffer("_maps", self._turn(operator._folded_maps), persistent=False)
        self.register_buffer("_conj", self._turn(operator._conj_maps), persistent=False)

    def _turn(self, image: Tensor) -> Tensor:
        return image.mT.contiguous() if self._turned else image

    def _forward(self, x: Tensor) -> Tensor:
        def work(x: Tensor, maps: Tensor, conj: Tensor, mask: Tensor) -> Tensor:
            k = torch.fft.fftn(self._turn(x).unsqueeze(-3) * maps, dim=self._axes, norm="ortho").mul_(mask)
            return self._turn(torch.fft.ifftn(k, dim=self._axes, norm="ortho").mul_(conj).sum(dim=-3))

        if x.dtype == _COMPLEX:
            return _each(work, x, 2, self._maps, self._conj, self._mask)
        maps, conj, _ = self.operator._folded(x.dtype)
        return _each(work, x, 2, self._turn(maps), self._turn(conj), self._mask)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self


class NonCartesianMRI(LinearOperator):
    """K-space along a trajectory: (*batch, ny, nx) -> (*batch, C, samples), by the non-uniform FFT.

    finufft on the CPU, cufinufft on CUDA (the extra noncartesian); plans are kept and shared by every operator of the
    same trajectory. `gram` is a convolution on the doubled grid (Toeplitz), with no samples in it, accurate to `eps` like the rest.
    Barnett, Magland, af Klinteberg, SIAM J. Sci. Comput. 41(5), 2019; Fessler et al., IEEE Trans. Signal Process. 53(9), 2005.

    Args:
        trajectory: the points.
        maps: complex sensitivities (C, ny, nx), or one set per item (B, C, ny, nx); one coil that sees everything when None.
        eps: relative accuracy of the transform, 1e-4 of it in double precision; single precision itself ends at 2e-5 at 256 pixels.
        threads: of finufft; one is repeatable to the last bit, and as fast on a busy machine.

    Raises:
        TypeError: not a `Trajectory`, or maps that are not a complex tensor.
        ValueError: maps not of the trajectory's image or not finite, eps or threads out of range, or the library is not installed.
    """

    def __init__(self, trajectory: Trajectory, maps: Tensor | None = None, *, eps: float = 1e-5, threads: int = 1) -> None:
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory must be a Trajectory, got {type(trajectory).__name__}")
        maps, sets = _maps(torch.ones((1, *trajectory.shape), dtype=_COMPLEX) if maps is None else maps)
        if tuple(maps.shape[-2:]) != trajectory.shape:
            raise ValueError(f"the trajectory is of images {trajectory.shape}, the coil maps are {tuple(maps.shape)}")
        if not 1e-6 <= eps <= 0.1 or threads < 1:
            raise ValueError(f"eps must lie in [1e-6, 0.1] and threads be at least 1, got {eps} and {threads}")
        _nufft.check_installed()
        super().__init__(maps.shape[-2:], (maps.shape[-3], trajectory.samples), _COMPLEX, _COMPLEX)
        self.batch_shape = sets
        self.trajectory, self.eps, self.threads = trajectory, eps, threads
        self.register_buffer("maps", maps, persistent=False)

    @property
    def gram(self) -> LinearOperator:
        """A.H @ A as a convolution."""
        return _ToeplitzGram(self)

    def _forward(self, x: Tensor) -> Tensor:
        images = (x.unsqueeze(-3) * self.maps).reshape(-1, self.range_shape[0], *self.domain_shape)
        return self._transform(2, images, self.trajectory.samples).reshape(*x.shape[:-2], *self.range_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        images = self._transform(1, y.reshape(-1, *self.range_shape), *self.domain_shape)
        return _combine(self.maps, images.reshape(*y.shape[:-1], *self.domain_shape))

    def _transform(self, kind: int, values: Tensor, *shape: int) -> Tensor:
        """Item by item, all coils at once, orthonormally scaled: (items, C, ...) -> (items, C, *shape)."""
        coils, values = self.range_shape[0], values.resolve_conj().contiguous()
        eps = self.eps if values.dtype == _COMPLEX else 1e-4 * self.eps
        run = _nufft.plan(self.trajectory, kind, coils, values.dtype, str(values.device), eps, self.threads)
        out = values.new_empty((len(values), coils, *shape))
        for item, result in zip(values, out, strict=True):
            _nufft.execute(run, item, result)
        return out.mul_(1 / math.sqrt(math.prod(self.domain_shape)))

    def extra_repr(self) -> str:
        return f"{self.range_shape[0]} coils, {self.domain_shape[0]} x {self.domain_shape[1]}, {self.trajectory.samples} samples"


def encoding(acquisition: Cartesian | Trajectory, maps: Tensor) -> CartesianMRI | NonCartesianMRI:
    """The operator of an acquisition seen by these coils, on its grid or along its trajectory."""
    return NonCartesianMRI(acquisition, maps) if isinstance(acquisition, Trajectory) else CartesianMRI(acquisition, maps)


class _ToeplitzGram(LinearOperator):
    """sum_c conj(S_c) T S_c with T the convolution by sum_m exp(i k_m . r) / (ny nx), by FFT of twice the size; self-adjoint."""

    def __init__(self, operator: NonCartesianMRI) -> None:
        super().__init__(operator.domain_shape, operator.domain_shape, _COMPLEX, _COMPLEX)
        self.batch_shape = operator.batch_shape
        self.operator = operator
        self.register_buffer("_response", self._exact(operator.maps).float(), persistent=False)

    def _exact(self, like: Tensor) -> Tensor:
        return _nufft.toeplitz_response(self.operator.trajectory, str(like.device), self.operator.threads)

    def _forward(self, x: Tensor) -> Tensor:
        ny, nx = self.domain_shape

        def work(x: Tensor, maps: Tensor, response: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for coil in maps.unbind(-3):  # one at a time: the doubled grids of all would leave the cache
                k = torch.fft.fft2(x * coil, s=(2 * ny, 2 * nx)).mul_(response)
                out += coil.conj() * torch.fft.ifft2(k)[..., :ny, :nx]
            return out

        return _each(work, x, 2, self.operator.maps, self._response if x.dtype == _COMPLEX else self._exact(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self


def _phase(n: int) -> tuple[Array, Array]:
    """exp(2 pi i c j / n) and the same times exp(-2 pi i c^2 / n), c = n // 2: what stands before and behind a plain transform."""
    c = n // 2
    before = np.exp(2j * np.pi * (c * np.arange(n) % n) / n)
    before = before.real.round().astype(complex) if n % 2 == 0 else before
    return before, before * (np.exp(-2j * np.pi * (c * c % n) / n) if n % 2 else (-1.0) ** c)


def _phases(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The two factors of a plane, complex128 (ny, nx)."""
    rows, columns = _phase(shape[-2]), _phase(shape[-1])
    before, after = (torch.from_numpy(np.outer(row, column)) for row, column in zip(rows, columns, strict=True))
    return before, after


def _combine(maps: Tensor, images: Tensor) -> Tensor:
    """sum_c conj(maps_c) images_c, (..., C, ny, nx) -> (..., ny, nx)."""
    return (images * maps.conj()).sum(dim=-3)


def _each(work: Callable[..., Tensor], x: Tensor, axes: int, *sets: Tensor) -> Tensor:
    """work(x, *sets) over the batch of x, whose items have `axes` axes; item by item on the CPU, whose cache holds no more.

    A set of four axes holds one part for each place of the last batch axis.
    """
    batch = x.shape[: x.ndim - axes]
    if x.device.type != "cpu" or not batch:
        return work(x, *sets)
    out: Tensor | None = None
    for i, item in enumerate(x.reshape(-1, *x.shape[x.ndim - axes :])):
        result = work(item, *(part[i % len(part)] if part.ndim == 4 else part for part in sets))
        if out is None:
            out = result.new_empty((math.prod(batch), *result.shape))
        out[i] = result
    assert out is not None  # an empty batch never gets here
    return out.reshape(*batch, *out.shape[1:])


def _mask(mask: Cartesian | Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Booleans (ny, nx) or (B, 1, ny, nx), and the batch axes in them."""
    if isinstance(mask, Cartesian):
        mask = torch.from_numpy(mask.mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a Cartesian pattern or a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.ndim == 3:
        mask = mask.unsqueeze(1)
    if mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"mask must be (ny, nx), (B, ny, nx) or (B, 1, ny, nx), got {tuple(mask.shape)}")
    if not mask.flatten(-2).any(dim=-1).all():
        raise ValueError("the mask samples nothing")
    return mask, tuple(mask.shape[:-3])


def _maps(maps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Sensitivities complex64 (C, ny, nx) or (B, C, ny, nx), and the batch axes in them."""
    if not isinstance(maps, Tensor) or not maps.is_complex():
        raise TypeError(f"coil maps must be a complex tensor, got {getattr(maps, 'dtype', type(maps).__name__)}")
    if maps.ndim not in (3, 4):
        raise ValueError(f"coil maps must be (C, ny, nx) or (B, C, ny, nx), got {tuple(maps.shape)}")
    if not torch.isfinite(torch.view_as_real(maps.resolve_conj())).all():
        raise ValueError("coil maps must be finite")
    return maps.to(_COMPLEX).contiguous(), tuple(maps.shape[:-3])
