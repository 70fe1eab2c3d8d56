"""A small hub on loopback: what a hub answers to those who fetch a model, and how it fails them.

Beside it a second server, the storage that real hubs redirect to for large files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from cluster.download import Hub, Marker, Pace, Watcher, download_weights

REPOSITORY = "shoal/demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
DEMO = Path(__file__).parents[2] / "serve" / "demo"
WEIGHTS = "model.safetensors"
OTHERS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
QUICK = Pace(first_pause_s=0.01, max_failures=3, tell_period_s=0.05)


@dataclass
class StandInHub:
    """A hub with one repository; a test changes what it holds and how it behaves."""

    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    needs_token: bool = False
    refusal: tuple[int, str] | None = None  # status and code of every answer
    file_refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # the same of a file
    sizes: dict[str, int] = field(default_factory=dict)  # what it claims, where that is not true
    has_ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # the next answers for weights end after so many
    damaged: bool = False
    gate: threading.Event | None = None  # weights stop in the middle until it is set
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    address: str = ""
    storage_address: str = ""

    def description(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            size = self.sizes.get(name, len(content))
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": size,
                "blobId": _git_digest(content),
            }
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": size, "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPOSITORY, "sha": "", "siblings": siblings}

    def tree(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": entry["rfilename"],
                "size": entry["size"],
                "oid": entry["blobId"],
                **(
                    {"lfs": {**entry["lfs"], "oid": entry["lfs"]["sha256"]}}
                    if "lfs" in entry
                    else {}
                ),
            }
            for entry in self.description()["siblings"]
        ]

    def ranges(self, name: str) -> list[str]:
        """The Range of each GET of a file, in order; "" for the whole."""
        return [headers.get("range", "") for path, headers in self.requests if path == f"/s/{name}"]


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        headers = {name.lower(): text for name, text in self.headers.items()}
        self.hub.requests.append((path, headers))
        if path.startswith("/s/"):
            self._send_file(path[3:])
        elif self.hub.refusal is not None:
            self._refuse(*self.hub.refusal)
        elif self.hub.needs_token and headers.get("authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "RepoNotFound")
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._describe(path.rpartition("/revision/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._answer(200, json.dumps(self.hub.tree()).encode())
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            name = path.rpartition("/")[2]
            if name in self.hub.file_refusals:
                self._refuse(*self.hub.file_refusals[name])
            else:
                self._resolve(name)
        else:
            self._refuse(404, "RepoNotFound")

    def _describe(self, revision: str) -> None:
        commit = revision if revision in self.hub.commits.values() else None
        commit = self.hub.commits.get(revision, commit)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        self._answer(200, json.dumps({**self.hub.description(), "sha": commit}).encode())

    def _resolve(self, name: str) -> None:
        """Large files are elsewhere; the answer says what they are, as a hub's does."""
        content = self.hub.files[name]
        digest = hashlib.sha256(content).hexdigest()
        self.send_response(302)
        self.send_header("Location", f"{self.hub.storage_address}/s/{name}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, name: str) -> None:
        content = self.hub.files[name]
        if self.hub.damaged and name == WEIGHTS:
            content = bytes(len(content))
        wanted = self.headers.get("Range")
        start = 0
        if wanted and self.hub.has_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if name == WEIGHTS and self.hub.cuts:
            self.wfile.write(rest[: self.hub.cuts.pop(0)])
            self.close_connection = True
        elif name == WEIGHTS and self.hub.gate is not None:
            half = len(rest) // 2
            self.wfile.write(rest[:half])
            self.hub.gate.wait(60)
            with contextlib.suppress(OSError):  # the client may be dead by now
                self.wfile.write(rest[half:])
        else:
            self.wfile.write(rest)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"no: {code}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """A hub that has the demo model, a note and weights as a pickle."""
    files = {name: (DEMO / name).read_bytes() for name in (WEIGHTS, *OTHERS)}
    files |= {"README.md": b"read me", "pytorch_model.bin": b"\x80", "modeling.py": b"import os"}
    hub = StandInHub(files)
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.address = f"http://127.0.0.1:{servers[0].server_port}"
    hub.storage_address = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    yield hub
    if hub.gate is not None:
        hub.gate.set()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


class Watched(Watcher):
    """Keeps what it is told; ends the download once it is `stopped`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.stopped = threading.Event()

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_progress(self, num_bytes: int, num_total_bytes: int) -> None:
        self.progress.append((num_bytes, num_total_bytes))

    def is_stopped(self) -> bool:
        return self.stopped.is_set()


@dataclass
class Downloads:
    """What a test does: fetch the repository into one folder."""

    hub: StandInHub
    folder: Path
    watcher: Watched = field(default_factory=lambda: Watched())

    @property
    def lines(self) -> list[str]:
        return self.watcher.lines

    def __call__(
        self, revision: str = "main", *, token: str = "", address: str | None = None
    ) -> Marker:
        endpoint = self.hub.address if address is None else address
        return download_weights(
            REPOSITORY,
            self.folder,
            revision=revision,
            hub=Hub(endpoint, token=token),
            watcher=self.watcher,
            pace=QUICK,
        )

    def names(self) -> set[str]:
        """Files that a model's reader would see."""
        return {path.name for path in self.folder.glob("[!.]*")}


@pytest.fixture
def download(hub: StandInHub, tmp_path: Path) -> Downloads:
    return Downloads(hub, tmp_path / "model")


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """Return once a condition holds."""

    def wait(condition: Callable[[], bool]) -> None:
        for _ in range(6000):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("it never happened")

    return wait
