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
    CLASSICAL,
    METHODS,
    NOTICE,
    Look,
    difference_range,
    estimate_name,
    figure,
    find_detail,
    held_out,
    look,
    marks,
    method_name,
    others,
    place_of,
    std_range,
)
from .metrics import mean_sd
from .trust import DIRECT, worth

LIMIT = 8_000_000
"""Bytes that a page may have: of a long series, evenly spaced slices are embedded."""

LETTERS = "; R, L, A, P are the patient's right, left, anterior and posterior"
METRIC_NAMES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "nmse": "NMSE", "psnr_body": "PSNR, body (dB)", "ssim_body": "SSIM, body",
                "psnr_head": "PSNR, head (dB)", "ssim_head": "SSIM, head"}  # fmt: skip


def page(reconstruction: Any, drawn: Any = None) -> str:
    """The report as one HTML document: header, key numbers, viewer, the figure of the middle slice (or what is ``drawn``), tables."""
    drawing, drawn = io.BytesIO(), drawn or figure(reconstruction)
    drawn.savefig(drawing, format="png", dpi=110, metadata={"Software": "deft_med"})
    r = reconstruction
    title = f"{'SIMULATED: ' if r.simulated else ''}{r.title}"
    template = Template((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    tables = [_metrics_table(r), _cross_table(r), _chi2_table(r), _trust_table(r), _timing_table(r), _provenance_table(r)]
    image = base64.b64encode(drawing.getvalue()).decode()
    room = LIMIT - len(image) - len(template.template) - sum(map(len, tables)) - 20_000
    letters, _, length = place_of(r)
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
        figure_width=max(980, round(81 * drawn.get_size_inches()[0])),
        figure_words="Figures show one window for all images" + (LETTERS if letters else ""),
        unit=look(r).unit.rstrip(".").replace(" ", "\u00a0"),
        length=length,
        figure_alt=html.escape(f"{title}: {', '.join(subtitle)}"),
        tables="\n".join(t for t in tables if t),
        data=json.dumps(viewer_data(r, room), separators=(",", ":")).replace("<", "\\u003c"),
    )


def _badges(r: Any) -> str:
    measured = "" if r.simulated else '<span class="badge measured">MEASURED</span> '
    return measured + " ".join(f'<span class="badge">{mark}</span>' for mark in marks(r))


def _kind(r: Any) -> str:
    names = [{"fbp": "filtered backprojection"}.get(m, method_name(m)) for m in others(r)]
    missing = "There is no reference" + (f": differences are to {' and '.join(', '.join(names).rsplit(', ', 1))}." if names else ".")
    if not r.simulated:
        text = f"Reconstructed from measured data. {missing if r.reference is None else 'The reference came with the data.'}"
    elif r.reference is None:
        text = f"The acquisition was simulated. It is not an examination. {missing}"
    else:
        text = "Retrospective study: the acquisition was simulated from a finished image, which is the reference. It is not an examination."
    flags = r.provenance.get("out_of_scope")
    return text + (f" Outside the scope of the model: {'; '.join(map(str, flags))}." if flags else "")


# --------------------------------------------------------------------------------------------------------------------- the viewer


def viewer_data(reconstruction: Any, room: int = LIMIT) -> dict[str, Any]:
    """What the viewer shows: volumes packed slice by slice, as many evenly spaced slices as fit into `room` characters.

    Numbers are in the look's unit; `scale` says how many steps of a packed volume are one unit.
    """
    r, style = reconstruction, look(reconstruction)
    volumes = {"result": r.volume, **others(r), "reference": r.reference, "std": r.std}
    known = {key: volume.data for key, volume in volumes.items() if volume is not None}
    scales = {key: _steps(data, 10 if key == "std" else 1, style) for key, data in known.items()}

    def packed(key: str, index: int) -> str:
        return pack(np.asarray(known[key][index], np.float64) / style.factor, scales[key])

    count = len(r.volume.data)
    middle = count // 2
    fit = max(1, min(count, int(0.97 * room / max(sum(len(packed(key, middle)) for key in known), 1))))
    chosen = [middle] if fit == 1 else sorted({round(i) for i in np.linspace(0, count - 1, fit)})
    shown = {key: np.asarray(data[middle], float) / style.factor for key, data in known.items()}
    rows, columns = find_detail(shown.get("reference", shown["result"]), style)
    panels = _panels(r)
    spread = [shown["result"] - shown[p["minus"]] for p in panels if p.get("minus") and p["key"] == "result"]
    spread = spread[:1] if r.reference is not None else spread  # the prior's part has its colours from what is wrong
    letters, pixel, length = place_of(r)
    return {
        "shape": list(r.volume.data.shape[-2:]),
        "spacing": pixel,
        "length": length,
        "letters": letters,
        "unit": style.unit,
        "factor": style.factor,
        "digits": style.digits,
        "simulated": bool(r.simulated),
        "slices": chosen,
        "count": count,
        "start": chosen.index(min(chosen, key=lambda i: abs(i - middle))),
        "panels": panels,
        "columns": max(p.get("column", 1) for p in panels) if "column" in panels[0] else 2 if len(panels) == 4 else min(3, len(panels)),
        "presets": {key: list(value) for key, value in style.presets.items()},
        "difference": difference_range(style, *spread),
        "spread": std_range(style, shown["std"]) if "std" in shown else 0.1 * style.span,
        "detail": [rows.start, rows.stop, columns.start, columns.stop],
        "scores": {key: {m: [_json_number(values[i]) for i in chosen] for m, values in _lists(r, method).items()}
                   for key, method in (("result", r.method), *((m, m) for m in others(r))) if _lists(r, method)},
        "scale": scales,
        "volumes": {key: [packed(key, i) for i in chosen] for key in known},
    }  # fmt: skip


def _panels(r: Any) -> list[dict[str, Any]]:
    """The viewer's panels in reading order; with three images and more, differences and deviation stand in the columns of their images."""
    name, beside = method_name(r.method), list(others(r))
    images = ["reference"] * (r.reference is not None) + [*beside, "result"]
    titles = {"reference": "Reference", **{m: method_name(m) for m in beside}, "result": name}
    panels: list[dict[str, Any]] = [{"key": key, "title": titles[key]} for key in images]
    if r.std is not None:
        place = 1 if r.reference is not None else len(images)
        words = "Standard deviation" if len(images) < 5 else "SD"
        panels.append({"key": "std", "title": f"{words} of {r.samples} samples", "column": place})
    for key in [*beside, "result"] if r.reference is not None else []:
        panels.append({"key": key, "minus": "reference", "title": f"{titles[key]} − reference", "column": 1 + images.index(key)})
    prior = [] if r.method in CLASSICAL else beside[:1]
    for key in beside if r.reference is None else prior:
        place = images.index(key if r.reference is None else "result")
        panels.append({"key": "result", "minus": key, "title": f"{'Prior: ' if key in prior else ''}{name} − {titles[key]}",
                       "column": 1 + place})
    if len(images) < 3:
        return [{key: value for key, value in p.items() if key != "column"} for p in panels]
    return [{"column": 1 + k, **p} for k, p in enumerate(panels[: len(images)])] + sorted(panels[len(images) :], key=lambda p: p["column"])


def _steps(data: np.ndarray, fine: int, style: Look) -> float:
    """Steps of int16 per unit: as fine as the look wants, `fine` times finer for deviations, and the largest value still fits."""
    largest = float(np.abs(data).max()) / style.factor
    return min(fine / style.grain, 32767 / largest) if largest else fine / style.grain


def pack(image: np.ndarray, scale: float = 1) -> str:
    """An image as base64 of zlib of int16: `round(scale * value)`, differences along rows, low bytes before high bytes."""
    values = np.clip(np.rint(np.nan_to_num(np.asarray(image, np.float64)) * scale), -32768, 32767).astype(np.int16)
    steps = np.diff(values, axis=1, prepend=np.int16(0)).astype("<i2")
    planes = steps.reshape(-1).view(np.uint8).reshape(-1, 2).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, int], scale: float = 1) -> np.ndarray:
    """The inverse of `pack`, to half of 1 / scale."""
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
    ours, region = _lists(r, r.method), look(r).region
    wanted = {"psnr": ("PSNR", "{:.1f} dB"), "ssim": ("SSIM", "{:.3f}"), f"psnr_{region}": (f"PSNR in the {region}", "{:.1f} dB")}
    for key, (name, form) in wanted.items():
        if key in ours:
            best = max(((mean_sd(_lists(r, m)[key])[0], m) for m in others(r) if key in _lists(r, m)), default=None)
            note = f"{method_name(best[1])} {_format(best[0], form)}" if best else ""
            cards.append((name, _format(mean_sd(ours[key])[0], form), note))
    errors = {m: 100 * v["error"] for m, v in held_out(r).items()}
    if r.method in errors:
        best_other = next((m for m in errors if m != r.method), None)
        note = f"{method_name(best_other)} {_format(errors[best_other], '{:.1f} %')}" if best_other else ""
        cards.append(("Held-out error", _format(errors[r.method], "{:.1f} %"), note))
    if r.chi2 and _finite(r.chi2.get("mean")):
        key = "samples" if _finite(r.chi2.get("samples")) else "mean"
        note = f"{'image' if key == 'mean' else 'images' if r.estimate == 'point' else 'samples'}, expected 1"
        note += f" ± {r.chi2['deviation']:.2g}" if _finite(r.chi2.get("deviation")) else ""
        cards.append(("Data consistency χ²", f"{r.chi2[key]:.3f}", note))
    if made := _trust(r, "interval"):
        cards.append((f"{100 * made['level']:g} % interval", f"± {made['half_width_in_std']:.2f} SD", worth(made)))
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
    methods = [m for m in dict.fromkeys([*METHODS, *(r.metrics or {})]) if m in (r.metrics or {}) and m != r.method]
    methods += [r.method] if r.method in (r.metrics or {}) else []
    if not methods:
        return ""
    keys = [k for k in METRIC_NAMES if any(k in _lists(r, m) for m in methods)]
    n = max(len(v) for m in methods for v in _lists(r, m).values())
    rows = []
    for m in methods:
        lists = _lists(r, m)
        rows.append((method_name(m), *(_mean_sd(lists[k], k) if k in lists else "–" for k in keys)))
    head = ("Method", *(METRIC_NAMES[k] for k in keys))
    text = (f"{'Mean ± SD over ' + str(n) + ' slices' if n > 1 else 'One slice'}. {look(r).signal}; "
            f"full frame, and inside the reference's {look(r).region} mask.")  # fmt: skip
    table = _table("Agreement with the reference", text, head, rows, strong=len(rows) - 1)
    if n > 1:
        each = [(str(i + 1), *(_one(_lists(r, m).get(k, []), i, k) for m in methods for k in ("psnr", "ssim"))) for i in range(n)]
        head = ("Slice", *(f"{method_name(m)} {k.upper()}" for m in methods for k in ("psnr", "ssim")))
        table += f"<details><summary>Slice by slice</summary>{_table('', '', head, each)}</details>"
    return f"<section{' class=wide' if len(keys) > 4 else ''}>{table}</section>"


