"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Name = Annotated[str, typer.Option(help="Name of the running Shoal; several may run side by side.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="File with your API key in it (default: SHOAL_API_KEY)."),
]
