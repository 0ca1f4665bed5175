"""The report of a made-up reconstruction: what must stand in it, what must never, and that the viewer's numbers are the volume's."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from deft_med import figure as figures
from deft_med import page as pages
from deft_med import report
from deft_med.metrics import ct_metrics, mr_metrics


@dataclasses.dataclass(frozen=True)
class Image:
    data: np.ndarray
    affine: np.ndarray
    unit: str = "HU"


@dataclasses.dataclass(frozen=True)
class Made:
    volume: Image
    beside: dict[str, Image]
    reference: Image | None
    std: Image | None
    method: str = "deft"
    estimate: str = "average"
    samples: int = 4
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    chi2: dict[str, float] = dataclasses.field(default_factory=lambda: {"mean": 0.93, "samples": 1.01, "fbp": 1.7, "expected": 1.0})
    timing: dict[str, float] = dataclasses.field(default_factory=lambda: {"read": 0.1, "sample": 9.5})
    trust: dict[str, Any] = dataclasses.field(default_factory=dict)
    profile: dict[str, float] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=lambda: {"protocol": "p", "seed": None, "model_sha256": "9f86" * 16})
    simulated: bool = True
    title: str = "Made-up phantom <60 views>"
    cross_check: dict[str, Any] | None = None


def made(shape: tuple[int, int, int] = (3, 48, 56), **changes: Any) -> Made:
    rng = np.random.default_rng(0)
    _, row, column = np.mgrid[: shape[0], : shape[1], : shape[2]]
    ref = np.where(np.hypot(row - shape[1] / 2, column - shape[2] / 2) < 0.4 * shape[1], 40.0, -1000.0)
    ref[:, shape[1] // 2 :, shape[2] // 2 + 3 : shape[2] // 2 + 9] = 700
    out, fbp = ref + 10 * rng.normal(size=shape), ref + 120 * rng.normal(size=shape)
    affine = np.diag([1.5, 2.0, 5.0, 1.0])

    def image(data: np.ndarray) -> Image:
        return Image(data.astype(np.float32), affine)

    metrics = {"deft": ct_metrics(out, ref), "fbp": ct_metrics(fbp, ref)}
    first = Made(image(out), {"fbp": image(fbp)}, image(ref), image(np.abs(out - ref) + 1), metrics=metrics)
    return dataclasses.replace(first, **changes)


def made_mr(shape: tuple[int, int, int] = (2, 48, 56), scale: float = 1e-6, **changes: Any) -> Made:
    rng = np.random.default_rng(1)
    _, row, column = np.mgrid[: shape[0], : shape[1], : shape[2]]
    distance = np.hypot((row - shape[1] / 2) / shape[1], (column - shape[2] / 2) / shape[2])
    ref = scale * np.select([distance < 0.12, distance < 0.34, distance < 0.38], [0.5, 2.0, 3.1], 0.0)
    affine = np.array([[0.0, 0, 4, 0], [0, 1.1, 0, 0], [-1.2, 0, 0, 0], [0, 0, 0, 1]])

    def noisy(level: float) -> Image:
        return Image(np.abs(ref + scale * level * rng.normal(size=shape)).astype(np.float32), affine, "a.u.")

    beside = {"zero-filled": noisy(0.4), "cg-sense": noisy(0.2), "wavelet": noisy(0.12)}
    volume, std = noisy(0.06), Image(np.full(shape, 0.06 * scale, np.float32), affine, "a.u.")
    first = Made(
        volume, beside, Image(ref.astype(np.float32), affine, "a.u."), std,
        metrics={name: mr_metrics(v.data, ref) for name, v in {**beside, "deft": volume}.items()},
        chi2={"mean": 0.9, "samples": 1.0, "zero-filled": 9.1, "wavelet": 1.1, "expected": 1.0}, title="Made-up head",
    )  # fmt: skip
    return dataclasses.replace(first, **changes)


FOUND = {"zero-filled": (1.0, 5.0), "cg-sense": (0.42, 2.1), "deft": (0.3125, 1.5), "wavelet": (float("nan"), float("nan"))}
CHECK = {"share": 0.05, "methods": {name: {"error": error, "sigmas": sigmas} for name, (error, sigmas) in FOUND.items()}}
MEASURED: dict[str, Any] = {"reference": None, "metrics": {}, "simulated": False}


@pytest.fixture(scope="module")
def html() -> str:
    return pages.page(made())


@pytest.fixture()
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their drawing, for tests that read the words."""
    monkeypatch.setattr(pages, "figure", lambda r: Figure((1, 1)))


