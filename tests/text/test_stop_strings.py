"""Where an answer is cut, however its text is cut into pieces."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.stop_strings import StopStrings

letters = st.text(alphabet="ab", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces)
    return shown + matcher.flush(), matcher.is_stopped


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow twin: the shortest beginning of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(deadline=None)
@given(text=letters, stops=stop_lists, data=st.data())
def test_the_cut_does_not_depend_on_the_pieces(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    assert run(pieces, stops) == reference(text, stops)


@settings(deadline=None)
@given(text=letters, stops=stop_lists)
def test_nothing_behind_the_cut_leaks_while_streaming(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for character in text:
        shown += matcher.feed(character)
        assert reference(text, stops)[0].startswith(shown)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello ", "world"], ["world"], ("hello ", True)),
        (["hello wo", "rld again"], ["world"], ("hello ", True)),
        (["hello wo"], ["world"], ("hello wo", False)),
        (["a b c"], ["c", "b"], ("a ", True)),
        (["\n", "\n", "x"], ["\n\n"], ("", True)),
        (["日本", "語"], ["本語"], ("日", True)),
        (["x"], [], ("x", False)),
    ],
)
def test_known_cuts(pieces: list[str], stops: list[str], expected: tuple[str, bool]) -> None:
    assert run(pieces, stops) == expected
