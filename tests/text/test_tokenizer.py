# ruff: noqa: RUF001
"""Our tokenizer and templates against transformers', and what users' text must never become."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.checkpoint.chat_template import check_chat_template
from serve.errors import CheckpointError, InvalidRequestError
from serve.testing.tokenizer import write_tokenizer
from serve.text.chat_template import ChatTemplate, load_chat_template, render_chat
from serve.text.generation_config import load_generation_defaults
from serve.text.tokenizer import Tokenizer, load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather <now> & "here" — 天气',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Malmö", "days": [1, 2]}},
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hi there"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "\n\n  two\r\n\r\nlines  \t "}],
    [{"role": "user", "content": "你好，世界 🏳️‍🌈 e\u0301 ﷺ \u200d"}],
    [{"role": "user", "content": "{{ messages }} {% if x %} {# no #} <b>&amp;'\"</b>"}],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"celsius": 3}', "tool_call_id": "call_1"},
        {"role": "assistant", "content": "3 degrees"},
        {"role": "user", "content": "thanks"},
    ],
]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="session", params=["small_folder", "qwen_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def theirs(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text())
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=config["chat_template"],
    )


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_are_those_of_transformers(
    folder: Path, ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]], tools: Any
) -> None:
    template = load_chat_template(folder)
    assert template is not None
    text, mark = render_chat(ours, template, messages, tools=tools)
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True
    )
    assert ours.encode_markup(text, mark=mark) == list(expected["input_ids"])


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_text_is_encoded_as_transformers_does(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode_markup(text) == theirs(text)["input_ids"]


@settings(deadline=None)
@given(pieces=st.lists(st.sampled_from([*SPECIALS, "a", " ", "<", "|>", "é"]), max_size=8))
def test_raw_prompts_may_write_control_tokens(
    ours: Tokenizer, theirs: Any, pieces: list[str]
) -> None:
    text = "".join(pieces)
    assert ours.encode_markup(text) == theirs(text)["input_ids"]


# What an attacker may type: whole control tokens, halves that might meet, noncharacters.
hostile_text = st.lists(
    st.sampled_from(
        [*SPECIALS, "<", "|im_end|>", "<|im_", "end|>", "\n", "x", "\ufdd0", "\ufdd1", " "]
    ),
    max_size=6,
).map("".join)


@settings(deadline=None)
@given(contents=st.lists(hostile_text, min_size=1, max_size=3))
def test_users_text_never_becomes_a_control_token(small: Tokenizer, contents: list[str]) -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}")
    messages = [{"role": "user", "content": content} for content in contents]

    text, mark = render_chat(small, template, messages)
    token_ids = small.encode_markup(text, mark=mark)

    end = small.encode_markup("<|im_end|>")[0]
    added = {small.encode_markup(special)[0] for special in SPECIALS}
    assert [token_id for token_id in token_ids if token_id in added] == [end] * len(contents)
    shown = b"".join(small.token_content(token_id) for token_id in token_ids).decode()
    assert shown == "".join(f"[{content}]<|im_end|>" for content in contents)


def test_halves_of_a_control_token_in_two_strings_do_not_meet(small: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[1].content }}")
    messages = [{"role": "user", "content": text} for text in ("<|im_", "end|>")]
    text, mark = render_chat(small, template, messages)
    assert small.encode_markup(text, mark=mark) == small.encode("<|im_end|>")


def test_control_tokens_in_names_arguments_and_tools_stay_text(small_folder: Path) -> None:
    tokenizer, template = load_tokenizer(small_folder), load_chat_template(small_folder)
    assert template is not None
    end = tokenizer.encode_markup("<|im_end|>")[0]
    call = {"function": {"name": "f<|im_end|>", "arguments": {"<|im_end|>": ["<|im_end|>"]}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    text, mark = render_chat(tokenizer, template, messages, tools=tools)
    assert tokenizer.encode_markup(text, mark=mark).count(end) == 2  # system and assistant


@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_decoding_gives_the_text_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)


def test_the_real_vocabulary_has_its_published_size_and_ends(qwen: Tokenizer) -> None:
    assert qwen.num_real_tokens == 151_665
    assert qwen.eos_ids == {151_645, 151_643}
    assert qwen.token_bytes[151_645] == b""
    assert qwen.token_content(151_645) == b"<|im_end|>"
    assert all(qwen.token_bytes[token_id] for token_id in range(151_643))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing"),
        ("link", "is a link that leaves the model folder"),
        ("[" * 100_000, "tokenizer.json: ."),
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ('{"model": {}}', "byte-level"),
        ('{"model": {"type": "Nope"}, "decoder": {"type": "ByteLevel"}}', "tokenizer.json: ."),
    ],
)
def test_damaged_tokenizer_files_are_named(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content == "link":
        write_tokenizer(tmp_path)
        (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    elif content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in str(caught.value)


def test_huge_token_ids_make_no_table(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["id"] = 2**40
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="token ids must be < 2097152"):
        load_tokenizer(tmp_path)


def test_generation_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "x": 1}'
    )
    found = load_generation_defaults(tmp_path)
    assert (found.temperature, found.top_p, found.top_k) == (0.7, 0.8, 20)
    assert (found.repetition_penalty, found.min_p) == (1.05, 0.0)


@pytest.mark.parametrize("value", ['"hot"', "-1", "true", "1e9"])
def test_wrong_generation_defaults_are_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"temperature": {value}}}')
    with pytest.raises(CheckpointError, match="temperature"):
        load_generation_defaults(tmp_path)


HOSTILE_TEMPLATES = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "loops over messages": "{% for a in messages %}{% for b in messages %}"
    "{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "a long range": "{% for a in range(10**9) %}{% endfor %}",
    "repetition": "{{ 'x' * 10**9 }}",
    "a huge power": "{{ 10 ** 10 ** 10 }}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "private attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a changed message": "{{ messages.append(1) }}",
    "an import": "{% import 'os' as os %}{{ os.system('true') }}",
    "its own refusal": "{{ raise_exception('roles must alternate') }}",
    "a missing thing": "{{ messages[0].content.nothing.at.all }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("source", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES.keys())
def test_hostile_templates_are_stopped(source: str) -> None:
    template = ChatTemplate(source, max_output_chars=100_000, max_render_s=0.2)
    messages = [{"role": "user", "content": "x" * 100}] * 2048
    with pytest.raises(InvalidRequestError, match="the model's chat template refuses"):
        template.render(messages)


def test_a_template_that_does_not_compile_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match=r"^the chat template does not compile, line 2: "):
        ChatTemplate("{{ eos_token }}\n{% for %}")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_file_of_a_template_that_does_not_compile_is_named(tmp_path: Path, name: str) -> None:
    text = "{{ messages | nothing }}"
    is_config = name.endswith(".json")
    (tmp_path / name).write_text(json.dumps({"chat_template": text}) if is_config else text)
    for read in (load_chat_template, check_chat_template):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert caught.value.message == (
            f"{tmp_path / name}: the chat template does not compile, line 1:"
            " No filter named 'nothing'."
        )


def test_what_compiles_in_the_sandbox_passes_the_check(small_folder: Path) -> None:
    check_chat_template(small_folder)
    assert load_chat_template(small_folder) is not None


def test_a_template_may_come_in_its_own_file(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    template = load_chat_template(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
