"""The bench of a GPU: what a part found survives its end; bars are held or not measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from scripts.bench import gpu
from scripts.bench.gpu_parts import Bench


@pytest.mark.parametrize(
    ("ending", "error"),
    [("sleep 60", "not done after 1 s"), ("kill -9 $$", "the process ended with -9")],
)
def test_what_a_part_found_survives_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, error: str
) -> None:
    part = tmp_path / "python"
    part.write_text(
        f"""#!/bin/sh\necho '{{"batch 1": 7}}' > "$4/gpu-long-context.json"\n{ending}\n"""
    )
    part.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(part))
    options = argparse.Namespace(output=tmp_path, shape="tiny", rehearse=True)
    found = gpu._run_part("long context", options, 1.0, {})
    assert found == {"batch 1": 7, "error": error}


def test_a_part_that_fails_keeps_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "gpu-limits.json"
    bench = Bench(shape="tiny", is_rehearsal=True, limits={}, path=path)

    def fail() -> None:
        bench.keep("read_gb_per_s", 1.0)
        raise ValueError("broken here")

    bench.limits = fail  # type: ignore[method-assign]
    bench.run("limits")
    assert bench.found["read_gb_per_s"] == 1.0
    assert "broken here" in bench.found["error"]
    assert "broken here" in path.read_text()


def test_no_part_begins_when_time_is_over(tmp_path: Path) -> None:
    options = argparse.Namespace(output=tmp_path, shape="tiny", rehearse=True, minutes=0.0)
    results = gpu.run_all(options)
    assert list(results.values()) == [{"skipped": "no time was left"}] * len(gpu._PARTS_S)


def test_the_summary_holds_a_gpu_against_the_bars() -> None:
    row = {"tokens_per_s": 300.0, "share_of_limit": 0.8}
    lines = gpu.summary(
        {"environment": {"gpu": "NVIDIA H200"}, "decode": {"batch 1": row, "error": "late"}}
    )
    assert lines[0].endswith("300.00 tok/s   bar 288: met")
    assert lines[1].endswith("bar 0.85: MISSED")
    assert all(line.endswith("not measured") for line in lines[2:])