def _cross_table(r: Any) -> str:
    found = held_out(r)
    if not found:
        return ""
    share = r.cross_check.get("share")
    rows = [(method_name(m), _format(100 * v["error"], "{:.2f} %"), _format(v["sigmas"], "{:.2f}"), _behind(v)) for m, v in found.items()]
    part = f"{100 * share:g} %" if _finite(share) else "A part"
    text = (f"{part} of the measurements was held out. Each method reconstructed the image from the rest, and what that image predicts was "
            "compared with what had been measured. Error: RMS of predicted minus measured, in per cent of the RMS of the measured. In "
            "sigmas: the same RMS in units of the noise, whose level may itself be an estimate; the true image would reach 1. Behind the "
            "best: the difference of the errors, ± its standard error over what was held out.")  # fmt: skip
    own = list(found).index(r.method) if r.method in found else -1
    head = ("Method", "Error", "In sigmas", "Behind the best")
    return f"<section>{_table('Prediction of measurements that were held out', text, head, rows, strong=own)}</section>"


def _behind(found: dict[str, Any]) -> str:
    if not found.get("behind"):
        return "–"
    return f"{100 * found['behind']:.2f} %" + (f" ± {100 * found['behind_se']:.2f}" if _finite(found["behind_se"]) else "")


def _chi2_table(r: Any) -> str:
    shown = method_name(r.method) + ("" if r.method in CLASSICAL else ", shown")
    names = {"reference": "Reference", "samples": "Images averaged" if r.estimate == "point" else "Posterior samples",
             "mean": shown}
    names |= {m: method_name(m) for m in r.chi2 or {} if m not in (*names, r.method, "expected", "deviation", "measurements")}
    rows = [(names[k], f"{r.chi2[k]:.3f}") for k in names if r.chi2 and _finite(r.chi2.get(k))]
    if not rows:
        return ""
    expected = f"{r.chi2.get('expected', 1.0):g}"
    expected += f" ± {r.chi2['deviation']:.1g} (√(2 / M), M = {r.chi2['measurements']} measurements)" if "deviation" in r.chi2 else ""
    text = (f"Mean of ((y − A x) / σ)² over the measurements. Expected {expected} for the true image and for a posterior sample, less "
            "for a mean of samples; much more means that the image contradicts the data. What the grid and the model of the measurements "
            "cannot show adds to it")  # fmt: skip
    text += ": the reference's own χ² says how much." if "reference" in names and _finite(r.chi2.get("reference")) else "."
    text += "" if look(r).unit != "HU" else (" 0.85 to 1 is usual in CT: the noise level here allows for detail finer than the pixels, "
                                             "and most scans have less of it.")  # fmt: skip
    quality = _trust(r, "quality")
    if r.method in DIRECT:
        text += f" Nothing is checked: {method_name(r.method)} is one formula, which need not meet the data."
    elif quality.get("limit"):
        text += f" Here the limit is {quality['limit']:.3f}, {quality['because']}. The check {quality['check']}."
    return f"<section>{_table('Agreement with the data', text, ('Image', 'χ²'), rows)}</section>"


