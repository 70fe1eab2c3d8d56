"""For every folder of tests: the real API server (levels L2 and L3 of the tests), and Ctrl-C.

One server serves the whole session, and each test has a namespace of its own in it.
"""

from __future__ import annotations

import itertools
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.control_plane import (
    ApiServer,
    Nodes,
    ToolMissingError,
    find_crds,
    find_tool,
    install_crds,
)

_START_TIMEOUT_S = 300


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start does: tests press it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first starts the server in its own time: ten seconds, or many more.

    `tests/app` comes last: its Shoal lives until the end, and would slow everything after it.
    """
    items.sort(key=lambda item: item.path.parent.name == "app")
    for item in items:
        if "api_server" in getattr(item, "fixturenames", ()):
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
