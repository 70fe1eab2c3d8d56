"""`shoal deploy` on a real API server with the scripted operator."""

from __future__ import annotations

import pytest

from tests.rollout.conftest import DEMO, Shoal
from tests.rollout.scripted_operator import ScriptedOperator

pytestmark = pytest.mark.apiserver


def test_deploy_ends_with_the_address_and_a_port_forward(
    shoal: Shoal, kubernetes: str, operator: ScriptedOperator
) -> None:
    ended = shoal(f"deploy {DEMO} -n {kubernetes}")
    assert ended.code == 0, ended.err
    assert "API and page    http://127.0.0.1:8080" in ended.out
    forward = f"kubectl --context shoal -n {kubernetes} port-forward service/shoal 8080:8080"
    assert forward in ended.out
    assert f"-n {kubernetes} get secret shoal-ray-token" in ended.out
    assert "model-shoal-demo: running" in ended.out
