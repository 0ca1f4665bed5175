"""Octaves of an image: a Haar transform whose bands are scaled one by one, so that a network sees and answers all of them alike.

Medical images hold most of their energy in a few coarse shapes: the deviation falls by a factor of two and more from octave to octave.
A network that is given x / rms(x) sees fine noise as a ripple on a large signal, and learns for thousands of steps before it removes
any. With the scalings of Karras et al. 2022 taken octave by octave, its first guess is the Wiener filter of the octaves already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_octaves(x: Tensor, gains: Tensor) -> Tensor:
    """x (B, C, H, W) with its octaves multiplied by ``gains`` (L, B or 1, C or 1): finest first, the last one for the mean that remains.

    Linear in x, and orthogonal bands where H and W are multiples of 2^(L - 1); elsewhere the edge is replicated.
    """
    gain = gains[0, :, :, None, None]
    if len(gains) == 1:
        return x * gain
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    mean = F.avg_pool2d(x, 2)  # the details are what it leaves over
    wanted = scale_octaves(2 * mean, gains[1:]) / 2 - gain * mean
    return (gain * x + F.interpolate(wanted, scale_factor=2.0, mode="nearest"))[..., :height, :width]


def deviations(images: Tensor, octaves: int) -> Tensor:
    """Root mean squares (octaves + 1, C) of the octaves of images (B, C, H, W), in the order of `scale_octaves`."""
    found = []
    for _ in range(octaves):
        mean = F.avg_pool2d(images, 2)
        detail = images - F.interpolate(mean, scale_factor=2.0, mode="nearest")
        found.append((detail.square().mean((0, 2, 3)) * 4 / 3).sqrt())  # three of four coefficients are details
        images = 2 * mean
    return torch.stack([*found, images.square().mean((0, 2, 3)).sqrt()])
