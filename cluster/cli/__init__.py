"""`shoal`, the command: one module per command, and what they share.

Not where anything is done: a command parses, calls the layers below and shows what they say. The
one decision: a module imports at its top only what its help needs, so that `shoal --help` is quick
and torch and Ray are never imported here.
"""

from __future__ import annotations

import sys

import typer

from cluster.errors import CommandError

from . import (
    chat,
    deploy,
    down,
    download,
    inspect_model,
    keys,
    logs,
    manifests,
    plan,
    rollback,
    status,
    undeploy,
    up,
    upgrade,
)

EXIT_CODES = """Exit codes:

0  done

1  failed; the message names the cause

2  the command line or the configuration cannot be used

3  a Shoal of that name runs already

4  no Shoal of that name runs

130  ended by Ctrl-C before it was ready
"""

app = typer.Typer(
    name="shoal",
    help="Serve Qwen2.5 models by Ray, with an OpenAI-compatible endpoint: here, or on Kubernetes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up", epilog=EXIT_CODES)(up.up)
app.command("status", epilog=EXIT_CODES)(status.status)
app.command("chat", epilog=EXIT_CODES)(chat.chat)
app.command("logs", epilog=EXIT_CODES)(logs.logs)
app.command("down", epilog=EXIT_CODES)(down.down)
app.command("inspect", epilog=EXIT_CODES)(inspect_model.inspect)
app.command("plan", epilog=EXIT_CODES)(plan.plan)
app.add_typer(keys.app, name="keys", epilog=EXIT_CODES)
app.command("download", epilog=EXIT_CODES)(download.download)
app.command("deploy", epilog=EXIT_CODES)(deploy.deploy)
app.command("upgrade", epilog=EXIT_CODES)(upgrade.upgrade)
app.command("rollback", epilog=EXIT_CODES)(rollback.rollback)
app.command("undeploy", epilog=EXIT_CODES)(undeploy.undeploy)
app.command("manifests", epilog=EXIT_CODES)(manifests.manifests)


def main() -> None:
    """Run the command line and end with its exit code."""
    try:
        app()
    except CommandError as exc:
        show_error(exc)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def show_error(exc: CommandError) -> None:
    """Print a message and what to do about it on standard error."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), exc.message))
    if exc.hint:
        console.print(Text(exc.hint, style="dim"))
