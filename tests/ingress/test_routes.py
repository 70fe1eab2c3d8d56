"""The routes beside the token path: models, health, metrics, errors, headers, the document."""

import dataclasses
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.errors import InvalidRequestError
from serve.ingress.served_model import ServedModels


def test_models_are_listed_and_found_by_ids_with_slashes(api: Any) -> None:
    listed = api.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["echo", "org/other"]
    assert api.client.get("/v1/models/org/other").json() == listed["data"][1]
    assert listed["data"][0]["max_model_len"] == api.model.max_model_len


def test_readiness_names_the_models_that_are_not_ready(api: Any) -> None:
    assert api.client.get("/health/ready").json() == {"status": "ready", "models_not_ready": []}
    api.call(lambda: api.dispatcher.ready_models.discard("org/other"))
    response = api.client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["models_not_ready"] == ["org/other"]
    assert api.client.get("/health").status_code == 503
    assert api.client.get("/health/live").status_code == 200


def test_metrics_are_prometheus_text_that_counts(api: Any) -> None:
    def read() -> dict[str, float]:
        response = api.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(response.text))
        samples = [sample for family in families for sample in family.samples]
        for sample in samples:
            assert {"model_name", "replica"} <= set(sample.labels)
        return {
            sample.name: sample.value for sample in samples if sample.labels["model_name"] == "echo"
        }

    before = read()
    usage = api.complete([[1, 2, 3]], max_tokens=2)["usage"]
    after = read()
    for name, key in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        full = f"vllm:{name}_tokens_total"
        assert after[full] - before[full] == usage[key]
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
    ):
        assert name in after


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/static/../app.py", 404, "not_found"),
        ("GET", "/static/secret", 404, "not_found"),
        ("GET", "/%ff%00/%ed%a0%80", 404, "not_found"),
        ("GET", "/v1/models/%ff", 404, "model_not_found"),
        ("GET", "//v1/models", 404, "not_found"),
        ("GET", "/v1/models/unknown", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
        ("PATCH", "/", 405, "method_not_allowed"),
    ],
)
def test_errors_of_routing_have_openai_s_shape(
    api: Any, method: str, path: str, status: int, code: str
) -> None:
    response = api.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(api: Any, path: str) -> None:
    got, head = api.client.get(path), api.client.head(path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/"])
def test_options_name_the_methods_and_grant_nothing(api: Any, path: str) -> None:
    headers = {"origin": "http://evil", "access-control-request-method": "POST"}
    response = api.client.options(path, headers=headers)
    assert response.status_code == 204
    assert "OPTIONS" in response.headers["allow"]
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/health", "/v1/completions", "/nothing"])
@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("abc-DEF_1.2:3", True), ("a b", False), ("x" * 129, False), ("é", False), (None, False)],
)
def test_a_sane_request_id_is_kept(api: Any, path: str, sent: str | None, is_kept: bool) -> None:
    headers = {} if sent is None else {"x-request-id": sent.encode()}
    request = api.client.post if "completions" in path else api.client.get
    found = request(path, headers=headers).headers.get_list("x-request-id")
    assert len(found) == 1
    assert (found[0] == sent) == is_kept
    assert found[0].isascii()


def test_without_a_name_the_default_model_answers(api: Any) -> None:
    api.complete()
    assert api.last_request.model == "echo"
    api.complete(model="org/other")
    assert api.last_request.model == "org/other"


def test_without_a_name_and_a_default_the_models_are_named(served: Any) -> None:
    models = [dataclasses.replace(model, is_default=False) for model in served]
    assert ServedModels(models[:1]).resolve(None) is models[0]
    with pytest.raises(InvalidRequestError, match="echo, org/other"):
        ServedModels(models).resolve(None)


def test_the_openapi_document_holds_every_operation(api: Any) -> None:
    document = api.client.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    schemas = document["components"]["schemas"]
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/CompletionRequest"}
    assert {"prompt", "max_tokens", "response_format"} <= set(
        schemas["CompletionRequest"]["properties"]
    )
    assert "ResponseFormat" in schemas


def test_the_page_is_locked_down(api: Any) -> None:
    for path in ("/", "/static/app.js", "/static/style.css", "/static/icon.svg"):
        response = api.client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_has_no_inline_code_and_nothing_remote() -> None:
    folder = resources.files("serve.ingress") / "page"
    page = (folder / "index.html").read_text()
    assert "<style" not in page
    assert " style=" not in page
    assert " on" not in [part[:3] for part in page.split('"')]
    assert "://" not in page
    script = (folder / "app.js").read_text()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script


def test_the_process_is_small_and_has_no_torch(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import uvicorn
from serve.config import HttpConfig, ModelConfig
from serve.ingress.app import build_app
from serve.ingress.served_model import load_served_model
from serve.testing.dispatcher import EchoDispatcher
config = ModelConfig(name="echo", path=Path({str(folder)!r}), max_model_len=512)
model = load_served_model(config, is_default=True)
build_app(http=HttpConfig(), models=[model], dispatcher=EchoDispatcher())
loaded = {{name.split(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"torch", "transformers", "ray", "numpy"}}))
pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
print(pages * 4096)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    forbidden, num_bytes = done.stdout.splitlines()
    assert forbidden == "[]"
    assert int(num_bytes) <= 250 * 2**20