def _trust(r: Any, part: str) -> dict[str, Any]:
    return (getattr(r, "trust", None) or {}).get(part) or {}


def _trust_table(r: Any) -> str:
    made, prior = _trust(r, "interval"), _trust(r, "prior")
    if not made:
        return ""
    known = (("Wanted", made["level"]), ("On the subjects of the calibration", made.get("coverage_on_tune_subjects")),
             (f"Here, in the {prior['region']} of the reference", made.get("coverage")))
    rows = [(name, f"{100 * value:.1f} %") for name, value in known if value is not None]
    rows += [("Here", "not known without a reference")] * (made.get("coverage") is None)
    text = (f"The interval of a pixel is its value ± {made['half_width_in_std']:.3g} standard deviations of {made['samples']} samples: "
            f"Student's t, and a factor {made['factor']:.3g} ({worth(made)}). It speaks of pixels one by one.")  # fmt: skip
    if prior.get("rms") is not None:
        text += (f" RMS of {method_name(r.method)} − {method_name(prior['against'])} in the {prior['region']}: {prior['rms']:.4g} "
                 f"{prior['unit']}; the panel “Prior” shows where it is largest.")  # fmt: skip
    return f"<section>{_table('Intervals, and the part of the prior', text, ('Share of pixels in the interval', ''), rows)}</section>"


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
    parts = getattr(r, "profile", None) or {}
    total = sum(parts.values())
    words = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts.items()) if total > 0 else ""
    below = f"<p>{html.escape(method_name(r.method))}: {html.escape(words)}.</p>" if words else ""
    return f"<section><h2>Time</h2><table><thead>{head}</thead><tbody>{rows}</tbody></table>{below}</section>"


def _provenance_table(r: Any) -> str:
    names = {"placed": "place known", "sized": "pixel size known"}
    rows = "".join(
        f'<tr><th scope="row">{html.escape(names.get(k, str(k).replace("_", " ")))}</th>'
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


def _mean_sd(values: list[float], key: str) -> str:
    mean, sd = mean_sd(values)
    digits = _digits(key)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if _finite(sd) else _format(mean, f"{{:.{digits}f}}")


def _digits(key: str) -> int:
    return 4 if key == "nmse" else 3 if "ssim" in key else 2


def _one(values: list[float], index: int, key: str) -> str:
    return _format(values[index], f"{{:.{_digits(key)}f}}") if index < len(values) else "–"


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
