"""Closed forms for every metric, and skimage's SSIM as a witness."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deft_med import metrics


@pytest.fixture()
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def disk(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    row, column = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(row - centre[0], column - centre[1]) <= radius


def test_psnr_of_a_known_offset(rng: np.random.Generator) -> None:
    ref = rng.normal(size=(3, 17, 21))
    assert metrics.psnr(ref + 0.2, ref, data_range=2) == pytest.approx(20.0)
    assert metrics.psnr(ref, ref, data_range=2) == math.inf
    mask = np.zeros(ref.shape, bool)
    mask[0] = True
    x = ref.copy()
    x[0] += 0.02
    x[1] += 50
    assert metrics.psnr(x, ref, data_range=2, mask=mask) == pytest.approx(40.0)
    assert math.isnan(metrics.psnr(x, ref, data_range=2, mask=np.zeros(ref.shape, bool)))
    z = ref + 1j * ref
    assert metrics.psnr(z + (0.12 + 0.16j), z, data_range=2) == pytest.approx(20.0)


@pytest.mark.parametrize("shape", [(33, 40), (64, 51)])
def test_ssim_agrees_with_skimage(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    skimage_metrics = pytest.importorskip("skimage.metrics")
    ref = 1000 * rng.random(shape)
    x = ref + 100 * rng.normal(size=shape)
    settings = dict(data_range=2000, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected, full = skimage_metrics.structural_similarity(x, ref, full=True, **settings)
    assert metrics.ssim(x, ref, data_range=2000) == pytest.approx(expected, abs=1e-12)
    mask = np.zeros(shape, bool)
    mask[10:20, 12:18] = True
    assert metrics.ssim(x, ref, data_range=2000, mask=mask) == pytest.approx(full[mask].mean(), abs=1e-12)
    assert metrics.ssim(np.stack([x, ref]), np.stack([ref, ref]), data_range=2000) == pytest.approx((expected + 1) / 2, abs=1e-12)


def test_ssim_of_constants_is_its_luminance_term() -> None:
    a, b = np.full((16, 16), 0.3), np.full((16, 16), 0.5)
    c1 = 0.01**2
    assert metrics.ssim(a, b, data_range=1) == pytest.approx((2 * 0.15 + c1) / (0.09 + 0.25 + c1))
    assert math.isnan(metrics.ssim(a, b, data_range=1, mask=np.zeros((16, 16), bool)))


def test_nmse_and_chi2(rng: np.random.Generator) -> None:
    ref = rng.normal(size=(9, 8)) + 1j * rng.normal(size=(9, 8))
    assert metrics.nmse(1.1 * ref, ref) == pytest.approx(0.01)
    assert math.isnan(metrics.nmse(np.ones(3), np.zeros(3)))
    sigma = np.linspace(0.5, 2, 200)
    noise = rng.normal(size=(500, 200)) * sigma
    assert metrics.chi2(noise, sigma) == pytest.approx(1, abs=4 * math.sqrt(2 / noise.size))
    assert metrics.chi2(np.full(7, 3.0), 1.5) == pytest.approx(4)
    assert metrics.chi2(noise + 1j * noise, sigma) == pytest.approx(metrics.chi2(noise, sigma))


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_of_true_samples_is_the_level(rng: np.random.Generator, k: int, level: float) -> None:
    draws = 3 + 2 * rng.normal(size=(k + 1, 40_000))
    samples, truth = draws[:k], draws[k]
    found = metrics.coverage(samples.mean(0), samples.std(0, ddof=1), k, truth, level)
    assert found == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / truth.size))


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("scale, expected", [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)])
def test_the_factor_of_an_interval_makes_up_for_a_wrong_spread(rng: np.random.Generator, k: int, scale: float, expected: float) -> None:
    """Draws whose spread is `scale` times the truth's, about its mean: found within 2 %, and the interval then holds what it says."""
    draws = rng.normal(size=(k + 1, 100_000))
    mean, std, truth = draws[:k].mean(0), scale * draws[:k].std(0, ddof=1), draws[k]
    missed = metrics.misses(mean, std, k, truth)
    factor = metrics.calibration_factor(missed)
    assert factor == pytest.approx(expected, rel=0.02)
    assert metrics.coverage(mean, std, k, truth, factor=factor) == pytest.approx(0.9, abs=0.002)
    assert np.mean(missed <= 1) == metrics.coverage(mean, std, k, truth)
    low, high = metrics.interval(mean, std, k, factor=factor)
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.9, abs=0.002)
    assert (high - low) / 2 == pytest.approx(factor * metrics.reach(k) * std)


def test_the_interval_in_closed_form() -> None:
    assert metrics.reach(8, 0.9) == pytest.approx(1.894579 * math.sqrt(9 / 8), rel=1e-6)
    assert metrics.reach(100_000, 0.9) == pytest.approx(1.644854, rel=1e-4)
    low, high = metrics.interval([10.0], [2.0], 2, 0.9)
    assert (low[0], high[0]) == pytest.approx((10 - 2 * 6.313752 * math.sqrt(1.5), 10 + 2 * 6.313752 * math.sqrt(1.5)), rel=1e-6)
    mask = np.array([True, True, True, False])
    found = metrics.misses([1.0, 1, 1, 9], [0.0, 0, 1, 1], 4, [1.0, 2, 1 + metrics.reach(4), 0], mask=mask)
    assert found.tolist() == [0, math.inf, pytest.approx(1)]


