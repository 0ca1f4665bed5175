"""ISMRMRD / MRD out: Cartesian k-space as readouts with their headers, for the example and for other toolboxes."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from deft_med.io.gate import writing

_INDEX = np.dtype([(name, "<u2") for name in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast", "phase",
                                              "repetition", "set", "segment")] + [("user", "<u2", (8,))])  # fmt: skip
_HEAD = np.dtype([
    ("version", "<u2"), ("flags", "<u8"), ("measurement_uid", "<u4"), ("scan_counter", "<u4"), ("acquisition_time_stamp", "<u4"),
    ("physiology_time_stamp", "<u4", (3,)), ("number_of_samples", "<u2"), ("available_channels", "<u2"), ("active_channels", "<u2"),
    ("channel_mask", "<u8", (16,)), ("discard_pre", "<u2"), ("discard_post", "<u2"), ("center_sample", "<u2"),
    ("encoding_space_ref", "<u2"), ("trajectory_dimensions", "<u2"), ("sample_time_us", "<f4"), ("position", "<f4", (3,)),
    ("read_dir", "<f4", (3,)), ("phase_dir", "<f4", (3,)), ("slice_dir", "<f4", (3,)), ("patient_table_position", "<f4", (3,)),
    ("idx", _INDEX), ("user_int", "<i4", (8,)), ("user_float", "<f4", (8,))])  # fmt: skip
_SPACE = ("<matrixSize><x>{ny}</x><y>{nx}</y><z>1</z></matrixSize>"
          "<fieldOfView_mm><x>{fy:g}</x><y>{fx:g}</y><z>{dz:g}</z></fieldOfView_mm>")
_HEADER = """<?xml version="1.0" encoding="UTF-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions><H1resonanceFrequency_Hz>127740000</H1resonanceFrequency_Hz>
</experimentalConditions><encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace><encodingLimits>
<kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></kspace_encoding_step_1></encodingLimits>
<trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"""


def write(path: Path, kspace: NDArray[np.complex64], spacing: tuple[float, float], thickness: float = 5.0) -> None:
    """k-space (coils, ny, nx) of one axial slice at the isocentre; rows are the readout, columns that are all 0 were not measured.

    Args:
        spacing: (dy, dx) of a pixel in mm.

    Raises:
        OutputError, ResourceError: not writable, or the disk is full.
    """
    coils, ny, nx = kspace.shape
    columns = np.flatnonzero(kspace.any((0, 1)))
    real = h5py.vlen_dtype(np.dtype("<f4"))
    readouts = np.zeros(len(columns), np.dtype([("head", _HEAD), ("traj", real), ("data", real)]))
    for number, column in enumerate(columns):
        head = readouts["head"][number]
        head["version"], head["scan_counter"], head["sample_time_us"] = 1, number, 5.0
        head["number_of_samples"], head["center_sample"] = ny, ny // 2
        head["available_channels"] = head["active_channels"] = coils
        head["read_dir"], head["phase_dir"], head["slice_dir"] = (0, 1, 0), (1, 0, 0), (0, 0, 1)
        head["idx"]["kspace_encode_step_1"] = column
        readouts["traj"][number] = np.zeros(0, np.float32)
        readouts["data"][number] = np.ascontiguousarray(kspace[:, :, column]).view(np.float32).ravel()
    space = _SPACE.format(ny=ny, nx=nx, fy=ny * spacing[0], fx=nx * spacing[1], dz=thickness)
    with writing("the MRD file"), h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("data", data=readouts)
        group.create_dataset("xml", data=[_HEADER.format(space=space, last=nx - 1, centre=nx // 2).encode()], dtype=h5py.string_dtype())
