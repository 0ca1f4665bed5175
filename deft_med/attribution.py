"""The words that travel with a model: attribution of its training data, its licence, its README; generated, never typed."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .card import ALL, Card, Collection
from .errors import ModelError

_ONE = re.compile(r"CC[ -]BY[ -][34]\.0|CC0(?:[ -]1\.0)?|MIT|BSD-[23]-Clause|Apache-2\.0", re.IGNORECASE)
_PLACED = rf"(?:{_ONE.pattern})(?: \((?:repository|figshare)\))?"
REDISTRIBUTABLE = re.compile(f"{_PLACED}(?:, {_PLACED})*", re.IGNORECASE)  # one licence, or several, each with where it stands
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]+/[\w.-]*\w")  # how a source that lies on GitHub begins
_LINKS = {"CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/", "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
          "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/", "MIT": "https://spdx.org/licenses/MIT.html",
          "BSD 2 CLAUSE": "https://spdx.org/licenses/BSD-2-Clause.html", "BSD 3 CLAUSE": "https://spdx.org/licenses/BSD-3-Clause.html",
          "APACHE 2.0": "https://www.apache.org/licenses/LICENSE-2.0"}  # fmt: skip
_CHANGES = {"CT": "resampled, converted to Hounsfield units and augmented",
            "MR": "cut into planes, resampled, scaled, augmented and made complex by a synthetic phase"}  # fmt: skip
_GEOMETRIES = {"cartesian": "Cartesian", "trajectory": "non-Cartesian"}

LICENSE = """\
Creative Commons Attribution 4.0 International Public License (CC BY 4.0)

The model weights in this folder are licensed under the Creative Commons Attribution 4.0 International Public License.
SPDX-License-Identifier: CC-BY-4.0

You are free to
  share: copy and redistribute the material in any medium or format for any purpose, even commercially;
  adapt: remix, transform and build upon the material for any purpose, even commercially;
under the following terms:
  attribution: you must give appropriate credit, provide a link to the license, and indicate if changes were made. You may do so in any
  reasonable manner, but not in any way that suggests the licensor endorses you or your use. ATTRIBUTION.md holds the credit due.
  no additional restrictions: you may not apply legal terms or technological measures that legally restrict others from doing anything
  the license permits.

This notice is a summary and not a substitute for the license, which applies in full:
  https://creativecommons.org/licenses/by/4.0/legalcode

