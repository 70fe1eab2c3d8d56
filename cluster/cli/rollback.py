"""`shoal rollback`: an earlier revision again, by the way that an upgrade to it would take."""

from __future__ import annotations

from typing import Annotated

import typer

from .chart_options import (
    DEFAULT_NAME,
    DEFAULT_TIMEOUT_S,
    ChangeDryRun,
    Context,
    IgnoreCapacity,
    Namespace,
    NoWait,
    Recreate,
    ReleaseName,
    Timeout,
    Yes,
)


def rollback(
    revision: Annotated[
        int | None, typer.Argument(min=1, help="Revision; default: the one that ran before.")
    ] = None,
    name: ReleaseName = DEFAULT_NAME,
    namespace: Namespace = None,
    context: Context = None,
    recreate: Recreate = False,
    dry_run: ChangeDryRun = False,
    yes: Yes = False,
    no_wait: NoWait = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    ignore_capacity: IgnoreCapacity = False,
) -> None:
    """Bring back an earlier revision; what it costs is told first, as for an upgrade."""
    from cluster.errors import UsageError
    from cluster.helm import documents
    from cluster.rollout.release import previous_revision

    from .change import Choices, open_session

    session = open_session(name, context=context, namespace=namespace)
    history = session.helm.history(name)
    wanted = revision or previous_revision(session.helm, name, history)
    numbers = [found.number for found in history[:-1]]
    if wanted not in numbers:
        known = ", ".join(map(str, numbers)) or "none"
        raise UsageError(
            f"there is no earlier revision {wanted or ''}".rstrip(),
            hint=f"Earlier revisions: {known}. See: helm history {name}",
        )
    assert wanted is not None
    current = session.helm.release(name)
    goal = session.helm.release(name, wanted)
    session.console.print(f"Back from revision {current.revision} to {wanted}.")
    session.change(
        documents(current.manifest),
        documents(goal.manifest),
        apply=lambda: session.helm.rollback(name, wanted),
        written=goal.values,
        suspended={**current.values, "suspend": True},
        choices=Choices(
            is_recreation=recreate,
            is_dry_run=dry_run,
            is_sure=yes,
            is_followed=not no_wait,
            has_capacity=ignore_capacity,
            limit_s=timeout,
        ),
    )
