"""The problem of a slice: what a scan knows, what is estimated from it, and classical answers, for CT and MR alike."""

import dataclasses

import numpy as np
import pytest
import torch

from deft_med.config import KSpaceProtocol, Noise, Protocol, protocol
from deft_med.crosscheck import cross_check, hold_out
from deft_med.errors import UnsupportedError, UsageError
from deft_med.guidance import dds
from deft_med.htransform import Deft, HTransform
from deft_med.network import UNet
from deft_med.pipeline import reconstruct
from deft_med.prior import Prior
from deft_med.problem import pose, with_known_noise
from deft_med.simulate import coil_maps, simulate, slice_generator, smooth_phase
from deft_med.volume import Scan, Volume
from operators.geometry import Cartesian
from operators.mri import Fourier


def brain(slices: int = 1, n: int = 64) -> Volume:
    y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 2, indexing="ij")
    skull = ((x / 0.8) ** 2 + (y / 0.9) ** 2 < 1) * 1.0 - ((x / 0.72) ** 2 + (y / 0.82) ** 2 < 1) * 0.6
    image = skull + ((x - 0.2) ** 2 + (y + 0.2) ** 2 < 0.04) * 0.3 + ((x + 0.3) ** 2 + y**2 < 0.02) * 0.25
    return Volume(np.stack([350 * image] * slices), np.diag([3.0, 3.0, 5.0, 1.0]), "a.u.")


def study(pattern: str = "equispaced", acceleration: float = 3, **more) -> Scan:
    more = {"coils": 4, "noise_percent": 2.0, "grid": 64} | more
    return simulate(brain(), KSpaceProtocol(name="small", pattern=pattern, acceleration=acceleration, **more), seed=1)


def test_a_study_of_an_image_is_k_space_through_coils() -> None:
    scan = study()
    assert scan.modality == "MR"
    assert scan.y.shape == (1, 4, 64, 64)
    assert scan.simulated
    assert scan.maps is None
    mask = scan.acquisition.mask
    assert not scan.y[..., ~mask].any()
    assert np.array_equal(scan.y, study().y)


@pytest.mark.parametrize("pattern", ["equispaced", "poisson", "random"])
def test_the_noise_is_found_in_k_space(pattern: str) -> None:
    scan = study(pattern, noise_percent=4.0)
    found = with_known_noise(dataclasses.replace(scan, noise=None))
    ratio = float(found.noise.ravel()[0]) / float(scan.noise.ravel()[0])
    assert 0.7 < ratio < (1.8 if pattern == "equispaced" else 1.3)  # a small centre tells an upper bound


@pytest.mark.parametrize("pattern", ["equispaced", "poisson"])
def test_classical_methods_answer_in_the_unit_of_the_source(pattern: str) -> None:
    scan = study(pattern)
    problem = pose(scan)
    truth = scan.reference.data[0]
    errors = {}
    for name, method in problem.classical.items():
        with torch.no_grad():
            u, _ = method()
        picture = problem.picture(u)[0]
        errors[name] = float(np.sqrt(np.mean((picture - truth) ** 2)) / np.sqrt(np.mean(truth**2)))
    assert errors["zero-filled"] < 0.6
    assert errors["cg-sense"] < errors["zero-filled"]
    assert errors["wavelet"] < errors["zero-filled"]
    assert errors["tv"] < 0.15


def test_the_phase_is_that_of_the_image_by_the_maps_and_images_are_nearly_real() -> None:
    generator = torch.Generator().manual_seed(3)
    magnitude = torch.from_numpy(brain().data[0])
    truth = torch.polar(magnitude, smooth_phase(1, (64, 64), generator)[0])
    maps = coil_maps(1, 4, (64, 64), generator)
    y = Fourier((64, 64))(maps * truth).numpy()
    scan = Scan(y=y, acquisition=Cartesian.of(np.ones((64, 64), bool)), grid=study().grid, noise=np.float32(0.1).reshape(1, 1, 1, 1),
                maps=maps.numpy())
    problem = pose(scan)
    with torch.no_grad():
        u, _ = problem.classical["cg-sense"]()
    body = magnitude.numpy() > 100
    assert problem.phase is not None
    apart = np.angle(np.exp(1j * (problem.phase(u)[0] - truth.angle().numpy())))[body]
    assert np.abs(apart).max() < 0.02
    assert float(u[:, 1].norm() / u[:, 0].norm()) < 0.3
    result = reconstruct(study(), method="cg-sense")
    assert result.phase is not None and result.phase.unit == "rad" and np.abs(result.phase.data).max() <= np.float32(np.pi)


