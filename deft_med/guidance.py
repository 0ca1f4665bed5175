"""Methods without training: short functions that turn a denoiser and a likelihood into a posterior denoiser."""

from torch import Tensor

from deft_med.likelihood import Gaussian
from deft_med.schedule import Denoiser, per_item
from operators.linear import LinearOperator
from operators.solve import cg


def spread(sigma: Tensor, sd: float) -> Tensor:
    """r^2 = sigma^2 sd^2 / (sigma^2 + sd^2): Var[x0 | x] per pixel of a white Gaussian with deviation sd."""
    return sigma.square() * sd**2 / (sigma.square() + sd**2)


class _Curvature(LinearOperator):
    """A^H A / s^2 + 1 / r^2, the Hessian of DDS's objective: self-adjoint and positive."""

    def __init__(self, likelihood: Gaussian, r2: Tensor) -> None:
        super().__init__(likelihood.forward.operator.domain_shape, likelihood.forward.operator.domain_shape)
        self.likelihood, self.r2 = likelihood, r2

    def _forward(self, x: Tensor) -> Tensor:
        y = self.likelihood.forward.linear(x) / self.likelihood.sigma.to(x) ** 2
        return self.likelihood.forward.adjoint(y) + x / self.r2

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)


def dds(denoiser: Denoiser, likelihood: Gaussian, *, sd: float = 0.5, iterations: int = 5, tolerance: float = 0.0) -> Denoiser:
    """Decomposed diffusion sampling: D' = argmin_z |y - A z|^2 / s^2 + |z - D|^2 / r^2, by CG from D.

    Converged, it is PiGDM with the Jacobian r^2 / sigma^2: h = (D' - D) / sigma^2 with
    D' - D = r^2 A^H (r^2 A A^H + s^2)^-1 (y - A D). Chung et al. 2024 (arXiv 2303.05754), with the noise levels setting the trust.
    ``sd`` says what D leaves open: r^2 = sigma^2 sd^2 / (sigma^2 + sd^2). Around a posterior denoiser a small one corrects it only
    where the data are sure.
    """
    def posterior(x: Tensor, sigma: Tensor) -> Tensor:
        d = denoiser(x, sigma)
        curvature = _Curvature(likelihood, per_item(spread(sigma, sd), x))
        return d + cg(curvature, likelihood.score(d), iterations=iterations, tolerance=tolerance)

    return posterior
