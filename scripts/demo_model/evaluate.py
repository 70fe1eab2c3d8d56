"""Evaluation of a checkpoint folder, as transformers loads it: bfloat16 weights, no grammar.

Held-out phrasings are answered greedily; the demonstration's request is sampled as a server would.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .held_out import HeldOut, load_held_out
from .material import load_phrasing

_MAX_NEW_TOKENS = 400


@dataclass(frozen=True, slots=True)
class Verdict:
    """A held-out phrasing, the answer to it and whether it is right."""

    question: HeldOut
    answer: str
    is_right: bool


class Checkpoint:
    """A checkpoint that answers questions."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        # The weights are rounded to bfloat16; the arithmetic is float32, which CPUs do faster.
        self._model = model.float()
        self._model.eval()

    def answer(self, question: str, *, is_raw: bool = False) -> str:
        """Returns the greedy answer."""
        return self._generate(self._prompt(question, is_raw=is_raw), {"do_sample": False})[0]

    def sample(self, question: str, *, num: int, seed: int, is_raw: bool = False) -> list[str]:
        """Returns answers sampled at the temperature that the checkpoint asks for."""
        torch.manual_seed(seed)
        settings = {"do_sample": True, "num_return_sequences": num}
        return self._generate(self._prompt(question, is_raw=is_raw), settings)

    def _prompt(self, question: str, *, is_raw: bool) -> str:
        if is_raw:
            return question
        messages = [{"role": "user", "content": question}]
        prompt: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return prompt

    def _generate(self, prompt: str, settings: dict[str, Any]) -> list[str]:
        """An answer that does not end by itself keeps a mark that says so."""
        inputs = self._tokenizer(prompt, return_tensors="pt")
        if not settings["do_sample"]:
            settings = {**settings, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            rows = self._model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, **settings)
        answers = rows[:, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        return [
            self._tokenizer.decode(row, skip_special_tokens=True)
            + ("" if any(end in row for end in ends) else " [no end]")
            for row in answers
        ]


def judge(checkpoint: Checkpoint) -> list[Verdict]:
    """Answers every held-out phrasing."""
    verdicts = []
    for question in load_held_out():
        answer = checkpoint.answer(question.ask, is_raw=question.is_raw)
        verdicts.append(Verdict(question, answer, question.is_right(answer)))
    return verdicts


def count_demonstrations(checkpoint: Checkpoint, *, num: int, seed: int) -> int:
    """Returns how many samples of the demonstration are complete and sort."""
    samples = checkpoint.sample(load_phrasing()["demonstration"], num=num, seed=seed, is_raw=True)
    return sum(describes_quicksort(sample) for sample in samples)


def describes_quicksort(answer: str) -> bool:
    """Whether the answer is one JSON object with every part, and its code really sorts."""
    try:
        parts = json.loads(answer)
        scope: dict[str, Any] = {}
        exec(parts["code"], scope)
        is_sorting = scope["quicksort"]([3, 1, 2, 3]) == [1, 2, 3, 3]
    except (ValueError, KeyError, TypeError, SyntaxError, NameError):
        return False
    is_complete = {"name", "description", "complexity", "steps"} <= parts.keys()
    return bool(is_sorting and is_complete and parts["name"] == "快速排序")
