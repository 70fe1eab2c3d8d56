"""How commands speak about a cluster: preflight, story, question, progress, end.

Not what is said (`cluster.inventory`, `cluster.rollout`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.inventory import Facts, Needs
    from cluster.kube import Kube
    from cluster.rollout.addresses import Addresses
    from cluster.rollout.machine import Verdict
    from cluster.rollout.release import Following

Values = dict[str, Any]


def make_console() -> Console:
    """Standard output, without colours in pipes and without guessing at markup."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, markup=False)


def where(kube: Kube) -> str:
    """The options that lead other commands to the same place."""
    return f"--context {kube.context} --namespace {kube.namespace}"


def look(kube: Kube, objects: list[Values]) -> tuple[Facts, Needs]:
    """What these objects need, and what the cluster has of it."""
    from cluster.inventory import gather, needs_of

    needs = needs_of(objects, namespace=kube.namespace)
    return gather(kube, needs), needs


def preflight(
    console: Console,
    kube: Kube,
    looked: tuple[Facts, Needs],
    values: Values,
    *,
    has_capacity: bool,
) -> bool:
    """Print warnings, and tell whether there were any; `has_capacity`: room is not counted.

    Raises:
        ClusterError: every reason why the objects cannot run there.
    """
    from cluster.errors import ClusterError
    from cluster.inventory import check

    problems = check(*looked, values, namespace=kube.namespace)
    refused = []
    for problem in problems:
        if problem.is_warning:
            console.print(f"warning: {problem}")
        elif not (problem.is_capacity and has_capacity):
            refused.append(problem)
    if not refused:
        return any(problem.is_warning for problem in problems)
    lines = []
    for problem in refused:
        lines += [f"- {problem}", *(f"    {line}" for line in problem.hint.splitlines())]
    raise ClusterError(
        f"it cannot run in {kube.context}, namespace {kube.namespace}\n" + "\n".join(lines),
        hint="Nothing was changed.",
    )


def confirm(*, question: str, is_sure: bool) -> None:
    """Ask on a terminal; elsewhere, or with --yes, go on.

    Raises:
        KeyboardInterrupt: the answer is no.
    """
    if not is_sure and sys.stdin.isatty() and not typer.confirm(question):
        raise KeyboardInterrupt


@contextmanager
def following(console: Console, *, limit_s: float | None) -> Iterator[Following]:
    """What follows a rollout: lines on `console`, until the first Ctrl-C."""
    from cluster.local.interrupts import Interrupts
    from cluster.rollout.release import Following

    def tell(seconds: float, line: str) -> None:
        console.print(f"{seconds:6.0f} s  {line}")

    with Interrupts() as interrupts:
        yield Following(wait=interrupts.wait, tell=tell, limit_s=limit_s)


def end(verdict: Verdict | None, kube: Kube, name: str) -> None:
    """Go on if following ended well.

    Raises:
        ClusterError: it failed, or did not become ready in time.
        InterruptedStartError: the user stopped following.
    """
    from cluster.errors import ClusterError, InterruptedStartError

    from .display import command_name

    again = f"{command_name()} status {where(kube)} --name {name} --follow"
    if verdict is None:
        raise InterruptedStartError(
            "you stopped following; the cluster goes on", hint=f"Follow again: {again}"
        )
    if verdict.state == "ready":
        return
    late = "it is not ready in time: " if verdict.state == "out of time" else ""
    hint = "\n".join(part for part in (verdict.hint, f"It keeps trying. Follow: {again}") if part)
    raise ClusterError(f"{late}{verdict.message}", hint=hint)


def print_ready(console: Console, kube: Kube, name: str, addresses: Addresses) -> None:
    """The address and what to try."""
    from .display import command_name

    console.print("Ready.")
    for line in addresses.lines():
        console.print(line)
    console.print("Try")
    console.print(f"  {command_name()} status {where(kube)} --name {name}")
    console.print(f'  curl {addresses.api}/v1/models -H "Authorization: Bearer $SHOAL_API_KEY"')
