"""The words that travel with a model: attribution of its training data, its licence, its README; generated, never typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .card import Card, Collection
from .errors import ModelError

REDISTRIBUTABLE = re.compile(r"(CC[ -]BY[ -][34]\.0|CC0([ -]1\.0)?|MIT|BSD-[23]-Clause|Apache-2\.0)", re.IGNORECASE)
_LINKS = {"CC BY 3.0": "https://creativecommons.org/licenses/by/3.0/", "CC BY 4.0": "https://creativecommons.org/licenses/by/4.0/",
          "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/"}  # fmt: skip

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

    An entry has file, subject, slices, collection, licence and doi. Raises ModelError for an entry without a licence that permits
    redistribution, without a DOI or a collection, and for no entry at all. Where the same images are listed at two matrix sizes,
    slices are counted at the larger number of the two.
    """
    groups: dict[tuple[str, str, str], dict[str, dict[int, int]]] = {}
    for number, entry in enumerate(entries, 1):
        where = f"training file {number} ({entry.get('file') or 'without a name'})"
        licence, doi, name, subject = (str(entry.get(key) or "").strip() for key in ("licence", "doi", "collection", "subject"))
        if not licence:
            raise ModelError(f"{where} has no licence: a model may only be published with the licence of every file it was trained on")
        if not REDISTRIBUTABLE.fullmatch(licence):
            raise ModelError(f"{where} has the licence {licence!r}, which is not known to permit redistribution")
        if not re.fullmatch(r"10\.\d{4,9}/\S+", doi):
            raise ModelError(f"{where} has no DOI: attribution wants one that starts with 10.")
        if not name or not subject:
            raise ModelError(f"{where} has no collection or no subject: attribution names the first and counts the second")
        matrices = groups.setdefault((name, licence, doi), {}).setdefault(subject, {})
        matrix = int(entry.get("matrix") or 0)
        matrices[matrix] = matrices.get(matrix, 0) + int(entry.get("slices") or 0)
    if not groups:
        raise ModelError("no training file is listed: a model is published with the data it was trained on")
    return tuple(
        Collection(name, licence, doi, len(subjects), sum(max(m.values()) for m in subjects.values()))
        for (name, licence, doi), subjects in sorted(groups.items())
    )


def attribution(entries: Iterable[Mapping[str, Any]]) -> str:
    """ATTRIBUTION.md from the entries of a data manifest that a model was trained on; ModelError as for `collections`."""
    rows = collections(entries)
    lines = [
        "# Attribution",
        "",
        f"These weights were trained on images of {sum(r.subjects for r in rows)} subjects from the collections below. The images were",
        "resampled, converted to Hounsfield units and augmented; none of them is contained in this folder. No attempt to identify anyone",
        "in the images is permitted.",
        "",
        "| collection | licence | DOI | subjects | slices |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        link = _LINKS.get(row.licence.replace("-", " ").upper())
        licence = f"[{row.licence}]({link})" if link else row.licence
        lines.append(f"| {row.collection} | {licence} | [{row.doi}](https://doi.org/{row.doi}) | {row.subjects} | {row.slices} |")
    if any("TCIA" in r.collection for r in rows):
        lines += [
            "",
            "Collections marked TCIA are of The Cancer Imaging Archive: Clark K, et al. The Cancer Imaging Archive (TCIA): maintaining and",
            "operating a public information repository. J Digit Imaging 26(6):1045-1057, 2013. doi:10.1007/s10278-013-9622-7",
        ]
    return "\n".join(lines) + "\n"


def readme(card: Card) -> str:
    """README.md of a bundle, from its card."""
    low, high = card.pixel_size_mm
    lines = [
        f"# {card.name} {card.version}",
        "",
        f"A diffusion prior and an h-transform for {card.modality} ({', '.join(card.anatomy)}), for deft_med {card.deft_med} or newer.",
        "**Research use only. Not a medical device.** Weights: CC BY 4.0 (LICENSE); training data: ATTRIBUTION.md.",
        "",
        f"- Prior {card.prior.parameters / 1e6:.2f} M parameters, h-transform {card.h.parameters / 1e6:.2f} M "
        f"({100 * card.h.parameters / max(1, card.prior.parameters):.1f} %).",
        f"- Pixel sizes {low:g} to {high:g} mm, fields of view {card.field_of_view_mm[0]:g} to {card.field_of_view_mm[1]:g} mm, "
        f"{card.channels} channel, u = (value - {card.window.offset:g}) / {card.window.scale:g} {card.window.unit}.",
    ]
    for one in card.protocols:
        text = f"- Trained on {one.geometry} acquisitions"
        text += f", {one.views[0]} to {one.views[1]} views" if one.views else ""
        text += f" over {one.coverage_deg[0]:g} to {one.coverage_deg[1]:g} degrees" if one.coverage_deg else ""
        text += f", {one.coils[0]} to {one.coils[1]} coils, acceleration {one.acceleration[0]:g} to {one.acceleration[1]:g}" \
            if one.coils and one.acceleration else ""
        text += f", Gaussian noise {one.gaussian_percent[0]:g} to {one.gaussian_percent[1]:g} %" if one.gaussian_percent else ""
        lines.append(text + (f", {one.photons[0]:g} to {one.photons[1]:g} photons per ray" if one.photons else "") + ".")
    lines += [f"- Made by the configurations {', '.join(card.configs)}."] if card.configs else []
    lines += ["- " + card.notes] if card.notes else []
    if card.metrics:
        lines += ["", "| measured | value | subjects | data | command |", "|---|---|---|---|---|"]
        for m in card.metrics:
            value = f"{m.value:.4g}" + ("" if m.sd is None else f" ± {m.sd:.2g}")
            lines.append(f"| {m.name} | {value} | {m.n} | {m.data} | `{m.command}` |")
    lines += ["", "`card.json` holds the same for the program, which checks every scan against it. `metadata.json` is for MONAI's tools."]
    return "\n".join(lines) + "\n"
