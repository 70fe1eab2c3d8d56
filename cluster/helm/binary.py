"""Helm as the program `helm`, version 3 or 4, found on the path.

Values travel on its standard input, so they are neither in a file nor in the list of processes. It
runs in a session of its own: Ctrl-C in the terminal does not cut an operation in the middle.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cluster.errors import ClusterError, NotRunningError

from .chart import chart_path
from .failures import explain, is_not_found
from .release import Release, Revision, Values, normalise
from .uninterrupted import uninterrupted

_TIMEOUT_S = 180
# The library's own; without it a rendering would depend on who built the program.
KUBERNETES_VERSION = "1.36.0"


class BinaryEngine:
    """The engine on a `helm` program."""

    def __init__(self, program: Path, *, context: str | None, namespace: str) -> None:
        self._program = program
        self._namespace = namespace
        self._where = ["--namespace", namespace]
        if context is not None:
            self._where += ["--kube-context", context]

    def __str__(self) -> str:
        return f"{self._program}"

    def render(self, values: Values, *, name: str, namespace: str) -> str:
        chart = str(chart_path())
        where = ["--namespace", namespace, "--kube-version", KUBERNETES_VERSION]
        return normalise(
            self._run("template", name, chart, "--no-hooks", "-f", "-", *where, values=values)
        )

    def deploy(self, values: Values, *, name: str, is_upgrade: bool, is_dry_run: bool) -> str:
        action = ["upgrade", "--reset-values"] if is_upgrade else ["install"]
        dry_run = ["--dry-run=server"] if is_dry_run else []
        chart = str(chart_path())
        made = self._run(
            *action, name, chart, "-f", "-", "-o", "json", *dry_run, *self._where, values=values
        )
        return normalise(str(json.loads(made)["manifest"]))

    def rollback(self, name: str, revision: int) -> None:
        self._run("rollback", name, str(revision), *self._where)

    def uninstall(self, name: str) -> None:
        self._run("uninstall", name, *self._where)

    def history(self, name: str) -> list[Revision]:
        try:
            found = json.loads(self._run("history", name, "-o", "json", *self._where))
        except NotRunningError:
            return []
        return [
            Revision(int(entry["revision"]), str(entry["status"]), str(entry["description"]))
            for entry in found
        ]

    def release(self, name: str, revision: int | None = None) -> Release:
        number = revision if revision is not None else self.history(name)[-1].number
        which = ["--revision", str(number), *self._where]
        values = json.loads(self._run("get", "values", name, "-o", "json", *which))
        manifest = self._run("get", "manifest", name, *which)
        return Release(revision=number, values=values or {}, manifest=normalise(manifest))

    def _run(self, *arguments: str, values: Values | None = None) -> str:
        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(self._program), *arguments],
                input=None if values is None else json.dumps(values),
                stdin=subprocess.DEVNULL if values is None else None,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                start_new_session=True,
                check=False,
            )

        try:
            ended = uninterrupted(run)
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise ClusterError(f"{self._program} {arguments[0]} cannot be run: {exc}") from exc
        if ended.returncode == 0:
            return ended.stdout
        if is_not_found(ended.stderr):
            raise NotRunningError(f"Helm knows no such release in {self._namespace}")
        raise explain(ended.stderr, namespace=self._namespace)
