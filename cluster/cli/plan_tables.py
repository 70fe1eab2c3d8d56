"""Shows one plan as tables: layouts, memory, and the terms of the predicted speed."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.planner.choice import BUSY_CONTEXT, BUSY_SEQUENCES, busy_tokens_per_s
from cluster.planner.layouts import CONTEXTS, Layout
from cluster.planner.memory import GB
from cluster.planner.plan import ModelPlan
from cluster.planner.prediction import Prediction

_CALIBRATION = (
    "Predicted, not measured: a roofline, calibrated on published figures of another engine (vLLM"
    " on an A100). Figures that it had not seen were mostly within 10 %; the README has them all."
)
_CPU_CALIBRATION = (
    "Predicted from this machine's memory and arithmetic, measured just now, as if it were idle."
)


def show_plan(console: Console, plan: ModelPlan, origin: str) -> None:
    """Print a plan; where nothing fits, why, and what would."""
    console.print(
        f"[bold]{plan.subject.title}[/bold] ({_count_text(plan.subject.shape.num_params)}) on"
        f" [bold]{plan.node.title}[/bold], {origin}\n"
    )
    if any(layout.problem is None for layout in plan.layouts):
        console.print(_layouts(plan))
    for layout in plan.layouts:
        if layout.problem is not None:
            console.print(Text(f"  TP {layout.size}: {layout.problem}", style="dim"))
    chosen = plan.chosen
    if chosen is None:
        console.print(Text("\nIt does not fit.", style="bold red"))
        if plan.would_fit:
            console.print("What would fit:\n" + "\n".join(f"  - {text}" for text in plan.would_fit))
        return
    console.print(f"\n[bold]{_headline(plan, chosen)}[/bold]: {plan.reason}.")
    console.print(_length(plan, chosen))
    console.print()
    console.print(_memory(plan, chosen))
    prediction = plan.prediction(chosen)
    if prediction is not None:
        console.print()
        console.print(_speed(prediction, chosen, has_gpus=bool(plan.node.num_gpus)))
        console.print(_times(prediction))
        note = _CALIBRATION if plan.node.num_gpus else _CPU_CALIBRATION
        console.print(Text(note, style="dim"))


def _headline(plan: ModelPlan, chosen: Layout) -> str:
    if not plan.node.num_gpus:
        return f"TP {chosen.size}, 1 copy"
    idle = plan.node.num_gpus - chosen.size * chosen.num_replicas
    copies = "copy" if chosen.num_replicas == 1 else "copies"
    rest = f", {idle} GPUs left over" if idle else ""
    return f"TP {chosen.size}, {chosen.num_replicas} {copies} a node{rest}"


def _length(plan: ModelPlan, chosen: Layout) -> str:
    most = plan.demand.engine.max_running_sequences
    limit = f"The engine decodes at most {most} sequences at once (engine.max_running_sequences)."
    if chosen.yarn:
        return (
            f"Texts of up to {chosen.max_model_len:,} tokens, by YaRN, which is static and costs a"
            f" little on short texts. {limit}"
        )
    return f"Texts of up to {chosen.max_model_len:,} tokens, without YaRN. {limit}"


def _layouts(plan: ModelPlan) -> Table:
    """A row for each size that works: what it holds and how fast it is."""
    has_speed = plan.node.device is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("", "TP", "copies", "weights", "KV tokens", "longest"):
        table.add_column(title, justify="right", no_wrap=True)
    for context in CONTEXTS:
        table.add_column(f"x{context // 1024}k", justify="right", no_wrap=True)
    if has_speed:
        for title in ("1 text", f"{BUSY_SEQUENCES} texts", "TTFT"):
            table.add_column(title, justify="right", no_wrap=True)
    for layout in plan.layouts:
        if layout.problem is not None:
            continue
        is_chosen = layout is plan.chosen
        table.add_row(
            "*" if is_chosen else "",
            str(layout.size),
            str(layout.num_replicas),
            f"{layout.memory.weight_bytes / GB:.1f} GB",
            f"{layout.memory.kv_tokens:,}",
            f"{layout.max_model_len:,}",
            *(_count(layout, context) for context in CONTEXTS),
            *(_speeds(plan, layout) if has_speed else ()),
            style="bold" if is_chosen else "",
        )
    where = "a GPU" if plan.node.num_gpus else "a copy"
    speeds = f", tok/s of the whole node, texts of {BUSY_CONTEXT:,} tokens" if has_speed else ""
    table.caption = f"weights of {where}; KV tokens and full-length texts of a copy{speeds}"
    table.caption_justify = "left"
    return table


def _count(layout: Layout, context: int) -> str:
    return f"{layout.num_sequences(context):,}" if context <= layout.max_model_len else "-"


def _count_text(num_params: int) -> str:
    if num_params >= 1e8:
        return f"{num_params / 1e9:.2f} billion parameters"
    return f"{num_params / 1e6:.1f} million parameters"


def _speeds(plan: ModelPlan, layout: Layout) -> tuple[str, str, str]:
    prediction = plan.prediction(layout)
    assert prediction is not None, "the node's speed is known"
    return (
        f"{prediction.tokens_per_s(1):,.0f}",
        f"{busy_tokens_per_s(layout, plan.node):,.0f}",
        _seconds(prediction.ttft_s),
    )


def _memory(plan: ModelPlan, chosen: Layout) -> Table:
    memory, is_gpu = chosen.memory, bool(plan.node.num_gpus)
    table = Table("memory of a GPU" if is_gpu else "memory of the copy", box=None, pad_edge=False)
    table.add_column("GB", justify="right")
    table.add_column("")
    rows = (
        ("weights", memory.weight_bytes, f"a shard of {chosen.size}" if is_gpu else ""),
        ("activations", memory.activation_bytes, _step_text(plan)),
        (
            "CUDA and framework" if is_gpu else "Ray, Python, torch",
            memory.framework_bytes,
            "context, kernels, graphs, NCCL" if is_gpu else "",
        ),
        ("KV cache", memory.kv_bytes, f"{memory.kv_tokens:,} tokens"),
        ("free", memory.free_bytes, "margin for fragmentation" if is_gpu else ""),
        ("driver" if is_gpu else "in use by others", memory.reserved_bytes, ""),
    )
    for name, num_bytes, note in rows:
        table.add_row(name, f"{num_bytes / GB:.2f}", Text(note, style="dim"))
    table.add_row("total", f"{memory.total_bytes / GB:.2f}", "", style="bold")
    return table


def _step_text(plan: ModelPlan) -> str:
    engine = plan.demand.engine
    budget = engine.budget("cuda" if plan.node.num_gpus else "cpu")
    return f"a step of {budget:,} tokens, {engine.max_running_sequences} sequences"


def _speed(prediction: Prediction, chosen: Layout, *, has_gpus: bool) -> Table:
    """The roofline's terms, in milliseconds a step."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    titles = ("batch", "weights", "KV", "flops", "reduce", "launch", "step ms", "tok/s", "each")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    held = chosen.num_sequences(prediction.context_tokens)
    for batch, step in prediction.steps.items():
        total = prediction.tokens_per_s(batch)
        terms = (step.weights_s, step.kv_s, step.flops_s, step.all_reduce_s, step.launch_s)
        table.add_row(
            str(batch),
            *(f"{term * 1e3:,.2f}" for term in (*terms, step.seconds)),
            f"{total:,.0f}",
            f"{total / batch:,.1f}",
            step.bound if batch <= held else "does not fit",
            style="" if batch <= held else "dim",
        )
    overlapped = (
        "max(weights + KV, flops)" if has_gpus else "weights, KV and flops (partly at once)"
    )
    table.caption = (
        f"one copy, texts of {prediction.context_tokens:,} tokens, ms:"
        f" step = {overlapped} + reduce + launch"
    )
    if held < max(prediction.steps):
        table.caption += f"; the KV cache holds {held} of them"
    table.caption_justify = "left"
    return table


def _times(prediction: Prediction) -> str:
    return (
        f"\nFirst token of a prompt of {prediction.prompt_tokens:,} tokens after"
        f" {_seconds(prediction.ttft_s)}; ready {prediction.load_s:.0f} s after the start (assumed:"
        " weights at 1.5 GB/s)."
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
