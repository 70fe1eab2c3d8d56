from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.plan import DEMO_MODEL_PATH, Options, configs_path, load_config, preset_names
from serve.config import HardwareConfig
from serve.errors import ConfigurationError
from tests.planner.conftest import MakeModel

HAS_DEMO = (DEMO_MODEL_PATH / "config.json").is_file()
needs_demo = pytest.mark.skipif(not HAS_DEMO, reason="the demo model has not been trained yet")


def problems(path: Path | None, **options: object) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, options=Options(**options))  # type: ignore[arg-type]
    return caught.value.message.split("\n")


def write(folder: Path, text: str) -> Path:
    path = folder / "shoal.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_mistake_of_a_file_is_told_at_once_with_its_line(
    tmp_path: Path, make_model: MakeModel
) -> None:
    good = make_model()
    path = write(
        tmp_path,
        f"""http:
  host: 300.0.0.1
  port: 99999
  prot: 1
models:
  - preset: dmo
  - name: a
    path: {good}
    tensor_parallel: 3
    engine: {{token_budget: 64, token_budget: 128}}
  - name: a
    path: ./nowhere
    is_defualt: true
ingress_copies: many
""",
    )
    expected = [
        (2, "http.host", "must be an address of this machine (127.0.0.1, 0.0.0.0 for all of them)"),
        (3, "http.port", "less than or equal to 65535, got 99999"),
        (4, "http.prot", "unknown key, did you mean 'port'?"),
        (6, "models[0].preset", "no preset named 'dmo', did you mean 'demo'?"),
        (9, "models[1].tensor_parallel", "must be one of 1, 2, 4, got 3"),
        (10, "models[1].engine.token_budget", "is written twice, first in line 10"),
        (11, "models[2].name", "'a' is already the name of models[1]"),
        (12, "models[2].path", "does not exist or is not a folder"),
        (13, "models[2].is_defualt", "unknown key, did you mean 'is_default'?"),
        (14, "ingress_copies", "valid integer or should be 'auto', got 'many'"),
    ]
    found = problems(path)
    assert len(found) == len(expected)
    for line, (number, key, message) in zip(found, expected, strict=True):
        assert line.startswith(f"{path}:{number}: {key}: ")
        assert message in line


@pytest.mark.parametrize("value", ["8", "many"])
def test_wrong_budget_is_told_in_one_line_with_its_limit(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"models:\n  - preset: demo\n    engine: {{token_budget: {value}}}\n")
    (line,) = problems(path)
    assert line.startswith(f"{path}:3: models[0].engine.token_budget: should be ")
    assert line.endswith(f"or should be 'auto', got {value if value == '8' else repr(value)}")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("models: [", 1, "not YAML"),
        ("- a\n- b\n", 1, "must be a mapping"),
        ("a: 1\n\tb: 2\n", 2, "not YAML"),
        ("", 1, "models: is missing"),
        ("models: []\n", 1, "at least 1 item"),
        ("http:\n  port: !!python/name:os.system x\n", 2, "not a value"),
        ("models: &all\n  - *all\n", 1, "contains itself"),
    ],
)
def test_what_is_no_configuration_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    found = "\n".join(problems(path))
    assert f"{path}:{line}: " in found
    assert message in found


def test_missing_file_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.yaml") == [
        f"{tmp_path / 'no.yaml'}: cannot be read: No such file or directory"
    ]


def test_missing_tensor_is_named(tmp_path: Path, make_model: MakeModel) -> None:
    folder = make_model(drop="model.norm.weight")
    path = write(tmp_path, f"models:\n  - path: {folder}\n")
    assert "model.norm.weight" in "\n".join(problems(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "tokenizer.json is missing"),
        (lambda path: path.write_text("{"), "tokenizer.json is not a JSON object"),
        (lambda path: path.write_text("{}"), "tokenizer.json has no vocabulary"),
        (
            lambda path: path.write_text('{"model": {"vocab": {"a": 128}}}'),
            "tokenizer.json has 129 ids, config.json's vocab_size is 128",
        ),
    ],
)
def test_tokenizer_that_cannot_serve_is_told_before_a_start_and_not_asked_for_by_a_plan(
    tmp_path: Path, make_model: MakeModel, change: Callable[[Path], object], message: str
) -> None:
    folder = make_model()
    change(folder / "tokenizer.json")
    path = write(tmp_path, f"models:\n  - path: {folder}\n")
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: models[0].path: model folder {folder}: ")
    assert message in found
    assert load_config(path, needs_weights=False).models[0].path == folder


