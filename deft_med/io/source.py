"""What a reader returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deft_med.volume import Scan, Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

KSPACE = {"fastmri": "k-space (fastMRI)", "mrd": "k-space (ISMRMRD)", "kspace": "k-space (array)"}

PARTS = {"HEAD": "head", "BRAIN": "head", "SKULL": "head", "NECK": "neck", "CSPINE": "neck", "CHEST": "chest", "THORAX": "chest",
         "LUNG": "chest", "ABDOMEN": "abdomen", "PELVIS": "pelvis", "KNEE": "knee", "HIP": "hip", "SHOULDER": "shoulder", "ELBOW": "elbow",
         "HAND": "hand", "WRIST": "wrist", "FOOT": "foot", "ANKLE": "ankle", "LEG": "leg", "ARM": "arm"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """An input as read: an image or measurements, never both.

    Attributes:
        kind: "dicom", "nifti", "sinogram", "fastmri", "mrd" or "kspace".
        volume: the image, float32 [slice, row, column], in HU (CT; pixels outside the scan are at -1024) or a.u. (MR).
        scan: the measurements, for a sinogram or k-space.
        headers: one pydicom Dataset for each slice, in the order of the slices, without pixels and private attributes.
        lossy: the source went through lossy compression.
        digest: sha256 of the content of the files, in the order of the slices.
        notes: what a reader should know, in whole sentences without patient data.
        placed: the place in the patient is known.
        sized: the size of a pixel is known.
    """

    kind: str
    volume: Volume | None = None
    scan: Scan | None = None
    headers: list[Dataset] = field(default_factory=list)
    lossy: bool = False
    digest: str = ""
    notes: tuple[str, ...] = ()
    placed: bool = True
    sized: bool = True

    @property
    def modality(self) -> str:
        """CT or MR, by the measurements or by the image's unit."""
        if self.scan is not None:
            return self.scan.modality
        return "CT" if self.volume is None or self.volume.unit == "HU" else "MR"

    @property
    def anatomy(self) -> str | None:
        """The part of the body that all headers name (BodyPartExamined), in a card's words; None where they do not, or name several."""
        named = {str(h.get("BodyPartExamined", "") or "").strip().upper() for h in self.headers}
        return PARTS.get(named.pop()) if len(named) == 1 else None

    @property
    def slices(self) -> int:
        """How many there are."""
        return len(self.volume.data) if self.volume is not None else len(self.scan.y)  # type: ignore[union-attr]

    def part(self, first: int, last: int) -> Source:
        """Slices first to last - 1, counted from 0."""
        return replace(self, volume=self.volume and self.volume.part(first, last), scan=self.scan and self.scan.part(first, last),
                       headers=self.headers[first:last])

    def describe(self) -> str:
        """One line: kind, counts, lengths, and the notes; no patient data."""
        if self.scan is not None and self.scan.modality == "MR":
            head = self._kspace(self.scan)
        elif self.scan is not None:
            slices, views, detectors = self.scan.y.shape
            ny, nx = self.scan.grid.shape
            beam = type(self.scan.acquisition).__name__
            head = f"sinogram, {_count(slices, 'slice')}, {views} views x {detectors} detectors ({beam}), grid {ny} x {nx}"
        else:
            assert self.volume is not None
            slices, rows, columns = self.volume.shape
            dz, dy, dx = self.volume.spacing
            name = {"dicom": f"{self.modality} series (DICOM)", "nifti": "NIfTI volume"}[self.kind]
            lengths = f"{dy:.3g} x {dx:.3g} mm, slice step {dz:.3g} mm"
            head = f"{name}, {_count(slices, 'slice')} {rows} x {columns}, {lengths}, {self.volume.unit}"
        return "; ".join([head, *self.notes])

    def _kspace(self, scan: Scan) -> str:
        slices, coils = scan.y.shape[:2]
        (ny, nx), (rows, columns), (dy, dx) = scan.grid.shape, scan.picture, scan.grid.spacing
        size = f"{dy:.3g} x {dx:.3g} mm" if self.sized else "pixel size unknown"
        picture = "" if scan.crop is None else f", picture {rows} x {columns}"
        parts = [f"{KSPACE[self.kind]}, {_count(slices, 'slice')}, {_count(coils, 'coil')}, matrix {ny} x {nx}{picture}",
                 f"{scan.acquisition.acceleration:.3g}-fold accelerated", size]  # type: ignore[union-attr]
        return ", ".join(parts if self.placed or not self.sized else [*parts, "place in the patient unknown"])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
