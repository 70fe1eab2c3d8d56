"""Where the programs are: built by `tests/kubernetes/tools/build`, or on the PATH.

Not an installer: what is missing is named with the command that brings it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "tests" / "kubernetes" / "tools" / "build"
_MODULES = {
    "helm": "helm.sh/helm/v3",
    "kubeconform": "github.com/yannh/kubeconform",
    "kube-apiserver": "k8s.io/kubernetes",
    "kube-scheduler": "k8s.io/kubernetes",
    "kwok": "sigs.k8s.io/kwok",
}


class ToolMissingError(Exception):
    """A program is not there; the message says what brings it."""


def find_tool(name: str) -> Path:
    """The program `name` in the version that the tests want.

    Raises:
        ToolMissingError: it is not installed.
    """
    module = _MODULES.get(name)
    if module is None:
        return _on_path(name)
    built = tools_folder() / "bin" / f"{name}-{_required(module)}"
    if not built.exists():
        command = BUILD.relative_to(ROOT)
        raise ToolMissingError(
            f"no {built.name}: `{command}` builds it once, in minutes, with Go {_required('go')};"
            f" here is {_go_version()}"
        )
    return built


def tools_folder() -> Path:
    """Where built programs are kept between checkouts and runs."""
    if chosen := os.environ.get("SHOAL_TOOLS"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "shoal-tools"


def _on_path(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        package = "etcd-server" if name == "etcd" else name
        raise ToolMissingError(f"no {name} on the PATH (Debian, Ubuntu: apt-get install {package})")
    return Path(found)


def _required(module: str) -> str:
    """The version of `module`, or of "go" itself, that go.mod asks for."""
    text = (BUILD.parent / "go.mod").read_text()
    found = re.search(rf"^\s*(?:require )?{re.escape(module)} (v?\d\S+)", text, flags=re.MULTILINE)
    assert found, f"go.mod requires {module}"
    return found[1]


@functools.cache
def _go_version() -> str:
    go = shutil.which("go")
    if go is None:
        return "no go on the PATH"
    local = {**os.environ, "GOTOOLCHAIN": "local"}
    found = subprocess.run([go, "env", "GOVERSION"], env=local, capture_output=True, text=True)
    return found.stdout.strip() or f"{go}, which does not say its version"
