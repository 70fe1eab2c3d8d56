"""The small text files of a model folder, read with bounds.

The folder is not trusted: a file is a regular one inside the folder (no pipes, no links out but
those of a hub's cache to its blobs), no longer than its limit, and JSON is an object, or the
checkpoint cannot be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from serve.checkpoint import may_lead_to
from serve.errors import CheckpointError

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024


def read_model_file(folder: Path, name: str, *, max_bytes: int = MAX_CONFIG_BYTES) -> bytes | None:
    """The bytes of `folder / name`; None where there is no such file.

    Raises:
        CheckpointError: it is too long, no regular file, or a link out of the folder.
    """
    path = folder / name
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as exc:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path} cannot be read: {exc}"[:300]) from exc
    if not may_lead_to(folder.resolve(), resolved) or not resolved.is_file():
        raise CheckpointError(f"{path} must be a regular file inside the model folder")
    try:
        with resolved.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} must be <= {max_bytes} bytes")
    return content


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`; {} where there is no such file.

    Raises:
        CheckpointError: the file cannot be used, or is not a JSON object.
    """
    content = read_model_file(folder, name)
    if content is None:
        return {}
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{folder / name} is not a JSON object: {exc}"[:300]) from exc
