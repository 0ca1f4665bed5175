"""Window: the two numbers between a picture's unit and what the networks see; linear, never clips, folded into the operator once."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from operators.ct import MU_WATER
from operators.linear import LinearOperator


class Affine:
    """u -> A(a u + b): a linear operator behind a window. The data stay as they are, so it is right for every likelihood.

    ``a`` and ``b`` are numbers or tensors (B, 1, 1, 1), one per item. ``linear(u)`` is A(a u), ``adjoint(y)`` its adjoint a A^H y, ``gram``
    one after the other.
    """

    def __init__(self, operator: LinearOperator, a: float | Tensor, b: float | Tensor) -> None:
        self.operator, self.a, self.b = operator, a, b

    def __call__(self, u: Tensor) -> Tensor:
        return self.operator(self.a * u + self.b)

    def linear(self, u: Tensor) -> Tensor:
        return self.operator(self.a * u)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.a * self.operator.H(y)

    def gram(self, u: Tensor) -> Tensor:
        return self.a * self._gram(self.a * u)

    @functools.cached_property
    def _gram(self) -> LinearOperator:
        return self.operator.gram

    def take(self, index: Tensor) -> "Affine":
        """The same operator for other items of the batch."""
        a, b = (v[index] if isinstance(v, Tensor) and v.ndim else v for v in (self.a, self.b))
        return Affine(self.operator, a, b)


@dataclass(frozen=True)
class Window:
    """u = (value - offset) / scale, with the unit of ``value``: HU for CT. Default: u = HU / 1000."""

    offset: float = 0.0
    scale: float = 1000.0
    unit: str = "HU"

    def normalise(self, value: Tensor) -> Tensor:
        return (value - self.offset) / self.scale

    def restore(self, u: Tensor) -> Tensor:
        return u * self.scale + self.offset

    def fold(self, operator: LinearOperator, pixel: float | Tensor = 1.0, mu_water: float = MU_WATER) -> Affine:
        """u -> line integrals, for an operator on attenuation in 1/mm: mu = mu_w (1 + HU / 1000), HU = offset + scale u.

        ``pixel`` multiplies the operator's lengths: an operator built for 1 mm pixels serves images of any pixel size.
        Raises ValueError when the window's unit is not HU.
        """
        if self.unit != "HU":
            raise ValueError(f"a ray transform wants a window in HU, got one in {self.unit!r}")
        return Affine(operator, mu_water * pixel * self.scale / 1000, mu_water * pixel * (1 + self.offset / 1000))




def low_resolution(kspace: Tensor, size: int = 24) -> Tensor:
    """The images (*batch, ny, nx) that the central ``size`` x ``size`` samples of k-space make (raised-cosine taper, orthonormal)."""
    centre = torch.zeros_like(kspace)
    rows, columns, taper = _centre(kspace, size)
    centre[..., rows, columns] = kspace[..., rows, columns] * taper
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(centre, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


def scale_of(kspace: Tensor, size: int = 24) -> Tensor:
    """The brightness of an MR image as its k-space alone tells it: (*batch, C, ky, kx) -> (*batch), in the unit of k-space.

    The 99th percentile of the root sum of squares over the coils of the images that the central ``size`` x ``size`` samples make
    (raised-cosine taper, orthonormal transform). Accelerated and full scans of one object answer
    alike, since both hold the centre (within 2 % at 256 columns and acceleration 10, 8 % at 128, where the centre is narrower).
    """
    (ny, nx), fine = kspace.shape[-2:], 2 * size
    rows, columns, taper = _centre(kspace, size)
    centre = kspace[..., rows, columns] * taper
    peak = centre.abs().amax((-3, -2, -1), keepdim=True).clamp(min=1e-37)  # files hold 1e-6 as well as 1e6: no square leaves float32
    images = torch.fft.ifft2(centre / peak, s=(fine, fine), norm="ortho") * (fine / math.sqrt(ny * nx))
    rss = images.abs().square().sum(-3).sqrt().flatten(-2)
    return rss.kthvalue(round(0.99 * fine**2), dim=-1).values * peak[..., 0, 0, 0]


def _centre(kspace: Tensor, size: int) -> tuple[slice, slice, Tensor]:
    """Rows and columns of the central ``size`` x ``size`` samples, and their taper."""
    ny, nx = kspace.shape[-2:]
    taper = torch.hann_window(size + 2, periodic=False, dtype=kspace.real.dtype, device=kspace.device)[1:-1]
    rows, columns = (slice(max(0, n // 2 - size // 2), n // 2 - size // 2 + size) for n in (ny, nx))
    return rows, columns, taper[-min(size, ny):, None] * taper[-min(size, nx):]
