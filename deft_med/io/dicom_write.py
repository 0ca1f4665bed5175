"""Derived CT and MR series: a new object made from a whitelist of the source's attributes, so that nothing travels by accident.

Module by module after PS3.3 A.3 (CT Image IOD) and A.4 (MR Image IOD); patient, study and frame of reference stay, series and
instances are new. UIDs are derived from what made the pixels (PS3.5 B.2, UUID form), so that the same run twice names the same objects.

CT is stored as int16 HU. MR has no unit and no Modality LUT: it is stored as whole steps from 0, the source's own steps where the
values fit them; Real World Value Mapping says what a step is worth.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from deft_med import __version__
from deft_med.io.gate import writing
from deft_med.io.header import CT_IMAGE, MR_IMAGE, UNREADABLE, is_lossy, numbers, quiet_pydicom, text, whole
from deft_med.volume import Volume

IMPLEMENTATION = f"2.25.{uuid.uuid5(uuid.NAMESPACE_DNS, 'deft_med').int}"
SIMULATED = "simulated acquisition, not for clinical use"
RESEARCH = "research use only, not for clinical use"
SLOPE = {"STDDEV": 0.1}  # HU per stored step; 1 for the others
SERIES = {"DEFT": 1, "FBP": 2, "TV": 3, "STDDEV": 4, "ZERO_FILLED": 5, "CG_SENSE": 6, "WAVELET": 7,
          "INTERPOLATION": 8, "PROJECTIONS": 9, "DEFT_ONLINE": 10}  # series number = 100 x source + this

# Copied where present, not empty and readable: of the whole series from its first slice, of an image from its own source.
OF_SERIES = """
    SpecificCharacterSet TimezoneOffsetFromUTC
    PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight
    PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence LongitudinalTemporalInformationModified
    StudyInstanceUID StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber StudyDescription
    BodyPartExamined PatientPosition ProtocolName FrameOfReferenceUID PositionReferenceIndicator
""".split()
OF_IMAGE = """
    AcquisitionDate AcquisitionTime AcquisitionNumber BurnedInAnnotation RecognizableVisualFeatures
    LossyImageCompressionRatio LossyImageCompressionMethod ContrastBolusAgent ContrastBolusRoute ContrastBolusVolume SliceThickness
""".split()
OF_CT = """
    KVP ScanOptions DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt
    TableHeight RotationDirection ExposureTime XRayTubeCurrent Exposure FilterType FocalSpots SpiralPitchFactor
""".split()
OF_MR = """
    ScanningSequence SequenceVariant ScanOptions MRAcquisitionType SequenceName AngioFlag RepetitionTime EchoTime InversionTime FlipAngle
    NumberOfAverages ImagingFrequency ImagedNucleus EchoNumbers MagneticFieldStrength NumberOfPhaseEncodingSteps PercentSampling
    PercentPhaseFieldOfView EchoTrainLength PixelBandwidth ReceiveCoilName TransmitCoilName AcquisitionMatrix
    InPlanePhaseEncodingDirection VariableFlipAngleFlag SAR
""".split()
# Type 2 of both Image IODs: present even where nothing is known.
ALWAYS = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber
    PatientPosition PositionReferenceIndicator AcquisitionNumber
""".split()
ALWAYS_CT = ["KVP"]
ALWAYS_MR = "ScanOptions MRAcquisitionType RepetitionTime EchoTime EchoTrainLength".split()
STEPS, COARSEST = 32767, 1000  # stored steps of an MR image where it is scaled; the least maximum at which the source's steps will do
# Body parts without sides (PS3.16 Annex L), which must carry no Laterality.
UNPAIRED = set("""
    ABDOMEN ABDOMENPELVIS AORTA BLADDER BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS COCCYX COLON CSPINE CTSPINE ESOPHAGUS FACE HEAD HEADNECK
    HEART JAW LARYNX LIVER LSPINE LSSPINE MAXILLA MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE PANCREAS PELVIS
    PHARYNX PROSTATE RECTUM SKULL SPINE SPLEEN SSPINE STERNUM STOMACH THYROID TLSPINE TONGUE TRACHEA TSPINE UTERUS WHOLEBODY
""".split())
OF_SCANNER = "ManufacturerModelName InstitutionName StationName SoftwareVersions DeviceSerialNumber".split()


