import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn

from serve.config import HttpConfig, ModelConfig
from serve.ingress.app import build_app
from serve.ingress.served_model import ServedModel, load_served_model
from serve.messages import GenerateRequest
from serve.testing.dispatcher import EchoDispatcher, echo
from serve.testing.tokenizer import write_tokenizer

MAX_MODEL_LEN = 512
MAX_ANSWER_TOKENS = 400
MAX_BODY_BYTES = 256 * 1024

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Api:
    """A live server over an `EchoDispatcher`, as a test sees it."""

    def __init__(
        self,
        model: ServedModel,
        other: ServedModel,
        *,
        keys_file: Path | None = None,
        parser: Literal["auto", "h11", "httptools"] = "auto",
    ) -> None:
        self.model = model
        self.dispatcher = EchoDispatcher(models=[model.name, other.name])
        self.app = build_app(
            http=HttpConfig(max_body_bytes=MAX_BODY_BYTES, keys_file=keys_file),
            models=[model, other],
            dispatcher=self.dispatcher,
        )
        config = uvicorn.Config(self.app, port=0, http=parser, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._config_and_start()
        serving = asyncio.ensure_future(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await serving

    def _config_and_start(self) -> None:
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(60)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(60)

    def reset(self) -> None:
        async def reset() -> None:
            dispatcher = self.dispatcher
            dispatcher.script, dispatcher.step_s, dispatcher.tokens_per_step = echo, 0.0, 1
            dispatcher.refusal = dispatcher.failure = None
            dispatcher.num_cached_tokens = 0
            dispatcher.may_admit.set()
            dispatcher.ready_models = {"echo", "org/other"}
            dispatcher.requests.clear()
            while not dispatcher.left.empty():
                dispatcher.left.get_nowait()

        self.run(reset())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call `function` on the server's loop."""

        async def call() -> Any:
            return function()

        return self.run(call())

    def say(self, *texts: str) -> None:
        """Let choice i of the next requests answer texts[i], the last one for all further."""
        scripts = [self.model.tokenizer.encode_markup(text) for text in texts]

        def script(_: GenerateRequest, index: int) -> list[int]:
            return scripts[min(index, len(scripts) - 1)]

        self.dispatcher.script = script

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", prompt=prompt, **fields)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def chat(self, **fields: Any) -> dict[str, Any]:
        fields.setdefault("messages", [{"role": "user", "content": "hello"}])
        response = self.post("/v1/chat/completions", **fields)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends with [DONE]."""
        if path.endswith("chat/completions"):
            body.setdefault("messages", [{"role": "user", "content": "hello"}])
        else:
            body.setdefault("prompt", "hello")
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events.pop() == ""
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def last_request(self) -> GenerateRequest:
        return self.dispatcher.requests[-1]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def served(folder: Path) -> tuple[ServedModel, ServedModel]:
    limits = {"max_model_len": MAX_MODEL_LEN, "max_answer_tokens": MAX_ANSWER_TOKENS}
    first = ModelConfig(name="echo", path=folder, **limits)
    second = ModelConfig(name="org/other", path=folder, **limits)
    return load_served_model(first, is_default=True), load_served_model(second, is_default=False)


@pytest.fixture(scope="session")
def live(served: tuple[ServedModel, ServedModel]) -> Iterator[Api]:
    api = Api(*served)
    api.start()
    yield api
    api.stop()


@pytest.fixture
def api(live: Api) -> Api:
    live.reset()
    return live


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; ended with its module, for while it lives this thread has a running event loop."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=found, args=CHROMIUM_ARGUMENTS, timeout=100_000
        )
        yield made
        made.close()
