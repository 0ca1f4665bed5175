"""How far a reconstruction is from its reference, and from its data. The range and the region are always named.

Arrays are numpy. Images are (row, column) or (slice, row, column); a mask has the image's shape and selects the pixels that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.special import stdtrit

SCALP_MM = 15.0  # skin, fat and skull of a head, about
CT_CLIP = (-1000.0, 1000.0)
"""HU to which both sides are clipped before a CT metric; its length is the data range."""

LEVEL = 0.9
"""Probability with which an interval holds the truth."""

_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # the 11 x 11 Gaussian window of Wang et al. 2004


def psnr(x: ArrayLike, ref: ArrayLike, *, data_range: float, mask: ArrayLike | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / mean |x - ref|^2); infinite for equal images, NaN for an empty mask."""
    x, ref, region = _pair(x, ref, mask)
    _check_range(data_range)
    if not region.any():
        return math.nan
    error = float(np.mean(np.abs(x - ref)[region] ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(x: ArrayLike, ref: ArrayLike, *, data_range: float, mask: ArrayLike | None = None) -> float:
    """Structural similarity of two real images, the mean of its map over the pixels whose whole window lies in the image.

    Gaussian window of 11 x 11 pixels, sigma 1.5, K = (0.01, 0.03), population covariance (Wang et al., IEEE TIP 13(4), 2004);
    agrees with skimage's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    Windows are two-dimensional: a stack is the mean over its slices' pixels. With a mask, the mean over the mask's pixels.
    """
    x, ref, region = _pair(x, ref, mask)
    _check_range(data_range)
    if np.iscomplexobj(x) or np.iscomplexobj(ref):
        raise ValueError("ssim is for real images: pass magnitudes")
    if min(x.shape[-2:]) <= 2 * _SSIM_RADIUS:
        raise ValueError(f"ssim needs more than {2 * _SSIM_RADIUS} pixels a side, got {x.shape[-2:]}")

    sigma = (0.0,) * (x.ndim - 2) + (_SSIM_SIGMA, _SSIM_SIGMA)

    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, sigma, truncate=_SSIM_RADIUS / _SSIM_SIGMA, mode="reflect")

    mean_x, mean_ref = blur(x), blur(ref)
    var_x, var_ref = blur(x * x) - mean_x**2, blur(ref * ref) - mean_ref**2
    covariance = blur(x * ref) - mean_x * mean_ref
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = (2 * mean_x * mean_ref + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_ref**2 + c1) * (var_x + var_ref + c2))

    inner = (..., slice(_SSIM_RADIUS, -_SSIM_RADIUS), slice(_SSIM_RADIUS, -_SSIM_RADIUS))
    chosen = values[inner][region[inner]]
    return float(chosen.mean()) if chosen.size else math.nan


def nmse(x: ArrayLike, ref: ArrayLike, *, mask: ArrayLike | None = None) -> float:
    """Normalised mean squared error, |x - ref|^2 / |ref|^2; real or complex."""
    x, ref, region = _pair(x, ref, mask)
    power = float(np.sum(np.abs(ref[region]) ** 2))
    return float(np.sum(np.abs(x - ref)[region] ** 2)) / power if power > 0 else math.nan


def chi2(residual: ArrayLike, sigma: ArrayLike) -> float:
    """Mean of (residual / sigma)^2 over the measurements: expected 1 for the truth and for a posterior sample, less for a mean.

    residual = y - A x; sigma is the noise's standard deviation per real component, a number or an array that broadcasts. A complex
    measurement counts as two.
    """
    residual, sigma = np.asarray(residual), np.asarray(sigma, dtype=np.float64)
    if not np.all(sigma > 0):
        raise ValueError("chi2 needs sigma > 0")
    total = np.abs(residual.astype(np.complex128 if np.iscomplexobj(residual) else np.float64)) ** 2 / sigma**2
    return float(total.mean()) / (2 if np.iscomplexobj(residual) else 1)


