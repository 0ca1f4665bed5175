"""Lesions that are put in and looked for: closed forms of coverage, contrast and d', and pairs of scans that share their noise."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from deft_med import lesions
from deft_med.config import KSpaceProtocol, Metal, Noise, Protocol
from deft_med.errors import UsageError
from deft_med.lesions import amplitudes, detectability, disk, false_disks, insert, measured_with, positions, response, room, study
from deft_med.problem import Problem
from deft_med.simulate import simulate
from deft_med.volume import Volume

PIXEL, N = 2.0, 64
SPACING = (PIXEL, PIXEL)
MANY = Protocol(name="many", views=180, noise=Noise(gaussian_percent=0.5), grid=96)


def water(n: int = N, pixel: float = PIXEL, radius: float = 55.0) -> Volume:
    """A water disk in air, one slice."""
    field = n * pixel
    data = -1000 + 1000 * disk((n, n), (pixel, pixel), (field / 2, field / 2), 2 * radius)
    return Volume(data[None], np.diag([pixel, pixel, 5.0, 1.0]), "HU")


def test_a_disk_has_its_area_and_is_its_own_area_mean() -> None:
    for centre in ((31.0, 40.0), (30.3, 41.7)):
        fine, coarse = disk((64, 48), (1.0, 1.2), centre), disk((32, 24), (2.0, 2.4), centre)
        assert fine.sum() * 1.2 == pytest.approx(math.pi * 16, rel=0.002) and fine.min() == 0 and fine.max() == pytest.approx(1)
        assert np.allclose(fine.reshape(32, 2, 24, 2).mean((1, 3)), coarse, atol=0.02)
        y, x = (float((np.arange(n) + 0.5) @ fine.sum(axis)) / fine.sum() for n, axis in ((64, 1), (48, 0)))
        assert (y, 1.2 * x) == pytest.approx(centre, abs=0.02)
    assert disk((8, 8), SPACING, (0.0, 0.0)).sum() * PIXEL**2 == pytest.approx(math.pi * 4, rel=0.002)  # cut by the edge
    assert not disk((8, 8), SPACING, (-30.0, 5.0)).any() and not disk((8, 8), SPACING, (5.0, 90.0)).any()


def test_places_lie_in_soft_tissue_and_apart() -> None:
    image = water().data[0].copy()
    image[:, : N // 2] = -100.0  # fat
    image[40, 48] = 400.0  # bone
    places = positions(image, SPACING, count=6, seed=3)
    assert 2 <= len(places) <= 6
    for place in places:
        beneath = disk(image.shape, SPACING, place, lesions.DIAMETER + 2 * lesions.MARGIN) > 0
        assert (image[beneath] == 0).all()
    gaps = np.hypot(*(places[:, None] - places).transpose(2, 0, 1))[np.triu_indices(len(places), 1)]
    assert gaps.min() > lesions.APART * lesions.DIAMETER
    assert np.array_equal(places, positions(image, SPACING, count=6, seed=3))
    assert np.array_equal(places[:2], positions(image, SPACING, count=2, seed=3))
    assert not np.array_equal(places[:1], positions(image, SPACING, count=1, seed=4))
    assert not room(np.full((N, N), -1000.0), SPACING).any()
    assert positions(np.full((N, N), -1000.0), SPACING, count=3, seed=0).shape == (0, 2)


@pytest.mark.parametrize("matrix", [N, 2 * N])
def test_a_pair_is_what_the_simulator_makes_of_both_images(matrix: int) -> None:
    """Of the same seed the same noise, and its deviation held."""
    volume, places = water(matrix, PIXEL * N / matrix), [(60.0, 50.0), (63.0, 90.5)]
    protocol = replace(MANY, grid=N)
    absent = simulate(volume, protocol, seed=5)
    present = measured_with(absent, volume, places, 200.0)
    changed = simulate(insert(volume, places, 200.0), protocol, seed=5)
    apart = np.abs(present.y - changed.y).max()
    assert apart < 0.01 * absent.noise.mean() < 0.01 * np.abs(present.y - absent.y).max()
    assert np.array_equal(present.noise, absent.noise) and np.allclose(changed.noise, absent.noise, rtol=2e-2)
    assert np.allclose(present.reference.data, changed.reference.data, atol=0.5)


def test_a_ray_that_was_not_measured_stays_so() -> None:
    protocol = replace(MANY, grid=N, views=30, metal=Metal(disks=1))
    absent = simulate(water(), protocol, seed=1)
    present = measured_with(absent, water(), [(70.0, 50.0)], 200.0)
    lost = np.isinf(absent.noise)
    assert lost.any() and not present.y[lost].any() and (present.y != absent.y).any()


def test_the_amplitude_of_a_disk_is_its_contrast() -> None:
    flat, place = np.zeros((N, N)), (61.3, 47.9)
    shown = insert(Volume(flat[None], np.eye(4) * [PIXEL, PIXEL, 1, 1], "HU"), [place], 60.0).data[0]
    assert amplitudes(shown, SPACING, [place]) == pytest.approx([60.0])
    assert amplitudes(shown, SPACING, [(20.0, 20.0)]) == pytest.approx([0.0])
    assert 0 < amplitudes(ndimage.gaussian_filter(shown, 2), SPACING, [place])[0] < 35
    centred = 60 * disk((N, N), SPACING, (61.0, 47.0))  # the centre of a pixel
    answer = response(centred, SPACING)
    assert answer.max() == pytest.approx(60.0) == answer[30, 23]


def test_d_prime_in_white_noise_is_that_of_the_closed_form() -> None:
    """An image that is the truth and noise of deviation s: d' = c |t| / s."""
    noise, contrast = 100.0, 40.0
    places = [(16.0 * i + 9.3, 16.0 * j + 10.1) for i in range(18) for j in range(18)]
    shape = (146, 146)
    absent = noise * np.random.default_rng(0).standard_normal(shape)
    other = noise * np.random.default_rng(1).standard_normal(shape) + contrast * sum(disk(shape, SPACING, p) for p in places)
    scores = [amplitudes(image, SPACING, places) for image in (other, absent)]
    expected = contrast * np.linalg.norm(disk(shape, SPACING, places[0])) / noise
    assert detectability(*scores) == pytest.approx(expected, rel=0.1)
    assert math.isnan(detectability(scores[0][:1], scores[1][:1])) and math.isnan(detectability(np.ones(3), np.zeros(3)))


