"""The walk of one scan, with a small untrained model: seeds, batches, estimates, what it needs and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_bundle import CARD

from deft_med import pipeline
from deft_med.bundle import Model, networks
from deft_med.card import Calibration, parse
from deft_med.config import Noise, Protocol
from deft_med.errors import UsageError
from deft_med.htransform import Deft
from deft_med.metrics import body_mask, reach
from deft_med.pipeline import reconstruct
from deft_med.simulate import reconstruction_grid, simulate
from deft_med.volume import Scan, Volume
from operators.ct import attenuation


@pytest.fixture(scope="module")
def model() -> Model:
    card = parse({**CARD, "licence": "CC-BY-4.0", "deft_med": "0", "sha256": {f"{n}.safetensors": "0" * 64 for n in ("prior", "h")}})
    torch.manual_seed(0)
    prior, h = networks(card)
    for module in (prior, h):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.03)
    return Model(card, Deft(prior, h).requires_grad_(False).eval())


def head(slices: int = 5, n: int = 48) -> Volume:
    z, y, x = np.meshgrid(np.linspace(-0.5, 0.5, slices), *[np.linspace(-1, 1, n)] * 2, indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.9) ** 2 < 1
    hole = (x - 0.3) ** 2 + (y + 0.2) ** 2 < 0.1 * (1 + z)
    return Volume(np.where(hole, 300.0, np.where(inside, 40.0, -1024.0)), np.diag([4.0, 4.0, 5.0, 1.0]), "HU")


PROTOCOL = Protocol(name="small", views=30, noise=Noise(gaussian_percent=3.5), grid=48)


def part(scan: Scan, k: slice) -> Scan:
    return Scan(scan.y[k], scan.acquisition, scan.grid, scan.noise[k], affine=scan.affine, simulated=True)


def test_a_slice_does_not_depend_on_its_batch(model: Model) -> None:
    scan = simulate(head(), PROTOCOL)
    five = reconstruct(scan, model, steps=4, samples=2)
    one = reconstruct(part(scan, slice(0, 1)), model, steps=4, samples=2)
    assert np.array_equal(five.volume.data[:1], one.volume.data)
    assert np.array_equal(five.std.data[:1], one.std.data)
    again = reconstruct(scan, model, steps=4, samples=2)
    assert np.array_equal(five.volume.data, again.volume.data)
    other = reconstruct(scan, model, steps=4, samples=2, seed=1)
    assert not np.array_equal(five.volume.data, other.volume.data)


def test_the_measurements_of_a_slice_do_not_depend_on_its_stack() -> None:
    stack, first = head(), head()
    first = Volume(first.data[:1], first.affine, "HU")
    assert np.array_equal(simulate(stack, PROTOCOL, seed=3).y[:1], simulate(first, PROTOCOL, seed=3).y)


def test_the_estimates(model: Model) -> None:
    scan = simulate(head(1), PROTOCOL)
    done = []
    average = reconstruct(scan, model, estimate="average", steps=4, samples=3, progress=lambda k, n: done.append((k, n)))
    assert done == [(k, 10) for k in range(1, 11)]  # one shared evaluation, then three times three
    assert average.samples == 3 and average.std is not None and set(average.chi2) >= {"mean", "samples", "fbp", "reference"}
    sample = reconstruct(scan, model, estimate="sample", steps=4, samples=3)
    assert sample.samples == 1 and sample.std is None
    point = reconstruct(scan, model, estimate="point", steps=4)
    assert point.samples == 2 and point.std is None and point.interval is None and "quality" in point.trust
    assert not np.array_equal(point.volume.data, reconstruct(scan, model, steps=4, samples=2).volume.data)
    mean = reconstruct(scan, model, estimate="mean")
    assert "samples" not in mean.chi2
    assert average.metrics["deft"]["psnr"][0] != average.metrics["fbp"]["psnr"][0]


def test_samples_are_those_of_one_by_one_however_many_go_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = simulate(head(1), PROTOCOL)
    done: dict[int, list[int]] = {}
    found = {}
    for together in (1, 2, 8):
        monkeypatch.setattr(pipeline, "TOGETHER", together)
        done[together] = []
        found[together] = reconstruct(scan, model, steps=4, samples=3, progress=lambda k, n, t=together: done[t].append(k))
    for together in (2, 8):  # up to the rounding of half precision
        assert np.abs(found[together].volume.data - found[1].volume.data).max() < 0.02 * np.abs(found[1].volume.data).max()
        assert np.allclose(found[together].std.data, found[1].std.data, rtol=0.1, atol=0.02 * found[1].std.data.max())
        assert done[together] == done[1] == list(range(1, 11))


def calibrated(model: Model, limit: float, protocol: str = "small", factor: float = 1.5) -> Model:
    one = Calibration(factor=factor, coverage_raw=0.7, coverage=0.9, chi2_99=limit, samples=8, subjects=3, slices=9, command="c")
    return dataclasses.replace(model, card=dataclasses.replace(model.card, calibration={protocol: one}))


def test_an_interval_is_the_spread_times_a_factor_that_the_card_may_know(model: Model) -> None:
    scan = simulate(head(1), PROTOCOL)
    plain, known, other = (reconstruct(scan, m, steps=3, samples=3)
                           for m in (model, calibrated(model, 1e9), calibrated(model, 1e9, "all", 2.0)))
    assert np.allclose(plain.interval.data, reach(3) * plain.std.data)
    assert np.allclose(known.interval.data, 1.5 * plain.interval.data) and np.allclose(other.interval.data, 2 * plain.interval.data)
    assert [r.trust["interval"]["calibrated_on"] for r in (plain, known, other)] == [None, "small", "all"]
    made = known.trust["interval"]
    half = made["half_width_in_std"] * known.std.data
    held = np.abs(scan.reference.data - known.volume.data) <= half
    assert made["coverage"] == pytest.approx(held[body_mask(scan.reference.data)].mean(), abs=1e-3)
    assert reconstruct(scan, model, estimate="mean").interval is None
    json.dumps([r.trust for r in (plain, known, other)], allow_nan=False)


def test_chi2_is_judged_by_the_card_or_by_two(model: Model) -> None:
    scan = simulate(head(2), PROTOCOL)
    first = reconstruct(scan, model, steps=3, samples=2)
    measurements = 2 * 30 * scan.y.shape[-1]
    assert first.chi2["measurements"] == measurements and first.chi2["deviation"] == pytest.approx((2 / measurements) ** 0.5)
    assert abs(first.chi2["reference"] - 1) < 5 * first.chi2["deviation"] + 0.1
    found = first.trust["quality"]
    assert found["chi2"] == pytest.approx([first.chi2["samples"]] * 2, rel=0.5) and found["limit"] == 2
    assert first.failed is (max(found["chi2"]) > 2)
    strict, lax = (reconstruct(scan, calibrated(model, limit), steps=3, samples=2) for limit in (0.01, 1e9))
    assert strict.failed and strict.trust["quality"]["above"] == [1, 2] and "slices 1, 2 (2 of 2), above 1.07" in strict.warnings[-1]
    assert not lax.failed and lax.trust["quality"]["check"] == "passed"
    every = reconstruct(scan, calibrated(model, 0.01, "all"), steps=3, samples=2)
    assert every.trust["quality"]["limit"] == 2, "what all protocols have is no limit"
    assert [reconstruct(scan, method=method).quality for method in ("fbp", "tv")] == ["not checked", "passed"]
    assert reconstruct(dataclasses.replace(scan, noise=scan.noise / 4), model, method="tv").failed, "said to be far more exact"


def test_the_seconds_of_the_method_have_parts(model: Model) -> None:
    result = reconstruct(simulate(head(1), PROTOCOL), model, steps=3, samples=2)
    assert set(result.profile) == {"prior", "h", "operators", "rest"} and min(result.profile.values()) > 0
    assert sum(result.profile.values()) == pytest.approx(result.timing["deft"])
    assert not model.deft.prior._forward_hooks and not model.deft.h._forward_pre_hooks
    assert reconstruct(simulate(head(1), PROTOCOL), method="fbp").profile == {}


def test_one_step_is_the_mean(model: Model) -> None:
    one = reconstruct(simulate(head(1), PROTOCOL), model, steps=1, samples=3)
    assert one.estimate == "mean" and one.std is None and one.samples == 1


def test_what_the_prior_changed_is_a_number(model: Model) -> None:
    scan = simulate(head(1), PROTOCOL)
    result = reconstruct(scan, model, estimate="mean")
    difference = (result.volume.data - result.beside["fbp"].data)[body_mask(scan.reference.data)]
    found = result.trust["prior"]
    assert found == {"rms": pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-4), "unit": "HU", "region": "body", "against": "fbp"}


def test_classical_methods_need_no_model() -> None:
    scan = simulate(head(2), PROTOCOL)
    fbp, tv = reconstruct(scan, method="fbp"), reconstruct(scan, method="tv")
    assert tv.metrics["tv"]["mean"]["psnr"] > fbp.metrics["fbp"]["mean"]["psnr"] + 3
    assert tv.chi2["reference"] == pytest.approx(1, abs=0.15)
    inside = (slice(None), slice(20, 24), slice(12, 18))
    assert tv.volume.data[inside].mean() == pytest.approx(40, abs=15)


def test_what_contradicts_the_measurements_is_said() -> None:
    made = simulate(head(1), PROTOCOL)
    found = [reconstruct(dataclasses.replace(made, noise=factor * made.noise), method="fbp").warnings for factor in (0.2, 3)]
    assert "contradicts the measurements" in found[0][0] and not found[1]


def test_a_scan_out_of_plain_numpy_and_noise_from_the_data(model: Model) -> None:
    """The researcher's door: no affine, no noise, no reference."""
    made = simulate(head(1), PROTOCOL)
    scan = Scan(y=made.y[0], acquisition=made.acquisition, grid=made.grid)
    result = reconstruct(scan, method="fbp")
    assert not result.simulated and result.reference is None and result.metrics == {} and result.provenance["noise"].startswith("estimated")
    known = reconstruct(part(made, slice(0, 1)), method="fbp")
    assert np.allclose(result.volume.data, known.volume.data)
    assert result.chi2["mean"] == pytest.approx(known.chi2["mean"], rel=0.4)


