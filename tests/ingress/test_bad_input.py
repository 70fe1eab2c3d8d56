"""Everything a client can get wrong is a 4xx in OpenAI's shape, and the server lives on."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequestError
from serve.ingress.body import parse_object

from .conftest import MAX_ANSWER_TOKENS, MAX_BODY_BYTES, MAX_MODEL_LEN

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def check_error(response: Any, status: int, *, words: tuple[str, ...], param: str | None) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) <= 400
    for word in words:
        assert word in error["message"]
    assert response.headers["x-request-id"]


BODIES = {
    "nothing": (b"", "not valid JSON"),
    "not JSON": (b"{prompt: 1}", "not valid JSON"),
    "cut off": (b'{"prompt": "a', "not valid JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "a string": (b'"prompt"', "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
    "Infinity": (b'{"prompt": "a", "temperature": Infinity}', "not valid JSON"),
    "1e400": (b'{"prompt": "a", "temperature": 1e400}', "out of range"),
    "5000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "out of range"),
    "broken UTF-8": (b'{"prompt": "\xff\xfe"}', "not UTF-8 at byte 12"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), ""),
    "an unpaired surrogate": (b'{"prompt": "\\ud800"}', "surrogate"),
    "65 deep": (b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}", "<= 64 deep"),
    "65 objects deep": (b'{"x": ' * 65 + b"1" + b"}" * 65, "<= 64 deep"),
    "50000 deep": (b"[" * 50_000, "<= 64 deep"),
    "70000 lists": (b'{"x": [' + b"[]," * 70_000 + b"1]}", "<= 65536 lists and objects"),
    "a form": (b"prompt=hello", "not valid JSON"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("body", "words"), BODIES.values(), ids=BODIES.keys())
def test_bodies_that_are_no_json_object(api: Any, path: str, body: bytes, words: str) -> None:
    check_error(api.client.post(path, content=body), 400, words=(words,), param=None)
    api.complete()


def test_brackets_in_text_are_not_lists(api: Any) -> None:
    response = api.post(COMPLETIONS, prompt='["' * 70_000)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("unit", [b'\\"', b"[", b"\\", b'"', b"\\\\"])
def test_hostile_strings_are_looked_through_in_one_pass(unit: bytes) -> None:
    body = b"[" * 70_000 + b'"' + unit * 2_000_000
    with pytest.raises(InvalidRequestError):
        parse_object(body)


def test_nesting_up_to_the_limit_is_fine(api: Any) -> None:
    body = b'{"prompt": "a", "x": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert api.client.post(COMPLETIONS, content=body).status_code == 200


SHARED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "model of a wrong type": ({"model": 5}, "model", ("a string", "5")),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", (">= 1", "0")),
    "max_tokens below": ({"max_tokens": -1}, "max_tokens", (">= 1", "-1")),
    "max_tokens a bool": ({"max_tokens": True}, "max_tokens", ("an integer", "true")),
    "max_tokens a float": ({"max_tokens": 1.5}, "max_tokens", ("an integer", "1.5")),
    "max_tokens a string": ({"max_tokens": "9"}, "max_tokens", ("an integer", '"9"')),
    "max_tokens above": (
        {"max_tokens": MAX_ANSWER_TOKENS + 1},
        "max_tokens",
        (f"<= {MAX_ANSWER_TOKENS}", f"got {MAX_ANSWER_TOKENS + 1}"),
    ),
    "max_tokens huge": ({"max_tokens": 2**63}, "max_tokens", (str(2**63),)),
    "temperature above": ({"temperature": 2.1}, "temperature", ("<= 2", "2.1")),
    "temperature below": ({"temperature": -0.1}, "temperature", (">= 0", "-0.1")),
    "temperature a bool": ({"temperature": True}, "temperature", ("a number", "true")),
    "temperature a string": ({"temperature": "hot"}, "temperature", ("a number", '"hot"')),
    "top_p 0": ({"top_p": 0}, "top_p", ("> 0", "got 0")),
    "top_p above": ({"top_p": 1.01}, "top_p", ("<= 1", "1.01")),
    "top_k below": ({"top_k": -2}, "top_k", (">= -1", "-2")),
    "top_k huge": ({"top_k": 2**31}, "top_k", (str(2**31),)),
    "min_p above": ({"min_p": 1.5}, "min_p", ("<= 1", "1.5")),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty", ("> 0", "got 0")),
    "presence above": ({"presence_penalty": 2.5}, "presence_penalty", ("<= 2", "2.5")),
    "frequency below": ({"frequency_penalty": -3}, "frequency_penalty", (">= -2", "-3")),
    "n 0": ({"n": 0}, "n", (">= 1", "0")),
    "n above": ({"n": 17}, "n", ("<= 16", "17")),
    "seed huge": ({"seed": 2**63}, "seed", (str(2**63),)),
    "seed a float": ({"seed": 1.5}, "seed", ("an integer",)),
    "stop a number": ({"stop": 1}, "stop", ("a string or a list of strings",)),
    "stop of numbers": ({"stop": ["a", 1]}, "stop", ("a string or a list of strings",)),
    "17 stops": ({"stop": ["a"] * 17}, "stop", ("<= 16", "17")),
    "a long stop": ({"stop": ["a", "b" * 257]}, "stop[1]", ("<= 256", "257")),
    "bias of a word": ({"logit_bias": {"the": 1}}, "logit_bias", ("token ids", '"the"')),
    "bias out of range": ({"logit_bias": {"99999999": 1}}, "logit_bias", ("99999999",)),
    "bias too strong": ({"logit_bias": {"1": 101}}, "logit_bias.1", ("[-100, 100]", "101")),
    "bias a bool": ({"logit_bias": {"1": True}}, "logit_bias.1", ("a number", "true")),
    "too many biases": (
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "logit_bias",
        ("<= 1024", "1025"),
    ),
    "bias a list": ({"logit_bias": [1]}, "logit_bias", ("an object", "a list of 1")),
    "stop token out of range": ({"stop_token_ids": [10**6]}, "stop_token_ids", ("1000000",)),
    "too many stop tokens": ({"stop_token_ids": [1] * 129}, "stop_token_ids", ("<= 128", "129")),
    "min_tokens above": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", ("(8)", "got 9")),
    "unknown format": (
        {"response_format": {"type": "xml"}},
        "response_format.type",
        ("json_object", '"xml"'),
    ),
    "format a string": ({"response_format": "json"}, "response_format", ("an object", '"json"')),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        ("is required",),
    ),
    "a large schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"description": "x" * 65536}},
            }
        },
        "response_format.json_schema.schema",
        ("<= 65536 bytes",),
    ),
    "stream a string": ({"stream": "yes"}, "stream", ("true or false", '"yes"')),
    "stream_options alone": (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        ("stream: true",),
    ),
    "stream_options a list": (
        {"stream": True, "stream_options": []},
        "stream_options",
        ("an object",),
    ),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "param", "words"), SHARED.values(), ids=SHARED.keys())
def test_fields_of_both_operations(
    api: Any, path: str, fields: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    own = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    response = api.post(path, **own, **fields)
    check_error(response, 400, words=words, param=param)
    assert api.dispatcher.requests == []


COMPLETION_FIELDS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "no prompt": ({}, "prompt", ("is required",)),
    "null prompt": ({"prompt": None}, "prompt", ("must be a string",)),
    "empty prompt": ({"prompt": ""}, "prompt", (">= 1 token", "got 0")),
    "empty list": ({"prompt": []}, "prompt", ("not be empty",)),
    "an empty one of two": ({"prompt": ["a", ""]}, "prompt", (">= 1 token",)),
    "empty ids": ({"prompt": [[]]}, "prompt", (">= 1 token",)),
    "mixed": ({"prompt": ["a", 1]}, "prompt", ("must be a string",)),
    "bools": ({"prompt": [True]}, "prompt", ("must be a string",)),
    "floats": ({"prompt": [1.0]}, "prompt", ("must be a string",)),
    "objects": ({"prompt": [{}]}, "prompt", ("must be a string",)),
    "negative ids": ({"prompt": [-1]}, "prompt", ("[0, ", "-1")),
    "ids out of range": ({"prompt": [[1], [10**6]]}, "prompt", ("[0, ", "1000000")),
    "257 prompts": ({"prompt": ["a"] * 257}, "prompt", ("<= 256", "257")),
    "too many choices": ({"prompt": ["a"] * 17, "n": 16}, "n", ("<= 256", "272")),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of", ("must equal n (1)", "3")),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix", ("not supported",)),
    "logprobs above": ({"prompt": "a", "logprobs": 21}, "logprobs", ("<= 20", "21")),
    "echo with logprobs": ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", ("logprobs",)),
}


@pytest.mark.parametrize(
    ("fields", "param", "words"), COMPLETION_FIELDS.values(), ids=COMPLETION_FIELDS.keys()
)
def test_fields_of_completions(
    api: Any, fields: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    check_error(api.post(COMPLETIONS, **fields), 400, words=words, param=param)


IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
CHAT_FIELDS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "no messages": ({}, "messages", ("is required",)),
    "empty messages": ({"messages": []}, "messages", (">= 1", "0")),
    "messages a string": ({"messages": "hi"}, "messages", ("a list", '"hi"')),
    "2049 messages": ({"messages": USER * 2049}, "messages", ("<= 2048", "2049")),
    "message a string": ({"messages": ["hi"]}, "messages[0]", ("an object", '"hi"')),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role", ("is required",)),
    "unknown role": (
        {"messages": [*USER, {"role": "boss", "content": "a"}]},
        "messages[1].role",
        ("'system'", '"boss"'),
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", ("is required",)),
    "content a number": (
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        ("must be a string", "5"),
    ),
    "an image": (
        {"messages": [{"role": "user", "content": IMAGE}]},
        "messages[0].content",
        ("must be text", '"image_url"'),
    ),
    "part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        ("must be a string",),
    ),
    "top_logprobs alone": ({"messages": USER, "top_logprobs": 3}, "top_logprobs", ("logprobs",)),
    "top_logprobs above": (
        {"messages": USER, "logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        ("<= 20", "21"),
    ),
    "logprobs a number": ({"messages": USER, "logprobs": 1}, "logprobs", ("true or false", "1")),
    "required tool": ({"messages": USER, "tool_choice": "required"}, "tool_choice", ("auto",)),
    "named tool": (
        {"messages": USER, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        ("not supported yet",),
    ),
    "129 tools": (
        {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}] * 129},
        "tools",
        ("<= 128", "129"),
    ),
    "a nameless tool": (
        {"messages": USER, "tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name",
        ("is required",),
    ),
    "audio": ({"messages": USER, "modalities": ["audio"]}, "modalities", ("text",)),
    "functions": ({"messages": USER, "functions": [{}]}, "functions", ("use tools",)),
}


@pytest.mark.parametrize(("fields", "param", "words"), CHAT_FIELDS.values(), ids=CHAT_FIELDS.keys())
def test_fields_of_chat(
    api: Any, fields: dict[str, Any], param: str, words: tuple[str, ...]
) -> None:
    check_error(api.post(CHAT, **fields), 400, words=words, param=param)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_404_and_names_the_served(api: Any, path: str) -> None:
    own = {"messages": USER} if path == CHAT else {"prompt": "hi"}
    response = api.post(path, model="gpt-9", **own)
    check_error(response, 404, words=("'gpt-9'", "echo", "org/other"), param="model")
    assert response.json()["error"]["code"] == "model_not_found"


LONG = {
    "a text": (COMPLETIONS, {"prompt": "q " * MAX_MODEL_LEN}, "prompt"),
    "ids": (COMPLETIONS, {"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
    "a very long text": (COMPLETIONS, {"prompt": "q" * 100_000}, "prompt"),
    "a conversation": (CHAT, {"messages": USER * MAX_MODEL_LEN}, "messages"),
    "an answer": (COMPLETIONS, {"prompt": [5] * 200, "max_tokens": 350}, "max_tokens"),
}


@pytest.mark.parametrize(("path", "fields", "param"), LONG.values(), ids=LONG.keys())
def test_what_does_not_fit_the_context(
    api: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    response = api.post(path, **fields)
    check_error(response, 400, words=(f"{MAX_MODEL_LEN} tokens",), param=param)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_the_longest_prompt_that_fits_is_served(api: Any) -> None:
    api.complete([5] * (MAX_MODEL_LEN - 1))
    assert api.last_request.sampling.max_tokens == 1


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_413(api: Any, is_chunked: bool) -> None:
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()

    def pieces() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    content = pieces() if is_chunked else body
    response = api.client.post(COMPLETIONS, content=content)
    check_error(response, 413, words=(f"<= {MAX_BODY_BYTES} bytes",), param=None)
    api.complete()


def test_chunked_bodies_are_read(api: Any) -> None:
    pieces = iter([b'{"prompt"', b': "hel', b'lo"}'])
    assert api.client.post(COMPLETIONS, content=pieces).json()["choices"][0]["text"] == "hello"


def test_an_error_shows_little_of_what_was_sent(api: Any) -> None:
    for fields in ({"temperature": "x" * 100_000}, {"model": "y" * 100_000}, {"stop": ["z"] * 999}):
        response = api.post(COMPLETIONS, prompt="hi", **fields)
        assert len(response.content) < 600


def test_unknown_fields_are_ignored(api: Any) -> None:
    api.complete(user="ann", metadata={"a": [1]}, store=True, nonsense=float(3))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = """
    model prompt messages max_tokens n temperature top_p top_k min_p seed stop stop_token_ids
    logit_bias logprobs top_logprobs response_format stream stream_options tools tool_choice echo
    suffix best_of min_tokens ignore_eos max_completion_tokens modalities
"""
field_names = st.sampled_from(FIELDS.split())
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | json_values},
        optional={"content": json_values, "tool_calls": json_values, "name": json_values},
    ),
    max_size=3,
)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    fields=st.dictionaries(field_names, json_values, max_size=4),
    prompt=json_values | st.just("hi"),
    conversation=messages | json_values,
)
def test_no_body_is_a_server_error(
    api: Any, path: str, fields: dict[str, Any], prompt: Any, conversation: Any
) -> None:
    body = {"prompt": prompt, "messages": conversation, **fields}
    content = json.dumps(body, allow_nan=True).encode()
    response = api.client.post(path, content=content)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,0e-\\u prompt', max_size=40))
def test_no_bytes_are_a_server_error(api: Any, body: bytes | str) -> None:
    content = body.encode() if isinstance(body, str) else body
    assert api.client.post(COMPLETIONS, content=content).status_code == 400
