"""The readouts of an ISMRMRD file: which of them make the image and which tell the noise, what they hold, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import h5py
import numpy as np
from numpy.typing import NDArray

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io import encoding, hdf5
from operators.geometry import Grid

NOISE, CALIBRATION, BOTH, REVERSE = (1 << (flag - 1) for flag in (19, 20, 21, 22))
# navigator, phase correction, feedback, dummy, surface coil correction, phase stabilisation
OTHERS = sum(1 << (flag - 1) for flag in (23, 24, 26, 27, 28, 29, 30, 31))
FIELDS = {"flags", "number_of_samples", "active_channels", "center_sample", "discard_pre", "discard_post", "encoding_space_ref",
          "trajectory_dimensions", "sample_time_us", "position", "read_dir", "phase_dir", "slice_dir", "idx"}  # fmt: skip
DIMENSIONS = ("contrast", "phase", "repetition", "set")
BLOCK, BLOCK_BYTES = 256, 2**33
Indices = NDArray[np.intp]
Heads = NDArray[np.void]
Place = Callable[[Grid], NDArray[np.float64] | None]


@dataclass(frozen=True, eq=False)
class Readouts:
    """The readouts of an open file.

    Attributes:
        stored: the data set of head, traj and data, one record for each readout.
        heads: all heads.
        image, noise: indices of the readouts that make the image and of the noise readouts, in the file's order.
        slices: ordinal of the slice of each readout of the image.
        header: the file's header.
        notes: what a reader should know; filled on the way.
    """

    stored: h5py.Dataset
    heads: Heads
    image: Indices
    noise: Indices
    slices: Indices
    header: encoding.Header
    notes: list[str] = field(default_factory=list)

    @property
    def picked(self) -> Heads:
        """Heads of the image's readouts."""
        return self.heads[self.image]

    @property
    def coils(self) -> int:
        """Coils of the image's readouts."""
        return int(self.heads["active_channels"][self.image[0]])

    def samples(self, wanted: Indices) -> Iterator[tuple[int, NDArray[np.complex64]]]:
        """(index, samples complex64 (coil, sample)) of the wanted readouts; CorruptError, UnsupportedError as `_numbers`."""
        for index, numbers in self._numbers(wanted, "data", 2 * self.heads["active_channels"].astype(np.int64)):
            yield index, numbers.view(np.complex64).reshape(int(self.heads["active_channels"][index]), -1)

    def points(self, wanted: Indices) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, points of k-space float32 (sample, dimension)) of the wanted readouts; CorruptError, UnsupportedError as `_numbers`."""
        for index, numbers in self._numbers(wanted, "traj", self.heads["trajectory_dimensions"].astype(np.int64)):
            yield index, numbers.reshape(-1, int(self.heads["trajectory_dimensions"][index]))

    def _numbers(self, wanted: Indices, name: str, each: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(index, float32) of a member of the wanted readouts, ``each`` numbers to a sample, read in blocks.

        A block is small in a large file: every readout of it might claim the same bytes as its own.

        Raises:
            CorruptError: fewer or more numbers than the head says.
            UnsupportedError: values that are not finite.
        """
        block = max(1, min(BLOCK, BLOCK_BYTES // max(1, self.stored.file.id.get_filesize())))
        member = self.stored.fields(name)
        for start in range(int(wanted[0]) // block * block, int(wanted[-1]) + 1, block):
            inside = wanted[(wanted >= start) & (wanted < start + block)]
            if not len(inside):
                continue
            values = member[start : start + block]
            for index in inside:
                count, samples = int(each[index]), int(self.heads["number_of_samples"][index])
                numbers = np.asarray(values[index - start])
                if numbers.dtype.kind != "f" or numbers.size != count * samples:
                    raise CorruptError(f"the file is damaged: readout {index + 1} has {numbers.size} numbers in {name}, "
                                       f"not {count} x {samples}; copy it again")  # fmt: skip
                numbers = np.ascontiguousarray(numbers, np.float32)
                if not np.isfinite(numbers).all():
                    raise UnsupportedError(f"readout {index + 1} of {len(self.heads)} holds values that are not finite (NaN) in {name}; "
                                           "export it again")  # fmt: skip
                yield int(index), numbers

    def whitener(self) -> encoding.Mixture | None:
        """How to whiten the coils by the noise readouts, to sigma 1 per real component; None without a usable noise scan."""
        alike = self.noise[self.heads["active_channels"][self.noise] == self.coils]
        if not len(alike):
            self.notes.extend(["noise readouts with another number of coils passed over"] if len(self.noise) else [])
            return None
        import torch

        from operators import whiten

        noise = np.concatenate([data for _, data in self.samples(alike)], axis=1)
        # noise power goes with the bandwidth: a longer dwell in the noise scan means less of it
        dwell = float(self.heads["sample_time_us"][alike[0]]), float(self.heads["sample_time_us"][self.image[0]])
        scale = dwell[0] / dwell[1] / self.header.bandwidth if min(dwell) > 0 else 1.0
        enough = noise.shape[1] >= len(noise)
        matrix = encoding.mixture(whiten.covariance(torch.from_numpy(noise)) * scale, noise.shape[1]) if enough else None
        words = "the noise readouts give no covariance (too few, or a dead coil)" if matrix is None else "whitened by the noise readouts"
        self.notes.append(words)
        return matrix

    def place(self) -> tuple[Indices, Place]:
        """Ordinals of the slices along their normal, and a function grid -> affine to LPS mm, or None (with a note) where there is none.

        Rows of the grid run along read_dir, columns along phase_dir, and pixel (ny // 2, nx // 2) lies at the readouts' position.
        """
        heads, slices = self.picked, self.slices
        count = int(slices.max()) + 1
        keep: Indices = np.arange(count)
        nowhere: Place = lambda grid: None
        read, phase, across = (heads[name].astype(np.float64) for name in ("read_dir", "phase_dir", "slice_dir"))
        frame = np.stack([read[0], phase[0], across[0]])
        alike = all(np.abs(v - v[0]).max() < 1e-3 for v in (read, phase, across))
        if not np.isfinite(frame).all() or not alike or np.abs(frame @ frame.T - np.eye(3)).max() > 1e-3:
            self.notes.append("the readouts' directions are no right-angled frame: place and orientation not known")
            return keep, nowhere
        places = heads["position"].astype(np.float64)
        centres = np.stack([places[slices == k][0] for k in range(count)])
        if not np.isfinite(places).all() or np.abs(places - centres[slices]).max() > 1e-2:
            self.notes.append("the readouts of one slice differ in position: place not known")
            return keep, nowhere
        normal = np.cross(phase[0], read[0])
        heights = (centres - centres[0]) @ normal
        order = np.argsort(heights, kind="stable")
        steps = np.diff(heights[order])
        drift = centres - centres[0] - heights[:, None] * normal
        if count > 1 and (steps.min() < 1e-3 or np.ptp(steps) > max(1e-2, 0.01 * steps.min()) or np.abs(drift).max() > 2e-2):
            self.notes.append("the slices are not evenly spaced above each other: place not known")
            return keep, nowhere
        recon = self.header.recon
        thickness = recon.fov[2] / recon.matrix[2] if recon.fov and recon.fov[2] > 0 else 1.0
        step = float(steps.mean()) if count > 1 else thickness

        def affine_of(grid: Grid) -> NDArray[np.float64]:
            affine = np.eye(4)
            affine[:3, 0], affine[:3, 1], affine[:3, 2] = phase[0] * grid.spacing[1], read[0] * grid.spacing[0], normal * step
            affine[:3, 3] = centres[order[0]] - affine[:3, 0] * (grid.shape[1] // 2) - affine[:3, 1] * (grid.shape[0] // 2)
            return affine

        return np.argsort(order), affine_of


def sort(group: h5py.Group, header: encoding.Header, max_bytes: int) -> Readouts:
    """The readouts in an open ISMRMRD group, by what they are for.

    Calibration readouts join the image where no imaging readout lies and the header calls them embedded or interleaved, or nothing.

    Raises:
        UnsupportedError: no acquisitions, several encoding spaces, contrasts, phases, repetitions or sets, 3D encoding, reversed
            readouts, readouts of several numbers of coils, no imaging readout.
        ResourceError: more than ``max_bytes``.
    """
    stored = hdf5.dataset(group, "data", max_bytes)
    if stored.dtype.names is None or not {"head", "data"} <= set(stored.dtype.names) or stored.ndim != 1 or not len(stored):
        raise UnsupportedError("data in the HDF5 file are no ISMRMRD acquisitions; expected head, traj and data for each "
                               "readout: convert the raw data again")  # fmt: skip
    heads = stored.fields("head")[:]
    if heads.dtype.names is None or not FIELDS <= set(heads.dtype.names):
        raise UnsupportedError("the readouts' headers in the HDF5 file are not ISMRMRD's (version 1); convert the raw data again")
    notes: list[str] = []
    image, noise = _choose(heads, header, notes)
    size = int((heads["number_of_samples"].astype(np.int64) * heads["active_channels"]).sum()) * 8
    if size > max_bytes:
        raise ResourceError(f"the readouts need {size / 2**30:.3g} GiB, more than {max_bytes / 2**30:.3g}; give fewer or raise max_bytes")
    slices = np.unique(heads["idx"]["slice"][image], return_inverse=True)[1]
    return Readouts(stored, heads, image, noise, slices, header, notes)


def _choose(heads: Heads, header: encoding.Header, notes: list[str]) -> tuple[Indices, Indices]:
    """Indices of the readouts for the image and of the noise readouts."""
    flags = heads["flags"].astype(np.uint64)
    noise, other = (flags & np.uint64(NOISE)) > 0, (flags & np.uint64(OTHERS)) > 0
    if (heads["encoding_space_ref"][~noise & ~other] != 0).any():
        raise UnsupportedError("the readouts of the ISMRMRD file are of several encoding spaces; one is supported: split the file")
    calibration = ((flags & np.uint64(CALIBRATION)) > 0) & ((flags & np.uint64(BOTH)) == 0) & ~noise & ~other
    imaging = ~noise & ~other & ~calibration
    if not imaging.any():
        raise UnsupportedError("the ISMRMRD file holds no imaging readout, only noise, calibration or navigators; give the imaging scan")
    chosen = imaging.copy()
    if calibration.any():
        joins = np.zeros(len(heads), bool)
        if header.calibration not in ("separate", "external", "other"):
            index = heads["idx"]
            taken = set(zip(index["slice"][imaging].tolist(), index["kspace_encode_step_1"][imaging].tolist(), strict=True))
            shapes = ("number_of_samples", "center_sample", "active_channels", "trajectory_dimensions")
            alike = np.all([np.isin(heads[name], np.unique(heads[name][imaging])) for name in shapes], axis=0)
            for k in np.flatnonzero(calibration & alike):
                joins[k] = (int(index["slice"][k]), int(index["kspace_encode_step_1"][k])) not in taken
        chosen |= joins
        left = int((calibration & ~joins).sum())
        notes += [f"{left} calibration readouts of their own passed over"] if left else []
    notes += [f"{int(other.sum())} readouts that are no image data passed over"] if other.any() else []
    picked = heads[chosen]
    if (picked["flags"].astype(np.uint64) & np.uint64(REVERSE)).any():
        raise UnsupportedError("the ISMRMRD file holds reversed readouts, as of EPI; expected all in one direction: reverse, correct and "
                               "regrid them first")  # fmt: skip
    for name in DIMENSIONS:
        count = len(np.unique(picked["idx"][name]))
        if count > 1:
            raise UnsupportedError(f"the ISMRMRD file holds {count} {name}s; one is supported: split the file")
    if len(np.unique(picked["idx"]["kspace_encode_step_2"])) > 1:
        raise UnsupportedError("the ISMRMRD file is encoded in 3D (kspace_encode_step_2); expected slices: transform the partitions first")
    if len(np.unique(picked["active_channels"])) > 1 or picked["active_channels"][0] < 1:
        raise UnsupportedError("the readouts of the ISMRMRD file differ in their number of coils; give one scan")
    return np.flatnonzero(chosen), np.flatnonzero(noise)