def texts(reconstruction: Made) -> list[str]:
    fig = figures.figure(reconstruction)
    return [t.get_text() for t in fig.texts] + [t.get_text() for ax in fig.axes for t in ax.texts]


def viewer(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_the_figure_names_what_it_shows() -> None:
    words = texts(made())
    columns = {"Reference", "FBP", "DEFT", "Standard deviation", "DEFT − reference", "FBP − reference"}
    assert columns | {report.NOTICE, "SIMULATED", "20 mm", "R", "L", "A", "P"} <= set(words)
    assert any("average of 4 samples" in w for w in words)
    assert any("dB" in w and "SSIM" in w for w in words)


def panel_titles(reconstruction: Made) -> list[list[str]]:
    rows = figures.rows_of(reconstruction, 0)
    return [[p.title if p else "" for p in panels] for _, panels in rows]


def test_mr_is_shown_beside_every_method_with_its_unit() -> None:
    columns = ["Reference", "Zero-filled", "CG-SENSE", "L1-wavelet", "DEFT"]
    errors = [f"{name} − reference" for name in columns[1:]]
    assert panel_titles(made_mr()) == [columns, columns, ["Standard deviation", *errors]]
    assert panel_titles(made_mr(std=None))[2] == ["Profile", *errors]
    differences = [f"DEFT − {name}" for name in columns[1:-1]]
    assert panel_titles(made_mr(**MEASURED)) == [columns[1:], columns[1:], [*differences, "Standard deviation"]]
    assert panel_titles(made_mr(**MEASURED, std=None))[2] == [*differences, "Profile"]
    rows = figures.rows_of(made_mr(), 0)
    assert rows[0][0] == "Magnitude   W 3.5  L 1.75" and rows[1][0] == "Detail   W 3.5  L 1.75"
    assert all(p and p.window == (0, 3.5) for _, panels in rows[:2] for p in panels)
    words = texts(made_mr())
    assert not any("HU" in w for w in words)
    assert {"S", "I", "A", "P"} <= set(words) and any(re.fullmatch(r"[\d.]+ dB  ·  SSIM 0\.\d+", w) for w in words)
    assert any(re.fullmatch(r"RMS in head 0\.\d+", w) for w in words)


@pytest.mark.parametrize("method, beside, expected", [
    ("zero-filled", [], ["Zero-filled"]),
    ("zero-filled", ["zero-filled"], ["Zero-filled"]),
    ("cg-sense", ["zero-filled", "cg-sense", "wavelet"], ["Zero-filled", "L1-wavelet", "CG-SENSE"]),
])  # fmt: skip
def test_a_method_is_shown_once(method: str, beside: list[str], expected: list[str]) -> None:
    first = made_mr(method=method, std=None, samples=1)
    other = dataclasses.replace(first, beside={name: first.beside[name] for name in beside})
    assert panel_titles(other)[0] == ["Reference", *expected]
    alone = dataclasses.replace(other, **MEASURED)
    assert panel_titles(alone)[0] == expected
    assert len(panel_titles(alone)) == 2 + (len(expected) > 1)
    assert [p["title"] for p in pages.viewer_data(alone)["panels"]][: len(expected)] == expected
    figures.figure(alone)


@pytest.mark.parametrize("scale, unit, top", [
    (1e-6, "10⁻⁶ a.u.", 3.5), (1e-7, "10⁻⁹ a.u.", 350), (0.1, "a.u.", 0.35), (1.0, "a.u.", 3.5), (100, "a.u.", 350), (1e5, "10³ a.u.", 350),
])  # fmt: skip
def test_the_viewer_loses_nothing_of_small_and_large_magnitudes(scale: float, unit: str, top: float) -> None:
    reconstruction = made_mr((1, 32, 32), scale)
    data = pages.viewer_data(reconstruction)
    assert data["unit"] == unit and data["presets"]["Magnitude"] == pytest.approx([top, top / 2])
    assert list(data["presets"]) == ["Magnitude", "Bright", "Full"] and data["presets"]["Full"][0] >= top
    assert reconstruction.std is not None and reconstruction.reference is not None
    known = {"result": reconstruction.volume, "std": reconstruction.std, "reference": reconstruction.reference, **reconstruction.beside}
    assert set(data["volumes"]) == set(known)
    for key, volume in known.items():
        back = data["factor"] * pages.unpack(data["volumes"][key][0], (32, 32), data["scale"][key])
        assert np.abs(back - volume.data[0]).max() < scale * 3.5 / 8000
    assert 0 < data["spread"] < data["presets"]["Magnitude"][0] and 0 < data["difference"] < data["presets"]["Magnitude"][0]
    assert round(data["difference"] / top, 6) in {0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5}
    assert data["scores"]["wavelet"]["psnr_head"][0] == pytest.approx(reconstruction.metrics["wavelet"]["psnr_head"][0], abs=1e-4)


def test_an_outlier_and_an_empty_volume_still_fit() -> None:
    first = made_mr((1, 32, 32))
    bright = first.volume.data.copy()
    bright[0, 3, 4] = 1.0
    data = pages.viewer_data(dataclasses.replace(first, volume=dataclasses.replace(first.volume, data=bright)))
    back = data["factor"] * pages.unpack(data["volumes"]["result"][0], (32, 32), data["scale"]["result"])
    assert back[3, 4] == pytest.approx(1.0, rel=1e-4)
    empty = dataclasses.replace(first.volume, data=0 * bright)
    nothing = made_mr((1, 32, 32), volume=empty, beside={"zero-filled": empty}, std=None, **MEASURED)
    assert pages.viewer_data(nothing)["unit"] == "a.u." and figures.figure(nothing)


def test_panels_of_the_viewer_stand_in_columns() -> None:
    def columns(reconstruction: Made) -> tuple[int, list[int | None]]:
        data = pages.viewer_data(reconstruction)
        return data["columns"], [p.get("column") for p in data["panels"]]

    assert columns(made_mr()) == (5, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 5])
    assert columns(made_mr(**MEASURED)) == (4, [1, 2, 3, 4, 1, 2, 3, 4])
    assert columns(made()) == (3, [1, 2, 3, 1, 2, 3, 3])
    assert columns(made(std=None)) == (3, [1, 2, 3, 2, 3, 3])
    assert columns(made(**MEASURED)) == (2, [None] * 4)
    assert columns(made(**MEASURED, std=None, method="fbp")) == (1, [None])


