"""The chart as files: lint, YAML style, what a package and a wheel hold."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from cluster.plan import configs_path
from tests.chart.cases import FEATURES, SMALL, Case
from tests.chart.golden import FOLDER
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, helm_python, load_chart, render_texts

STYLE = YamlLintConfig(
    "{extends: default, rules: {document-start: disable, line-length: disable,"
    " indentation: {indent-sequences: whatever}, comments-indentation: disable}}"
)
FILES = [*CHART.glob("*.yaml"), *(CHART / "files" / "rules").glob("*.yaml")]


def problems_of(text: str) -> list[str]:
    return [str(problem) for problem in linter.run(text, STYLE)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_written_yaml_is_tidy(path: Path) -> None:
    assert problems_of(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_rendered_yaml_is_tidy(case: Case) -> None:
    """Duplicate keys, wrong indentation and trailing spaces are what templates produce."""
    for path, text in render_texts(case.values).items():
        if not path.endswith("NOTES.txt"):
            assert problems_of(text.strip() + "\n") == [], path


def test_lint_finds_nothing() -> None:
    report = helm_python.lint(CHART, SMALL, strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_package_holds_the_presets_as_files(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    with tarfile.open(archive) as packed:
        members = {member.name: member for member in packed.getmembers()}
        assert all(member.isfile() for member in members.values())
        for path in configs_path().rglob("*.yaml"):
            name = f"shoal/files/configs/{path.relative_to(configs_path())}"
            stored = packed.extractfile(members[name])
            assert stored is not None
            assert stored.read() == path.read_bytes()


def test_package_renders_as_the_folder_does(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    packed = load_chart(archive).render(SMALL, name=RELEASE, namespace=NAMESPACE)
    assert {path: text for path, text in packed.items() if text.strip()} == render_texts(SMALL)


def test_chart_stays_far_below_what_a_release_can_hold(tmp_path: Path) -> None:
    """Helm keeps the whole chart in a Secret, which holds 1 MiB."""
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    assert archive.stat().st_size < 256 * 1024


def test_golden_files_are_read_by_people() -> None:
    for path in FOLDER.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 480, path.name
        assert all(document for document in yaml.safe_load_all(_objects(path)))


def _objects(path: Path) -> str:
    return path.read_text(encoding="utf-8").split("---\n# templates/NOTES.txt")[0]
