"""ISMRMRD readouts off the grid, written by the public ismrmrd package from closed forms: the points and the picture they become."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import PLACE, RADIAL, mr_header, mrd, mrd_readouts, radial_readouts
from mri_phantom import closed_form, grid_points, picture

from deft_med.errors import ResourceError, UnsupportedError
from deft_med.io import Source, read
from deft_med.volume import Scan
from operators.geometry import Cartesian, Trajectory

pytest.importorskip("ismrmrd", reason="the MRD files of these tests are written by the public ismrmrd package")
needs_finufft = pytest.mark.skipif(find_spec("finufft") is None, reason="finufft, the extra noncartesian, is not installed")

SHAPE = (64, 56)  # rows along read_dir, columns along phase_dir
HEADER = mr_header(2 * SHAPE[0], SHAPE[1], picture=SHAPE, trajectory="radial")
CYCLES = {"cycles per pixel": (1, 1), "cycles per field of view": SHAPE, "rad per pixel": (2 * np.pi, 2 * np.pi)}


def spokes(count: int = 100, samples: int = 128, reach: float = 1.0) -> np.ndarray:
    """(spoke, sample, 2): points as (along read_dir, along phase_dir) in rad/pixel, the first one of each spoke at the edge."""
    radii = reach * np.pi * (np.arange(samples) - samples // 2) / (samples // 2)
    angles = np.pi * (np.arange(count) + 0.5) / count
    return radii[None, :, None] * np.stack([np.cos(angles), np.sin(angles)], 1)[:, None]


def spiral(turns: int = 32, samples: int = 1600) -> np.ndarray:
    """Four interleaves of an Archimedean spiral, as `spokes`."""
    t = np.linspace(0, 1, samples) ** 0.5
    return np.stack([np.pi * t[:, None] * np.stack([np.cos(a), np.sin(a)], 1)
                     for a in (2 * np.pi * (turns / 4 * t + k / 4) for k in range(4))])  # fmt: skip


def along(path: np.ndarray, unit: Any = (1, 1), kspace: np.ndarray | None = None, **fields: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Readouts of the lopsided phantom along a path (readout, sample, 2) in rad/pixel, written in ``unit`` to a cycle per pixel."""
    y = closed_form(path.reshape(-1, 2), SHAPE) if kspace is None else kspace
    y = y.reshape(len(y), *path.shape[:2])
    return [(y[:, k], {"traj": path[k] / (2 * np.pi) * np.asarray(unit), "idx_kspace_encode_step_1": k, "position": (10.0, 20.0, 30.0),
                       **PLACE, **fields}) for k in range(len(path))]  # fmt: skip


def scan_of(source: Source) -> Scan:
    assert source.scan is not None and source.kind == "mrd" and isinstance(source.scan.acquisition, Trajectory)
    return source.scan


# --------------------------------------------------------------------------------------------------------------- what is read
@needs_finufft
@pytest.mark.parametrize("unit", CYCLES)
def test_the_unit_is_told_by_the_reach(unit: str, tmp_path: Path) -> None:
    path = spokes(5)
    source = read(mrd(tmp_path, along(path, CYCLES[unit]), HEADER))
    scan = scan_of(source)
    assert f"trajectory read as {unit}" in source.describe() and source.placed and source.sized
    assert scan.grid.shape == SHAPE and scan.grid.spacing == pytest.approx((1.5, 1.5))
    np.testing.assert_allclose(scan.acquisition.points, path.reshape(-1, 2), atol=2e-6)
    np.testing.assert_array_equal(scan.y[0], closed_form(path.reshape(-1, 2), SHAPE))
    assert "64 x 56" in source.describe() and "\n" not in source.describe()


@needs_finufft
def test_cycles_per_encoded_field_of_view(tmp_path: Path) -> None:
    """MRpro counts along the readout's doubled field of view; the other axis may do so too."""
    for unit in ((128, 56), (128, 128)):
        folder = tmp_path / str(unit)
        folder.mkdir()
        source = read(mrd(folder, along(spokes(5), unit), HEADER))
        np.testing.assert_allclose(scan_of(source).acquisition.points, spokes(5).reshape(-1, 2), atol=2e-6)
        assert "encoded field of view" in source.describe()


@needs_finufft
def test_a_reach_of_two_units_is_refused(tmp_path: Path) -> None:
    """Six pixels: 3 is the edge in cycles per field of view, and near it in rad per pixel."""
    header = mr_header(6, 6, picture=(6, 6), trajectory="radial")
    with pytest.raises(UnsupportedError, match="could be cycles per field of view or rad per pixel"):
        read(mrd(tmp_path, along(spokes(41, 6), (6, 6), np.ones((2, 246))), header))


@needs_finufft
@pytest.mark.parametrize("trajectory", ["spiral", "goldenangle", "other", "unknown"])
def test_any_trajectory_with_points_of_its_own(trajectory: str, tmp_path: Path) -> None:
    header = mr_header(*SHAPE, picture=SHAPE, trajectory=trajectory)
    scan = scan_of(read(mrd(tmp_path, along(spiral(8, 200)), header)))
    np.testing.assert_allclose(scan.acquisition.points, spiral(8, 200).reshape(-1, 2), atol=2e-6)