def test_an_unknown_place_has_no_letters_and_an_unknown_size_no_millimetres(bare: None) -> None:
    lost = made_mr((1, 40, 40), provenance={"protocol": None, "placed": False, "sized": False})
    words = texts(lost)
    assert "DEFT, average of 4 samples   ·   slice 1 of 1" in words
    assert not {"R", "L", "A", "P", "S", "I"} & set(words)
    assert any(w.endswith(" px") for w in words) and not any(w.endswith(" mm") for w in words) and not any("placed" in w for w in words)
    html = pages.page(lost)
    assert viewer(html)["letters"] == {} and viewer(html)["length"] == "px" and "a disk of 10 px" in html and "anterior" not in html
    assert "anterior" in pages.page(made_mr((1, 40, 40), provenance={"placed": True, "sized": True}))


def test_the_prediction_of_held_out_measurements_is_a_table(bare: None) -> None:
    html = pages.page(made_mr((1, 32, 32), **MEASURED, cross_check=CHECK))
    table = html[html.index("Prediction of measurements that were held out") :]
    assert "5 % of the measurements was held out" in table
    places = [table.index(name) for name in (">DEFT<", ">CG-SENSE<", ">Zero-filled<", ">L1-wavelet<")]
    assert places == sorted(places) and ">31.25 %<" in table and ">1.50<" in table and ">–<" in table
    assert "Held-out error" in html and "CG-SENSE 42.0 %" in html
    assert "held-out error 31.2 %" in " ".join(texts(made_mr((1, 32, 32), **MEASURED, cross_check=CHECK)))
    assert "held out" not in pages.page(made_mr((1, 32, 32)))