def test_weights_of_a_quantile() -> None:
    assert metrics.weighted_quantile([3, 1, 2], 0.5) == 2 and metrics.weighted_quantile([1, 2], 0.99) == 2
    many = [1.0] * 1000 + [2.0] * 10  # two subjects, of whom one has a hundred times the pixels
    assert metrics.weighted_quantile(many, 0.75, [1 / 1000] * 1000 + [1 / 10] * 10) == 2 != metrics.weighted_quantile(many, 0.75)
    for weights in ([0, 0], [1], [1, -1]):
        with pytest.raises(ValueError, match="one per value, not negative"):
            metrics.weighted_quantile([1, 2], 0.5, weights)


def test_ranks_are_flat_for_true_samples_and_tell_wrong_ones(rng: np.random.Generator) -> None:
    draws = rng.normal(size=(5, 3, 120, 100))
    flat = metrics.rank_histogram(draws[:4], draws[4])
    assert flat == pytest.approx(np.full(5, 0.2), abs=4 * math.sqrt(0.16 / draws[4].size)) and flat.sum() == pytest.approx(1)
    alike, biased = metrics.rank_histogram(0.5 * draws[:4], draws[4]), metrics.rank_histogram(draws[:4] - 1, draws[4])
    assert min(alike[0], alike[-1]) > 1.4 * 0.2 > alike[2] and np.argmax(biased) == 4 and biased[0] < 0.1
    ties = metrics.rank_histogram(np.array([[0.0, 5], [0, 1], [7, 2]]), np.zeros(2))
    assert ties == pytest.approx([1 / 6 + 1 / 2, 1 / 6, 1 / 6, 0])
    assert np.isnan(metrics.rank_histogram(draws[:4], draws[4], np.zeros(draws[4].shape, bool))).all()
    with pytest.raises(ValueError, match="samples .K, ...."):
        metrics.rank_histogram(draws[4], draws[4])


def test_body_mask_keeps_the_patient_fills_the_lungs_and_drops_the_table() -> None:
    hu = np.full((128, 128), -1000.0)
    body = disk(hu.shape, (56, 64), 40)
    hu[body] = 40
    hu[disk(hu.shape, (56, 48), 12)] = -850  # a lung
    hu[97:99, 10:118] = 100  # a thin table, touching the patient
    mask = metrics.body_mask(hu)
    assert (mask & body).sum() > 0.995 * body.sum()
    assert (mask & ~body).sum() < 0.01 * body.sum()
    assert not mask[97:, :40].any()
    assert np.array_equal(metrics.body_mask(np.stack([hu, hu - 2000])), np.stack([mask, np.zeros_like(mask)]))


def test_body_mask_reaches_the_edge_of_a_cut_out() -> None:
    assert metrics.body_mask(np.full((20, 31), 30.0)).all()
    assert metrics.body_mask(np.full((0, 20, 31), 30.0)).shape == (0, 20, 31)
    thin = np.full((20, 31), -1000.0)
    thin[10] = 0
    assert np.array_equal(metrics.body_mask(thin), thin == 0)


def test_ct_metrics_clips_both_sides_and_averages_over_slices(rng: np.random.Generator) -> None:
    ref = np.full((3, 48, 48), -2000.0)
    ref[:2, 8:40, 8:40] = 50
    ref[0, 20:24, 20:24] = 3000
    x = ref.copy()
    x[0, 20:24, 20:24] = 1500  # metal: above the clip on both sides
    x[1, 8:40, 8:40] += 20
    found = metrics.ct_metrics(x, ref)
    assert found["psnr"][0] is None and found["psnr"][2] is None
    json.dumps(found, allow_nan=False)
    assert found["psnr_body"][1] == pytest.approx(20 * math.log10(2000 / 20))
    assert found["psnr"][1] == pytest.approx(20 * math.log10(2000 / 20) + 10 * math.log10(48**2 / 32**2))
    assert found["psnr_body"][2] is None and found["ssim_body"][2] is None
    assert found["mean"]["psnr"] is None and found["sd"]["psnr"] is None
    assert found["mean"]["ssim_body"] == pytest.approx(np.mean(found["ssim_body"][:2]))
    assert found["sd"]["ssim"] == pytest.approx(np.std(found["ssim"], ddof=1))


def test_head_mask_keeps_the_head_and_fills_the_ventricles(rng: np.random.Generator) -> None:
    head = disk((96, 80), (50, 40), 30)
    image = np.where(head, 1e-6, 0) * np.where(disk(head.shape, (50, 40), 6), 0.01, 1)
    image = image + 2e-8 * np.abs(rng.normal(size=head.shape))
    mask = metrics.head_mask(image)
    assert (mask ^ head).sum() < 0.02 * head.sum()
    assert np.array_equal(metrics.head_mask(np.stack([image, 0 * image])), np.stack([mask, np.zeros_like(mask)]))
    assert np.array_equal(metrics.head_mask(1e9 * image), mask)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
