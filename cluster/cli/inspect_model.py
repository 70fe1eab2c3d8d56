"""`shoal inspect`: a model's parameters by part, its KV cache, and how it can be split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.planner.subjects import Subject

_SIZES_SHOWN = 16


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset, a folder, a config.json, or a repository as Qwen/Qwen2.5-Coder-7B."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="Let accelerate count too; by default only where the shape is not published."
        ),
    ] = None,
) -> None:
    """Show a model's parameters by part, from its configuration alone: no weights are read."""
    import json

    from rich.console import Console

    from cluster.errors import UsageError
    from cluster.planner.subjects import find_subject
    from serve.errors import SetupError

    try:
        subject = find_subject(model)
        report = _report(subject)
        wants_count = subject.is_unknown if verify is None else verify
        report["accelerate"] = _count(subject) if wants_count else None
    except SetupError as exc:
        raise UsageError(exc.message) from exc
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(Console(highlight=False, soft_wrap=True), subject, report)
    if report["accelerate"] and report["accelerate"]["differences"]:
        raise typer.Exit(1)


def _report(subject: Subject) -> dict[str, Any]:
    from cluster.planner.parts import parts_of
    from serve.catalog import is_stretchable, legal_tensor_parallel_sizes, tensor_parallel_problem

    shape = subject.shape
    sizes = legal_tensor_parallel_sizes(shape)
    return {
        "model": subject.title,
        "source": subject.origin,
        "parts": [
            {
                "name": part.name,
                "parameters": part.num_params,
                "share": part.num_params / shape.num_params,
                "bytes_bfloat16": 2 * part.num_params,
            }
            for part in parts_of(shape)
        ],
        "parameters": shape.num_params,
        "parameters_without_embeddings": shape.num_non_embedding_params,
        "bytes_bfloat16": 2 * shape.num_params,
        "kv_bytes_per_token_bfloat16": shape.kv_bytes_per_token(bytes_per_value=2),
        "tied": shape.is_tied,
        "vocab_size": shape.vocab_size,
        "rope_theta": shape.rope_theta,
        "max_positions": shape.max_positions,
        "max_positions_with_yarn": 4 * shape.max_positions if is_stretchable(shape) else None,
        "tensor_parallel": {
            "legal": [
                {
                    "size": size,
                    "parameters_per_shard": shape.num_shard_params(size),
                    "copies_of_kv_heads": max(1, size // shape.num_kv_heads),
                }
                for size in sizes
            ],
            "not_legal": {
                str(size): (tensor_parallel_problem(shape, size) or "").partition(": ")[2]
                for size in range(1, _SIZES_SHOWN + 1)
                if size not in sizes
            },
        },
    }


def _count(subject: Subject) -> dict[str, Any]:
    """What accelerate counts, and where it differs from our arithmetic."""
    import json
    import tempfile
    from pathlib import Path

    from cluster.planner.parts import count_with_accelerate, differences, parts_of

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(dict(subject.config)), encoding="utf-8")
        (counts,) = count_with_accelerate([path])
    return {"counts": counts, "differences": differences(parts_of(subject.shape), counts)}


def _show(console: Console, subject: Subject, report: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(f"[bold]{report['model']}[/bold], from {report['source']}")
    table = Table("part", "parameters", "share", "bytes in bfloat16", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in report["parts"]:
        note = " (tied to the embedding)" if part["name"] == "LM head" and report["tied"] else ""
        table.add_row(
            part["name"] + note,
            f"{part['parameters']:,}",
            _percent(part["share"]),
            _bytes(part["bytes_bfloat16"]),
        )
    table.add_section()
    for name, count in (
        ("total", report["parameters"]),
        ("without embeddings", report["parameters_without_embeddings"]),
    ):
        share = _percent(count / report["parameters"])
        table.add_row(name, f"{count:,}", share, _bytes(2 * count), style="bold")
    console.print(table)
    _show_cache(console, report)
    _show_sizes(console, subject)
    _show_count(console, report)


def _show_cache(console: Console, report: dict[str, Any]) -> None:
    per_token, positions = report["kv_bytes_per_token_bfloat16"], report["max_positions"]
    stretched = report["max_positions_with_yarn"]
    yarn = f", {stretched:,} with YaRN" if stretched else ""
    full = per_token * (stretched or positions) / 2**30
    console.print(
        f"\nPositions   {positions:,}{yarn}\n"
        f"KV cache    {per_token:,} bytes a token in bfloat16, {full:,.2f} GiB for one sequence of"
        f" {stretched or positions:,}"
    )


def _show_sizes(console: Console, subject: Subject) -> None:
    """A row for each size: which of the three rules it keeps, and what a shard holds."""
    from rich.table import Table

    from serve.catalog import legal_tensor_parallel_sizes

    shape = subject.shape
    legal = legal_tensor_parallel_sizes(shape)
    table = Table(box=None, pad_edge=False)
    table.add_column("TP", justify="right")
    for title in (f"{shape.num_heads} heads", f"FFN {shape.ffn}", f"{shape.num_kv_heads} KV heads"):
        table.add_column(title, justify="center")
    table.add_column("bytes a shard", justify="right")
    table.add_column("")
    for size in sorted({*range(1, _SIZES_SHOWN + 1), *legal}):
        rules = (
            shape.num_heads % size == 0,
            shape.ffn % size == 0,
            shape.num_kv_heads % size == 0 or size % shape.num_kv_heads == 0,
        )
        copies = size // shape.num_kv_heads
        table.add_row(
            str(size),
            *("[green]yes[/green]" if kept else "[red]no[/red]" for kept in rules),
            _bytes(2 * shape.num_shard_params(size)) if size in legal else "not legal",
            f"KV heads x {copies}" if size in legal and copies > 1 else "",
            style="" if size in legal else "dim",
        )
    console.print(
        "\nTensor-parallel sizes (TP): legal are those that divide the heads and the FFN, and that"
        " divide the KV heads or are a multiple of them."
    )
    console.print(table)


def _show_count(console: Console, report: dict[str, Any]) -> None:
    count = report["accelerate"]
    if count is None:
        return
    if count["differences"]:
        console.print("\naccelerate disagrees:\n  " + "\n  ".join(count["differences"]))
    else:
        console.print("\naccelerate counts the same, part by part.")


def _bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.3f} MB"


def _percent(share: float) -> str:
    return f"{share:.4%}" if 0 < share < 0.001 else f"{share:.1%}"
