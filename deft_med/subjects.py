"""Folders of scans -> one array file: every image through ``io.read``, MONAI after it, subjects kept apart."""

import functools
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from deft_med import io
from deft_med.data import Pool
from deft_med.errors import UsageError

MATRICES = (256, 512)


def entries(folder: Path, manifest: Path | None = None, split: str | None = None) -> list[dict]:
    """What there is to read below a folder: ``{"image": path, "subject": name}``, sorted by path.

    With a manifest (a JSON list of objects with ``file``, ``subject`` and ``split``) its files of that split; without, every NIfTI
    file and every folder of DICOM files, the subject being the name of the first folder (or file) below ``folder``.
    Raises UsageError when there is nothing, or when a manifest names a subject in two splits.
    """
    if not folder.is_dir():
        raise UsageError("no such folder of training images: give one in data.train and data.tune")
    if manifest is not None:
        listed = json.loads(manifest.read_text("utf-8"))
        homes: dict[str, set[str]] = {}
        for entry in listed:
            homes.setdefault(entry["subject"], set()).add(entry["split"])
        shared = sorted(subject for subject, splits in homes.items() if len(splits) > 1)
        if shared:
            raise UsageError(f"{len(shared)} subjects of the manifest stand in two splits: split by subject")
        found = [{"image": str(folder / e["file"]), "subject": e["subject"]} for e in listed if split in (None, e["split"])]
    else:
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        images = {p if p.name.endswith((".nii", ".nii.gz")) else p.parent for p in files}
        found = [{"image": str(p), "subject": p.relative_to(folder).parts[0] if p != folder else p.name} for p in images]
    if not found:
        raise UsageError("no images found: give a folder with NIfTI files or DICOM series below it, one subject a folder")
    return sorted(found, key=lambda e: e["image"])


