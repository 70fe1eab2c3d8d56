"""Writes what of the chart follows from `cluster.helm_values`: values, schema and README.

`python -m scripts.chart` writes the files; `--check` says which one differs and writes nothing.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.helm_values import ChartValues, values_schema

CHART = Path(__file__).resolve().parents[1] / "helm" / "shoal"
_WIDTH = 100
_NOTE = "Written by `python -m scripts.chart` from cluster/helm_values: change it there."


def generated_files() -> dict[str, str]:
    """Text of every generated file, by its path in the chart."""
    introduction = (CHART / "files" / "introduction.md").read_text(encoding="utf-8")
    return {
        "values.yaml": f"# {_NOTE}\n" + "".join(_values_lines(ChartValues, depth=0)),
        "values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
        "README.md": f"<!-- {_NOTE} -->\n{introduction}\n" + _values_table(),
    }


def _values_lines(section: type[BaseModel], *, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        key = field.alias or name
        if depth == 0 or inner is None:
            if depth == 0:
                yield "\n"
            text = _description(field, inner)
            for line in textwrap.wrap(text, _WIDTH - len(indent) - 2, break_long_words=False):
                yield f"{indent}# {line}\n"
        if inner is None:
            yield from _value_lines(key, _default(field), indent)
        else:
            yield f"{indent}{key}:\n"
            yield from _values_lines(inner, depth=depth + 1)


def _value_lines(key: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        text = yaml.safe_dump({key: value}, sort_keys=False, width=_WIDTH)
        yield textwrap.indent(text, indent)
    else:
        yield f"{indent}{key}: {json.dumps(value)}\n"


def _values_table() -> str:
    lines = ["| value | default | what |", "| --- | --- | --- |"]
    for key, default, text in _rows(ChartValues, ""):
        shown = json.dumps(default) if default != "" else ""
        code = f"`{shown}`" if shown else ""
        lines.append(f"| `{key}` | {code} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        inner = _section_of(field)
        if inner is None:
            yield key, _default(field), _description(field, None)
        else:
            yield from _rows(inner, f"{key}.")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, tuple):
        return list(default)
    is_whole = isinstance(default, float) and default.is_integer()
    return int(default) if is_whole else default


def _description(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    text = field.description or (inner.__doc__ if inner else None)
    assert text, "every value is described"
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    return " ".join(text.split()) + (f" One of {', '.join(choices)}." if choices else "")


def main() -> None:
    """Write the files, or with `--check` compare them."""
    wrong = []
    for name, text in generated_files().items():
        path = CHART / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(name)
    if wrong:
        sys.exit(
            f"helm/shoal: {', '.join(wrong)}: not what cluster/helm_values says; run"
            " `python -m scripts.chart`"
        )


if __name__ == "__main__":
    main()
