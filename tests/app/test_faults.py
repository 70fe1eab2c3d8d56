"""Real faults on real processes while real streams run: every stream ends, the replica is back."""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from .conftest import ANSWER_TIMEOUT_S, Running, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def _read_stream(
    shoal: Running, prompt: str, max_tokens: int, has_begun: threading.Event | None = None
) -> str:
    """How a stream of the model `paced` ended: "done", or the code of its error."""
    body = {
        "model": "paced",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream(
        "POST", f"{shoal.url}/v1/completions", json=body, timeout=ANSWER_TIMEOUT_S
    ) as answer:
        if answer.status_code != 200:
            code: str = json.loads(answer.read())["error"]["code"]
            return code
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return "done"
            if line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                return str(event["error"]["code"])
            if has_begun is not None:
                has_begun.set()
    return "cut"


def _kill_during_decode(shoal: Running, victim: int) -> list[str]:
    """Kill a process once each of 8 streams has tokens; returns how each of them ended."""
    begun = [threading.Event() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(_read_stream, shoal, "word", 3000, event) for event in begun]
        assert all(event.wait(ANSWER_TIMEOUT_S) for event in begun)
        kill(victim)
        return [stream.result() for stream in streams]


def _kill_early(shoal: Running, victim: int, *, seed: int) -> list[str]:
    """Kill a process around the admission and the chunked prefill of 8 streams."""
    moment_s = random.Random(seed).uniform(0.0, 0.6)
    with ThreadPoolExecutor(8) as pool:
        streams = [
            pool.submit(_read_stream, shoal, "word " * (20 + 400 * (i % 2)), 100) for i in range(8)
        ]
        threading.Event().wait(moment_s)
        kill(victim)
        return [stream.result() for stream in streams]


@pytest.mark.parametrize("rank", [1, 0])
def test_the_death_of_a_shard_during_decode_ends_every_stream_typed(
    shoal: Running, rank: int
) -> None:
    shoal.wait_answer("paced")
    replica = shoal.replica("paced")
    assert _kill_during_decode(shoal, shoal.shard("paced", rank)) == ["replica_lost"] * 8
    shoal.wait_answer("paced")
    assert shoal.replica("paced") == replica, "its shards alone were made anew"


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_death_of_a_shard_before_the_first_token_is_typed_or_unseen(
    shoal: Running, rank: int, seed: int
) -> None:
    shoal.wait_answer("paced")
    replica = shoal.replica("paced")
    ends = _kill_early(shoal, shoal.shard("paced", rank), seed=seed)
    assert set(ends) <= {"replica_lost", "not_ready", "done"}, ends
    shoal.wait_answer("paced")
    assert shoal.replica("paced") == replica, "its shards alone were made anew"


def test_the_death_of_the_replica_ends_every_stream_typed_and_it_is_back(shoal: Running) -> None:
    shoal.wait_answer("paced")
    assert _kill_during_decode(shoal, shoal.replica("paced")) == ["replica_lost"] * 8
    shoal.wait_answer("paced")


def test_other_models_answer_while_one_is_rebuilt(shoal: Running) -> None:
    kill(shoal.shard("paced", 1))
    answer = httpx.post(
        f"{shoal.url}/v1/completions",
        json={"model": "random", "prompt": "hi", "max_tokens": 2},
        timeout=ANSWER_TIMEOUT_S,
    )
    assert answer.status_code == 200
    shoal.wait_answer("paced")


def test_a_request_that_finds_the_only_replica_rebuilding_waits_for_it(shoal: Running) -> None:
    shoal.wait_answer("paced")
    replica = shoal.replica("paced")
    kill(shoal.shard("paced", 0))
    answer = httpx.post(
        f"{shoal.url}/v1/completions",
        json={"model": "paced", "prompt": "hi", "max_tokens": 2},
        timeout=ANSWER_TIMEOUT_S,
    )
    assert answer.status_code == 200 or answer.headers["retry-after"], answer.text
    shoal.wait_answer("paced")
    assert shoal.replica("paced") == replica, "its shards alone were made anew"


def test_200_clients_that_vanish_leave_an_empty_engine(shoal: Running) -> None:
    shoal.wait_answer("paced")
    body = json.dumps(
        {"model": "paced", "prompt": "go", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    clients = []
    for _ in range(200):
        client = socket.create_connection(("127.0.0.1", shoal.port), timeout=ANSWER_TIMEOUT_S)
        client.sendall(head + body)
        clients.append(client)
    for client in clients[:100]:  # half of them have their first token, half may not even wait
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    for client in clients:
        client.close()
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(shoal.metric(f"vllm:{name}", "paced") for name in held):
        assert time.monotonic() < deadline, "sequences of clients that are gone still run"
    shoal.wait_answer("paced")
