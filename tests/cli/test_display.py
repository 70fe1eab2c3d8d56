from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.cli.display import LiveDisplay, PlainDisplay, duration, make_display
from cluster.local.progress import PhaseEvent

START = [
    PhaseEvent("begin", "ray"),
    PhaseEvent("end", "ray", seconds=5.5),
    PhaseEvent("begin", "weights"),
    PhaseEvent("progress", "weights", num_bytes=4_000_000, num_total_bytes=16_000_000),
]
END = [PhaseEvent("end", "weights", seconds=1.25), PhaseEvent("end", "ready", seconds=9.0)]


def show(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    with make_display(console) as display:
        for event in [*START, *END]:
            display.on_event(event)
    return console.file.getvalue()


def test_without_a_terminal_each_phase_is_one_plain_line() -> None:
    console = Console(file=io.StringIO())
    assert isinstance(make_display(console), PlainDisplay)
    assert show(console).splitlines() == [
        "Ray         5.5 s",
        "Weights     1.2 s",
        "Ready       9.0 s",
    ]


def test_terminal_shows_the_bar_while_weights_are_read_and_the_times_after() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display = make_display(console)
    assert isinstance(display, LiveDisplay)
    with display:
        for event in START:
            display.on_event(event)
        console.file.seek(0)  # type: ignore[attr-defined]
        display.refresh()
        assert "4.0 of 16.0 MB" in console.file.getvalue()  # type: ignore[attr-defined]
        for event in END:
            display.on_event(event)
    last = console.file.getvalue().split("Ready")[-1]  # type: ignore[attr-defined]
    assert "9.0 s" in last


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "1 min 15 s"), (3_600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
