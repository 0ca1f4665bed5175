"""The figures of a benchmark: quality against time, a sweep over steps, and the ranks of the truth among the samples.

Colours are those of Okabe and Ito, told apart with any colour vision, and every family has a marker of its own.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator

from .methods import GUIDED, POSTERIOR, TRAINED, parse

FAMILIES = {"without a network": ("#5b6875", "s"), "networks trained on pairs": ("#d55e00", "^"), "guided prior": ("#e69f00", "D"),
            "guided prior, deepinv's code": ("#009e73", "v"), "DEFT": ("#0072b2", "o")}  # fmt: skip
NAMES = {"fbp": "FBP", "tv": "TV", "zero-filled": "Zero-filled", "cg-sense": "CG-SENSE", "wavelet": "Wavelets",
         "interpolation": "Interpolation", "projections": "Projections", "supervised": "U-Net", "conditional": "Conditional",
         "deft": "DEFT", "deft-dc": "DEFT without CG", "deft+dc": "DEFT + CG", "deft-online": "DEFT online", "dps": "DPS", "pigdm": "ΠGDM",
         "dds": "DDS", "ddnm": "DDNM+",
         "diffpir": "DiffPIR", "red-diff": "RED-diff", "reconstruction": "Rec. guidance", "deepinv-dps": "DPS (deepinv)",
         "deepinv-diffpir": "DiffPIR (deepinv)"}  # fmt: skip
CROWD = 8  # with more methods than these the left side has their numbers, which stand beside their names at the right
_INK, _GREY, _GRID, _BLUE, _ORANGE = "#16202a", "#5b6875", "#e4e9ee", "#0072b2", "#d55e00"


def family(method: str) -> str:
    """To which of `FAMILIES` a method belongs."""
    name = parse(method).name
    if name in TRAINED:
        return "networks trained on pairs"
    if name in GUIDED:
        return "guided prior, deepinv's code" if name.startswith("deepinv") else "guided prior"
    return "DEFT" if name in POSTERIOR or name == "deft-online" else "without a network"


def labels(rows: Sequence[Mapping]) -> dict[str, str]:
    """A short name for every method: what a reader calls it and how many samples; where two would be called alike, of how many steps,
    or its own text."""
    short = {}
    for r in rows:
        entry = parse(r["method"])
        anew = ", noise anew" if entry.name in POSTERIOR and "zeta" in entry.settings else ""
        drawn = "mean" if entry.count == 0 else f"{r['samples']} samples" if r["samples"] > 1 else "sample"
        short[r["method"]] = NAMES[entry.name] + (f", {drawn}{anew}" if entry.samples else "")
    alike = {m for m, words in short.items() if list(short.values()).count(words) > 1}
    short |= {m: f"{short[m]}, {parse(m).steps} steps" for m in alike if parse(m).steps}
    said = list(short.values())
    return {method: words if said.count(words) == 1 else method for method, words in short.items()}


def quality(path: str | Path, rows: Sequence[Mapping], reference: str, title: str = "", clock: str = "seconds") -> None:
    """Draw PSNR against seconds, and the paired differences with their 95 % confidence intervals, to a PNG.

    ``rows`` are those of ``scores.summary``. Both sides show differences from ``reference`` on the slices that both have, so that methods
    with fewer slices (hollow markers) are compared with it on those. ``clock``: "seconds" of the wall, or "cpu_seconds", which do not
    depend on what else the machine does.
    """
    shown = [r for r in rows if r["paired"]["psnr"] is not None]
    names, most = labels(shown), max((r["slices"] for r in shown), default=0)
    fig = Figure(figsize=(12.5, max(4.6, 1.6 + 0.34 * len(shown))), facecolor="white", layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
    differences = {r["method"]: r["paired"]["psnr"]["difference"] for r in shown}
    points = [(r[clock]["mean"], differences[r["method"]]) for r in shown]
    used = {family(r["method"]): None for r in shown}
    for r, (x, y) in zip(shown, points, strict=True):
        colour, marker = FAMILIES[family(r["method"])]
        left.plot(x, y, marker, color=colour, markersize=8, markerfacecolor=colour if r["slices"] == most else "white", markeredgewidth=1.6,
                  zorder=3)
    for name, (colour, marker) in FAMILIES.items():
        if name in used:
            left.plot([], [], marker, color=colour, markersize=7, label=name)
    if any(r["slices"] < most for r in shown):
        left.plot([], [], "o", color=_GREY, markersize=7, markerfacecolor="white", label="hollow: fewer slices")
    left.set_xscale("log")
    left.set(xlabel={"seconds": "wall seconds per slice", "cpu_seconds": "CPU-seconds per slice"}[clock],
             ylabel=f"PSNR minus that of {names.get(reference, reference)} (dB)")
    left.margins(0.14, 0.1)
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
    of = next((r for r in shown if r["method"] == reference), None)
    if of is not None and of["psnr"]:
        left.annotate(f"{of['psnr']['mean']:.2f} dB", (0, 0), xycoords=("axes fraction", "data"), xytext=(3, 3),
                      textcoords="offset points", va="bottom", size=8, color=_GREY)
    fig.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower center", ncols=len(used) + 1)
    if title:
        fig.suptitle(title, size=10, color=_INK)
    fig.get_layout_engine().set(rect=(0, 0, 0.99, 1))  # type: ignore[union-attr, call-arg]
    order = sorted((r["method"] for r in shown if r["method"] != reference), key=lambda m: -differences[m])
    numbers = {m: str(k) for k, m in enumerate(order, 1)} if len(shown) > CROWD else {}
    _forest(right, shown, {m: f"{name}   {numbers[m]}" if m in numbers else name for m, name in names.items()}, reference)
    for ax in (left, right):
        _clean(ax)
    fig.draw_without_rendering()
    _place(left, points, [numbers.get(r["method"], names[r["method"]]) for r in shown])
    fig.savefig(Path(path), format="png", dpi=130)


def _forest(ax: Axes, rows: Sequence[Mapping], names: Mapping[str, str], reference: str) -> None:
    ordered = sorted((r for r in rows if r["method"] != reference), key=lambda r: r["paired"]["psnr"]["difference"])
    for place, r in enumerate(ordered):
        found, (colour, marker) = r["paired"]["psnr"], FAMILIES[family(r["method"])]
        if found["low"] is not None:
            ax.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(found["difference"], place, marker, color=colour, markersize=6)
        words = f"{found['difference']:+.2f}" + ("" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]")
        ax.annotate(f"{words.replace('-', '−')}  n={found['subjects']}", (1.02, place), xycoords=("axes fraction", "data"), va="center",
                    size=8, color=_INK, annotation_clip=False)
    ax.axvline(0, color=_GREY, linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(ordered)), [names[r["method"]] for r in ordered], size=8.5)
    ax.set(xlabel=f"difference in PSNR from {names.get(reference, reference)} (dB), 95 % CI over n subjects",
           ylim=(-0.7, max(0.7, len(ordered) - 0.3)))


def _place(ax: Axes, points: Sequence[tuple[float, float]], words: Sequence[str], size: float = 8) -> None:
    """Write a label beside every point where it covers no other label and no marker; a thin line leads to one that is farther off."""
    scale = ax.figure.dpi / 72
    at = [ax.transData.transform(p) for p in points]
    frame, zero = ax.get_window_extent().extents, float(ax.transData.transform((1, 0))[1])
    taken = [(frame[0], zero - 1, frame[2], zero + 1), *((x - 7, y - 7, x + 7, y + 7) for x, y in at)]
    for (x, y), point, text in sorted(zip(at, points, words, strict=True), key=lambda item: item[0][1], reverse=True):
        width, height = 0.56 * size * scale * len(text), 1.25 * size * scale
        best: tuple[float, tuple, float, float] | None = None
        for distance in (13, 22, 34, 50, 70):
            for dx, dy in ((1, 0), (-1, 0), (0.6, 0.8), (-0.6, 0.8), (0.6, -0.8), (-0.6, -0.8), (0, 1), (0, -1)):
                cx, cy = x + dx * distance + (width / 2) * np.sign(dx), y + dy * distance
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = sum(max(0, d) for d in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3]))
                cost = sum(_overlap(box, other) for other in taken) + 100 * outside + distance
                if best is None or cost < best[0]:
                    best = cost, box, cx, cy
        assert best is not None
        taken.append(best[1])
        far = math.hypot(best[2] - x, best[3] - y) > 15 + width / 2
        ax.annotate(text, point, xytext=((best[2] - x) / scale, (best[3] - y) / scale), textcoords="offset points", ha="center",
                    va="center", size=size, color=_INK, zorder=2, path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()],
                    arrowprops={"arrowstyle": "-", "color": "#9aa5b1", "linewidth": 0.6, "shrinkB": 3} if far else None)


def _overlap(a: tuple, b: tuple) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return 20 + width * height if width > 0 and height > 0 else 0.0


def sweep(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Draw PSNR of one sample and of the average, the samples' deviation, chi2 and coverage against evaluations, to a PNG.

    ``rows`` are those of ``scores.sweep``.
    """
    fig = Figure(figsize=(10, 6.4), facecolor="white", layout="constrained")
    axes = fig.subplots(2, 2).ravel()
    nfe = [r["nfe_one"] for r in rows]
    axes[0].plot([r["nfe"] for r in rows], [r["average"] for r in rows], marker="o", color=_BLUE, linewidth=1.6, label="average")
    axes[0].plot(nfe, [r["one"] for r in rows], marker="^", color=_ORANGE, linewidth=1.6, label="one sample")
    axes[0].legend(frameon=False, fontsize=8.5)
    axes[0].set(ylabel="PSNR (dB)", xlabel="evaluations for the image")
    panels = (("std_ratio", "std of samples / std with most steps", 1.0, 0.1), ("chi2", "chi² of the samples", 1.0, 0.1),
              ("coverage", "share of pixels in the 90 % interval", 0.9, 0.05))  # fmt: skip
    for ax, (key, words, ideal, near) in zip(axes[1:], panels, strict=True):
        values = [math.nan if r[key] is None else r[key] for r in rows]
        ax.axhspan(ideal - near, ideal + near, color=_GRID, alpha=0.7, zorder=0)
        ax.axhline(ideal, color=_GREY, linewidth=1, linestyle="--")
        ax.plot(nfe, values, marker="o", color=_BLUE, linewidth=1.6)
        far = 1.1 * max([1.6 * near, *(abs(value - ideal) for value in values if math.isfinite(value))])  # no drama about a per cent
        ax.set(ylabel=words, xlabel="evaluations of a sample", ylim=(ideal - far, min(ideal + far, 1.0 if key == "coverage" else math.inf)))
    for ax in axes:
        ax.set_xscale("log")
        if ax is axes[0]:
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        else:
            ax.set_xticks(nfe, [f"{x:g}" for x in nfe])
        ax.minorticks_off()
        _clean(ax)
    if title:
        fig.suptitle(title, size=10, color=_INK)
    fig.savefig(Path(path), format="png", dpi=130)


