"""Whether a repository's model can run at all, seen in its small files before its large ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cluster.errors import DownloadError
from serve.catalog import ModelShape
from serve.errors import CheckpointError

OnShape = Callable[[ModelShape], None]


def check_architecture(repository: str, config: Path, on_shape: OnShape) -> None:
    """Refuse what the `config.json` at `config` says; `on_shape` may refuse for reasons of its own.

    Raises:
        DownloadError: another architecture, or a feature that Shoal does not have.
    """
    try:
        shape = ModelShape.from_config(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, AttributeError, CheckpointError) as exc:
        reason = (
            exc.message if isinstance(exc, CheckpointError) else "config.json is no JSON object"
        )
        raise DownloadError(
            f"{repository} cannot be served: {reason}", hint="Shoal serves Qwen2 and Qwen2.5."
        ) from exc
    on_shape(shape)
