"""DEFT: a small network learns the h-transform of a frozen prior from images and measurements (Denker et al., NeurIPS 2024).

With the prior's denoiser D and the generalised h-transform h = grad_x ln p_sigma(y | x), the posterior denoiser is

    D(x, sigma | y) = E[x0 | x, y] = D(x, sigma) + sigma^2 h(x, sigma, y)              (Tweedie's formula, conditioned)

and minimising lambda(sigma) |D + sigma^2 h - x0|^2 over pairs (x0, y) gives h (theorem 3.1 of arXiv 2406.01781). Written with the
residual g = B(y - A D) in image units,

    sigma^2 h = c_h net(c_in x, D, g; ln sigma, ln s_img, ln M/N) + c_g g,

equation 12 of the paper with the filtered residual in place of the likelihood's gradient. What x leaves open has the deviation
c_out(sigma), what the measurements say of it the error n = s_img e^w with a small perceptron w(ln sigma, ln s_img, ln M/N): c_g =
c_out^2 / (c_out^2 + n^2) is the Wiener gain, c_h = c_out n / sqrt(c_out^2 + n^2) the deviation that is left for the network, both
octave by octave. What a pattern leaves open beside its noise, v(...) says: c_h is multiplied by e^v. A fresh h is a posterior mean
already, and the network never has to repeat what the residual says. In the paper's epsilon form c_h = sigma and c_g = sigma w: eps_h =
-(net + w g). No gradient passes through the prior, in training or in sampling. Where no coil sees, the image is zero.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deft_med.likelihood import Gaussian
from deft_med.network import Embedding
from deft_med.octaves import scale_octaves
from deft_med.prior import Preconditioned, Prior, scalings
from deft_med.schedule import Denoiser

FORMS = ("wiener", "edm", "epsilon")
LOST = 0.15  # of an image's deviation, about, that sparse measurements do not see


class Weight(nn.Module):
    """w(scalars) of every octave: how far to trust the residual itself; a perceptron that starts at a constant."""

    def __init__(self, octaves: int = 1, start: float = 0.1, dim: int = 32, scalars: int = 2) -> None:
        super().__init__()
        self.embedding, self.last = Embedding(scalars, dim), nn.Linear(dim, octaves)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, start)

    def forward(self, scalars: Tensor) -> Tensor:
        return self.last(self.embedding(scalars)).T[..., None]  # (L, B, 1)


def wiener(deviation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """s^2 / (s^2 + n^2), the gain of the best linear estimate of a signal from signal + noise, and the deviation of its error."""
    total = deviation.square() + noise.square()
    return deviation.square() / total, deviation * noise / total.sqrt()


class Trust(nn.Module):
    """Gain c_g of the residual and scale c_h of the network (L, B, C) in the wiener form, from what x leaves open, s_img (B,) and all
    scalars; w starts at ln 2, v at 0."""

    def __init__(self, octaves: int, scalars: int) -> None:
        super().__init__()
        self.w, self.v = Weight(octaves, math.log(2), scalars=scalars), Weight(octaves, 0.0, scalars=scalars)

    def forward(self, open_: Tensor, s_img: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
        gain, left = wiener(open_, s_img[None, :, None] * self.w(scalars).exp())
        return gain, left * self.v(scalars).exp()


def precision(sigma: Tensor, sd: float, s_img: Tensor) -> Tensor:
    """1 / (c_h^2 + (LOST c_out)^2), (B,), with c_h of a fresh h: the weight of a posterior denoiser's error in its loss.

    Every noise level and every measurement weighs the same at the start. The prior's weight alone (`prior.weight`) would leave the high
    noise levels, where the data say nearly all, a tenth of the loss, and spend it where they say nothing.
    """
    out = scalings(sigma, sd)[1]
    return 1 / (wiener(out, 2 * s_img)[1].square() + (LOST * out).square())


class HTransform(Preconditioned):
    """The learned part: ``(x, D, g (B, C, H, W), sigma, s_img (B,), log_ratio) -> sigma^2 h (B, C, H, W)``.

    ``network`` takes 3 C channels and 3 log-scalars. A fresh ``UNet`` returns 0, so that DEFT starts at D + c_g g. ``form``:
    'wiener' as above, with n = 2 s_img at the start; 'edm' c_h = c_out, c_g = c_out w; 'epsilon' the same with sigma for c_out, as the
    paper has it. Octaves (`Preconditioned`) are scaled one by one in every form.
    """

    def __init__(self, network: nn.Module, *, sd: float = 0.5, octaves: Sequence[Sequence[float]] = (), form: str = "edm") -> None:
        super().__init__(network, sd=sd, octaves=octaves)
        if form not in FORMS:
            raise ValueError(f"the h-transform's form is one of {', '.join(FORMS)}, got {form!r}")
        self.form = form
        self.weight = Trust(len(self.sds), 3) if form == "wiener" else Weight(len(self.sds))

    def forward(self, x: Tensor, d: Tensor, g: Tensor, sigma: Tensor, s_img: Tensor, log_ratio: float) -> Tensor:
        _, out, inp = self.scalings(sigma)
        scalars = torch.stack([sigma.log(), s_img.log(), torch.full_like(s_img, log_ratio)], 1)
        unit = self.sd / self.sds[:, None].to(x)
        if self.form == "wiener":
            gain, left = self.weight(out, s_img, scalars)
            scale = gain.detach().sqrt() / out  # the residual has the deviation sqrt(c_out^2 + n^2)
        else:
            left = out if self.form == "edm" else sigma[None, :, None].expand_as(out)
            gain, scale = left * self.weight(scalars[:, :2]), unit
        seen = torch.cat([scale_octaves(x, inp), scale_octaves(d, unit), scale_octaves(g, scale)], 1)
        return scale_octaves(self.network(seen, scalars), left) + scale_octaves(g, gain)


class Deft(nn.Module):
    """The sum of both: ``(x, sigma, likelihood) -> D(x, sigma | y)``. Training and sampling call this one function.

    ``mirror`` flips what the networks see, and their answers back, along those axes: the data stay where they are.
    """

    def __init__(self, prior: Prior, h: HTransform) -> None:
        super().__init__()
        self.prior, self.h = prior.freeze(), h

    def forward(self, x: Tensor, sigma: Tensor, likelihood: Gaussian, mirror: tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            d = likelihood.within(self.prior(x.flip(mirror), sigma).flip(mirror))
            g = likelihood.residual(d)
        seen = (image.flip(mirror) for image in (x, d, g))
        return likelihood.within(d + self.h(*seen, sigma, likelihood.s_img, likelihood.log_ratio).flip(mirror))

    def given(self, likelihood: Gaussian, mirrors: Sequence[tuple[int, ...]] = ((),)) -> Denoiser:
        """The posterior denoiser of these measurements; with several ``mirrors`` they take turns from call to call.

        Networks that were trained on flipped images should answer alike in every mirror; where they do not, errors that turn with
        the mirror average out along a run.
        """
        turns = itertools.cycle(mirrors)
        return lambda x, sigma: self(x, sigma, likelihood, next(turns))
