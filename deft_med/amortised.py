"""Networks trained on pairs without a prior: what DEFT is compared with."""

import torch
from torch import Tensor, nn

from deft_med.likelihood import Gaussian
from deft_med.prior import scalings
from deft_med.schedule import per_item


class Supervised(nn.Module):
    """FBP + U-Net (Jin et al. 2017): ``likelihood -> x0hat``, one evaluation, an estimate of E[x0 | y].

    ``network`` takes the filtered backprojection (C channels) and two log-scalars, ln s_img and ln M/N; it learns what to add.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, likelihood: Gaussian) -> Tensor:
        fbp = likelihood.direct()
        ratio = torch.full_like(likelihood.s_img, likelihood.log_ratio)
        return fbp + self.network(fbp, torch.stack([likelihood.s_img.log(), ratio], 1))


class Conditional(nn.Module):
    """The amortised conditional denoiser, trained from scratch: ``(x, sigma, likelihood) -> E[x0 | x, y]``.

    D = c_skip x + c_out F(c_in x, B y; ln sigma, ln s_img, ln M/N): appendix H of the DEFT paper, in the EDM frame.
    """

    def __init__(self, network: nn.Module, *, sd: float = 0.5) -> None:
        super().__init__()
        self.network, self.sd = network, sd

    def forward(self, x: Tensor, sigma: Tensor, likelihood: Gaussian) -> Tensor:
        skip, out, inp = scalings(per_item(sigma, x), self.sd)
        ratio = torch.full_like(likelihood.s_img, likelihood.log_ratio)
        scalars = torch.stack([sigma.log(), likelihood.s_img.log(), ratio], 1)
        return skip * x + out * self.network(torch.cat([inp * x, likelihood.direct()], 1), scalars)
