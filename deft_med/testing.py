"""The Gaussian laboratory: a stationary Gaussian prior under a real operator, where everything has a closed form.

It needs no weights and no data, and finds the errors that no PSNR shows: a factor of sigma, a factor of two, a spread too narrow.
"""

import math

import torch
from torch import Generator, Tensor

from deft_med.intensity import Affine
from deft_med.likelihood import Gaussian
from deft_med.schedule import Denoiser, per_item
from operators.analytic import FilteredBackprojection
from operators.ct import RayTransform
from operators.geometry import Grid, ParallelBeam, uniform_angles
from operators.linear import LinearOperator


class Laboratory:
    """x0 ~ N(mean, C) with C stationary (periodic), y = A x0 + s n: exact denoisers, posterior and evidence, in float64.

    Args:
        operator: (n, n) -> range; ``ct()`` builds one.
        inverse: its approximate inverse, for the residual.
        s: noise deviation of y.
        sd, length: deviation per pixel and correlation length in pixels; length 0 is white noise.

    Images are (B, 1, n, n), measurements (B, 1, *range).
    """

    def __init__(self, operator: LinearOperator, inverse: LinearOperator, s: float, *, sd: float = 0.5, length: float = 2.0,
                 mean: float = -0.3) -> None:
        self.operator, self.inverse, self.s, self.sd, self.mean = operator, inverse, s, sd, mean
        self.n = operator.domain_shape[0]
        k = torch.fft.fftfreq(self.n, dtype=torch.float64)
        shape = (1 + (2 * math.pi * length) ** 2 * (k[:, None] ** 2 + k**2)) ** -1.5
        self.spectrum = shape / shape.mean() * sd**2  # eigenvalues of C in the Fourier basis
        identity = torch.eye(self.n**2, dtype=torch.float64).reshape(-1, 1, self.n, self.n)
        self.matrix = operator(identity).reshape(self.n**2, -1).T  # A, dense
        self.covariance = self._filter(identity, self.spectrum).reshape(self.n**2, -1)
        precision = torch.linalg.inv(self.covariance) + self.matrix.T @ self.matrix / s**2
        inverted = torch.linalg.inv(precision)
        self.posterior_covariance = 0.5 * (inverted + inverted.T)
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.posterior_covariance)

    @staticmethod
    def ct(n: int = 32, views: int = 60, *, relative_noise: float = 0.035, window: str = "ram-lak", **settings) -> "Laboratory":
        """A laboratory under a real parallel-beam operator; the noise is relative to a typical line integral."""
        grid = Grid(shape=(n, n), spacing=(1.0, 1.0))
        beam = ParallelBeam(angles=uniform_angles(views), detectors=math.ceil(math.sqrt(2) * n), pitch=1.0)
        operator = RayTransform(grid, beam)
        return Laboratory(operator, FilteredBackprojection(operator, window=window), relative_noise * n, **settings)

    @staticmethod
    def _filter(x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * response).real

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Images (count, 1, n, n) from the prior."""
        white = torch.randn(count, 1, self.n, self.n, dtype=torch.float64, generator=generator)
        return self.mean + self._filter(white, self.spectrum.sqrt())

    def measure(self, x0: Tensor, generator: Generator) -> Gaussian:
        """The likelihood of a fresh measurement of x0."""
        y = self.operator(x0)
        return self.given(y + self.s * torch.randn(y.shape, dtype=y.dtype, generator=generator))

    def given(self, y: Tensor) -> Gaussian:
        """The likelihood of measurements y (B, 1, *range)."""
        return Gaussian(Affine(self.operator, 1.0, 0.0), y, y.new_full((1,) * y.ndim, self.s), self.inverse)

    def prior(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, sigma) = mean + C (C + sigma^2)^-1 (x - mean)."""
        return self.mean + self._filter(x - self.mean, self.spectrum / (self.spectrum + per_item(sigma, x) ** 2))

    def posterior_mean(self, y: Tensor) -> Tensor:
        """E[x0 | y] (B, 1, n, n)."""
        residual = y.flatten(1) - self.mean * self.matrix.sum(1)
        return self.mean + (residual @ self.matrix / self.s**2 @ self.posterior_covariance).reshape(-1, 1, self.n, self.n)

    def posterior(self, y: Tensor) -> Denoiser:
        """The exact posterior denoiser (x, sigma) -> E[x0 | x, y]: the prior's formula with the posterior's mean and covariance."""
        centre = self.posterior_mean(y)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            modes = (x - centre).flatten(1) @ self.eigenvectors
            modes = modes * self.eigenvalues / (self.eigenvalues + sigma[:, None] ** 2)
            return centre + (modes @ self.eigenvectors.T).reshape(x.shape)

        return denoiser

    def log_evidence(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """ln p_sigma(y | x) (B,) without its constant in x: y | x ~ N(A D(x, sigma), A C_sigma A^T + s^2)."""
        values = []
        for item, level, data in zip(x, sigma, y, strict=True):
            left = self.spectrum * level**2 / (self.spectrum + level**2)
            identity = torch.eye(self.n**2, dtype=torch.float64).reshape(-1, 1, self.n, self.n)
            spread = self.matrix @ self._filter(identity, left).reshape(self.n**2, -1) @ self.matrix.T
            spread = spread + self.s**2 * torch.eye(len(spread), dtype=torch.float64)
            residual = data.flatten() - self.matrix @ self.prior(item[None], level[None]).flatten()
            values.append(-0.5 * residual @ torch.linalg.solve(spread, residual))
        return torch.stack(values)

    def least_error(self, sigma: float) -> float:
        """The smallest mean square error per pixel of any estimate from (x, y): tr(S sigma^2 / (S + sigma^2)) / N, S = Cov[x0 | y]."""
        return float((self.eigenvalues * sigma**2 / (self.eigenvalues + sigma**2)).mean())
