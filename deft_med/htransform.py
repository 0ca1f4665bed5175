"""DEFT: a small network learns the h-transform of a frozen prior from images and measurements (Denker et al., NeurIPS 2024).

With the prior's denoiser D and the generalised h-transform h = grad_x ln p_sigma(y | x), the posterior denoiser is

    D(x, sigma | y) = E[x0 | x, y] = D(x, sigma) + sigma^2 h(x, sigma, y)              (Tweedie's formula, conditioned)

and minimising lambda(sigma) |D + sigma^2 h - x0|^2 over pairs (x0, y) gives h (theorem 3.1 of arXiv 2406.01781). Written with the
residual g = B(y - A D) in image units,

    sigma^2 h = c_out(sigma) (net(c_in x, D, g; ln sigma, ln s_img, ln M/N) + w(ln sigma, ln s_img) g),

equation 12 of the paper with the filtered residual in place of the likelihood's gradient. With c_out = sigma it is the paper's
epsilon form: eps_h = -(net + w g). No gradient passes through the prior, in training or in sampling.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deft_med.likelihood import Gaussian
from deft_med.network import Embedding
from deft_med.octaves import scale_octaves
from deft_med.prior import Preconditioned, Prior
from deft_med.schedule import Denoiser


class Weight(nn.Module):
    """w(ln sigma, ln s_img) of every octave: how far to trust the residual itself; a perceptron that starts at a small constant."""

    def __init__(self, octaves: int = 1, start: float = 0.1, dim: int = 32) -> None:
        super().__init__()
        self.embedding, self.last = Embedding(2, dim), nn.Linear(dim, octaves)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, start)

    def forward(self, scalars: Tensor) -> Tensor:
        return self.last(self.embedding(scalars)).T[..., None]  # (L, B, 1)


class HTransform(Preconditioned):
    """The learned part: ``(x, D, g (B, C, H, W), sigma, s_img (B,), log_ratio) -> sigma^2 h (B, C, H, W)``.

    ``network`` takes 3 C channels and 3 log-scalars (a fresh ``UNet`` returns 0, so DEFT starts at D + 0.1 c_out g).
    D and g reach it in units of sd; with octaves (`Preconditioned`) all of this holds octave by octave. ``form='edm'`` scales by
    c_out = sigma sd / sqrt(sigma^2 + sd^2), ``form='epsilon'`` by sigma as the paper does.
    """

    def __init__(self, network: nn.Module, *, sd: float = 0.5, octaves: Sequence[Sequence[float]] = (), form: str = "edm") -> None:
        super().__init__(network, sd=sd, octaves=octaves)
        if form not in ("edm", "epsilon"):
            raise ValueError(f"the h-transform's form is 'edm' or 'epsilon', got {form!r}")
        self.weight, self.form = Weight(len(self.sds)), form

    def forward(self, x: Tensor, d: Tensor, g: Tensor, sigma: Tensor, s_img: Tensor, log_ratio: float) -> Tensor:
        _, out, inp = self.scalings(sigma)
        if self.form == "epsilon":
            out = sigma[None, :, None].expand_as(out)
        unit = self.sd / self.sds[:, None].to(x)
        scalars = torch.stack([sigma.log(), s_img.log(), torch.full_like(s_img, log_ratio)], 1)
        seen = [scale_octaves(x, inp), scale_octaves(d, unit), scale_octaves(g, unit)]
        return scale_octaves(self.network(torch.cat(seen, 1), scalars), out) + scale_octaves(g, out * self.weight(scalars[:, :2]))


class Deft(nn.Module):
    """The sum of both: ``(x, sigma, likelihood) -> D(x, sigma | y)``. Training and sampling call this one function.

    ``mirror`` flips what the networks see, and their answers back, along those axes: the data stay where they are.
    """

    def __init__(self, prior: Prior, h: HTransform) -> None:
        super().__init__()
        self.prior, self.h = prior.freeze(), h

    def forward(self, x: Tensor, sigma: Tensor, likelihood: Gaussian, mirror: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            d = self.prior(x.flip(mirror), sigma).flip(mirror)
            g = likelihood.residual(d)
        seen = (image.flip(mirror) for image in (x, d, g))
        return d + self.h(*seen, sigma, likelihood.s_img, likelihood.log_ratio).flip(mirror)

    def given(self, likelihood: Gaussian, mirrors: Sequence[tuple[int, ...]] = ((),)) -> Denoiser:
        """The posterior denoiser of these measurements; with several ``mirrors`` they take turns from call to call.

        Networks that were trained on flipped images should answer alike in every mirror; where they do not, errors that turn with
        the mirror average out along a run.
        """
        turns = itertools.cycle(mirrors)
        return lambda x, sigma: self(x, sigma, likelihood, next(turns))
