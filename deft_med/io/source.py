"""What a reader returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deft_med.volume import Scan, Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(frozen=True, eq=False)
class Source:
    """An input as read: an image or measurements, never both.

    Attributes:
        kind: "dicom", "nifti" or "sinogram".
        volume: the image in HU, float32 [slice, row, column]; pixels outside the scan are at -1024.
        scan: the measurements, for a sinogram.
        headers: one pydicom Dataset for each slice, in the order of the slices, without pixels and private attributes.
        lossy: the source went through lossy compression.
        digest: sha256 of the content of the files, in the order of the slices.
        notes: what a reader should know, in whole sentences without patient data.
    """

    kind: str
    volume: Volume | None = None
    scan: Scan | None = None
    headers: list[Dataset] = field(default_factory=list)
    lossy: bool = False
    digest: str = ""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: kind, counts, lengths, and the notes; no patient data."""
        if self.scan is not None:
            slices, views, detectors = self.scan.y.shape
            ny, nx = self.scan.grid.shape
            beam = type(self.scan.acquisition).__name__
            head = f"sinogram, {_count(slices, 'slice')}, {views} views x {detectors} detectors ({beam}), grid {ny} x {nx}"
        else:
            assert self.volume is not None
            slices, rows, columns = self.volume.shape
            dz, dy, dx = self.volume.spacing
            name = {"dicom": "CT series (DICOM)", "nifti": "NIfTI volume"}[self.kind]
            lengths = f"{dy:.3g} x {dx:.3g} mm, slice step {dz:.3g} mm"
            head = f"{name}, {_count(slices, 'slice')} {rows} x {columns}, {lengths}, {self.volume.unit}"
        return "; ".join([head, *self.notes])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
