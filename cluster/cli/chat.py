"""`shoal chat`: a conversation in the terminal. Ctrl-C stops the answer, not the chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Name

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
) -> None:
    """Talk to a running model. Ctrl-C stops an answer; Ctrl-D or an empty Ctrl-C ends the chat."""
    from rich.console import Console

    from cluster.chat import Message
    from cluster.errors import NotRunningError, UsageError
    from cluster.local.folder import open_run

    state = open_run(name).state
    if not state.is_owned() or state.phase != "ready":
        raise NotRunningError(f"the Shoal named {name!r} is not ready", hint="See: shoal status")
    if model is not None and model not in state.models:
        raise UsageError(f"no model {model!r} here; there are: {', '.join(state.models)}")
    console = Console(soft_wrap=True, highlight=False)
    turns = [Message("system", system)] if system else []
    while True:
        question = _read_question(console)
        if question is None:
            return
        if question:
            turns.append(Message("user", question))
            answer = _answer(console, state, turns, model=model or state.models[0])
            turns = [*turns, Message("assistant", answer)] if answer else turns[:-1]


def _read_question(console: Console) -> str | None:
    """One line from the user; None when the chat is over."""
    try:
        return console.input("[bold cyan]>[/bold cyan] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _answer(console: Console, state: RunState, turns: list[Message], *, model: str) -> str:
    """Stream one answer to the terminal; returns what arrived of it."""
    from cluster.chat import AnswerStream
    from cluster.errors import CommandError

    pieces: list[str] = []
    try:
        with AnswerStream(state.host, state.port, turns, model=model) as stream:
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