def test_false_disks_are_counted_once_each_and_only_where_looked_for() -> None:
    planted = [(31.0, 31.0), (31.0, 47.0), (91.0, 61.0), (75.3, 100.9)]
    error = sum(c * disk((N, N), SPACING, p) for c, p in zip((60.0, 40.0, 200.0, -80.0), planted, strict=True))
    everywhere = np.ones((N, N), bool)
    assert false_disks(error, everywhere, SPACING) == 3
    assert false_disks(error, everywhere, SPACING, threshold=50.0) == 2
    half = everywhere.copy()
    half[N // 2:] = False
    assert false_disks(error, half, SPACING) == 2
    assert false_disks(np.zeros((N, N)), everywhere, SPACING) == 0


def sources(count: int) -> Iterator[lesions.Source]:
    for k in range(count):
        yield f"subject {k}", 0, water(96, 1.0, 45.0)


def run(method: str, problem: Problem) -> torch.Tensor:
    u = problem.likelihood.direct()
    if method == "fbp":
        return u
    return torch.from_numpy(ndimage.gaussian_filter(u.numpy(), (0, 0, 2, 2)))


def test_a_linear_method_keeps_contrast_and_a_blurred_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesions, "pose", lambda scan, device: replace_filter(lesions_pose(scan)))
    records = list(study(run, sources(3), MANY, ["fbp", "blurred"], contrasts=(20.0, 200.0), count=3))
    assert json.loads(json.dumps(records)) == records
    assert [(r["method"], r["contrast"]) for r in records[:6]] == [(m, c) for c in (0.0, 20.0, 200.0) for m in ("fbp", "blurred")]
    rows = {(r["method"], r["contrast"]): r for r in lesions.summary(records, "fbp")}
    assert len(rows) == 4
    sharp, weak, blurred = rows["fbp", 200.0], rows["fbp", 20.0], rows["blurred", 200.0]
    assert sharp["recovered"] == pytest.approx(1.0, abs=0.07)
    assert weak["recovered"] == pytest.approx(sharp["recovered"], abs=1e-3)  # linear, and of a pair's noise nothing is left
    assert sharp["detectability"] == pytest.approx(10 * weak["detectability"], rel=0.25)  # recovery varies with the place
    assert blurred["recovered"] < 0.7
    assert sharp["slices"] == sharp["subjects"] == 3 and sharp["disks"] >= 5
    assert sharp["recovered_se"] < 0.02 and sharp["detectability_se"] > 0
    text = lesions.table(list(rows.values()))
    assert f"n = {sharp['disks']} disks of 8 mm in 3 slices of 3 subjects" in text and "| 200 HU: recovered | d' |" in text
    assert f"| blurred | {rows['blurred', 20.0]['recovered']:.2f} ± " in text and len(text.splitlines()) == 12
    assert "recovered_minus" not in sharp and blurred["recovered_minus"] == pytest.approx(blurred["recovered"] - sharp["recovered"])
    assert "Difference from fbp on the same disks" in text
    assert len(lesions.table(lesions.summary(records)).splitlines()) == 6


