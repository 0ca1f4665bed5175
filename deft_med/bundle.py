"""Models on disk: a folder of two safetensors files (float16) and a JSON card; strict to load, whole or not there at all.

`python -m deft_med.bundle list | show NAME | card NAME | check NAME` looks at them. Nothing is downloaded, unpickled or evaluated.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import WEIGHTS, Card, check, out_of_scope, parse
from .errors import DeftMedError, ModelError, OutputError, UsageError
from .publish import check_target, published

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .htransform import Deft, HTransform
    from .intensity import Window
    from .prior import Prior

__all__ = ["Card", "Model", "available", "check", "load", "load_model", "out_of_scope", "recalibrate", "save"]

BUNDLES = Path(__file__).with_name("bundles")
_LARGEST = 4 << 30  # bytes of one weight file


@dataclass(frozen=True)
class Model:
    """A loaded bundle: its card, and the prior and h-transform that the card describes."""

    card: Card
    deft: Deft

    @property
    def window(self) -> Window:
        """From HU to what the networks see."""
        from .intensity import Window

        return Window(offset=self.card.window.offset, scale=self.card.window.scale, unit=self.card.window.unit)

    @property
    def filter(self) -> str:
        """Window of the backprojection in the residual that h is fed (CT)."""
        return self.card.h.residual.get("window", "shepp-logan")

    @property
    def inverse(self) -> str:
        """What the residual that h is fed goes through (MR): sense or adjoint."""
        return self.card.h.residual.get("inverse", "sense")

    @property
    def sigma_min(self) -> float:
        return self.card.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.card.sigma_max

    @property
    def eta(self) -> float:
        """Noise of the stochastic sampler."""
        return self.card.sampling.eta

    @property
    def trust(self) -> float:
        """Deviation, in u, that the data-consistency steps allow the denoiser."""
        return self.card.sampling.trust

    @property
    def consistency(self) -> int:
        """Data-consistency steps per level."""
        return self.card.sampling.consistency

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Axes along which the networks' images are flipped, evaluation by evaluation."""
        return ((), (-1,), (-2,), (-2, -1)) if self.card.sampling.mirrored else ((),)

    def to(self, device: str | torch.device) -> Model:
        """Move the weights; returns itself."""
        self.deft.to(device)
        return self


def available() -> list[str]:
    """Names of the models that ship."""
    return sorted(folder.name for folder in BUNDLES.iterdir() if (folder / "card.json").is_file()) if BUNDLES.is_dir() else []


def load(name_or_dir: str | Path) -> tuple[Card, dict[str, Tensor], dict[str, Tensor]]:
    """Card, prior weights and h weights (float32, on the CPU) of a shipped model or of a bundle's folder.

    Raises UsageError for a name that does not exist; ModelError for a folder that is no bundle, a card that does not say what it
    must, a file whose SHA-256 is not the card's, weights that are not safetensors or do not fit the card's networks exactly.
    """
    folder = _find(name_or_dir)
    try:
        text = (folder / "card.json").read_bytes()
    except OSError as error:
        raise ModelError("the model's folder has no readable card.json: give a folder that deft_med.bundle.save wrote") from error
    card = parse(text)
    prior, h = (_read(folder / name, card.sha256[name]) for name in WEIGHTS)
    _match(card, (prior, h))
    return card, prior, h


def load_model(name_or_dir: str | Path) -> Model:
    """The same, as networks ready to use; errors as for `load`."""
    from .htransform import Deft

    card, prior_state, h_state = load(name_or_dir)
    prior, h = networks(card)
    prior.load_state_dict(prior_state, strict=True)
    h.load_state_dict(h_state, strict=True)
    return Model(card, Deft(prior, h).requires_grad_(False).eval())


