"""fastMRI and ISMRMRD files, written by h5py and by the public ismrmrd package: the grid they become, against the images they came from."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from bad_inputs import CANARY, coil_images, fastmri, fft2c, ifft2c, mr_header, mrd, mrd_readouts

from deft_med.errors import CorruptError, ResourceError, UnsupportedError
from deft_med.io import Source, hdf5, read
from deft_med.io.encoding import Header, Space, layout, narrow, parse
from deft_med.volume import Scan

pytest.importorskip("ismrmrd", reason="the MRD files of these tests are written by the public ismrmrd package")

IMAGES = coil_images()  # (2, 3, 48, 20), of which rows 12 to 36 are the picture's
KSPACE = fft2c(IMAGES)
WANTED = fft2c(IMAGES[:, :, 12:36])


def scan_of(source: Source) -> Scan:
    assert source.scan is not None and source.volume is None and source.modality == "MR"
    assert CANARY not in source.describe() and "\n" not in source.describe()
    return source.scan


def noise(shape: tuple[int, ...], sigma: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (sigma * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))).astype(np.complex64)


# ------------------------------------------------------------------------------------------------------------------- fastMRI
def test_fastmri(tmp_path: Path) -> None:
    source = read(fastmri(tmp_path))
    scan = scan_of(source)
    assert source.kind == "fastmri" and scan.y.shape == (2, 3, 24, 20) and scan.acquisition.mask.all()
    np.testing.assert_allclose(scan.y, WANTED, atol=1e-4)
    assert scan.grid.spacing == pytest.approx((1.5, 1.5)) and scan.crop == (24, 16)
    # no place in the patient, but a size; the file's own reconstruction is that of these coils
    assert scan.affine is None and not source.placed and source.sized
    assert scan.reference is not None and scan.reference.unit == "a.u."
    rss = np.sqrt((np.abs(ifft2c(scan.y)) ** 2).sum(1))[:, :, 2:18]
    np.testing.assert_allclose(scan.reference.data, rss, atol=1e-4)
    assert source.describe() == (
        "k-space (fastMRI), 2 slices, 3 coils, matrix 24 x 20, picture 24 x 16, 1-fold accelerated, 1.5 x 1.5 mm, "
        "place in the patient unknown; no usable encoding limits in the header: zero-padding known from zero columns only"
    )


def test_zero_padded_columns_are_no_samples(tmp_path: Path) -> None:
    padded = KSPACE.copy()
    padded[..., :3] = padded[..., 17:] = 0
    limits = mr_header(centre=7, last=13)  # columns 3 to 16
    for header in (limits, mr_header()):  # by the header, and by the zeros, which is said
        source = read(fastmri(tmp_path, kspace=padded, ismrmrd_header=header))
        scan = scan_of(source)
        assert ("zero columns only" in source.describe()) == (header is not limits)
        assert scan.acquisition.mask.all(0).tolist() == [3 <= k < 17 for k in range(20)]
        assert scan.acquisition.mask.any(0).sum() == 14 and not scan.y[..., :3].any()
    # what lies beyond the limits is no sample, whatever it holds
    scan = scan_of(read(fastmri(tmp_path, ismrmrd_header=limits)))
    assert scan.acquisition.mask[0].sum() == 14 and not scan.y[..., 17:].any()


def test_samples_that_make_no_lines_count_one_by_one(tmp_path: Path) -> None:
    """Both axes phase encodings: no column is whole, nothing is a readout whose oversampling could go."""
    points = np.random.default_rng(2).random((48, 20)) < 0.3
    points[20:28, 8:12] = True
    source = read(fastmri(tmp_path, kspace=KSPACE * points, reconstruction_rss=None))
    scan = scan_of(source)
    assert (scan.acquisition.mask == points).all() and scan.y.shape == KSPACE.shape
    np.testing.assert_allclose(scan.y, KSPACE * points, atol=1e-6)
    assert "sampled point by point" in source.describe() and f"{48 * 20 / points.sum():.3g}-fold" in source.describe()
    for first, second in ((points, points[::-1]), (points, points & (np.arange(20) < 10)), (np.ones_like(points), points)):
        with pytest.raises(UnsupportedError, match="slices differ in their sampled points"):
            read(fastmri(tmp_path, kspace=np.stack([KSPACE[0] * first, KSPACE[1] * second]), reconstruction_rss=None))


def test_slices_across_a_readout_have_the_other_axes_of_the_header(tmp_path: Path) -> None:
    """A 3D scan of 512 x 48 x 20, cut along its readout: rows are phase encodes, columns partitions, neither is oversampled."""
    def space(name: str, *sizes: float) -> str:
        words = [f"<{axis}>{size:g}</{axis}>" for axis, size in zip("xyzxyz", sizes, strict=True)]
        return (f"<{name}><matrixSize>{''.join(words[:3])}</matrixSize><fieldOfView_mm>{''.join(words[3:])}</fieldOfView_mm></{name}>")

    old = mr_header(centre=24, last=47)
    start, stop = old.index("<encodedSpace>"), old.index("</reconSpace>") + len("</reconSpace>")
    header = old[:start] + space("encodedSpace", 512, 48, 20, 512, 96, 50) + space("reconSpace", 256, 48, 16, 256, 96, 40) + old[stop:]
    for points in (np.ones((48, 20), bool), np.random.default_rng(2).random((48, 20)) < 0.4):
        source = read(fastmri(tmp_path, kspace=KSPACE * points, ismrmrd_header=header, reconstruction_rss=None))
        scan = scan_of(source)
        assert scan.y.shape == KSPACE.shape and scan.grid.spacing == (2.0, 2.5) and scan.picture == (48, 16)
        assert (scan.acquisition.mask == points).all() and scan.noise is None
        assert ("point by point" if not points.all() else "cut across the readout") in source.describe()


def test_a_few_dead_samples_are_no_pattern(tmp_path: Path) -> None:
    dead = KSPACE * (np.random.default_rng(3).random((2, 1, 48, 20)) > 0.04)
    scan = scan_of(read(fastmri(tmp_path, kspace=dead)))
    assert scan.acquisition.mask.all() and scan.y.shape == WANTED.shape


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_the_mask_of_a_test_file(dtype: type, tmp_path: Path) -> None:
    mask = np.arange(20) % 3 == 1
    under = KSPACE * mask
    source = read(fastmri(tmp_path, kspace=under, mask=mask.astype(dtype), reconstruction_rss=None))
    scan = scan_of(source)
    assert (scan.acquisition.mask == mask).all() and scan.reference is None and scan.crop == (24, 16)
    np.testing.assert_allclose(scan.y, WANTED * mask, atol=1e-4)
    assert "2.86-fold" in source.describe()
    # on a full file the mask undersamples
    again = scan_of(read(fastmri(tmp_path, mask=mask)))
    np.testing.assert_allclose(again.y, scan.y, atol=1e-5)


def test_without_a_mask_the_filled_columns_count(tmp_path: Path) -> None:
    mask = np.arange(20) % 2 == 0
    assert (scan_of(read(fastmri(tmp_path, kspace=KSPACE * mask))).acquisition.mask == mask).all()


def test_without_a_header_the_size_is_not_known(tmp_path: Path) -> None:
    source = read(fastmri(tmp_path, ismrmrd_header=None))
    scan = scan_of(source)
    assert scan.y.shape == (2, 3, 48, 20) and scan.grid.spacing == (1, 1) and scan.crop == (24, 16) and not source.sized
    assert "pixel size unknown" in source.describe() and "no header XML" in source.describe()
    assert scan.reference is not None
    np.testing.assert_allclose(scan.reference.data, np.sqrt((np.abs(ifft2c(scan.y)) ** 2).sum(1))[:, 12:36, 2:18], atol=1e-4)


def test_a_single_coil_and_a_smaller_reference(tmp_path: Path) -> None:
    scan = scan_of(read(fastmri(tmp_path, kspace=KSPACE[:, 0], reconstruction_rss=None, reconstruction_esc=np.ones((2, 22, 18)))))
    assert scan.y.shape == (2, 1, 24, 20) and scan.picture == (22, 16) and scan.reference is not None
    np.testing.assert_allclose(scan.y, WANTED[:, :1], atol=1e-4)


def test_an_asymmetric_echo_keeps_its_oversampling(tmp_path: Path) -> None:
    cut = KSPACE.copy()
    cut[:, :, :9] = 0
    source = read(fastmri(tmp_path, kspace=cut))
    scan = scan_of(source)
    assert scan.y.shape == (2, 3, 48, 20) and not scan.acquisition.mask[:9].any() and scan.acquisition.mask[9:].all()
    np.testing.assert_array_equal(scan.y, cut)
    assert scan.crop == (24, 16) and scan.grid.spacing == pytest.approx((1.5, 1.5)) and "oversampling stays" in source.describe()


@pytest.mark.parametrize("echo", [0, 9])
def test_empty_slices_do_not_say_where_the_readout_runs(echo: int, tmp_path: Path) -> None:
    """A stack whose first slices are padding: the readout's extent is that of the first slice that holds anything."""
    padded = np.concatenate([np.zeros_like(KSPACE), KSPACE, np.zeros_like(KSPACE[:1])])
    padded[:, :, :echo] = 0
    padded[1, :, :, 3] = 1  # beyond the mask: no sample
    mask = np.arange(20) != 3
    scan = scan_of(read(fastmri(tmp_path, kspace=padded, mask=mask, reconstruction_rss=None)))
    assert scan.y.shape == (5, 3, 48 if echo else 24, 20) and (scan.acquisition.mask.any(0) == mask).all()
    np.testing.assert_allclose(scan.y[2:4], (padded[2:4] if echo else WANTED) * mask, atol=1e-4)
    assert not scan.y[[0, 1, 4]].any()


