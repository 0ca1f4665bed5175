"""Makers of input files that must be refused: name -> (maker(folder) -> path, exit code). Nothing here needs a network or real data.

Every DICOM object is made from scratch and carries the canary below as its patient, which no message may show.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

CANARY = "ZZCANARY"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
SIZE = 32


def phantom(index: int = 0, size: int = SIZE) -> np.ndarray:
    """A disk with an off-centre spot in HU, int16 [row, column]; the spot grows with the index."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    image = np.where(x**2 + y**2 < (0.4 * size) ** 2, 40, -1000).astype(np.int16)
    image[4 + size // 4, size // 2 : size // 2 + 3] = 300 + 10 * index
    return image


def ct_slice(index: int = 0, **changes: Any) -> Dataset:
    """A valid CT slice at z = 2.5 * index mm; ``changes`` set attributes, None removes one."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID, ds.SOPInstanceUID = CT_IMAGE, f"1.2.3.4.5.{index + 1}"
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.Modality, ds.Manufacturer = "20200102", "101112", CANARY, "CT", "Maker"
    ds.ReferringPhysicianName, ds.StudyDescription, ds.SeriesDescription = CANARY, CANARY, CANARY
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = f"{CANARY}^PHI", f"{CANARY}1", "19011213", "O"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = "1", 2, 1, index + 1
    ds.PositionReferenceIndicator, ds.PatientPosition, ds.KVP, ds.SliceThickness = None, "HFS", 120, 2.5
    ds.PixelSpacing, ds.ImageOrientationPatient = [0.75, 0.5], [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [-8, -12, -100 + 2.5 * index]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", SIZE, SIZE
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    ds.PixelData = phantom(index).tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def save(ds: Dataset, path: Path) -> Path:
    """Writes a dataset as a DICOM file, whatever it holds."""
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CT_IMAGE)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
    ds.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, slices: int = 5, change: Callable[[int, Dataset], None] | None = None) -> Path:
    """A folder of a valid series; ``change(index, dataset)`` may spoil a slice. File names do not follow the order of the slices."""
    home = folder / "series"
    home.mkdir()
    for index in range(slices):
        ds = ct_slice(index)
        if change is not None:
            change(index, ds)
        save(ds, home / f"{(index * 7) % 10}{index}.dcm")
    return home


def raw_value(path: Path, keyword: str, value: bytes) -> Path:
    """Overwrites an attribute's value in a file of Explicit VR Little Endian with bytes of the same length."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    data = path.read_bytes()
    at = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 132)
    length = struct.unpack_from("<H", data, at + 6)[0]
    assert len(value) == length, (keyword, length)
    path.write_bytes(data[: at + 8] + value + data[at + 8 + length :])
    return path


def _slice(name: str = "scan.dcm", **changes: Any) -> Callable[[Path], Path]:
    return lambda folder: save(ct_slice(**changes), folder / name)


def _raw(keyword: str, before: Any, value: bytes) -> Callable[[Path], Path]:
    """A slice whose attribute is written as ``before`` and then overwritten with bytes that pydicom would not write."""
    return lambda folder: raw_value(save(ct_slice(**{keyword: before}), folder / "scan.dcm"), keyword, value)


def _bytes(data: bytes, name: str = "scan.dcm") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _cut(share: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = save(ct_slice(), folder / "scan.dcm")
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return make


def cut_in_header(folder: Path) -> Path:
    path = save(ct_slice(), folder / "scan.dcm")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"ISO_IR 100") + 60])
    return path


def cut_in_meta(folder: Path) -> Path:
    path = save(ct_slice(), folder / "scan.dcm")
    path.write_bytes(path.read_bytes()[:200])
    return path


def no_transfer_syntax(folder: Path) -> Path:
    path = save(ct_slice(), folder / "scan.dcm")
    meta = struct.pack("<HH2sH", 2, 3, b"UI", 4) + b"1.2\0"
    data = path.read_bytes()
    return _bytes(bytes(128) + b"DICM" + meta + data[data.index(b"\x08\x00\x05\x00", 132) :])(folder)


def without_preamble(folder: Path) -> Path:
    data = save(ct_slice(), folder / "scan.dcm").read_bytes()
    return _bytes(data[data.index(b"\x08\x00\x05\x00", 132) :])(folder)


def rgb(folder: Path) -> Path:
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8).tobytes()
    return _slice(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7,
                  PixelRepresentation=0, PixelData=pixels)(folder)  # fmt: skip


def ultrasound(folder: Path) -> Path:
    without = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "PixelSpacing"))
    return _slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1", Modality="US", **without)(folder)


def ct_pd(folder: Path) -> Path:
    ds = ct_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.66")
    ds.add_new(0x70290010, "LO", "CtProjectionData-MayoClinc-v1")
    ds.add_new(0x70291002, "FL", 1.0)
    return save(ds, folder / "scan.dcm")


def big_meta(folder: Path) -> Path:
    ds = ct_slice()
    ds.ModalityLUTSequence = [Dataset()]
    return save(ds, folder / "scan.dcm")


def two_series(folder: Path) -> Path:
    return series(folder, 4, lambda k, ds: setattr(ds, "SeriesInstanceUID", f"1.2.3.{2 + k % 2}"))


def localizer_inside(folder: Path) -> Path:
    home = series(folder, 4)
    save(ct_slice(7, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), home / "scout.dcm")
    return home


