"""CT geometry, projection and filtered backprojection against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from operators.analytic import FilteredBackprojection, fbp, parker_weights, view_weights
from operators.ct import MU_WATER, RayTransform, attenuation, encode, hounsfield
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles

TURN = 2 * math.pi
GRID = Grid(shape=(96, 112), spacing=(2.0, 2.0))
CLINICAL = {"detectors": 190, "pitch": 3.0, "source_origin": 595.0, "origin_detector": 490.6}
SHORT = math.pi + 2 * math.atan(190 * 1.5 / 1085.6)

BEAMS = {
    "parallel": ParallelBeam(angles=uniform_angles(41, math.pi, 0.1), detectors=157, pitch=1.9, offset=3.1),
    "parallel full turn": ParallelBeam(angles=uniform_angles(60, TURN), detectors=150, pitch=2.0),
    "parallel uneven": ParallelBeam(angles=tuple(math.pi * (k / 150) ** 1.3 for k in range(150)), detectors=150, pitch=2.0),
    "fan": FanBeam(angles=uniform_angles(360, TURN), **CLINICAL),
    "fan offset": FanBeam(angles=uniform_angles(360, TURN), offset=5.5, **CLINICAL),
    "fan short": FanBeam(angles=uniform_angles(220, SHORT, 1.3), **CLINICAL),
    "curved": FanBeam(angles=uniform_angles(360, TURN), curved=True, **CLINICAL),
    "curved short": FanBeam(angles=uniform_angles(220, SHORT, 4.0), curved=True, offset=-2.0, **CLINICAL),
}
SHIFTED = {"parallel uneven"}


def chord(beam, x, y, radius):
    """Exact line integrals of a disk of value 1 / mm."""
    points, directions = beam.rays()
    distance = (points[..., 0] - x) * directions[..., 1] - (points[..., 1] - y) * directions[..., 0]
    return torch.from_numpy(2 * np.sqrt(np.maximum(radius**2 - distance**2, 0))).float()


def radius_from(x, y, grid=GRID):
    return np.hypot(grid.x[None, :] - x, grid.y[:, None] - y)


@pytest.mark.parametrize("name", BEAMS)
def test_a_disk_comes_back_at_its_value(name):
    beam = BEAMS[name]
    x, y, radius = 14.0, -22.0, 50.0
    image = fbp(RayTransform(GRID, beam), chord(beam, x, y, radius)).numpy()
    r = radius_from(x, y)
    assert image[r < radius - 9].mean() == pytest.approx(1, abs=5e-3)
    assert abs(image[(r > radius + 9) & (radius_from(0, 0) < 90)].mean()) < 5e-3
    centre, rim = image[r < 15].mean(), image[(r > radius - 14) & (r < radius - 8)].mean()
    assert centre == pytest.approx(rim, abs=5e-3)  # no cupping


@pytest.mark.parametrize("name", BEAMS)
def test_projection_of_a_disk(name):
    beam = BEAMS[name]
    exact = chord(beam, 14.0, -22.0, 50.0)
    ways = {"split": 1, "subrays": 1}, {"split": 2, "subrays": 3}
    for way in ways:
        size = 1 / 8  # the disk with soft, area-averaged edges
        fine = Grid(shape=(96 * 8, 112 * 8), spacing=(2.0 * size, 2.0 * size))
        disk = torch.from_numpy((radius_from(14.0, -22.0, fine) < 50).astype(np.float32))
        disk = disk.reshape(96, 8, 112, 8).mean((1, 3))
        measured = RayTransform(GRID, beam, **way)(disk)
        assert float((measured - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("name", ["parallel", "fan", "fan offset", "curved", "curved short"])
def test_an_off_centre_point_lands_where_the_formula_says(name):
    """A transposed or mirrored image passes every adjoint test; this one it does not."""
    beam = BEAMS[name]
    row, column = 20, 81
    x, y = (column - (112 - 1) / 2) * 2.0, (row - (96 - 1) / 2) * 2.0
    image = torch.zeros(GRID.shape)
    image[row, column] = 1
    sinogram = RayTransform(GRID, beam)(image)
    for view in (0, len(beam.angles) // 5, len(beam.angles) // 2, len(beam.angles) - 1):
        a = beam.angles[view]
        along, depth = x * math.cos(a) + y * math.sin(a), -x * math.sin(a) + y * math.cos(a)
        if isinstance(beam, FanBeam):
            tangent = along / (beam.source_origin + depth)
            along = beam.source_detector * (math.atan(tangent) if beam.curved else tangent)
        expected = (along - beam.offset) / beam.pitch + (beam.detectors - 1) / 2
        bins = torch.arange(beam.detectors, dtype=torch.float32)
        measured = float((sinogram[view] * bins).sum() / sinogram[view].sum())
        assert measured == pytest.approx(expected, abs=0.35)
    back = fbp(RayTransform(GRID, beam), sinogram)
    assert divmod(int(back.argmax()), 112) == (row, column)


def test_a_limited_scan_uses_the_measured_angles():
    weights = view_weights(uniform_angles(120, 2 * math.pi / 3), math.pi)
    np.testing.assert_allclose(weights, 2 * math.pi / 3 / 120)


def test_view_weights_of_full_turns_and_repeated_angles():
    np.testing.assert_allclose(view_weights(uniform_angles(60, TURN), math.pi), math.pi / 60)
    np.testing.assert_allclose(view_weights(uniform_angles(61, TURN), math.pi), math.pi / 61)
    np.testing.assert_allclose(view_weights((0.0, 0.0, math.pi / 2), math.pi), [math.pi / 4, math.pi / 4, math.pi / 2])
    np.testing.assert_allclose(view_weights((1.0,), math.pi), math.pi)
    random = tuple(np.random.default_rng(0).uniform(0, math.pi, 300))
    assert view_weights(random, math.pi).sum() == pytest.approx(math.pi)


def test_parker_weights_of_a_line_measured_twice_sum_to_one():
    beam = BEAMS["fan short"]
    weights, gamma = parker_weights(beam), beam.fan_angles()
    step = SHORT / 220
    for view, k in ((3, 150), (20, 120), (1, 180), (10, 100)):
        again = view + (math.pi - 2 * gamma[k]) / step  # the same line, seen from the other side by the bin at -gamma
        low = math.floor(again)
        opposite = np.interp(again, [low, low + 1], weights[low : low + 2, 189 - k]) if low + 1 < 220 else 0.0
        assert weights[view, k] + opposite == pytest.approx(1, abs=5e-3)


def test_short_scan_is_nearly_as_good_as_a_full_one():
    inner, outer = radius_from(14, -22) < 50, radius_from(-10, 10) < 85
    truth = torch.from_numpy(outer * 1.0 + inner * 0.5).float()

    def quality(beam):
        image = fbp(RayTransform(GRID, beam), RayTransform(GRID, beam, split=2, subrays=2)(truth))
        return -20 * math.log10(float((image - truth).square().mean().sqrt()) / 1.5)

    for curved in (False, True):
        full = quality(FanBeam(angles=uniform_angles(360, TURN), curved=curved, **CLINICAL))
        short = quality(FanBeam(angles=uniform_angles(220, SHORT), curved=curved, **CLINICAL))
        assert short > full - 1.5


@pytest.mark.parametrize("window", ["ram-lak", "shepp-logan", "cosine", "hamming", "hann"])
def test_windows_keep_the_mean_and_lower_the_noise(window):
    operator = RayTransform(GRID, BEAMS["parallel full turn"])
    noise = torch.randn(operator.range_shape, generator=torch.Generator().manual_seed(0))
    sharp, soft = fbp(operator, noise), fbp(operator, noise, window=window, cutoff=0.8)
    assert soft.std() < sharp.std()
    image = fbp(operator, chord(operator.beam, 0, 0, 60.0), window=window)
    assert image.numpy()[radius_from(0, 0) < 40].mean() == pytest.approx(1, abs=5e-3)


def test_a_coarse_detector_is_interpolated():
    beam = ParallelBeam(angles=uniform_angles(90), detectors=60, pitch=5.0)
    image = fbp(RayTransform(GRID, beam), chord(beam, 0, 0, 60.0)).numpy()
    assert image[radius_from(0, 0) < 40].std() < 0.02


def test_fbp_says_what_it_cannot_do():
    operator = RayTransform(GRID, BEAMS["parallel"])
    with pytest.raises(ValueError, match="unknown window 'box', known are ram-lak"):
        FilteredBackprojection(operator, window="box")
    with pytest.raises(ValueError, match="cutoff is a fraction"):
        FilteredBackprojection(operator, cutoff=0.0)
    with pytest.raises(TypeError, match="needs a RayTransform, got Composition"):
        FilteredBackprojection(operator.gram)


def test_geometry_is_a_value():
    for value in (GRID, *BEAMS.values()):
        assert eval(repr(value)) == value
        assert hash(pickle.loads(pickle.dumps(value))) == hash(value)
    with pytest.raises(AttributeError):
        GRID.shape = (1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(shape=(0, 4), spacing=(1, 1)), "Grid.shape must be a whole number of at least 1, got 0"),
        (lambda: Grid(shape=(4, 4), spacing=(1, -1)), r"Grid.spacing must be positive \(mm\), got -1"),
        (lambda: Grid(shape=(4, 4, 4), spacing=(1, 1)), r"two numbers \(row, column\), got \(4, 4, 4\)"),
        (lambda: Grid(shape=4, spacing=(1, 1)), "two numbers .row, column., got 4"),
        (lambda: ParallelBeam(angles=(), detectors=3, pitch=1), "one or more finite numbers in rad, got 0 angles"),
        (lambda: ParallelBeam(angles=1.0, detectors=3, pitch=1), "angles must be numbers in rad, got 1.0"),
        (lambda: ParallelBeam(angles=(math.nan,), detectors=3, pitch=1), "finite numbers in rad, got 1 angles"),
        (lambda: ParallelBeam(angles=(0,), detectors=2.5, pitch=1), "detectors must be a whole number of at least 1, got 2.5"),
        (lambda: ParallelBeam(angles=(0,), detectors=2, pitch="x"), "pitch must be a finite number, got 'x'"),
        (lambda: ParallelBeam(angles=(0,), detectors=2, pitch=1, offset=math.inf), "offset must be a finite number, got inf"),
        (
            lambda: FanBeam(angles=(0,), detectors=2, pitch=1, source_origin=9, origin_detector=-1),
            "origin_detector must not be negative, got -1.0",
        ),
        (
            lambda: FanBeam(angles=(0,), detectors=2, pitch=1, source_origin=9, origin_detector=1, curved="yes"),
            "curved must be True or False, got 'yes'",
        ),
        (
            lambda: FanBeam(angles=(0,), detectors=99, pitch=1, source_origin=9, origin_detector=1, curved=True),
            "within 90 degrees",
        ),
        (lambda: uniform_angles(0), "views must be a positive whole number, got 0"),
    ],
)
def test_geometry_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ray_transform_is_checked():
    near = FanBeam(angles=(0,), detectors=9, pitch=1, source_origin=100, origin_detector=1)
    with pytest.raises(ValueError, match="the source must stand outside the grid"):
        RayTransform(GRID, near)
    with pytest.raises(TypeError, match="grid must be a Grid, got tuple"):
        RayTransform((4, 4), near)
    with pytest.raises(TypeError, match="beam must be a ParallelBeam or a FanBeam, got str"):
        RayTransform(GRID, "fan")
    with pytest.raises(ValueError, match="split and subrays"):
        RayTransform(GRID, BEAMS["fan"], split=0)


def test_ray_transform_copies_and_pickles_without_its_matrix():
    operator = RayTransform(GRID, BEAMS["parallel"])
    x = torch.rand(GRID.shape)
    y = operator(x)
    for twin in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert twin._matrix is None
        assert torch.equal(twin(x), y)
    assert operator.state_dict() == {}
    assert len(pickle.dumps(operator)) < 20_000


def test_equal_geometries_share_one_matrix():
    first, second = RayTransform(GRID, BEAMS["parallel"]), encode(GRID, BEAMS["parallel"])
    assert first._projector() is second._projector()


def test_units():
    hu = torch.tensor([-3000.0, -1000.0, 0.0, 1000.0])
    mu = attenuation(hu)
    assert mu.tolist() == pytest.approx([0, 0, MU_WATER, 2 * MU_WATER])
    assert hounsfield(mu).tolist() == pytest.approx([-1000, -1000, 0, 1000], abs=1e-3)
