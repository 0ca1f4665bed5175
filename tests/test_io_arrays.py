"""sinogram.npz: what numpy saves comes back as a Scan, and what the door writes comes back the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bad_inputs import sinogram

from deft_med.errors import OutputError
from deft_med.io import arrays, read
from deft_med.volume import Scan
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles


def test_plain_arrays_are_a_scan(tmp_path: Path) -> None:
    np.savez(tmp_path / "sinogram.npz", **sinogram(noise=0.05, simulated=True, affine=np.eye(4)))
    source = read(tmp_path / "sinogram.npz")
    scan = source.scan
    assert source.kind == "sinogram" and scan is not None and source.volume is None and scan.simulated
    assert scan.acquisition == ParallelBeam(angles=uniform_angles(12), detectors=17, pitch=1.5)
    assert scan.grid == Grid(shape=(9, 11), spacing=(2.0, 1.5))
    assert scan.noise is not None and float(scan.noise) == pytest.approx(0.05) and scan.affine is not None
    assert source.describe().startswith("sinogram, 2 slices, 12 views x 17 detectors")


def test_one_slice_and_a_measurement_by_default(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "any_name.bin.npz", **sinogram(y=np.ones((12, 17)), detectors=17))
    scan = read(tmp_path / "any_name.bin.npz").scan
    assert scan is not None and scan.y.shape == (1, 12, 17) and not scan.simulated and scan.noise is None and scan.affine is None


FAN = FanBeam(angles=uniform_angles(12, 6.28), detectors=17, pitch=1.5, source_origin=500.0, origin_detector=400.0, curved=True, offset=0.4)
PARALLEL = ParallelBeam(angles=(0.1, 0.5, 0.2), detectors=17, pitch=1.5, offset=-0.2)


@pytest.mark.parametrize("beam", [FAN, PARALLEL])
@pytest.mark.parametrize("noise", [None, 0.1, np.full((2, 1, 1), 0.3)])
def test_round_trip(beam: FanBeam | ParallelBeam, noise, tmp_path: Path) -> None:
    y = np.random.default_rng(0).normal(size=(2, *beam.shape))
    scan = Scan(y, beam, Grid(shape=(9, 11), spacing=(2.0, 1.5)), noise, affine=np.diag([1.5, 2, 3, 1]), simulated=True)
    arrays.write(scan, tmp_path / "sinogram.npz")
    back = read(tmp_path / "sinogram.npz").scan
    assert back is not None and back.acquisition == beam and back.grid == scan.grid and back.simulated
    np.testing.assert_array_equal(back.y, scan.y)
    np.testing.assert_array_equal(back.lps, scan.lps)
    assert (back.noise is None) == (noise is None) and (noise is None or np.array_equal(back.noise, scan.noise))  # type: ignore[arg-type]


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    scan = Scan(np.zeros((3, 17)), PARALLEL, Grid(shape=(9, 11), spacing=(2.0, 1.5)))
    with pytest.raises(OutputError, match="the sinogram could not be written"):
        arrays.write(scan, tmp_path / "no" / "sinogram.npz")


def test_the_energy_of_the_beam_comes_with_a_sinogram(tmp_path: Path) -> None:
    scan = Scan(np.zeros((3, 17)), PARALLEL, Grid(shape=(9, 11), spacing=(2.0, 1.5)), mu_water=0.0206)
    arrays.write(scan, tmp_path / "s.npz")
    assert arrays.read(tmp_path / "s.npz").scan.mu_water == pytest.approx(0.0206)
    with pytest.raises(ValueError, match="mu_water is water's attenuation in 1/mm, about 0.02, got 19.2"):
        Scan(np.zeros((3, 17)), PARALLEL, Grid(shape=(9, 11), spacing=(2.0, 1.5)), mu_water=19.2)
