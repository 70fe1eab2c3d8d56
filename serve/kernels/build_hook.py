"""Hatchling's hook: compiles the CPU kernels when Shoal is installed or packed into a wheel.

Not needed for Shoal to work, so never a reason for an installation to fail: without a compiler the
wheel is pure and one line says what follows. An editable installation gets what its machine can
run, a wheel every instruction set.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Adds the libraries to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the wheel is put together; `version` is "editable" or "standard"."""
        package = Path(self.root) / "serve" / "kernels"
        build = _load(package / "build.py")
        is_editable = version == "editable"
        isas = (is_editable and build.usable_isas()) or build.INSTALLED_ISAS
        try:
            build.build(isas)
        except build.BuildError as error:
            self.app.display_warning(f"CPU kernels not built, torch serves instead: {error}")
        built = [path for path in map(build.library_path, isas) if build.is_current(path)]
        if built and not is_editable:
            inside = {str(path): str(path.relative_to(self.root)) for path in built}
            build_data["force_include"].update(inside)
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"


def _load(path: Path) -> ModuleType:
    """A module by its file: what is being installed cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("shoal_kernels_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
