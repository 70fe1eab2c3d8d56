"""The small text files of a model folder, as who needs them reads them: bytes, or why not.

What may be read, and how much of it, is `serve.checkpoint.folder`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.checkpoint.folder import ModelFolder

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024


def read_model_file(folder: Path, name: str, *, max_bytes: int = MAX_CONFIG_BYTES) -> bytes | None:
    """The bytes of `folder / name`; None where there is no such file.

    Raises:
        CheckpointError: it is too long, no regular file, or a link out of the folder.
    """
    files = ModelFolder(folder)
    content = files.read_bytes(name, max_bytes=max_bytes) if files.has(name) else None
    files.check()
    return content


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`; {} where there is no such file.

    Raises:
        CheckpointError: the file cannot be used, or is not a JSON object.
    """
    files = ModelFolder(folder)
    content = files.read_json(name, max_bytes=MAX_CONFIG_BYTES) if files.has(name) else None
    files.check()
    return content or {}