@pytest.mark.parametrize(("settings", "word"), [
    ({"method": "magic"}, "unknown method"), ({"estimate": "mode"}, "unknown estimate"), ({"method": "deft"}, "wants a model"),
    ({"method": "fbp", "steps": 0}, "at least 1"), ({"method": "fbp", "device": "toaster"}, "unknown device"),
])
def test_usage(settings: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        reconstruct(simulate(head(1, 16), Protocol(name="p", views=4, noise=Noise(photons=1e4), grid=16)), **settings)


def test_the_grid_is_never_finer_than_the_source_and_keeps_the_field_of_view() -> None:
    for rows, columns, expected in ((512, 512, (256, 256)), (200, 180, (200, 180)), (512, 400, (256, 200)), (300, 300, (256, 256))):
        volume = Volume(np.zeros((1, rows, columns)), np.diag([0.7, 0.7, 1, 1]), "HU")
        assert reconstruction_grid(volume, 256) == expected
    scan = simulate(Volume(np.random.default_rng(0).normal(0, 50, (1, 60, 40)), np.diag([1.0, 1.0, 2.0, 1.0]), "HU"),
                    Protocol(name="p", views=5, noise=Noise(photons=1e5), grid=30))
    assert scan.grid.shape == (30, 20) and scan.grid.spacing == (2.0, 2.0)
    assert scan.affine[:3, 3] == pytest.approx([0.5, 0.5, 0])
    assert scan.reference.data.mean() == pytest.approx(0, abs=5)


def test_simulated_measurements_agree_with_the_solver_up_to_noise() -> None:
    """Another grid and another ray model, but the same physics: no shift, no scale between them."""
    volume = head(1, 96)
    quiet = Protocol(name="p", views=40, noise=Noise(gaussian_percent=1e-4), grid=48)
    scan = simulate(volume, quiet)
    from operators.ct import RayTransform

    solver = RayTransform(scan.grid, scan.acquisition)
    lines = solver(attenuation(torch.from_numpy(scan.reference.data)))[0].numpy()
    assert np.abs(lines - scan.y[0]).mean() < 0.01 * scan.y.mean()
    assert abs(lines.mean() / scan.y.mean() - 1) < 1e-3


def test_what_is_shown_beside_a_result_is_a_choice(model: Model) -> None:
    scan = simulate(head(1), PROTOCOL)
    assert list(reconstruct(scan, model, steps=2, samples=2, beside=["tv"]).beside) == ["fbp", "tv"]
    assert list(reconstruct(scan, model, steps=2, samples=2).beside) == ["fbp"]
    with pytest.raises(UsageError, match="no classical method 'wavelet' for CT: choose of fbp, tv"):
        reconstruct(scan, model, beside=["wavelet"])


def test_a_slice_is_the_same_alone_as_among_others(model: Model) -> None:
    """Its number in the series is what its noise is drawn by, and what warnings call it."""
    volume = head(3)
    volume = volume.with_data(volume.data * np.array([1.0, 0.9, 0.8], np.float32)[:, None, None])
    whole, part = simulate(volume, PROTOCOL), simulate(volume.part(1, 3), PROTOCOL)
    assert np.array_equal(part.y, whole.y[1:]) and part.first == 1 and np.array_equal(whole.part(1, 3).y, part.y)
    assert np.allclose(part.affine, whole.part(1, 3).affine) and np.allclose(part.reference.affine, part.affine)
    all_of_it, one = (reconstruct(scan, model, steps=3, samples=2) for scan in (whole, whole.part(2, 3)))
    assert np.allclose(one.volume.data[0], all_of_it.volume.data[2], atol=1e-3) and np.allclose(one.volume.affine, whole.part(2, 3).affine)
    strict = reconstruct(whole.part(2, 3), calibrated(model, 0.01), steps=3, samples=2)
    assert strict.trust["quality"]["above"] == [3] and "slice 3 (1 of 1)" in strict.warnings[-1]
    nowhere = dataclasses.replace(whole, affine=None)
    assert np.allclose(nowhere.part(1, 3).lps[:3, 3], nowhere.lps[:3, 3] + [0, 0, 1])


def test_an_h_for_one_scan_makes_one_sample(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "ITERATIONS", 2)
    scan, seen = simulate(head(1), PROTOCOL), []
    result = reconstruct(scan, model, method="deft-online", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(68, 153), (136, 153), (153, 153)] and result.estimate == "sample" and result.samples == 1 and result.std is None
    assert result.provenance["iterations"] == 2 and result.trust["quality"]["of"] == "samples" and list(result.beside) == ["fbp"]
    assert np.isfinite(result.volume.data).all() and np.isfinite(result.chi2["samples"])
    again = reconstruct(scan, model, method="deft-online")
    np.testing.assert_array_equal(again.volume.data, result.volume.data)
    with pytest.raises(UsageError, match="method deft-online wants a model"):
        reconstruct(scan, method="deft-online")
    with pytest.raises(UsageError, match="not Transmission: choose --method deft"):
        reconstruct(simulate(head(1), dataclasses.replace(PROTOCOL, noise=Noise(photons=1e4, counts=True))), model, method="deft-online")
