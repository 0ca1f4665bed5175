"""The figure of a report: one slice beside other methods, reference, differences and spread, and the words that go with it.

A reconstruction is read by its fields only: `volume` (`.data` [slice, row, column], `.affine` from (column, row, slice, 1) to LPS mm,
`.unit`), `beside` ({method: volume}, the baseline first), `reference` and `std` (volumes or None), and words and numbers about them. CT
and MR differ in their `Look` only. Figures are drawn with matplotlib's objects: no global state, no display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

from .metrics import body_mask, head_mask

NOTICE = "Research use only. Not a medical device."
METHODS = {"fbp": "FBP", "zero-filled": "Zero-filled", "cg-sense": "CG-SENSE", "wavelet": "L1-wavelet", "tv": "TV", "supervised": "U-Net",
           "deft": "DEFT", "deft-online": "Online h"}  # fmt: skip
"""Method -> the name that a reader knows, in the order of tables."""
CLASSICAL = ("fbp", "zero-filled", "cg-sense", "wavelet", "tv")

_INK, _GREY, _RED, _ACCENT = "#16202a", "#5b6875", "#b3261e", "#ffd166"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHADE = {"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.5, "edgecolor": "none"}


class Panel(NamedTuple):
    """One image of the figure: kind is grey, difference or std, or profile for (name, line) pairs; window is (low, high)."""

    image: Any
    kind: str
    window: tuple[float, float]
    title: str
    note: str = ""
    detail: bool = False


class Look(NamedTuple):
    """How the images of a modality are shown, in numbers of `unit`; `factor` is one unit in the data's own numbers."""

    unit: str
    factor: float
    presets: dict[str, tuple[float, float]]  # name -> (width, level); the first one to begin with, and for details
    span: float  # scales of differences and deviations are round percentages of it
    least: int  # the smallest such percentage for differences
    digits: int  # decimals of a value under the pointer
    grain: float  # the step that a value may be rounded to
    profile: tuple[float, float]
    region: str
    mask: Callable[[np.ndarray], np.ndarray]
    rim: float  # share of the image's side inside the mask's edge that is no place for a detail
    error: str  # note of a difference
    signal: str  # what the metrics compare


CT = Look("HU", 1.0, {"Soft tissue": (400, 40), "Brain": (80, 40), "Lung": (1500, -600), "Bone": (2000, 500), "Full": (3000, 500)}, 1000,
          5, 0, 1.0, (-1050, 1500), "body", body_mask, 0, "RMS in body {:g} HU", "Both sides clipped to [−1000, 1000] HU, range 2000 HU")


