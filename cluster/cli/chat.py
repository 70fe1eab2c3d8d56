"""`shoal chat`: a conversation in the terminal. Ctrl-C stops the answer, not the chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import KeyFile, Name

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.chat import Message
    from cluster.local.folder import RunState


def chat(
    name: Name = "default",
    model: Annotated[
        str | None, typer.Option(help="Which model to talk to (default: the first).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    key_file: KeyFile = None,
) -> None:
    """Talk to a running model. Ctrl-C stops an answer; Ctrl-D or an empty Ctrl-C ends the chat."""
    from rich.console import Console

    from cluster.chat import Message
    from cluster.errors import NotRunningError, UsageError
    from cluster.keys import own_key
    from cluster.local.folder import open_run

    state = open_run(name).state
    if not state.is_owned() or state.phase != "ready":
        raise NotRunningError(f"the Shoal named {name!r} is not ready", hint="See: shoal status")
    if model is not None and model not in state.models:
        raise UsageError(f"no model {model!r} here; there are: {', '.join(state.models)}")
    api_key = own_key(key_file)
    _check_key(state, api_key)
    console = Console(soft_wrap=True, highlight=False)
    turns = [Message("system", system)] if system else []
    while True:
        question = _read_question(console)
        if question is None:
            return
        if question:
            turns.append(Message("user", question))
            answer = _answer(console, state, turns, model=model or state.models[0], api_key=api_key)
            turns = [*turns, Message("assistant", answer)] if answer else turns[:-1]


def _check_key(state: RunState, api_key: str | None) -> None:
    """Say that a key is missing or wrong before the user has typed a question."""
    from cluster.chat import authorization, denied
    from cluster.local.loopback_http import call

    try:
        answer = call(
            "GET",
            state.port,
            "/v1/models",
            host=state.contact_host,
            headers=authorization(api_key),
        )
    except OSError:
        return  # what is wrong shows with the first question
    if answer.status == 401:
        raise denied(has_key=api_key is not None)


def _read_question(console: Console) -> str | None:
    """One line from the user; None when the chat is over."""
    try:
        return console.input("[bold cyan]>[/bold cyan] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _answer(
    console: Console,
    state: RunState,
    turns: list[Message],
    *,
    model: str,
    api_key: str | None,
) -> str:
    """Stream one answer to the terminal; returns what arrived of it."""
    from cluster.chat import AnswerStream
    from cluster.errors import CommandError

    pieces: list[str] = []
    try:
        with AnswerStream(
            state.contact_host, state.port, turns, model=model, api_key=api_key
        ) as stream:
            for piece in stream:
                pieces.append(piece)
                console.print(piece, end="", markup=False)
        if stream.finish_reason == "length":
            console.print(" [dim](cut at the longest answer)[/dim]", end="")
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except CommandError as exc:
        console.print(f"[red]{exc.message}[/red]", end="")
    console.print()
    return "".join(pieces)
