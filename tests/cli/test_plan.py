"""`shoal plan`, as its user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SEVEN = ("--model", "qwen2.5-7b-instruct")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})


def test_eight_gpu_node_shows_every_layout_and_the_reason_for_the_chosen_one() -> None:
    result = plan(*SEVEN, "--hardware", "h100x8")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    layouts = {tuple(row[:2]) for row in rows if row[2:4] and "GB" in row[2:5]}
    assert {("1", "8"), ("2", "4"), ("*", "4")} <= layouts
    assert "TP 8: not legal: 28 heads are not divisible by 8" in result.stdout
    assert "TP 4, 2 copies a node: " in result.stdout
    assert "Predicted, not measured" in result.stdout
    assert "…" not in result.stdout


def test_json_of_this_machine_is_a_plan_for_its_cpu_with_every_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    result = plan("--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["hardware"] == "this machine's CPU"
    (found,) = report["plans"]
    assert found["model"] == "demo"
    chosen = next(
        layout for layout in found["layouts"] if layout["tensor_parallel"] == found["chosen"]
    )
    step = chosen["prediction"]["decode"]["8"]
    assert {"weights_s", "kv_s", "flops_s", "all_reduce_s", "launch_s", "tokens_per_s"} <= set(step)


def test_machine_with_gpus_is_planned_for_them(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'NVIDIA L40S, 46068\\nNVIDIA L40S, 46068\\n'\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [sys.executable, "-m", "cluster", "plan", *SEVEN, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
        check=True,
    )
    assert json.loads(result.stdout)["plans"][0]["node"] == "2 x l40s"


def test_model_that_does_not_fit_ends_with_1_and_what_would() -> None:
    result = plan("--model", "qwen2.5-72b-instruct", "--hardware", "rtx4090d-x4")
    assert result.exit_code == 1
    assert "It does not fit." in result.stdout
    assert "weights 36.4 GB + workspace 1.4 GB are more than the 25.4 GB usable" in result.stdout
    assert "8 x rtx4090d with TP 8" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SEVEN, "--hardware", "h100x8", "--tensor-parallel", "8"], "must be one of 1, 2, 4"),
        ([*SEVEN, "--hardware", "h300x8"], "did you mean 'h200'"),
        (["--model", "qwen9", "--hardware", "h100"], "no model 'qwen9'"),
        ([*SEVEN, "--hardware", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        ([*SEVEN, "--hardware", "h100", "--max-model-len", "999999"], "must be <= 131,072"),
        ([*SEVEN, "--hardware", "h100", "--plot", "/proc/x.png"], "cannot be drawn"),
        ([*SEVEN, "--hardware", "h100", "--plot", "plan.docx"], "must end in .png or .svg"),
        ([*SEVEN, "--hardware", "h100", "--prompt", "999999"], "prompt must be <= 131,072"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments: list[str], message: str) -> None:
    result = plan(*arguments)
    assert isinstance(result.exception, UsageError)
    assert message in result.exception.message


def test_batch_that_the_cache_does_not_hold_leaves_a_narrow_table_whole() -> None:
    shown = plan(*SEVEN, "--hardware", "rtx4090d-x4", "--tensor-parallel", "1").stdout
    assert "does not fit" in shown
    assert "the KV cache holds 59 of them" in shown
    assert "…" not in shown


def test_configuration_is_planned_on_its_own_hardware(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("hardware: a100-80gb\nmodels: [{preset: qwen2.5-7b-instruct}]\n")
    result = plan(str(path), "--json")
    assert result.exit_code == 0
    (found,) = json.loads(result.stdout)["plans"]
    assert (found["hardware"], found["chosen"]) == ("a100-80gb", 1)
    assert found["layouts"][0]["max_model_len"] == 131_072


def test_models_that_fit_only_one_by_one_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    models = "[{preset: qwen2.5-7b-instruct}, {preset: qwen2.5-0.5b-instruct}]"
    path.write_text(f"hardware: rtx4090d-x4\nmodels: {models}\n")
    result = plan(str(path))
    assert result.exit_code == 1
    assert "together they need 5 GPUs, a node has 4" in result.stdout


@pytest.mark.parametrize(
    ("name", "start"), [("plan.png", b"\x89PNG\r\n"), ("plan.svg", b"<?xml ver")]
)
def test_plot_is_a_picture(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    assert plan(*SEVEN, "--hardware", "rtx4090d-x4", "--plot", str(path)).exit_code == 0
    picture = path.read_bytes()
    assert picture.startswith(start)
    assert len(picture) > 10_000
