"""What cannot be fetched is refused in words that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.download import Hub, Marker, Watcher, download_weights
from cluster.errors import DownloadError

from .conftest import COMMIT, REPOSITORY, WEIGHTS, Downloads


def refusal(download: Downloads, revision: str = "main", **options: str) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        download(revision, **options)
    assert Marker.read(download.folder) is None
    return caught.value


def test_hub_that_is_not_there(download: Downloads) -> None:
    error = refusal(download, address="http://127.0.0.1:9")
    assert error.message.startswith("cannot reach http://127.0.0.1:9: ")
    assert "HF_ENDPOINT" in error.hint


def test_repository_that_wants_a_token(download: Downloads) -> None:
    download.hub.needs_token = True
    error = refusal(download)
    assert f"wants a token for {REPOSITORY}, or has no such repository" in error.message
    assert "HF_TOKEN" in error.hint
    assert "auth.hfToken" in error.hint
    assert "refuses this token" in refusal(download, token="wrong").message


def test_gated_repository(download: Downloads) -> None:
    download.hub.refusal = (403, "GatedRepo")
    page = f"{download.hub.address}/{REPOSITORY}"
    error = refusal(download)
    assert f"{REPOSITORY} is gated" in error.message
    assert f"Accept them at {page} with your account. Set HF_TOKEN" in error.hint
    assert "hf auth login" in error.hint
    assert "with the account of this token" in refusal(download, token="hf_other").hint


def test_revision_that_does_not_exist(download: Downloads) -> None:
    error = refusal(download, "v9")
    assert f"has no revision 'v9' of {REPOSITORY} (HTTP 404" in error.message
    assert "a branch, a tag or a whole commit" in error.hint


def test_hub_that_is_broken(download: Downloads) -> None:
    download.hub.refusal = (503, "")
    error = refusal(download)
    assert f"{download.hub.address} does not give {REPOSITORY} (HTTP 503" in error.message
    assert "HF_ENDPOINT" in error.hint


def test_hub_that_is_asked_too_often(download: Downloads) -> None:
    download.hub.refusal = (429, "")
    error = refusal(download)
    assert "was asked too often" in error.message
    assert "HF_TOKEN" in error.hint


@pytest.mark.parametrize(
    ("status", "code", "words", "hint"),
    [
        (
            404,
            "EntryNotFound",
            "has no FILE, though HUB listed it",
            "The revision may have changed",
        ),
        (404, "", "has no FILE, though HUB listed it", "The revision may have changed"),
        (403, "", "HUB refuses FILE", "HF_TOKEN"),
        (416, "", "FILE is shorter than it was said to be", "changed on the hub"),
        (429, "", "was asked too often, now for FILE", "Wait some minutes"),
        (500, "", "HUB does not give FILE", "Try again later"),
    ],
)
def test_file_that_a_hub_does_not_give_is_named_and_not_the_repository_blamed(
    download: Downloads, status: int, code: str, words: str, hint: str
) -> None:
    download.hub.file_refusals[WEIGHTS] = (status, code)
    error = refusal(download)
    file = f"{WEIGHTS} of {REPOSITORY} at {COMMIT[:12]}"
    assert words.replace("FILE", file).replace("HUB", download.hub.address) in error.message
    assert f"(HTTP {status}: " in error.message
    assert hint in error.hint
    assert WEIGHTS not in download.names()


def test_address_that_is_no_hub(download: Downloads) -> None:
    download.hub.commits["main"] = "x"
    download.hub.files = {"config.json": b"{}"}
    assert "has no *.safetensors" in refusal(download).message
    error = refusal(download, address=download.hub.address.replace("http", "gopher"))
    assert error.message.startswith("cannot reach gopher")


def test_offline_without_the_weights(tmp_path: Path) -> None:
    hub = Hub("http://127.0.0.1:9", is_offline=True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download_weights(REPOSITORY, tmp_path / "model", hub=hub, watcher=Watcher())


def test_variables_of_the_hubs_own_clients_are_respected(tmp_path: Path) -> None:
    code = (
        "from cluster.download import Hub, HubCache;"
        " hub = Hub.from_environment();"
        " print(hub.endpoint, hub._token, hub.is_offline, HubCache.from_environment().path)"
    )
    variables = {
        "HF_ENDPOINT": "https://mirror.example/",
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"https://mirror.example hf_x True {tmp_path}/hub\n"


def test_pickled_weights(download: Downloads) -> None:
    del download.hub.files[WEIGHTS]
    assert "pytorch_model.bin is a pickle" in refusal(download).message


def test_another_architecture_is_refused_before_its_weights_are_fetched(
    download: Downloads,
) -> None:
    config = json.loads(download.hub.files["config.json"])
    config["architectures"], config["model_type"] = ["LlamaForCausalLM"], "llama"
    download.hub.files["config.json"] = json.dumps(config).encode()
    assert f"{REPOSITORY} cannot be served: config.json: " in refusal(download).message
    assert download.hub.ranges(WEIGHTS) == []


def test_configuration_nested_without_end_is_told(download: Downloads) -> None:
    download.hub.files["config.json"] = b"[" * 200_000
    assert "config.json is no JSON object" in refusal(download).message


def test_volume_that_is_too_small_is_told_with_both_sizes(download: Downloads) -> None:
    download.hub.sizes[WEIGHTS] = 10**18
    error = refusal(download)
    assert "needs 1000000000.0 GB more and has " in error.message
    assert "Give a folder on a larger volume; in the chart: weights.pvc.size." in error.hint
    assert download.hub.ranges(WEIGHTS) == []


def test_names_that_would_leave_the_folder_or_fake_the_marker_are_not_fetched(
    download: Downloads,
) -> None:
    download.hub.files["../evil.json"] = b"{}"
    download.hub.files[".shoal-weights.json"] = b"{}"
    marker = download()
    assert not {"../evil.json", ".shoal-weights.json"} & marker.files.keys()
    assert not (download.folder.parent / "evil.json").exists()


def test_digest_that_is_a_path_is_refused(download: Downloads) -> None:
    description = download.hub.description()
    description["siblings"][0]["lfs"]["sha256"] = "../../evil"
    download.hub.description = lambda: description  # type: ignore[method-assign]
    assert "does not answer as a hub does" in refusal(download).message


def test_folder_that_is_none(download: Downloads) -> None:
    download.folder.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot use .*model: Not a directory"):
        download()