def write_series(
    volume: Volume,
    folder: Path,
    headers: Sequence[Dataset],
    *,
    kind: str = "DEFT",
    description: str,
    derivation: str,
    simulated: bool,
    uid_entropy: Iterable[str],
    when: datetime | None = None,
) -> int:
    """Writes ``volume`` as single-frame CT ("HU") or MR ("a.u.") images 0001.dcm, ... into a folder; returns how many pixels were clipped.

    Args:
        volume: [slice, row, column]; HU as int16, rounded (steps of 0.1 HU for STDDEV); a.u. as uint16, negative values clipped.
        folder: where the files go; it exists and is the caller's.
        headers: one source dataset for each slice, in order; none at all makes a new study without a patient.
        kind: a key of SERIES: the last value of Image Type.
        description: for Series Description, after a prefix that says research (and simulated); cut at 64 characters.
        derivation: Derivation Description, cut at 1024 characters.
        simulated: the measurements were computed from an image.
        uid_entropy: what made the pixels (source, configuration, weights, seed); UIDs depend on these, the place and the pixels.
        when: time of creation; now by default.

    Raises:
        ValueError: another number of headers than slices, or of the other modality; an unknown kind or unit.
        OutputError, ResourceError: not writable, or the disk is full.
    """
    if headers and len(headers) != len(volume.data):
        raise ValueError(f"write_series needs a header for each slice: {len(volume.data)} slices, {len(headers)} headers")
    if kind not in SERIES:
        raise ValueError(f"kind must be one of {', '.join(SERIES)}, got {kind!r}")
    if volume.unit not in ("HU", "a.u."):
        raise ValueError(f"a CT series is written in HU and an MR series in 'a.u.', got {volume.unit!r}")
    mr = volume.unit == "a.u."
    if headers and text(headers[0], "SOPClassUID") != (MR_IMAGE if mr else CT_IMAGE):
        raise ValueError(f"the headers are of another modality than a volume in {volume.unit!r}")
    slope = _mr_slope(volume, kind, own=bool(headers)) if mr else SLOPE.get(kind, 1.0)
    steps = np.rint(volume.data.astype(np.float64) / slope)
    stored = np.clip(steps, 0, 65535).astype("<u2") if mr else np.clip(steps, -32768, 32767).astype("<i2")
    pixels = hashlib.sha256(stored.tobytes()).hexdigest()
    entropy = [*uid_entropy, kind, str(simulated), description, derivation, pixels, repr(volume.affine.tolist())]
    series = _uid("series", *entropy, *(text(h, "SOPInstanceUID") for h in headers))
    now = _now(headers[0] if headers else Dataset(), when)
    with quiet_pydicom():
        common = _series(headers[0] if headers else Dataset(), kind, simulated, series, now, mr=mr)
        window = _percentiles(stored) if mr else None
        common.SeriesDescription = _ascii(f"{'SIMULATED RESEARCH' if simulated else 'RESEARCH'} deft_med {description}")[:64].strip()
        common.DerivationDescription = _ascii(derivation)[:1024]
        for index, image in enumerate(stored):
            ds = copy.deepcopy(common)
            source = headers[index] if headers else Dataset()
            _image(ds, source, volume, index, kind)
            if mr:
                _mr_pixels(ds, source, slope, window)
            else:
                _ct_pixels(ds, source, kind)
            ds.SOPInstanceUID = _uid("instance", series, str(index))
            ds.PixelData = image.tobytes()
            ds.file_meta = _file_meta(ds)
            with writing("the DICOM series"):
                ds.save_as(folder / f"{index + 1:04d}.dcm", enforce_file_format=True, overwrite=False)
    return int((steps != stored).sum())


def _uid(*parts: str) -> str:
    """A UID from a 128-bit hash of ``parts`` in the UUID form 2.25.N."""
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def _copy(ds: Dataset, source: Dataset, keywords: Iterable[str]) -> None:
    for keyword in keywords:
        try:
            element = source[keyword] if keyword in source else None
            empty = element is None or element.is_empty
        except UNREADABLE:
            continue
        if not empty:
            ds[keyword] = copy.deepcopy(element)
            for item in ds[keyword].value if ds[keyword].VR == "SQ" else ():
                item.remove_private_tags()


