"""What `shoal up` fetches lies where the hub's own clients look, and theirs is used."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest

from cluster.download import Hub, HubCache
from cluster.errors import DownloadError, InterruptedStartError, UsageError
from serve.catalog import ModelShape
from serve.checkpoint import inspect_checkpoint

from .conftest import COMMIT, OTHERS, QUICK, REPOSITORY, WEIGHTS, StandInHub, Watched

Wait = Callable[[Callable[[], bool]], None]
CLOSED = "http://127.0.0.1:9"
WANTED = ["*.safetensors", "*.json"]


@dataclass
class Cache:
    """What a test does: fetch the repository into one cache."""

    hub: StandInHub
    path: Path
    watcher: Watched = field(default_factory=Watched)
    shapes: list[ModelShape] = field(default_factory=list)

    def fetch(self, revision: str = "main", **options: object) -> Path:
        return HubCache(self.path).fetch(
            REPOSITORY,
            revision=revision,
            hub=Hub(self.hub.address, **options),  # type: ignore[arg-type]
            watcher=self.watcher,
            on_shape=self.shapes.append,
            pace=QUICK,
        )

    def find(self, revision: str = "main", *, is_offline: bool = False) -> Path | None:
        hub = Hub(CLOSED, is_offline=is_offline)
        return HubCache(self.path).find(REPOSITORY, revision, hub=hub)

    def files(self) -> dict[str, int]:
        """Everything that a reader of the cache might take for a blob."""
        return {path.name: path.stat().st_size for path in self.path.glob("*/blobs/*")}


@pytest.fixture
def cache(hub: StandInHub, tmp_path: Path) -> Cache:
    return Cache(hub, tmp_path / "hub")


def test_hubs_own_client_finds_what_was_fetched_and_nothing_odd(cache: Cache) -> None:
    folder = cache.fetch()
    found = huggingface_hub.snapshot_download(
        REPOSITORY, cache_dir=cache.path, allow_patterns=WANTED, local_files_only=True
    )
    assert Path(found) == folder
    scan = huggingface_hub.scan_cache_dir(cache.path)
    assert scan.warnings == []
    (repository,) = scan.repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash, revision.refs) == (
        REPOSITORY,
        COMMIT,
        {"main"},
    )
    assert {file.file_name for file in revision.files} == {WEIGHTS, *OTHERS}
    assert revision.size_on_disk == sum(len(cache.hub.files[name]) for name in (WEIGHTS, *OTHERS))


def test_what_was_fetched_is_found_without_a_network_by_branch_and_commit(cache: Cache) -> None:
    assert cache.find() is None
    folder = cache.fetch()
    assert cache.find() == cache.find(COMMIT) == cache.find(is_offline=True) == folder
    assert cache.find("v2") is None
    assert inspect_checkpoint(folder).shape == cache.shapes[0]


def test_what_the_hubs_own_client_fetched_is_used(cache: Cache) -> None:
    theirs = huggingface_hub.snapshot_download(
        REPOSITORY,
        cache_dir=cache.path,
        allow_patterns=WANTED,
        endpoint=cache.hub.address,
        token=False,
    )
    assert cache.find() == Path(theirs)


def test_hubs_own_download_begins_anew_when_its_process_was_killed(
    cache: Cache, wait_for: Wait
) -> None:
    """Why the bytes are transferred here: once this fails, theirs will do."""
    hub = cache.hub
    hub.gate = threading.Event()
    code = (
        "import sys, huggingface_hub as h;"
        "h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2], allow_patterns='*.safetensors',"
        " endpoint=sys.argv[3], token=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, REPOSITORY, cache.path, hub.address])
    wait_for(lambda: bool(hub.ranges(WEIGHTS)))
    wait_for(lambda: any(name.endswith(".incomplete") for name in cache.files()))
    process.send_signal(signal.SIGKILL)
    process.wait(100)
    hub.gate.set()
    hub.gate = None
    huggingface_hub.snapshot_download(
        REPOSITORY,
        cache_dir=cache.path,
        allow_patterns="*.safetensors",
        endpoint=hub.address,
        token=False,
    )
    assert hub.ranges(WEIGHTS) == ["", ""]


def test_cut_connections_and_a_user_who_ends_it_cost_no_byte(cache: Cache, wait_for: Wait) -> None:
    cache.hub.cuts = [100_000, 200_000]
    cache.hub.gate = threading.Event()
    halfway = (len(cache.hub.files[WEIGHTS]) // 2, len(cache.hub.files[WEIGHTS]))

    def end_halfway() -> None:
        wait_for(lambda: any(told >= halfway for told in cache.watcher.progress))
        cache.watcher.stopped.set()

    ender = threading.Thread(target=end_halfway)
    ender.start()
    with pytest.raises(InterruptedStartError, match="the next start goes on from there"):
        cache.fetch()
    ender.join()
    assert cache.find() is None
    cache.hub.gate.set()
    cache.hub.gate = None
    cache.watcher.stopped.clear()
    inspect_checkpoint(cache.fetch())
    starts = [int(text[6:-1]) for text in cache.hub.ranges(WEIGHTS)[1:]]
    assert starts[:2] == [100_000, 300_000]
    assert starts == sorted(starts)
    assert len(starts) == 3
    assert cache.watcher.progress[-1][0] == cache.watcher.progress[-1][1]


def test_file_that_changes_under_a_download_is_told_and_not_used(cache: Cache) -> None:
    right = cache.hub.files[WEIGHTS]
    description = cache.hub.description()
    cache.hub.description = lambda: description  # type: ignore[method-assign]
    cache.hub.cuts = [100_000]
    cache.hub.files[WEIGHTS] = right[:100_000] + bytes(len(right) - 100_000)
    with pytest.raises(DownloadError, match=f"{WEIGHTS} arrived damaged"):
        cache.fetch()
    assert cache.find() is None
    assert not list(cache.path.glob("*/snapshots/*"))
    assert len(right) not in cache.files().values()
    cache.hub.files[WEIGHTS] = right
    inspect_checkpoint(cache.fetch())


@pytest.mark.parametrize(("num_bytes", "num_reads"), [(-1000, 1), (1000, 3)])
def test_hub_that_lies_about_a_size_is_told_and_asked_again_only_for_more(
    cache: Cache, num_bytes: int, num_reads: int
) -> None:
    cache.hub.sizes[WEIGHTS] = len(cache.hub.files[WEIGHTS]) + num_bytes
    with pytest.raises(DownloadError, match=f"{WEIGHTS}: the hub sent .* bytes of") as caught:
        cache.fetch()
    assert "changed on the hub" in caught.value.hint
    assert len(cache.hub.ranges(WEIGHTS)) == num_reads
    assert cache.find() is None


def test_a_wait_for_another_download_can_be_ended(cache: Cache) -> None:
    root = cache.path / f"models--{REPOSITORY.replace('/', '--')}"
    root.mkdir(parents=True)
    cache.watcher.stopped.set()
    with (root / ".shoal-download.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InterruptedStartError, match="stopped"):
            cache.fetch()
    assert cache.watcher.lines == [f"waiting: another download writes to {root}"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_repository_without_a_file_that_serving_needs_is_refused_first(
    cache: Cache, name: str
) -> None:
    del cache.hub.files[name]
    with pytest.raises(DownloadError, match=f"{REPOSITORY} has no {name}"):
        cache.fetch()
    assert not cache.files()


def test_model_of_which_a_blob_is_missing_is_fetched_again_for_that_blob_only(
    cache: Cache,
) -> None:
    folder = cache.fetch()
    (folder / "tokenizer.json").resolve().unlink()
    assert cache.find() is None
    assert cache.fetch() == folder == cache.find()
    assert len(cache.hub.ranges(WEIGHTS)) == 1


def test_offline_names_what_is_wrong_with_what_is_there(cache: Cache) -> None:
    with pytest.raises(DownloadError, match="is not on this machine, and HF_HUB_OFFLINE is set"):
        cache.fetch(is_offline=True)
    folder = cache.fetch()
    os.truncate(folder / WEIGHTS, 5000)
    with pytest.raises(DownloadError, match=r"cannot be served: .*model\.safetensors"):
        cache.find(is_offline=True)
    inspect_checkpoint(cache.fetch())


def test_offline_names_the_cache_that_lacks_a_model_or_its_tokenizer(cache: Cache) -> None:
    missing = f"{REPOSITORY} at main is not in {cache.path}, and HF_HUB_OFFLINE is set"
    with pytest.raises(DownloadError, match=missing) as caught:
        cache.find(is_offline=True)
    assert "HF_HOME" in caught.value.hint
    (cache.fetch() / "tokenizer.json").unlink()
    with pytest.raises(DownloadError, match=f"tokenizer.json of {missing}"):
        cache.find(is_offline=True)


def test_volume_that_is_too_small_is_told_with_the_way_to_another(cache: Cache) -> None:
    cache.hub.sizes[WEIGHTS] = 10**18
    with pytest.raises(DownloadError, match=r"needs 1000000000\.0 GB more and has ") as caught:
        cache.fetch()
    assert "HF_HOME names another place" in caught.value.hint
    assert cache.hub.ranges(WEIGHTS) == []


def test_model_is_refused_by_its_small_files_before_its_large_ones(cache: Cache) -> None:
    def refuse(shape: ModelShape) -> None:
        raise UsageError(f"too large: {shape.num_params}")

    with pytest.raises(UsageError, match="too large"):
        HubCache(cache.path).fetch(
            REPOSITORY, revision="main", hub=Hub(cache.hub.address), watcher=cache.watcher,
            on_shape=refuse, pace=QUICK,
        )  # fmt: skip
    config = json.loads(cache.hub.files["config.json"])
    quantised = {**config, "quantization_config": {"quant_method": "awq"}}
    cache.hub.files["config.json"] = json.dumps(quantised).encode()
    with pytest.raises(DownloadError, match=r"quantized checkpoints are not supported, got 'awq'"):
        cache.fetch()
    assert cache.hub.ranges(WEIGHTS) == []


def test_cache_that_cannot_be_written_is_told(cache: Cache) -> None:
    cache.path.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot use .*: Not a directory") as caught:
        cache.fetch()
    assert "HF_HOME" in caught.value.hint