def reach(k: int, level: float = LEVEL) -> float:
    """t_{k-1} sqrt(1 + 1/k): half of the prediction interval of k Gaussian samples, in their standard deviations (ddof = 1).

    Raises ValueError for fewer than 2 samples and a level outside (0, 1).
    """
    if k < 2:
        raise ValueError(f"an interval needs at least 2 samples, got {k}")
    if not 0 < level < 1:
        raise ValueError(f"level is between 0 and 1, got {level}")
    return float(stdtrit(k - 1, 0.5 + level / 2)) * math.sqrt(1 + 1 / k)


def interval(mean: ArrayLike, std: ArrayLike, k: int, level: float = LEVEL, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) = mean -+ factor t_{k-1} sqrt(1 + 1/k) std: what holds the truth with probability `level`.

    Of k samples with standard deviation std (ddof = 1) that are draws of the posterior, at factor 1; `calibration_factor` measures the
    factor of samples that are not quite.
    """
    centre, half = np.asarray(mean, np.float64), factor * reach(k, level) * np.asarray(std, np.float64)
    return centre - half, centre + half


def coverage(mean: ArrayLike, std: ArrayLike, k: int, ref: ArrayLike, level: float = LEVEL, mask: ArrayLike | None = None,
             factor: float = 1.0) -> float:
    """The share of pixels whose reference lies within the `interval` of k posterior samples; `level` when calibrated."""
    missed = misses(mean, std, k, ref, level, mask)
    return float(np.mean(missed <= factor)) if missed.size else math.nan


def misses(mean: ArrayLike, std: ArrayLike, k: int, ref: ArrayLike, level: float = LEVEL, mask: ArrayLike | None = None) -> np.ndarray:
    """|ref - mean| over half of the `interval` at factor 1, for every pixel of the mask: above 1 where the interval misses (n,).

    Infinite where all samples agree on what the reference is not, zero where they agree on what it is.
    """
    mean, ref, region = _pair(mean, ref, mask)
    error = np.abs(ref - mean)[region]
    half = reach(k, level) * np.broadcast_to(np.asarray(std, np.float64), mean.shape)[region]
    return np.divide(error, half, out=np.where(error > 0, np.inf, 0.0), where=half > 0)


def calibration_factor(missed: ArrayLike, level: float = LEVEL, weights: ArrayLike | None = None) -> float:
    """The factor on std with which a share `level` of the weight lies within the interval: the weighted quantile of `misses`.

    Samples of the true posterior have factor 1, samples with half its standard deviation 2. ValueError where nothing has weight.
    """
    return weighted_quantile(missed, level, weights)


def weighted_quantile(values: ArrayLike, q: float, weights: ArrayLike | None = None) -> float:
    """The value below which a share q of the weight lies, each value standing in the middle of its own weight, linear in between.

    Raises ValueError where nothing has weight.
    """
    values = np.asarray(values, np.float64).ravel()
    given = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64).ravel()
    if given.shape != values.shape or not given.sum() > 0 or given.min() < 0:
        raise ValueError(f"weights want to be one per value, not negative and not all zero: got {given.size} for {values.size} values")
    order = np.argsort(values)
    values, given = values[order], given[order]
    return float(np.interp(q * given.sum(), np.cumsum(given) - given / 2, values))


def rank_histogram(samples: ArrayLike, ref: ArrayLike, mask: ArrayLike | None = None) -> np.ndarray:
    """How often the reference is the 1st, 2nd, ... (K + 1)-th smallest among K samples [K, ...]: shares (K + 1,), alike if calibrated.

    High ends say that the samples are too alike, one high end that they are biased (Talagrand's diagram; Hamill, Mon. Weather Rev.
    129(3), 2001). A reference that equals samples counts in equal parts for the ranks it may have. NaN for an empty mask.
    """
    samples, ref = np.asarray(samples), np.asarray(ref)
    if samples.ndim != ref.ndim + 1 or not len(samples):
        raise ValueError(f"rank_histogram needs samples [K, ...] beside a reference [...], got {samples.shape} and {ref.shape}")
    _, _, region = _pair(samples[0], ref, mask)
    low, high = (samples[:, region] < ref[region]).sum(0), (samples[:, region] <= ref[region]).sum(0)
    share = 1 / (high - low + 1)
    total = [share[(low <= rank) & (rank <= high)].sum() for rank in range(len(samples) + 1)]
    return np.asarray(total) / region.sum() if region.any() else np.full(len(samples) + 1, math.nan)


def body_mask(hu: ArrayLike, *, threshold: float = -500.0, opening: int = 2) -> np.ndarray:
    """The patient in CT images (row, column) or (slice, row, column) in HU, slice by slice: without table and air, lungs filled.

    The largest connected region above `threshold` after an opening by `opening` pixels (which parts the patient from a thin table), holes
    filled. All False where nothing is above the threshold.
    """
    return _by_slice("body_mask", hu, lambda image: _largest(image > threshold, opening))


def head_mask(image: ArrayLike, *, fraction: float = 0.1, percentile: float = 99.0, opening: int = 2) -> np.ndarray:
    """The head, or what else holds the signal, in MR magnitudes (row, column) or (slice, row, column), slice by slice: air left out.

    The largest connected region above `fraction` of the slice's `percentile`, after an opening by `opening` pixels, holes filled. All False
    where the slice is zero; a slice of noise alone has a region all the same.
    """
    return _by_slice("head_mask", image, lambda m: _largest(m > fraction * np.percentile(m, percentile), opening))


def scalp_mask(head: ArrayLike, pixel_mm: float, *, depth_mm: float = SCALP_MM) -> np.ndarray:
    """What of a head's mask (row, column) or (slice, row, column) lies within `depth_mm` of its edge: scalp and skull, about.

    The rest is brain, in slices that show one. The frame's own edge is no edge of the head.
    """
    def rim(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1, mode="edge")
        return mask & (ndimage.distance_transform_edt(padded)[1:-1, 1:-1] * pixel_mm <= depth_mm)

    return _by_slice("scalp_mask", head, rim)


MASKS: dict[str, Callable[[ArrayLike], np.ndarray]] = {"CT": body_mask, "MR": head_mask}
"""Modality -> the region inside which a result is judged."""


def _by_slice(name: str, images: ArrayLike, mask: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim == 3:
        return np.stack([mask(image) for image in images]) if len(images) else np.zeros(images.shape, bool)
    if images.ndim != 2:
        raise ValueError(f"{name} needs (row, column) or (slice, row, column), got shape {images.shape}")
    return mask(images)


def _largest(above: np.ndarray, opening: int) -> np.ndarray:
    padded = np.pad(above, opening, mode="edge")  # a patient cut by the field of view must not be eroded at the edge
    disk = np.hypot(*np.mgrid[-opening : opening + 1, -opening : opening + 1]) <= opening + 0.5
    opened = ndimage.binary_opening(padded, disk)[tuple(slice(opening, opening + n) for n in above.shape)]
    labels, count = ndimage.label(opened if opened.any() else above)
    if not count:
        return np.zeros(above.shape, bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes(labels == sizes.argmax())


def ct_metrics(x: ArrayLike, ref: ArrayLike) -> dict[str, Any]:
    """PSNR (dB) and SSIM of HU volumes (slice, row, column), both clipped to [-1000, 1000] HU, range 2000 HU, per slice.

    Returns {"psnr", "ssim", "psnr_body", "ssim_body": one number per slice (full frame, and inside the reference's body mask),
    "mean": {...}, "sd": {...}} with mean and standard deviation over slices. None stands for what is not a finite number (no body in the
    slice, equal images, the deviation of one slice), so that the result is plain JSON.
    """
    low, high = CT_CLIP
    image, truth = (np.clip(v, low, high) for v in _volumes("ct_metrics", x, ref))
    return _summary(_agreement(image, truth, high - low, "body", body_mask(truth)))


def mr_metrics(x: ArrayLike, ref: ArrayLike, *, data_range: float | None = None, pixel_mm: float | None = None) -> dict[str, Any]:
    """PSNR (dB), SSIM and NMSE of the magnitudes of MR volumes (slice, row, column), real or complex, not clipped, per slice.

    The range is the maximum of the reference volume: ``data_range`` where ``ref`` is but a part of it. Returns {"psnr", "ssim", "nmse",
    "psnr_head", "ssim_head", "mean", "sd"} as `ct_metrics` does: full frame, and inside the reference's head mask; with ``pixel_mm`` also
    "psnr_scalp" and "psnr_brain", where in the head the error sits (`scalp_mask`). Raises ValueError for a reference that is zero
    everywhere and no range.
    """
    image, truth = (np.abs(v) for v in _volumes("mr_metrics", x, ref))
    if data_range is None and not truth.any():
        raise ValueError("mr_metrics needs a reference that is not zero everywhere")
    span, head = float(truth.max()) if data_range is None else data_range, head_mask(truth)
    result = _agreement(image, truth, span, "head", head)
    if pixel_mm is not None:
        scalp = scalp_mask(head, pixel_mm)
        for part, masks in (("scalp", scalp), ("brain", head & ~scalp)):
            result[f"psnr_{part}"] = [psnr(i, t, data_range=span, mask=m) for i, t, m in zip(image, truth, masks)]
    return _summary(result | {"nmse": [nmse(i, t) for i, t in zip(image, truth)]})


def _volumes(name: str, *volumes: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    found = [np.asarray(v) for v in volumes]
    x, ref = (v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for v in found)
    if x.ndim != 3 or x.shape != ref.shape:
        raise ValueError(f"{name} needs two (slice, row, column) volumes of one shape, got {x.shape} and {ref.shape}")
    return x, ref


def _agreement(x: np.ndarray, ref: np.ndarray, data_range: float, region: str, masks: np.ndarray) -> dict[str, list[float]]:
    """PSNR and SSIM per slice, full frame and inside the masks of a region."""
    result: dict[str, list[float]] = {}
    for suffix, chosen in (("", [None] * len(x)), (f"_{region}", masks)):
        for name, measure in (("psnr", psnr), ("ssim", ssim)):
            result[name + suffix] = [measure(i, t, data_range=data_range, mask=m) for i, t, m in zip(x, ref, chosen)]
    return result


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """The lists per slice with their means and deviations, as plain JSON."""
    found = {name: mean_sd(values) for name, values in result.items()}
    return _plain({**result, "mean": {k: mean for k, (mean, _) in found.items()}, "sd": {k: sd for k, (_, sd) in found.items()}})


def mean_sd(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for one value) of the values that are neither None nor NaN."""
    kept = np.asarray([v for v in values if v is not None and not math.isnan(v)], np.float64)
    if not kept.size:
        return math.nan, math.nan
    if np.isinf(kept).any():
        return float(kept.mean()), math.nan
    return float(kept.mean()), float(kept.std(ddof=1)) if kept.size > 1 else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None


def _pair(x: ArrayLike, ref: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, ref = np.asarray(x), np.asarray(ref)
    if x.shape != ref.shape:
        raise ValueError(f"image and reference differ in shape: {x.shape} and {ref.shape}")
    region = np.ones(x.shape, bool) if mask is None else np.asarray(mask)
    if region.dtype != bool or region.shape != x.shape:
        raise ValueError(f"the mask must be boolean and of the image's shape {x.shape}, got {region.dtype} {region.shape}")
    kind = np.complex128 if np.iscomplexobj(x) or np.iscomplexobj(ref) else np.float64
    return x.astype(kind), ref.astype(kind), region


def _check_range(data_range: float) -> None:
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"data_range must be positive, got {data_range}")
