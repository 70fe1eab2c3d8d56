"""`shoal up`: plan, start, show, ask one question if wanted, serve until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Name

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.local.folder import RunState
    from cluster.local.interrupts import Interrupts
    from cluster.local.supervisor import Deployment

FIRST_QUESTION = "What is Shoal?"
_ANSWER_TOKENS = 256


def up(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file; without one, the demo model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A preset's name, or a folder with a model's files.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API and the page.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of every model.")] = None,
    name: Name = "default",
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background.")] = False,
    ask: Annotated[bool, typer.Option("--ask", help="Ask the model one question first.")] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Ask one question, print the answer and end.")
    ] = False,
) -> None:
    """Start Ray, Ray Serve and the models, and serve until Ctrl-C."""
    from rich.console import Console

    from cluster.errors import UsageError
    from cluster.local.detached import DetachedStart
    from cluster.local.interrupts import Interrupts

    from .display import make_display

    if once and detach:
        raise UsageError("--once and --detach exclude each other")
    console = Console(soft_wrap=True, highlight=False)
    with Interrupts() as interrupts:
        _refuse_or_clean(name, console)
        deployment = plan_deployment(config, model=model, port=port, replicas=replicas)
        if detach:
            start = DetachedStart(name, deployment)
            with make_display(console) as display:
                state = start.follow(display, interrupts)
            if ask:
                _ask(console, deployment, interrupts)
            _print_addresses(console, state, is_detached=True)
        else:
            _run(console, name, deployment, interrupts, has_question=ask or once, is_once=once)


def plan_deployment(
    config: Path | None, *, model: str | None, port: int | None, replicas: int | None
) -> Deployment:
    """Load, check and resolve the configuration, and render what Serve is asked to run.

    Raises:
        UsageError: every problem of the configuration, or a port that is taken.
    """
    from cluster.errors import UsageError
    from cluster.local.ports import describe_listener, is_port_free
    from cluster.local.supervisor import Deployment
    from cluster.manifests import serve_applications
    from cluster.plan import Options, load_config
    from cluster.planner import Machine, resolve
    from serve.errors import SetupError

    try:
        options = Options(model=model, port=port, replicas=replicas)
        resolved = resolve(load_config(config, options=options), Machine.detect())
    except SetupError as exc:
        message = f"the configuration cannot be used\n{exc.message}"
        raise UsageError(message, hint="Nothing was started.") from exc
    http = resolved.http
    if not is_port_free(http.port):
        raise UsageError(
            f"port {http.port} is in use by {describe_listener(http.port)}",
            hint="Choose another one: --port N, or `http: {port: N}` in the configuration.",
        )
    return Deployment(
        body=serve_applications(resolved),
        host=http.host,
        port=http.port,
        models=tuple(entry.name or "" for entry in resolved.models),
        longest_generation_s=max(entry.longest_generation_s for entry in resolved.models),
    )


def _refuse_or_clean(name: str, console: Console) -> None:
    from cluster.errors import AlreadyRunningError, NotRunningError
    from cluster.local.folder import open_run
    from cluster.local.sweep import end_run

    try:
        run = open_run(name)
    except NotRunningError:
        return
    if run.state.is_owned():
        raise AlreadyRunningError(
            f"a Shoal named {name!r} is {run.state.phase} at {run.state.address}",
            hint="Use it, end it with `shoal down`, or start another one with `--name`.",
        )
    console.print(f"A Shoal named {name!r} ended without cleaning up; removing what it left.")
    end_run(run)


def _run(
    console: Console,
    name: str,
    deployment: Deployment,
    interrupts: Interrupts,
    *,
    has_question: bool,
    is_once: bool,
) -> None:
    from cluster.local.folder import create_run
    from cluster.local.supervisor import Supervisor

    from .display import make_display

    run = create_run(name)
    display = make_display(console)
    supervisor = Supervisor(run, deployment, listener=display, interrupts=interrupts)
    try:
        with display:
            supervisor.start()
        if has_question:
            _ask(console, deployment, interrupts)
        if not is_once and not interrupts.num_received:
            _print_addresses(console, run.state, is_detached=False)
            supervisor.watch()
    finally:
        try:
            if not is_once:
                console.print("\nEnding. Running answers may finish; Ctrl-C ends them at once.")
        finally:  # whoever read our output may have gone: end all the same
            supervisor.stop()
    if not is_once:
        console.print("Ended; nothing is left behind.")


def _ask(console: Console, deployment: Deployment, interrupts: Interrupts) -> None:
    """Ask the first model one question and print the answer as it streams."""
    from cluster.chat import AnswerStream, Message

    console.print(f"\n[bold]You[/bold]    {FIRST_QUESTION}\n[bold]Shoal[/bold]  ", end="")
    question = [Message("user", FIRST_QUESTION)]
    with AnswerStream(
        deployment.host,
        deployment.port,
        question,
        model=deployment.models[0],
        max_tokens=_ANSWER_TOKENS,
    ) as answer:
        for piece in answer:
            console.print(piece, end="", markup=False)
            if interrupts.num_received:
                break
    console.print("\n")


def _print_addresses(console: Console, state: RunState, *, is_detached: bool) -> None:
    from cluster.local.folder import DEFAULT_NAME, open_run

    from .display import command_name

    shoal = command_name()
    suffix = "" if state.name == DEFAULT_NAME else f" --name {state.name}"
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    if len(state.models) > 1:
        body = body.replace("{", f'{{"model": "{state.models[0]}", ', 1)
    lines = [
        f"Serving {', '.join(state.models)}",
        f"  API and page    {state.address}",
        f"  Ray dashboard   {state.dashboard_address}",
        f"                  it asks for a token: cat {open_run(state.name).token_path}",
        "Try",
        f"  {shoal} chat{suffix}",
        f"  {shoal} status{suffix}",
        f"  curl {state.address}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d '{body}'",
        f"End it with {shoal} down{suffix}" if is_detached else "Ctrl-C ends it.",
    ]
    console.print("\n".join(lines), markup=False)
