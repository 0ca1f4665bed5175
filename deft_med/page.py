"""The HTML page of a report: one file with everything inside, no request to anywhere, readable on screen and on paper."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .figure import (
    METRIC_NAMES,
    NOTICE,
    difference_range,
    estimate_name,
    figure,
    find_detail,
    marks,
    method_name,
    orientation,
    spacing,
    std_range,
)
from .metrics import mean_sd

LIMIT = 8_000_000
"""Bytes that a page may have: of a long series, evenly spaced slices are embedded."""

PRESETS = {"Soft tissue": (400, 40), "Brain": (80, 40), "Lung": (1500, -600), "Bone": (2000, 500), "Full": (3000, 500)}


def page(reconstruction: Any) -> str:
    """The report as one HTML document: header, key numbers, viewer, the figure of the middle slice, tables."""
    r = reconstruction
    title = f"{'SIMULATED: ' if r.simulated else ''}{r.title}"
    drawing = io.BytesIO()
    figure(r).savefig(drawing, format="png", dpi=110, metadata={"Software": "deft_med"})
    template = Template((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    tables = [_metrics_table(r), _chi2_table(r), _timing_table(r), _provenance_table(r)]
    image = base64.b64encode(drawing.getvalue()).decode()
    room = LIMIT - len(image) - len(template.template) - sum(map(len, tables)) - 20_000
    subtitle = [method_name(r.method) + (f", {estimate_name(r)}" if estimate_name(r) else ""), _count(len(r.volume.data), "slice")]
    return template.substitute(
        page_title=html.escape(title),
        title=html.escape(r.title),
        subtitle=html.escape(" · ".join(subtitle)),
        badge=_badges(r),
        kind=html.escape(_kind(r)),
        notice=html.escape(NOTICE),
        cards=_cards(r),
        figure=image,
        figure_alt=html.escape(f"{title}: {', '.join(subtitle)}"),
        tables="\n".join(t for t in tables if t),
        data=json.dumps(viewer_data(r, room), separators=(",", ":")).replace("<", "\\u003c"),
    )


def _badges(r: Any) -> str:
    measured = "" if r.simulated else '<span class="badge measured">MEASURED</span> '
    return measured + " ".join(f'<span class="badge">{mark}</span>' for mark in marks(r))


def _kind(r: Any) -> str:
    text = "Reconstructed from measured data. There is no reference: differences are to filtered backprojection."
    if r.simulated:
        text = "Retrospective study: the acquisition was simulated from a finished image, which is the reference. It is not an examination."
    flags = r.provenance.get("out_of_scope")
    return text + (f" Outside the scope of the model: {'; '.join(map(str, flags))}." if flags else "")


# --------------------------------------------------------------------------------------------------------------------- the viewer


def viewer_data(reconstruction: Any, room: int = LIMIT) -> dict[str, Any]:
    """What the viewer shows: volumes packed slice by slice, as many evenly spaced slices as fit into `room` characters."""
    r = reconstruction
    volumes = {"result": r.volume, "fbp": None if r.method == "fbp" else r.baseline, "reference": r.reference, "std": r.std}
    known = {key: volume.data for key, volume in volumes.items() if volume is not None}
    scales = {key: 10 if key == "std" else 1 for key in known}
    count = len(r.volume.data)
    middle = count // 2
    size = sum(len(pack(data[middle], scales[key])) for key, data in known.items())
    fit = max(1, min(count, int(0.97 * room / max(size, 1))))
    chosen = [middle] if fit == 1 else sorted({round(i) for i in np.linspace(0, count - 1, fit)})
    source = (r.volume if r.reference is None else r.reference).data
    best = np.asarray(r.volume.data[middle], float)
    other = r.baseline if r.reference is None else r.reference
    name = method_name(r.method)
    panels = [{"key": "reference", "title": "Reference"}] if "reference" in known else []
    panels += [{"key": "fbp", "title": "FBP"}] if "fbp" in known else []
    panels += [{"key": "result", "title": name}]
    panels += [{"key": "std", "title": f"Standard deviation of {r.samples} samples"}] if "std" in known else []
    if "reference" in known:
        panels += [{"key": "fbp", "minus": "reference", "title": "FBP − reference"}] if "fbp" in known else []
        panels += [{"key": "result", "minus": "reference", "title": f"{name} − reference"}]
    elif "fbp" in known:
        panels += [{"key": "result", "minus": "fbp", "title": f"{name} − FBP"}]
    rows, columns = find_detail(np.asarray(source[middle], float))
    return {
        "shape": list(r.volume.data.shape[-2:]),
        "spacing": spacing(r.volume.affine),
        "letters": orientation(r.volume.affine),
        "simulated": bool(r.simulated),
        "slices": chosen,
        "count": count,
        "start": chosen.index(min(chosen, key=lambda i: abs(i - middle))),
        "panels": panels,
        "presets": {key: list(value) for key, value in PRESETS.items()},
        "difference": difference_range(best - np.asarray(other.data[middle], float)),
        "spread": std_range(r.std.data[middle]) if r.std is not None else 100,
        "detail": [rows.start, rows.stop, columns.start, columns.stop],
        "scores": {key: {m: [_json_number(values[i]) for i in chosen] for m, values in _lists(r, method).items()}
                   for key, method in (("result", r.method), ("fbp", "fbp")) if _lists(r, method)},
        "scale": scales,
        "volumes": {key: [pack(data[i], scales[key]) for i in chosen] for key, data in known.items()},
    }  # fmt: skip


def pack(image: np.ndarray, scale: int = 1) -> str:
    """An image in HU as base64 of zlib of int16: `round(scale * value)`, differences along rows, low bytes before high bytes."""
    values = np.clip(np.rint(np.nan_to_num(np.asarray(image, np.float64)) * scale), -32768, 32767).astype(np.int16)
    steps = np.diff(values, axis=1, prepend=np.int16(0)).astype("<i2")
    planes = steps.reshape(-1).view(np.uint8).reshape(-1, 2).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, int], scale: int = 1) -> np.ndarray:
    """The inverse of `pack`, to 1 / scale HU."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, -1)
    steps = np.ascontiguousarray(planes.T).view("<i2").reshape(shape)
    return np.cumsum(steps, axis=1, dtype=np.int16).astype(np.float64) / scale