def test_the_mr_page_speaks_of_mr(bare: None) -> None:
    html = pages.page(made_mr((1, 32, 32)))
    words = re.sub(r"<script>.*", "", html, flags=re.S)
    assert "HU" not in re.sub(r"base64,[^\"]+|<script.*?</script>", "", words, flags=re.S)
    assert "NMSE" in html and "PSNR, head" in html and "inside the reference's head mask" in html.replace("&#x27;", "'")
    assert all(f">{name}<" in html for name in ("Zero-filled", "CG-SENSE", "L1-wavelet")) and "All numbers in 10⁻⁶\u00a0a.u.</p>" in html
    assert not re.search(r"(src|href)=[\"'](?!data:)|https?://|@import|url\(", html)
    assert "differences are to Zero-filled, CG-SENSE and L1-wavelet." in pages._kind(made_mr((1, 32, 32), **MEASURED))
    assert "The reference came with the data" in pages._kind(made_mr((1, 32, 32), simulated=False))
    assert "differences are to filtered backprojection" in pages._kind(made((1, 32, 32), **MEASURED))
    assert "no reference: differences are to" in pages._kind(made((1, 32, 32), reference=None))


@pytest.mark.parametrize("changes", [
    {"reference": None, "metrics": {}, "simulated": False},
    {"std": None, "samples": 1},
    {"std": None, "samples": 1, "method": "fbp", "metrics": {}},
    {"reference": None, "std": None, "samples": 1, "metrics": {}, "method": "fbp", "simulated": False},
    {"chi2": {}, "timing": {}, "provenance": {}},
    {"method": "tv", "cross_check": CHECK},
])  # fmt: skip
def test_every_kind_of_reconstruction_has_a_report(tmp_path: Path, changes: dict[str, Any]) -> None:
    reconstruction = made((1, 40, 40), **changes)
    report.report_png(reconstruction, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report.report_html(reconstruction, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert report.NOTICE in html and viewer(html)["panels"]
    simulated = reconstruction.simulated
    assert ("SIMULATED" in " ".join(texts(reconstruction))) is simulated
    assert ('<span class="badge">SIMULATED' in html) is simulated and viewer(html)["simulated"] is simulated


def test_the_page_is_self_contained_and_escapes_its_words(html: str) -> None:
    assert "Made-up phantom &lt;60 views&gt;" in html and "<60 views>" not in html
    assert not re.search(r"(src|href)=[\"'](?!data:)|https?://|@import|url\(", html)
    assert "default-src 'none'" in html
    assert html.count("<h2>") >= 5 and "± " in html
    assert "undefined" not in re.sub(r"<script>.*", "", html, flags=re.S)


def test_a_run_outside_the_scope_is_marked_everywhere() -> None:
    reconstruction = made((1, 32, 32), provenance={"out_of_scope": ["pixel size 3 mm: too large"]})
    assert {"SIMULATED", "OUT OF SCOPE"} <= set(texts(reconstruction))
    html = pages.page(reconstruction)
    assert '<span class="badge">OUT OF SCOPE</span>' in html and "pixel size 3 mm" in html


TRUST = {
    "interval": {"level": 0.9, "half_width_in_std": 3.1, "factor": 1.2, "samples": 4, "calibrated_on": "p", "calibrated_with_samples": 8,
                 "coverage_on_tune_subjects": 0.897, "coverage": 0.912},
    "quality": {"chi2": [1.01], "limit": 1.043, "because": "the 99th percentile of 10 slices of tune subjects",
                "above": [], "check": "passed"},
    "prior": {"rms": 61.73, "unit": "HU", "region": "body", "against": "fbp"},
}


def test_the_page_says_how_far_to_trust(bare: None) -> None:
    chi2 = {"mean": 0.93, "samples": 1.01, "reference": 1.002, "expected": 1.0, "deviation": 0.0096, "measurements": 21780}
    html = pages.page(made((1, 32, 32), trust=TRUST, chi2=chi2, profile={"prior": 3.0, "h": 2.0, "operators": 4.0, "rest": 1.0}))
    for words in ("90 % interval", "± 3.10 SD", "calibrated on p, with 8 samples", "91.2 %", "89.7 %", "expected 1 ± 0.0096",
                  "1 ± 0.01 (√(2 / M), M = 21780 measurements)",
                  "the limit is 1.043, the 99th percentile of 10 slices of tune subjects", "The check passed",
                  "RMS of DEFT − FBP in the body: 61.73 HU", "prior 30 %, h 20 %, operators 40 %, rest 10 %"):
        assert words in html, words
    assert html.count(">1.010<") == 2, "the samples' chi2 stands in its card and in its table, and its spread is no image's chi2"
    assert ">21780" not in html
    plain = {**TRUST, "interval": {**TRUST["interval"], "calibrated_on": None}, "quality": {"chi2": [1.0], "limit": None, "check": None}}
    assert "(not calibrated)" in pages.page(made((1, 32, 32), trust=plain))
    assert "Intervals" not in pages.page(made((1, 32, 32)))


def test_what_the_prior_changed_has_a_panel_of_its_own() -> None:
    def titles(reconstruction: Made) -> list[str]:
        return [p["title"] for p in pages.viewer_data(reconstruction)["panels"]]

    assert titles(made((1, 32, 32)))[-1] == "Prior: DEFT − FBP"
    assert [t for t in titles(made_mr((1, 32, 32), **MEASURED)) if "Prior" in t] == ["Prior: DEFT − Zero-filled"]
    assert not [t for t in titles(made((1, 32, 32), method="tv")) if "Prior" in t]
    with_it, without = (pages.viewer_data(made((1, 32, 32), method=m))["difference"] for m in ("deft", "tv"))
    assert with_it == without, "it does not stretch the colours of what is wrong"


def test_a_failed_check_is_marked_everywhere() -> None:
    reconstruction = made((1, 32, 32), provenance={"quality": "failed"})
    assert {"SIMULATED", "CHECK FAILED"} <= set(texts(reconstruction))
    assert '<span class="badge">CHECK FAILED</span>' in pages.page(reconstruction)


def test_a_long_title_is_cut_and_digests_are_short() -> None:
    sha = {"prior.safetensors": "ab" * 32, "h.safetensors": "cd" * 32}
    words = texts(made((1, 32, 32), title="a long title " * 20, provenance={"model": "ct 1", "model_sha256": sha, "steps": None}))
    assert any(w.startswith("a long title") and w.endswith("…") and len(w) < 100 for w in words)
    assert any("model sha256 abababababab, cdcdcdcdcdcd" in w and "steps" not in w for w in words)


def test_the_viewer_holds_the_volume_to_one_hounsfield_unit(html: str) -> None:
    reconstruction = made()
    data = viewer(html)
    assert data["slices"] == [0, 1, 2] and data["spacing"] == [2.0, 1.5] and data["letters"]["left"] == "R"
    assert reconstruction.std is not None
    known = {"result": (reconstruction.volume, 1), "fbp": (reconstruction.beside["fbp"], 1), "std": (reconstruction.std, 10)}
    for key, (volume, scale) in known.items():
        back = np.stack([pages.unpack(text, (48, 56), scale) for text in data["volumes"][key]])
        assert np.abs(back - volume.data).max() <= 0.5 / scale + 1e-3
    assert data["scores"]["result"]["psnr"] == pytest.approx(reconstruction.metrics["deft"]["psnr"], abs=1e-4)


def test_a_long_series_fits_into_the_page() -> None:
    reconstruction = made((40, 32, 32))
    one = len(json.dumps(pages.viewer_data(made((1, 32, 32)))))
    data = pages.viewer_data(reconstruction, room=8 * one)
    assert 3 <= len(data["slices"]) < 12 and data["slices"][0] == 0 and data["slices"][-1] == 39 and data["count"] == 40
    assert len(data["volumes"]["result"]) == len(data["slices"]) == len(data["scores"]["result"]["psnr"])
    assert pages.viewer_data(reconstruction, room=-5)["slices"] == [20]


def test_packing_survives_extremes() -> None:
    image = np.array([[-32768, 32767, 0, -1], [1e9, -1e9, np.nan, 2.5]])
    assert np.array_equal(pages.unpack(pages.pack(image), (2, 4)), [[-32768, 32767, 0, -1], [32767, -32768, 0, 2]])


@pytest.mark.parametrize("affine, expected", [
    (np.diag([1.0, 1, 1, 1]), {"left": "R", "right": "L", "top": "A", "bottom": "P"}),
    (np.diag([-1.0, -1, 1, 1]), {"left": "L", "right": "R", "top": "P", "bottom": "A"}),
    (np.array([[1.0, 0, 0, 0], [0, 0.1, 0, 0], [0, -0.9, 1, 0], [0, 0, 0, 1]]), {"left": "R", "right": "L", "top": "S", "bottom": "I"}),
    (np.zeros((4, 4)), {}),
])  # fmt: skip
def test_orientation_letters(affine: np.ndarray, expected: dict[str, str]) -> None:
    assert figures.orientation(affine) == expected


def test_a_chest_is_shown_in_the_lung_window_too() -> None:
    chest = np.full((64, 64), -1000.0)
    chest[8:56, 8:56] = 40
    assert figures.windows_for(chest, figures.CT) == ["Soft tissue"]
    chest[20:40, 14:50] = -850
    assert figures.windows_for(chest, figures.CT) == ["Soft tissue", "Lung"]
    assert figures.windows_for(chest, figures.look(made_mr((1, 16, 16)))) == ["Magnitude"]


def test_a_slice_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="slice 3 of 3"):
        figures.figure(made(), 3)


def test_the_same_reconstruction_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        report.report_png(made((1, 32, 32)), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pictures_of_a_training(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"step": 10 * i, "loss": 1 / (i + 1), "rate": 1e-3} for i in range(200)]
    records[100] |= {"sigma_0.5": 0.1, "sigma_2": 0.2}
    records[199] |= {"sigma_0.5": 0.05, "sigma_2": 0.1}
    report.loss_curve(tmp_path / "loss.png", records)
    report.loss_curve(tmp_path / "empty.png", [])
    report.sample_grid(tmp_path / "grid.png", [np.zeros((8, 8))] * 9, ["one"])
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "empty.png", "grid.png"))
    with pytest.raises(ValueError, match="no image"):
        report.sample_grid(tmp_path / "none.png", [])


def test_the_embedded_figure_is_a_png(html: str) -> None:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found and base64.b64decode(found[1]).startswith(b"\x89PNG")