def test_noise_from_the_edges_of_the_readout(tmp_path: Path) -> None:
    noisy = fft2c(coil_images(1, 4, 128, 64)) + noise((1, 4, 128, 64), 0.05)
    for coils, words in ((4, "whitened by the noise in the edges"), (1, "noise level from the edges")):
        source = read(fastmri(tmp_path, kspace=noisy[:, :coils], ismrmrd_header=mr_header(128, 64), reconstruction_rss=None))
        scan = scan_of(source)
        assert scan.noise is not None and scan.noise.shape == (1, 1, 1, 1) and scan.noise.item() == pytest.approx(0.05, rel=0.05)
        assert words in source.describe()


def test_compressed_chunks_are_read_and_too_much_is_not(tmp_path: Path) -> None:
    path = fastmri(tmp_path, kspace=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("kspace", data=KSPACE, chunks=(1, 3, 48, 20), compression="gzip", shuffle=True, fletcher32=True)
    source = read(path)
    np.testing.assert_allclose(scan_of(source).y, WANTED, atol=1e-4)
    assert source.digest == read(path).digest and len(source.digest) == 64
    with pytest.raises(ResourceError, match="kspace in the HDF5 file unpacks to over"):
        read(path, max_bytes=22_000)
    with pytest.raises(ResourceError, match="kspace needs more than"):
        read(fastmri(tmp_path, ismrmrd_header=None), max_bytes=40_000)


# --------------------------------------------------------------------------------------------------------------------- ISMRMRD
def test_mrd_and_fastmri_hold_the_same(tmp_path: Path) -> None:
    source = read(mrd(tmp_path, mrd_readouts(KSPACE), mr_header()))
    scan, other = scan_of(source), scan_of(read(fastmri(tmp_path)))
    assert source.kind == "mrd" and scan.acquisition == other.acquisition and scan.grid == other.grid and scan.crop == other.crop
    # by place: the normal of rows along x and columns along y points to the feet, and so do these slices
    np.testing.assert_allclose(scan.y, other.y, atol=1e-4)
    assert source.describe().startswith("k-space (ISMRMRD), 2 slices, 3 coils, matrix 24 x 20, picture 24 x 16, 1-fold")


def test_a_header_by_the_public_package(tmp_path: Path) -> None:
    from ismrmrd import xsd

    space = lambda x, y, fx, fy: xsd.encodingSpaceType(  # noqa: E731
        matrixSize=xsd.matrixSizeType(x=x, y=y, z=1), fieldOfView_mm=xsd.fieldOfViewMm(x=fx, y=fy, z=4.0)
    )
    limits = xsd.encodingLimitsType(kspace_encoding_step_1=xsd.limitType(minimum=0, maximum=19, center=10))
    encoding = xsd.encodingType(encodedSpace=space(48, 20, 96.0, 30.0), reconSpace=space(24, 20, 48.0, 30.0), encodingLimits=limits,
                                trajectory=xsd.trajectoryType.CARTESIAN)  # fmt: skip
    conditions = xsd.experimentalConditionsType(H1resonanceFrequency_Hz=128000000)
    header = xsd.ToXML(xsd.ismrmrdHeader(experimentalConditions=conditions, encoding=[encoding]))
    scan = scan_of(read(mrd(tmp_path, mrd_readouts(KSPACE), header)))
    assert scan.grid.spacing == pytest.approx((2.0, 1.5)) and scan.crop is None
    np.testing.assert_allclose(scan.y, WANTED, atol=1e-4)


def test_lines_in_any_order_and_slices_by_place(tmp_path: Path) -> None:
    readouts = mrd_readouts(KSPACE)
    order = np.random.default_rng(0).permutation(len(readouts))
    scan = scan_of(read(mrd(tmp_path, [readouts[k] for k in order], mr_header())))
    np.testing.assert_allclose(scan.y, WANTED, atol=1e-4)
    (tmp_path / "file.mrd").unlink()
    for _, fields in readouts:
        fields["position"] = (10.0, 20.0, 5.0 * fields["idx_slice"])  # now the second slice comes first along the normal
    other = scan_of(read(mrd(tmp_path, readouts, mr_header())))
    np.testing.assert_allclose(other.y, WANTED[::-1], atol=1e-4)
    assert scan.affine is not None and other.affine is not None
    np.testing.assert_allclose(scan.affine[:3, 2], [0, 0, -5])
    np.testing.assert_allclose(other.affine[:3, 3] + 5 * other.affine[:3, 2] / 5, other.affine[:3, 3] + [0, 0, -5])


@pytest.mark.parametrize(
    ("read_dir", "phase_dir", "slice_dir"),
    [((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((0, -1, 0), (0, 0, 1), (1, 0, 0)), ((0, 0.6, 0.8), (1, 0, 0), (0, 0.8, -0.6))],
)
def test_a_point_is_where_its_header_puts_it(read_dir, phase_dir, slice_dir, tmp_path: Path) -> None:
    """A point source at a place in mm, its k-space in closed form: the brightest pixel's place is the point's."""
    centre, pixel = np.array([12.0, -30.0, 7.0]), 1.5
    r, p = np.array(read_dir, float), np.array(phase_dir, float)
    point = centre + 6 * pixel * r - 4 * pixel * p
    u, v = (point - centre) @ r, (point - centre) @ p
    k, m = (np.arange(48) - 24) / (48 * pixel), (np.arange(20) - 10) / (20 * pixel)
    kspace = np.exp(-2j * np.pi * (k[:, None] * u + m[None] * v))[None, None].astype(np.complex64)
    fields = dict(read_dir=read_dir, phase_dir=phase_dir, slice_dir=slice_dir, position=tuple(centre))
    source = read(mrd(tmp_path, mrd_readouts(kspace, **fields), mr_header()))
    scan = scan_of(source)
    assert source.placed and "unknown" not in source.describe()
    picture = np.abs(ifft2c(scan.y))[0, 0][:, 2:18]
    row, column = np.unravel_index(picture.argmax(), picture.shape)
    np.testing.assert_allclose(scan.lps @ [column, row, 0, 1], [*point, 1], atol=1e-4)
    assert np.linalg.det(scan.lps[:3, :3]) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(read_dir=(0.0, 0, 0), phase_dir=(0.0, 0, 0), slice_dir=(0.0, 0, 0)), "no right-angled frame"),
        (dict(phase_dir=(0.7, 0.7, 0.0)), "no right-angled frame"),
        (dict(position=(0.0, 0.0, 0.0)), "not evenly spaced"),
    ],
)
def test_a_place_that_makes_no_sense_is_no_place(change: dict, words: str, tmp_path: Path) -> None:
    source = read(mrd(tmp_path, mrd_readouts(KSPACE, **change), mr_header()))
    assert scan_of(source).affine is None and not source.placed and source.sized and words in source.describe()
    np.testing.assert_allclose(scan_of(source).y, WANTED, atol=1e-4)


