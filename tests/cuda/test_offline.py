"""A fixed batch without Ray: the command's numbers, its refusals, and text that a batch keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import serve.demo
from serve.kernels import native
from serve.runner.offline import main
from serve.runner.offline_batch import generate, make_offline_runner, random_prompts

DEMO = Path(str(serve.demo.__file__)).parent


def test_the_command_prints_what_a_batch_took(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--random-shape tiny --device cpu --dtype float32 --batch 3 --prompt-tokens 20"
    assert main([*arguments.split(), "--new-tokens", "5", "--token-budget", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["num_prompt_tokens"], found["num_new_tokens"]) == (3, 20, 5)
    assert found["prefill_tokens_per_s"] == pytest.approx(60 / found["prefill_s"])
    assert found["decode_tokens_per_s"] == pytest.approx(12 / found["decode_s"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_on_a_cpu_runs_with_the_kernels_of_a_replica(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"{DEMO} --device cpu --dtype {dtype} --batch 2 --prompt-tokens 20 --new-tokens 5"
    assert main([*arguments.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    library = native.load()
    assert found["kernels"] == ("torch" if library is None else library.isa)
    assert found["decode_tokens_per_s"] == pytest.approx(8 / found["decode_s"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--random-shape", "tiny", "--device", "cuda"]) == 1
    assert "sees no GPU that torch can use" in capsys.readouterr().err


def test_float16_on_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--random-shape", "tiny", "--device", "cpu", "--dtype", "float16"]) == 1
    assert "float16 needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint or --random-shape"),
        (["--random-shape", "tiny", "--batch", "0"], "--batch is too small: 0"),
        (["--random-shape", "tiny", "--tensor-parallel", "2"], "--tensor-parallel must be 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_prompts_in_chunks_and_in_a_batch_give_the_text_of_each_alone() -> None:
    runner, _ = make_offline_runner(
        DEMO,
        device=torch.device("cpu"),
        dtype="float32",
        max_running_sequences=3,
        max_model_len=40,
        token_budget=17,
    )
    prompts = random_prompts(3, 30, 200)
    options = {"num_new_tokens": 8, "max_model_len": 40}
    together = generate(runner, prompts, token_budget=17, **options)[0]
    alone = [generate(runner, [prompt], token_budget=64, **options)[0][0] for prompt in prompts]
    assert together == alone
    assert {len(text) for text in together} == {8}