def _code(value: str, meaning: str, scheme: str = "DCM") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _series(source: Dataset, kind: str, simulated: bool, series: str, now: datetime, *, mr: bool) -> Dataset:
    """What all images of the new series share: patient, study, series, frame of reference, equipment, SOP common."""
    ds = Dataset()
    _copy(ds, source, OF_SERIES)
    if text(ds, "BodyPartExamined").upper() not in UNPAIRED:
        ds.Laterality = text(source, "Laterality")  # type 2C: there, if only empty, unless the body part is one that has no sides
    if not text(ds, "StudyInstanceUID"):
        ds.StudyInstanceUID = _uid("study", series)
    if not text(ds, "FrameOfReferenceUID"):
        ds.FrameOfReferenceUID = _uid("frame", series)
    for name in ("InstanceCreation", "Series", "Content"):
        setattr(ds, f"{name}Date", now.strftime("%Y%m%d"))
        setattr(ds, f"{name}Time", now.strftime("%H%M%S"))
    ds.SOPClassUID, ds.Modality, ds.SeriesInstanceUID = MR_IMAGE if mr else CT_IMAGE, "MR" if mr else "CT", series
    number = whole(source, "SeriesNumber") or 0
    ds.SeriesNumber = (number if 0 <= number < 10**7 else 0) * 100 + SERIES[kind]
    ds.Manufacturer, ds.ManufacturerModelName, ds.SoftwareVersions = "deft_med", "deft_med", __version__
    ds.ContributingEquipmentSequence = Items(_equipment(source))
    ds.ImageType = ["DERIVED", "SECONDARY", "OTHER" if mr else "AXIAL", *(["SIMULATED"] if simulated else []), kind]
    ds.ImageComments = SIMULATED if simulated else RESEARCH
    if kind in ("DEFT", "TV", "CG_SENSE", "WAVELET"):
        # CID 7203 has no code for a reconstruction; this one of CID 10033 is the closest true statement
        ds.DerivationCodeSequence = Items([_code("113963", "Iterative Reconstruction")])
    return ds


def _image(ds: Dataset, source: Dataset, volume: Volume, index: int, kind: str) -> None:
    """What one image says of itself: number, acquisition, source, plane and matrix."""
    _copy(ds, source, OF_IMAGE)
    _present(ds, ALWAYS)
    ds.InstanceNumber = index + 1
    ds.LossyImageCompression = "01" if is_lossy(source) else "00"
    if text(source, "SOPInstanceUID"):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = text(source, "SOPClassUID"), text(source, "SOPInstanceUID")
        item.PurposeOfReferenceCodeSequence = Items([_code("121322", "Source image for image processing operation")])
        item.SpatialLocationsPreserved = "YES"
        ds.SourceImageSequence = Items([item])
    dz, dy, dx = volume.spacing
    ds.PixelSpacing = [_ds(dy), _ds(dx)]
    ds.ImageOrientationPatient = _orientation(source, volume)
    ds.ImagePositionPatient = [_ds(v) for v in volume.affine[:3, 3] + index * volume.affine[:3, 2]]
    if not text(ds, "SliceThickness"):  # type 2: what the source does not say is left empty
        ds.SliceThickness = None if text(source, "SOPInstanceUID") else _ds(dz)
    if len(volume.data) > 1:
        ds.SpacingBetweenSlices = _ds(dz)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = volume.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15


def _ct_pixels(ds: Dataset, source: Dataset, kind: str) -> None:
    """What the stored values of a CT image are, and how they were measured."""
    _copy(ds, source, OF_CT)
    _present(ds, ALWAYS_CT)
    ds.ConvolutionKernel, ds.PixelRepresentation = kind, 1
    # the spread is in HU, but is no HU value: Rescale Type says "unspecified"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = _ds(0.0), _ds(SLOPE.get(kind, 1.0)), "US" if kind == "STDDEV" else "HU"
    ds.WindowCenter, ds.WindowWidth = _window(source, kind)


def _mr_pixels(ds: Dataset, source: Dataset, slope: float, window: tuple[float, float] | None) -> None:
    """What the stored values of an MR image are, and how they were measured; without a source the sequence is "research mode"."""
    _copy(ds, source, OF_MR)
    ds.ScanningSequence = ds.get("ScanningSequence") or "RM"
    ds.SequenceVariant = ds.get("SequenceVariant") or "NONE"
    _present(ds, ALWAYS_MR)
    if "IR" in text(ds, "ScanningSequence").split("\\"):
        _present(ds, ["InversionTime"])
    elif "InversionTime" in ds:  # type 2C: of inversion recovery only
        del ds.InversionTime
    ds.PixelRepresentation = 0
    mapping = Dataset()
    mapping.add_new("RealWorldValueFirstValueMapped", "US", 0)
    mapping.add_new("RealWorldValueLastValueMapped", "US", 65535)
    mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = 0.0, slope
    mapping.LUTExplanation, mapping.LUTLabel = "magnitude in arbitrary units", "a.u."
    mapping.MeasurementUnitsCodeSequence = Items([_code("[arb'U]", "arbitrary unit", "UCUM")])
    ds.RealWorldValueMappingSequence = Items([mapping])
    assert window is not None
    ds.WindowCenter, ds.WindowWidth = _ds(window[0]), _ds(window[1])


