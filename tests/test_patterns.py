"""Sampling patterns: values that repeat themselves, hit their acceleration, and never sample what was not measured."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from operators import patterns
from operators.geometry import Cartesian, Trajectory


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_value_is_its_repr_and_hashes():
    values = (
        patterns.equispaced((23, 30), 4),
        patterns.poisson_disc((23, 31), 4, calibration=(4, 5), generator=seeded()),
        patterns.radial((9, 12), 5),
    )
    for value in values:
        again = eval(repr(value))
        assert again == value and hash(again) == hash(value)
    mask = torch.rand(5, 7, generator=seeded()).numpy() < 0.5
    value = Cartesian.of(mask)
    assert np.array_equal(value.mask, mask) and value.shape == (5, 7)
    assert value.samples == mask.sum() and value.acceleration == pytest.approx(35 / mask.sum())
    assert Cartesian(shape=(5, 7), sampled=value.sampled.upper()) == value
    points = np.array([[0.5, -math.pi], [1.0, 2.0]], dtype=np.float32)
    assert np.array_equal(Trajectory.of((4, 6), points).points, points)


@pytest.mark.parametrize("n", [320, 321, 368])
@pytest.mark.parametrize(("acceleration", "centre"), [(4, 0.08), (8, 0.04)])
def test_lines_follow_the_formulas(n, acceleration, centre):
    low = round(n * centre)
    first = (n - low + 1) // 2
    for axis in (0, 1):
        pattern = patterns.equispaced((n, n) if axis else (n, 5), acceleration, generator=seeded(), axis=axis)
        lines = pattern.mask.any(axis=1 - axis)
        assert np.array_equal(lines, pattern.mask.all(axis=1 - axis)), "constant along the readout"
        assert lines[first : first + low].all() and lines[n // 2]
        assert pattern.acceleration == pytest.approx(acceleration, rel=0.03)
    step = acceleration * (low - n) / (low * acceleration - n)
    offset = 2
    expected = np.zeros(n, dtype=bool)
    expected[first : first + low] = True
    expected[np.around(np.arange(offset, n - 1, step)).astype(int)] = True
    assert np.array_equal(patterns.equispaced((1, n), acceleration, centre_fraction=centre, offset=offset).mask[0], expected)


def test_random_lines_reach_the_acceleration_on_average():
    generator = seeded()
    sampled = [patterns.random((1, 320), 4, generator=generator).mask[0] for _ in range(400)]
    assert np.mean(sampled) == pytest.approx(1 / 4, rel=0.02)
    assert np.all(sampled, axis=0).sum() == 26  # the centre, 8 % of 320
    one, other = (patterns.random((20, 30), 3, generator=seeded(7)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("acceleration", [1.5, 4, 8, 12])
def test_poisson_disc(acceleration):
    shape = (128, 101)
    pattern = patterns.poisson_disc(shape, acceleration, calibration=(10, 12), generator=seeded())
    assert pattern.acceleration == pytest.approx(acceleration, rel=0.01)
    mask = pattern.mask
    assert mask[59:69, 45:57].all()
    assert mask[44:84, 30:71].mean() > 1.5 * mask[:20].mean(), "denser towards the centre"
    if acceleration >= 8:  # points far out keep their distance
        points = np.argwhere(mask[:30]).astype(float)
        apart = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(points))
        assert apart.min() >= 2
    assert pattern == patterns.poisson_disc(shape, acceleration, calibration=(10, 12), generator=seeded())


def test_poisson_disc_is_quick():
    start = time.process_time()
    patterns.poisson_disc((256, 256), 4, generator=seeded())
    assert time.process_time() - start < 2


def test_padded_columns_are_never_samples():
    made = (
        patterns.equispaced((12, 40), 3, padding=(4, 6)),
        patterns.equispaced((12, 40), 3, axis=0, padding=(4, 6)),
        patterns.equispaced((12, 40), 1, padding=(4, 6)),
        patterns.random((12, 40), 3, generator=seeded(), padding=(4, 6)),
        patterns.poisson_disc((12, 40), 3, calibration=(4, 4), generator=seeded(), padding=(4, 6)),
    )
    for pattern in made:
        assert not pattern.mask[:, :4].any() and not pattern.mask[:, -6:].any() and pattern.mask[:, 20].any()
    assert made[2].acceleration == pytest.approx(40 / 30), "honest: the padding was not measured"
    assert made[4].acceleration == pytest.approx(3, rel=0.01)


def test_curves_pass_where_they_should():
    spokes = patterns.radial((32, 40), 6, 80, golden=False).points.reshape(6, 80, 2)
    assert not spokes[:, 40].any(), "every spoke passes the centre"
    assert spokes[0, :, 0] == pytest.approx(0, abs=1e-6) and spokes[0, 0, 1] == pytest.approx(-math.pi)  # the first along kx
    assert spokes[3, 0, 0] == pytest.approx(-math.pi) and spokes[3, :, 1] == pytest.approx(0, abs=1e-6)
    golden = patterns.radial((32, 32), 2, 64).points.reshape(2, 64, 2)
    angle = math.acos(float((golden[0, 0] * golden[1, 0]).sum()) / math.pi**2)
    assert math.degrees(angle) == pytest.approx(111.246, abs=1e-2)
    arms = patterns.spiral((32, 32), 4).points.reshape(4, -1, 2)
    radius = np.linalg.norm(arms, axis=-1)
    assert not radius[:, 0].any() and (np.diff(radius) > 0).all() and 0.95 * math.pi < radius.max() < math.pi
    steps = np.linalg.norm(np.diff(arms, axis=1), axis=-1)
    assert steps.max() / steps.min() < 1.2, "constant speed"
    assert steps.max() <= 1.01 * math.pi / 32


def test_the_acceleration_of_a_trajectory_counts_cells():
    mask = patterns.equispaced((16, 21), 3).mask
    points = 2 * np.pi * (np.argwhere(mask) - (8, 10)) / (16, 21)
    assert Trajectory.of((16, 21), points).acceleration == pytest.approx(Cartesian.of(mask).acceleration)
    assert Trajectory.of((16, 21), np.repeat(points, 3, axis=0)).acceleration == pytest.approx(Cartesian.of(mask).acceleration)
    assert patterns.radial((64, 64), 101).acceleration == pytest.approx(4 / math.pi, rel=0.05)
    assert patterns.radial((64, 64), 25).acceleration > 2.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Cartesian(shape=(4, 4), sampled="00"), "must hold 2 bytes for the shape"),
        (lambda: Cartesian(shape=(4, 4), sampled="0000"), "at least one of the"),
        (lambda: Cartesian(shape=(4, 4), sampled="xy"), "must be hexadecimal digits, got 'xy'"),
        (lambda: Cartesian(shape=(4, 4), sampled=3), "must be hexadecimal digits, got 3"),
        (lambda: Cartesian(shape=(4, 0), sampled="0000"), "whole number of at least 1"),
        (lambda: Cartesian.of(np.ones(3, dtype=bool)), "must be two numbers"),
        (lambda: Trajectory(shape=(4, 4), sampled="00ff"), "8 bytes for each of one or more points, got 2"),
        (lambda: Trajectory(shape=(4, 4), sampled=""), "one or more points, got 0"),
        (lambda: Trajectory.of((4, 4), np.ones((2, 3))), r"must be \(samples, 2\)"),
        (lambda: Trajectory.of((4, 4), np.array([[4.0, 0]])), r"within \[-pi, pi\]"),
        (lambda: Trajectory.of((4, 4), np.array([[np.nan, 0]])), "finite"),
        (lambda: patterns.equispaced((4, 40), 0.5), "acceleration must be at least 1, got 0.5"),
        (lambda: patterns.equispaced((4, 40), 4, centre_lines=10), "a centre of 10 lines alone exceeds"),
        (lambda: patterns.equispaced((4, 40), 4, centre_lines=41), "centre_lines must lie between 0 and 40, got 41"),
        (lambda: patterns.equispaced((4, 40), 4, centre_fraction=1.5), "centre_fraction must lie in"),
        (lambda: patterns.equispaced((4, 40), 4, centre_fraction=0.1, centre_lines=4), "not both"),
        (lambda: patterns.equispaced((4, 40), 4, offset=9), "offset must be one of the first 5 lines, got 9"),
        (lambda: patterns.equispaced((4, 40), 4, axis=2), "axis must be 0"),
        (lambda: patterns.equispaced((4, 40), 4, padding=(20, 20)), "padding must leave some of the 40 columns"),
        (lambda: patterns.poisson_disc((40, 40), 8, generator=seeded()), "calibration rectangle alone exceeds 200 points"),
        (lambda: patterns.poisson_disc((40, 40), 1, padding=(1, 1), generator=seeded()), "the padding leaves 1520"),
        (lambda: patterns.poisson_disc((40, 40), 4, calibration=(41, 2), generator=seeded()), "calibration must lie within"),
        (lambda: patterns.radial((40, 40), 0), "spokes must be a whole number"),
        (lambda: patterns.spiral((40, 40), 4, turns=0), "turns must be positive, got 0"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_mask_is_boolean():
    with pytest.raises(TypeError, match="a sampling mask is boolean, got float64"):
        Cartesian.of(np.ones((3, 3)))
