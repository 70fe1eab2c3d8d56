"""What a client reads of the whole path is what the model alone would say."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .conftest import ANSWER_TIMEOUT_S, Running

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

QUICKSORT = {
    "prompt": "请用 Python 实现快速排序，并返回 JSON 格式的算法说明。",  # noqa: RUF001
    "max_tokens": 1024,
    "temperature": 0.7,
    "response_format": {"type": "json_object"},
}


def _complete(shoal: Running, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{shoal.url}/v1/completions", json=body, timeout=ANSWER_TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _stream(shoal: Running, **body: Any) -> str:
    text = ""
    with httpx.stream(
        "POST",
        f"{shoal.url}/v1/completions",
        json={**body, "stream": True},
        timeout=ANSWER_TIMEOUT_S,
    ) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


def test_a_random_checkpoint_served_over_http_gives_transformers_greedy_text(
    shoal: Running,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shoal.random_path)
    model = AutoModelForCausalLM.from_pretrained(shoal.random_path, dtype=torch.float32)
    num_real = len(tokenizer)
    ids = tokenizer.encode("Which way does the shoal swim today?")
    for _ in range(48):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, :num_real]
        ids.append(int(logits.argmax()))
    prompt_ids, expected = ids[:-48], ids[-48:]
    answer = _complete(
        shoal,
        model="random",
        prompt=prompt_ids,
        max_tokens=48,
        temperature=0,
        ignore_eos=True,
        repetition_penalty=1.0,
    )
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == 48


def test_32_streams_at_once_have_the_text_that_each_has_alone(shoal: Running) -> None:
    bodies = [
        {
            "model": "random",
            "prompt": f"Fish number {i} " * (1 + i % 7),
            "max_tokens": 40,
            "seed": i,
        }
        for i in range(32)
    ]
    alone = [_complete(shoal, **body)["choices"][0]["text"] for body in bodies]
    assert len(set(alone)) == 32
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: _stream(shoal, **body), bodies))
    assert together == alone


def test_the_quicksort_request_ends_by_itself_with_a_json_object(shoal: Running) -> None:
    for seed in range(20):
        choice = _complete(shoal, **QUICKSORT, seed=seed)["choices"][0]
        assert choice["finish_reason"] == "stop"
        described = json.loads(choice["text"])
        assert isinstance(described, dict)
        assert "快速排序" in choice["text"]


def test_a_prompt_list_with_n_answers_every_choice_in_order(shoal: Running) -> None:
    body = {"model": "random", "max_tokens": 6, "seed": 3}
    alone = [_complete(shoal, prompt=p, **body)["choices"][0]["text"] for p in ("one", "two")]
    both = _complete(shoal, prompt=["one", "two"], n=2, **body)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    assert [both[0]["text"], both[2]["text"]] == alone


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/absent", 404, "model_not_found"),
        ("GET", "/-/routes", 404, "not_found"),
    ],
)
def test_errors_have_the_shape_of_openai_through_the_proxy(
    shoal: Running, method: str, path: str, status: int, code: str
) -> None:
    answer = httpx.request(method, shoal.url + path, timeout=ANSWER_TIMEOUT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_bad_bodies_are_refused_and_the_server_lives_on(shoal: Running) -> None:
    for content in (b"{", b"[]", b'{"prompt": 1e400}', b'{"prompt": "x", "max_tokens": -1}'):
        answer = httpx.post(
            f"{shoal.url}/v1/completions", content=content, timeout=ANSWER_TIMEOUT_S
        )
        assert answer.status_code == 400, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert _complete(shoal, prompt="Hello", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_prompt_over_the_context_names_limit_and_value(shoal: Running) -> None:
    answer = httpx.post(
        f"{shoal.url}/v1/completions",
        json={"model": "random", "prompt": "fish " * 5000},
        timeout=ANSWER_TIMEOUT_S,
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "4096" in error["message"]


def test_metrics_count_what_was_served(shoal: Running) -> None:
    before = shoal.metric("vllm:generation_tokens_total", "random")
    usage = _complete(shoal, model="random", prompt="count me", max_tokens=9, ignore_eos=True)
    assert usage["usage"]["completion_tokens"] == 9
    # The count takes another way than the tokens, and may come a moment later.
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while (after := shoal.metric("vllm:generation_tokens_total", "random")) == before:
        assert time.monotonic() < deadline, "the tokens are not counted"
    assert after - before == 9
