"""Clients that leave, stall or trickle: what they held is given back at once."""

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve.errors import ErrorInfo, PayloadTooLargeError, RequestTimeoutError
from serve.ingress.body import ClientGoneError, read_body
from serve.ingress.endpoint import GenerateEndpoint
from serve.ingress.operations import prepare_completion
from serve.ingress.served_model import ServedModels
from serve.ingress.stream import TokenStream
from serve.messages import TokenDelta
from serve.testing.dispatcher import EchoDispatcher

CHAT = "/v1/chat/completions"


def open_request(api: Any, path: str, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(api: Any, is_stream: bool) -> None:
    api.say("word " * 200)
    api.dispatcher.step_s = 0.05
    body = {"prompt": "hi", "max_tokens": 390, "stream": is_stream}
    connection = open_request(api, "/v1/completions", body)
    if is_stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    assert api.run(api.dispatcher.left.get()) == api.last_request.request_id
    api.complete()


def test_a_client_that_leaves_before_admission_cancels_it(api: Any) -> None:
    api.call(api.dispatcher.may_admit.clear)
    connection = open_request(api, "/v1/completions", {"prompt": "hi"})
    connection.close()
    assert api.run(api.dispatcher.left.get()) == api.last_request.request_id
    api.call(api.dispatcher.may_admit.set)
    api.complete()
    api.run(api.dispatcher.settle())  # a request that was admitted after all would speak for ever
    assert api.dispatcher.num_running == 0


def test_half_a_request_and_gone_leaves_nothing(api: Any) -> None:
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=60)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    connection.close()
    api.complete()
    assert len(api.dispatcher.requests) == 1


def test_a_finished_request_is_not_aborted(api: Any) -> None:
    api.complete()
    api.stream(CHAT)
    assert api.call(api.dispatcher.left.empty)


def test_a_connection_serves_one_request_after_another(api: Any) -> None:
    with httpx.Client(base_url=api.url, timeout=60) as client:
        for _ in range(3):
            client.post("/v1/completions", json={"prompt": "hi", "stream": True})
        assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
        assert client.get("/health").status_code == 200


def test_concurrent_streams_are_not_mixed_up(api: Any) -> None:
    async def ask(client: httpx.AsyncClient, index: int) -> tuple[str, str]:
        prompt = f"this is the prompt number {index} "
        body = {"prompt": prompt, "stream": True, "max_tokens": 60}
        response = await client.post("/v1/completions", json=body)
        events = response.text.split("\n\n")[:-2]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        return prompt, "".join(chunk["choices"][0]["text"] for chunk in chunks)

    async def ask_all() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(32)))

    for prompt, text in asyncio.run(ask_all()):
        assert text == prompt


def test_a_long_prompt_does_not_hold_up_a_stream(api: Any) -> None:
    """Bodies beyond a few kB are encoded in a thread: the loop turns while that happens."""
    threads = []
    model = api.model.tokenizer
    encode = type(model).encode

    def watch(self: Any, text: str) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "encode", watch)
        api.post("/v1/completions", prompt="word " * 1500)
        api.complete("short")
    assert threads[0].startswith("encode")
    assert not threads[-1].startswith("encode")


def scope(length: int | None = None) -> dict[str, Any]:
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return {"type": "http", "headers": headers}


def read(messages: list[dict[str, Any]], **limits: Any) -> bytes:
    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    limits = {"max_bytes": 10, "timeout_s": 0.01, **limits}
    return asyncio.run(read_body(scope(limits.pop("length", None)), receive, **limits))


def piece(body: bytes, *, is_last: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": not is_last}


def test_a_body_comes_in_pieces() -> None:
    assert read([piece(b"ab"), piece(b""), piece(b"c", is_last=True)]) == b"abc"


def test_a_body_that_does_not_come_is_a_timeout() -> None:
    with pytest.raises(RequestTimeoutError, match=r"0\.01 s"):
        read([piece(b"ab")])


def test_a_body_is_refused_by_its_header_before_it_is_read() -> None:
    with pytest.raises(PayloadTooLargeError, match="<= 10 bytes, got 11"):
        read([], length=11)


def test_a_body_is_refused_as_soon_as_it_is_too_long() -> None:
    with pytest.raises(PayloadTooLargeError, match="<= 10 bytes"):
        read([piece(b"a" * 6), piece(b"b" * 6)])


def test_a_client_that_goes_while_sending_is_no_error() -> None:
    with pytest.raises(ClientGoneError):
        read([piece(b"a"), {"type": "http.disconnect"}])


def make_endpoint(served: Any, dispatcher: EchoDispatcher, **limits: float) -> GenerateEndpoint:
    return GenerateEndpoint(
        prepare_completion,
        models=ServedModels(served),
        dispatcher=dispatcher,
        executor=ThreadPoolExecutor(1),
        max_body_bytes=1000,
        **limits,
    )


def test_a_client_that_stops_reading_is_cut_off(served: Any) -> None:
    """With the send stuck, the stall timer ends the answer and aborts the request."""

    async def run() -> None:
        dispatcher = EchoDispatcher(script=lambda request, index: [5] * 390, step_s=0.01)
        endpoint = make_endpoint(served, dispatcher, stalled_client_s=0.02)
        body = b'{"prompt": "hello", "max_tokens": 390, "stream": true}'
        messages = [piece(body, is_last=True)]

        async def receive() -> Any:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(endpoint(scope(), receive, send), 60)
        assert await asyncio.wait_for(dispatcher.left.get(), 60)

    asyncio.run(run())


def test_a_trickled_body_is_answered_408_and_closed(served: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    endpoint = make_endpoint(served, EchoDispatcher(), body_timeout_s=0.01)
    asyncio.run(endpoint(scope(), receive, send))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


class OneStream:
    """A dispatcher whose only stream the test feeds by hand."""

    def __init__(self, deltas: list[TokenDelta]) -> None:
        self._deltas = deltas

    async def submit(self, request: Any) -> TokenStream:
        stream = TokenStream(num_choices=1, replica_id="one#0")
        for delta in self._deltas:
            stream.feed(delta)
        return stream


@pytest.mark.parametrize(
    ("delta", "code"),
    [
        (TokenDelta(0, 0, 1, [], None, "error", ErrorInfo("poisoned_request", "NaN")), "poisoned"),
        (TokenDelta(0, 0, 1, [], None, "abort"), "replica_lost"),
    ],
)
def test_a_choice_that_fails_ends_the_stream_typed(api: Any, delta: TokenDelta, code: str) -> None:
    ids = api.model.tokenizer.encode("ok")
    double = OneStream([TokenDelta(0, 0, 0, ids), delta])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.dispatcher, "submit", double.submit)
        body = {"prompt": "a", "stream": True}
        text = api.client.post("/v1/completions", json=body).text
    first, last = text.rstrip("\n").split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "ok"
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1])["error"]["code"].startswith(code)


def test_an_unexpected_exception_is_a_500_without_details(
    api: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Any) -> TokenStream:
        raise RuntimeError("secret path /x/y")

    logger = logging.getLogger("shoal.ingress")
    logger.addHandler(caplog.handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api.dispatcher, "submit", broken)
            patch.setattr(logger, "propagate", False)
            response = api.post("/v1/completions", prompt="a")
    finally:
        logger.removeHandler(caplog.handler)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert [record.levelname for record in caplog.records] == ["ERROR"]