def networks(card: Card, device: str = "cpu") -> tuple[Prior, HTransform]:
    """Fresh networks of the shapes that a card describes; on device 'meta' they take no memory."""
    import torch

    from .htransform import HTransform
    from .network import UNet
    from .prior import Prior

    c, p, n = card.channels, card.prior, card.h
    try:
        with torch.device(device):
            prior = Prior(UNet(c, c, p.widths, scalars=1, blocks=p.blocks, dim=p.dim), sd=card.sigma_data, octaves=card.octaves,
                          sigma_min=card.sigma_min, sigma_max=card.sigma_max)  # fmt: skip
            h = HTransform(UNet(3 * c, c, n.widths, scalars=3, blocks=n.blocks, dim=n.dim), sd=card.sigma_data, octaves=card.octaves,
                           form=n.form)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ModelError(f"the model's card describes networks that cannot be built: {error}") from error
    return prior, h


def save(folder: str | Path, prior_state: Mapping[str, Tensor], h_state: Mapping[str, Tensor], card: Mapping[str, Any], attribution: str,
         *, overwrite: bool = False) -> Card:  # fmt: skip
    """Write a bundle: everything into a folder beside the target, renamed when it is whole. Returns the card as written.

    ``prior_state`` and ``h_state`` are state dicts of `Prior` and `HTransform`, or of the bare networks; they are stored as float16.
    ``card`` lacks what is computed here: sha256, parameters, deft_med, licence. ``attribution`` is ATTRIBUTION.md, from
    `attribution.attribution`. Raises ModelError for a card or weights that do not fit, OutputError for a target in the way.
    """
    import torch
    from safetensors.torch import save as serialise

    from . import __version__
    from .attribution import LICENSE, readme

    target = Path(folder).absolute()
    if not attribution.strip():
        raise ModelError("a model is published with the attribution of its training data: attribution() makes it from the manifest")
    check_target(target, overwrite, "card.json")

    states = [_full(state) for state in (prior_state, h_state)]
    blobs, counts = {}, []
    for name, state in zip(WEIGHTS, states, strict=True):
        half = {key: value.detach().cpu().to(torch.float16).contiguous() for key, value in state.items()}
        if not all(bool(torch.isfinite(value).all()) for value in half.values()):
            raise ModelError(f"{name}: weights that float16 cannot hold (infinite or NaN)")
        blobs[name] = serialise(half, metadata={"format": "pt"})
        counts.append(sum(value.numel() for value in half.values()))
    made = _draft(card)
    made = dataclasses.replace(
        made, deft_med=__version__, sha256={name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()},
        prior=dataclasses.replace(made.prior, parameters=counts[0]), h=dataclasses.replace(made.h, parameters=counts[1]))  # fmt: skip
    _match(made, states)

    texts = {"card.json": made.to_json(), "metadata.json": json.dumps(_metadata(made), indent=2) + "\n", "README.md": readme(made),
             "LICENSE": LICENSE, "ATTRIBUTION.md": attribution}  # fmt: skip
    with published(target, overwrite, "card.json") as beside:
        for name, blob in blobs.items():
            (beside / name).write_bytes(blob)
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
    return made


def recalibrate(folder: str | Path, calibration: Mapping[str, Any]) -> Card:
    """Write a calibration (by protocol, as `deft_med.calibrate` finds it) on the card of a bundle's folder; its weights stay. The new card.

    What the card knows of other protocols stays too. Raises as `load` does, ModelError for a calibration that is none, OutputError where
    the folder cannot be written.
    """
    from .attribution import readme

    path = Path(folder)
    if not path.is_dir():
        raise UsageError("a calibration is written into the folder of a bundle: name one that deft_med.export made")
    card = load(path)[0]
    known = {name: dataclasses.asdict(one) for name, one in card.calibration.items()}
    card = parse({**json.loads(card.to_json()), "calibration": {**known, **calibration}})
    try:
        for name, text in (("card.json", card.to_json()), ("README.md", readme(card))):
            beside = path / f".{name}.part"
            beside.write_text(text, encoding="utf-8")
            beside.replace(path / name)
    except OSError as error:
        raise OutputError("the bundle's folder cannot be written: copy it to a writable one") from error
    return card


def _draft(card: Mapping[str, Any]) -> Card:
    """The card before its computed fields are known."""
    blank = {"sha256": dict.fromkeys(WEIGHTS, "0" * 64), "licence": "CC-BY-4.0", "deft_med": "0"}
    return parse({**json.loads(json.dumps(dict(card))), **blank})


