"""Every protocol beyond a plain scan: from an image to measurements, to a problem, to a better image than the direct one."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import head, model  # noqa: F401
from test_problem import brain

from deft_med.config import KSpaceProtocol, Metal, Noise, Protocol, SliceProtocol, protocol
from deft_med.crosscheck import cross_check, hold_out
from deft_med.errors import UnsupportedError, UsageError
from deft_med.guidance import sample_with
from deft_med.likelihood import Gaussian
from deft_med.nonlinear import Magnitudes, Transmission
from deft_med.pipeline import reconstruct
from deft_med.problem import bridged, pose, total_variation, with_known_noise
from deft_med.simulate import metal_trace, simulate
from deft_med.volume import Counts, Scan, Volume
from operators.geometry import Cartesian, Grid, ParallelBeam, ThickSlices, uniform_angles
from operators.slices import SliceInterpolation, SliceMean
from operators.testing import check_operator

N = 40
LINEAR = {"ct_missing_wedge": 0.5, "ct_metal_trace": 0.6, "ct_superresolution": 0.95}  # error left of that of the direct image


def small(name: str):
    return dataclasses.replace(protocol(name), grid=N)


def study(name: str, n: int = 2 * N, slices: int = 1) -> Scan:
    """A head of 19 cm, finer than the grid, or a brain, acquired by a shipped protocol."""
    if protocol(name).modality == "MR":
        return simulate(brain(slices, n), small(name), seed=1)
    fine = head(slices, n)
    return simulate(Volume(fine.data, np.diag([192 / n, 192 / n, 5.0, 1.0])), small(name), seed=1)


def prior(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser of smooth Gaussian images about -0.5, of deviation 0.5."""
    k = torch.fft.fftfreq(x.shape[-1], dtype=x.dtype)
    power = (1 + (2 * math.pi * 6 * torch.hypot(k[:, None], k)) ** 2) ** -2.5
    power = power / power.mean() * 0.25
    return torch.fft.ifft2(torch.fft.fft2(x + 0.5) * power / (power + sigma.square()[:, None, None, None])).real - 0.5


def error(problem, u: torch.Tensor, scan: Scan) -> float:
    return float(np.sqrt(np.mean((problem.picture(u)[0] - scan.reference.data[0]) ** 2)))


# ------------------------------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_task_from_the_image_to_a_better_one(name: str) -> None:
    scan = study(name)
    assert scan.modality == "CT" and scan.simulated and scan.protocol == name
    assert np.array_equal(scan.y, study(name).y)
    problem = pose(scan)
    likelihood = problem.likelihood
    assert isinstance(likelihood, Gaussian)
    assert likelihood.forward.operator.adjoint_error() < 1e-6 and likelihood.inverse.adjoint_error() < 1e-6
    truth = problem.image(scan.reference.data[0])
    assert 0.4 < float(likelihood.chi2(truth)[0]) < 1.3  # the allowance for what pixels of 4 mm cannot say is of real heads
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    found = sample_with("dds", prior, likelihood, generators=generators, steps=15).mean(0, keepdim=True)
    direct = likelihood.direct()
    assert error(problem, found, scan) < LINEAR[name] * error(problem, direct, scan)
    assert float(likelihood.chi2(found)) < float(likelihood.chi2(direct))


@pytest.mark.parametrize("name", LINEAR)
def test_chi2_is_one_for_an_image_on_the_grid(name: str) -> None:
    """The likelihood's own model and noise: chi2 of the truth, to the digit that M allows."""
    problem = pose(study(name))
    likelihood, truth = problem.likelihood, problem.image(study(name).reference.data[0])
    clean = likelihood.forward(truth)
    sigma = likelihood.sigma.nan_to_num(posinf=0)
    y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    again = Gaussian(likelihood.forward, y, likelihood.sigma, likelihood.inverse)
    assert float(again.chi2(truth)) == pytest.approx(1, abs=4 * math.sqrt(2 / int(again.count)))


