"""Options of every command that speaks to a cluster, and what they make of the chart's values.

Not the values' meaning (`cluster.helm_values`) nor Helm. The one decision: what is closer to the
command line wins: the configuration, then each --values, then --model and --hardware, then --set.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

Values = dict[str, Any]

ConfigFile = Annotated[
    Path | None, typer.Argument(help="Configuration file, the same as for `shoal up`.")
]
ValuesFiles = Annotated[
    list[Path] | None, typer.Option("--values", "-f", help="File with values of the chart.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K=V", help="One value, as replicas.max=2; V is YAML."),
]
ModelPreset = Annotated[str | None, typer.Option(help="A model's preset.")]
HardwarePreset = Annotated[str | None, typer.Option(help="A hardware preset.")]
ReleaseName = Annotated[str, typer.Option(help="Name of the release and of its objects.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; default: the context's.")
]
Context = Annotated[
    str | None, typer.Option(help="Context of the kubeconfig; default: the current one.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not follow; the cluster goes on.")]
Timeout = Annotated[
    float, typer.Option(min=1, help="Follow for at most this long, in seconds.", metavar="S")
]
IgnoreCapacity = Annotated[
    bool,
    typer.Option("--ignore-capacity", help="Nodes are added when pods wait: do not count them."),
]
Recreate = Annotated[
    bool,
    typer.Option(
        "--recreate", help="Suspend everything, wait, start anew: a break, but no spare GPUs."
    ),
]
ChangeDryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
]
DEFAULT_NAME = "shoal"
DEFAULT_TIMEOUT_S = 1800.0
_DOT = re.compile(r"(?<!\\)\.")


def compose_values(
    config: Path | None,
    files: list[Path] | None,
    sets: list[str] | None,
    *,
    model: str | None,
    hardware: str | None,
    base: Values | None = None,
) -> Values:
    """The user's values for the chart, over `base`.

    Raises:
        UsageError: every file or option that cannot be used, named.
    """
    from cluster.errors import UsageError
    from cluster.helm_values import from_config
    from serve.errors import ConfigurationError

    values: Values = dict(base or {})
    if config is not None:
        try:
            values = _merge(values, from_config(_read(config)))
        except ConfigurationError as exc:
            lines = "\n".join(f"{config}: {line}" for line in exc.message.splitlines())
            message = f"the configuration cannot be used on a cluster\n{lines}"
            raise UsageError(message, hint="Nothing was started.") from exc
    for path in files or []:
        values = _merge(values, _read(path))
    for key, preset in (("model", model), ("hardware", hardware)):
        if preset is not None:
            values = _merge(values, {key: {"preset": preset}})
    for written in sets or []:
        values = _merge(values, _parse_set(written))
    return values


def _read(path: Path) -> Values:
    from cluster.errors import UsageError
    from cluster.plan.document import read_document

    document = read_document(path)
    if document.problems:
        raise UsageError("\n".join(map(str, document.problems)), hint="Nothing was started.")
    return document.values


def _parse_set(written: str) -> Values:
    import yaml

    from cluster.errors import UsageError

    key, equals, text = written.partition("=")
    if not key or not equals:
        raise UsageError(f"--set: must be KEY=VALUE, got {written!r}")
    if "[" in key:
        raise UsageError(f"--set: {key}: lists are written in a file: --values FILE")
    try:
        value: Any = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as exc:
        raise UsageError(f"--set: {key}: not a YAML value: {text!r}") from exc
    for part in reversed(_DOT.split(key)):
        value = {part.replace("\\.", "."): value}
    return dict(value)


def _merge(below: Values, above: Values) -> Values:
    from cluster.helm_values.resolved import merge

    return merge(below, above)
