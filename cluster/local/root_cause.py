"""Why a start failed, in one message: Serve says "failed", the reason is in a replica's log.

Not a log viewer. Looks first at what Serve's status carries, then at the newest traceback in the
logs of the session folder, and keeps the last exception of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FAILED_STATES = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
_FIRST_FAILURE = "A replica failed to start"
_EXCEPTION_LINE = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))(?:\(|: ?)(.*)")
_FRAME_LINE = re.compile(r'^\s*File "([^"]+)", line (\d+)')
_LOG_PREFIX = re.compile(r"^\w+ \d{4}-\d\d-\d\d [\d:,.]+ \S+ \S+ (?:-- )?")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TAIL_BYTES = 200_000
_WRAPPERS = (
    "RayTaskError",
    "RayActorError",
    "ActorDiedError",
    "RuntimeError: Traceback",
    "KeyboardInterrupt",
    "SystemExit",
)


def failure_of(applications: dict[str, Any]) -> str | None:
    """Serve's message about the first application that failed; None while none did.

    Serve starts a replica three times before it gives up; the first failure is enough here, for
    what a constructor of ours raises it raises again.
    """
    for name, application in applications.items():
        for part in (*application.get("deployments", {}).values(), application):
            message = str(part.get("message", ""))
            if part.get("status") in _FAILED_STATES or message.startswith(_FIRST_FAILURE):
                return message or f"application {name!r} failed"
    return None


def root_cause(serve_message: str, *, logs_path: Path) -> str:
    """The last exception in `serve_message`, else in the newest log with a traceback.

    Returns:
        One exception as "Type: message", of an error of ours the message alone, or `serve_message`
        where there is none anywhere.
    """
    found = last_exception(serve_message)
    if found is not None:
        return found
    for path in _newest_logs(logs_path):
        found = last_exception(_tail(path))
        if found is not None:
            return found
    return serve_message.strip()


def last_exception(text: str) -> str | None:
    """The last exception that a traceback in `text` ends with, without Ray's own wrapping."""
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    candidates = []
    is_in_traceback = False
    for index, line in enumerate(lines):
        bare = _LOG_PREFIX.sub("", line)
        if "Traceback (most recent call last)" in bare or bare.startswith("ray::"):
            is_in_traceback = True
            continue
        match = _EXCEPTION_LINE.match(bare)
        if match and is_in_traceback:
            cause = _with_continuation(lines, index, bare[match.start(1) :])
            if bare.startswith("serve.errors."):  # its message is written for users
                candidates.append(cause.partition(": ")[2] or cause)
            else:
                candidates.append(cause + _raised_at(lines[:index]))
            is_in_traceback = False
    own = [text for text in candidates if not _is_wrapping(text)]
    found = own or candidates
    return found[-1] if found else None


def _raised_at(lines: list[str]) -> str:
    """Where the exception after `lines` was raised: a bug's message may not explain it."""
    for line in reversed(lines):
        match = _FRAME_LINE.match(line)
        if match:
            return f"\n  raised at {match.group(1)}:{match.group(2)}"
    return ""


def _with_continuation(lines: list[str], index: int, first: str) -> str:
    """The exception's message with the lines that belong to it (until a blank or a new entry)."""
    message = [first]
    for line in lines[index + 1 :]:
        if not line.strip() or _LOG_PREFIX.match(line) or line.startswith(("Traceback", "The ")):
            break
        message.append(line)
    return "\n".join(message).strip()


def _is_wrapping(text: str) -> bool:
    return text.startswith(_WRAPPERS)


def _newest_logs(logs_path: Path) -> list[Path]:
    candidates = [
        *logs_path.glob("serve/*.log"),
        *logs_path.glob("worker-*.err"),
        *logs_path.glob("dashboard_ServeHead.*"),
        *logs_path.glob("dashboard.*"),
        *logs_path.glob("raylet.*"),
        *logs_path.glob("gcs_server.*"),
    ]
    return sorted(candidates, key=_changed_at, reverse=True)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