def test_the_nonlinear_ones_are_posed_in_the_same_way() -> None:
    scan = study("ct_counts")
    problem = pose(scan)
    assert isinstance(problem.likelihood, Transmission) and problem.baselines == ("fbp",)
    assert (scan.counts.values >= scan.counts.ceiling).mean() > 0.1 and scan.counts.values.min() < 50
    assert float(problem.likelihood.chi2(problem.image(scan.reference.data[0]))[0]) == pytest.approx(1, abs=0.1)
    found = sample_with("red-diff", prior, problem.likelihood, generators=[torch.Generator().manual_seed(0)], steps=100, weight=4.0)
    assert error(problem, found, scan) < 0.6 * error(problem, problem.likelihood.direct(), scan)
    assert torch.equal(problem.classical["fbp"]()[0], problem.likelihood.direct())
    tv, _ = total_variation(problem.likelihood, problem.likelihood.direct(), 30.0)
    assert error(problem, tv, scan) < error(problem, problem.likelihood.direct(), scan)

    scan = study("phase_retrieval")
    problem = pose(scan)
    assert isinstance(problem.likelihood, Magnitudes) and problem.likelihood.shape == (2, N, N)
    found, _ = problem.classical["projections"]()
    assert error(problem, found, scan) < 0.1 * float(np.sqrt(np.mean(scan.reference.data**2)))
    assert 0.5 < float(torch.linalg.vector_norm(found, dim=1).quantile(0.99)) < 2  # the networks' unit, from the energy alone
    assert not scan.y.imag.any()


def test_tv_and_cross_checks_take_what_was_not_measured() -> None:
    scan = study("ct_metal_trace")
    result = reconstruct(scan, method="tv")
    assert result.metrics["tv"]["mean"]["psnr"] > result.metrics["fbp"]["mean"]["psnr"] + 1
    assert result.chi2["mean"] < 1.2 < result.chi2["fbp"]
    checked = cross_check(scan, None, ["fbp"])["methods"]["fbp"]
    assert all(math.isfinite(value) for value in checked.values())
    kept, held, _ = hold_out(study("ct_counts"))
    assert kept.counts.values.shape == kept.y.shape and held.counts.values.shape == held.y.shape
    with pytest.raises(ValueError, match="thick slices share no rows"):
        hold_out(study("ct_superresolution"))


@pytest.mark.parametrize("name", ["ct_metal_trace", "ct_counts", "ct_superresolution", "ct_missing_wedge", "ct_limited_angle"])
def test_deft_runs_on_them(name: str, model) -> None:  # noqa: F811
    scan = study(name, slices=2)
    result = reconstruct(scan, model, steps=3, samples=2)
    assert result.volume.data.shape == (2, N, N) and np.isfinite(result.volume.data).all()
    assert next(iter(result.beside)) == ("interpolation" if name == "ct_superresolution" else "fbp")
    assert math.isfinite(result.chi2["samples"])


# ------------------------------------------------------------------------------------------------------- missing wedge
def test_a_missing_wedge_is_a_limited_angle_turned() -> None:
    grid = Grid(shape=(N, N), spacing=(4.0, 4.0))
    beam = protocol("ct_missing_wedge").beam(grid)
    degrees = np.degrees(beam.angles)
    np.testing.assert_allclose(degrees, np.arange(120, 240, 3), atol=1e-6)  # 180 to 237 are the rays of 0 to 57
    wide = Protocol(name="x", views=60, noise=Noise(gaussian_percent=1.0))
    np.testing.assert_allclose(np.sort(degrees % 180), [d for d in np.degrees(wide.beam(grid).angles) if not 59.9 < d < 119.9], atol=1e-6)
    fan = Protocol(name="x", views=36, noise=Noise(gaussian_percent=1.0), coverage_deg=360, missing_deg=(0, 90), source_origin_mm=500,
                   origin_detector_mm=500)
    np.testing.assert_allclose(np.degrees(fan.beam(grid).angles), np.arange(90, 360, 10), atol=1e-6)


@pytest.mark.parametrize("change", [{"missing_deg": (60, 60)}, {"missing_deg": (-10, 20)}, {"missing_deg": (0, 180)},
                                    {"missing_deg": (0, 20), "coverage_deg": 120}])
def test_a_wedge_lies_within_a_turn(change: dict) -> None:
    with pytest.raises(UsageError, match="missing_deg wants two angles between 0 and coverage_deg, which is 180 then"):
        Protocol(**{"name": "x", "views": 60, "noise": Noise(gaussian_percent=1.0), **change})


# ------------------------------------------------------------------------------------------------------- metal trace
def test_a_metal_trace_is_the_shadow_of_a_disk() -> None:
    grid = Grid(shape=(N, N), spacing=(2.0, 2.0))
    beam = ParallelBeam(angles=uniform_angles(30), detectors=70, pitch=2.0)
    hu = torch.full((N, N), -1000.0)
    hu[30, 14] = 40.0  # room for one small disk, and for no other
    trace = metal_trace(hu, grid, beam, Metal(disks=1, diameter_mm=0.1), torch.Generator()).numpy()
    assert not trace.any()  # a disk must lie wholly inside
    hu[29:32, 13:16] = 40.0
    trace = metal_trace(hu, grid, beam, Metal(disks=3, diameter_mm=0.1), torch.Generator()).numpy()
    theta = np.array(beam.angles)
    at = grid.x[14] * np.cos(theta) + grid.y[30] * np.sin(theta)
    away = np.abs(beam.positions()[None] - at[:, None])
    assert trace[away < 1].all() and not trace[away > 3].any()  # half a bin, half a pixel's diagonal
    blank = metal_trace(torch.full((N, N), -1000.0), grid, beam, Metal(), torch.Generator())
    assert not blank.any()


