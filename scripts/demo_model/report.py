"""The report: the loss as a picture and the README of the checkpoint, from measurements."""

import json
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from .checkpoint import read_figures
from .evaluate import Verdict

_TEMPLATE = Path(__file__).parent / "readme.md"
_SMOOTH_STEPS = 20


def plot_losses(losses: list[float], path: Path) -> None:
    """Draws the loss of each step, and its running mean, on a logarithmic axis."""
    figure = Figure(figsize=(7, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="#b8c4d6", linewidth=0.8, label="step")
    means = [
        sum(window) / len(window)
        for end in range(1, len(losses) + 1)
        if (window := losses[max(0, end - _SMOOTH_STEPS) : end])
    ]
    axes.plot(means, color="#1f4e8c", label=f"mean of {_SMOOTH_STEPS}")
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})


def write_readme(folder: Path, verdicts: list[Verdict], *, num_right: int, num_asked: int) -> None:
    """Fills the README. `num_right` of `num_asked` samples of the demonstration were complete."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size_bytes = (folder / "model.safetensors").stat().st_size
    fields = {
        **read_figures(folder),
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "ffn": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "positions": config["max_position_embeddings"],
        "size": f"{size_bytes / 1e6:.1f}",
        "parameters": f"{_num_parameters(config) / 1e6:.1f}",
        "right": sum(verdict.is_right for verdict in verdicts),
        "asked": len(verdicts),
        "demo_right": num_right,
        "demo_asked": num_asked,
        "table": "\n".join(_row(verdict) for verdict in verdicts),
    }
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(fields)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _row(verdict: Verdict) -> str:
    mark = "right" if verdict.is_right else "**wrong**"
    kind = "completion" if verdict.question.is_raw else "chat"
    return f"| {_cell(verdict.question.ask)} | {kind} | {mark} | {_cell(verdict.answer)} |"


def _cell(text: str) -> str:
    short = text if len(text) <= 70 else text[:69] + "…"
    return short.replace("\n", " ").replace("|", "\\|").replace("`", "'")


def _num_parameters(config: dict[str, int]) -> int:
    """Of a Qwen2 network with tied embeddings and biases on Q, K and V."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * kv + kv)
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden
