"""The figure of a report: one slice beside its baseline, reference, differences and spread, and the words that go with it.

A reconstruction is read by its fields only: `volume`, `baseline` (HU volumes with `.data` [slice, row, column] and an `.affine` from
(column, row, slice, 1) to LPS mm), `reference` and `std` (the same, or None), `method`, `estimate`, `samples`, `metrics`, `chi2`,
`timing`, `provenance`, `simulated`, `title`. Figures are drawn with matplotlib's objects: no global state, no display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

from .metrics import body_mask

NOTICE = "Research use only. Not a medical device."
WINDOWS = {"Soft tissue": (400, 40), "Lung": (1500, -600)}
"""Name -> (width, level) in HU."""
METHODS = {"deft": "DEFT", "fbp": "FBP", "tv": "TV", "supervised": "U-Net"}
METRIC_NAMES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "psnr_body": "PSNR, body (dB)", "ssim_body": "SSIM, body"}

_INK, _GREY, _RED, _ACCENT = "#16202a", "#5b6875", "#b3261e", "#ffd166"
_FONT = ["DejaVu Sans"]
_SHADE = {"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.5, "edgecolor": "none"}


class Panel(NamedTuple):
    """One image of the figure: kind is hu, difference or std, or profile for (name, line) pairs; window is (low, high) in HU."""

    image: Any
    kind: str
    window: tuple[float, float]
    title: str
    note: str = ""
    detail: bool = False


# ------------------------------------------------------------------------------------------------------------- words of a report


def method_name(method: str) -> str:
    """The name that a reader knows."""
    return METHODS.get(method, method.upper() if len(method) <= 5 else method)


def estimate_name(reconstruction: Any) -> str:
    """What the volume is: the average of K samples, the posterior mean in one evaluation, one sample; empty for FBP and TV."""
    if reconstruction.method in ("fbp", "tv"):
        return ""
    if reconstruction.estimate == "mean":
        return "posterior mean, one evaluation"
    if reconstruction.estimate == "sample" or reconstruction.samples <= 1:
        return "one posterior sample"
    return f"average of {reconstruction.samples} samples"


def marks(reconstruction: Any) -> list[str]:
    """The warnings that every figure and page carries in capitals."""
    found = ["SIMULATED"] if reconstruction.simulated else []
    return found + (["OUT OF SCOPE"] if reconstruction.provenance.get("out_of_scope") else [])


def score(reconstruction: Any, method: str, index: int) -> str:
    """PSNR and SSIM of one slice as a caption; empty where they were not measured."""
    found = reconstruction.metrics.get(method, {}) if reconstruction.metrics else {}
    parts = []
    for key, text in (("psnr", "{:.1f} dB"), ("ssim", "SSIM {:.3f}"), ("psnr_body", "body {:.1f} dB")):
        values = found.get(key)
        if values is not None and index < len(values) and values[index] is not None and math.isfinite(values[index]):
            parts.append(text.format(values[index]))
    return "  ·  ".join(parts)


def orientation(affine: np.ndarray) -> dict[str, str]:
    """The letters at the image's four sides (left, right, top, bottom) from the directions of columns and rows in LPS."""
    letters = (("R", "L"), ("A", "P"), ("I", "S"))
    sides = {}
    for name, opposite, axis in (("right", "left", 0), ("bottom", "top", 1)):
        direction = np.asarray(affine, float)[:3, axis]
        if not np.isfinite(direction).all() or not direction.any():
            return {}
        dominant = int(np.abs(direction).argmax())
        low, high = letters[dominant] if direction[dominant] > 0 else letters[dominant][::-1]
        sides[name], sides[opposite] = high, low
    return sides


def spacing(affine: np.ndarray) -> tuple[float, float]:
    """(row spacing dy, column spacing dx) in mm."""
    affine = np.asarray(affine, float)
    return float(np.linalg.norm(affine[:3, 1])), float(np.linalg.norm(affine[:3, 0]))


def windows_for(image: np.ndarray) -> list[str]:
    """The names of the windows to show an axial slice in: soft tissue, and lung where a good part of the body is lung."""
    body = body_mask(image)
    lung = (image > -970) & (image < -600) & body
    return ["Soft tissue", "Lung"] if body.any() and lung.sum() > 0.08 * body.sum() else ["Soft tissue"]


