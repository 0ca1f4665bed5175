"""One U-Net for every network of the house: wide for priors, narrow for the h-transform."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _groups(channels: int) -> int:
    """Number of normalisation groups: about eight channels to a group."""
    return max(1, math.gcd(channels, max(1, channels // 8)))


class Embedding(nn.Module):
    """Fourier features of a few log-scalars, then a small perceptron.

    Input (B, S): natural logarithms (of sigma, s_img, M/N, ...). Output (B, D).
    The frequencies are fixed and low: a noise level is a smooth thing.
    """

    def __init__(self, scalars: int, dim: int, frequencies: int = 8) -> None:
        super().__init__()
        octaves = [-3 + 4 * k / (frequencies - 1) for k in range(frequencies)]  # not by torch: on "meta" it would load its compiler
        self.register_buffer("frequencies", torch.tensor([2.0**octave for octave in octaves]), persistent=False)
        self.layers = nn.Sequential(nn.Linear(scalars * 2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, scalars: Tensor) -> Tensor:
        phase = scalars[..., None] * self.frequencies
        return self.layers(torch.cat([phase.sin(), phase.cos()], -1).flatten(1))


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, the second behind a FiLM of the embedding; its last convolution starts at zero."""

    def __init__(self, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(dim, 2 * outputs)
        self.norm2 = nn.GroupNorm(_groups(outputs), outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


class UNet(nn.Module):
    """Convolutional U-Net behind a pixel-unshuffle stem; it works at half resolution and takes any image size.

    Args:
        in_channels, out_channels: image channels.
        widths: channels per level, finest (half resolution) first.
        scalars: how many log-scalars condition it (sigma; for h also s_img and M/N).
        blocks: residual blocks per level, on the way down and on the way up.
        dim: width of the embedding.

    ``forward(x (B, C, H, W), scalars (B, S)) -> (B, C', H, W)``. Sizes that are no multiple of ``multiple`` are padded by
    replication and cropped. The last layer starts at zero, so a fresh network returns exactly 0.
    """

    stem = 2
    half = False  # run in bfloat16 autocast; parameters, inputs and outputs stay float32

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], *, scalars: int = 1, blocks: int = 1,
                 dim: int = 128) -> None:
        super().__init__()
        self.multiple = self.stem * 2 ** (len(widths) - 1)
        self.embedding = Embedding(scalars, dim)
        self.inlet = nn.Conv2d(in_channels * self.stem**2, widths[0], 3, padding=1)
        self.down, self.up, self.shrink, self.grow = (nn.ModuleList() for _ in range(4))
        channels, skips = widths[0], []
        for level, width in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Block(channels, width, dim))
                channels = width
            self.down.append(stage)
            skips.append(channels)
            last = level == len(widths) - 1
            self.shrink.append(nn.Identity() if last else nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        self.middle = Block(channels, channels, dim)
        for level, width in reversed(list(enumerate(widths))):
            stage = nn.ModuleList()
            for index in range(blocks):
                stage.append(Block(channels + (skips[level] if index == 0 else 0), width, dim))
                channels = width
            self.up.append(stage)
            self.grow.append(nn.Conv2d(channels, widths[level - 1], 3, padding=1) if level else nn.Identity())
            channels = widths[level - 1] if level else channels
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.outlet = nn.Conv2d(channels, out_channels * self.stem**2, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, scalars: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            return self._forward(x, scalars).to(x.dtype)

    def _forward(self, x: Tensor, scalars: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pad = -height % self.multiple, -width % self.multiple
        if any(pad):
            x = F.pad(x, (0, pad[1], 0, pad[0]), mode="replicate")
        embedding = self.embedding(scalars)
        x = self.inlet(F.pixel_unshuffle(x, self.stem))
        kept = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, embedding)
            kept.append(x)
            x = shrink(x)
        x = self.middle(x, embedding)
        for stage, grow in zip(self.up, self.grow, strict=True):
            x = torch.cat([x, kept.pop()], 1)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, embedding)
            if kept:
                x = grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.outlet(F.silu(self.norm(x)))
        return F.pixel_shuffle(x, self.stem)[..., :height, :width]


def parameters(network: nn.Module) -> int:
    """Number of trainable values of a network."""
    return sum(p.numel() for p in network.parameters())


def bf16_pays(device: str | torch.device) -> bool:
    """Whether bfloat16 is faster than float32 here: on CUDA from compute capability 8, on CPUs with native instructions."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "avx512_bf16" in _cpu_flags()


def use_half(module: nn.Module, device: str | torch.device) -> None:
    """Run every U-Net of a module in bfloat16 where that pays."""
    for part in module.modules():
        if isinstance(part, UNet):
            part.half = bf16_pays(device)


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""
