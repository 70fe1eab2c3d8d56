from __future__ import annotations

import pytest

from tests.chart.golden import FOLDER, GOLDEN, text_of


@pytest.mark.parametrize("name", GOLDEN)
def test_rendering_is_the_one_that_was_reviewed(name: str) -> None:
    reviewed = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text_of(name) == reviewed, "read the change, then `python -m tests.chart.golden`"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(GOLDEN)
