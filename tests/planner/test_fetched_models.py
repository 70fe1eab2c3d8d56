"""Which models are fetched from a hub, and when: once nothing else is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.plan import Options, load_config
from serve.config import ModelConfig
from serve.errors import ConfigurationError
from tests.planner.conftest import MakeModel


class Hub:
    """Remembers what it was asked for; every model is the one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []

    def __call__(self, repository: str, revision: str) -> Path:
        self.asked.append((repository, revision))
        return self.folder


@pytest.fixture
def hub(make_model: MakeModel) -> Hub:
    return Hub(make_model("0123abcd"))


def models(hub: Hub, path: Path | None = None, **options: object) -> tuple[ModelConfig, ...]:
    return load_config(path, options=Options(**options), fetch=hub).models  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "asked", "name"),
    [
        ({"model": "Org/Some-Model"}, ("Org/Some-Model", "main"), "some-model"),
        (
            {"model": "Org/Some-Model", "revision": "v2"},
            ("Org/Some-Model", "v2"),
            "some-model",
        ),
        (
            {"model": "qwen2.5-7b-instruct"},
            ("Qwen/Qwen2.5-7B-Instruct", "main"),
            "qwen2.5-7b-instruct",
        ),
    ],
)
def test_repository_and_preset_are_fetched_and_keep_their_name(
    hub: Hub, options: dict[str, str], asked: tuple[str, str], name: str
) -> None:
    (model,) = models(hub, **options)
    assert hub.asked == [asked]
    assert (model.path, model.name) == (hub.folder, name)


def test_file_may_name_a_repository(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("models:\n  - {repository: Org/Name, revision: v1, name: mine}\n")
    (model,) = models(hub, path)
    assert hub.asked == [("Org/Name", "v1")]
    assert (model.path, model.name) == (hub.folder, "mine")


@pytest.mark.parametrize("text", ["{path: PLACE}", "{path: PLACE, repository: Org/Name}"])
def test_folder_that_is_named_is_not_fetched(hub: Hub, tmp_path: Path, text: str) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text(f"models:\n  - {text.replace('PLACE', str(hub.folder))}\n")
    assert models(hub, path)[0].path == hub.folder
    assert hub.asked == []


def test_folder_that_exists_comes_before_a_repository_of_that_name(
    hub: Hub, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("org")
    folder.rename(tmp_path / "name")
    (tmp_path / "org").mkdir()
    (tmp_path / "name").rename(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert models(hub, model="org/name")[0].path == tmp_path / "org" / "name"
    assert hub.asked == []


@pytest.mark.parametrize("name", ["/org/name", "./org/name", "org/name/more", "org/", "~/name"])
def test_path_that_is_none_is_said_and_not_taken_for_a_repository(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigurationError, match="does not exist or is not a folder"):
        models(hub, model=name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("http: {port: 99999}\nmodels:\n  - repository: Org/Name", "less than or equal to 65535"),
        (
            "models:\n  - {preset: qwen2.5-7b-instruct, tensor_parallel: 3}",
            "must be one of 1, 2, 4",
        ),
        (
            "models:\n  - {repository: Qwen/Qwen2.5-7B-Instruct, max_model_len: 900000}",
            "must be <= 131072",
        ),
    ],
)
def test_nothing_is_fetched_for_what_is_wrong_without_it(
    hub: Hub, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigurationError, match=reason):
        models(hub, path)
    assert hub.asked == []


def test_what_is_wrong_with_a_fetched_model_is_said_where_it_is_named(
    hub: Hub, tmp_path: Path
) -> None:
    path = tmp_path / "shoal.yaml"
    path.write_text("models:\n  - repository: Org/Name\n    tensor_parallel: 3\n")
    with pytest.raises(ConfigurationError, match=r":3: models\[0\]\.tensor_parallel: must be one"):
        models(hub, path)
    assert hub.asked == [("Org/Name", "main")]


@pytest.mark.parametrize("is_folder", [True, False])
def test_revision_of_what_is_on_no_hub_is_refused(hub: Hub, is_folder: bool) -> None:
    model = str(hub.folder) if is_folder else None
    with pytest.raises(ConfigurationError, match=r"--revision: models\[0\]\.revision: is a branch"):
        models(hub, model=model, revision="v2")