def test_disks_of_one_subject_count_as_one_draw() -> None:
    """Subjects differ by 20, their disks not at all: the error of the mean is that of two subjects, however many disks they have."""
    records = [{"method": "m", "contrast": c, "subject": who, "slice": k, "amplitudes": [c * share + k] * 4, "false": 0, "area_mm2": 1.0}
               for c in (0.0, 100.0) for who, share in (("a", 0.4), ("b", 0.6)) for k in range(3)]
    row, = lesions.summary(records)
    assert row["disks"] == 24 and row["recovered"] == pytest.approx(0.5)
    assert row["recovered_se"] == pytest.approx(np.std([0.4, 0.6], ddof=1) / 2**0.5)
    assert np.isnan(lesions.summary([r for r in records if r["subject"] == "a"])[0]["recovered_se"])


lesions_pose = lesions.pose


def replace_filter(problem: Problem) -> Problem:
    from operators.analytic import FilteredBackprojection

    likelihood = problem.likelihood
    return replace(problem, likelihood=likelihood.inverted_by(FilteredBackprojection(likelihood.forward.operator, window="ram-lak")))


def test_a_study_goes_on_where_it_stopped() -> None:
    small = replace(MANY, views=20)
    whole = list(study(run, sources(2), small, ["fbp"], contrasts=(60.0,), count=2))
    have = {(r["subject"], r["slice"], r["method"], r["contrast"]) for r in whole[:3]}
    rest = list(study(run, sources(2), small, ["fbp"], contrasts=(60.0,), count=2, have=have))
    assert rest == whole[3:] and len(whole) == 4
    assert list(study(run, sources(2), small, ["fbp"], contrasts=(60.0,), count=2, have=have | {("subject 1", 0, "fbp", 60.0)})) == []
    assert lesions.summary(whole[1:2]) == [] and lesions.table([]).startswith("n = 0 disks")  # half a pair is none
    air = water().with_data(np.full((1, N, N), -1000.0))
    assert list(study(run, [("nobody", 0, air)], small, ["fbp"])) == []


def test_lesions_want_line_integrals() -> None:
    mr = KSpaceProtocol(name="mr", pattern="random", acceleration=4)
    counts = Protocol(name="counts", views=9, noise=Noise(photons=1e4, counts=True))
    for protocol in (mr, counts):
        with pytest.raises(UsageError, match="choose a CT protocol such as ct_sparse60, one that keeps no counts"):
            next(study(run, sources(1), protocol, ["fbp"]))


@pytest.mark.slow
@pytest.mark.data
def test_on_a_patient_the_filter_sets_the_contrast_and_total_variation_loses_faint_disks(data_dir: Path) -> None:
    from deft_med.study import chosen_slices
    from deft_med.subjects import entries

    listed = [e for e in entries(data_dir, data_dir / "ct_manifest.json", "tune") if "ct512/" in e["image"]]
    subject = listed[0]["subject"]
    (key, volume), = chosen_slices([e for e in listed if e["subject"] == subject], 1)
    protocol = Protocol(name="sparse", views=60, noise=Noise(gaussian_percent=3.5), grid=128)
    source = [(subject, key, volume)]
    records = study(lambda method, problem: problem.classical[method]()[0], source, protocol, ["fbp", "tv"], contrasts=(20.0, 200.0))
    rows = {(r["method"], r["contrast"]): r["recovered"] for r in lesions.summary(records)}
    assert rows["fbp", 20.0] == pytest.approx(rows["fbp", 200.0], abs=1e-3) and 0.5 < rows["fbp", 20.0] < 1
    assert rows["tv", 20.0] < rows["tv", 200.0] < 1 and rows["tv", 20.0] < 0.6
