"""For every folder of tests: what of the machine is shut out, and the real API server.

One server (of the levels L2 and L3 of the tests) serves the whole session, and each test has a
namespace of its own in it. Hypothesis chooses the same examples in every run, so that the same
code always gets the same verdict; `--hypothesis-profile=explore` chooses others each time.
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from scripts.control_plane import (
    ApiServer,
    Nodes,
    ToolMissingError,
    find_crds,
    find_tool,
    install_crds,
)

_START_TIMEOUT_S = 300
_SLOW_FIXTURES = {"api_server", "library"}

# What a user's shell may say to the programs under test, and to the libraries below them.
_FOREIGN_PREFIXES = ("HF_", "HUGGING", "TRANSFORMERS_", "RAY_", "SHOAL_RUN_")
_FOREIGN = {
    *("SHOAL_API_KEY", "KUBECONFIG", "PYTHONWARNINGS", "ALL_PROXY", "all_proxy"),
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"),
}
_LOOPBACK = "127.0.0.1,localhost,::1"

# How long an example takes, and its making, is the machine's affair.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("verdict", settings.get_profile("explore"), derandomize=True)
settings.load_profile("verdict")


def pytest_configure() -> None:
    """Forget what is set outside; let Ctrl-C through, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(0o022)
    for name in [*os.environ]:
        if name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES):
            del os.environ[name]
    for name in ("NO_PROXY", "no_proxy"):  # a proxy is for downloads of tools
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), _LOOPBACK)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first starts the server, or compiles the kernels, in its own time.

    That takes ten seconds, or many more. `tests/app` comes last: its Shoal lives until the end, and
    would slow everything after it.
    """
    items.sort(key=lambda item: item.path.parent.name == "app")
    for item in items:
        if _SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(_START_TIMEOUT_S))


@pytest.fixture(scope="session")
def api_server() -> Iterator[ApiServer]:
    """etcd and kube-apiserver with the CRDs that the chart uses."""
    try:
        crds = find_crds()
        with (
            tempfile.TemporaryDirectory(prefix="shoal-api-") as folder,
            ApiServer(Path(folder)) as server,
        ):
            install_crds(server.api, crds)
            yield server
    except ToolMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scheduler(api_server: ApiServer) -> Iterator[Nodes]:
    """kube-scheduler and kwok beside the API server, with no nodes yet.

    They end with the module: other tests play scheduler and kubelet themselves.
    """
    try:
        nodes = Nodes(api_server)
    except ToolMissingError as error:
        pytest.skip(str(error))
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def helm_binary() -> Path:
    """The Helm 3 command."""
    try:
        return find_tool("helm")
    except ToolMissingError as error:
        pytest.skip(str(error))


_numbers = itertools.count(1)


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    """A fresh namespace that enforces restricted pod security."""
    return api_server.create_namespace(f"test-{next(_numbers)}")
