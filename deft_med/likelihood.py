"""What the measurements say about an image: p(y | u), its score, and the residual in image units that DEFT is fed."""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Generator, Tensor

from deft_med.intensity import Affine
from operators.linear import Composition, LinearOperator
from operators.noise import gaussian
from operators.sense import SenseInverse

FAINTEST = 1e-6  # s_img at the least: networks are told its logarithm


class Likelihood(ABC):
    """The words that methods ask of measurements, whatever their physics: `Gaussian` here, others in `deft_med.nonlinear`.

    ``y`` (B, ...) are the measurements, ``count`` how many real ones an item has, ``ratio`` what networks are told of M / N,
    ``s_img`` (B,) the noise propagated into the image. ``misfit`` is -2 ln p(y | u) without its constant, so that it is near
    ``count`` for the truth.
    """

    y: Tensor
    count: int | Tensor
    ratio: float
    seen: Tensor | None = None  # (B or 1, 1, y, x), False where no measurement can see the image, which is zero there

    def within(self, u: Tensor) -> Tensor:
        """u (B, C, y, x), zero where no measurement can see it."""
        return u if self.seen is None else torch.where(self.seen, u, 0)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(C, y, x) of an image in u."""

    @abstractmethod
    def misfit(self, u: Tensor) -> Tensor:
        """-2 ln p(y | u) per item (B,), zero where the data are met exactly; differentiable."""

    @abstractmethod
    def residual(self, u: Tensor) -> Tensor:
        """g (B, C, y, x): what the data would still change in the image, in the units of u."""

    @abstractmethod
    def direct(self) -> Tensor:
        """An image (B, C, y, x) straight from the data."""

    @abstractmethod
    def take(self, index: Tensor) -> "Likelihood":
        """The likelihood of other items of the batch: repeated ones for several samples of a slice."""

    @property
    def log_ratio(self) -> float:
        """ln(M / N): measurements over pixels."""
        return math.log(self.ratio)

    def log_prob(self, u: Tensor) -> Tensor:
        """ln p(y | u) without its constant, (B,)."""
        return -0.5 * self.misfit(u)

    def score(self, u: Tensor) -> Tensor:
        """grad_u ln p(y | u), (B, C, y, x)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(u).sum(), u)[0]

    def chi2(self, u: Tensor) -> Tensor:
        """The misfit over M per item (B,): 1 +- sqrt(2 / M) for the truth and for a posterior sample."""
        return self.misfit(u) / self.count


