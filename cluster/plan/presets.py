"""The presets that ship with Shoal: `configs/models/*.yaml` and `configs/hardware/*.yaml`.

In a wheel they are data of this package (`cluster/_configs`); in a checkout, the folder `configs`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from .document import Document, read_document

PresetKind = Literal["models", "hardware"]


def configs_path() -> Path:
    """The folder of presets and examples."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names(kind: PresetKind) -> list[str]:
    """Names of every preset of a kind, sorted."""
    return sorted(path.stem for path in (configs_path() / kind).glob("*.yaml"))


def read_preset(kind: PresetKind, name: str) -> Document | None:
    """The preset's document; None if there is none of that name."""
    if name not in preset_names(kind):
        return None
    return read_document(configs_path() / kind / f"{name}.yaml")


def unknown_preset(kind: PresetKind, name: object) -> str:
    """The message for a name that is no preset: the closest one and all of them."""
    names = preset_names(kind)
    close = difflib.get_close_matches(str(name), names, n=1)
    guess = f", did you mean {close[0]!r}?" if close else ""
    return f"no preset named {name!r}{guess} There are: {', '.join(names)}".replace("?.", "?")
