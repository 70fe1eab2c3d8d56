"""`shoal upgrade`: find the way a change takes, say what it costs, then do it."""

from __future__ import annotations

from .chart_options import (
    DEFAULT_NAME,
    DEFAULT_TIMEOUT_S,
    ChangeDryRun,
    ConfigFile,
    Context,
    HardwarePreset,
    IgnoreCapacity,
    ModelPreset,
    Namespace,
    NoWait,
    Recreate,
    ReleaseName,
    Sets,
    Timeout,
    ValuesFiles,
    Yes,
    compose_values,
)


def upgrade(
    config: ConfigFile = None,
    values: ValuesFiles = None,
    sets: Sets = None,
    model: ModelPreset = None,
    hardware: HardwarePreset = None,
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
    """Change a deployed Shoal; with neither CONFIG nor --values, its values are the start."""
    from cluster.helm import documents

    from .change import Choices, open_session

    session = open_session(name, context=context, namespace=namespace)
    current = session.helm.release(name)
    base = current.values if config is None and not values else None
    written = compose_values(config, values, sets, model=model, hardware=hardware, base=base)
    if recreate:
        written["suspend"] = False
    session.change(
        documents(current.manifest),
        documents(session.helm.deploy(written, name=name, is_upgrade=True, is_dry_run=True)),
        apply=lambda: session.helm.deploy(written, name=name, is_upgrade=True, is_dry_run=False),
        written=written,
        suspended={**written, "suspend": True},
        choices=Choices(
            is_recreation=recreate,
            is_dry_run=dry_run,
            is_sure=yes,
            is_followed=not no_wait,
            has_capacity=ignore_capacity,
            limit_s=timeout,
        ),
    )