# --------------------------------------------------------------------------------------------------------------------- the tables


def _lists(r: Any, method: str) -> dict[str, list[float]]:
    found = (r.metrics or {}).get(method, {})
    lists = {key: values for key, values in found.items() if isinstance(values, (list, tuple))}
    return {key: [math.nan if v is None else float(v) for v in values] for key, values in lists.items()}


def _cards(r: Any) -> str:
    cards = []
    ours, theirs = _lists(r, r.method), _lists(r, "fbp") if r.method != "fbp" else {}
    for key, name, form in (("psnr", "PSNR", "{:.1f} dB"), ("ssim", "SSIM", "{:.3f}"), ("psnr_body", "PSNR in the body", "{:.1f} dB")):
        if key in ours:
            mean = mean_sd(ours[key])[0]
            note = f"FBP {form.format(mean_sd(theirs[key])[0])}" if key in theirs else ""
            cards.append((name, _format(mean, form), note))
    if r.chi2 and _finite(r.chi2.get("mean")):
        note = f"samples {r.chi2['samples']:.3f}" if _finite(r.chi2.get("samples")) else ""
        cards.append(("Data consistency χ²", f"{r.chi2['mean']:.3f}", note))
    if r.timing:
        total = sum(float(v) for v in r.timing.values())
        count = len(r.volume.data)
        cards.append(("Time", _seconds(total), f"{_seconds(total / count)} per slice" if count > 1 else ""))
    return "\n".join(
        f'<div class="card"><div class="name">{html.escape(n)}</div><div class="value">{html.escape(v)}</div>'
        f'<div class="note">{html.escape(s) or "&nbsp;"}</div></div>'
        for n, v, s in cards
    )