def find_detail(image: np.ndarray) -> tuple[slice, slice]:
    """A square of a quarter of the image's side with the most soft-tissue structure in it, inside the body where there is one."""
    side = max(8, min(image.shape) // 4)
    shown = np.clip(image, -160, 240)
    box = (min(side, image.shape[0]), min(side, image.shape[1]))
    structure = ndimage.uniform_filter(ndimage.generic_gradient_magnitude(shown, ndimage.sobel), box, mode="constant")
    structure *= ndimage.uniform_filter(((image > -160) & (image < 240)).astype(float), box, mode="constant")
    inside = ndimage.uniform_filter(body_mask(image).astype(float), box, mode="constant")
    value = structure * (inside > 0.97) if (inside > 0.97).any() else structure * inside
    row, column = np.unravel_index(int(value.argmax()), value.shape) if value.any() else (image.shape[0] // 2, image.shape[1] // 2)
    top = int(np.clip(row - box[0] // 2, 0, image.shape[0] - box[0]))
    left = int(np.clip(column - box[1] // 2, 0, image.shape[1] - box[1]))
    return slice(top, top + box[0]), slice(left, left + box[1])


def difference_range(*differences: np.ndarray | None) -> float:
    """A round half-range in HU, from the last difference given that exists, between 50 and 500."""
    known = [d for d in differences if d is not None]
    return _nice(1.5 * float(np.percentile(np.abs(known[-1]), 99)), 50, 500) if known else 100.0


def std_range(std: np.ndarray) -> float:
    """A round upper end of the standard deviation's scale in HU."""
    return _nice(float(np.percentile(std, 99.5)), 10, 500)


def _nice(value: float, low: float, high: float) -> float:
    steps = [s for s in (10, 20, 30, 50, 80, 100, 150, 200, 300, 400, 500) if low <= s <= high]
    return float(next((s for s in steps if s >= value), steps[-1]))


# --------------------------------------------------------------------------------------------------------------------- the figure


def rows_of(reconstruction: Any, index: int) -> list[tuple[str, list[Panel | None]]]:
    """The figure's rows as (label, panels): HU windows, the detail, and the differences with the standard deviation."""
    r = reconstruction
    out, base = (np.asarray(v.data[index], float) for v in (r.volume, r.baseline))
    ref = None if r.reference is None else np.asarray(r.reference.data[index], float)
    std = None if r.std is None else np.asarray(r.std.data[index], float)
    name = method_name(r.method)

    columns: list[tuple[str, str, np.ndarray]] = []
    if ref is not None:
        columns.append(("Reference", "", ref))
    if r.method != "fbp":
        columns.append(("FBP", score(r, "fbp", index), base))
    columns.append((name, score(r, r.method, index), out))

    rows: list[tuple[str, list[Panel | None]]] = []
    shown = windows_for(out if ref is None else ref)
    for window in shown:
        width, level = WINDOWS[window]
        limits = (level - width / 2, level + width / 2)
        first = not rows
        rows.append((f"{window}   W {width}  L {level}", [Panel(i, "hu", limits, t, n if first else "") for t, n, i in columns]))
    width, level = WINDOWS["Soft tissue"]
    limits = (level - width / 2, level + width / 2)
    rows.append((f"Detail   W {width}  L {level}", [Panel(i, "hu", limits, t, "", True) for t, _, i in columns]))

    spread = None if std is None else Panel(std, "std", (0, std_range(std)), "Standard deviation", f"of {r.samples} samples")
    if ref is not None:
        errors = [(t, i - ref) for t, _, i in columns[1:]]
        half = difference_range(*(e for _, e in errors))
        if spread is None:
            middle = (find_detail(ref)[0].start + find_detail(ref)[0].stop) // 2
            spread = Panel([(t, i[middle]) for t, _, i in columns], "profile", (-1050, 1500), "Profile", "HU along the dotted line")
        maps = [Panel(e, "difference", (-half, half), f"{t} − reference", _rms(e, ref)) for t, e in errors]
        rows.append(("Difference" if std is None else "Spread and difference", [spread, *maps]))
    elif r.method != "fbp":
        half = difference_range(out - base)
        rows[0][1].append(Panel(out - base, "difference", (-half, half), f"{name} − FBP"))
        for row in rows[1:]:
            row[1].append(None)
        rows[1][1][-1] = spread
    return rows


def _rms(error: np.ndarray, ref: np.ndarray) -> str:
    body = body_mask(ref)
    return f"RMS in body {np.sqrt(np.mean(error[body] ** 2)):.0f} HU" if body.any() else f"RMS {np.sqrt(np.mean(error**2)):.0f} HU"


def figure(reconstruction: Any, slice_index: int | None = None) -> Figure:
    """The report's figure: one slice, one HU window for all columns, scale bars in HU and mm."""
    r = reconstruction
    count = len(r.volume.data)
    index = count // 2 if slice_index is None else slice_index
    if not 0 <= index < count:
        raise ValueError(f"slice {index} of {count}")
    rows = rows_of(r, index)
    dy, dx = spacing(r.volume.affine)
    ny, nx = r.volume.data.shape[-2:]
    source = r.volume if r.reference is None else r.reference
    detail = find_detail(np.asarray(source.data[index], float))

    # everything in inches, measured from the top
    columns = max(len(panels) for _, panels in rows)
    wide, gap, left, right, header, footer = 3.3, 0.14, 1.05, 0.85, 1.0, 0.72
    titles = [0.44 if not number or any(p and p.kind != "hu" for p in panels) else gap for number, (_, panels) in enumerate(rows)]
    high = float(np.clip(wide * ny * dy / (nx * dx), 0.4 * wide, 1.8 * wide))
    total_w = left + columns * wide + (columns - 1) * gap + right
    total_h = header + sum(titles) + len(rows) * high + footer
    fig = Figure(figsize=(total_w, total_h), facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        return fig.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))

    def text(x: float, y: float, words: str, **style: Any) -> None:
        fig.text(x / total_w, 1 - y / total_h, words, **{"family": _FONT, "color": _INK, **style})

    badges = marks(r)
    text(left, 0.34, _cut(r.title, int(7.4 * (total_w - left - right - 1.6 * len(badges)))), size=14, weight="bold", va="center")
    words = [f"{method_name(r.method)}" + (f", {estimate_name(r)}" if estimate_name(r) else ""), f"slice {index + 1} of {count}"]
    words += [str(r.provenance["protocol"])] if "protocol" in r.provenance else []
    text(left, 0.66, "   ·   ".join(words), size=9.5, color=_GREY, va="center")
    for place, badge in enumerate(badges):
        text(total_w - right - 1.55 * place, 0.34, badge, size=11.5, weight="bold", color="white", ha="right", va="center",
             bbox={"boxstyle": "round,pad=0.4", "facecolor": _RED, "edgecolor": "none"})
    text(total_w - right, 0.70, NOTICE, size=8.5, color=_RED, ha="right", va="center")

    letters = orientation(r.volume.affine)
    for number, (label, panels) in enumerate(rows):
        top = header + sum(titles[: number + 1]) + number * high
        text(0.2, top + high / 2, label, size=9, color=_GREY, rotation=90, ha="center", va="center")
        scales: dict[str, ScalarMappable] = {}
        for column, panel in enumerate(panels):
            if panel is None:
                continue
            x = left + column * (wide + gap)
            if panel.kind == "profile":
                _profile(axes(x, top + 0.08, wide - 0.1, high - 0.42), panel, dx)
                text(x, top - 0.1, panel.title, size=10.5, weight="bold", va="bottom")
                text(x + wide, top - 0.1, panel.note, size=8.5, color=_GREY, ha="right", va="bottom")
                continue
            ax = axes(x, top, wide, high)
            image = panel.image[detail] if panel.detail else panel.image
            scale = _show(ax, image, panel, (dy, dx))
            _scale_bar(ax, image.shape[1], dx, panel.kind == "difference")
            if not panel.detail:
                if panel.kind == "hu" and not number:
                    _box(ax, detail)
                    if any(p is not None and p.kind == "profile" for _, others in rows for p in others):
                        ax.axhline((detail[0].start + detail[0].stop) // 2, color=_ACCENT, linewidth=0.8, linestyle=":")
                _letters(ax, letters, panel.kind)
            if r.simulated and panel.kind == "hu" and panel.title != "Reference":
                ax.text(0.985, 0.02, "SIMULATED", transform=ax.transAxes, color="white", size=6, ha="right", va="bottom", bbox=_SHADE)
            if not (panel.detail or (number and panel.kind == "hu")):
                text(x, top - 0.1, panel.title, size=10.5, weight="bold", va="bottom")
                text(x + wide, top - 0.1, panel.note, size=8.5, color=_GREY, ha="right", va="bottom")
            scales[("left" if column == 0 or panel.kind == "hu" else "right")] = scale
        for side, scale in scales.items():
            x = left - 0.22 if side == "left" else left + columns * (wide + gap) - gap + 0.08
            _colour_bar(fig, axes(x, top + 0.12 * high, 0.13, 0.76 * high), scale, side)
    text(left, total_h - 0.36, _provenance_line(r.provenance, int(13 * (total_w - left - right))), size=7.5, color=_GREY, va="center")
    return fig


def _show(ax: Axes, image: np.ndarray, panel: Panel, pixel: tuple[float, float]) -> ScalarMappable:
    colours = {"hu": "gray", "difference": "RdBu_r", "std": "magma"}[panel.kind]
    drawn = ax.imshow(image, cmap=colours, vmin=panel.window[0], vmax=panel.window[1], aspect="auto", origin="upper",
                      interpolation="bicubic" if panel.detail else "antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color="#c4ccd4", linewidth=0.6)
    return ScalarMappable(Normalize(*panel.window), drawn.cmap)


def _scale_bar(ax: Axes, columns: int, dx: float, light: bool) -> None:
    width = columns * dx
    length = next((v for v in (200, 100, 50, 20, 10, 5, 2, 1) if v <= 0.3 * width), 1)
    ends = [0.035, 0.035 + length / width]
    if not light:
        ax.plot(ends, [0.04, 0.04], transform=ax.transAxes, color="black", linewidth=5, alpha=0.8)
    ax.plot(ends, [0.04, 0.04], transform=ax.transAxes, color=_INK if light else "white", linewidth=2, solid_capstyle="butt")
    ax.text(sum(ends) / 2, 0.06, f"{length} mm", transform=ax.transAxes, color=_INK if light else "white", size=7, ha="center", va="bottom",
            bbox={**_SHADE, "facecolor": "white" if light else "black"})


def _box(ax: Axes, detail: tuple[slice, slice]) -> None:
    rows, columns = detail
    ax.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), columns.stop - columns.start, rows.stop - rows.start,
                           fill=False, edgecolor=_ACCENT, linewidth=1.1))


def _profile(ax: Axes, panel: Panel, dx: float) -> None:
    styles: dict[int, dict[str, Any]] = {0: {"color": _INK, "linewidth": 1.3}, len(panel.image) - 1: {"color": "#0b6fd0", "linewidth": 1.1}}
    for number, (name, line) in reversed(list(enumerate(panel.image))):
        ax.plot(np.arange(len(line)) * dx, line, label=name, **styles.get(number, {"color": "#e0a030", "linewidth": 0.6, "zorder": 1}))
    ax.set_xlim(0, (len(panel.image[0][1]) - 1) * dx)
    ax.set_ylim(*panel.window)
    ax.set_xlabel("mm", size=7.5, color=_GREY, labelpad=1)
    ax.tick_params(labelsize=7.5, color=_GREY, labelcolor=_GREY, length=2)
    ax.grid(True, color="#e4e9ee", linewidth=0.6)
    ax.spines[:].set(color="#c4ccd4", linewidth=0.6)
    ax.legend(frameon=False, fontsize=7.5, loc="upper center", ncols=3, reverse=True)


def _letters(ax: Axes, letters: Mapping[str, str], kind: str) -> None:
    places = {"left": (0.02, 0.5, "left", "center"), "right": (0.98, 0.5, "right", "center"), "top": (0.5, 0.985, "center", "top"),
              "bottom": (0.5, 0.02, "center", "bottom")}
    for side, letter in letters.items():
        x, y, ha, va = places[side]
        ax.text(x, y, letter, transform=ax.transAxes, color=_INK if kind == "difference" else "white", size=8, weight="bold", ha=ha, va=va)


def _colour_bar(fig: Figure, ax: Axes, scale: ScalarMappable, side: str) -> None:
    bar = fig.colorbar(scale, cax=ax, extend="neither")
    low, high = scale.get_clim()
    ticks = np.linspace(low, high, 5 if low < 0 else 6)
    bar.set_ticks(list(ticks), labels=[f"{t:.0f}".replace("-", "\u2212") for t in ticks])
    bar.ax.tick_params(labelsize=7.5, color=_GREY, labelcolor=_GREY, length=2, left=side == "left", right=side == "right",
                       labelleft=side == "left", labelright=side == "right")
    bar.ax.set_title("HU", size=7.5, color=_GREY, pad=4)
    bar.outline.set_edgecolor("#c4ccd4")


def _provenance_line(provenance: Mapping[str, Any], length: int) -> str:
    first = ("model", "model_sha256", "seed", "steps", "deft_med", "noise", "device", "torch")
    left_out = {"protocol", "method", "estimate", "samples", "simulated", "out_of_scope", "source", "source_sha256"}
    line = ""
    for key in (*(k for k in first if k in provenance), *(k for k in provenance if k not in first)):
        value = provenance[key]
        if "sha" in key:
            value = ", ".join(str(v)[:12] for v in (value.values() if isinstance(value, Mapping) else [value] if value else []))
        words = f"{key.replace('_', ' ')} {value}"
        if key in left_out or value is None or value is False or value in ("", []) or len(words) > 60:
            continue
        if len(line) + len(words) > length:
            break
        line += ("   ·   " if line else "") + words
    return line


def _cut(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1].rstrip(" ,;:") + "…"