def look(reconstruction: Any) -> Look:
    """CT's look for HU; for magnitudes a window from 0 to the 99.5th percentile of the reference, else of the result, rounded up."""
    r = reconstruction
    if r.volume.unit == CT.unit:
        return CT
    data = np.abs(np.asarray((r.reference or r.volume).data, np.float64))
    top = _round_up(float(np.percentile(data, 99.5)) or float(data.max()) or 1.0)
    power = math.floor(math.log10(top) + 1e-9)
    tens = 0 if -1 <= power <= 3 else 3 * (power // 3)
    unit = r.volume.unit if not tens else f"10{str(tens).translate(_SUPERSCRIPT)} {r.volume.unit}"
    top, full = round(top / 10.0**tens, 9), round(_round_up(float(data.max()) / 10.0**tens or 1.0), 9)
    presets = {"Magnitude": (top, top / 2), "Bright": (top / 2, top / 4), "Full": (full, full / 2)}
    return Look(unit, 10.0**tens, presets, top, 1, max(0, 3 + tens - power), top / 8192, (-0.03 * top, 1.5 * top), "head", head_mask,
                0.08, "RMS in head {:g}", "Magnitudes, not clipped; range: the maximum of the reference volume")  # fmt: skip


def _round_up(value: float) -> float:
    power, steps = 10.0 ** math.floor(math.log10(value)), (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10)
    return power * next(s for s in steps if s >= value / power - 1e-9)


# ------------------------------------------------------------------------------------------------------------- words of a report


def method_name(method: str) -> str:
    """The name that a reader knows."""
    return METHODS.get(method, method.upper() if len(method) <= 5 else method)


def estimate_name(r: Any) -> str:
    """What the volume is: the average of K samples, a point estimate, the posterior mean, one sample; nothing for classical methods."""
    if r.method in CLASSICAL:
        return ""
    names = {"mean": "posterior mean, one evaluation", "point": "point estimate", "sample": "one posterior sample"}
    return names.get(r.estimate) or (f"average of {r.samples} samples" if r.samples > 1 else names["sample"])


def others(reconstruction: Any) -> dict[str, Any]:
    """The volumes beside the result by method, without the result's own."""
    return {name: volume for name, volume in reconstruction.beside.items() if name != reconstruction.method}


def held_out(reconstruction: Any) -> dict[str, dict[str, float]]:
    """Method -> {"error", "sigmas"} of the prediction of held-out measurements, lowest error first; empty without a cross-check."""
    found = (getattr(reconstruction, "cross_check", None) or {}).get("methods", {})
    return dict(sorted(found.items(), key=lambda item: item[1]["error"] if math.isfinite(item[1]["error"]) else math.inf))


def marks(reconstruction: Any) -> list[str]:
    """The warnings that every figure and page carries in capitals."""
    r, known = reconstruction, reconstruction.provenance.get
    so = {"SIMULATED": r.simulated, "OUT OF SCOPE": known("out_of_scope"), "CHECK FAILED": known("quality") == "failed"}
    return [mark for mark, holds in so.items() if holds]


def score(reconstruction: Any, method: str, index: int) -> str:
    """PSNR and SSIM of one slice as a caption or, without a reference, the error on held-out measurements; empty if neither is known."""
    found = reconstruction.metrics.get(method, {}) if reconstruction.metrics else {}
    parts, room = [], 4 if len(others(reconstruction)) < 2 else 2
    forms = (("psnr", "{:.1f} dB"), ("ssim", "SSIM {:.3f}"), ("psnr_body", "body {:.1f} dB"), ("psnr_head", "head {:.1f} dB"))
    for key, text in forms[:room]:
        values = found.get(key)
        if values is not None and index < len(values) and values[index] is not None and math.isfinite(values[index]):
            parts.append(text.format(values[index]))
    error = held_out(reconstruction).get(method, {}).get("error", math.nan)
    parts += [f"held-out error {100 * error:.1f} %"] if not parts and math.isfinite(error) else []
    return "  ·  ".join(parts)


def place_of(reconstruction: Any) -> tuple[dict[str, str], tuple[float, float], str]:
    """Orientation letters (none where the place is not known), (dy, dx), and the unit of lengths: mm, or px where sizes are not known."""
    known = reconstruction.provenance
    letters = {} if known.get("placed") is False else orientation(reconstruction.volume.affine)
    return letters, spacing(reconstruction.volume.affine), "px" if known.get("sized") is False else "mm"


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
    dx, dy = np.linalg.norm(np.asarray(affine, float)[:3, :2], axis=0)
    return float(dy), float(dx)


def windows_for(image: np.ndarray, style: Look) -> list[str]:
    """The names of the windows to show a slice in: the first preset, and lung where a good part of a CT's body is lung."""
    first, body = next(iter(style.presets)), style.mask(image)
    lung = (image > -970) & (image < -600) & body
    return [first, "Lung"] if "Lung" in style.presets and body.any() and lung.sum() > 0.08 * body.sum() else [first]


def find_detail(image: np.ndarray, style: Look) -> tuple[slice, slice]:
    """A square of a quarter of the image's side with the most structure within the window in it, inside the body where there is one."""
    side = max(8, min(image.shape) // 4)
    width, level = next(iter(style.presets.values()))
    low, high = level - width / 2, level + width / 2
    depth = ndimage.distance_transform_edt(style.mask(image))
    box = (min(side, image.shape[0]), min(side, image.shape[1]))
    structure = ndimage.uniform_filter(ndimage.generic_gradient_magnitude(np.clip(image, low, high), ndimage.sobel), box, mode="constant")
    structure *= ndimage.uniform_filter(((image > low) & (image < high)).astype(float), box, mode="constant")
    inside = ndimage.uniform_filter((depth > style.rim * min(image.shape)).astype(float), box, mode="constant")
    value = structure * (inside > 0.97) if (inside > 0.97).any() else structure * inside
    row, column = np.unravel_index(int(value.argmax()), value.shape) if value.any() else (image.shape[0] // 2, image.shape[1] // 2)
    top, left = (int(np.clip(at - n // 2, 0, size - n)) for at, n, size in zip((row, column), box, image.shape))
    return slice(top, top + box[0]), slice(left, left + box[1])


def difference_range(style: Look, *differences: np.ndarray) -> float:
    """A round half-range from the last difference given, up to half the look's span (CT: 50 to 500 HU)."""
    return _nice(1.5 * float(np.percentile(np.abs(differences[-1]), 99)), style.least, style) if differences else 0.1 * style.span


def std_range(style: Look, std: np.ndarray) -> float:
    """A round upper end of the standard deviation's scale (CT: 10 to 500 HU)."""
    return _nice(float(np.percentile(std, 99.5)), 1, style)


def _nice(value: float, least: int, style: Look) -> float:
    steps = [round(s * style.span / 100, 9) for s in (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 50) if s >= least]
    return float(next((s for s in steps if s >= value), steps[-1]))


# --------------------------------------------------------------------------------------------------------------------- the figure


def rows_of(reconstruction: Any, index: int) -> list[tuple[str, list[Panel | None]]]:
    """The figure's rows as (label, panels): grey windows, the detail, and the differences with the standard deviation."""
    r, style = reconstruction, look(reconstruction)

    def image(volume: Any) -> np.ndarray:
        return np.asarray(volume.data[index], float) / style.factor

    out, ref, std = image(r.volume), *(None if v is None else image(v) for v in (r.reference, r.std))
    shown, name = out if ref is None else ref, method_name(r.method)
    columns: list[tuple[str, str, np.ndarray]] = [] if ref is None else [("Reference", "", ref)]
    columns += [(method_name(m), score(r, m, index), image(v)) for m, v in others(r).items()]
    columns.append((name, score(r, r.method, index), out))

    rows, windows = list[tuple[str, list[Panel | None]]](), windows_for(shown, style)
    for label, window in (*zip(windows, windows), ("Detail", windows[0])):
        width, level = style.presets[window]
        limits = (level - width / 2, level + width / 2)
        panels: list[Panel | None] = [Panel(i, "grey", limits, t, n * (not rows), label == "Detail") for t, n, i in columns]
        rows.append((f"{label}   W {width:g}  L {level:g}", panels))

    spread = None if std is None else Panel(std, "std", (0, std_range(style, std)), "Standard deviation", f"of {r.samples} samples")
    errors = [(f"{name} − {t}", out - i, "") for t, _, i in columns[:-1]]
    if ref is not None:
        errors = [(f"{t} − reference", i - ref, _rms(i - ref, ref, style)) for t, _, i in columns[1:]]
    half = difference_range(style, *(e for _, e, _ in errors))
    maps: list[Panel | None] = [Panel(e, "difference", (-half, half), t, n) for t, e, n in errors]
    if len(maps) == 1 and ref is None:  # one method beside the result, nothing to be judged by: a third column
        rows[0][1].extend(maps)
        for row in rows[1:]:
            row[1].append(None)
        rows[1][1][-1] = spread
    elif maps or spread is not None:
        if spread is None:
            rows_in = find_detail(shown, style)[0]
            lines = [(t, i[(rows_in.start + rows_in.stop) // 2]) for t, _, i in columns]
            spread = Panel(lines, "profile", style.profile, "Profile", f"{style.unit} along the dotted line")
        rows.append(("Difference" if std is None else "Spread and difference", [*maps, spread] if ref is None else [spread, *maps]))
    return rows


def _rms(error: np.ndarray, ref: np.ndarray, style: Look) -> str:
    region = style.mask(ref)
    note, chosen = (style.error, error[region]) if region.any() else (style.error.replace(f" in {style.region}", ""), error)
    return note.format(round(float(np.sqrt(np.mean(chosen**2))), style.digits))


def figure(reconstruction: Any, slice_index: int | None = None) -> Figure:
    """The report's figure: one slice, one window for all columns, scale bars in the unit and in mm."""
    r = reconstruction
    count = len(r.volume.data)
    index = count // 2 if slice_index is None else slice_index
    if not 0 <= index < count:
        raise ValueError(f"slice {index} of {count}")
    rows, style = rows_of(r, index), look(r)
    letters, (dy, dx), length = place_of(r)
    ny, nx = r.volume.data.shape[-2:]
    detail = find_detail(np.asarray((r.reference or r.volume).data[index], float) / style.factor, style)
    # everything in inches, measured from the top
    columns = max(len(panels) for _, panels in rows)
    wide, gap, left, right, header, footer = 3.3, 0.14, 1.05, 0.85, 1.0, 0.72
    titles = [0.44 if not number or any(p and p.kind != "grey" for p in panels) else gap for number, (_, panels) in enumerate(rows)]
    high = float(np.clip(wide * ny * dy / (nx * dx), 0.4 * wide, 1.8 * wide))
    total_w = left + columns * wide + (columns - 1) * gap + right
    total_h = header + sum(titles) + len(rows) * high + footer
    fig = Figure(figsize=(total_w, total_h), facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        return fig.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))

    def text(x: float, y: float, words: str, **style: Any) -> None:
        fig.text(x / total_w, 1 - y / total_h, words, **{"family": ["DejaVu Sans"], "color": _INK, **style})

    def caption(x: float, top: float, panel: Panel) -> None:
        text(x, top - 0.1, panel.title, size=10.5, weight="bold", va="bottom")
        text(x + wide, top - 0.1, panel.note, size=8.5, color=_GREY, ha="right", va="bottom")

    badges = marks(r)
    text(left, 0.34, _cut(r.title, int(7.4 * (total_w - left - right - 1.6 * len(badges)))), size=14, weight="bold", va="center")
    words = [f"{method_name(r.method)}" + (f", {estimate_name(r)}" if estimate_name(r) else ""), f"slice {index + 1} of {count}"]
    words.append(str(r.provenance.get("protocol") or ""))
    text(left, 0.66, "   ·   ".join(filter(None, words)), size=9.5, color=_GREY, va="center")
    for place, badge in enumerate(badges):
        text(total_w - right - 1.55 * place, 0.34, badge, size=11.5, weight="bold", color="white", ha="right", va="center",
             bbox={"boxstyle": "round,pad=0.4", "facecolor": _RED, "edgecolor": "none"})
    text(total_w - right, 0.70, NOTICE, size=8.5, color=_RED, ha="right", va="center")

    for number, (label, panels) in enumerate(rows):
        top = header + sum(titles[: number + 1]) + number * high
        text(0.2, top + high / 2, label, size=9, color=_GREY, rotation=90, ha="center", va="center")
        scales: dict[str, tuple[str, ScalarMappable]] = {}
        for column, panel in ((c, p) for c, p in enumerate(panels) if p is not None):
            x = left + column * (wide + gap)
            if panel.kind == "profile":
                _profile(axes(x, top + 0.08, wide - 0.1, high - 0.42), panel, dx, length, "right" if column else "left")
                caption(x, top, panel)
                continue
            ax = axes(x, top, wide, high)
            image = panel.image[detail] if panel.detail else panel.image
            scale = _show(ax, image, panel, (dy, dx))
            _scale_bar(ax, image.shape[1], dx, length, panel.kind == "difference")
            if not panel.detail:
                if panel.kind == "grey" and not number:
                    (y0, y1), (x0, x1) = ((part.start, part.stop) for part in detail)
                    ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=_ACCENT, linewidth=1.1))
                    if any(p is not None and p.kind == "profile" for _, others in rows for p in others):
                        ax.axhline((detail[0].start + detail[0].stop) // 2, color=_ACCENT, linewidth=0.8, linestyle=":")
                _letters(ax, letters, panel.kind)
            if r.simulated and panel.kind == "grey" and panel.title != "Reference":
                ax.text(0.985, 0.02, "SIMULATED", transform=ax.transAxes, color="white", size=6, ha="right", va="bottom", bbox=_SHADE)
            if not (panel.detail or (number and panel.kind == "grey")):
                caption(x, top, panel)
            scales.setdefault(panel.kind, ("left" if column == 0 else "right", scale))
        for side, scale in scales.values():
            x = left - 0.22 if side == "left" else left + columns * (wide + gap) - gap + 0.08
            _colour_bar(fig, axes(x, top + 0.12 * high, 0.13, 0.76 * high), scale, side, style.unit)
    text(left, total_h - 0.36, _provenance_line(r.provenance, int(13 * (total_w - left - right))), size=7.5, color=_GREY, va="center")
    return fig


def _show(ax: Axes, image: np.ndarray, panel: Panel, pixel: tuple[float, float]) -> ScalarMappable:
    colours = {"grey": "gray", "difference": "RdBu_r", "std": "magma"}[panel.kind]
    drawn = ax.imshow(image, cmap=colours, vmin=panel.window[0], vmax=panel.window[1], aspect="auto", origin="upper",
                      interpolation="bicubic" if panel.detail else "antialiased")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color="#c4ccd4", linewidth=0.6)
    return ScalarMappable(Normalize(*panel.window), drawn.cmap)


def _scale_bar(ax: Axes, columns: int, dx: float, unit: str, light: bool) -> None:
    width = columns * dx
    length = next((v for v in (200, 100, 50, 20, 10, 5, 2, 1) if v <= 0.3 * width), 1)
    ends = [0.035, 0.035 + length / width]
    if not light:
        ax.plot(ends, [0.04, 0.04], transform=ax.transAxes, color="black", linewidth=5, alpha=0.8)
    ax.plot(ends, [0.04, 0.04], transform=ax.transAxes, color=_INK if light else "white", linewidth=2, solid_capstyle="butt")
    ax.text(sum(ends) / 2, 0.06, f"{length} {unit}", transform=ax.transAxes, color=_INK if light else "white", size=7,
            ha="center", va="bottom", bbox={**_SHADE, "facecolor": "white" if light else "black"})


def _profile(ax: Axes, panel: Panel, dx: float, unit: str, side: Literal["left", "right"]) -> None:
    colours = iter(("#e0a030", "#8a63b8", "#4c9a5b", "#b8607f"))
    last = len(panel.image) - 1
    for number, (name, line) in reversed(list(enumerate(panel.image))):
        colour = "#0b6fd0" if number == last else _INK if name == "Reference" else next(colours)
        width = 1.1 if number == last else 1.3 if name == "Reference" else 0.6
        ax.plot(np.arange(len(line)) * dx, line, label=name, color=colour, linewidth=width, zorder=1 if width == 0.6 else 2)
    ax.set_xlim(0, (len(panel.image[0][1]) - 1) * dx)
    ax.set_ylim(*panel.window)
    ax.set_xlabel(unit, size=7.5, color=_GREY, labelpad=1)
    ax.yaxis.set_ticks_position(side)
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


def _colour_bar(fig: Figure, ax: Axes, scale: ScalarMappable, side: str, unit: str) -> None:
    bar = fig.colorbar(scale, cax=ax, extend="neither")
    low, high = scale.get_clim()
    ticks = np.linspace(low, high, 5 if low < 0 else 6)
    bar.set_ticks(list(ticks), labels=[f"{round(t, 9):.4g}".replace("-", "\u2212") for t in ticks])
    bar.ax.tick_params(labelsize=7.5, color=_GREY, labelcolor=_GREY, length=2, left=side == "left", right=side == "right",
                       labelleft=side == "left", labelright=side == "right")
    bar.ax.set_title(unit.replace(" ", "\n"), size=7.5, color=_GREY, pad=4)
    bar.outline.set_edgecolor("#c4ccd4")


def _provenance_line(provenance: Mapping[str, Any], length: int) -> str:
    first = ("model", "model_sha256", "seed", "steps", "deft_med", "noise", "device", "torch")
    left_out = {*"protocol method estimate samples simulated out_of_scope quality source source_sha256 placed sized".split()}
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
