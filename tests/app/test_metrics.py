"""What Prometheus reads of a running Shoal, after a request and the loss of a shard."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from serve.metrics import READINGS

from .conftest import ANSWER_TIMEOUT_S, REPOSITORY, Running, kill

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

FILES = REPOSITORY / "helm" / "shoal" / "files"
BODY = {"model": "random", "prompt": [40, 41], "max_tokens": 9, "ignore_eos": True}
REBUILDS = "ray_shoal_replica_rebuilds_total"
# Ray's processes hand their metrics on every 10 s.
SEEN_WITHIN_S = 120.0
# Labels that the chart's PodMonitor adds to what it scrapes.
ADDED_LABELS = {"namespace", "release"}


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


class Scrape:
    """The samples of all of Ray's metrics ports at one moment."""

    def __init__(self, shoal: Running) -> None:
        listed = shoal.folder / "r/session_latest/prom_metrics_service_discovery.json"
        targets = [
            target for entry in json.loads(listed.read_text()) for target in entry["targets"]
        ]
        self.samples = [
            sample
            for target in targets
            for line in httpx.get(
                f"http://{target}/metrics", timeout=ANSWER_TIMEOUT_S
            ).text.splitlines()
            if (sample := _sample(line)) is not None
        ]

    def find(self, name: str, **labels: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def total(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.find(name, **labels))

    def by_process(self, name: str, **labels: str) -> dict[str, float]:
        """The values of each process, also of one that is gone and not yet forgotten."""
        return {str(sorted(s.labels.items())): s.value for s in self.find(name, **labels)}


def _sample(line: str) -> Sample | None:
    found = re.fullmatch(r"(ray_\w+)(?:\{(.*)\})? (\S+)", line)
    if found is None:
        return None
    labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
    return Sample(found[1], labels, float(found[3]))


def _wait_for(shoal: Running, condition: Callable[[Scrape], bool]) -> Scrape:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not condition(scrape := Scrape(shoal)):
        assert time.monotonic() < deadline, "Ray's metrics ports do not show it"
        threading.Event().wait(0.5)
    return scrape


@pytest.fixture(scope="module")
def scrapes(shoal: Running) -> tuple[Scrape, Scrape]:
    """Before and after: one answer of 9 tokens by `random`, one shard of `paced` lost."""
    shoal.wait_answer("random")
    shoal.wait_answer("paced")
    tokens = "vllm:generation_tokens_total"
    settled = shoal.metric(tokens, "random")
    # What earlier tests broke is made anew by now, but perhaps not told on Ray's ports.
    rebuilt = shoal.metric("shoal:replica_rebuilds_total", "paced")

    def is_settled(scrape: Scrape) -> bool:
        told = scrape.by_process(REBUILDS, model_name="paced")
        has_tokens = scrape.total(f"ray_{tokens.replace(':', '_')}", model_name="random") == settled
        return has_tokens and (rebuilt in told.values() or not rebuilt)

    before = _wait_for(shoal, is_settled)
    answer = httpx.post(f"{shoal.url}/v1/completions", json=BODY, timeout=ANSWER_TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    kill(shoal.shard("paced", 1))
    shoal.wait_answer("paced")

    def is_told(scrape: Scrape) -> bool:
        has_tokens = scrape.total(f"ray_{tokens.replace(':', '_')}", model_name="random") > settled
        has_rebuild = scrape.by_process(REBUILDS, model_name="paced") != before.by_process(
            REBUILDS, model_name="paced"
        )
        is_ready = scrape.total("ray_shoal_replica_ready", model_name="paced") == 1
        is_idle = scrape.total("ray_vllm_num_requests_running") == 0
        return has_tokens and has_rebuild and is_ready and is_idle

    return before, _wait_for(shoal, is_told)


@pytest.mark.parametrize(
    ("name", "labels", "increase"),
    [
        ("ray_vllm_generation_tokens_total", {}, 9),
        ("ray_vllm_prompt_tokens_total", {}, 2),
        ("ray_vllm_request_success_total", {"finished_reason": "length"}, 1),
        ("ray_vllm_e2e_request_latency_seconds_count", {}, 1),
        ("ray_vllm_time_to_first_token_seconds_count", {}, 1),
        ("ray_vllm_request_time_per_output_token_seconds_count", {}, 1),
        ("ray_vllm_request_generation_tokens_count", {}, 1),
        ("ray_vllm_request_prompt_tokens_count", {}, 1),
    ],
)
def test_an_answer_moves_its_model_s_metrics(
    scrapes: tuple[Scrape, Scrape], name: str, labels: dict[str, str], increase: int
) -> None:
    before, after = (s.total(name, model_name="random", **labels) for s in scrapes)
    assert after - before == increase


def test_a_lost_shard_is_counted_as_a_rebuild(scrapes: tuple[Scrape, Scrape]) -> None:
    before, after = (s.by_process(REBUILDS, model_name="paced") for s in scrapes)
    assert sorted(after[process] - before.get(process, 0) for process in after) == [
        *[0] * (len(after) - 1),
        1,
    ]


@pytest.mark.parametrize("model", ["demo", "random", "paced"])
def test_metrics_join_with_serve_s_by_worker_as_ray_s_own_dashboard_does(
    scrapes: tuple[Scrape, Scrape], model: str
) -> None:
    scrape = scrapes[1]
    (running,) = scrape.find("ray_vllm_num_requests_running", model_name=model)
    (ready,) = scrape.find("ray_shoal_replica_ready", model_name=model)
    assert (running.value, ready.value) == (0, 1)
    assert running.labels["application"] == f"model-{model}"
    counted = scrape.find(
        "ray_serve_deployment_request_counter_total",
        application=f"model-{model}",
        replica=running.labels["replica"],
    )
    assert {sample.labels["WorkerId"] for sample in counted} == {running.labels["WorkerId"]}


def _expressions() -> list[str]:
    rules = yaml.safe_load((FILES / "rules" / "shoal.yaml").read_text())
    board: dict[str, Any] = json.loads((FILES / "dashboards" / "shoal.json").read_text())
    return [
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in board["panels"] for target in panel.get("targets", [])),
        *(str(variable["query"]) for variable in board["templating"]["list"][1:]),
    ]


def test_rules_and_dashboard_read_only_what_is_there(scrapes: tuple[Scrape, Scrape]) -> None:
    labels: dict[str, set[str]] = {}
    for sample in scrapes[1].samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    # A counter of ours appears with its first event, a prediction with a plan that makes one.
    for reading in READINGS:
        name = f"ray_{reading.family}_{reading.name}{'_total' if reading.is_total else ''}"
        labels.setdefault(name, {"model_name", "application", "replica", reading.label})
    for expression in _expressions():
        used = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, matchers in used:
            assert name in labels, f"{name} is not exported: {expression}"
            keys = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) - ADDED_LABELS
            assert keys <= labels[name], f"{name} has no label {keys - labels[name]}"