The material is offered as it is, without warranties of any kind. Research use only. Not a medical device.
"""


def collections(entries: Iterable[Mapping[str, Any]]) -> tuple[Collection, ...]:
    """The training data of a model by collection and licence, from the entries of a data manifest that were used.

    An entry has file, subject, licence, a collection or (without one) a source, and a doi where there is one. Whoever reads the
    attribution must be able to find the images: an entry has a DOI (those of an archive like TCIA always do), or its source begins
    with the GitHub repository they come from, owner/name. Raises ModelError for an entry with neither, without a licence that permits
    redistribution, without a name or a subject, with a DOI that is none, and for no entry at all.

    Slices are counted where every entry says how many it has (0 otherwise): where the same images are listed at two matrix sizes, at
    the larger number of the two.
    """
    groups: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for number, entry in enumerate(entries, 1):
        where = f"training file {number} ({entry.get('file') or 'without a name'})"
        licence, doi, source, subject = (str(entry.get(key) or "").strip() for key in ("licence", "doi", "source", "subject"))
        name = str(entry.get("collection") or "").strip() or source
        if not licence:
            raise ModelError(f"{where} has no licence: a model may only be published with the licence of every file it was trained on")
        if not REDISTRIBUTABLE.fullmatch(licence):
            raise ModelError(f"{where} has the licence {licence!r}, which is not known to permit redistribution")
        if not name or not subject:
            raise ModelError(f"{where} has no collection or source, or no subject: attribution names the first and counts the second")
        if not re.fullmatch(r"10\.\d{4,9}/\S+", doi) and (doi or name != source or not REPOSITORY.match(source)):
            raise ModelError(f"{where} has no DOI: attribution wants one that starts with 10., or a source that begins with a GitHub "
                             "repository, owner/name")
        groups.setdefault((name, licence, doi), {}).setdefault(subject, []).append(entry)
    if not groups:
        raise ModelError("no training file is listed: a model is published with the data it was trained on")
    rows = []
    for (name, licence, doi), subjects in sorted(groups.items()):
        slices = [_slices(files) for files in subjects.values()]
        rows.append(Collection(name, licence, doi, len(subjects), sum(slices) if all(slices) else 0))
    return tuple(rows)


def _slices(entries: Iterable[Mapping[str, Any]]) -> int:
    """Slices of one subject, at the matrix size that has most; 0 when an entry does not say how many it has."""
    counts: Counter[int] = Counter()
    for entry in entries:
        if not entry.get("slices"):
            return 0
        counts[int(entry.get("matrix") or 0)] += int(entry["slices"])
    return max(counts.values())


def attribution(entries: Iterable[Mapping[str, Any]], modality: str = "CT") -> str:
    """ATTRIBUTION.md from the entries of a data manifest that a model was trained on; ModelError as for `collections`."""
    rows = collections(entries)
    lines = [
        "# Attribution",
        "",
        *textwrap.wrap(
            f"These weights were trained on images of {sum(r.subjects for r in rows)} subjects from the sources below. The images were "
            f"{_CHANGES[modality]}; none of them is contained in this folder. No attempt to identify anyone in the images is permitted.",
            width=140),
        "",
        "| collection | licence | source | subjects | slices |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        licence = _ONE.sub(_licence, row.licence)
        source = f"[{row.doi}](https://doi.org/{row.doi})" if row.doi else _repository(row.collection)
        lines.append(f"| {row.collection} | {licence} | {source} | {row.subjects} | {row.slices or '-'} |")
    if any(not row.doi for row in rows):
        lines += [
            "",
            "Copyright in the images is their authors'. Where no holder is named above, the notices of copyright and permission that MIT,",
            "BSD and Apache licences ask to keep are those of the repository linked.",
        ]
    if any("TCIA" in r.collection for r in rows):
        lines += [
            "",
            "Collections marked TCIA are of The Cancer Imaging Archive: Clark K, et al. The Cancer Imaging Archive (TCIA): maintaining and",
            "operating a public information repository. J Digit Imaging 26(6):1045-1057, 2013. doi:10.1007/s10278-013-9622-7",
        ]
    return "\n".join(lines) + "\n"


def _licence(found: re.Match[str]) -> str:
    link = _LINKS.get(found[0].replace("-", " ").upper())
    return f"[{found[0]}]({link})" if link else found[0]


def _repository(source: str) -> str:
    found = REPOSITORY.match(source)
    return f"[github.com/{found[0]}](https://github.com/{found[0]})" if found else "-"


def readme(card: Card) -> str:
    """README.md of a bundle, from its card."""
    low, high = card.pixel_size_mm
    if card.modality == "MR":
        values = "complex images as two channels, each divided by its own brightness (the 99th percentile of what the centre of its " \
                 "k-space shows)"
    else:
        values = f"{card.channels} channel, u = (value - {card.window.offset:g}) / {card.window.scale:g} {card.window.unit}"
    lines = [
        f"# {card.name} {card.version}",
        "",
        f"A diffusion prior and an h-transform for {card.modality} ({', '.join(card.anatomy)}), for deft_med {card.deft_med} or newer.",
        "**Research use only. Not a medical device.** Weights: CC BY 4.0 (LICENSE); training data: ATTRIBUTION.md.",
        "",
        f"- Prior {card.prior.parameters / 1e6:.2f} M parameters, h-transform {card.h.parameters / 1e6:.2f} M "
        f"({100 * card.h.parameters / max(1, card.prior.parameters):.1f} %).",
        f"- Pixel sizes {low:g} to {high:g} mm, fields of view {card.field_of_view_mm[0]:g} to {card.field_of_view_mm[1]:g} mm, {values}.",
    ]
    for one in card.protocols:
        text = f"- Accepts {_GEOMETRIES.get(one.geometry, one.geometry)} acquisitions"
        text += f", {one.views[0]} to {one.views[1]} views" if one.views else ""
        text += f" over {one.coverage_deg[0]:g} to {one.coverage_deg[1]:g} degrees" if one.coverage_deg else ""
        text += f", {one.coils[0]} to {one.coils[1]} coils, acceleration {one.acceleration[0]:g} to {one.acceleration[1]:g}" \
            if one.coils and one.acceleration else ""
        text += f", Gaussian noise {one.gaussian_percent[0]:g} to {one.gaussian_percent[1]:g} %" if one.gaussian_percent else ""
        noise = one.noise_of_scale_percent
        text += f", noise {noise[0]:g} to {noise[1]:g} % of the image's scale" if noise else ""
        lines.append(text + (f", {one.photons[0]:g} to {one.photons[1]:g} photons per ray" if one.photons else "") + ".")
    lines += [f"- Made by the configurations {', '.join(card.configs)}."] if card.configs else []
    lines += ["- " + card.notes] if card.notes else []
    if card.metrics:
        lines += ["", "| measured | value | subjects | data | command |", "|---|---|---|---|---|"]
        for m in card.metrics:
            value = f"{m.value:.4g}" + ("" if m.sd is None else f" ± {m.sd:.2g}")
            lines.append(f"| {m.name} | {value} | {m.n} | {m.data} | `{m.command}` |")
    if card.calibration:
        lines += ["", "| intervals of | factor | in them, raw | calibrated | wanted | chi2 of 99 % below | subjects, slices | command |"]
        lines += ["|---" * 8 + "|"]
        for name, c in card.calibration.items():
            shown = "several protocols together" if name == ALL else name
            lines.append(f"| {shown} | {c.factor:.3g} | {c.coverage_raw:.1%} | {c.coverage:.1%} | "
                         f"{c.level:.0%} | {c.chi2_99:.3g} | {c.subjects}, {c.slices} | `{c.command}` |")
    lines += ["", "`card.json` holds the same for the program, which checks every scan against it. `metadata.json` is for MONAI's tools."]
    return "\n".join(lines) + "\n"
