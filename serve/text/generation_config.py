"""The sampling defaults that a checkpoint brings along in generation_config.json.

Not a place for our opinions: a field that the file leaves out has OpenAI's default. `do_sample` is
not read: a base model's `do_sample: false` would turn every request without a temperature greedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.errors import CheckpointError

from .model_files import read_json


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values for the fields that a request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read a model folder's defaults.

    Raises:
        CheckpointError: a value is not a number in its range.
    """
    path = folder / "generation_config.json"
    content = read_json(folder, path.name)
    found: dict[str, float] = {}
    for name, (low, high) in _RANGES.items():
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {name} must be a number, got {value!r:.40}")
        if not low <= value <= high:
            raise CheckpointError(f"{path}: {name} must be in [{low}, {high}], got {value}")
        found[name] = value
    return GenerationDefaults(
        temperature=found.get("temperature", 1.0),
        top_p=found.get("top_p", 1.0),
        top_k=int(found.get("top_k", 0)),
        min_p=found.get("min_p", 0.0),
        repetition_penalty=found.get("repetition_penalty", 1.0),
    )
