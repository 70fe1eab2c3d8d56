"""Patterns: one line that stands for many phrasings, `[How do I|How can I] start Shoal?`.

A choice may be empty; choices do not nest. `{slots}` are left for the caller.
"""

import re
from random import Random

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def draw(pattern: str, rng: Random) -> str:
    """Returns one phrasing of the pattern."""
    return _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), pattern).strip()
