"""The prior: a denoiser D(x, sigma), an estimate of E[x0 | x], from a network with the EDM preconditioning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deft_med.octaves import scale_octaves
from deft_med.schedule import SIGMA_MAX, SIGMA_MIN


def scalings(sigma: Tensor, sd: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of Karras et al. 2022, table 1, for noise sigma and data deviation sd."""
    total = sigma.square() + sd**2
    return sd**2 / total, sigma * sd / total.sqrt(), 1 / total.sqrt()


def weight(sigma: Tensor, sd: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2: every noise level weighs the same at the start."""
    return (sigma.square() + sd**2) / (sigma * sd).square()


class Preconditioned(nn.Module):
    """What networks that learn a denoiser share: c_skip, c_out and c_in of every octave of an image.

    Args:
        sd: root mean square of the images.
        octaves: that of their octaves (L, C or 1), finest first (`octaves.deviations`); without them ``sd`` serves for the whole image.
    """

    sds: Tensor

    def __init__(self, network: nn.Module, *, sd: float, octaves: Sequence[Sequence[float]] = ()) -> None:
        super().__init__()
        self.network, self.sd = network, sd
        self.register_buffer("sds", torch.tensor([list(each) for each in octaves] or [[sd]]), persistent=False)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in (L, B, C) for noise sigma (B,)."""
        return scalings(sigma[None, :, None], self.sds[:, None].to(sigma))


class Prior(Preconditioned):
    """Unconditional denoiser ``D(x (B, C, H, W), sigma (B,)) -> x0hat (B, C, H, W)``.

    D = c_skip x + c_out F(c_in x; log sigma), octave by octave where their deviations are given. ``freeze()`` fixes the weights;
    gradients with respect to x always flow, because guidance through the prior needs them: whoever does not need them says
    ``torch.no_grad()``.
    """

    def __init__(self, network: nn.Module, *, sd: float = 0.5, octaves: Sequence[Sequence[float]] = (), sigma_min: float = SIGMA_MIN,
                 sigma_max: float = SIGMA_MAX) -> None:
        super().__init__(network, sd=sd, octaves=octaves)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        skip, out, inp = self.scalings(sigma)
        return scale_octaves(x, skip) + scale_octaves(self.network(scale_octaves(x, inp), sigma.log()[:, None]), out)

    def freeze(self) -> "Prior":
        """Fix the weights and go to evaluation mode; returns itself."""
        return self.requires_grad_(False).eval()


def denoising_loss(x0hat: Tensor, x0: Tensor, sigma: Tensor, sd: float) -> Tensor:
    """lambda(sigma) |x0hat - x0|^2, mean over pixels: one value per image (B,). The loss of prior and h-transform alike."""
    return weight(sigma, sd) * (x0hat - x0).square().flatten(1).mean(1)


