"""Laws of Volume and Scan: a field of view that stays, means that are exact, errors that say what to do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from deft_med.volume import Scan, Volume, central
from operators.geometry import Cartesian, FanBeam, Grid, ParallelBeam, Trajectory, uniform_angles

AFFINE = np.array([[0.7, 0.0, 0.1, -60.0], [0.0, 0.5, 0.0, 12.0], [-0.1, 0.0, 2.5, 7.0], [0, 0, 0, 1]])


def volume(shape=(2, 12, 18), seed=0) -> Volume:
    return Volume(np.random.default_rng(seed).normal(size=shape), AFFINE, "HU")


def corners(v: Volume) -> np.ndarray:
    """LPS mm of the outer corners of the field of view (8, 3)."""
    slices, rows, columns = v.shape
    points = [(i, j, k, 1) for i in (-0.5, columns - 0.5) for j in (-0.5, rows - 0.5) for k in (0, slices - 1)]
    return np.array(points) @ v.affine[:3].T


def test_data_become_float32_and_spacing_is_in_mm() -> None:
    v = Volume(np.arange(24).reshape(2, 3, 4), np.diag([0.5, 0.75, 3.0, 1.0]))
    assert v.data.dtype == np.float32 and v.shape == (2, 3, 4) and v.unit == "HU"
    assert v.spacing == (3.0, 0.75, 0.5)


@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_coarsening_is_the_area_mean_and_the_field_of_view_stays(factor: int) -> None:
    v = volume()
    c = v.coarsen(factor)
    slices, rows, columns = v.shape
    mean = v.data.astype(float).reshape(slices, rows // factor, factor, columns // factor, factor).mean((2, 4))
    np.testing.assert_allclose(c.data, mean, atol=1e-6)
    np.testing.assert_allclose(corners(c), corners(v), atol=1e-9)
    first = v.affine[:3, 3] + (factor - 1) / 2 * (v.affine[:3, 0] + v.affine[:3, 1])
    np.testing.assert_allclose(c.affine[:3, 3], first, atol=1e-12)
    assert c.spacing[1:] == pytest.approx([factor * s for s in v.spacing[1:]])


@pytest.mark.parametrize("shape", [(12, 18), (5, 7), (7, 18), (1, 1), (24, 36), (13, 11)])
def test_resampling_keeps_mean_constant_and_corners(shape: tuple[int, int]) -> None:
    v = volume()
    r = v.resample_to(shape)
    assert r.shape == (2, *shape)
    np.testing.assert_allclose(r.data.mean((1, 2)), v.data.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(corners(r), corners(v), atol=1e-9)
    np.testing.assert_allclose(v.with_data(np.full(v.shape, -1000.0)).resample_to(shape).data, -1000, rtol=1e-6)


def test_resampling_follows_a_plane_and_composes() -> None:
    rows, columns = np.mgrid[:12, :18]
    v = Volume((2.0 * rows + columns)[None], np.eye(4))
    fine = np.arange(4) * 3 + 1.0
    np.testing.assert_allclose(v.resample_to((4, 18)).data[0], 2 * fine[:, None] + np.arange(18), atol=1e-5)
    np.testing.assert_allclose(v.coarsen(2).coarsen(3).data, v.coarsen(6).data, atol=1e-5)


def test_splitting_is_undone_by_coarsening() -> None:
    v = volume()
    np.testing.assert_allclose(v.resample_to((24, 36)).coarsen(2).data, v.data, atol=1e-6)


def test_with_data() -> None:
    v = volume().with_data(np.zeros((2, 12, 18)), unit="1")
    assert v.unit == "1" and v.data.max() == 0 and (v.affine == AFFINE).all()
    with pytest.raises(ValueError, match="with_data needs shape"):
        v.with_data(np.zeros((2, 12, 9)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((3, 4)), AFFINE), "Volume.data must be"),
        ((np.zeros((0, 3, 4)), AFFINE), "at least one voxel"),
        ((np.full((1, 2, 2), np.nan), AFFINE), "4 values that are not"),
        ((np.full((1, 2, 2), 1e39), AFFINE), "finite"),
        ((np.zeros((1, 2, 2), complex), AFFINE), "real numbers"),
        ((np.zeros((1, 2, 2)), np.eye(3)), "finite \\(4, 4\\)"),
        ((np.zeros((1, 2, 2)), np.diag([1, 1, np.nan, 1])), "finite \\(4, 4\\)"),
        ((np.zeros((1, 2, 2)), np.diag([1, 0, 1, 1])), "singular"),
        ((np.zeros((1, 2, 2)), AFFINE, ""), "Volume.unit"),
    ],
)
def test_a_volume_refuses(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Volume(*arguments)


@pytest.mark.parametrize("factor", [0, 5, 1.5])
def test_coarsen_refuses(factor: float) -> None:
    with pytest.raises(ValueError, match="coarsen needs a whole factor"):
        volume().coarsen(factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2.5, 4)])
def test_resample_refuses(shape: tuple) -> None:
    with pytest.raises(ValueError, match="resample_to needs"):
        volume().resample_to(shape)


BEAM = ParallelBeam(angles=uniform_angles(5), detectors=7, pitch=1.0)
GRID = Grid(shape=(4, 6), spacing=(2.0, 1.0))


@pytest.mark.parametrize("noise", [None, 0.1, np.full((3, 1, 1), 0.2), np.full((3, 5, 7), 0.2), np.full(7, 0.3)])
def test_a_scan_from_plain_numpy(noise) -> None:
    scan = Scan(np.zeros((3, 5, 7)), BEAM, GRID, noise)
    assert scan.y.dtype == np.float32 and not scan.simulated
    assert (scan.noise is None) == (noise is None)


def test_one_sinogram_is_one_slice() -> None:
    fan = FanBeam(angles=uniform_angles(5), detectors=7, pitch=1.0, source_origin=500.0, origin_detector=400.0)
    assert Scan(np.zeros((5, 7)), fan, GRID).y.shape == (1, 5, 7)


def test_a_scan_without_a_place_lies_about_the_origin() -> None:
    scan = Scan(np.zeros((5, 7)), BEAM, GRID)
    np.testing.assert_allclose(scan.lps @ [2.5, 1.5, 0, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(np.diag(scan.lps), [1, 2, 1, 1])
    assert (Scan(np.zeros((5, 7)), BEAM, GRID, affine=AFFINE).lps == AFFINE).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(y=np.zeros((2, 7, 5))), "Scan.y must be"),
        (dict(y=np.zeros(7)), "Scan.y must be"),
        (dict(y=np.full((5, 7), np.inf)), "Scan.y must be finite"),
        (dict(y=np.zeros((5, 7), complex)), "real numbers"),
        (dict(noise=np.ones((2, 2))), "Scan.noise must broadcast"),
        (dict(noise=0.0), "must be positive"),
        (dict(noise=np.nan), "Scan.noise must be finite"),
        (dict(affine=np.zeros((4, 4))), "Scan.affine"),
        (dict(reference=Volume(np.zeros((1, 6, 4)), AFFINE)), "Scan.reference must have shape"),
    ],
)
def test_a_scan_refuses(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scan(**{"y": np.zeros((5, 7)), "acquisition": BEAM, "grid": GRID, **fields})


def test_values_load_no_torch() -> None:
    code = "import sys, deft_med.volume, deft_med.io.dicom, deft_med.io.arrays; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------------------------- MR
MASK = np.arange(6)[None] % 2 == np.zeros((5, 1))
CARTESIAN = Cartesian.of(MASK)
MR_GRID = Grid(shape=(5, 6), spacing=(2.0, 1.0))
K = np.where(MASK, np.ones((2, 3, 5, 6)) + 2j, 0)


def test_an_mr_scan_from_plain_numpy() -> None:
    scan = Scan(K, CARTESIAN, MR_GRID, 0.1, maps=np.ones((2, 3, 5, 6), complex), crop=(4, 3))
    assert scan.modality == "MR" and scan.y.dtype == np.complex64 and scan.picture == (4, 3)
    assert scan.maps is not None and scan.maps.dtype == np.complex64
    assert Scan(K[0], CARTESIAN, MR_GRID).y.shape == (1, 3, 5, 6) and Scan(K[0], CARTESIAN, MR_GRID).picture == (5, 6)
    assert Scan(np.zeros((5, 7)), BEAM, GRID).modality == "CT"


def test_points_along_a_trajectory() -> None:
    path = Trajectory.of((5, 6), np.linspace(-3, 3, 14).reshape(7, 2))
    scan = Scan(np.ones((3, 7), complex), path, MR_GRID)
    assert scan.y.shape == (1, 3, 7) and scan.modality == "MR"
    with pytest.raises(ValueError, match=r"\[slice, coil, sample\] ending in \(7,\)"):
        Scan(np.ones((3, 8), complex), path, MR_GRID)


@pytest.mark.parametrize(("length", "part"), [(6, 4), (6, 3), (5, 4), (5, 3), (7, 7), (8, 1)])
def test_the_central_part_keeps_the_centre(length: int, part: int) -> None:
    line = np.arange(length)
    cut = central(line, (part,))
    assert len(cut) == part and cut[part // 2] == length // 2
    square = central(np.arange(length * 9).reshape(1, length, 9), (part, 9))
    assert square.shape == (1, part, 9)
    with pytest.raises(ValueError, match="central part of"):
        central(line, (length + 1,))


def test_the_picture_lies_where_the_grid_has_it() -> None:
    scan = Scan(K, CARTESIAN, MR_GRID, affine=AFFINE, crop=(2, 3))
    # column 3 // 2 of the picture is column 6 // 2 of the grid, and so for the rows
    np.testing.assert_allclose(scan.lps @ [1, 1, 0, 1], AFFINE @ [3, 2, 0, 1])
    nowhere = Scan(K, CARTESIAN, MR_GRID, crop=(2, 3))
    np.testing.assert_allclose(nowhere.lps @ [1, 0.5, 0, 1], [0, 0, 0, 1])
    assert Scan(K, CARTESIAN, MR_GRID, crop=(2, 3), reference=Volume(np.ones((2, 2, 3)), AFFINE, "a.u.")).reference is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(y=K.real), "Scan.y must hold complex numbers"),
        (dict(y=K * np.nan), "Scan.y must be finite"),
        (dict(y=K * 1e39), "Scan.y must be finite"),
        (dict(y=K[..., :5]), r"Scan.y must be \[slice, coil, ky, kx\] ending in \(5, 6\)"),
        (dict(y=K[0, 0]), "Scan.y must be"),
        (dict(y=K[:0]), "Scan.y must be"),
        (dict(y=K + 1), "exactly 0 where the mask"),
        (dict(grid=GRID), "Scan.grid must have the shape"),
        (dict(maps=np.ones((2, 3, 5, 6))), "Scan.maps must hold complex"),
        (dict(maps=np.ones((1, 3, 5, 6), complex)), "Scan.maps must have shape"),
        (dict(crop=(6, 6)), "Scan.crop must lie within"),
        (dict(crop=(0, 6)), "Scan.crop must lie within"),
        (dict(crop=(4, 6), reference=Volume(np.zeros((2, 5, 6)), AFFINE)), "Scan.reference must have shape"),
        (dict(noise=-1.0), "must be positive"),
        (dict(noise=np.ones((4, 1, 1, 1))), "must broadcast"),
        (dict(acquisition="radial"), "Scan.acquisition must be"),
    ],
)
def test_an_mr_scan_refuses(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scan(**{"y": K, "acquisition": CARTESIAN, "grid": MR_GRID, **fields})


@pytest.mark.parametrize("fields", [dict(maps=K), dict(crop=(2, 2))])
def test_a_ct_scan_has_no_mr_fields(fields: dict) -> None:
    with pytest.raises(ValueError, match="Scan.maps, Scan.crop and Scan.phaseless are of MR"):
        Scan(np.zeros((5, 7)), BEAM, GRID, **fields)