def test_the_places_of_metal_hang_on_seed_and_slice() -> None:
    scan = study("ct_metal_trace", slices=2)
    lost = np.isinf(scan.noise)
    assert (lost[0] != lost[1]).any() and not scan.y[lost].any() and 0.01 < lost.mean() < 0.3
    other = simulate(head(2, N), small("ct_metal_trace"), seed=2)
    assert (np.isinf(other.noise)[0] != lost[0]).any()
    whole = simulate(head(2, N), dataclasses.replace(small("ct_metal_trace"), metal=None), seed=2)
    kept = ~np.isinf(other.noise)
    assert np.array_equal(whole.y[kept], other.y[kept]) and np.array_equal(whole.noise[kept], other.noise[kept])


def test_lost_rays_are_bridged_along_the_detector() -> None:
    y = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 4.0, 0.0], [0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])
    noise = torch.ones_like(y)
    noise[0, 0, [0, 2, 3, 5]], noise[0, 1] = torch.inf, torch.inf
    expected = torch.tensor([[[1.0, 1.0, 2.0, 3.0, 4.0, 4.0], [0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])
    assert torch.equal(bridged(y, noise), expected)
    assert bridged(y, torch.ones(1, 1, 1)) is y


# ------------------------------------------------------------------------------------------------------- thick slices
@pytest.mark.parametrize("fwhm", [None, 2.5])
def test_thick_slices_keep_the_contract(fwhm: float | None) -> None:
    thick = ThickSlices(rows=14, columns=9, factor=4, fwhm=fwhm)
    assert thick.shape == (4, 9) and eval(repr(thick)) == thick
    mean, between = SliceMean(thick), SliceInterpolation(thick)
    check_operator(mean)
    check_operator(between)
    flat = torch.full((14, 9), 7.0)
    torch.testing.assert_close(mean(flat), torch.full((4, 9), 7.0))
    torch.testing.assert_close(between(mean(flat)), flat)
    ramp = torch.arange(14.0)[:, None].expand(14, 9)
    if fwhm is None:
        torch.testing.assert_close(mean(ramp)[:, 0], torch.tensor([1.5, 5.5, 9.5, 12.5]))  # the last slice has two rows
        torch.testing.assert_close(between(mean(ramp))[2:12], ramp[2:12])


def test_thick_slices_need_rows() -> None:
    with pytest.raises(ValueError, match=r"ThickSlices.factor must be at most the 3 rows, got 4"):
        ThickSlices(rows=3, columns=3, factor=4)
    with pytest.raises(ValueError, match="ThickSlices.fwhm must be positive"):
        ThickSlices(rows=3, columns=3, factor=1, fwhm=0)
    with pytest.raises(UsageError, match="an image of 8 rows has no slice of 9: give more rows"):
        SliceProtocol(name="x", factor=9, noise_hu=10).acquisition((8, 8))
    with pytest.raises(UsageError, match="wants factor >= 1, noise_hu > 0"):
        SliceProtocol(name="x", factor=4, noise_hu=0)


def test_a_slice_profile_is_noticed() -> None:
    plain, wide = (dataclasses.replace(small("ct_superresolution"), fwhm=fwhm) for fwhm in (None, 8.0))
    first, second = (simulate(head(1, N), p, seed=1).y for p in (plain, wide))
    assert first.shape == second.shape == (1, N // 4, N) and np.abs(first - second).max() > 50


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_reformatted_voxels_stay_where_they_are(plane: str) -> None:
    turned = np.array([[0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 4, 1], [0, 0, 0, 1]])
    volume = Volume(np.arange(2 * 3 * 4).reshape(2, 3, 4), turned)
    other = volume.reformat(plane)
    for (s, r, c), value in np.ndenumerate(volume.data):
        index = (r, s, c) if plane == "coronal" else (c, s, r)
        assert other.data[index] == value
        np.testing.assert_allclose(other.affine @ [index[2], index[1], index[0], 1], volume.affine @ [c, r, s, 1])
    with pytest.raises(ValueError, match="reformat needs 'coronal' or 'sagittal', got 'axial'"):
        volume.reformat("axial")


# ------------------------------------------------------------------------------------------------------- files and scans
def test_protocols_are_read_by_what_they_hold(tmp_path: Path) -> None:
    kinds = {"ct_missing_wedge": Protocol, "ct_metal_trace": Protocol, "ct_counts": Protocol, "ct_superresolution": SliceProtocol,
             "phase_retrieval": KSpaceProtocol}
    for name, kind in kinds.items():
        assert type(protocol(name)) is kind and protocol(name).description
    (tmp_path / "thick.yaml").write_text("factor: 3\nnoise_hu: 5\nviews: 60\n")
    with pytest.raises(UsageError, match="unknown key views"):
        protocol(tmp_path / "thick.yaml")


def test_protocols_refuse() -> None:
    with pytest.raises(UsageError, match="noise counts want photons, and a ceiling in counts wants counts: true"):
        Noise(gaussian_percent=3.5, counts=True)
    with pytest.raises(UsageError, match="a ceiling in counts wants counts: true"):
        Noise(photons=1e4, ceiling=1e3)
    with pytest.raises(UsageError, match="metal wants disks >= 1 and diameter_mm > 0, got 0"):
        Metal(disks=0)
    with pytest.raises(UsageError, match="phases cannot be found from one code: wants coils >= 2"):
        KSpaceProtocol(name="x", pattern="equispaced", acceleration=1, coils=1, phaseless=True)


BEAM, GRID = ParallelBeam(angles=uniform_angles(5), detectors=7, pitch=1.0), Grid(shape=(4, 6), spacing=(1.0, 1.0))
FULL = Cartesian.of(np.ones((4, 6), bool))
K, CODES = np.ones((1, 2, 4, 6), np.complex64), np.ones((1, 2, 4, 6), np.complex64)
LOST = np.where(np.arange(7) == 3, np.inf, 1.0)


def test_scans_say_what_they_are() -> None:
    y = np.zeros((5, 7))
    assert np.isinf(Scan(y, BEAM, GRID, LOST).noise[3])
    scan = Scan(y, BEAM, GRID, counts=Counts(np.ones((5, 7)), 10.0))
    assert scan.counts.values.shape == (1, 5, 7) and scan.counts.part((slice(None), slice(2))).values.shape == (1, 2, 7)
    assert Scan(np.zeros((2, 6)), ThickSlices(rows=4, columns=6, factor=2), GRID, 5.0).modality == "CT"
    assert Scan(K, FULL, GRID, 0.1, maps=CODES, phaseless=True).modality == "MR"


@pytest.mark.parametrize(("fields", "words"), [
    (dict(y=np.ones((5, 7)), noise=LOST), "y must be exactly 0 there"),
    (dict(noise=np.inf), "some rays of every slice must be measured"),
    (dict(noise=-np.inf), "Scan.noise must be finite"),
    (dict(y=K, acquisition=FULL, noise=np.inf), "Scan.noise must be finite"),
    (dict(counts=Counts(np.ones((5, 6)), 10.0)), "Scan.counts belong to rays and must be shaped like y"),
    (dict(y=K, acquisition=FULL, counts=Counts(np.ones(3), 10.0)), "Scan.counts are of CT"),
    (dict(phaseless=True), "Scan.phaseless are of MR"),
    (dict(y=1j * K, acquisition=FULL, maps=CODES, phaseless=True), "imaginary part exactly 0"),
    (dict(y=K, acquisition=FULL, phaseless=True), "must bring its codes as Scan.maps"),
    (dict(y=np.zeros((3, 6)), acquisition=ThickSlices(rows=4, columns=6, factor=2)), r"\[image, slice, column\] with \(slices, columns\)"),
    (dict(y=np.zeros((4, 6)), acquisition=ThickSlices(rows=8, columns=6, factor=2)), "Scan.grid must have the rows and columns"),
])
def test_scans_refuse(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scan(**{"y": np.zeros((5, 7)), "acquisition": BEAM, "grid": GRID, **fields})


@pytest.mark.parametrize(("fields", "words"), [(dict(photons=0.0), "Counts wants photons > 0"), (dict(ceiling=0.5), "must not exceed"),
                                               (dict(values=np.nan), "Counts.values must be finite")])
def test_counts_refuse(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Counts(**{"values": np.ones((5, 7)), "photons": 10.0, **fields})


def test_noise_that_the_data_do_not_tell() -> None:
    for scan in (Scan(np.zeros((2, 6)), ThickSlices(rows=4, columns=6, factor=2), GRID),
                 Scan(K, FULL, GRID, maps=CODES, phaseless=True)):
        with pytest.raises(UnsupportedError, match="cannot be told from the data: give the scan its noise"):
            with_known_noise(scan)
