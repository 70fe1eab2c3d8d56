"""Helm in this process against Helm as a program: the same answers, the same errors."""

from __future__ import annotations

import _thread
import sys
from pathlib import Path

import pytest

from cluster.errors import AlreadyRunningError, CommandError, NotRunningError, UsageError
from cluster.helm import HelmEngine, documents, open_helm
from cluster.helm.binary import BinaryEngine
from cluster.helm.failures import explain
from cluster.helm.sdk import SdkEngine
from cluster.helm.uninterrupted import uninterrupted
from tests.rollout.rendering import BOX, DEMO

pytestmark = pytest.mark.helm


@pytest.mark.parametrize("values", [DEMO, BOX], ids=["demo", "box"])
def test_both_engines_render_the_same_text(helm_binary: Path, values: dict[str, object]) -> None:
    library = SdkEngine(context=None, namespace="chat")
    program = BinaryEngine(helm_binary, context=None, namespace="chat")
    rendered = library.render(values, name="shoal", namespace="chat")
    assert rendered == program.render(values, name="shoal", namespace="chat")
    assert "helm.sh/hook" not in rendered


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**DEMO, "nope": 1}, "'nope' not allowed"),
        ({**DEMO, "replicas": {"min": 0}}, "replicas.min: "),
        ({**BOX, "tensorParallel": 3}, "tensorParallel: 3 cannot be used"),
        ({"model": {"preset": "demo"}, "hardware": {"preset": "cpu"}}, "auth.apiKeys"),
    ],
)
def test_both_engines_refuse_values_by_their_key(
    helm_binary: Path, values: dict[str, object], words: str
) -> None:
    engines: list[HelmEngine] = [
        SdkEngine(context=None, namespace="chat"),
        BinaryEngine(helm_binary, context=None, namespace="chat"),
    ]
    messages = []
    for engine in engines:
        with pytest.raises(UsageError) as refused:
            engine.render(values, name="shoal", namespace="chat")
        messages.append(refused.value.message)
    assert messages[0] == messages[1]
    assert words in messages[0]


@pytest.mark.apiserver
@pytest.mark.parametrize("kind", ["library", "program"])
def test_release_lives_through_all_six_questions(
    kind: str, kubernetes: str, request: pytest.FixtureRequest
) -> None:
    engine: HelmEngine = SdkEngine(context="shoal", namespace=kubernetes)
    if kind == "program":
        program = request.getfixturevalue("helm_binary")
        engine = BinaryEngine(program, context="shoal", namespace=kubernetes)
    assert engine.history("shoal") == []
    engine.deploy(DEMO, name="shoal", is_upgrade=False, is_dry_run=True)
    assert engine.history("shoal") == []
    made = engine.deploy(DEMO, name="shoal", is_upgrade=False, is_dry_run=False)
    with pytest.raises(AlreadyRunningError):
        engine.deploy(DEMO, name="shoal", is_upgrade=False, is_dry_run=False)
    changed = {**DEMO, "logLevel": "debug"}
    engine.deploy(changed, name="shoal", is_upgrade=True, is_dry_run=False)
    engine.rollback("shoal", 1)
    history = engine.history("shoal")
    assert [(found.number, found.status) for found in history] == [
        (1, "superseded"),
        (2, "superseded"),
        (3, "deployed"),
    ]
    assert engine.release("shoal", 2).values == changed
    newest = engine.release("shoal")
    assert (newest.revision, newest.values) == (3, DEMO)
    assert documents(newest.manifest) == documents(made)
    engine.uninstall("shoal")
    assert engine.history("shoal") == []
    with pytest.raises(NotRunningError):
        engine.uninstall("shoal")


def test_without_library_and_program_both_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cluster.helm.sdk", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError) as refused:
        open_helm(context=None, namespace="chat")
    assert "pip install helm-python-sdk" in refused.value.hint
    assert "install Helm 3 or 4" in refused.value.hint


def test_without_the_library_the_program_is_used(
    helm_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cluster.helm.sdk", None)
    monkeypatch.setenv("PATH", str(helm_binary.parent))
    assert isinstance(open_helm(context=None, namespace="chat"), BinaryEngine)


def test_locked_release_says_what_to_do() -> None:
    text = "another operation (install/upgrade/rollback) is in progress"
    assert "shoal rollback" in explain(text, namespace="n").hint


@pytest.mark.parametrize(
    ("reason", "words", "step"),
    [
        ("dial tcp 127.0.0.1:1: connect: connection refused", "does not answer", "get-contexts"),
        ("the server has asked for the client to provide credentials", "credentials", "log in"),
    ],
)
def test_server_that_helm_cannot_speak_to_is_said(reason: str, words: str, step: str) -> None:
    found = explain(f"Kubernetes cluster unreachable: {reason}", namespace="n")
    assert words in found.message
    assert step in found.hint


def test_operation_ends_before_ctrl_c_is_delivered() -> None:
    done = []

    def operation() -> None:
        _thread.interrupt_main()
        done.append("done")

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(operation)
    assert done == ["done"]


def test_what_an_operation_raises_reaches_the_caller() -> None:
    def operation() -> None:
        raise CommandError("no")

    with pytest.raises(CommandError, match="no"):
        uninterrupted(operation)
