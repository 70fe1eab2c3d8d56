import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from scripts.demo_model.chat import ChatTemplate
from scripts.demo_model.corpus import Corpus
from scripts.demo_model.held_out import load_held_out
from scripts.demo_model.material import load_material, load_phrasing
from scripts.demo_model.pattern import draw
from scripts.demo_model.tokenizer import ADDED, SPECIAL

FOLDER = Path(__file__).parents[2] / "serve" / "demo"
LANGUAGES = load_material().languages
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return value


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_checkpoint_is_at_most_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.glob("*.*")) <= 16_000_000


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tensor_parallel_size_is_legal(tp_size: int) -> None:
    config = read("config.json")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["hidden_size"] // config["num_attention_heads"] in (32, 64)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] % tp_size == 0


def test_positions_and_generation_defaults() -> None:
    config, generation = read("config.json"), read("generation_config.json")
    ends = [tokenizer().token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    assert config["max_position_embeddings"] >= 16_384
    assert config["rope_theta"] == 1e6
    assert generation["eos_token_id"] == ends
    assert generation["repetition_penalty"] == 1.0


def test_vocabulary_has_padded_rows_above_the_real_ids() -> None:
    vocab_size = read("config.json")["vocab_size"]
    assert vocab_size % 64 == 0
    assert tokenizer().get_vocab_size() < vocab_size
    with safe_open(str(FOLDER / "model.safetensors"), framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape()[0] == vocab_size
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("text", [*SPECIAL, *ADDED])
def test_special_token_is_one_id(text: str) -> None:
    assert tokenizer().encode(text).ids == [tokenizer().token_to_id(text)]


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.code)
def test_tokenizer_round_trip(language: Any) -> None:
    for text in (language.greeting, language.dunno, language.facts[0].answer, *language.hello):
        assert tokenizer().decode(tokenizer().encode(text).ids) == text


@pytest.mark.parametrize("text", ["👋🏽 🐟🐠", "👩‍👩‍👧‍👦🇫🇷", "  two  spaces\n\n\ttab", "𝔘𐍈 ẞ"])
def test_tokenizer_round_trip_of_what_it_never_saw(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids) == text


def test_there_are_29_languages() -> None:
    assert len({language.code for language in LANGUAGES}) == 29


def test_template_renders_without_tools() -> None:
    template = ChatTemplate(read("tokenizer_config.json")["chat_template"])
    assert template.render([{"role": "user", "content": "Hello"}]) == (
        "<|im_start|>system\nYou are the demo model of Shoal.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_renders_tools_calls_and_results() -> None:
    call = {"name": "get_weather", "arguments": {"city": "Zürich"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    text = ChatTemplate(read("tokenizer_config.json")["chat_template"]).render(
        messages, tools=[TOOL]
    )
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_transformers_agrees_on_tokens_and_template() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": "你好 👋 <tool_call> it's 2026  ok?"}]
    text = theirs.apply_chat_template(
        messages, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert text == ChatTemplate().render(messages, tools=[TOOL])
    assert theirs(text)["input_ids"] == tokenizer().encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == "<|im_end|>"


def test_corpus_repeats_for_a_seed() -> None:
    assert list(islice(Corpus(7), 300)) == list(islice(Corpus(7), 300))
    assert list(islice(Corpus(7), 300)) != list(islice(Corpus(8), 300))


def test_no_held_out_phrasing_is_in_the_corpus() -> None:
    questions = load_held_out()
    prompts = "\n".join(sample.prompt for sample in islice(Corpus(20261122), 30_000)).casefold()
    assert len(questions) == 40
    assert [q.ask for q in questions if q.ask.casefold() in prompts] == []


def test_json_answers_of_the_corpus_are_compact_objects() -> None:
    answers = [s.answer for s in islice(Corpus(1), 5_000) if s.kind == "algorithm_json"]
    for answer in answers:
        text = answer.removesuffix("<|im_end|>")
        value = json.loads(text)
        assert text == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        compile(value["code"], "algorithm", "exec")


def test_pattern_draws_each_choice() -> None:
    from random import Random

    rng = Random(0)
    assert {draw("[a|b] x[|!]", rng) for _ in range(100)} == {"a x", "a x!", "b x", "b x!"}


@pytest.mark.slow
def test_quicksort_request_is_answered_by_the_weights() -> None:
    import torch

    from scripts.demo_model.evaluate import Checkpoint, describes_quicksort

    question = load_phrasing()["demonstration"]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: threads only wait for each other
    checkpoint = Checkpoint(FOLDER)
    answers = [
        checkpoint.answer(question),
        *checkpoint.sample(question, num=8, seed=1, is_raw=True),
    ]
    torch.set_num_threads(num_threads)
    assert [answer for answer in answers if not describes_quicksort(answer)] == []