class Gaussian(Likelihood):
    """y = A u + sigma n: Gaussian measurements, real or complex, with a known standard deviation per real component.

    Args:
        forward: the affine operator from images u (B, C, y, x) to measurements (B, ...).
        y: measurements; of complex ones, those that were not made are zero.
        sigma: noise deviation, broadcastable to y: one per slice or one per measurement; inf where none was made. What stands in y there
            is a guess that only ``direct`` looks at.
        inverse: B, the acquisition's approximate inverse for ``forward.operator`` (FBP for CT, A^H W for MRI).
        count: M, real measurements per item; by default all of y that were made.
        ratio: what networks are told of M / N, measurements over pixels; by default just that.
        seen: where the measurements see the image at all, (B or 1, 1, y, x); it is zero elsewhere. By default everywhere.

    ``s_img`` (B,): the root mean square, over the pixels that are seen, of B applied to one fixed draw of the noise, in units of u. It
    says how noisy a measurement is in the picture, whatever the modality, dose or number of views.
    """

    def __init__(self, forward: Affine, y: Tensor, sigma: Tensor, inverse: LinearOperator, *, count: int | Tensor | None = None,
                 ratio: float | None = None, seen: Tensor | None = None, s_img: Tensor | None = None) -> None:
        self.forward, self.y, self.inverse, self.seen = forward, y, inverse, seen
        self.sigma = sigma.expand_as(y)
        self.measured = None if bool(sigma.isfinite().all()) else self.sigma.isfinite()
        self.count = self._made() if count is None else count
        most = float(self.count.max()) if isinstance(self.count, Tensor) else self.count
        self.ratio = most / math.prod(inverse.range_shape) if ratio is None else ratio
        if s_img is not None:
            self.s_img = s_img

    def _made(self) -> int | Tensor:
        parts = 2 if self.y.is_complex() else 1
        return parts * (math.prod(self.y.shape[1:]) if self.measured is None else self.measured.flatten(1).sum(1))

    def known(self, y: Tensor) -> Tensor:
        """y, zero where nothing was measured."""
        return y if self.measured is None else torch.where(self.measured, y, 0)

    @cached_property
    def s_img(self) -> Tensor:
        """Propagated noise (B,), computed when first asked for."""
        blank = torch.zeros((1, *self.y.shape[1:]), dtype=self.y.dtype)
        noise = gaussian(blank, 1.0, generator=Generator().manual_seed(0)).to(self.y)
        picture = self.inverse(self.known(self.sigma * noise)) / self.forward.a
        power = picture.square().flatten(1).mean(1)
        if self.seen is not None:
            power = power / self.seen.float().flatten(1).mean(1).clamp(min=1 / self.seen[0].numel())
        return power.sqrt().clamp(min=FAINTEST).expand(len(self.y))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, y, x) of an image in u."""
        image = self.forward.operator.domain_shape
        return image if len(image) > 2 else (1, *image)

    def residual(self, u: Tensor) -> Tensor:
        """g = B(y - A u), in the units of u: what the data would still change in the image; B sees 0 where nothing was measured."""
        if self._round_trip is None:
            return self.inverse(self.known(self.y - self.forward(u))) / self.forward.a
        return self._found - self._round_trip(self.forward.a * u) / self.forward.a

    @cached_property
    def _round_trip(self) -> LinearOperator | None:
        """B A where B, of coils on the grid, knows a shorter way than through k-space."""
        b, a = self.inverse, self.forward.operator
        if isinstance(b, Composition) and isinstance(a, Composition) and isinstance(b.right, SenseInverse) and b.right.operator is a.left:
            return b.left @ (b.right.round_trip @ a.right)
        return None

    @cached_property
    def _found(self) -> Tensor:
        """The residual of an image of zeros."""
        return self.inverse(self.known(self.y - self.forward(self._blank))) / self.forward.a

    @property
    def _blank(self) -> Tensor:
        return torch.zeros((len(self.y), *self.shape), dtype=self.sigma.dtype, device=self.y.device)

    def score(self, u: Tensor) -> Tensor:
        """grad_u ln p(y | u) = A^H W (y - A u), W = 1 / sigma^2: of coils as A^H W y - A^H W A u, whose gram is quicker than A and A^H."""
        if not self.y.is_complex() or self._level is None:
            return self.forward.adjoint((self.y - self.forward(u)) / self.sigma**2)
        return self._pulled - self.curvature(u)

    @cached_property
    def _pulled(self) -> Tensor:
        """The score of an image of zeros."""
        return self.forward.adjoint((self.y - self.forward(self._blank)) / self.sigma**2)

    def curvature(self, u: Tensor) -> Tensor:
        """A^H W A u, the Hessian of misfit / 2, W = 1 / sigma^2: by what A knows of its gram where sigma is one for all of an item."""
        if self._level is None:
            return self.forward.adjoint(self.forward.linear(u) / self.sigma.to(u) ** 2)
        return self.forward.gram(u) / self._level.to(u).reshape(-1, *[1] * (u.ndim - 1)) ** 2

    @cached_property
    def _level(self) -> Tensor | None:
        first = self.sigma.flatten(1)[:, :1]
        return first[:, 0] if bool((self.sigma.flatten(1) == first).all()) else None

    def misfit(self, u: Tensor) -> Tensor:
        """|W^1/2 (y - A u)|^2 per item (B,), with W = 1 / sigma^2."""
        return ((self.y - self.forward(u)).abs() / self.sigma).square().flatten(1).sum(1)

    def direct(self) -> Tensor:
        """B y as an image in u: the classical reconstruction with the filter that the networks are fed."""
        batch = self.y.shape[: self.y.ndim - len(self.inverse.domain_shape)]
        blank = torch.zeros((*batch, *self.inverse.range_shape), dtype=self.sigma.dtype, device=self.y.device)
        return self.inverse(self.y - self.forward(blank)) / self.forward.a

    def inverted_by(self, inverse: LinearOperator) -> "Gaussian":
        """The same measurements with another approximate inverse."""
        return Gaussian(self.forward, self.y, self.sigma, inverse, count=self.count, ratio=self.ratio, seen=self.seen)

    def take(self, index: Tensor) -> "Gaussian":
        """The likelihood of other items of the batch: repeated ones for several samples of a slice."""
        count = self.count[index] if isinstance(self.count, Tensor) else self.count
        seen = self.seen if self.seen is None or len(self.seen) == 1 else self.seen[index]
        made = Gaussian(self.forward.take(index), self.y[index], self.sigma[index], self.inverse, count=count, ratio=self.ratio,
                        seen=seen, s_img=self.s_img[index])
        made.__dict__ |= {name: vars(self)[name][index] for name in ("_found", "_pulled") if name in vars(self)}  # known already
        return made