def test_positions_that_differ_within_a_slice(tmp_path: Path) -> None:
    readouts = mrd_readouts(KSPACE)
    readouts[3][1]["position"] = (0.0, 0.0, 1.0)
    assert "differ in position" in read(mrd(tmp_path, readouts, mr_header())).describe()


def test_averages_are_averaged_and_quieter(tmp_path: Path) -> None:
    sigma = 0.1
    readouts = mrd_readouts(KSPACE + noise(KSPACE.shape, sigma, 1), idx_average=0)
    readouts += mrd_readouts(KSPACE + noise(KSPACE.shape, sigma, 2), idx_average=1)
    scan_noise = [(noise((3, 48), sigma, 3 + k), {"flags": [19]}) for k in range(40)]
    scan = scan_of(read(mrd(tmp_path, scan_noise + readouts, mr_header())))
    assert scan.noise is not None and scan.noise.shape == (2, 1, 1, 20)
    np.testing.assert_allclose(scan.noise, sigma * 2**-0.5, rtol=0.05)
    residual = scan.y - WANTED  # coils that were alike stay as they were
    assert residual.real.std() == pytest.approx(sigma / 2**0.5, rel=0.1)


def test_noise_readouts_whiten_the_coils(tmp_path: Path) -> None:
    mix = np.array([[1.0, 0, 0], [0.6, 0.5, 0], [0.2j, 0.1, 0.3]])
    colour = lambda white: np.einsum("dc,...cn->...dn", mix, white).astype(np.complex64)  # noqa: E731
    readouts = mrd_readouts(np.moveaxis(colour(np.moveaxis(noise(KSPACE.shape, 1.0, 1), 3, 1)), 1, 3))
    for _, fields in readouts:
        fields["sample_time_us"] = 5.0
    # the noise scan dwells twice as long, so it is quieter by the root of two
    scan_noise = [(colour(noise((3, 96), 0.5**0.5, 9 + k)), {"flags": [19], "sample_time_us": 10.0}) for k in range(60)]
    scan = scan_of(read(mrd(tmp_path, scan_noise + readouts, mr_header())))
    assert scan.noise is not None
    flat = np.moveaxis(scan.y / scan.noise, 1, 0).reshape(3, -1)
    covariance = flat @ flat.conj().T / flat.shape[1] / 2
    np.testing.assert_allclose(covariance, np.eye(3), atol=0.12)


