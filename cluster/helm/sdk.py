"""Helm as a library in this process (the package helm-python-sdk: the engine of Helm 4).

Importing this module fails where the library is missing or cannot be loaded. The library reads the
environment that the process started with, so a kubeconfig that was chosen later is named to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

try:
    import helm_python
except Exception as exc:  # its own class cannot be had from a package that fails to import
    raise ImportError(f"helm_python: {exc}") from exc

from cluster.errors import NotRunningError

from .chart import chart_archive
from .failures import explain, is_not_found
from .release import Release, Revision, Values, normalise
from .uninterrupted import uninterrupted

_TIMEOUT_S = 120
_Result = TypeVar("_Result")


class SdkEngine:
    """The engine on helm_python; a configuration lives as long as one operation."""

    def __init__(self, *, context: str | None, namespace: str) -> None:
        self._context = context
        self._namespace = namespace

    def __str__(self) -> str:
        return f"Helm {helm_python.helm_sdk_version()} in this process"

    def render(self, values: Values, *, name: str, namespace: str) -> str:
        def run() -> str:
            with (
                helm_python.Chart.load_archive(chart_archive()) as chart,
                helm_python.Config(storage_driver="memory", namespace=namespace) as config,
            ):
                made = config.install(chart, name, values, dry_run="client")
                return str(made["manifest"])

        return normalise(self._run(run))

    def deploy(self, values: Values, *, name: str, is_upgrade: bool, is_dry_run: bool) -> str:
        dry_run = "server" if is_dry_run else None

        def run() -> str:
            with helm_python.Chart.load_archive(chart_archive()) as chart, self._config() as config:
                if is_upgrade:
                    made = config.upgrade(
                        chart, name, values, timeout=_TIMEOUT_S, dry_run=dry_run, reset_values=True
                    )
                else:
                    made = config.install(chart, name, values, timeout=_TIMEOUT_S, dry_run=dry_run)
                return str(made["manifest"])

        return normalise(self._run(run))

    def rollback(self, name: str, revision: int) -> None:
        def run() -> None:
            with self._config() as config:
                config.rollback(name, version=revision, timeout=_TIMEOUT_S)

        self._run(run)

    def uninstall(self, name: str) -> None:
        def run() -> None:
            with self._config() as config:
                config.uninstall(name, timeout=_TIMEOUT_S)

        self._run(run)

    def history(self, name: str) -> list[Revision]:
        def run() -> list[dict[str, Any]]:
            with self._config() as config:
                return config.history(name)

        try:
            found = self._run(run)
        except NotRunningError:
            return []
        return [
            Revision(
                number=int(entry["revision"]),
                status=str(entry["status"]),
                description=str(entry.get("description", "")),
            )
            for entry in found
        ]

    def release(self, name: str, revision: int | None = None) -> Release:
        def run() -> Release:
            with self._config() as config:
                summary = config.status(name, revision=revision)
                values = config.get_values(name, revision=revision)
            return Release(
                revision=int(summary["revision"]),
                values=values or {},
                manifest=normalise(str(summary["manifest"])),
            )

        return self._run(run)

    def _config(self) -> helm_python.Config:
        named = os.environ.get("KUBECONFIG", "")
        return helm_python.Config(
            kubeconfig_path=named if named and os.pathsep not in named else None,
            kube_context=self._context,
            namespace=self._namespace,
        )

    def _run(self, operation: Callable[[], _Result]) -> _Result:
        try:
            return uninterrupted(operation)
        except helm_python.HelmError as exc:
            if is_not_found(str(exc)):
                raise NotRunningError(f"Helm knows no such release in {self._namespace}") from exc
            raise explain(str(exc), namespace=self._namespace) from exc
