"""The Helm 3 command renders what the Helm 4 engine does, so that every other check holds for it.

And kubeconform reads all of it, as a second opinion beside our own strict schemas.
"""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from scripts.control_plane import ToolMissingError, find_crds, find_tool
from tests.chart.cases import CASES, SMALL, Case, merge
from tests.chart.crd_schema import strict_schemas
from tests.chart.rendering import CHART, NAMESPACE, RELEASE, pod_specs, render, render_texts
from tests.chart.test_objects import KUBERNETES

pytestmark = pytest.mark.helm
_SOURCE = re.compile(r"^---\n# Source: (\S+)\n", flags=re.MULTILINE)


def run_helm(binary: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [binary, *arguments],
        env={"HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )


def by_template(output: str) -> dict[str, list[str]]:
    """`helm template`'s output, which is in the order of installation, by template."""
    parts = _SOURCE.split(output)
    found: dict[str, list[str]] = {}
    for path, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(path, []).append(text.strip())
    return {path: sorted(texts) for path, texts in found.items()}


def in_process(case: Case) -> dict[str, list[str]]:
    return {
        path: sorted(part.strip() for part in text.split("\n---\n") if part.strip(" \n-"))
        for path, text in render_texts(case.values).items()
        if not path.endswith("NOTES.txt")
    }


@pytest.mark.timeout(600)
def test_helm_3_renders_the_whole_matrix_as_helm_4_does(helm_binary: Path, tmp_path: Path) -> None:
    def differs(case: Case) -> bool:
        values = tmp_path / f"{case.name}.json"
        values.write_text(json.dumps(case.values))
        arguments = ("template", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(values))
        done = run_helm(helm_binary, *arguments, folder=tmp_path)
        return done.returncode != 0 or by_template(done.stdout) != in_process(case)

    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(differs, CASES)
    assert [
        case.name for case, is_different in zip(CASES, found, strict=True) if is_different
    ] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auth": {"apiKeys": {"existingSecret": ""}}}, "auth.apiKeys.existingSecret: is needed"),
        ({"tensorParallel": 3}, "tensorParallel: 3 cannot be used"),
        ({"upgrade": {"type": "Recreate"}}, "upgrade"),
        ({"replicaCount": 3}, "replicaCount"),
    ],
    ids=["anonymous", "size", "upgrade", "unknown"],
)
def test_helm_3_refuses_as_helm_4_does(
    helm_binary: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps(merge(SMALL, change)))
    arguments = ("template", RELEASE, str(CHART), "-f", str(values))
    done = run_helm(helm_binary, *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_helm_3_lints_and_packages(helm_binary: Path, tmp_path: Path) -> None:
    lint = run_helm(helm_binary, "lint", "--strict", str(CHART), folder=tmp_path)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    package = run_helm(helm_binary, "package", str(CHART), "-d", str(tmp_path), folder=tmp_path)
    assert package.returncode == 0, package.stderr


def test_kubeconform_finds_nothing_in_the_whole_matrix(tmp_path: Path) -> None:
    try:
        binary, crds = find_tool("kubeconform"), find_crds()
    except ToolMissingError as error:
        pytest.skip(str(error))
    objects = [item for case in CASES for item in render(case.values)] + [
        {"apiVersion": "v1", "kind": "Pod", **pod}
        for case in CASES
        for pod in pod_specs(case.values).values()
    ]
    different = sorted({json.dumps(item, sort_keys=True) for item in objects})
    for (version, kind), schema in strict_schemas(crds).items():
        (tmp_path / schema_name(version, kind)).write_text(json.dumps(schema))
    for version, kind in {(item["apiVersion"], item["kind"]) for item in objects}:
        path = tmp_path / schema_name(version, kind)
        if not path.exists():
            path.write_text(json.dumps(core_schema(path.name)))
    location = f"--schema-location={tmp_path}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    done = subprocess.run(
        [binary, "-strict", "-summary", "-output", "json", location, "-"],
        input="\n---\n".join(different),
        capture_output=True,
        text=True,
        timeout=100,
    )
    report = json.loads(done.stdout)
    assert report["resources"] == []
    assert report["summary"]["valid"] == len(different)


def schema_name(version: str, kind: str) -> str:
    group, _, name = version.rpartition("/")
    return "-".join([kind.lower(), *filter(None, [group.split(".")[0], name])]) + ".json"


def core_schema(name: str) -> dict[str, Any]:
    """A schema of Kubernetes' own with all that it refers to inside it."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    strict = folder / f"v{KUBERNETES}-local-strict"
    everything = json.loads((strict / "_definitions.json").read_text())["$defs"]
    schema: dict[str, Any] = json.loads((strict / name).read_text())
    needed: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        for key in re.findall(r'#/\$defs/([^"]+)"', json.dumps(waiting.pop())):
            if key not in needed:
                needed[key] = everything[key]
                waiting.append(everything[key])
    text = json.dumps({**schema, "$defs": needed})
    whole: dict[str, Any] = json.loads(text.replace("/api/_definitions.json#", "#"))
    return whole
