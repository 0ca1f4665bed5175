"""ISMRMRD / MRD (github.com/ismrmrd): readouts with a header each, put on a Cartesian grid [slice, coil, readout, phase].

Rows are the readout and columns the phase encoding, as in fastMRI. Noise readouts whiten the coils or, without them, the noise in the
edges of the readout; calibration readouts join the grid where no imaging readout lies and the header calls them embedded or
interleaved, or says nothing; what is measured twice is averaged. The image's row index grows along read_dir and its column index along
phase_dir, and pixel (ny // 2, nx // 2) of a slice lies at its position (LPS mm), as Gadgetron places it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import h5py
import numpy as np
from numpy.typing import NDArray

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io import encoding, hdf5
from deft_med.io.source import Source
from deft_med.volume import Scan
from operators.geometry import Cartesian, Grid

NOISE, CALIBRATION, BOTH, REVERSE = (1 << (flag - 1) for flag in (19, 20, 21, 22))
# navigator, phase correction, feedback, dummy, surface coil correction, phase stabilisation
OTHERS = sum(1 << (flag - 1) for flag in (23, 24, 26, 27, 28, 29, 30, 31))
FIELDS = {"flags", "number_of_samples", "active_channels", "center_sample", "discard_pre", "discard_post", "encoding_space_ref",
          "sample_time_us", "position", "read_dir", "phase_dir", "slice_dir", "idx"}  # fmt: skip
DIMENSIONS = ("contrast", "phase", "repetition", "set")
BLOCK, BLOCK_BYTES = 256, 2**33
Heads = NDArray[np.void]


def read(group: h5py.Group, *, digest: str, max_bytes: int) -> Source:
    """The measurements in an open ISMRMRD group (members ``data`` and ``xml``).

    Raises:
        UnsupportedError: no XML, another trajectory, several encodings, contrasts, phases, repetitions or sets, 3D encoding, reversed
            readouts, samples off the grid, slices sampled differently, values that are not finite.
        CorruptError: XML that is not well-formed, readouts shorter than their headers say.
        ResourceError: more than ``max_bytes``.
    """
    if "xml" not in group:
        raise UnsupportedError("the ISMRMRD file has no header XML, so its matrix is not known; convert the raw data again")
    header = encoding.parse(hdf5.header(group, "xml", max_bytes))
    if header.trajectory not in ("cartesian", "unknown"):
        raise UnsupportedError(f"the ISMRMRD file has a trajectory that is not supported: {header.trajectory}; expected cartesian")
    stored = hdf5.dataset(group, "data", max_bytes)
    if stored.dtype.names is None or not {"head", "data"} <= set(stored.dtype.names) or stored.ndim != 1 or not len(stored):
        raise UnsupportedError("data in the HDF5 file are no ISMRMRD acquisitions; expected head, traj and data for each readout")
    heads = stored.fields("head")[:]
    if heads.dtype.names is None or not FIELDS <= set(heads.dtype.names):
        raise UnsupportedError("the readouts' headers in the HDF5 file are not ISMRMRD's (version 1); convert the raw data again")
    notes: list[str] = []
    chosen, noise_scan = _choose(heads, header, notes)
    size = int((heads["number_of_samples"].astype(np.int64) * heads["active_channels"]).sum()) * 8
    if size > max_bytes:
        raise ResourceError(f"the readouts need {size / 2**30:.3g} GiB, more than {max_bytes / 2**30:.3g}; give fewer or raise max_bytes")
    first, slices = _place(heads, chosen, header, notes)
    rank, affine_of = _geometry(heads[chosen], slices, header, notes)
    y, counts = _grid(stored, heads, chosen, first, rank[slices], header, max_bytes)
    mask = counts > 0
    if (mask != mask[0]).any():
        raise UnsupportedError("the slices of the ISMRMRD file differ in what is sampled; one mask for all is supported: split the file")
    whole = bool((mask[0].all(0) | ~mask[0].any(0)).all())
    plan = encoding.layout(header, mask.shape[1:], whole=whole)
    if not whole:
        notes.append("readouts not sampled from end to end (asymmetric echo): their oversampling stays")
    np.divide(y, counts[:, None], out=y, where=mask[:, None])
    matrix, sigma = _noise_scan(stored, heads, noise_scan, chosen, header, notes), None
    if matrix is None and whole:  # as one readout saw it: averages are quieter
        single = (y[k] * np.sqrt(counts[k], dtype=np.float32) for k in range(len(y)))
        matrix, sigma = encoding.from_edges([encoding.edges(image, mask[0].any(0), plan.rows) for image in single], notes)
    if whole:
        y = np.stack([encoding.narrow(image, plan.rows) for image in y])
    sampled = np.broadcast_to(mask[0].any(0), (plan.rows, mask.shape[2])) if whole else mask[0]
    if matrix is not None:
        sigma = encoding.whiten(y, matrix)
    noise = None
    if sigma is not None:
        level = sigma * np.where(mask, counts, 1)[:, None] ** -0.5
        noise = (level.min(2, keepdims=True) if whole else level).astype(np.float32)
    grid = Grid(shape=(plan.rows, mask.shape[2]), spacing=plan.spacing or (1.0, 1.0))
    affine = affine_of(grid) if plan.spacing is not None else None
    try:
        scan = Scan(y, Cartesian.of(sampled), grid, noise, affine=affine, crop=plan.crop)
    except ValueError as error:
        raise UnsupportedError(f"the ISMRMRD file does not fit together: {error}") from None  # our own words: fields and numbers
    return Source("mrd", scan=scan, digest=digest, notes=tuple(notes), placed=affine is not None, sized=plan.spacing is not None)


def _choose(heads: Heads, header: encoding.Header, notes: list[str]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the readouts for the grid and of the noise readouts."""
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
            shapes = ("number_of_samples", "center_sample", "active_channels")
            alike = np.all([np.isin(heads[name], np.unique(heads[name][imaging])) for name in shapes], axis=0)
            for k in np.flatnonzero(calibration & alike):
                joins[k] = (int(index["slice"][k]), int(index["kspace_encode_step_1"][k])) not in taken
        chosen |= joins
        left = int((calibration & ~joins).sum())
        notes += [f"{left} calibration readouts of their own passed over"] if left else []
    notes += [f"{int(other.sum())} readouts that are no image data passed over"] if other.any() else []
    picked = heads[chosen]
    if (picked["flags"].astype(np.uint64) & np.uint64(REVERSE)).any():
        raise UnsupportedError("the ISMRMRD file holds reversed readouts, as of EPI, which want a phase correction; not supported")
    for name in DIMENSIONS:
        count = len(np.unique(picked["idx"][name]))
        if count > 1:
            raise UnsupportedError(f"the ISMRMRD file holds {count} {name}s; one is supported: split the file")
    if len(np.unique(picked["idx"]["kspace_encode_step_2"])) > 1:
        raise UnsupportedError("the ISMRMRD file is encoded in 3D (kspace_encode_step_2); expected slices: transform the partitions first")
    if len(np.unique(picked["active_channels"])) > 1 or picked["active_channels"][0] < 1:
        raise UnsupportedError("the readouts of the ISMRMRD file differ in their number of coils; give one scan")
    return np.flatnonzero(chosen), np.flatnonzero(noise)