@pytest.mark.parametrize("coils", [2, 3])
def test_a_noise_scan_that_does_not_fit_is_said(coils: int, tmp_path: Path) -> None:
    scan_noise = [(np.zeros((coils, 48)), {"flags": [19]})]
    source = read(mrd(tmp_path, scan_noise + mrd_readouts(KSPACE), mr_header()))
    assert scan_of(source).noise is None and ("another number of coils" if coils == 2 else "no covariance") in source.describe()


def test_calibration_joins_where_it_belongs(tmp_path: Path) -> None:
    imaging = mrd_readouts(KSPACE, range(0, 20, 4))
    both = mrd_readouts(KSPACE, [8], flags=[21])
    calibration = mrd_readouts(KSPACE, range(7, 14), flags=[20])
    others = mrd_readouts(KSPACE * 9, range(20), flags=[24]) + mrd_readouts(KSPACE * 9, range(20), flags=[23])
    readouts = [r for r in imaging if r[1]["idx_kspace_encode_step_1"] != 8] + both + calibration + others
    source = read(mrd(tmp_path, readouts, mr_header()))
    scan = scan_of(source)
    assert np.flatnonzero(scan.acquisition.mask[0]).tolist() == [0, 4, 7, 8, 9, 10, 11, 12, 13, 16]
    np.testing.assert_allclose(scan.y, WANTED * scan.acquisition.mask, atol=1e-4)
    assert "4 calibration readouts" in source.describe() and "80 readouts that are no image data" in source.describe()
    (tmp_path / "file.mrd").unlink()
    words = "<parallelImaging><calibrationMode>separate</calibrationMode></parallelImaging></encoding>"
    source = read(mrd(tmp_path, readouts, mr_header().replace("</encoding>", words)))
    assert np.flatnonzero(scan_of(source).acquisition.mask[0]).tolist() == [0, 4, 8, 12, 16]
    assert "14 calibration readouts" in source.describe()


