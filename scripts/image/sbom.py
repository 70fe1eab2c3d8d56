"""What the image is made of, as CycloneDX 1.6 JSON: `python -m scripts.image.sbom`.

The Python part is what pip lists in the image, through cyclonedx-bom (the lock holds versions for
several Pythons, an image one of them); the operating system's is dpkg's. Not a scanner: nothing is
guessed from files.

    docker run --rm IMAGE pip list --format=freeze >installed.txt
    docker run --rm IMAGE \\
      dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\\n' >packages.txt
    python -m scripts.image.sbom installed.txt packages.txt >sbom.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


def make_sbom(installed: Path, packages: Path) -> dict[str, Any]:
    """The document; every component has a name, a version and a purl."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(installed)]
    command += ["--output-format", "JSON", "--spec-version", "1.6", "--output-reproducible"]
    made = subprocess.run(command, capture_output=True, check=True, text=True)
    document: dict[str, Any] = json.loads(made.stdout)
    lines = packages.read_text(encoding="utf-8").splitlines()
    document.setdefault("components", []).extend(map(_package, lines))
    return document


def _package(line: str) -> dict[str, str]:
    """One line of dpkg-query: name, version, architecture."""
    name, version, architecture = line.split()
    purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


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
