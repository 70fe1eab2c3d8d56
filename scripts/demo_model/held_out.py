"""The held-out phrasings: questions written apart from the corpus, and what a right answer has.

They are never drawn, and a test looks through the corpus for them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

_FILE = Path(__file__).parent / "held_out.yaml"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One phrasing. Of each group in `needs` one word must be in the answer."""

    tongue: str
    ask: str
    needs: tuple[tuple[str, ...], ...]
    is_json: bool = False
    is_raw: bool = False

    def is_right(self, answer: str) -> bool:
        """Words are looked for in any letter case; a JSON answer must parse as well."""
        if self.is_json and not _parses(answer):
            return False
        text = answer.casefold()
        return all(any(word.casefold() in text for word in group) for group in self.needs)


def load_held_out() -> list[HeldOut]:
    """Reads held_out.yaml."""
    return [
        HeldOut(
            tongue=entry["tongue"],
            ask=entry["ask"],
            needs=tuple(tuple(group) for group in entry["needs"]),
            is_json=entry.get("json", False),
            is_raw=entry.get("raw", False),
        )
        for entry in yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    ]


def _parses(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
