"""The real openai client against a live server: what its users see, errors by class."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve.errors import (
    NotReadyError,
    OverloadedError,
    PoisonedRequestError,
    ReplicaLostError,
    ShoalError,
)

USER: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(api: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(api: Any, client: openai.OpenAI) -> None:
    api.say("An answer.")
    answer = client.chat.completions.create(model="echo", messages=USER)
    assert answer.choices[0].message.content == "An answer."
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0


def test_chat_stream_with_usage(api: Any, client: openai.OpenAI) -> None:
    api.say("An answer 你好.")
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "An answer 你好."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_the_stream_helper_assembles_the_message(api: Any, client: openai.OpenAI) -> None:
    api.say("An answer.")
    with client.chat.completions.stream(model="echo", messages=USER) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "An answer."


def test_completions(api: Any, client: openai.OpenAI) -> None:
    api.say("An answer.")
    answer = client.completions.create(model="org/other", prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == ["An answer."] * 4
    chunks = client.completions.create(model="echo", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "An answer."


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo", "org/other"]
    assert client.models.retrieve("org/other").id == "org/other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "kind", "retry_after"),
    [
        (OverloadedError("full", retry_after_s=1.2), openai.RateLimitError, "2"),
        (NotReadyError("none"), openai.InternalServerError, "1"),
        (PoisonedRequestError("bad"), openai.InternalServerError, None),
    ],
)
def test_refusals_are_statuses_even_for_streams(
    api: Any,
    client: openai.OpenAI,
    refusal: ShoalError,
    kind: type[openai.APIStatusError],
    retry_after: str | None,
    is_stream: bool,
) -> None:
    api.call(lambda: setattr(api.dispatcher, "refusal", refusal))
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model="echo", messages=USER, stream=is_stream)
    assert caught.value.status_code == refusal.status
    assert caught.value.code == refusal.code
    assert caught.value.response.headers.get("retry-after") == retry_after


def test_a_bad_streamed_request_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=[], stream=True)
    assert caught.value.param == "messages"


def test_a_failure_in_the_middle_raises_after_the_text_before_it(
    api: Any, client: openai.OpenAI
) -> None:
    api.say("one two three four")
    api.call(lambda: setattr(api.dispatcher, "failure", ReplicaLostError("the replica died")))
    api.call(lambda: setattr(api.dispatcher, "failure_after_steps", 3))
    texts = []

    def read() -> None:
        for chunk in client.chat.completions.create(model="echo", messages=USER, stream=True):
            texts.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="the replica died") as caught:
        read()
    assert caught.value.code == "replica_lost"
    assert "one two three four".startswith("".join(texts))
    assert "".join(texts)


def test_a_failure_before_a_whole_answer_is_a_status(api: Any, client: openai.OpenAI) -> None:
    api.call(lambda: setattr(api.dispatcher, "failure", ReplicaLostError("the replica died")))
    with pytest.raises(openai.InternalServerError, match="the replica died") as caught:
        client.chat.completions.create(model="echo", messages=USER)
    assert caught.value.status_code == 503
