"""Helm: what installs the chart, as a library in this process or as the `helm` program.

Not the chart and not its values. The one decision: both engines answer the same six questions in
the same words, so nothing above knows which one runs, and a test compares them on a real server.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.errors import UsageError

from .chart import chart_path
from .release import HelmEngine, Release, Revision, documents

__all__ = ["HelmEngine", "Release", "Revision", "chart_path", "documents", "open_helm"]


def open_helm(*, context: str | None, namespace: str) -> HelmEngine:
    """The engine to use: the library where it is installed, else the program on the path.

    Raises:
        UsageError: there is neither.
    """
    try:
        from .sdk import SdkEngine
    except ImportError:
        program = shutil.which("helm")
        if program is None:
            raise UsageError(
                "Helm is missing: neither the package helm-python-sdk nor the program `helm`",
                hint="Either: pip install helm-python-sdk. Or install Helm 3 or 4 (helm.sh).",
            ) from None
        from .binary import BinaryEngine

        return BinaryEngine(Path(program), context=context, namespace=namespace)
    return SdkEngine(context=context, namespace=namespace)
