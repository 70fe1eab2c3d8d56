"""HTTP to servers on this machine: Ray's dashboard, our own API. JSON in, JSON out.

Not a general client: no proxies (so that a proxy variable of the user's changes nothing), no TLS,
no redirects, one connection a call.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered; `text` is its whole body."""

    status: int
    text: str

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        return json.loads(self.text)


def call(
    method: str,
    port: int,
    path: str,
    *,
    host: str = "127.0.0.1",
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 5.0,
) -> Answer:
    """One request.

    Raises:
        OSError: nobody listens, or no answer within `timeout_s`.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if content else {}
        connection.request(method, path, body=content, headers={**sent, **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, response.read().decode(errors="replace"))
    except http.client.HTTPException as exc:
        raise ConnectionError(f"{method} {path}: {exc!r}") from exc
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class ServeApi:
    """Ray Serve's part of the dashboard's REST API, with Ray's token."""

    port: int
    token_path: Path

    def put_applications(self, body: dict[str, Any], *, timeout_s: float) -> Answer:
        """Deploy `body`; what is already deployed and unchanged stays."""
        return self._call("PUT", body=body, timeout_s=timeout_s)

    def applications(self, *, timeout_s: float = 10.0) -> dict[str, Any]:
        """Details of every application, by name; empty while Serve does not answer."""
        try:
            answer = self._call("GET", timeout_s=timeout_s)
            found = answer.json().get("applications", {}) if answer.is_ok else {}
        except (OSError, ValueError):
            return {}
        return dict(found)

    def _call(self, method: str, *, body: Any = None, timeout_s: float) -> Answer:
        token = self.token_path.read_text(encoding="ascii").strip()
        return call(
            method,
            self.port,
            "/api/serve/applications/",
            body=body,
            headers={"Authorization": f"Bearer {token}"},
            timeout_s=timeout_s,
        )
