"""`shoal plan`: what fits where, how it is split and why, and how fast it will be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.planner.plan import ModelPlan
    from cluster.planner.subjects import Subject
    from serve.config import HardwareConfig


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration file; without one, see --model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A preset, a folder, a config.json or a repository; default: the demo."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="A preset, a file, or GPUs as h100x8; default: this machine."),
    ] = None,
    gpus: Annotated[
        Path | None,
        typer.Option(help="Your own table of GPUs, keys as in configs/gpus.yaml."),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Shards of one copy; default: the plan chooses.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=16, help="Prompt plus answer, in tokens.")
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=1, help="Prompt whose time to the first token is told, in tokens.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw memory and speed into this PNG or SVG.")
    ] = None,
) -> None:
    """Plan a model on this machine, or on hardware that you only have the name of."""
    import json

    from rich.console import Console

    from cluster.errors import UsageError
    from cluster.planner.machine import Machine
    from cluster.planner.nodes import find_node
    from cluster.planner.plan import overcommitment, plan_model
    from serve.errors import SetupError

    from .plan_tables import show_plan

    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: cannot be drawn: its name must end in .png or .svg")
    try:
        subjects, configured = _subjects(config, model)
        node, origin = find_node(
            hardware, config=configured, machine=Machine.detect(), gpus_file=gpus
        )
        plans = [
            plan_model(
                subject,
                node,
                size=tensor_parallel,
                max_model_len=max_model_len,
                prompt_tokens=prompt,
            )
            for subject in subjects
        ]
    except SetupError as exc:
        raise UsageError(exc.message) from exc
    together = overcommitment(plans)
    if as_json:
        reports = [item.to_dict() for item in plans]
        print(json.dumps({"hardware": origin, "together": together, "plans": reports}, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for index, item in enumerate(plans):
            console.print("\n" if index else "", end="")
            show_plan(console, item, origin)
        if together:
            console.print(f"\nEach fits alone, but {together}.", style="bold red")
    if plot is not None:
        _draw(plans, plot)
    if together or any(item.chosen is None for item in plans):
        raise typer.Exit(1)


def _subjects(
    config: Path | None, model: str | None
) -> tuple[list[Subject], HardwareConfig | None]:
    """The models to plan, and the hardware that a configuration names, if it names one."""
    from cluster.plan import DEMO_PRESET, load_config
    from cluster.planner.subjects import find_subject, subjects_of
    from serve.config import HardwareConfig

    if config is None:
        return [find_subject(model or DEMO_PRESET)], None
    loaded = load_config(config, needs_weights=False)
    assert isinstance(loaded.hardware, HardwareConfig), "the preset was merged"
    subjects = [find_subject(model)] if model else subjects_of(loaded)
    return subjects, loaded.hardware if "hardware" in loaded.model_fields_set else None


def _draw(plans: list[ModelPlan], path: Path) -> None:
    from cluster.errors import UsageError

    from .plan_plot import draw_plan

    try:
        draw_plan(plans[0], path)
    except OSError as exc:
        raise UsageError(f"--plot {path}: cannot be drawn: {exc.strerror}") from exc