def _find(name_or_dir: str | Path) -> Path:
    text = str(name_or_dir)
    if isinstance(name_or_dir, str) and text in available():
        return BUNDLES / text
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError("a model is a folder with card.json and safetensors files; pickles and other formats are not read")
    known = ", ".join(available()) or "none ships with this installation"
    raise UsageError(f"no model of that name and no such folder: known models: {known}")


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as parse_weights

    try:
        if path.stat().st_size > _LARGEST:
            raise ModelError(f"the model's {path.name} is larger than {_LARGEST >> 30} GiB")
        blob = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the model has no readable {path.name}: install it again") from error
    if hashlib.sha256(blob).hexdigest() != digest:
        raise ModelError(f"the model's {path.name} is not the file that its card describes (SHA-256 differs): install it again")
    try:
        state = parse_weights(blob)
    except SafetensorError as error:
        raise ModelError(f"the model's {path.name} is no safetensors file; pickles and other formats are not read") from error
    return {name: value.to(torch.float32) for name, value in state.items()}


def _full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the whole module, also from that of its bare network (a prior has nothing else)."""
    bare = not any(name.startswith("network.") for name in state)
    return {f"network.{name}" if bare else name: value for name, value in state.items()}


def _match(card: Card, states: Iterable[Mapping[str, Tensor]]) -> None:
    for name, state, module in zip(WEIGHTS, states, networks(card, "meta"), strict=True):
        _match_one(name, state, module.state_dict())  # type: ignore[attr-defined]


def _match_one(name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    wrong = sorted(key for key in set(state) & set(expected) if state[key].shape != expected[key].shape)
    kinds = (("missing", missing), ("unknown", unknown), ("misshapen", wrong))
    words = [f"{len(found)} {kind} (first: {found[0]})" for kind, found in kinds if found]
    if words:
        raise ModelError(f"the weights in {name} do not fit the networks of the card: {', '.join(words)}")


def _metadata(card: Card) -> dict[str, Any]:
    """What MONAI's bundle tools expect to find; deft_med itself reads card.json."""
    parts = ["image"] if card.channels == 1 else ["real", "imaginary"]
    image = {"type": "image", "format": "hounsfield" if card.window.unit == "HU" else "complex", "modality": card.modality,
             "num_channels": card.channels, "spatial_shape": ["*", "*"], "dtype": "float32", "value_range": [], "is_patch_data": False,
             "channel_def": {str(k): part for k, part in enumerate(parts)}}  # fmt: skip
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": card.version,
        "changelog": {card.version: "see CHANGELOG.md of deft_med"},
        "monai_version": "1.6.1",
        "pytorch_version": "2.13.0",
        "numpy_version": "2.4.6",
        "required_packages_version": {"deft-med": card.deft_med, "safetensors": "0.8.0"},
        "name": card.name,
        "task": f"{card.modality} reconstruction",
        "description": f"Diffusion prior and h-transform for {card.modality} reconstruction with deft_med",
        "authors": "the deft_med authors",
        "copyright": "CC BY 4.0",
        "intended_use": "Research use only. Not a medical device.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": image}},
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m deft_med.bundle", description="Look at models.")
    parser.add_argument("action", choices=["list", "show", "card", "check"],
                        help="list the shipped ones, say what one is and accepts, print its card (JSON), or check every byte")
    parser.add_argument("model", nargs="?", help="name of a shipped model, or a bundle's folder")
    arguments = parser.parse_args(argv)
    try:
        if arguments.action == "list":
            print("\n".join(available()))
            return 0
        if arguments.model is None:
            raise UsageError(f"{arguments.action} wants a model: a name or a folder")
        if arguments.action in ("show", "card"):
            from .attribution import readme

            card = parse((_find(arguments.model) / "card.json").read_bytes())
            print(readme(card) if arguments.action == "show" else card.to_json(), end="")
            return 0
        card = load(arguments.model)[0]
        print(f"{card.name} {card.version}: whole, {card.prior.parameters:,} + {card.h.parameters:,} parameters")
        return 0
    except DeftMedError as error:
        print(f"deft_med: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
