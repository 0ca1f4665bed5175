"""A study over subjects: which slices of each, and a seed of its own for every one."""

import hashlib
from collections.abc import Iterator

import numpy as np

from deft_med import io
from deft_med.volume import Volume


def chosen_slices(listed: list[dict], count: int, modality: str = "CT") -> Iterator[tuple[int, Volume]]:
    """(number, one-slice volume) of a subject: ``count`` evenly spaced ones of all slices in the order of the files."""
    for number, volume, k in chosen_places(listed, count, modality):
        yield number, Volume(volume.data[k:k + 1], volume.affine, volume.unit)


def chosen_places(listed: list[dict], count: int, modality: str = "CT") -> Iterator[tuple[int, Volume, int]]:
    """The same as (number, the volume that it is in, its place in that volume)."""
    nifti = (".nii", ".nii.gz")
    sources = [io.read(e["image"], modality=modality if e["image"].endswith(nifti) else None) for e in listed]
    stacks = [source.volume for source in sources if source.volume is not None]
    places = [(v, k) for v in stacks for k in range(len(v.data))]
    picks = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)) if count > 1 else [len(places) // 2]
    for number in picks:
        yield int(number), *places[number]


def digest(seed: int, subject: str, key: int) -> int:
    """A seed of its own for every slice of every subject."""
    return int.from_bytes(hashlib.sha256(f"{seed} {subject} {key}".encode()).digest()[:4], "little")
