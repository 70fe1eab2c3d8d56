"""What must not come back into the test environment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_no_slow_format_checker_rides_on_jsonschema() -> None:
    # jsonschema imports rfc3987_syntax where it is installed, Ray imports jsonschema, and that one
    # compiles a grammar with lark: seconds for every process of every Ray head.
    lock = (REPOSITORY / "requirements-test.txt").read_text(encoding="utf-8")
    names = set(re.findall(r"^([a-z0-9-]+)==", lock, flags=re.MULTILINE))
    assert "jsonschema" in names
    assert names.isdisjoint({"rfc3987-syntax", "rfc3987", "lark"})


def test_importing_rays_jsonschema_compiles_no_grammar() -> None:
    code = "import jsonschema, sys; print({'rfc3987_syntax', 'lark'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
