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

from deft_med import figure as figures
from deft_med import page as pages
from deft_med import report
from deft_med.metrics import ct_metrics


@dataclasses.dataclass(frozen=True)
class Image:
    data: np.ndarray
    affine: np.ndarray


@dataclasses.dataclass(frozen=True)
class Made:
    volume: Image
    baseline: Image
    reference: Image | None
    std: Image | None
    method: str = "deft"
    estimate: str = "average"
    samples: int = 4
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    chi2: dict[str, float] = dataclasses.field(default_factory=lambda: {"mean": 0.93, "samples": 1.01, "fbp": 1.7, "expected": 1.0})
    timing: dict[str, float] = dataclasses.field(default_factory=lambda: {"read": 0.1, "sample": 9.5})
    provenance: dict[str, Any] = dataclasses.field(default_factory=lambda: {"protocol": "p", "seed": None, "model_sha256": "9f86" * 16})
    simulated: bool = True
    title: str = "Made-up phantom <60 views>"


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
    first = Made(image(out), image(fbp), image(ref), image(np.abs(out - ref) + 1), metrics=metrics)
    return dataclasses.replace(first, **changes)


@pytest.fixture(scope="module")
def html() -> str:
    return pages.page(made())


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


@pytest.mark.parametrize("changes", [
    {"reference": None, "metrics": {}, "simulated": False},
    {"std": None, "samples": 1},
    {"std": None, "samples": 1, "method": "fbp", "metrics": {}},
    {"reference": None, "std": None, "samples": 1, "metrics": {}, "method": "fbp", "simulated": False},
    {"chi2": {}, "timing": {}, "provenance": {}},
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
    for key, volume, scale in (("result", reconstruction.volume, 1), ("fbp", reconstruction.baseline, 1), ("std", reconstruction.std, 10)):
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
    assert figures.windows_for(chest) == ["Soft tissue"]
    chest[20:40, 14:50] = -850
    assert figures.windows_for(chest) == ["Soft tissue", "Lung"]


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