def test_partial_fourier_along_the_phase(tmp_path: Path) -> None:
    """Steps 0 to 13 of which 4 is k = 0: columns 6 to 19."""
    readouts = [(samples, fields | {"idx_kspace_encode_step_1": fields["idx_kspace_encode_step_1"] - 6})
                for samples, fields in mrd_readouts(KSPACE, range(6, 20))]  # fmt: skip
    scan = scan_of(read(mrd(tmp_path, readouts, mr_header(centre=4, last=13))))
    assert np.flatnonzero(scan.acquisition.mask[0]).tolist() == list(range(6, 20))
    np.testing.assert_allclose(scan.y, WANTED * scan.acquisition.mask, atol=1e-4)


@pytest.mark.parametrize("discard", [False, True])
def test_an_asymmetric_echo_is_placed_by_its_centre(discard: bool, tmp_path: Path) -> None:
    readouts = mrd_readouts(KSPACE)
    if discard:
        readouts = [(samples, fields | {"discard_pre": 10, "discard_post": 1, "center_sample": 24}) for samples, fields in readouts]
    else:
        readouts = [(samples[:, 10:47], fields | {"center_sample": 14}) for samples, fields in readouts]
    source = read(mrd(tmp_path, readouts, mr_header()))
    scan = scan_of(source)
    assert scan.acquisition.mask[10:47].all() and scan.acquisition.mask.sum() == 37 * 20 and scan.crop == (24, 16)
    np.testing.assert_array_equal(scan.y, KSPACE * scan.acquisition.mask)
    assert "asymmetric echo" in source.describe()


