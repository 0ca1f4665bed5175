"""Networks trained on pairs without a prior: what DEFT is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deft_med.htransform import Trust
from deft_med.likelihood import Gaussian
from deft_med.octaves import scale_octaves
from deft_med.prior import Preconditioned


class Supervised(Preconditioned):
    """FBP + U-Net (Jin et al. 2017): ``likelihood -> x0hat``, one evaluation, an estimate of E[x0 | y].

    ``network`` takes the filtered backprojection (C channels) and two log-scalars, ln s_img and ln M/N; it learns what to add, with
    ``form='wiener'`` to the backprojection's Wiener filter, octave by octave, in units of what that leaves open (`htransform.wiener`).
    """

    def __init__(self, network: nn.Module, *, sd: float, octaves: Sequence[Sequence[float]] = (), form: str = "edm") -> None:
        super().__init__(network, sd=sd, octaves=octaves)
        self.form = form
        if form == "wiener":
            self.weight = Trust(len(self.sds), 2)

    def forward(self, likelihood: Gaussian) -> Tensor:
        fbp = likelihood.direct()
        ratio = torch.full_like(likelihood.s_img, likelihood.log_ratio)
        scalars, sds = torch.stack([likelihood.s_img.log(), ratio], 1), self.sds[:, None].to(fbp)
        if self.form != "wiener":
            return fbp + scale_octaves(self.network(scale_octaves(fbp, self.sd / sds), scalars), sds / self.sd)
        gain, left = self.weight(sds, likelihood.s_img, scalars)
        added = scale_octaves(self.network(scale_octaves(fbp, gain.detach().sqrt() / sds), scalars), left)
        return likelihood.within(scale_octaves(fbp, gain) + added)


class Conditional(Preconditioned):
    """The amortised conditional denoiser, trained from scratch: ``(x, sigma, likelihood) -> E[x0 | x, y]``.

    D = c_skip x + c_out F(c_in x, B y; ln sigma, ln s_img, ln M/N): appendix H of the DEFT paper, in the EDM frame.
    """

    def forward(self, x: Tensor, sigma: Tensor, likelihood: Gaussian) -> Tensor:
        skip, out, inp = self.scalings(sigma)
        ratio = torch.full_like(likelihood.s_img, likelihood.log_ratio)
        scalars = torch.stack([sigma.log(), likelihood.s_img.log(), ratio], 1)
        direct = scale_octaves(likelihood.direct(), self.sd / self.sds[:, None].to(x))
        return scale_octaves(x, skip) + scale_octaves(self.network(torch.cat([scale_octaves(x, inp), direct], 1), scalars), out)
