"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Name = Annotated[str, typer.Option(help="Name of the running Shoal; several may run side by side.")]
