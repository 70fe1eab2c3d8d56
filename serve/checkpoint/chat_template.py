"""The chat template of a model folder: which file has it, and whether it compiles.

Not the rendering (`serve.text.chat_template`). The one decision: whoever starts a model looks here
first, so that a template that could not serve is told, with its file, before anything runs. Nothing
of the template runs here: it is parsed and checked, not executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import CheckpointError

from .folder import ModelFolder

if TYPE_CHECKING:
    import jinja2

# How a template is read, as transformers does; its sandbox is whoever's that runs it.
SYNTAX: dict[str, Any] = {
    "trim_blocks": True,
    "lstrip_blocks": True,
    "extensions": ["jinja2.ext.loopcontrols"],
}
_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The text of a template, and the file that it was found in."""

    file: Path
    text: str


def find_chat_template(path: Path) -> TemplateSource | None:
    """The template of model folder `path`, None where it has none (base models).

    Its own file wins over `tokenizer_config.json`, of whose named ones "default" is meant.

    Raises:
        CheckpointError: a file that may hold it cannot be read.
    """
    folder = ModelFolder(path)
    name, source = _CONFIG, None
    if folder.has(_CONFIG):
        source = (folder.read_json(_CONFIG, max_bytes=_MAX_BYTES) or {}).get("chat_template")
    if folder.has(_FILE):
        name, content = _FILE, folder.read_bytes(_FILE, max_bytes=_MAX_BYTES)
        source = None if content is None else content.decode("utf-8", "replace")
    folder.check()
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if type(item) is dict}
        source = named.get("default")
    return TemplateSource(Path(path) / name, source) if isinstance(source, str) else None


def check_chat_template(path: Path) -> None:
    """Compile the template of model folder `path`, if it has one, and throw the result away.

    Raises:
        CheckpointError: it cannot be read or does not compile; names its file.
    """
    source = find_chat_template(path)
    if source is None:
        return
    import jinja2  # 0.1 s, which only a start needs

    try:
        jinja2.Environment(**SYNTAX).compile(source.text, raw=True)  # noqa: S701: makes no HTML
    except (jinja2.TemplateError, RecursionError) as exc:
        raise not_compiling(exc, source.file) from exc


def not_compiling(exc: jinja2.TemplateError | RecursionError, file: Path | None) -> CheckpointError:
    """What is wrong with the template in `file`, in one line."""
    line = getattr(exc, "lineno", None)
    where = "" if file is None else f"{file}: "
    at = "" if line is None else f", line {line}"
    reason = str(getattr(exc, "message", None) or exc)
    return CheckpointError(f"{where}the chat template does not compile{at}: {reason[:300]}")