def _metrics_table(r: Any) -> str:
    methods = [m for m in dict.fromkeys([*("fbp", "tv", "supervised"), *(r.metrics or {})]) if m in (r.metrics or {}) and m != r.method]
    methods += [r.method] if r.method in (r.metrics or {}) else []
    if not methods:
        return ""
    keys = [k for k in METRIC_NAMES if any(k in _lists(r, m) for m in methods)]
    n = max(len(v) for m in methods for v in _lists(r, m).values())
    rows = []
    for m in methods:
        lists = _lists(r, m)
        rows.append((method_name(m), *(_mean_sd(lists[k], "ssim" in k) if k in lists else "–" for k in keys)))
    head = ("Method", *(METRIC_NAMES[k] for k in keys))
    text = (f"{'Mean ± SD over ' + str(n) + ' slices' if n > 1 else 'One slice'}. Both sides clipped to [−1000, 1000] HU, range 2000 HU; "
            "full frame, and inside the reference's body mask.")  # fmt: skip
    table = _table("Agreement with the reference", text, head, rows, strong=len(rows) - 1)
    if n > 1:
        each = [(str(i + 1), *(_one(_lists(r, m).get(k, []), i, k) for m in methods for k in ("psnr", "ssim"))) for i in range(n)]
        head = ("Slice", *(f"{method_name(m)} {k.upper()}" for m in methods for k in ("psnr", "ssim")))
        table += f"<details><summary>Slice by slice</summary>{_table('', '', head, each)}</details>"
    return f"<section>{table}</section>"


def _chi2_table(r: Any) -> str:
    shown = method_name(r.method) + ("" if r.method in ("fbp", "tv") else ", shown")
    names = {"reference": "Reference", "samples": "Posterior samples", "mean": shown, "fbp": "FBP"}
    if r.method == "fbp":
        names.pop("fbp")
    rows = [(names[k], f"{r.chi2[k]:.3f}") for k in names if r.chi2 and _finite(r.chi2.get(k))]
    if not rows:
        return ""
    expected = r.chi2.get("expected", 1.0)
    text = (f"Mean of ((y − A x) / σ)² over the measurements. Expected {expected:g} for the true image and for a posterior sample, less "
            "for a mean of samples; much more means that the image contradicts the data.")  # fmt: skip
    return f"<section>{_table('Agreement with the data', text, ('Image', 'χ²'), rows)}</section>"


def _timing_table(r: Any) -> str:
    if not r.timing:
        return ""
    longest = max(float(v) for v in r.timing.values()) or 1.0
    rows = "".join(
        f'<tr><td>{html.escape(str(k).replace("_", " "))}</td><td class="number">{_seconds(float(v))}</td>'
        f'<td class="bar"><span style="width:{100 * float(v) / longest:.1f}%"></span></td></tr>'
        for k, v in r.timing.items()
    )
    head = "<tr><th>Stage</th><th>Seconds</th><th></th></tr>"
    return f"<section><h2>Time</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table></section>"


def _provenance_table(r: Any) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(k).replace("_", " "))}</th>'
        f'<td class="{"hash" if "sha" in str(k) else ""}">{html.escape(_words(v))}</td></tr>'
        for k, v in r.provenance.items()
    )
    return f'<section><h2>Provenance</h2><table class="pairs"><tbody>{rows}</tbody></table></section>'


def _table(title: str, text: str, head: Iterable[str], rows: Iterable[Iterable[str]], strong: int = -1) -> str:
    body = ""
    for number, row in enumerate(rows):
        cells = [f'<td class="number">{html.escape(c)}</td>' if i else f'<th scope="row">{html.escape(c)}</th>' for i, c in enumerate(row)]
        body += f'<tr{" class=strong" if number == strong else ""}>{"".join(cells)}</tr>'
    heading = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    above = (f"<h2>{html.escape(title)}</h2>" if title else "") + (f"<p>{html.escape(text)}</p>" if text else "")
    return f"{above}<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _mean_sd(values: list[float], ratio: bool) -> str:
    mean, sd = mean_sd(values)
    digits = 3 if ratio else 2
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if _finite(sd) else _format(mean, f"{{:.{digits}f}}")


def _one(values: list[float], index: int, key: str) -> str:
    return _format(values[index], "{:.3f}" if "ssim" in key else "{:.2f}") if index < len(values) else "–"


def _format(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else ("∞" if value > 0 else "–")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating)) and math.isfinite(value)


def _json_number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _words(value: Any) -> str:
    if value is None or (isinstance(value, (list, tuple, Mapping)) and not value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
