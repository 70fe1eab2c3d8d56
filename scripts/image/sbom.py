"""What the image is made of, as CycloneDX 1.6 JSON: `python -m scripts.image.sbom`.

The Python part is what pip lists in the image (the lock holds versions for several Pythons, an
image one of them); the operating system's is dpkg's. Not a scanner: nothing is guessed from files.
Two runs over the same lists write the same bytes: no serial number, no time.

    docker run --rm IMAGE pip list --format=freeze >installed.txt
    docker run --rm IMAGE \\
      dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\\n' >packages.txt
    python -m scripts.image.sbom installed.txt packages.txt >sbom.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def make_sbom(installed: Path, packages: Path) -> dict[str, Any]:
    """The document; every component has a name, a version and a purl."""
    pythons = [_python(line) for line in installed.read_text(encoding="utf-8").splitlines()]
    systems = [_package(line) for line in packages.read_text(encoding="utf-8").splitlines()]
    bom = Bom(components=[_component(purl) for purl in pythons + systems])
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["serialNumber"], document["metadata"]["timestamp"]
    return document


def _python(line: str) -> PackageURL:
    """One line of pip: name==version."""
    name, version = line.split("==")
    return PackageURL("pypi", None, name, version)


def _package(line: str) -> PackageURL:
    """One line of dpkg-query: name, version, architecture."""
    name, version, architecture = line.split()
    return PackageURL("deb", "debian", name, version, {"arch": architecture})


def _component(purl: PackageURL) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        name=purl.name,
        version=purl.version,
        purl=purl,
    )


def main() -> None:
    """Write the document to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("installed", type=Path, help="pip's lines, as name==version")
    parser.add_argument("packages", type=Path, help="dpkg-query's lines")
    arguments = parser.parse_args()
    json.dump(make_sbom(arguments.installed, arguments.packages), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