def _mr_slope(volume: Volume, kind: str, *, own: bool) -> float:
    """What a stored step is worth: 1 (the source's ``own``) where the values are large enough for it, else the maximum in STEPS."""
    top = float(volume.data.max())
    if own and kind != "STDDEV" and COARSEST <= top <= 65535:
        return 1.0
    return top / STEPS if top > 0 else 1.0


def _percentiles(stored: NDArray[np.uint16]) -> tuple[float, float]:
    """Window centre and width of an MR series from its 1st to its 99th percentile, in stored steps."""
    low, high = np.percentile(stored, [1, 99])
    return float(np.round((low + high) / 2)), float(max(1.0, np.round(high - low)))


def _present(ds: Dataset, keywords: Iterable[str]) -> None:
    for keyword in keywords:
        if keyword not in ds:
            setattr(ds, keyword, None)


def _orientation(source: Dataset, volume: Volume) -> list[str]:
    """Image Orientation (Patient): the source's own digits where they say the same, so that positions agree to the last one."""
    axes = (volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)).T.ravel()
    own = numbers(source, "ImageOrientationPatient", 6)
    if own is not None and np.allclose(axes, own, atol=1e-4):
        return text(source, "ImageOrientationPatient").split("\\")
    return [_ds(v) for v in axes]


def _window(source: Dataset, kind: str) -> tuple[list[str], list[str]]:
    """Window Center and Width: the source's where usable, else 40 and 400 HU; 0 to 100 HU for a spread."""
    if kind == "STDDEV":
        return [_ds(50)], [_ds(100)]
    centers, widths = text(source, "WindowCenter").split("\\"), text(source, "WindowWidth").split("\\")
    center, width = numbers(source, "WindowCenter", len(centers)), numbers(source, "WindowWidth", len(widths))
    if center is None or width is None or len(center) != len(width) or min(width) < 1:
        return [_ds(40)], [_ds(400)]
    return [_ds(v) for v in center], [_ds(v) for v in width]


def _equipment(source: Dataset) -> list[Dataset]:
    """Who contributed: the scanner, where there is one, and this program (PS3.3 C.12.1.1.5)."""
    program = Dataset()
    program.Manufacturer, program.ManufacturerModelName, program.SoftwareVersions = "deft_med", "deft_med", __version__
    program.ContributionDescription = RESEARCH
    program.PurposeOfReferenceCodeSequence = Items([_code("109102", "Processing Equipment")])
    if not text(source, "SOPInstanceUID"):
        return [program]
    scanner = Dataset()
    _copy(scanner, source, OF_SCANNER)
    scanner.Manufacturer = text(source, "Manufacturer") or "unknown"
    scanner.PurposeOfReferenceCodeSequence = Items([_code("109101", "Acquisition Equipment")])
    return [scanner, program]


def _file_meta(ds: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID, meta.ImplementationVersionName = IMPLEMENTATION, f"DEFT_MED_{__version__}"[:16]
    return meta


def _now(ds: Dataset, when: datetime | None) -> datetime:
    """The time of creation in the source's time zone, if it names one (the offset holds for every time in the object)."""
    offset = text(ds, "TimezoneOffsetFromUTC")
    zone = None
    if len(offset) == 5 and offset[0] in "+-" and offset[1:].isdigit() and int(offset[1:]) <= 1400:
        minutes = int(offset[1:3]) * 60 + int(offset[3:])
        zone = timezone((-1 if offset[0] == "-" else 1) * timedelta(minutes=minutes))
    if when is None:
        return datetime.now(zone)
    return when.astimezone(zone) if zone is not None and when.tzinfo is not None else when


def _ascii(words: str) -> str:
    """Text for any character set: one line of ASCII without a backslash, which separates values."""
    return " ".join(words.encode("ascii", "replace").decode().replace("\\", "/").split())


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2)."""
    return format_number_as_ds(float(value) + 0.0)
