"""POST /v1/completions: prompts in every form, order, usage, echo, logprobs, stop strings."""

from typing import Any

import pytest

PATH = "/v1/completions"


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def test_an_answer_has_openai_s_shape(api: Any) -> None:
    answer = api.complete("hello world", max_tokens=40)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "echo")
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("prompt", ["hello", ["hello"], [72, 73], [[72, 73]]])
def test_a_prompt_may_have_any_of_four_forms(api: Any, prompt: Any) -> None:
    api.complete(prompt)
    assert len(api.last_request.prompts) == 1


def test_choices_are_prompt_major(api: Any) -> None:
    answer = api.complete(["one", "two"], n=2, max_tokens=40)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]


def test_usage_counts_each_prompt_once_and_every_choice(api: Any) -> None:
    prompts = [[72, 73, 74], [75]]
    usage = api.complete(prompts, n=3, max_tokens=40)["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["completion_tokens"] == 3 * 4
    assert usage["total_tokens"] == 16


def test_usage_tells_how_many_prompt_tokens_were_cached(api: Any) -> None:
    api.dispatcher.num_cached_tokens = 2
    prompts = [[72, 73, 74], [75, 76, 77]]
    whole = api.complete(prompts, n=3, max_tokens=40)["usage"]
    options = {"include_usage": True}
    chunks = api.stream(PATH, prompt=prompts, n=3, max_tokens=40, stream_options=options)

    assert whole["prompt_tokens_details"] == {"cached_tokens": 4}
    assert chunks[-1]["usage"] == whole


def test_without_keys_there_is_one_namespace(api: Any) -> None:
    api.complete("hello")
    assert api.last_request.namespace == b""


def test_streamed_choices_join_to_the_plain_answer(api: Any) -> None:
    texts = ("héllo 你好 👩‍👩‍👧‍👦", "another answer", "third")
    api.say(*texts)
    plain = api.complete(["a", "b", "c"], max_tokens=80)
    chunks = api.stream(PATH, prompt=["a", "b", "c"], max_tokens=80)
    for index, text in enumerate(texts):
        assert plain["choices"][index]["text"] == joined(chunks, index) == text
        reasons = [
            choice["finish_reason"]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == index
        ]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


def test_sixteen_tokens_by_default(api: Any) -> None:
    api.say("word " * 60)
    answer = api.complete()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_control_tokens_in_a_raw_prompt_count(api: Any) -> None:
    api.complete("<|im_start|>user\nhi<|im_end|>")
    end = api.model.tokenizer.encode_markup("<|im_end|>")
    assert api.last_request.prompts[0].token_ids[-1:] == end


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo_puts_the_prompt_before_each_answer(api: Any, is_stream: bool) -> None:
    api.say("answer one", "answer two")
    fields = {"prompt": "the prompt: ", "n": 2, "echo": True, "max_tokens": 40}
    if is_stream:
        texts = [joined(api.stream(PATH, **fields), index) for index in (0, 1)]
    else:
        texts = [choice["text"] for choice in api.complete(**fields)["choices"]]
    assert texts == ["the prompt: answer one", "the prompt: answer two"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_a_stop_string_cuts_one_choice_and_lets_others_go_on(
    api: Any, is_stream: bool, tokens_per_step: int
) -> None:
    api.say("one two STOP three", "one two three ST")
    api.dispatcher.tokens_per_step = tokens_per_step
    fields = {"n": 2, "stop": ["never", "STOP"], "max_tokens": 60}
    if is_stream:
        chunks = api.stream(PATH, **fields, stream_options={"include_usage": True})
        texts = [joined(chunks, index) for index in (0, 1)]
        usage = chunks[-1]["usage"]
    else:
        answer = api.complete(**fields)
        texts = [choice["text"] for choice in answer["choices"]]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"]
        usage = answer["usage"]
    assert texts == ["one two ", "one two three ST"]
    counted = [len(api.model.tokenizer.encode(text)) for text in ("one two STOP", texts[1])]
    assert usage["completion_tokens"] == sum(counted)


def test_a_stop_string_ends_the_work_of_the_replica(api: Any) -> None:
    api.say("one STOP" + " and on" * 50)
    answer = api.complete(stop="STOP", max_tokens=300)
    assert answer["choices"][0]["text"] == "one "
    assert api.run(api.dispatcher.left.get()) == answer["id"]


@pytest.mark.parametrize("count", [0, 2])
def test_logprobs_are_aligned_with_the_text(api: Any, count: int) -> None:
    api.say("hello, 你")
    choice = api.complete(logprobs=count, max_tokens=40)["choices"][0]
    logprobs = choice["logprobs"]
    sizes = {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs")}
    assert sizes == {len(logprobs["text_offset"])}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in top


def test_streamed_logprobs_join_to_the_plain_ones(api: Any) -> None:
    api.say("hello, 你好 and END or so")
    fields = {"logprobs": 1, "stop": "END", "max_tokens": 60}
    plain = api.complete(**fields)["choices"][0]["logprobs"]
    chunks = api.stream(PATH, **fields)
    for key, values in plain.items():
        streamed = [
            value
            for chunk in chunks
            for value in (chunk["choices"][0]["logprobs"] or {}).get(key, [])
        ]
        assert streamed == values
    assert "END" not in "".join(plain["tokens"])


def test_usage_comes_last_and_only_when_asked_for(api: Any) -> None:
    assert all("usage" not in chunk for chunk in api.stream(PATH))
    chunks = api.stream(PATH, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_continuous_usage_counts_up(api: Any) -> None:
    api.say("a b c d e")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = api.stream(PATH, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]]
    assert counts == sorted(counts)
    assert counts[0] == 1


def test_sampling_fields_arrive_as_sent(api: Any) -> None:
    api.complete(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "7": 3},
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=2,
        response_format={"type": "json_object"},
    )
    sampling = api.last_request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.2, 2)
    assert sampling.logit_bias == {5: -100.0, 7: 3.0}
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((9,), True)
    assert sampling.grammar is not None
    assert sampling.grammar.kind == "json_object"


def test_fields_left_out_or_null_come_from_the_checkpoint(api: Any) -> None:
    names = ("temperature", "top_k", "top_p", "n", "seed", "stop", "logprobs", "stream_options")
    api.complete(**dict.fromkeys(names))
    sampling = api.last_request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 20, 1.0)


def test_unseeded_requests_get_different_seeds_and_seeded_ones_keep_theirs(api: Any) -> None:
    for seed in (None, None, 7, 7):
        api.complete(seed=seed)
    seeds = [request.sampling.seed for request in api.dispatcher.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2] == seeds[3]


def test_a_stop_token_is_counted_but_not_shown(api: Any) -> None:
    ids = api.model.tokenizer.encode("abc")
    api.dispatcher.script = lambda request, index: ids
    answer = api.complete(stop_token_ids=[ids[-1]], max_tokens=40)
    assert answer["choices"][0]["text"] == api.model.tokenizer.decode(ids[:-1])
    assert answer["usage"]["completion_tokens"] == len(ids)


def test_prompt_blocks_are_hashed(api: Any) -> None:
    api.complete(list(range(40)))
    assert len(api.last_request.prompts[0].block_hashes) == 2
