"""JSON that a model without sense, one that picks random allowed tokens, still gets right."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from serve.engine.grammar import MAX_JSON_DEPTH, GrammarCompiler, GrammarError, Matcher
from serve.errors import InvalidRequestError
from serve.messages import GrammarSpec
from serve.testing.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
NUM_REAL = TOKENIZER.get_vocab_size()
VOCAB_SIZE = NUM_REAL + 45
EOS = TOKENIZER.token_to_id("<|im_end|>")
COMPILER = GrammarCompiler(
    TOKENIZER.to_str(), eos_token_ids=(EOS,), num_real_tokens=NUM_REAL, vocab_size=VOCAB_SIZE
)
BYTES = LLTokenizer(TOKENIZER.to_str())
STRING = re.compile(r'"(\\.|[^"\\])*"')
JSON_OBJECT = GrammarSpec("json_object")
SCHEMA = GrammarSpec(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                "kind": {"enum": ["a", "b"]},
            },
            "required": ["name", "sizes", "kind"],
            "additionalProperties": False,
        }
    ),
)


def allowed_ids(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def feed(text: str, spec: GrammarSpec = JSON_OBJECT) -> bool:
    """Whether the grammar takes all of `text`, byte by byte of its tokens."""
    matcher = COMPILER.compile(spec)
    try:
        return [matcher.consume(token_id) for token_id in TOKENIZER.encode(text).ids][-1]
    except GrammarError:
        return False


def sample(spec: GrammarSpec, seed: int, *, num_free: int = 60) -> str:
    """Random allowed tokens; after `num_free` of them those that close what is open."""
    rng = random.Random(seed)
    matcher = COMPILER.compile(spec)
    token_ids: list[int] = []
    for _ in range(num_free + 400):
        ids = allowed_ids(matcher)
        assert ids, "nothing is allowed"
        assert max(ids) < NUM_REAL, "a padded id is allowed"
        closing = [i for i in ids if TOKENIZER.id_to_token(i) in ('"', "}", "]", ":", "0", "Ġ")]
        is_free = len(token_ids) < num_free and rng.random() < 0.7
        token_id = rng.choice(ids if is_free or not closing else closing)
        if token_id == EOS:
            break
        token_ids.append(token_id)
        if matcher.consume(token_id):
            break
    return BYTES.decode_bytes(token_ids).decode("utf-8", errors="strict")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_json_object_parses_and_never_pads(seed: int) -> None:
    text = sample(JSON_OBJECT, seed)

    assert isinstance(json.loads(text), dict)
    outside = STRING.sub("", text)
    assert "  " not in outside
    assert not set(outside) & set("\n\t\r")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_answer_to_a_schema_fits_it(seed: int) -> None:
    answer = json.loads(sample(SCHEMA, seed))

    assert list(answer) == ["name", "sizes", "kind"]
    assert len(answer["name"]) <= 8
    assert len(answer["sizes"]) <= 3
    assert all(isinstance(size, int) for size in answer["sizes"])
    assert answer["kind"] in ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1, "b": [], "c": {"d": null}}',
        '{"a":1,"b":-0.5e-3,"c":[true, false]}',
        '{"算法": "快速排序 🦈", "e\\u00e9": "\\n\\t\\"\\\\"}',
        '{"a": ' * (MAX_JSON_DEPTH - 1) + "{}" + "}" * (MAX_JSON_DEPTH - 1),
    ],
)
def test_ordinary_json_is_allowed_and_complete(text: str) -> None:
    assert feed(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        " {}",
        '{"a":  1}',
        '{"a" : 1}',
        '{ "a": 1}',
        '{"a":\n1}',
        '{"a": 01}',
        '{"a": 1' + "0" * 18 + "}",
        '{"a": 1e400}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": "\n"}',
        '{"a": 1,}',
        '{"a": ' + "[" * MAX_JSON_DEPTH,
    ],
)
def test_what_would_not_parse_or_could_loop_is_refused(text: str) -> None:
    assert not feed(text)


def test_only_whole_utf8_characters_fit_in_strings() -> None:
    matcher = COMPILER.compile(JSON_OBJECT)
    for token_id in TOKENIZER.encode('{"').ids:
        matcher.consume(token_id)
    two_byte_head = TOKENIZER.token_to_id("Ã")  # the byte 0xC3 in byte-level spelling
    matcher.consume(two_byte_head)

    assert TOKENIZER.token_to_id('"') not in allowed_ids(matcher)
    assert TOKENIZER.token_to_id("©") in allowed_ids(matcher)  # the byte 0xA9


def test_each_sequence_has_its_own_matcher() -> None:
    first, second = COMPILER.compile(JSON_OBJECT), COMPILER.compile(JSON_OBJECT)
    before = allowed_ids(second)
    first.consume(TOKENIZER.token_to_id("{"))

    assert allowed_ids(second) == before
    assert allowed_ids(first) != before


@pytest.mark.parametrize(
    "source", ["{", '{"type": "frob"}', '{"type": "string", "pattern": "("}', '{"$ref": "#/no"}']
)
def test_schema_that_cannot_be_compiled_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="response_format cannot be compiled"):
        COMPILER.compile(GrammarSpec("json_schema", source))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", "{}"),
        ('{"a', '":""}'),
        ('{"a": [1, {"b": "x', '"}]}'),
        ('{"a": -', "0}"),
        ('{"a": tr', "ue}"),
        ('{"a": "\\u00', '00"}'),
        ('{"a": 1,', '"":""}'),
    ],
)
def test_text_is_closed_when_few_tokens_are_left(text: str, end: str) -> None:
    matcher = COMPILER.compile(JSON_OBJECT)
    for token_id in TOKENIZER.encode(text).ids:
        matcher.consume(token_id)
    closing: list[int] = []
    is_over = False
    while not is_over:
        matcher.watch(len(end) - len(closing))
        [token_id] = allowed_ids(matcher)
        closing.append(token_id)
        is_over = matcher.consume(token_id)

    assert matcher.is_closing
    assert BYTES.decode_bytes(closing).decode() == end


def test_text_is_free_while_tokens_are_left() -> None:
    matcher = COMPILER.compile(JSON_OBJECT)
    for position, token_id in enumerate(TOKENIZER.encode('{"a": "quick sort').ids):
        matcher.watch(40 - position)
        matcher.consume(token_id)

    assert not matcher.is_closing


def test_text_that_can_no_longer_be_closed_goes_on_freely() -> None:
    matcher = COMPILER.compile(JSON_OBJECT)
    matcher.watch(1)

    assert not matcher.is_closing
    assert len(allowed_ids(matcher)) > 1


def test_token_outside_the_grammar_is_an_error() -> None:
    matcher = COMPILER.compile(JSON_OBJECT)

    with pytest.raises(GrammarError):
        matcher.consume(TOKENIZER.token_to_id("]"))
