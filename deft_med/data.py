"""Training images: volumes split by subject, one array file, and crops drawn from it with augmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor


@dataclass(frozen=True)
class Pool:
    """Slices of many subjects, at one or several matrix sizes.

    images {matrix: (n, matrix, matrix) int16 HU}, spacing {matrix: (n,) mm}, subject {matrix: (n,) index}.
    """

    images: dict[int, Tensor]
    spacing: dict[int, Tensor]
    subject: dict[int, Tensor]

    def save(self, path: Path) -> None:
        """One safetensors file, which ``Pool.load`` reads anywhere."""
        fields = {"images": self.images, "spacing": self.spacing, "subject": self.subject}
        save_file({f"{field}.{matrix}": t.contiguous() for field, by in fields.items() for matrix, t in by.items()}, path)

    def to(self, device: str | torch.device) -> "Pool":
        """The same arrays on a device."""
        return Pool(*({matrix: t.to(device) for matrix, t in by.items()} for by in (self.images, self.spacing, self.subject)))

    @staticmethod
    def load(path: Path, device: str | torch.device = "cpu") -> "Pool":
        fields: dict[str, dict[int, Tensor]] = {"images": {}, "spacing": {}, "subject": {}}
        for name, tensor in load_file(path, device=str(device)).items():
            field, matrix = name.split(".")
            fields[field][int(matrix)] = tensor
        return Pool(**fields)


@dataclass(frozen=True)
class Augmentation:
    """How crops are drawn: a share ``plain`` is only flipped, turned by quarters and shifted, so that its texture is the scanner's
    own; the rest is also turned by any angle and rescaled to a pixel size drawn from ``pixel_mm`` (log-uniform).
    ``balance`` b draws a subject with probability proportional to its number of slices to the power b (0: all alike).
    ``detail`` d multiplies the amplitude at f of the image's spectrum by 1 + a (f / f_Nyquist)^2, a uniform on [-d / 4, d]: scanners
    differ in sharpness, and a prior that knows the soft ones alone smooths what the sharp ones saw.
    A share ``tissue`` of MR images has a phase that turns with the tissue (`draws.tissue_phase`)."""

    plain: float = 0.5
    pixel_mm: tuple[float, float] = (0.7, 2.2)
    balance: float = 0.3
    highest: float = 3.0  # u above this (dense metal) is cut in training
    background: float = -1.0  # u beyond the image's edge, and the lowest there is: air in CT, 0 in MR
    detail: float = 0.0
    tissue: float = 0.0


def draw_images(pool: Pool, count: int, size: int, augmentation: Augmentation, generator: Generator) -> tuple[Tensor, Tensor]:
    """``count`` augmented images (count, 1, size, size) in u = HU / 1000, and their pixel sizes (count,) in mm."""
    device = generator.device
    coarse = min(pool.images)
    ids, slices = pool.subject[coarse].unique(return_counts=True)
    subjects = ids[torch.multinomial(slices.to(device).double() ** augmentation.balance, count, True, generator=generator).to(ids.device)]
    r = torch.rand(count, 8, generator=generator, device=device, dtype=torch.float64).cpu().tolist()
    images, pixels = [], []
    for subject, draws in zip(subjects.tolist(), r, strict=True):
        image, pixel = _draw_one(pool, subject, size, augmentation, draws)
        images.append(image)
        pixels.append(pixel)
    u = torch.stack(images)[:, None]
    if augmentation.detail > 0:
        share = torch.rand(count, 1, 1, 1, generator=generator, device=device)
        u = _sharpened(u, augmentation.detail * (1.25 * share - 0.25)).clamp(augmentation.background, augmentation.highest)
    return u, torch.tensor(pixels)


def _sharpened(u: Tensor, a: Tensor) -> Tensor:
    """u (B, 1, n, n) with its spectrum times 1 + a (f / f_Nyquist)^2."""
    n = u.shape[-1]
    y, x = torch.fft.fftfreq(n, 0.5, device=u.device)[:, None], torch.fft.rfftfreq(n, 0.5, device=u.device)
    return torch.fft.irfft2(torch.fft.rfft2(u) * (1 + a * (y.square() + x.square())), s=(n, n))


def _draw_one(pool: Pool, subject: int, size: int, augmentation: Augmentation, r: Sequence[float]) -> tuple[Tensor, float]:
    matrices = sorted(pool.images)
    plain = r[0] < augmentation.plain
    matrix = matrices[0]
    rows = (pool.subject[matrix] == subject).nonzero()[:, 0]
    index = int(rows[int(r[1] * len(rows))])
    pixel = native = float(pool.spacing[matrix][index])
    if not plain:
        low, high = (math.log(value) for value in augmentation.pixel_mm)
        pixel = math.exp(low + r[2] * (high - low))
        for finer in matrices[1:]:  # a finer source where it exists, so that small pixels are not blurred ones
            fine = (pool.subject[finer] == subject).nonzero()[:, 0]
            if len(fine) and pixel < 0.8 * native:
                index, matrix = int(fine[int(r[1] * len(fine))]), finer
                native = float(pool.spacing[finer][index])
        pixel = min(max(pixel, 0.75 * native), 1.6 * native)
    image = pool.images[matrix][index].float().div(1000).clamp(augmentation.background, augmentation.highest)
    if r[3] < 0.5:
        image = image.flip(-1)
    if r[4] < 0.5:  # half of all images stay upright, as patients lie
        image = torch.rot90(image, int(8 * r[4]), (-2, -1))
    if plain:
        return _window(image, size, r[5], r[6], augmentation.background), pixel
    angle, scale = (r[7] - 0.5) * math.pi / 4, pixel / native
    slack = max(0.0, matrix - size * scale) / 2 + 0.05 * size * scale
    centre = [(2 * value - 1) * slack for value in (r[5], r[6])]  # source pixels off the centre
    axis = (torch.arange(size, device=image.device, dtype=torch.float32) - (size - 1) / 2) * scale
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    grid = torch.stack([cos * x - sin * y + centre[0], sin * x + cos * y + centre[1]], -1) / (matrix / 2)
    low = augmentation.background
    moved = F.grid_sample(image[None, None] - low, grid[None], mode="bicubic", padding_mode="zeros", align_corners=False) + low
    return moved[0, 0].clamp(augmentation.background, augmentation.highest), pixel


def crops(images: Tensor, size: int, generator: Generator) -> Tensor:
    """A window of size x size at a random place of every image (B, C, n, n)."""
    room = images.shape[-1] - size
    places = torch.randint(room + 1, (len(images), 2), generator=generator, device=generator.device).tolist()
    return torch.stack([image[:, y:y + size, x:x + size] for image, (y, x) in zip(images, places, strict=True)])


def _window(image: Tensor, size: int, ry: float, rx: float, background: float) -> Tensor:
    """A crop of size x size at a random place; a whole image is moved a little, with background where it ends."""
    margin = max(0, size - image.shape[-1]) + (size // 8 if size >= image.shape[-1] else 0)
    padded = F.pad(image, (margin,) * 4, value=background)
    room = [n - size for n in padded.shape]
    top, left = (int((0.5 + 0.9 * (r - 0.5)) * (n + 1)) for r, n in zip((ry, rx), room, strict=True))
    if size >= image.shape[-1]:  # whole images stay near the centre
        top, left = (margin + int((r - 0.5) * 0.1 * size) for r in (ry, rx))
        top, left = max(0, min(room[0], top)), max(0, min(room[1], left))
    return padded[top:top + size, left:left + size]
