"""What a schema cannot see: names used twice, hosts, model folders, sizes that do not divide.

Not the machine (ports, memory: `cluster.planner`). The one decision: each check looks at one value
and is silent where that value's type is wrong, so that all problems of a file appear at once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.catalog import ModelShape, shape_for_length, tensor_parallel_problem
from serve.checkpoint import count_real_tokens, inspect_checkpoint, read_eos_token_ids
from serve.checkpoint.chat_template import check_chat_template
from serve.errors import CheckpointError, ConfigurationError

from .document import Document, KeyPath, Problem, render_path
from .presets import preset_names
from .shapes import preset_shape, published_shape

_HOST_NAME = re.compile(r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.?)+")


def check_values(
    document: Document, *, needs_weights: bool = True, is_fetched: bool = False
) -> list[Problem]:
    """Every problem of the document that needs more than its schema.

    `is_fetched`: a model that names a repository will get its folder from there.
    """
    problems = [*_check_host(document), *_check_names(document)]
    for index, entry in enumerate(_entries(document)):
        if isinstance(entry, dict):
            path = ("models", index)
            will_come = is_fetched and isinstance(entry.get("repository"), str)
            problems += _check_model(
                document, path, entry, needs_weights=needs_weights, will_come=will_come
            )
    return problems


def _entries(document: Document) -> list[Any]:
    entries = document.values.get("models")
    return entries if isinstance(entries, list) else []


def _problem(document: Document, path: KeyPath, message: str) -> Problem:
    return Problem(document.place_of(path), render_path(path), message)


def _check_host(document: Document) -> Iterator[Problem]:
    http = document.values.get("http")
    host = http.get("host") if isinstance(http, dict) else None
    if isinstance(host, str) and not is_host(host):
        yield _problem(
            document,
            ("http", "host"),
            "must be an address of this machine (127.0.0.1, 0.0.0.0 for all of them) or its name,"
            f" got {host!r}",
        )


def is_host(text: str) -> bool:
    """Whether `text` is an IP address, without brackets, or can be the name of a machine."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        is_dotted_number = re.fullmatch(r"[0-9.]*", text) is not None
        return not is_dotted_number and _HOST_NAME.fullmatch(text) is not None
    return True


def _check_names(document: Document) -> Iterator[Problem]:
    first: dict[str, int] = {}
    has_default = False
    for index, entry in enumerate(_entries(document)):
        if not isinstance(entry, dict):
            continue
        name = entry.get("name")
        if isinstance(name, str):
            if name in first:
                yield _problem(
                    document,
                    ("models", index, "name"),
                    f"{name!r} is already the name of models[{first[name]}]; give each its own",
                )
            first.setdefault(name, index)
        if entry.get("is_default") is True:
            if has_default:
                yield _problem(
                    document, ("models", index, "is_default"), "only one model may be the default"
                )
            has_default = True


def _check_model(
    document: Document,
    path: KeyPath,
    entry: dict[str, Any],
    *,
    needs_weights: bool,
    will_come: bool,
) -> Iterator[Problem]:
    if entry.get("stand_in") is not None:
        return
    if entry.get("revision") is not None and entry.get("repository") is None:
        yield _problem(
            document,
            (*path, "revision"),
            "is a branch, tag or commit of a hub's `repository:`, and this model names none",
        )
    folder = entry.get("path")
    if folder is None:
        preset = entry.get("preset")
        if preset is not None and preset not in preset_names("models"):
            return
        if will_come:
            published = published_shape(entry["repository"])
            if published is not None:
                yield from _check_shape(document, path, entry, published)
            return
        published = None if needs_weights or preset is None else preset_shape(preset)
        if published is not None:
            yield from _check_shape(document, path, entry, published)
            return
        what = f"{preset!r} does not come with its weights" if preset else "a model needs a folder"
        yield _problem(
            document,
            path,
            f"{what}: give the folder with config.json, tokenizer.json and *.safetensors as"
            " `path:` or by `shoal up --model FOLDER`, or a hub's `repository:`",
        )
        return
    if isinstance(folder, str):
        yield from _check_folder(document, path, entry, needs_weights=needs_weights)


def _check_folder(
    document: Document, path: KeyPath, entry: dict[str, Any], *, needs_weights: bool
) -> Iterator[Problem]:
    folder = entry["path"]
    try:
        shape = inspect_checkpoint(Path(folder)).shape
    except CheckpointError as exc:
        yield _problem(document, (*path, "path"), exc.message)
        return
    yield from _check_shape(document, path, entry, shape)
    if needs_weights:
        yield from _check_tokenizer(document, path, Path(folder), shape)


def _check_tokenizer(
    document: Document, path: KeyPath, folder: Path, shape: ModelShape
) -> Iterator[Problem]:
    """What would otherwise be told only by a start that fails."""
    try:
        num_tokens = count_real_tokens(folder)
        read_eos_token_ids(folder)
        check_chat_template(folder)
    except CheckpointError as exc:
        yield _problem(document, (*path, "path"), exc.message)
        return
    if num_tokens > shape.vocab_size:
        yield _problem(
            document,
            (*path, "path"),
            f"model folder {folder}: tokenizer.json has {num_tokens} ids, config.json's vocab_size"
            f" is {shape.vocab_size}",
        )


def _check_shape(
    document: Document, path: KeyPath, entry: dict[str, Any], shape: ModelShape
) -> Iterator[Problem]:
    size = entry.get("tensor_parallel")
    if type(size) is int:
        reason = tensor_parallel_problem(shape, size)
        if reason is not None:
            message = reason.removeprefix("tensor_parallel ")
            yield _problem(document, (*path, "tensor_parallel"), message)
    length, yarn = entry.get("max_model_len"), entry.get("yarn", "auto")
    if yarn == "auto" or type(yarn) is bool:
        try:
            shape = shape_for_length(shape, yarn=yarn, max_model_len=length or "auto")
        except ConfigurationError as exc:
            yield _problem(document, (*path, "yarn"), exc.message.removeprefix("yarn: true "))
            return
    if type(length) is int and length > shape.max_positions:
        yield _problem(
            document,
            (*path, "max_model_len"),
            f"must be <= {shape.max_positions}, the checkpoint's positions, got {length}",
        )
