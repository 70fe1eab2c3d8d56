"""Weights arrive whole or not at all, whatever cuts the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

from cluster.download import Marker
from cluster.errors import DownloadError
from serve.checkpoint import inspect_checkpoint

from .conftest import COMMIT, DEMO, OTHERS, REPOSITORY, WEIGHTS, Downloads, StandInHub

Wait = Callable[[Callable[[], bool]], None]
CLOSED = "http://127.0.0.1:9"


def test_stand_in_speaks_as_a_hub_does_to_its_own_client(hub: StandInHub, tmp_path: Path) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.address, token=False)
    info = api.model_info(REPOSITORY, revision="main", files_metadata=True)
    assert info.sha == COMMIT
    sizes = {entry.rfilename: entry.size for entry in info.siblings or ()}
    assert sizes == {name: len(content) for name, content in hub.files.items()}
    path = api.hf_hub_download(REPOSITORY, WEIGHTS, revision=COMMIT, local_dir=tmp_path)
    assert Path(path).read_bytes() == hub.files[WEIGHTS]


def test_what_a_model_needs_arrives_and_nothing_that_can_run_code(download: Downloads) -> None:
    marker = download()
    assert download.names() == {WEIGHTS, *OTHERS} == marker.files.keys()
    for name in marker.files:
        assert (download.folder / name).read_bytes() == (DEMO / name).read_bytes()
    assert (marker.repository, marker.revision, marker.commit) == (REPOSITORY, "main", COMMIT)
    assert not list(download.folder.glob(".shoal-partial"))


def test_complete_folder_needs_no_network(download: Downloads) -> None:
    marker = download()
    assert download(address=CLOSED) == marker
    assert download(COMMIT, address=CLOSED) == marker


def test_cut_connection_goes_on_where_it_broke(download: Downloads) -> None:
    download.hub.cuts = [100_000, 200_000]
    download()
    assert download.hub.ranges(WEIGHTS) == ["", "bytes=100000-", "bytes=300000-"]
    assert any("again in" in line for line in download.lines)
    inspect_checkpoint(download.folder)


def test_hub_without_ranges_starts_the_file_again(download: Downloads) -> None:
    download.hub.cuts = [100_000]
    download.hub.has_ranges = False
    download()
    assert (download.folder / WEIGHTS).read_bytes() == download.hub.files[WEIGHTS]


def test_hub_that_keeps_breaking_is_given_up_and_the_next_start_goes_on(
    download: Downloads,
) -> None:
    download.hub.cuts = [100_000, 0, 0, 0]
    hub = download.hub
    where = f"cannot reach {hub.storage_address}, where {hub.address} keeps {WEIGHTS}: "
    with pytest.raises(DownloadError, match=where):
        download()
    assert Marker.read(download.folder) is None
    assert WEIGHTS not in download.names()
    download.hub.cuts = []
    download()
    assert download.hub.ranges(WEIGHTS)[-1] == "bytes=100000-"
    assert (download.folder / WEIGHTS).read_bytes() == download.hub.files[WEIGHTS]


def sizes(folder: Path) -> list[int]:
    """Of its files, while others write them and give them their names."""
    found = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_download_goes_on_where_it_was(
    download: Downloads, wait_for: Wait, number: int, code: int
) -> None:
    hub = download.hub
    hub.gate = threading.Event()
    command = [sys.executable, "-m", "cluster", "download", REPOSITORY, str(download.folder)]
    environment = {**os.environ, "HF_ENDPOINT": hub.address}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    partial = download.folder / ".shoal-partial"
    half = len(hub.files[WEIGHTS]) // 2
    wait_for(lambda: half in sizes(partial))
    process.send_signal(number)
    assert process.wait(100) == code
    assert Marker.read(download.folder) is None
    hub.gate.set()
    hub.gate = None
    download()
    assert hub.ranges(WEIGHTS) == ["", f"bytes={half}-"]
    assert (download.folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_two_at_once_on_one_folder_fetch_once(download: Downloads, wait_for: Wait) -> None:
    download.hub.gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(download) for _ in range(2)]
        wait_for(lambda: any(line.startswith("waiting") for line in download.lines))
        download.hub.gate.set()
        first, second = (future.result(60) for future in both)
    assert first == second
    assert download.hub.ranges(WEIGHTS)[0] == ""
    descriptions = [path for path, _ in download.hub.requests if path.startswith("/api/")]
    assert len(descriptions) == 1


def test_file_that_was_there_before_is_not_trusted(download: Downloads) -> None:
    download.folder.mkdir()
    right = download.hub.files[WEIGHTS]
    (download.folder / WEIGHTS).write_bytes(bytes(len(right)))
    (download.folder / "config.json").write_bytes(download.hub.files["config.json"])
    download()
    assert (download.folder / WEIGHTS).read_bytes() == right
    assert download.hub.ranges("config.json") == []


def test_marker_of_a_folder_that_lost_a_file_counts_for_nothing(download: Downloads) -> None:
    download()
    os.truncate(download.folder / WEIGHTS, 1000)
    download()
    assert (download.folder / WEIGHTS).read_bytes() == download.hub.files[WEIGHTS]


def test_damaged_bytes_never_get_the_files_name(download: Downloads) -> None:
    download.hub.damaged = True
    with pytest.raises(DownloadError, match=f"{WEIGHTS} arrived damaged"):
        download()
    assert WEIGHTS not in download.names()
    download.hub.damaged = False
    download()


def test_another_revision_replaces_the_files_of_the_former(download: Downloads) -> None:
    download()
    download.hub.commits["v2"] = "f" * 40
    del download.hub.files["generation_config.json"]
    download.hub.files["merges.txt"] = b"#version: 0.2\n"
    assert download("v2").commit == "f" * 40
    assert "generation_config.json" not in download.names()
    assert (download.folder / "merges.txt").read_bytes() == b"#version: 0.2\n"
    assert len(download.hub.ranges(WEIGHTS)) == 1


def test_token_goes_to_the_hub_and_not_to_its_storage(download: Downloads) -> None:
    download.hub.needs_token = True
    download(token="hf_secret")
    sent = {path.startswith("/s/"): "authorization" in headers
            for path, headers in download.hub.requests}  # fmt: skip
    assert sent == {False: True, True: False}
