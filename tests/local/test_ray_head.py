from __future__ import annotations

from pathlib import Path

from cluster.local.ray_head import last_error

LOG = """\
[2026-11-22 19:55:36,123 I 71 71] (raylet) main.cc:10: Setting cluster ID
[2026-11-22 19:55:36,124 E 71 72] (raylet) agent_manager.cc:8: The agent was slow
[2026-11-22 19:55:36,125 C 71 72] (raylet) agent_manager.cc:9:  Check failed: agent
*** StackTrace Information ***
"""


def test_last_error_of_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "raylet.out"
    assert last_error(log) == ""
    log.write_text(LOG, encoding="utf-8")
    assert last_error(log) == ": Check failed: agent"
    log.write_text(LOG.splitlines()[0], encoding="utf-8")
    assert last_error(log) == ""
