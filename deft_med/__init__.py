"""Medical image reconstruction with diffusion priors and the h-transform (DEFT). Research use only, not a medical device.

Importing this package loads nothing heavy: the public names below are found when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "read": "io",
    "write": "io",
    "Volume": "volume",
    "Scan": "volume",
    "Window": "intensity",
    "Deft": "htransform",
    "Prior": "prior",
    "reconstruct": "pipeline",  # the command of that name is the module deft_med.reconstruct; importing that module hides this name
    "Reconstruction": "pipeline",
    "DeftMedError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .errors import DeftMedError as DeftMedError
    from .htransform import Deft as Deft
    from .intensity import Window as Window
    from .io import read as read
    from .io import write as write
    from .pipeline import Reconstruction as Reconstruction
    from .pipeline import reconstruct as reconstruct
    from .prior import Prior as Prior
    from .volume import Scan as Scan
    from .volume import Volume as Volume


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