def test_reconstruct_serves_both_modalities_with_the_same_words() -> None:
    result = reconstruct(study(), method="cg-sense")
    assert list(result.beside) == ["zero-filled"]
    assert result.volume.unit == "a.u."
    assert {"zero-filled", "mean", "expected", "deviation", "measurements"} == set(result.chi2)
    assert result.metrics["cg-sense"]["mean"]["psnr"] > result.metrics["zero-filled"]["mean"]["psnr"]
    with pytest.raises(UsageError, match="unknown method 'fbp' for MR: choose one of deft, deft-online, zero-filled"):
        reconstruct(study(), method="fbp")


def test_held_out_measurements_are_measurements_and_the_centre_stays() -> None:
    for scan in (study(), study("poisson")):
        kept, held, unit = hold_out(scan)
        assert np.array_equal(kept.y + held.y, scan.y)
        assert not (kept.acquisition.mask & held.acquisition.mask).any()
        assert 0 < held.acquisition.samples <= 0.12 * scan.acquisition.samples
        assert kept.acquisition.mask[31:33, 31:33].all()
        assert np.array_equal(unit >= 0, held.acquisition.mask)
    assert hold_out(study())[2].max() + 1 == 1 and hold_out(study("poisson"))[2].max() + 1 > 20


def test_a_trajectory_is_held_out_in_runs_of_a_spoke() -> None:
    pytest.importorskip("finufft")
    kept, held, unit = hold_out(study("radial"), share=0.2)
    assert unit.shape == (held.acquisition.samples,) and set(unit) == set(range(unit.max() + 1))
    for k in range(unit.max() + 1):
        angle = np.arctan2(*held.acquisition.points[unit == k].T) % np.pi
        assert 1 < (unit == k).sum() <= 16 and np.ptp(np.exp(2j * angle).real) < 1e-4


def test_ct_is_held_out_view_by_view() -> None:
    y, x = np.meshgrid(*[np.linspace(-1, 1, 48)] * 2, indexing="ij")
    volume = Volume(np.where(x**2 + y**2 < 0.6, 40.0, -1000.0)[None], np.diag([4.0, 4.0, 5.0, 1.0]))
    scan = simulate(volume, Protocol(name="few", views=40, noise=Noise(gaussian_percent=2.0), grid=48))
    kept, held, _ = hold_out(scan)
    assert (len(kept.acquisition.angles), len(held.acquisition.angles)) == (38, 2)
    checked = cross_check(scan, None, ["fbp", "tv"])
    assert checked["units"] == 2 and checked["methods"]["tv"]["sigmas"] == pytest.approx(1, abs=0.35)
    assert checked["methods"]["tv"]["error"] < checked["methods"]["fbp"]["error"]
    assert checked["methods"]["tv"]["behind"] == 0
    assert checked["methods"]["fbp"]["behind"] > 0 and checked["methods"]["fbp"]["behind_se"] is None  # of two views
    many = cross_check(scan, None, ["fbp", "tv"], share=0.25)["methods"]["fbp"]
    assert many["behind"] > 3 * many["behind_se"] > 0


def test_the_cross_check_ranks_methods_without_a_reference() -> None:
    checked = cross_check(study("poisson"), None, ["zero-filled", "cg-sense", "tv"])
    errors = {name: found["error"] for name, found in checked["methods"].items()}
    assert errors["tv"] < errors["zero-filled"]
    assert checked["methods"]["tv"]["sigmas"] > 0.8
    zero = checked["methods"]["zero-filled"]
    assert zero["behind"] == errors["zero-filled"] - min(errors.values()) and 0 < zero["behind_se"] < zero["behind"]


