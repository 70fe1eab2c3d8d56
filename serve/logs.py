"""How Shoal's processes log: one line an event, no prompt, no output, no key, ever.

Ray keeps each actor's lines in the session's log folder; nothing is configured twice.
"""

from __future__ import annotations

import logging
import sys


def configure_logs(level: str) -> None:
    """Send `shoal.*` from `level` ("debug" to "error") on to the process's own standard error.

    Not to `sys.stderr`, which Serve replaces by a log of its own that keeps 1,000 lines back.
    """
    root = logging.getLogger("shoal")
    root.setLevel(level.upper())
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