def ranks(path: str | Path, rows: Sequence[Mapping]) -> None:
    """Draw the rank histograms of the rows that have one, side by side; the line is what calibrated samples give."""
    shown, names = [r for r in rows if r.get("ranks")], labels(rows)
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    fig = Figure(figsize=(2.9 * columns + 0.6, 2.4 * lines + 0.5), facecolor="white", layout="constrained")
    grid = np.ravel(fig.subplots(lines, columns, squeeze=False, sharey=True))
    for ax in grid[len(shown):]:
        ax.axis("off")
    for ax, r in zip(grid, shown):
        bars = np.asarray(r["ranks"]) * len(r["ranks"])
        ax.bar(np.arange(1, len(bars) + 1), bars, color=FAMILIES[family(r["method"])][0], width=0.85)
        ax.axhline(1, color=_INK, linewidth=1, linestyle="--")
        ax.set_title(f"{names[r['method']]}\n{100 * r['coverage']['mean']:.0f} % in the 90 % interval", size=8.5)
        ax.set_xlabel("rank of the reference among the samples", size=8)
        ax.set_xticks(range(1, len(bars) + 1))
        _clean(ax)
    fig.supylabel("frequency / uniform", size=8.5)
    fig.savefig(Path(path), format="png", dpi=130)


def _clean(ax: Axes) -> None:
    ax.grid(True, color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8.5)