@pytest.mark.parametrize(("pattern", "share"), [("poisson", 0.03), ("random", 0.5)])
def test_the_standard_error_of_a_difference_is_that_of_the_units(pattern: str, share: float) -> None:
    """Many draws of what is held out, points or lines: the difference between two methods spreads as one of them says."""
    scan, found = study(pattern, acceleration=2), []
    for seed in range(14):
        checked = cross_check(scan, None, ["zero-filled", "cg-sense"], seed=seed, share=share)
        zero, sense = (checked["methods"][name] for name in ("zero-filled", "cg-sense"))
        assert checked["units"] >= 8 and min(zero["behind"], sense["behind"]) == 0
        found.append((zero["error"] - sense["error"], max(zero["behind_se"], sense["behind_se"])))
    differences, errors = np.array(found).T
    assert 0.5 < np.std(differences) / np.mean(errors) < 2, (np.std(differences), np.mean(errors))


def test_protocols_tell_their_modality() -> None:
    assert protocol("ct_sparse60").modality == "CT"
    found = protocol("mri_cartesian_4x")
    assert found.modality == "MR"
    acquisition = found.acquisition((128, 96), torch.Generator().manual_seed(0))
    assert isinstance(acquisition, Cartesian)
    assert acquisition.acceleration == pytest.approx(4, rel=0.1)
    with pytest.raises(UsageError, match="pattern is one of equispaced"):
        KSpaceProtocol(name="x", pattern="star", acceleration=4)
    with pytest.raises(UsageError, match="wants acceleration >= 1"):
        KSpaceProtocol(name="x", pattern="radial", acceleration=0.5)


def test_water_is_zero_hu_at_the_energy_of_the_beam() -> None:
    y, x = np.meshgrid(*[np.linspace(-1, 1, 48)] * 2, indexing="ij")
    volume = Volume(np.where(x**2 + y**2 < 0.6, 0.0, -1000.0)[None], np.diag([4.0, 4.0, 5.0, 1.0]))
    scan = simulate(volume, Protocol(name="many", views=90, noise=Noise(gaussian_percent=0.01), grid=48))
    harder = dataclasses.replace(scan, y=scan.y * 0.0206 / 0.0192, mu_water=0.0206)
    water, same = (float(reconstruct(s, method="fbp").volume.data[0, 16:32, 16:32].mean()) for s in (scan, harder))
    assert water == pytest.approx(0, abs=15)
    assert same == pytest.approx(water, abs=1)


def test_a_radial_scan_calibrates_itself() -> None:
    pytest.importorskip("finufft")
    scan = study("radial", acceleration=2, noise_percent=3.0)
    unknown = dataclasses.replace(scan, noise=None)
    found = with_known_noise(unknown)
    assert float(found.noise.ravel()[0]) == pytest.approx(float(scan.noise.ravel()[0]), rel=0.3)
    assert found.noise_is.startswith("estimated from the data")
    problem = pose(scan)
    with torch.no_grad():
        u, _ = problem.classical["cg-sense"]()
    assert float(problem.likelihood.chi2(u)[0]) < 1.5
    kept, held, _ = hold_out(scan)
    assert kept.acquisition.samples + held.acquisition.samples == scan.acquisition.samples
    assert reconstruct(scan, method="tv").metrics["tv"]["mean"]["psnr"] > 20


def test_one_coil_tells_only_an_upper_bound() -> None:
    scan = dataclasses.replace(study(coils=1, acceleration=5), noise=None)
    assert any("upper bound" in line for line in reconstruct(scan, method="zero-filled").warnings)


def test_few_calibration_lines_still_make_maps() -> None:
    few = KSpaceProtocol(name="few", pattern="equispaced", acceleration=3, coils=6, noise_percent=0.5, grid=96)
    scan = simulate(brain(n=96), few, seed=1)
    problem = pose(scan)
    with torch.no_grad():
        u, _ = problem.classical["cg-sense"]()
    assert float(problem.likelihood.chi2(u)[0]) < 2


def test_noise_where_nothing_was_measured_means_nothing() -> None:
    scan = study()
    noise = np.broadcast_to(scan.noise, scan.y.shape).copy()
    noise[..., ~scan.acquisition.mask] = 1e6
    told, plain = (pose(s).likelihood.s_img.item() for s in (dataclasses.replace(scan, noise=noise), scan))
    assert told == pytest.approx(plain, rel=1e-3)