def coronal_inside(folder: Path) -> Path:
    tilt = [1, 0, 0, 0, 0.8, -0.6]
    return series(folder, 4, lambda k, ds: setattr(ds, "ImageOrientationPatient", tilt) if k == 3 else None)


def missing_slice(folder: Path) -> Path:
    def change(k: int, ds: Dataset) -> None:
        ds.ImagePositionPatient = [-8, -12, 2.5 * (k + (k > 2))]

    return series(folder, 6, change)


def two_missing(folder: Path) -> Path:
    """Every second slice but one is missing: most gaps are wide."""
    return series(folder, 5, lambda k, ds: setattr(ds, "ImagePositionPatient", [-8, -12, 2.5 * (2 * k - (k > 2))]))


def uneven(folder: Path) -> Path:
    return series(folder, 5, lambda k, ds: setattr(ds, "ImagePositionPatient", [-8, -12, 2.5 * k + 0.4 * (k == 2)]))


def duplicated_position(folder: Path) -> Path:
    return series(folder, 5, lambda k, ds: setattr(ds, "ImagePositionPatient", [-8, -12, 2.5 * min(k, 3)]))


def same_uid(folder: Path) -> Path:
    return series(folder, 4, lambda k, ds: setattr(ds, "SOPInstanceUID", f"1.2.3.4.{max(k, 1)}"))


def tilted_stack(folder: Path) -> Path:
    c, s = np.cos(0.3), np.sin(0.3)

    def change(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, round(float(c), 6), round(float(-s), 6)]
        ds.ImagePositionPatient = [-8, -12, 2.5 * k]

    return series(folder, 5, change)


def two_patients(folder: Path) -> Path:
    return series(folder, 4, lambda k, ds: setattr(ds, "PatientID", f"{CANARY}{k // 2}"))


def two_spacings(folder: Path) -> Path:
    return series(folder, 4, lambda k, ds: setattr(ds, "PixelSpacing", [0.75, 0.5 + 0.1 * (k == 3)]))


def empty_folder(folder: Path) -> Path:
    home = folder / "series"
    home.mkdir()
    (home / "README.txt").write_text("no images here")
    return home


def empty_file_inside(folder: Path) -> Path:
    home = series(folder)
    (home / "99.dcm").touch()
    return home


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "scan.dcm")
    return folder / "scan.dcm"


def fifo_inside(folder: Path) -> Path:
    home = series(folder)
    os.mkfifo(home / "pipe")
    return home


def compressed(folder: Path, syntax: str, pixels: bytes, **changes: Any) -> Path:
    """A slice whose pixels are ``pixels`` encapsulated under a transfer syntax."""
    from pydicom.encaps import encapsulate

    ds = ct_slice(**changes)
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.PixelData = encapsulate([pixels])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    if UID(syntax).is_private:  # pydicom writes no private syntax: an overlong one of another name is exchanged afterwards
        ds.file_meta.TransferSyntaxUID = UID(RLE)
        path = save(ds, folder / "scan.dcm")
        value = syntax.encode().ljust(20, b"\0")
        return _bytes(path.read_bytes().replace(RLE.encode().ljust(20, b"\0"), value, 1))(folder)
    return save(ds, folder / "scan.dcm")