def test_readouts_without_a_centre(tmp_path: Path) -> None:
    source = read(mrd(tmp_path, mrd_readouts(KSPACE, center_sample=0), mr_header()))
    np.testing.assert_allclose(scan_of(source).y, WANTED, atol=1e-4)
    assert "taken for their middle" in source.describe()


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("contrast", "2 contrasts"),
        ("repetition", "2 repetitions"),
        ("set", "2 sets"),
        ("phase", "2 phases"),
        ("kspace_encode_step_2", "3D"),
    ],
)
def test_more_than_one_of_a_thing_is_refused(field: str, words: str, tmp_path: Path) -> None:
    readouts = mrd_readouts(KSPACE)
    readouts[5][1][f"idx_{field}"] = 1
    with pytest.raises(UnsupportedError, match=words):
        read(mrd(tmp_path, readouts, mr_header()))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    readouts = mrd_readouts(KSPACE)
    with pytest.raises(UnsupportedError, match="differ in what is sampled"):
        read(mrd(tmp_path, readouts[:-1], mr_header()))
    (tmp_path / "file.mrd").unlink()
    with pytest.raises(UnsupportedError, match="differ in their number of coils"):
        read(mrd(tmp_path, [(readouts[0][0][:2], readouts[0][1]), *readouts[1:]], mr_header()))
    (tmp_path / "file.mrd").unlink()
    path = mrd(tmp_path, readouts, mr_header())
    for most, words in ((10_000, "data in the HDF5 file unpacks"), (45_000, "readouts need")):
        with pytest.raises(ResourceError, match=words):
            read(path, max_bytes=most)
    (tmp_path / "wide").mkdir()
    with pytest.raises(ResourceError, match="the k-space matrix needs more than"):
        read(mrd(tmp_path / "wide", readouts, mr_header(4096, 4096)), max_bytes=2**20)
    with h5py.File(path, "a") as file:
        file["other/data"], file["other/xml"] = np.zeros(3), "x"
    with pytest.raises(UnsupportedError, match="2 ISMRMRD groups"):
        read(path)


def test_a_group_of_any_name(tmp_path: Path) -> None:
    np.testing.assert_allclose(scan_of(read(mrd(tmp_path, mrd_readouts(KSPACE), mr_header(), group="scan_1"))).y, WANTED, atol=1e-4)