def test_chat_template_that_could_not_serve_is_told_before_a_start(
    tmp_path: Path, make_model: MakeModel
) -> None:
    folder = make_model()
    (folder / "chat_template.jinja").write_text("{% for message in messages %}\n{{ message }")
    path = write(tmp_path, f"models:\n  - path: {folder}\n")
    (found,) = problems(path)
    assert found.startswith(
        f"{path}:2: models[0].path: {folder}/chat_template.jinja: the chat template does not"
        " compile, line 2: "
    )


def test_options_come_before_the_file_and_are_named_as_such(
    tmp_path: Path, make_model: MakeModel
) -> None:
    path = write(tmp_path, "models:\n  - preset: demo\nhttp: {port: 9000}\n")
    folder = make_model()
    config = load_config(path, options=Options(model=str(folder), port=8123, replicas=2))
    (model,) = config.models
    assert (model.path, model.name, config.http.port) == (folder, "small", 8123)
    assert (model.replicas.min, model.replicas.max) == (2, 2)
    assert problems(path, model=str(folder), port=99999)[0].startswith("--port: http.port: ")
    assert "--model: models[0].preset: no preset named 'nope'" in problems(path, model="nope")[0]


def test_folder_is_relative_to_the_file_that_names_it(
    tmp_path: Path, make_model: MakeModel
) -> None:
    make_model("beside")
    config = load_config(write(tmp_path, "models:\n  - path: beside\n"))
    assert config.models[0].path == tmp_path / "beside"


def test_preset_fills_in_only_what_the_entry_does_not_say(
    tmp_path: Path, make_model: MakeModel
) -> None:
    folder = make_model()
    text = f"models:\n  - preset: qwen2.5-7b-instruct\n    path: {folder}\n    dtype: float32\n"
    (model,) = load_config(write(tmp_path, text)).models
    assert (model.name, model.dtype, model.max_answer_tokens) == (
        "qwen2.5-7b-instruct",
        "float32",
        8192,
    )


@pytest.mark.parametrize("name", [name for name in preset_names("models") if name != "demo"])
def test_model_preset_loads_with_a_folder_and_says_what_it_needs_without(
    name: str, make_model: MakeModel
) -> None:
    assert "`shoal up --model FOLDER`" in problems(None, model=name)[0]
    folder = make_model("weights")
    path = write(folder, f"models:\n  - preset: {name}\n    path: .\n")
    (model,) = load_config(path).models
    assert (model.preset, model.name, model.path) == (name, name, folder)


@pytest.mark.parametrize("name", preset_names("hardware"))
def test_hardware_preset_loads(name: str, tmp_path: Path, make_model: MakeModel) -> None:
    path = write(tmp_path, f"hardware: {name}\nmodels:\n  - path: {make_model()}\n")
    hardware = load_config(path).hardware
    assert isinstance(hardware, HardwareConfig)
    assert hardware.name == name


@needs_demo
@pytest.mark.parametrize(
    "path", sorted((configs_path() / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_example_loads(path: Path) -> None:
    assert load_config(path).models


@needs_demo
def test_demo_is_served_when_nothing_is_said() -> None:
    (model,) = load_config(None).models
    assert (model.name, model.path) == ("shoal-demo", DEMO_MODEL_PATH)


def test_seven_sizes_and_the_demo_have_presets() -> None:
    sizes = ("0.5b", "1.5b", "14b", "32b", "3b", "72b", "7b")
    assert preset_names("models") == ["demo", *(f"qwen2.5-{size}-instruct" for size in sizes)]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "192.168.1.5", "gpu-box.example.org"])
def test_any_address_or_name_can_be_listened_on(host: str) -> None:
    assert load_config(None, options=Options(host=host)).http.host == host


@pytest.mark.parametrize("host", ["", "1.2.3", "1.2.3.4:80", "[::1]", "a b", "-a", "*", "a_b"])
def test_what_cannot_be_a_host_is_refused(host: str) -> None:
    (found,) = problems(None, host=host)
    assert found.startswith("--host: http.host: must be an address of this machine")
    assert found.endswith(f"got {host!r}")


def test_keys_file_is_relative_to_the_file_and_links_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    text = "models: [{preset: demo}]\nhttp: {keys_file: link}\n"
    assert load_config(write(tmp_path, text)).http.keys_file == tmp_path / "link"


def test_keys_and_anonymous_exclude_each_other(tmp_path: Path) -> None:
    text = "models: [{preset: demo}]\nhttp: {keys_file: k, allow_anonymous: true}\n"
    path = write(tmp_path, text)
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: http: ")
    assert "exclude each other" in found