@needs_finufft
def test_points_on_the_grid_say_what_cartesian_readouts_say(tmp_path: Path) -> None:
    """The same samples, once as Cartesian readouts and once with their points: one place, one order of axes, one picture."""
    kspace = closed_form(grid_points(SHAPE), SHAPE).reshape(1, 4, *SHAPE)
    (tmp_path / "grid").mkdir()
    on = read(mrd(tmp_path / "grid", mrd_readouts(kspace, position=(10.0, 20.0, 30.0)), mr_header(*SHAPE, picture=SHAPE)))
    path = grid_points(SHAPE).reshape(*SHAPE, 2).transpose(1, 0, 2)  # a readout runs down the rows
    header = mr_header(*SHAPE, picture=SHAPE, trajectory="other")
    off = read(mrd(tmp_path, along(path, SHAPE, kspace[0].transpose(0, 2, 1).reshape(4, -1)), header))
    assert on.scan is not None and isinstance(on.scan.acquisition, Cartesian) and off.scan is not None
    np.testing.assert_allclose(off.scan.lps, on.scan.lps)
    assert off.scan.grid == on.scan.grid
    index = np.round(off.scan.acquisition.points / (2 * np.pi) * SHAPE).astype(int) + [SHAPE[0] // 2, SHAPE[1] // 2]
    np.testing.assert_array_equal(on.scan.y[0][:, index[:, 0], index[:, 1]], off.scan.y[0])


@needs_finufft
def test_averages_slices_discards_and_noise(tmp_path: Path) -> None:
    """Spokes played twice are averaged and quieter, slices come by place, what is discarded is no sample, the coils are whitened."""
    sigma, rng = 0.5, np.random.default_rng(0)
    noise = lambda *shape: sigma * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))  # noqa: E731
    path = spokes(20)
    y = closed_form(path.reshape(-1, 2), SHAPE)
    readouts = [(noise(4, 512), {"flags": [19]}) for _ in range(40)]
    for k, height in enumerate((0.0, 5.0)):  # the second lies beyond the first, where the normal points from
        for average in range(2):
            readouts += along(path, kspace=(k + 1) * y + noise(*y.shape), idx_slice=k, idx_average=average, position=(0.0, 0.0, height),
                              discard_pre=3, discard_post=2)  # fmt: skip
    source = read(mrd(tmp_path, readouts, HEADER))
    scan = scan_of(source)
    kept = path[:, 3:-2].reshape(-1, 2)
    np.testing.assert_allclose(scan.acquisition.points, kept, atol=2e-6)
    assert scan.noise is not None and scan.noise.shape == (2, 1, len(kept)) and "whitened" in source.describe()
    np.testing.assert_allclose(scan.noise, sigma / 2**0.5, rtol=0.05)
    truth = closed_form(kept, SHAPE)
    for k, factor in enumerate((2, 1)):  # by place: the one of the greater z first
        assert (scan.y[k] - factor * truth).real.std() == pytest.approx(sigma / 2**0.5, rel=0.05)
    np.testing.assert_allclose(scan.lps[:3, 2], [0, 0, -5])


@needs_finufft
def test_what_lies_beyond_the_pixels_is_passed_over(tmp_path: Path) -> None:
    path = spokes(8, 64, reach=1.04)
    source = read(mrd(tmp_path, along(path), HEADER))
    inside = path.reshape(-1, 2)[(np.abs(path.reshape(-1, 2)) <= np.pi).all(1)]
    np.testing.assert_allclose(scan_of(source).acquisition.points, inside, atol=2e-6)
    assert f"{8 * 64 - len(inside)} samples beyond the pixels' k-space passed over" in source.describe()
    assert scan_of(source).y.shape == (1, 4, len(inside))


@needs_finufft
def test_a_picture_interpolated_to_a_finer_matrix_is_not_followed(tmp_path: Path) -> None:
    header = HEADER.replace("<reconSpace><matrixSize><x>64</x><y>56</y>", "<reconSpace><matrixSize><x>128</x><y>112</y>")
    scan = scan_of(read(mrd(tmp_path, along(spokes(5)), header)))
    assert header != HEADER and scan.grid.shape == SHAPE and scan.grid.spacing == pytest.approx((1.5, 1.5))


@needs_finufft
def test_without_lengths_the_size_is_not_known(tmp_path: Path) -> None:
    source = read(mrd(tmp_path, along(spokes(5)), HEADER.replace("fieldOfView_mm", "x")))
    assert scan_of(source).grid.spacing == (1, 1) and not source.sized and not source.placed and "pixel size unknown" in source.describe()


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("operators._nufft.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"not Cartesian: .* pip install finufft"):
        read(mrd(tmp_path, radial_readouts(), RADIAL))


@needs_finufft
def test_limits_and_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mrd(tmp_path, along(spokes(5)), HEADER)
    with pytest.raises(ResourceError, match="the images need more than"):
        read(path, max_bytes=100_000)
    monkeypatch.setattr(Trajectory, "of", lambda *_: (_ for _ in ()).throw(ValueError("points are odd")))
    with pytest.raises(UnsupportedError, match="does not fit together: points are odd"):
        read(path)


# ------------------------------------------------------------------------------------------------------------- what becomes of it
@needs_finufft
@pytest.mark.parametrize("make", [spokes, spiral])
def test_the_picture_is_that_of_the_closed_form(make, tmp_path: Path) -> None:
    """Through the pipeline: the lopsided phantom, no way round but its own, at the value it has."""
    from deft_med.pipeline import reconstruct
    from deft_med.problem import with_known_noise

    scan = scan_of(read(mrd(tmp_path, along(make()), HEADER)))
    result = reconstruct(with_known_noise(scan), None, method="cg-sense", device="cpu")
    truth, found = picture(SHAPE), result.volume.data[0]
    assert np.abs(found - truth).mean() < 0.08 * truth.mean()
    wrong = [truth[::-1], truth[:, ::-1], truth[::-1, ::-1]]
    assert all(np.abs(found - other).mean() > 2 * np.abs(found - truth).mean() for other in wrong)
    assert found.sum() == pytest.approx(truth.sum(), rel=0.03)