def _place(heads: Heads, chosen: NDArray[np.intp], header: encoding.Header, notes: list[str]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Where the readouts lie: (readouts, 2) first row and column, and the ordinal of their slices."""
    picked = heads[chosen]
    width, height = header.encoded.matrix[1], header.encoded.matrix[0]
    samples, centre = picked["number_of_samples"].astype(np.int64), picked["center_sample"].astype(np.int64)
    if not centre.any() and (samples == height).all():
        centre = samples // 2
        notes.append("the readouts do not say where k = 0 is: taken for their middle")
    rows = height // 2 - centre + picked["discard_pre"]
    last = height // 2 - centre + samples - picked["discard_post"]
    columns = picked["idx"]["kspace_encode_step_1"].astype(np.int64)
    columns = columns + (width // 2 - header.centre if header.centre is not None else 0)
    if (rows < 0).any() or (last > height).any() or (last <= rows).any() or (columns < 0).any() or (columns >= width).any():
        raise UnsupportedError(f"readouts of the ISMRMRD file lie outside its encoded matrix of {height} x {width}; check the header XML")
    return np.stack([rows, columns], 1), np.unique(picked["idx"]["slice"], return_inverse=True)[1]


def _grid(
    stored: h5py.Dataset, heads: Heads, chosen: NDArray[np.intp], first: NDArray[np.int64], slices: NDArray[np.intp],
    header: encoding.Header, max_bytes: int,
) -> tuple[NDArray[np.complex64], NDArray[np.int32]]:  # fmt: skip
    """Sums of the readouts on the grid [slice, coil, row, column] and how many lie on each point [slice, row, column]."""
    (height, width), coils = header.encoded.matrix[:2], int(heads["active_channels"][chosen[0]])
    count = int(slices.max()) + 1
    if count * coils * height * width * 8 > max_bytes:
        raise ResourceError(f"the k-space matrix needs more than {max_bytes / 2**30:.3g} GiB; give fewer slices or raise max_bytes")
    lines = np.zeros((count, width, coils, height), np.complex64)  # a readout is contiguous
    counts = np.zeros((count, width, height), np.int32)
    for (row, column), k, (index, data) in zip(first, slices, _readouts(stored, heads, chosen), strict=True):
        data = data[:, int(heads["discard_pre"][index]) : data.shape[1] - int(heads["discard_post"][index])]
        lines[k, column, :, row : row + data.shape[1]] += data
        counts[k, column, row : row + data.shape[1]] += 1
    return np.ascontiguousarray(lines.transpose(0, 2, 3, 1)), counts.transpose(0, 2, 1)


def _readouts(stored: h5py.Dataset, heads: Heads, wanted: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.complex64]]]:
    """(index, samples complex64 (coil, sample)) of the wanted readouts, read in blocks.

    A block is small in a large file: every readout of it might claim the same bytes as its own.
    """
    block = max(1, min(BLOCK, BLOCK_BYTES // max(1, stored.file.id.get_filesize())))
    field = stored.fields("data")
    for start in range(int(wanted[0]) // block * block, int(wanted[-1]) + 1, block):
        inside = wanted[(wanted >= start) & (wanted < start + block)]
        if not len(inside):
            continue
        values = field[start : start + block]
        for index in inside:
            shape = int(heads["active_channels"][index]), int(heads["number_of_samples"][index])
            data = np.asarray(values[index - start])
            if data.dtype.kind != "f" or data.size != 2 * shape[0] * shape[1]:
                raise CorruptError(f"the file is damaged: readout {index + 1} has {data.size} numbers, not 2 x {shape[0]} x {shape[1]}")
            data = np.ascontiguousarray(data, np.float32).view(np.complex64).reshape(shape)
            if not np.isfinite(data).all():
                raise UnsupportedError(f"readout {index + 1} of {len(heads)} holds values that are not finite (NaN); export it again")
            yield int(index), data


def _noise_scan(
    stored: h5py.Dataset, heads: Heads, noise_scan: NDArray[np.intp], chosen: NDArray[np.intp], header: encoding.Header, notes: list[str]
) -> encoding.Mixture | None:
    """How to whiten the coils by the noise readouts, to sigma 1 per real component; None without a usable noise scan."""
    alike = noise_scan[heads["active_channels"][noise_scan] == heads["active_channels"][chosen[0]]]
    if not len(alike):
        notes += ["noise readouts with another number of coils passed over"] if len(noise_scan) else []
        return None
    import torch

    from operators import whiten

    noise = np.concatenate([data for _, data in _readouts(stored, heads, alike)], axis=1)
    # noise power goes with the bandwidth: a longer dwell in the noise scan means less of it
    dwell = float(heads["sample_time_us"][alike[0]]), float(heads["sample_time_us"][chosen[0]])
    scale = dwell[0] / dwell[1] / header.bandwidth if min(dwell) > 0 else 1.0
    enough = noise.shape[1] >= len(noise)
    matrix = encoding.mixture(whiten.covariance(torch.from_numpy(noise)) * scale, noise.shape[1]) if enough else None
    notes.append("the noise readouts give no covariance (too few, or a dead coil)" if matrix is None else "whitened by the noise readouts")
    return matrix


Place = Callable[[Grid], NDArray[np.float64] | None]


def _geometry(
    heads: Heads, slices: NDArray[np.intp], header: encoding.Header, notes: list[str]
) -> tuple[NDArray[np.intp], Place]:
    """Ordinals of the slices along their normal, and a function grid -> affine to LPS mm, or None (with a note) where there is no place."""
    count = int(slices.max()) + 1
    keep: NDArray[np.intp] = np.arange(count)
    nowhere: Place = lambda grid: None
    read, phase, across = (heads[name].astype(np.float64) for name in ("read_dir", "phase_dir", "slice_dir"))
    frame = np.stack([read[0], phase[0], across[0]])
    alike = all(np.abs(v - v[0]).max() < 1e-3 for v in (read, phase, across))
    if not np.isfinite(frame).all() or not alike or np.abs(frame @ frame.T - np.eye(3)).max() > 1e-3:
        notes.append("the readouts' directions are no right-angled frame: place and orientation not known")
        return keep, nowhere
    places = heads["position"].astype(np.float64)
    centres = np.stack([places[slices == k][0] for k in range(count)])
    if not np.isfinite(places).all() or np.abs(places - centres[slices]).max() > 1e-2:
        notes.append("the readouts of one slice differ in position: place not known")
        return keep, nowhere
    normal = np.cross(phase[0], read[0])
    heights = (centres - centres[0]) @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    drift = centres - centres[0] - heights[:, None] * normal
    if count > 1 and (steps.min() < 1e-3 or np.ptp(steps) > max(1e-2, 0.01 * steps.min()) or np.abs(drift).max() > 2e-2):
        notes.append("the slices are not evenly spaced above each other: place not known")
        return keep, nowhere
    thickness = header.recon.fov[2] / header.recon.matrix[2] if header.recon.fov and header.recon.fov[2] > 0 else 1.0
    step = float(steps.mean()) if count > 1 else thickness

    def affine_of(grid: Grid) -> NDArray[np.float64]:
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1], affine[:3, 2] = phase[0] * grid.spacing[1], read[0] * grid.spacing[0], normal * step
        affine[:3, 3] = centres[order[0]] - affine[:3, 0] * (grid.shape[1] // 2) - affine[:3, 1] * (grid.shape[0] // 2)
        return affine

    return np.argsort(order), affine_of
