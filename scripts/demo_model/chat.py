"""The chat template: ChatML with tools in the Hermes form, rendered as the server renders it.

It is not a copy of transformers' renderer: the same sandboxed jinja2 with a plain `tojson`, so that
the corpus needs neither transformers nor torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
END = "<|im_end|>"

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders conversations to prompt text."""

    def __init__(self, source: str = TEMPLATE) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = to_json
        self._template = environment.from_string(source)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Message] = ()) -> str:
        """Returns the prompt text, open for the assistant's answer."""
        return self._template.render(
            messages=list(messages), tools=list(tools), add_generation_prompt=True
        )


def to_json(value: object) -> str:
    """JSON as transformers' templates write it: spaces after separators, no escapes for HTML."""
    return json.dumps(value, ensure_ascii=False)