def deflated(folder: Path, tail: bytes = b"") -> Path:
    """A deflated slice with ``tail`` (already deflated away) behind its data set."""
    buffer = io.BytesIO()
    ds = ct_slice()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    start = data.index(b"\x08\x00\x05\x00", 132)
    value = str(DeflatedExplicitVRLittleEndian).encode() + b"\0" * (len(DeflatedExplicitVRLittleEndian) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = squeeze.compress(data[start:]) + squeeze.compress(tail) + squeeze.flush()
    return _bytes(bytes(128) + b"DICM" + meta + body)(folder)


def deflate_bomb(folder: Path) -> Path:
    """A file of about a megabyte that inflates to two gigabytes."""
    value = str(DeflatedExplicitVRLittleEndian).encode() + b"\0" * (len(DeflatedExplicitVRLittleEndian) % 2)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = [squeeze.compress(struct.pack("<HH2sHI", 9, 0x1010, b"OB", 0, 2**31 - 2)), squeeze.flush(zlib.Z_FULL_FLUSH)]
    zeros, again = (squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    body += [zeros, *[again] * 2047, squeeze.flush()]
    return _bytes(bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value + b"".join(body))(folder)


def nifti_bytes(
    shape: tuple[int, ...] = (8, 7, 3), affine: np.ndarray | None = None, fill: float | None = None, dtype: Any = np.float32
) -> bytes:
    """A NIfTI file's bytes; ``fill`` goes into the first plane."""
    import nibabel as nib

    data = np.linspace(-1000, 500, int(np.prod(shape))).reshape(shape).astype(dtype)
    if fill is not None:
        data[0] = fill
    return nib.Nifti1Image(data, np.diag([-2.0, -2.0, 3.0, 1.0]) if affine is None else affine).to_bytes()


def _nifti(**how: Any) -> Callable[[Path], Path]:
    return lambda folder: _bytes(nifti_bytes(**how), "scan.nii")(folder)


def nifti_huge(folder: Path) -> Path:
    data = bytearray(nifti_bytes())
    struct.pack_into("<8h", data, 40, 3, 32000, 32000, 32000, 1, 1, 1, 1)
    return _bytes(bytes(data), "scan.nii")(folder)


def nifti_bomb(folder: Path) -> Path:
    data = bytearray(nifti_bytes())
    struct.pack_into("<8h", data, 40, 3, 4000, 4000, 100, 1, 1, 1, 1)
    squeezed = gzip.compress(bytes(data), mtime=0) + gzip.compress(bytes(2**24), mtime=0) * 64
    return _bytes(squeezed, "scan.nii.gz")(folder)


def sinogram(**changes: Any) -> dict[str, Any]:
    """The arrays of a valid sinogram.npz; None removes a key."""
    y = np.linspace(0, 4, 2 * 12 * 17, dtype=np.float32).reshape(2, 12, 17)
    arrays: dict[str, Any] = dict(y=y, angles=np.arange(12) * np.pi / 12, pitch=1.5, geometry="parallel",
                                  grid_shape=np.array([9, 11]), grid_spacing=np.array([2.0, 1.5]))  # fmt: skip
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def _npz(**changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez_compressed(folder / "sinogram.npz", allow_pickle=True, **sinogram(**changes))
        return folder / "sinogram.npz"

    return make


def npz_cut(folder: Path) -> Path:
    path = _npz()(folder)
    path.write_bytes(path.read_bytes()[:-60])
    return path


def npz_flipped(folder: Path) -> Path:
    """One byte of the compressed y is changed."""
    path = _npz()(folder)
    data = bytearray(path.read_bytes())
    data[120] ^= 0xFF
    path.write_bytes(bytes(data))
    return path


def npz_checksum(folder: Path) -> Path:
    """One byte of the uncompressed y is changed, so its checksum does not fit."""
    np.savez(folder / "sinogram.npz", **sinogram())
    data = bytearray((folder / "sinogram.npz").read_bytes())
    data[600] ^= 0xFF
    return _bytes(bytes(data), "sinogram.npz")(folder)


def npz_lying(folder: Path) -> Path:
    """A member whose header claims a terabyte."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 500, 500), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    with zipfile.ZipFile(folder / "sinogram.npz", "w") as archive:
        archive.writestr("y.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    return folder / "sinogram.npz"


def npz_bomb(folder: Path) -> Path:
    """Members that unpack to more than four gigabytes, by their own account."""
    path = folder / "sinogram.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.npy", bytes(1000))
        archive.writestr("noise.npy", bytes(1000))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 0xFFFFFFF0)
    struct.pack_into("<I", data, data.index(b"PK\x01\x02", at + 4) + 24, 0xFFFFFFF0)
    path.write_bytes(bytes(data))
    return path


def zip_of_text(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return folder / "images.zip"


def fft2c(image: np.ndarray) -> np.ndarray:
    """Centred orthonormal transform of the last two axes."""
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes), norm="ortho"), axes).astype(np.complex64)


def ifft2c(kspace: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho"), axes)


def coil_images(slices: int = 2, coils: int = 3, height: int = 48, width: int = 20) -> np.ndarray:
    """Complex coil images of an off-centre block, complex64 [slice, coil, row, column]; only the central half of the rows is filled."""
    y, x = np.mgrid[:height, :width]
    body = (np.abs(y - height // 2 + 1.5) < height / 5) & (np.abs(x - width // 2 - 1) < width / 3)
    images = np.empty((slices, coils, height, width), np.complex64)
    for k in range(slices):
        for c in range(coils):
            a = 2 * np.pi * c / coils
            weight = 1 + 0.6 * np.cos(a) * (y / height - 0.5) + 0.6 * np.sin(a) * (x / width - 0.5)
            images[k, c] = body * (1 + 0.3 * k + 0.02 * y) * weight * np.exp(1j * (a + 0.05 * x - 0.03 * y))
    return images


def mr_header(
    height: int = 48, width: int = 20, centre: int | None = None, last: int | None = None, pixel: float = 1.5,
    picture: tuple[int, int] | None = None, **words: str,
) -> str:  # fmt: skip
    """An ISMRMRD header as the standard writes it: readout twice as long as the picture (or another one), square pixels."""
    rows, columns = picture or (height // 2, width - 4)
    limits = "" if centre is None else (
        f"<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center>"
        "</kspace_encoding_step_1></encodingLimits>")  # fmt: skip
    space = lambda x, y: (f"<matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize>"
                          f"<fieldOfView_mm><x>{x * pixel}</x><y>{y * pixel}</y><z>5</z></fieldOfView_mm>")  # fmt: skip
    encoding = (f"<encoding><encodedSpace>{space(height, width)}</encodedSpace><reconSpace>{space(rows, columns)}</reconSpace>"
                f"{limits}<trajectory>{words.get('trajectory', 'cartesian')}</trajectory></encoding>")  # fmt: skip
    return (f'<?xml version="1.0" encoding="utf-8"?>{words.get("doctype", "")}<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
            f"<subjectInformation><patientName>{CANARY}</patientName></subjectInformation>"
            f"{encoding * int(words.get('times', '1'))}</ismrmrdHeader>")  # fmt: skip


def fastmri(folder: Path, **members: Any) -> Path:
    """A file in fastMRI's layout; ``members`` replace or add data sets, None leaves one out."""
    import h5py

    images = coil_images()
    rss = np.sqrt((np.abs(images[:, :, 12:36, 2:18]) ** 2).sum(1)).astype(np.float32)
    with h5py.File(folder / "file.h5", "w") as file:
        for name, value in {"kspace": fft2c(images), "reconstruction_rss": rss, "ismrmrd_header": mr_header(), **members}.items():
            if value is not None:
                file[name] = value
        file.attrs["patient_id"], file.attrs["acquisition"] = CANARY, CANARY
    return folder / "file.h5"


def mrd(folder: Path, readouts: list[tuple[np.ndarray, dict[str, Any]]], header: str, group: str = "dataset") -> Path:
    """An MRD file by the public ismrmrd package: readouts as (samples (coil, sample), fields of the head with the counters as idx_...,
    and traj (sample, dimension))."""
    import ismrmrd

    path = folder / "file.mrd"
    data = ismrmrd.Dataset(str(path), group, create_if_needed=True)
    data.write_xml_header(header.encode())
    for samples, fields in readouts:
        points = np.asarray(fields.get("traj", np.zeros((samples.shape[1], 0))), np.float32)
        made = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples, np.complex64), points)
        made.center_sample = samples.shape[1] // 2
        for name, value in fields.items():
            if name == "traj":
                continue
            elif name == "flags":
                for flag in value:
                    made.setFlag(flag)
            elif name.startswith("idx_"):
                setattr(made.idx, name[4:], value)
            elif isinstance(value, tuple):
                getattr(made, name)[:] = value
            else:
                setattr(made, name, value)
        data.append_acquisition(made)
    data.close()
    return path


PLACE = dict(read_dir=(1.0, 0, 0), phase_dir=(0, 1.0, 0), slice_dir=(0, 0, 1.0))


def mrd_readouts(kspace: np.ndarray, columns: Any = None, **fields: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """The readouts of k-space [slice, coil, readout, phase]: the columns in order, each with its counters; slices 5 mm apart."""
    wanted = range(kspace.shape[3]) if columns is None else columns
    return [(kspace[k, :, :, p], {"idx_kspace_encode_step_1": p, "idx_slice": k, "position": (10.0, 20.0, -5.0 * k), **PLACE, **fields})
            for k in range(len(kspace)) for p in wanted]  # fmt: skip


def radial_readouts(spokes: int = 5, **fields: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Spokes of 24 samples through a k-space of ones, two slices, in cycles per field of view (24 pixels)."""
    made = []
    for k in range(2):
        for spoke in range(spokes):
            angle = np.pi * (spoke + 0.25) / spokes
            points = np.outer(np.arange(24) - 12.0, (np.cos(angle), np.sin(angle)))
            made.append((np.ones((3, 24)), {"idx_kspace_encode_step_1": spoke, "idx_slice": k, "position": (10.0, 20.0, -5.0 * k),
                                            "traj": points, **PLACE, **fields}))  # fmt: skip
    return made


RADIAL = mr_header(48, 48, picture=(24, 24), trajectory="radial")


def _radial(change: Callable[[np.ndarray], np.ndarray] = lambda traj: traj, only: slice = slice(None), header: str = RADIAL,
            **fields: Any) -> Callable[[Path], Path]:  # fmt: skip
    """Spokes of which ``only`` these have other points."""
    def make(folder: Path) -> Path:
        readouts = radial_readouts(**fields)
        for _, head in readouts[only]:
            head["traj"] = change(head["traj"])
        return mrd(folder, readouts, header)

    return make


def mrd_path_short(folder: Path) -> Path:
    """One readout has fewer points than its header says."""
    import h5py

    path = _radial()(folder)
    with h5py.File(path, "a") as file:
        row = file["dataset/data"][3]
        row["traj"] = row["traj"][:-2]
        file["dataset/data"][3] = row
    return path


def _fastmri(**members: Any) -> Callable[[Path], Path]:
    return lambda folder: fastmri(folder, **members)


def _mrd(header: str | None = None, **fields: Any) -> Callable[[Path], Path]:
    return lambda folder: mrd(folder, mrd_readouts(fft2c(coil_images()), **fields), mr_header() if header is None else header)


def nan_kspace() -> np.ndarray:
    kspace = fft2c(coil_images())
    kspace[1, 2, 3, 4] = np.nan
    return kspace


def hdf5_cut(folder: Path) -> Path:
    path = fastmri(folder)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def hdf5_other(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "file.h5", "w") as file:
        file[f"{CANARY}/picture"] = np.zeros(3)
        file["k_space"] = np.zeros(3, np.complex64)
    return folder / "file.h5"


def hdf5_link(folder: Path, *, soft: bool = False) -> Path:
    import h5py

    fastmri(folder, kspace=None)
    with h5py.File(folder / "secret.h5", "w") as file:
        file["kspace"] = fft2c(coil_images())
    with h5py.File(folder / "file.h5", "a") as file:
        file["kspace"] = h5py.SoftLink("/reconstruction_rss") if soft else h5py.ExternalLink("secret.h5", "kspace")
    return folder / "file.h5"


def hdf5_virtual(folder: Path) -> Path:
    import h5py

    images = fft2c(coil_images())
    with h5py.File(folder / "secret.h5", "w") as file:
        file["kspace"] = images
    fastmri(folder, kspace=None)
    whole = h5py.VirtualLayout(images.shape, images.dtype)
    whole[:] = h5py.VirtualSource(str(folder / "secret.h5"), "kspace", images.shape)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_virtual_dataset("kspace", whole)
    return folder / "file.h5"


def hdf5_outside(folder: Path) -> Path:
    """k-space in a raw file beside."""
    import h5py

    images = fft2c(coil_images())
    (folder / "secret.bin").write_bytes(images.tobytes())
    fastmri(folder, kspace=None)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_dataset("kspace", images.shape, images.dtype, external=[(str(folder / "secret.bin"), 0, images.nbytes)])
    return folder / "file.h5"


def hdf5_plugin(folder: Path) -> Path:
    """A filter's number is exchanged for one that no library has registered."""
    import h5py

    fastmri(folder, kspace=None)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_dataset("kspace", data=fft2c(coil_images()), chunks=(1, 1, 48, 20), compression="lzf")
    path = folder / "file.h5"
    data = path.read_bytes()
    assert data.count(struct.pack("<H", 32000)) >= 1 and data.count(b"lzf") == 1
    at = data.rindex(struct.pack("<H", 32000), 0, data.index(b"lzf"))
    path.write_bytes(data[:at] + struct.pack("<H", 32015) + data[at + 2 :])
    return path


def hdf5_bomb(folder: Path) -> Path:
    """k-space of nine gigabytes in a few kilobytes."""
    import h5py

    fastmri(folder, kspace=None)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_dataset("kspace", (70, 15, 1024, 1024), np.complex64, chunks=(1, 1, 1024, 1024), compression="gzip")
    return folder / "file.h5"


def hdf5_hollow(folder: Path) -> Path:
    """k-space of 700 megabytes of which nothing was written."""
    import h5py

    fastmri(folder, kspace=None)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_dataset("kspace", (6, 15, 1024, 1024), np.complex64, chunks=(1, 1, 1024, 1024))
    return folder / "file.h5"


def hdf5_objects(folder: Path) -> Path:
    import h5py

    fastmri(folder, kspace=None)
    with h5py.File(folder / "file.h5", "a") as file:
        file.create_dataset("kspace", (2, 3, 4), dtype=h5py.ref_dtype)
    return folder / "file.h5"


def mrd_without_xml(folder: Path) -> Path:
    import h5py

    path = _mrd()(folder)
    with h5py.File(path, "a") as file:
        del file["dataset/xml"]
    return path


def mrd_of_numbers(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "file.mrd", "w") as file:
        file["dataset/data"], file["dataset/xml"] = np.zeros((3, 4)), mr_header()
    return folder / "file.mrd"


def mrd_short(folder: Path) -> Path:
    """One readout has fewer samples than its header says."""
    import h5py

    path = _mrd()(folder)
    with h5py.File(path, "a") as file:
        row = file["dataset/data"][7]
        row["head"]["number_of_samples"] = 47
        file["dataset/data"][7] = row
    return path


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'


def npy(folder: Path, array: np.ndarray, side: Any = None) -> Path:
    """k-space.npy and, where given, its JSON: an object, or text as it is."""
    np.save(folder / "kspace.npy", array, allow_pickle=True)
    if side is not None:
        (folder / "kspace.json").write_text(side if isinstance(side, str) else json.dumps(side))
    return folder / "kspace.npy"


def _npy(array: np.ndarray | None = None, side: Any = None) -> Callable[[Path], Path]:
    return lambda folder: npy(folder, fft2c(coil_images())[0] if array is None else array, side)


def npy_cut(folder: Path) -> Path:
    path = _npy()(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def npy_differing() -> np.ndarray:
    kspace = fft2c(coil_images())
    kspace[0, :, :, ::2] = 0
    return kspace


def twix(version: str) -> bytes:
    """The first bytes of Siemens raw data, of syngo VB or of VD and later, with a patient in the table of measurements."""
    if version == "VB":
        return struct.pack("<II", 60000, 6) + b"Config\0" + struct.pack("<I", 5000) + CANARY.encode() * 2000
    entry = struct.pack("<IIQQ", 1, 1, 10240, 40000) + CANARY.encode().ljust(64, b"\0") + b"protocol".ljust(64, b"\0")
    return (struct.pack("<II", 0, 1) + entry).ljust(10240, b"\0") + bytes(40000)


P_FILE = struct.pack("<f", 26.0) + bytes(30) + b"GE_MED_NMR" + bytes(2000)


def mr_slice(index: int = 0, **changes: Any) -> Dataset:
    """A valid MR magnitude slice: the CT one with another class and values from 0."""
    pixels = (phantom(index).astype(np.int32) + 1000).clip(0).astype(np.uint16)
    without = dict.fromkeys(("RescaleSlope", "RescaleIntercept", "RescaleType", "KVP"))
    fields = dict(SOPClassUID=MR_IMAGE, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "ND"], PixelRepresentation=0,
                  PixelData=pixels.tobytes(), ScanningSequence="SE", SequenceVariant="SK", ScanOptions="", MRAcquisitionType="2D",
                  RepetitionTime=500, EchoTime=12, EchoTrainLength=1, MagneticFieldStrength=3, FlipAngle=90)  # fmt: skip
    return ct_slice(index, **{**without, **fields, **changes})


def _mr(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: save(mr_slice(**changes), folder / "scan.dcm")


def mr_series(folder: Path, slices: int = 5, change: Callable[[int, Dataset], None] | None = None) -> Path:
    """As `series`, of MR."""
    home = folder / "series"
    home.mkdir()
    for index in range(slices):
        ds = mr_slice(index)
        if change is not None:
            change(index, ds)
        save(ds, home / f"{(index * 7) % 10}{index}.dcm")
    return home


def ct_inside_mr(folder: Path) -> Path:
    home = mr_series(folder, 3)
    save(ct_slice(3), home / "ct.dcm")
    return home


J2K, JPEG_LOSSY, RLE, HEVC, JPEG_LS = (f"1.2.840.10008.1.2.{n}" for n in ("4.90", "4.51", "5", "4.107", "4.80"))

BAD_INPUTS: dict[str, tuple[Callable[[Path], Path], int]] = {
    # no file at all
    "no such path": (lambda folder: folder / "nothing.dcm", 2),
    "fifo": (fifo, 2),
    "fifo in a folder": (fifo_inside, 2),
    # bytes
    "empty file": (_bytes(b""), 4),
    "text renamed .dcm": (_bytes(b"this is a letter, not an image\n" * 40), 4),
    "noise renamed .dcm": (_bytes(np.random.default_rng(1).bytes(4096)), 4),
    "PNG renamed .dcm": (_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)), 3),
    "ZIP without a sinogram": (zip_of_text, 3),
    "preamble only": (_bytes(bytes(128) + b"DICM"), 4),
    "truncated in meta": (cut_in_meta, 4),
    "truncated in header": (cut_in_header, 4),
    "truncated pixels": (_cut(0.7), 4),
    "no pixels": (_slice(PixelData=None), 4),
    "no transfer syntax": (no_transfer_syntax, 4),
    "no preamble": (without_preamble, 3),
    "empty file in a folder": (empty_file_inside, 4),
    "deflate bomb": (deflate_bomb, 6),
    # geometry of a slice
    "no PixelSpacing": (_slice(PixelSpacing=None), 3),
    "PixelSpacing 0": (_slice(PixelSpacing=[0, 0]), 3),
    "PixelSpacing negative": (_slice(PixelSpacing=[-1, 1]), 3),
    "PixelSpacing NaN": (_raw("PixelSpacing", [0.75, 0.25], b"NaN\\NaN   "), 3),
    "no position": (_slice(ImagePositionPatient=None), 3),
    "no orientation": (_slice(ImageOrientationPatient=None), 3),
    "skewed orientation": (_slice(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0]), 3),
    "sagittal": (_slice(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), 3),
    # scale
    "RescaleSlope NaN": (_raw("RescaleSlope", "1.00", b"NaN "), 3),
    "RescaleSlope 0": (_slice(RescaleSlope=0), 3),
    "RescaleSlope text": (_raw("RescaleSlope", "1.00", b"abc "), 3),
    "RescaleSlope infinite": (_raw("RescaleSlope", "1.0000", b"1e400 "), 3),
    "RescaleSlope empty": (_slice(RescaleSlope=""), 3),
    "no RescaleSlope": (_slice(RescaleSlope=None), 3),
    "Modality LUT": (big_meta, 3),
    "RescaleType not HU": (_slice(RescaleType="MGML"), 3),
    # pixels
    "Rows 0": (_slice(Rows=0), 4),
    "no Rows": (_slice(Rows=None), 4),
    "Rows 65535": (_slice(Rows=65535, Columns=65535), 6),
    "BitsStored 17": (_slice(BitsStored=17), 4),
    "PixelRepresentation 7": (_slice(PixelRepresentation=7), 4),
    "one row": (_slice(Rows=1), 3),
    "constant": (_slice(PixelData=bytes(2 * SIZE * SIZE)), 3),
    "values like counts": (_slice(RescaleSlope=5000), 3),
    "RGB": (rgb, 3),
    "several frames": (_slice(NumberOfFrames=3), 3),
    "frames as text": (_raw("NumberOfFrames", "12", b"ab"), 3),
    # kinds
    "ultrasound": (ultrasound, 3),
    "MR phase": (_mr(ImageType=["ORIGINAL", "PRIMARY", "P", "ND"]), 3),
    "MR phase by its values": (_slice(SOPClassUID=MR_IMAGE, Modality="MR"), 3),
    "MR imaginary part": (_mr(ComplexImageComponent="IMAGINARY"), 3),
    "MR mosaic": (_mr(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), 3),
    "MR bad rescale": (_mr(RescaleSlope=0, RescaleIntercept=0), 3),
    "MR slices of two echoes": (lambda folder: mr_series(folder, 4, lambda k, ds: setattr(ds, "ImagePositionPatient", [0, 0, k // 2])), 3),
    "enhanced MR": (_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1"), 3),
    "CT among MR": (ct_inside_mr, 3),
    "enhanced CT": (_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"), 3),
    "CT-PD": (ct_pd, 3),
    "private raw data": (_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.66"), 3),
    "unknown class": (_slice(SOPClassUID="1.2.3.4.5.6"), 3),
    "DICOMDIR": (_slice("DICOMDIR", SOPClassUID="1.2.840.10008.1.3.10"), 3),
    "no class": (_slice(SOPClassUID=None), 4),
    "localizer": (_slice(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), 3),
    "projection": (_slice(ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]), 3),
    # compression
    "missing decoder": (lambda folder: compressed(folder, HEVC, b"\0\0\0\1"), 3),
    "unknown syntax": (lambda folder: compressed(folder, "1.2.3.4.5.6.7", b"\0\0\0\1"), 3),
    "lossy without the flag": (lambda folder: compressed(folder, JPEG_LOSSY, b"\xff\xd8\xff\xd9"), 3),
    "lossy once": (_slice(LossyImageCompression="01"), 3),
    "broken JPEG 2000": (lambda folder: compressed(folder, J2K, b"\xff\x4f\xff\x51" + bytes(64)), 4),
    "broken RLE": (lambda folder: compressed(folder, RLE, struct.pack("<16I", 9, *range(15))), 4),
    # series
    "folder without DICOM": (empty_folder, 3),
    "two series in a folder": (two_series, 3),
    "localizer inside a series": (localizer_inside, 3),
    "two orientations": (coronal_inside, 3),
    "missing slice": (missing_slice, 3),
    "many missing slices": (two_missing, 3),
    "uneven slices": (uneven, 3),
    "duplicated position": (duplicated_position, 3),
    "one UID twice": (same_uid, 3),
    "tilted stack": (tilted_stack, 3),
    "two patients": (two_patients, 3),
    "two pixel spacings": (two_spacings, 3),
    # NIfTI
    "NIfTI truncated": (lambda folder: _bytes(nifti_bytes()[:-40], "scan.nii")(folder), 4),
    "NIfTI 4D": (_nifti(shape=(4, 5, 3, 2)), 3),
    "NIfTI NaN": (_nifti(fill=np.nan), 3),
    "NIfTI sheared": (_nifti(affine=np.array([[2.0, 0, 0, 0], [0, 2, 0.5, 0], [0, 0, 3, 0], [0, 0, 0, 1]])), 3),
    "NIfTI complex": (_nifti(dtype=np.complex64), 3),
    "NIfTI constant": (lambda folder: _bytes(nifti_bytes((1, 2, 2), fill=3.0), "scan.nii")(folder), 3),
    "NIfTI huge": (nifti_huge, 6),
    "NIfTI bomb": (nifti_bomb, 6),
    "gzip of text": (lambda folder: _bytes(gzip.compress(b"hello " * 500), "scan.nii.gz")(folder), 3),
    "gzip truncated": (lambda folder: _bytes(gzip.compress(nifti_bytes())[:200], "scan.nii.gz")(folder), 4),
    "gzip broken": (lambda folder: _bytes(gzip.compress(nifti_bytes())[:20] + b"\xff" * 200, "scan.nii.gz")(folder), 4),
    # sinogram
    "npz with pickled objects": (_npz(y=np.array([{"a": 1}, None], dtype=object)), 3),
    "npz with wrong shapes": (_npz(y=np.zeros((2, 11, 17))), 3),
    "npz with NaN": (_npz(y=np.full((2, 12, 17), np.nan)), 3),
    "npz with NaN noise": (_npz(noise=np.nan), 3),
    "npz with noise 0": (_npz(noise=0.0), 3),
    "npz in degrees": (_npz(angles=np.arange(12) * 15.0), 3),
    "npz of counts": (_npz(y=np.full((2, 12, 17), 2e4)), 3),
    "npz without pitch": (_npz(pitch=None), 3),
    "npz with unknown key": (_npz(patient=np.array([CANARY])), 3),
    "npz of an unknown geometry": (_npz(geometry="spiral"), 3),
    "npz fan without source": (_npz(geometry="fan"), 3),
    "npz with text": (_npz(y=np.array(["a", "b"])), 3),
    "npz with half a pixel": (_npz(grid_shape=np.array([9.5, 11])), 3),
    "npz with two pitches": (_npz(pitch=np.array([1.0, 2.0])), 3),
    "npz truncated": (npz_cut, 4),
    "npz with a flipped byte": (npz_flipped, 4),
    "npz with a wrong checksum": (npz_checksum, 4),
    "npz that lies": (npz_lying, 4),
    "npz bomb": (npz_bomb, 6),
    # k-space: HDF5
    "HDF5 truncated": (hdf5_cut, 4),
    "HDF5 of eight bytes": (_bytes(b"\x89HDF\r\n\x1a\n", "file.h5"), 4),
    "HDF5 with other groups": (hdf5_other, 3),
    "HDF5 with an external link": (hdf5_link, 3),
    "HDF5 with a soft link": (lambda folder: hdf5_link(folder, soft=True), 3),
    "HDF5 virtual": (hdf5_virtual, 3),
    "HDF5 outside": (hdf5_outside, 3),
    "HDF5 with a plugin": (hdf5_plugin, 3),
    "HDF5 bomb": (hdf5_bomb, 6),
    "HDF5 hollow": (hdf5_hollow, 6),
    "HDF5 of references": (hdf5_objects, 3),
    "fastMRI real": (_fastmri(kspace=np.abs(coil_images())), 3),
    "fastMRI NaN": (lambda folder: fastmri(folder, kspace=nan_kspace()), 3),
    "fastMRI of two axes": (_fastmri(kspace=np.ones((4, 5), np.complex64)), 3),
    "fastMRI zero": (_fastmri(kspace=np.zeros((2, 3, 48, 20), np.complex64)), 3),
    "fastMRI mask too short": (_fastmri(mask=np.ones(19, bool)), 3),
    "fastMRI mask of zeros": (_fastmri(mask=np.zeros(20, bool)), 3),
    "fastMRI of two masks": (lambda folder: fastmri(folder, kspace=npy_differing()), 3),
    "fastMRI XML malformed": (_fastmri(ismrmrd_header=mr_header()[:-30]), 4),
    "fastMRI XML not UTF-8": (lambda folder: fastmri(folder, ismrmrd_header=np.bytes_(mr_header().encode("utf-16"))), 4),
    "fastMRI XML without encoding": (_fastmri(ismrmrd_header="<ismrmrdHeader/>"), 3),
    "fastMRI XML of zero size": (_fastmri(ismrmrd_header=mr_header(width=4)), 3),
    "fastMRI XML entity bomb": (_fastmri(ismrmrd_header=mr_header(doctype=BOMB)), 3),
    "fastMRI XML is a number": (_fastmri(ismrmrd_header=7.0), 3),
    "fastMRI radial": (_fastmri(ismrmrd_header=mr_header(trajectory="radial")), 3),
    "fastMRI two encodings": (_fastmri(ismrmrd_header=mr_header(times="2")), 3),
    "fastMRI other reference": (_fastmri(reconstruction_rss=np.ones((3, 4, 4))), 3),
    "fastMRI NaN reference": (_fastmri(reconstruction_rss=np.full((2, 24, 16), np.nan)), 3),
    "MRD without XML": (mrd_without_xml, 3),
    "MRD malformed XML": (_mrd(header="<ismrmrdHeader>"), 4),
    "MRD entity bomb": (_mrd(header=mr_header(doctype=BOMB)), 3),
    "MRD spiral": (_mrd(header=mr_header(trajectory="spiral")), 3),
    "MRD echo-planar": (_mrd(header=mr_header(trajectory="epi")), 3),
    "MRD radial in 3D": (_radial(lambda traj: np.insert(traj, 2, 1, axis=1)), 3),
    "MRD radial in 1D": (_radial(lambda traj: traj[:, :1]), 3),
    "MRD radial in another unit": (_radial(lambda traj: 7 * traj), 3),
    "MRD radial that reaches half way": (_radial(lambda traj: traj / 2), 3),
    "MRD radial NaN": (_radial(lambda traj: traj * np.nan, slice(7, 8)), 3),
    "MRD radial of two trajectories": (_radial(lambda traj: 0.9 * traj, slice(7, 8)), 3),
    "MRD radial all discarded": (_radial(discard_pre=20, discard_post=30), 3),
    "MRD radial of coarse pixels": (_radial(header=RADIAL.replace("<x>72.0</x>", "<x>36.0</x>")), 3),
    "MRD radial with short points": (mrd_path_short, 4),
    "MRD two encodings": (_mrd(header=mr_header(times="2")), 3),
    "MRD two encoding spaces": (_mrd(encoding_space_ref=1), 3),
    "MRD of numbers": (mrd_of_numbers, 3),
    "MRD NaN": (lambda folder: mrd(folder, mrd_readouts(nan_kspace()), mr_header()), 3),
    "MRD short readout": (mrd_short, 4),
    "MRD off the grid": (_mrd(header=mr_header(width=16)), 3),
    "MRD reversed": (_mrd(flags=[22]), 3),
    "MRD only noise": (_mrd(flags=[19]), 3),
    # k-space: arrays
    "npy real": (_npy(np.ones((2, 4, 5), np.float32)), 3),
    "npy NaN": (lambda folder: npy(folder, nan_kspace()), 3),
    "npy zero": (_npy(np.zeros((2, 4, 5), np.complex64)), 3),
    "npy of two axes": (_npy(np.ones((4, 5), np.complex64)), 3),
    "npy with pickled objects": (_npy(np.array([{"a": 1}], dtype=object)), 3),
    "npy truncated": (npy_cut, 4),
    "npy cut in its header": (_bytes(b"\x93NUMPY\x01\0\x76\0{'descr'", "kspace.npy"), 4),
    "npy with a broken side-car": (_npy(side="{"), 4),
    "npy with a list beside": (_npy(side=[1]), 3),
    "npy with other axes": (_npy(side={"axes": ["kx", "ky", "coil"]}), 3),
    "npy with another shape": (_npy(side={"shape": [3, 48, 21]}), 3),
    "npy with k = 0 in the corner": (_npy(side={"centre": "corner"}), 3),
    "npy with an unknown mask": (_npy(side={"mask": "radial"}), 3),
    "npy with a bad length": (_npy(side={"fov_mm": [100, -1]}), 3),
    "npy with a bad sigma": (_npy(side={"noise_sigma": True}), 3),
    "npy of two masks": (lambda folder: npy(folder, npy_differing()), 3),
    # raw data of scanners
    "twix VB": (_bytes(twix("VB"), "meas.dat"), 3),
    "twix VD": (_bytes(twix("VD"), "meas.bin"), 3),
    "P-file": (_bytes(P_FILE, "P12345"), 3),
    "Philips list": (_bytes(b"# === DATA DESCRIPTION FILE ===" + b"\n#" * 500, "raw.txt"), 3),
    "Philips raw by its name": (_bytes(np.random.default_rng(1).bytes(4096), "scan.raw"), 3),
}
