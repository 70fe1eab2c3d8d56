"""The benchmarks' engine: its ranks answer as one, and a failed one is named and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from scripts.bench.local_group import GroupOptions, LocalGroup, RankFailedError
from serve.engine.ledger import StepResult
from serve.errors import CheckpointError
from serve.testing.checkpoints import add_demo_tokenizer, make_checkpoint

PROMPT = list(range(3, 40))
POISONED = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model; and groups keep their sockets in an empty folder of a short name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("s")))
    return add_demo_tokenizer(make_checkpoint(tmp_path_factory.mktemp("m"), vocab_size=8192))


def options(folder: Path, num_ranks: int) -> GroupOptions:
    return GroupOptions(folder, num_ranks, kv_cache_tokens=1024, max_model_len=256)


def answer(group: LocalGroup) -> list[int]:
    found: list[int] = []

    def keep(result: StepResult) -> None:
        found.extend(token for delta in result.deltas for token in delta.token_ids)

    group.add(PROMPT, num_tokens=6)
    group.run(keep)
    return found


def poison(folder: Path, *, row: int) -> None:
    """A value that no rank may load, in a matrix whose rows are split among them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[POISONED][row, 0] = float("nan")
    save_file(tensors, file)


def held() -> set[str]:
    """This process's sockets, its children, and what lies in the folder of groups.

    Less than before is no fault of a group: an earlier test's may go at any time.
    """
    links = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            links.add(os.readlink(file))
    children = {f"child {child.pid}" for child in psutil.Process().children()}
    sockets = {link for link in links if link.startswith("socket:")}
    return sockets | children | set(os.listdir(tempfile.gettempdir()))


def test_ranks_of_their_own_processes_answer_as_one_and_leave_nothing(folder: Path) -> None:
    before = held()
    with LocalGroup(options(folder, 1)) as group:
        alone = answer(group)
    with LocalGroup(options(folder, 2)) as group:
        together = answer(group)
        assert held() - before
    assert len(alone) == len(together) == 6
    assert held() <= before


def test_failed_rank_is_told_in_its_own_words_and_leaves_nothing(folder: Path) -> None:
    poison(folder, row=-1)  # of rank 1's half: rank 0 sees no fault
    before = held()
    with pytest.raises(RankFailedError) as caught:
        LocalGroup(options(folder, 2))
    assert str(caught.value).startswith("rank 1: ")
    assert POISONED in str(caught.value)
    assert held() <= before


def test_own_failure_is_raised_as_it_is_and_leaves_nothing(folder: Path) -> None:
    poison(folder, row=0)
    before = held()
    with pytest.raises(CheckpointError, match=re.escape(POISONED)):
        LocalGroup(options(folder, 2))
    assert held() <= before
