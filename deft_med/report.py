"""Every picture and page: the report of a reconstruction as one figure and as one self-contained HTML page, and pictures of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .figure import NOTICE, figure
from .page import page

__all__ = ["NOTICE", "loss_curve", "report_html", "report_png", "reports", "sample_grid"]


def report_png(reconstruction: Any, path: str | Path, slice_index: int | None = None) -> None:
    """Draw one slice (the middle one by default) beside other methods, reference, differences and standard deviation, to a PNG file."""
    _save(figure(reconstruction, slice_index), Path(path))


def _save(drawn: Figure, path: Path) -> None:
    drawn.savefig(path, format="png", dpi=150, metadata={"Software": "deft_med"})


def reports(reconstruction: Any, folder: Path) -> None:
    """report.png and report.html in a folder, of one drawing."""
    drawn = figure(reconstruction)
    _save(drawn, folder / "report.png")
    (folder / "report.html").write_text(page(reconstruction, drawn), encoding="utf-8")


def report_html(reconstruction: Any, path: str | Path) -> None:
    """Write one self-contained HTML page: a viewer with window, slices and values under the cursor, the figure, metrics and provenance."""
    Path(path).write_text(page(reconstruction), encoding="utf-8")


def loss_curve(path: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw a training log to a PNG: the loss over steps, and the validation error per octave of sigma.

    A record is {"step": int, "loss": float} and, where the model was validated, "sigma_X": RMS error at noise level X, one key per
    octave. Other keys are ignored.
    """
    losses = [(r["step"], float(r["loss"])) for r in records if r.get("loss") is not None]
    checks = [(r["step"], {float(k[6:]): float(v) for k, v in r.items() if k.startswith("sigma_")}) for r in records]
    checks = [(step, errors) for step, errors in checks if errors]
    fig = Figure(figsize=(10, 4), facecolor="white", layout="constrained")
    left, right = fig.subplots(1, 2)
    if losses:
        steps, values = (np.asarray(v, float) for v in zip(*losses))
        window = max(1, len(values) // 50)
        left.plot(steps, values, color="#9db4c8", linewidth=0.7, label="each record" if window > 1 else "training loss")
        if window > 1:
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            left.plot(steps[window - 1 :], smooth, color="#0b5cad", linewidth=1.8, label=f"mean of {window}")
        left.legend(frameon=False, fontsize=8)
        if (values > 0).all():
            left.set_yscale("log")
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    sigmas = sorted({s for _, errors in checks for s in errors})
    colours = ScalarMappable(Normalize(0, max(1, len(sigmas) - 1)), "viridis")
    for number, sigma in enumerate(sigmas):
        points = [(step, errors[sigma]) for step, errors in checks if sigma in errors]
        colour = colours.cmap(number / max(1, len(sigmas) - 1))
        right.plot(*zip(*points), marker="o", markersize=3, linewidth=1.4, color=colour, label=f"{sigma:.3g}")
    if sigmas:
        right.legend(title="sigma", frameon=False, fontsize=7, title_fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if all(e > 0 for _, errors in checks for e in errors.values()):
            right.set_yscale("log")
    right.set(title="Validation error", xlabel="step", ylabel="RMS error of the denoised image")
    for ax in (left, right):
        ax.grid(True, color="#e4e9ee", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(Path(path), format="png", dpi=120)


def sample_grid(path: str | Path, images: Sequence[np.ndarray], titles: Sequence[str] = (), *,
                window: tuple[float, float] = (400, 40)) -> None:  # fmt: skip
    """Draw images (row, column) side by side to a PNG, eight to a line, in one window (width, level), in HU unless it is given."""
    images = [np.asarray(image, float) for image in images]
    if not images:
        raise ValueError("no image to draw")
    columns = min(8, len(images))
    lines = -(-len(images) // columns)
    fig = Figure(figsize=(1.8 * columns, 2.05 * lines), facecolor="white", layout="constrained")
    grid = np.atleast_1d(np.asarray(fig.subplots(lines, columns, squeeze=False))).ravel()
    low, high = window[1] - window[0] / 2, window[1] + window[0] / 2
    for number, ax in enumerate(grid):
        ax.axis("off")
        if number < len(images):
            ax.imshow(images[number], cmap="gray", vmin=low, vmax=high, interpolation="antialiased")
            ax.set_title(titles[number] if number < len(titles) else "", size=8, color="#16202a")
    fig.savefig(Path(path), format="png", dpi=120)
