"""`shoal up`: plan, start, show, ask one question if wanted, serve until Ctrl-C."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import KeyFile, Name

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.access import Access
    from cluster.local.folder import RunState
    from cluster.local.interrupts import Interrupts
    from cluster.local.supervisor import Deployment
    from cluster.plan import Fetch, Options
    from cluster.planner import Machine

    from .question import Question


def up(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file; without one, the demo model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A preset's name, a folder with a model's files, or where a hub has them, as"
            " Qwen/Qwen2.5-7B-Instruct."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the hub's repository.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: 127.0.0.1; 0.0.0.0: all).")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API and the page.")] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option("--allow-anonymous", help="Serve other machines without any API key."),
    ] = False,
    new_key: Annotated[
        bool,
        typer.Option("--new-key", help="Need API keys; make the first one if there is none."),
    ] = False,
    key_file: KeyFile = None,
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
    from cluster.plan import Options
    from cluster.planner import Machine

    from .display import make_display
    from .fetch import ModelFetcher
    from .question import Question

    if once and detach:
        raise UsageError("--once and --detach exclude each other")
    options = Options(
        model=model,
        revision=revision,
        host=host,
        port=port,
        allow_anonymous=allow_anonymous or None,
        replicas=replicas,
    )
    console = Console(soft_wrap=True, highlight=False)
    with Interrupts() as interrupts:
        _refuse_or_clean(name, console)
        machine = Machine.detect()
        fetch = ModelFetcher(console, interrupts, max_bytes=machine.largest_model_bytes)
        deployment, access, choices = plan_deployment(
            config, options, wants_new_key=new_key, machine=machine, fetch=fetch
        )
        question = Question.prepare(access, key_file) if ask or once else None
        console.print("\n".join(choices), style="dim", markup=False)
        _print_access(console, access)
        if detach:
            start = DetachedStart(name, deployment)
            with make_display(console) as display:
                state = start.follow(display, interrupts)
            if question is not None:
                question.ask(console, deployment, interrupts)
            _print_addresses(console, state, access, is_detached=True)
        else:
            run = _Run(console, name, deployment, access, interrupts)
            run.serve(question, is_once=once)


def plan_deployment(
    config: Path | None,
    options: Options,
    *,
    wants_new_key: bool,
    machine: Machine | None = None,
    fetch: Fetch | None = None,
) -> tuple[Deployment, Access, list[str]]:
    """Load, check and resolve the configuration, and render what Serve is asked to run.

    The third value tells what was chosen for this machine (by default, the one that this runs on),
    and why. `fetch` brings models that have a repository and no folder.

    Raises:
        UsageError: every problem of the configuration, a model that does not fit, a port that is
            taken, or nobody decided who may use the API.
    """
    from cluster.access import decide_access
    from cluster.errors import UsageError
    from cluster.local.supervisor import Deployment
    from cluster.manifests import serve_applications
    from cluster.plan import load_config
    from cluster.planner import Machine, check_local, explain, resolve, with_predictions
    from serve.errors import SetupError

    machine = machine or Machine.detect()
    try:
        resolved = resolve(load_config(config, options=options, fetch=fetch), machine)
        check_local(resolved, machine)
        resolved = with_predictions(resolved, machine)
    except SetupError as exc:
        message = f"the configuration cannot be used\n{exc.message}"
        raise UsageError(message, hint="Nothing was started.") from exc
    _check_listening(resolved.http.host, resolved.http.port)
    access = decide_access(resolved.http, wants_new_key=wants_new_key)
    deployment = Deployment(
        body=serve_applications(resolved.model_copy(update={"http": access.http})),
        host=access.http.host,
        port=access.http.port,
        models=tuple(entry.name or "" for entry in resolved.models),
        longest_generation_s=max(entry.longest_generation_s for entry in resolved.models),
    )
    return deployment, access, explain(resolved, machine)


def _check_listening(host: str, port: int) -> None:
    from cluster.errors import UsageError
    from cluster.local.ports import ANOTHER_PORT, describe_listener, listening_error

    error = listening_error(host, port)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        raise UsageError(
            f"port {port} is in use by {describe_listener(port)}",
            hint=ANOTHER_PORT,
        )
    raise UsageError(
        f"nothing can listen on port {port} of {host}: {error.strerror}",
        hint="http.host (--host) must be an address of this machine, or 0.0.0.0 for all of them.",
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


@dataclass(frozen=True, slots=True)
class _Run:
    """A Shoal in the foreground."""

    console: Console
    name: str
    deployment: Deployment
    access: Access
    interrupts: Interrupts

    def serve(self, question: Question | None, *, is_once: bool) -> None:
        """Start, ask, serve until a signal, and end, whatever happens."""
        from cluster.local.folder import create_run
        from cluster.local.supervisor import Supervisor

        from .display import make_display

        console, interrupts = self.console, self.interrupts
        run = create_run(self.name)
        display = make_display(console)
        supervisor = Supervisor(run, self.deployment, listener=display, interrupts=interrupts)
        ending = "Ending what was started."
        try:
            with display:
                supervisor.start()
            ending = "Ending. Running answers may finish; Ctrl-C ends them at once."
            if question is not None:
                question.ask(console, self.deployment, interrupts)
            if not is_once and not interrupts.num_received:
                _print_addresses(console, run.state, self.access, is_detached=False)
                supervisor.watch()
        finally:
            try:
                if not is_once:
                    console.print(f"\n{ending}")
            finally:  # whoever read our output may have gone: end all the same
                supervisor.stop()
        if not is_once:
            console.print("Ended; nothing is left behind.")


def _print_access(console: Console, access: Access) -> None:
    """A key that was made, this once; and that everyone is served, if that is so."""
    if access.new_key is not None:
        lines = [
            f"A new API key, shown only now; its hash is in {access.http.keys_file}:",
            "",
            f"  {access.new_key}",
            "",
        ]
        console.print("\n".join(lines), markup=False)
    if access.is_open_to_anyone:
        console.print(
            f"[bold yellow]warning:[/bold yellow] no API key is needed: anyone who can reach"
            f" {access.http.host}:{access.http.port} can use the models."
        )


def _print_addresses(
    console: Console, state: RunState, access: Access, *, is_detached: bool
) -> None:
    from cluster.keys import KEY_VARIABLE
    from cluster.local.folder import DEFAULT_NAME, open_run

    from .display import address_lines, command_name

    shoal = command_name()
    suffix = "" if state.name == DEFAULT_NAME else f" --name {state.name}"
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    if len(state.models) > 1:
        body = body.replace("{", f'{{"model": "{state.models[0]}", ', 1)
    keys, grant = [], ""
    if access.has_keys:
        keys = [f"  API keys        in {access.http.keys_file}, as hashes; every request needs one"]
        grant = f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    lines = [
        f"Serving {', '.join(state.models)}",
        *address_lines(state.addresses),
        *keys,
        f"  Ray dashboard   {state.dashboard_address}",
        f"                  it asks for a token: cat {open_run(state.name).token_path}",
        "Try",
        *([f"  export {KEY_VARIABLE}=...  # the key"] if keys else []),
        f"  {shoal} chat{suffix}",
        f"  {shoal} status{suffix}",
        f"  curl {state.address}/v1/chat/completions{grant} -H 'Content-Type: application/json' \\",
        f"    -d '{body}'",
        f"End it with {shoal} down{suffix}" if is_detached else "Ctrl-C ends it.",
    ]
    console.print("\n".join(lines), markup=False)
