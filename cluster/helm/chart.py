"""Where the chart is: data of the package in a wheel, a folder of the repository in a checkout."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

_IGNORED = (".swp", "~", ".DS_Store")


def chart_path() -> Path:
    """The folder of the chart: data of this package in a wheel, `helm/shoal` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_helm" / "shoal"
    return installed if installed.is_dir() else package.parent / "helm" / "shoal"


def chart_archive() -> bytes:
    """The chart as `helm package` would store it, with what its links lead to.

    The library writes a line on standard error for each link that it follows; this has none.
    """
    folder, buffer = chart_path(), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, dereference=True) as archive:
        archive.add(folder, arcname=folder.name, filter=_kept)
    return buffer.getvalue()


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith(_IGNORED) else entry