def test_full_sampling_can_be_held_out_too() -> None:
    scan = study(acceleration=1)
    kept, held, _ = hold_out(scan)
    assert 0 < held.acquisition.samples < kept.acquisition.samples
    assert kept.acquisition.mask[20:40, 20:40].all()


@pytest.mark.parametrize(("coils", "pattern"), [(1, "equispaced"), (8, "equispaced"), (8, "radial")])
def test_an_empty_slice_does_not_end_the_run(coils: int, pattern: str) -> None:
    if pattern == "radial":
        pytest.importorskip("finufft")
    volume = brain(3)
    data = volume.data.copy()
    data[1] = 0
    few = KSpaceProtocol(name="few", pattern=pattern, acceleration=2, coils=coils, grid=64)
    scan = simulate(Volume(data, volume.affine, "a.u."), few, seed=1)
    result = reconstruct(scan, method="cg-sense")
    assert result.metrics["cg-sense"]["psnr"][0] > 15
    assert float(result.volume.data[1].max()) < 0.05 * float(result.volume.data[0].max())
    dark = dataclasses.replace(scan, y=scan.y * np.array([1, 0, 1])[:, None, None, None] if pattern != "radial" else scan.y)
    assert np.isfinite(reconstruct(dark, method="zero-filled").volume.data).all()


def test_maps_of_any_scale_give_one_image() -> None:
    scan = study()
    maps = coil_maps(1, 4, (64, 64), slice_generator(1, 0, purpose="coils")).numpy()
    once, thrice = (reconstruct(dataclasses.replace(scan, maps=factor * maps), method="cg-sense").volume.data for factor in (1, 3))
    np.testing.assert_allclose(thrice, once, rtol=1e-3, atol=1e-3 * once.max())


def test_where_no_coil_sees_classical_methods_leave_the_image_at_zero() -> None:
    scan = study()
    maps = coil_maps(1, 4, (64, 64), torch.Generator().manual_seed(3))[0].clone()
    maps[:, :, :10] = 0
    problem = pose(dataclasses.replace(scan, maps=maps[None].numpy()))
    for name in ("wavelet", "tv", "cg-sense"):
        with torch.no_grad():
            u, _ = problem.classical[name]()
        assert not u[..., :10].any(), name
        assert u[..., 10:].any(), name


def test_an_empty_slice_stays_empty_and_has_the_noise_of_the_others() -> None:
    whole = study("poisson", noise_percent=4.0)
    scan = dataclasses.replace(whole, y=np.concatenate([0 * whole.y, whole.y]), noise=None, reference=None)
    known = with_known_noise(scan)
    assert known.noise[0] == known.noise[1] > 0
    torch.manual_seed(0)
    prior, h = Prior(UNet(2, 2, (8, 8), dim=16)), HTransform(UNet(6, 2, (8, 8), scalars=3, dim=16), form="wiener")
    torch.nn.init.normal_(h.network.outlet.weight, std=0.1)
    likelihood = pose(known).likelihood
    for sigma in (80.0, 0.1):
        x = torch.randn(1, 2, 64, 64) * sigma
        assert not dds(Deft(prior, h).given(likelihood), likelihood, sd=0.2)(x, torch.tensor([sigma])).any()
    for method in pose(known).classical.values():
        assert not method()[0].any()
    with pytest.raises(UnsupportedError, match="nothing but zeros"):
        with_known_noise(dataclasses.replace(scan, y=0 * scan.y))


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_a_file_is_nothing_to_any_method(unit: float) -> None:
    """Files hold k-space of 1e-6 as well as of 1e6, whose squares float32 has not."""
    scan = study()
    other = dataclasses.replace(scan, y=scan.y * np.float32(unit), noise=scan.noise * np.float32(unit))
    for name in pose(scan).classical:
        one, two = (pose(each).picture(pose(each).classical[name]()[0])[0] for each in (scan, other))
        np.testing.assert_allclose(two / unit, one, atol=2e-3 * one.max(), err_msg=name)
    level = [float(with_known_noise(dataclasses.replace(each, noise=None)).noise.ravel()[0]) for each in (scan, other)]
    assert level[1] / unit == pytest.approx(level[0], rel=1e-4)