def pool(listed: list[dict], cache: Path | None = None, *, modality: str = "CT") -> Pool:
    """Read every entry and stack its slices at the matrix sizes that the networks train on (area means of larger ones).

    CT is in HU. MR is in thousandths of the volume's 99.5th percentile, cut along every axis whose planes have nearly square pixels,
    each plane framed about the head at its own pixels (`_planes`).

    The coarse level holds area means of finer images only for subjects who have no images of that size; an image between two sizes
    goes to the smaller one, an image below 256 keeps its pixels and is padded with air.
    ``cache`` keeps the decoded volumes (MONAI's PersistentDataset), so that the second call is quick.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.data import PersistentDataset  # type: ignore[attr-defined]
        from monai.transforms import Compose, EnsureTyped, ThresholdIntensityd
    low = -1000.0 if modality == "CT" else 0.0
    transform = Compose([
        functools.partial(_read, modality=modality),
        ThresholdIntensityd("volume", threshold=low, above=True, cval=low),
        EnsureTyped(["volume", "spacing"], track_meta=False),
    ])
    subjects = sorted({e["subject"] for e in listed})
    images: dict[int, list[Tensor]] = {m: [] for m in MATRICES}
    spacing: dict[int, list[float]] = {m: [] for m in MATRICES}
    owner: dict[int, list[int]] = {m: [] for m in MATRICES}
    with tempfile.TemporaryDirectory() as scratch:
        items = list(PersistentDataset(listed, transform, cache_dir=cache or scratch))
        if modality == "MR":
            cut = [(subjects.index(e["subject"]), *plane) for e, item in zip(listed, items, strict=True) for plane in _planes(item)]
            return Pool({256: torch.cat([stack for _, stack, _ in cut])},
                        {256: torch.cat([torch.full((len(stack),), pixel) for _, stack, pixel in cut])},
                        {256: torch.cat([torch.full((len(stack),), owner, dtype=torch.int32) for owner, stack, _ in cut])})
        coarse = {e["subject"] for e, item in zip(listed, items, strict=True) if max(item["volume"].shape[1:]) < MATRICES[1]}
        for entry, item in zip(listed, items, strict=True):
            volume, pixel = item["volume"], item["spacing"]
            for matrix in MATRICES:
                if matrix == MATRICES[0] and max(volume.shape[1:]) >= MATRICES[1] and entry["subject"] in coarse:
                    continue
                stack = _at(volume.numpy(), matrix)
                if stack is None:
                    continue
                images[matrix].append(torch.from_numpy(np.rint(stack).clip(-1024, 32767).astype(np.int16)))
                factor = max(1.0, max(volume.shape[1:]) / matrix)
                spacing[matrix] += [float(pixel[-1]) * factor] * len(stack)
                owner[matrix] += [subjects.index(entry["subject"])] * len(stack)
    kept = [m for m in MATRICES if images[m]]
    return Pool({m: torch.cat(images[m]) for m in kept}, {m: torch.tensor(spacing[m], dtype=torch.float32) for m in kept},
                {m: torch.tensor(owner[m], dtype=torch.int32) for m in kept})


def _planes(item: dict) -> list[tuple[Tensor, float]]:
    """Stacks (n, 256, 256) int16 of an MR volume, and their pixel sizes in mm: along every axis whose planes are nearly isotropic.

    A plane is a square about the head, padded with nothing where the volume ends, at the coarser of its two pixel sizes: planes that
    were interpolated to fill the matrix would teach a prior that images are smooth. A head of more pixels is resampled to fit. Planes
    that hold less than a tenth of head are left out, and of a long stack every second one is kept.
    """
    volume, spacing = item["volume"].numpy(), [float(s) for s in item["spacing"]]
    bright = float(np.quantile(volume[volume > 0], 0.995))
    volume = volume * (1000 / bright)
    head = volume > 100
    stacks = []
    for axis in range(3):
        steps = [s for k, s in enumerate(spacing) if k != axis]
        if max(steps) > 1.3 * min(steps):
            continue
        extent = [np.flatnonzero(np.moveaxis(head, axis, 0).any(axis=(0, 2 - k))) for k in range(2)]
        low, high = np.array([e[0] for e in extent]) * steps, np.array([e[-1] + 1 for e in extent]) * steps
        pixel = max(*steps, float((high - low).max()) / MATRICES[0])
        places = []
        for middle, step in zip((low + high) / 2, steps, strict=True):
            first = (middle - pixel * (MATRICES[0] - 1) / 2) / step - 0.5
            places.append((round(first) if pixel == step else first) + np.arange(MATRICES[0]) * (pixel / step))
        planes = [p for p, h in zip(np.moveaxis(volume, axis, 0), np.moveaxis(head, axis, 0), strict=True) if h.mean() > 0.1]
        planes = planes[::2] if len(planes) > 60 else planes
        grid = np.meshgrid(*places, indexing="ij")
        stack = np.stack([ndimage.map_coordinates(p, grid, order=3, mode="constant") for p in planes])
        stacks.append((torch.from_numpy(np.rint(stack).clip(0, 32767).astype(np.int16)), pixel))
    return stacks


def _read(entry: dict, modality: str = "CT") -> dict:
    """``io.read`` as a MONAI transform: the one reader of the house, rows and columns as DICOM has them, HU as they are."""
    volume = io.read(entry["image"], modality=modality if entry["image"].endswith((".nii", ".nii.gz")) else None).volume
    if volume is None:
        raise UsageError("training wants images, got measurements")
    return {"volume": torch.from_numpy(volume.data.copy()), "spacing": torch.tensor(volume.spacing)}


def _at(data: np.ndarray, matrix: int) -> np.ndarray | None:
    """Slices at ``matrix`` x ``matrix``: area means of larger ones; smaller ones padded with air at 256 and left out above."""
    from deft_med.volume import Volume

    size = max(data.shape[1:])
    if size < matrix and matrix != MATRICES[0]:
        return None
    if size > matrix:
        factor = size / matrix
        shape = tuple(min(matrix, round(n / factor)) for n in data.shape[1:])
        data = Volume(data, np.eye(4), "HU").resample_to(shape).data
    pad = [(0, 0)] + [((matrix - n) // 2, matrix - n - (matrix - n) // 2) for n in data.shape[1:]]
    return np.pad(data, pad, constant_values=-1000.0)