def test_mr_metrics_is_of_magnitudes_in_the_range_of_the_volume(rng: np.random.Generator, scale: float) -> None:
    head = disk((64, 60), (32, 30), 20)
    ref = scale * np.stack([head * 0.5, head * 2.0, 0.0 * head])
    x = (ref + 0.1 * scale) * np.exp(1j * rng.uniform(0, 6, ref.shape))
    x[2] = 0
    found = metrics.mr_metrics(x, ref)
    json.dumps(found, allow_nan=False)
    assert set(found) == {"psnr", "ssim", "nmse", "psnr_head", "ssim_head", "mean", "sd"}
    assert found["psnr"][:2] == pytest.approx([20 * math.log10(20)] * 2) and found["psnr"][2] is None
    assert found["psnr_head"] == [pytest.approx(20 * math.log10(20)), pytest.approx(20 * math.log10(20)), None]
    assert found["nmse"][1] == pytest.approx(0.01 * head.size / (4 * head.sum())) and found["nmse"][2] is None
    assert found["ssim"][1] == pytest.approx(metrics.ssim(np.abs(x[1]), ref[1], data_range=ref.max()))
    assert found["ssim_head"][2] is None and found["mean"]["nmse"] == pytest.approx(np.mean(found["nmse"][:2]))
    bright = metrics.mr_metrics(ref * 3, ref)
    assert bright["psnr_head"][1] == pytest.approx(20 * math.log10(1 / 2)), "nothing is clipped"


def test_the_scalp_is_the_rim_of_a_head() -> None:
    head = disk((64, 60), (32, 30), 20)
    rim = metrics.scalp_mask(head, 2.0, depth_mm=10.0)  # five pixels
    assert not rim[~head].any() and not disk((64, 60), (32, 30), 14)[rim].any() and (rim | disk((64, 60), (32, 30), 17))[head].all()
    cut = metrics.scalp_mask(head[32:], 2.0, depth_mm=10.0)
    assert not cut[0, 30] and cut[0, 11], "the frame is no edge"
    ref, x = head * 1.0, head * np.where(rim, 1.1, 1.01)
    found = metrics.mr_metrics(x[None], ref[None], pixel_mm=2.0 * metrics.SCALP_MM / 10.0)
    assert found["psnr_scalp"] == [pytest.approx(20, abs=0.1)] and found["psnr_brain"] == [pytest.approx(40, abs=0.1)]


def test_mean_sd() -> None:
    assert metrics.mean_sd([1.0, 3.0, math.nan, None]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(metrics.mean_sd([5.0])[1]) and math.isnan(metrics.mean_sd([])[0])


def test_refusals() -> None:
    a = np.zeros((16, 16))
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(a, a[1:], data_range=1)
    with pytest.raises(ValueError, match="mask must be boolean"):
        metrics.psnr(a, a, data_range=1, mask=a)
    with pytest.raises(ValueError, match="data_range must be positive"):
        metrics.psnr(a, a, data_range=0)
    with pytest.raises(ValueError, match="for real images"):
        metrics.ssim(a * 1j, a, data_range=1)
    with pytest.raises(ValueError, match="more than 10 pixels"):
        metrics.ssim(a[:10], a[:10], data_range=1)
    with pytest.raises(ValueError, match="sigma > 0"):
        metrics.chi2(a, 0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.coverage(a, a, 1, a)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.coverage(a, a, 2, a, 1.0)
    with pytest.raises(ValueError, match="body_mask needs"):
        metrics.body_mask(a[0])
    with pytest.raises(ValueError, match="one shape"):
        metrics.ct_metrics(a, a)
    with pytest.raises(ValueError, match="head_mask needs"):
        metrics.head_mask(a[0])
    with pytest.raises(ValueError, match="mr_metrics needs two"):
        metrics.mr_metrics(a, a)
    with pytest.raises(ValueError, match="not zero everywhere"):
        metrics.mr_metrics(a[None], a[None])


def test_mr_range_of_a_part_is_that_of_its_volume(rng: np.random.Generator) -> None:
    ref = rng.random((2, 16, 16)) * np.array([1.0, 0.25])[:, None, None]
    x = ref + 0.01 * rng.standard_normal(ref.shape)
    whole, part = metrics.mr_metrics(x, ref), metrics.mr_metrics(x[1:], ref[1:], data_range=float(ref.max()))
    assert part["psnr"] == whole["psnr"][1:] and part["ssim"] == whole["ssim"][1:]
    assert part["psnr"][0] > metrics.mr_metrics(x[1:], ref[1:])["psnr"][0] + 10
    empty = metrics.mr_metrics(x[1:], 0 * ref[1:], data_range=1.0)
    assert empty["psnr"][0] is not None and empty["psnr_head"] == [None]
