"""Where the chart is: data of the package in a wheel, a folder of the repository in a checkout."""

from __future__ import annotations

from pathlib import Path


def chart_path() -> Path:
    """The folder of the chart: data of this package in a wheel, `helm/shoal` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_helm" / "shoal"
    return installed if installed.is_dir() else package.parent / "helm" / "shoal"
