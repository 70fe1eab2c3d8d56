from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.local.root_cause import failure_of, last_exception, root_cause

SERVE_MESSAGE = """A replica failed to start with exception. Retrying 2 more time(s). Error:
\x1b[36mray::ServeReplica:toy:Toy.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "shard.py", line 17, in __init__
    raise CheckpointError(message)
serve.errors.CheckpointError: model folder /m: tensor lm_head.weight
  has shape [1], expected [2]"""


def application(status: str, message: str, **deployments: tuple[str, str]) -> dict[str, Any]:
    parts = {name: {"status": part[0], "message": part[1]} for name, part in deployments.items()}
    return {"status": status, "message": message, "deployments": parts}


def test_constructor_error_is_found_inside_serves_wrapping() -> None:
    expected = "model folder /m: tensor lm_head.weight\n  has shape [1], expected [2]"
    assert last_exception(SERVE_MESSAGE) == expected


def test_text_without_a_traceback_has_no_exception() -> None:
    assert last_exception("Error: not a traceback\nValueError: neither") is None


def test_newest_log_with_a_traceback_is_the_cause_when_serve_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "replica.log").write_text(
        "INFO 2026-11-22 06:00:00,000 a b -- fine\n"
        "ERROR 2026-11-22 06:00:00,001 a b -- Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n'
        "OSError: no space left\n"
        "INFO 2026-11-22 06:00:00,002 a b -- going on\n"
    )
    message = "Failed to update the deployments"
    assert root_cause(message, logs_path=tmp_path) == "OSError: no space left\n  raised at x.py:1"


def test_serves_own_words_stand_where_no_log_says_more(tmp_path: Path) -> None:
    assert root_cause(" Failed to update. ", logs_path=tmp_path) == "Failed to update."


def test_first_failed_replica_is_a_failure_and_a_slow_one_is_not() -> None:
    slow = application("DEPLOYING", "", Replica=("UPDATING", "waiting for resources"))
    failed = application("DEPLOYING", "", Replica=("UPDATING", SERVE_MESSAGE))
    given_up = application("DEPLOY_FAILED", "")
    assert failure_of({"a": slow}) is None
    assert failure_of({"a": slow, "b": failed}) == SERVE_MESSAGE
    assert failure_of({"a": given_up}) == "application 'a' failed"
