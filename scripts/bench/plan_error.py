"""How far the planner's speeds are from published ones: `python -m scripts.bench.plan_error`.

Prints the shares that the calibrating figures ask for (those of `cluster.planner.speed`) and the
error of every figure. "held out" says what the fit has not seen: the model, the GPU, or both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cluster.plan.shapes import published_shape
from cluster.planner.accelerators import GpuSpec, find_gpu, known_gpus, parse_gpu
from cluster.planner.hardware import gpu_device
from cluster.planner.speed import GPU_CALIBRATION, Calibration, Roofline
from serve.catalog import ModelShape

PUBLISHED = Path(__file__).with_name("published_speeds.yaml")


@dataclass(frozen=True, slots=True)
class Figure:
    """One published speed, and the roofline of what it was measured on."""

    group: str
    model: str
    gpu: str
    num_gpus: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_s: float
    calibrates: bool
    roofline: Roofline

    def predict(self, calibration: Calibration = GPU_CALIBRATION) -> float:
        """Tokens a second of the same run: the prompt in one chunk, then decoding at batch 1."""
        device = replace(self.roofline.device, calibration=calibration)
        roofline = replace(self.roofline, device=device)
        context = self.prompt_tokens + self.generated_tokens // 2
        decode_s = self.generated_tokens * roofline.decode(1, context).seconds
        prefill_s = roofline.prefill_s(self.prompt_tokens, self.prompt_tokens)
        return self.generated_tokens / (prefill_s + decode_s)


def published_figures() -> list[Figure]:
    """Every figure of published_speeds.yaml."""
    table = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    own = {name: parse_gpu(name, gpu, source=PUBLISHED.name) for name, gpu in table["gpus"].items()}
    gpus = known_gpus() | own
    return [
        _figure(group, row, table["models"], gpus)
        for group in table["sets"]
        for row in group["rows"]
    ]


def fit(figures: list[Figure]) -> Calibration:
    """The shares that explain the calibrating figures.

    Short prompts give the bandwidth's share and the cost of a layer, by least squares of the
    relative error; the long prompt then gives the share of the arithmetic.
    """
    seen = [figure for figure in figures if figure.calibrates]
    short = [figure for figure in seen if figure.prompt_tokens == 1]
    (long,) = [figure for figure in seen if figure.prompt_tokens > 1]
    ideal = Calibration(bandwidth_share=1.0, flops_share=1.0, layer_s=0.0)
    rows = []
    for figure in short:
        ideal_s = figure.generated_tokens / figure.predict(ideal)
        layers = (figure.generated_tokens + 1) * figure.roofline.shape.num_layers
        measured_s = figure.generated_tokens / figure.tokens_per_s
        rows.append((ideal_s / measured_s, layers / measured_s))
    slowness, layer_s = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    found = Calibration(1 / float(slowness), 1.0, float(layer_s))
    shares = np.linspace(0.2, 1.0, 801)
    errors = [
        abs(long.predict(replace(found, flops_share=share)) / long.tokens_per_s - 1)
        for share in shares
    ]
    return replace(found, flops_share=float(shares[int(np.argmin(errors))]))


def held_out(figure: Figure, figures: list[Figure]) -> str:
    """What of a figure the fit has not seen."""
    if figure.calibrates:
        return "-"
    seen = [other for other in figures if other.calibrates]
    news = []
    if figure.model not in {other.model for other in seen}:
        news.append("model")
    if figure.gpu not in {other.gpu for other in seen}:
        news.append("GPU" if figure.gpu in known_gpus() else "GPU, unknown to the code")
    return ", ".join(news) or "length"


def main() -> None:
    figures = published_figures()
    fitted = fit(figures)
    print(
        f"fit: bandwidth share {fitted.bandwidth_share:.3f}, arithmetic share"
        f" {fitted.flops_share:.3f}, {fitted.layer_s * 1e6:.0f} us a layer;"
        f" used: {GPU_CALIBRATION.bandwidth_share:.3f}, {GPU_CALIBRATION.flops_share:.3f},"
        f" {GPU_CALIBRATION.layer_s * 1e6:.0f} us\n"
    )
    print("| model | GPUs | prompt | published tok/s | predicted | error | held out | source |")
    print("|---|---|---:|---:|---:|---:|---|---|")
    for figure in figures:
        predicted = figure.predict()
        print(
            f"| {figure.model.partition('/')[2] or figure.model} | {figure.num_gpus} x {figure.gpu}"
            f" | {figure.prompt_tokens:,} | {figure.tokens_per_s:.1f} | {predicted:.1f}"
            f" | {predicted / figure.tokens_per_s - 1:+.0%} | {held_out(figure, figures)}"
            f" | {figure.group} |"
        )


def _figure(
    group: dict[str, Any], row: dict[str, Any], models: dict[str, Any], gpus: dict[str, GpuSpec]
) -> Figure:
    gpu = row.get("gpu") or group["gpu"]
    num_gpus = row.get("gpus", 1)
    known = published_shape(row["model"])
    shape = known or ModelShape.from_config(models[row["model"]])
    return Figure(
        group=group["name"],
        model=row["model"],
        gpu=gpu,
        num_gpus=num_gpus,
        prompt_tokens=row["prompt"],
        generated_tokens=group["generated_tokens"],
        tokens_per_s=row["tokens_per_s"],
        calibrates=row.get("calibrates", False),
        roofline=Roofline(shape, num_gpus, gpu_device(find_gpu(gpu, gpus))),
    )


if __name__ == "__main__":
    main()