def test_records_with_overlapping_members_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 2.0 crashes the process on such a record (found by damaging files), so none is read; h5py cannot write one."""
    where = dict(names=["a", "b"], formats=["<f8", "<f4"], itemsize=12)
    good, inside, beyond = (np.dtype({**where, "offsets": offsets}) for offsets in ([0, 8], [0, 4], [4, 0]))
    nested = np.dtype([("head", (inside, (2,)))])
    assert [hdf5._sound(dtype) for dtype in (good, inside, beyond, nested, np.dtype("<f4"))] == [True, False, True, False, True]
    monkeypatch.setattr(hdf5, "_sound", lambda dtype: False)
    with pytest.raises(CorruptError, match="members of its records overlap"):
        read(fastmri(tmp_path))


# --------------------------------------------------------------------------------------------------------- the header and the grid
def test_the_header_as_numbers() -> None:
    header = parse(mr_header(48, 20, 10, 19).encode("utf-8-sig"))
    assert header == Header(Space((48, 20, 1), (72.0, 30.0, 5.0)), Space((24, 16, 1), (36.0, 24.0, 5.0)), 10, 19, "cartesian", "", 1.0)
    bandwidth = "<relativeReceiverNoiseBandwidth>0.79</relativeReceiverNoiseBandwidth>"
    bandwidth = f"<acquisitionSystemInformation>{bandwidth}</acquisitionSystemInformation>"
    assert parse(mr_header().replace("<subjectInformation>", bandwidth + "<subjectInformation>")).bandwidth == 0.79
    assert parse(mr_header(trajectory=CANARY)).trajectory == "unknown"
    assert parse(mr_header().replace("fieldOfView_mm", "x")).encoded.fov is None
    with pytest.raises(UnsupportedError, match="longer than 4 MiB"):
        parse(" " * 2**23)


@pytest.mark.parametrize(
    ("encoded", "recon", "shape", "whole", "expected"),
    [
        # fastMRI's brain: 640 x 372 of 440 x 255 mm, the picture 320 x 320 of 220 x 220 mm
        (((640, 372, 1), (440, 255.75, 5)), ((320, 320, 1), (220, 220, 5)), (640, 372), True, (320, (320, 320), (0.6875, 0.6875))),
        (((640, 372, 1), (440, 255.75, 5)), ((320, 320, 1), (220, 220, 5)), (640, 372), False, (640, (320, 320), (0.6875, 0.6875))),
        # a picture interpolated to a finer matrix is not followed
        (((256, 128, 1), (400, 200, 5)), ((512, 512, 1), (200, 200, 5)), (256, 128), True, (128, None, (1.5625, 1.5625))),
        # fewer columns than the picture
        (((640, 264, 1), (440, 181.5, 5)), ((320, 320, 1), (220, 220, 5)), (640, 264), True, (320, None, (0.6875, 0.6875))),
        # no lengths: twice the picture's matrix is oversampling, anything else is not
        (((64, 30, 1), None), ((32, 30, 1), None), (64, 30), True, (32, None, None)),
        (((64, 30, 1), None), ((40, 30, 1), None), (64, 30), True, (64, None, None)),
    ],
)
def test_layouts(encoded, recon, shape, whole, expected) -> None:
    plan = layout(Header(Space(*encoded), Space(*recon), None, None, "cartesian", "", 1.0), shape, whole=whole)
    assert (plan.rows, plan.crop) == expected[:2]
    assert plan.spacing == (None if expected[2] is None else pytest.approx(expected[2]))


@pytest.mark.parametrize(("height", "rows"), [(48, 24), (47, 24), (48, 23), (45, 21)])
def test_oversampling_goes_exactly_and_noise_stays(height: int, rows: int) -> None:
    """The picture's centre stays the centre, for even and odd sizes; the transform is orthonormal."""
    images = np.zeros((1, height, 10), np.complex64)
    start = height // 2 - rows // 2
    images[:, start : start + rows] = noise((1, rows, 10), 1.0)
    np.testing.assert_allclose(narrow(fft2c(images), rows), fft2c(images[:, start : start + rows]), atol=1e-5)
    white = noise((40, height, 30), 0.3)
    assert narrow(white, rows).real.std() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("kind", ["fastmri", "mrd"])
def test_no_torch_unless_there_is_noise_to_look_at(kind: str) -> None:
    import subprocess
    import sys

    code = f"import sys, deft_med.io.{kind}, deft_med.io.hdf5, deft_med.io.kspace; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
