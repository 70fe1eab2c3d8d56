"""What `helm test` runs in a pod: waits until a release is ready, then asks it for an answer.

`python -m cluster.trial URL SECONDS`. With a key in SHOAL_API_KEY, or where none is needed, a
completion must come back; without one the API must refuse to answer. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

KEY_VARIABLE = "SHOAL_API_KEY"
_ANSWER_TIMEOUT_S = 60.0
_POLL_S = 1.0
_MAX_SHOWN = 500


def try_release(url: str, *, seconds: float, key: str) -> str:
    """What was found, once `/health/ready` says ready.

    Raises:
        RuntimeError: it is not ready after `seconds`, or it does not answer as it should.
    """
    _wait_ready(url, seconds)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 8,
    }
    status, text = _fetch(f"{url}/v1/models", key=key)
    if status == 200:
        body["model"] = json.loads(text)["data"][0]["id"]
    status, text = _fetch(f"{url}/v1/chat/completions", body, key=key)
    if status == 200:
        return f"ready, and it answers: {json.loads(text)['choices'][0]['message']['content']!r}"
    if status == 401 and not key:
        return "ready, and it asks for a key; for an answer give one in tests.apiKey.existingSecret"
    raise RuntimeError(f"no answer: {status} {text[:_MAX_SHOWN]}")


def _wait_ready(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        status, text = _fetch(f"{url}/health/ready")
        if status == 200:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"not ready after {seconds:.0f} s: {status} {text[:_MAX_SHOWN]}")
        time.sleep(_POLL_S)


def _fetch(url: str, body: dict[str, Any] | None = None, *, key: str = "") -> tuple[int, str]:
    """Status and text of an answer; status 0 where nothing answers."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode(errors="replace")
    except (OSError, HTTPException) as exc:
        return 0, str(exc) or type(exc).__name__


def main() -> None:
    url, seconds = sys.argv[1:]
    try:
        found = try_release(url, seconds=float(seconds), key=os.environ.get(KEY_VARIABLE, ""))
    except RuntimeError as exc:
        sys.exit(str(exc))
    print(found)  # noqa: T201


if __name__ == "__main__":
    main()
