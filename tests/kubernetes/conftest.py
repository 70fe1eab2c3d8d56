"""The chart through the real Helm 3 command, against the real API server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.control_plane import ApiServer

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "shoal"
HELM_TIMEOUT_S = 100.0
Values = dict[str, Any]


@dataclass(frozen=True)
class Helm:
    """`helm` as one user runs it in one namespace."""

    binary: Path
    home: Path
    folder: Path
    kubeconfig: Path
    namespace: str
    chart: Path = CHART

    def install(self, values: Values, *flags: str, name: str = "chat") -> str:
        return self("install", name, str(self.chart), *self.written(values), *flags)

    def upgrade(
        self, values: Values, *flags: str, name: str = "chat", chart: Path | None = None
    ) -> str:
        return self("upgrade", name, str(chart or self.chart), *self.written(values), *flags)

    def render(self, values: Values, *flags: str, name: str = "chat") -> list[dict[str, Any]]:
        text = self("template", name, str(self.chart), *self.written(values), *flags)
        return [document for document in yaml.safe_load_all(text) if document]

    def history(self, name: str = "chat") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self("history", name, "-o", "json"))
        return found

    def as_user(self, kubeconfig: Path) -> Helm:
        """The same with another user's rights."""
        return replace(self, kubeconfig=kubeconfig)

    def __call__(self, *arguments: str) -> str:
        """What the command prints; fails the test with what it says if it fails."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.binary, *arguments, "--namespace", self.namespace],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "KUBECONFIG": str(self.kubeconfig),
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
        )

    def written(self, values: Values) -> Sequence[str]:
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        return ("--values", str(path))


@pytest.fixture(scope="session")
def helm_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every helm remembers what kinds the server has: asking takes most of its time."""
    return tmp_path_factory.mktemp("helm-home")


@pytest.fixture
def helm(
    helm_binary: Path, helm_home: Path, api_server: ApiServer, namespace: str, tmp_path: Path
) -> Helm:
    """The administrator's helm in a fresh namespace."""
    return Helm(helm_binary, helm_home, tmp_path, api_server.kubeconfig, namespace)
