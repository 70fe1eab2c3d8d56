"""The file of keys and the ring that follows it."""

import base64
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigurationError
from serve.keys import (
    KEY_PREFIX,
    MAX_FILE_BYTES,
    MAX_KEYS,
    ApiKey,
    KeyRing,
    generate_key,
    hash_key,
    is_key_name,
    parse_keys,
    read_keys_file,
    render_keys,
)

NOW = datetime(2026, 11, 22, 9, 30, tzinfo=UTC)


def entry(name: str, key: str, *, expires: datetime | None = None) -> ApiKey:
    return ApiKey(name, hash_key(key), NOW, expires)


class Clock:
    """Both clocks of a ring, moved by hand."""

    def __init__(self) -> None:
        self.now_s = NOW.timestamp()

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(render_keys([entry("alice", "one"), entry("bob", "two")]))
    return path


@pytest.fixture
def ring(path: Path, clock: Clock) -> KeyRing:
    return KeyRing(path, clock=clock, monotonic=clock)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged, at every level."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("shoal.keys")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)


def test_a_new_key_has_256_random_bits_and_a_prefix_of_ours() -> None:
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key.startswith(KEY_PREFIX)
        assert len(base64.urlsafe_b64decode(key.removeprefix(KEY_PREFIX) + "=")) == 32


def test_what_is_stored_is_what_sha256sum_prints() -> None:
    assert hash_key("abc").hex() == hashlib.sha256(b"abc").hexdigest()


times = st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30)).map(
    lambda moment: moment.replace(microsecond=0, tzinfo=UTC)
)
entries = st.builds(
    ApiKey,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True).filter(is_key_name),
    digest=st.binary(min_size=32, max_size=32),
    created=times,
    expires=st.none() | times,
)


@given(
    st.lists(entries, max_size=8, unique_by=(lambda key: key.name, lambda key: key.digest)).map(
        tuple
    )
)
def test_what_is_rendered_is_read_back(keys: tuple[ApiKey, ...]) -> None:
    assert parse_keys(render_keys(keys), source="f") == keys


def test_json_and_a_bare_date_are_read_too() -> None:
    text = json.dumps(
        {
            "keys": [
                {
                    "name": "a",
                    "sha256": "AB" * 32,
                    "created": "2026-01-01",
                    "expires": "2026-01-02T01:00:00+01:00",
                }
            ]
        }
    )
    (key,) = parse_keys(text, source="f")
    assert key.digest == b"\xab" * 32
    assert (key.created, key.expires) == (
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 2, tzinfo=UTC),
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "keys:\n", "keys: []\n", "{}"])
def test_a_file_may_hold_no_key(text: str) -> None:
    assert parse_keys(text, source="f") == ()


GOOD = f"name: a, sha256: {'0' * 64}, created: 2026-01-01"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("keys: [", 1, "is not YAML"),
        ("[" * 5000, 1, "is not YAML"),
        ("a\tb\x00", 1, "is not YAML"),
        ("- a\n", 1, "must be a mapping with keys"),
        ("key: []\n", 1, "unknown field"),
        ("keys: {}\n", 1, "keys: must be a list"),
        ("keys:\n- alice\n", 2, "must be a mapping with name, sha256"),
        ("keys:\n- name: a\n", 2, "sha256 is missing"),
        ("keys:\n- {created: 2026-01-01, name: a}\n", 2, "sha256 is missing"),
        (f"keys:\n- {{{GOOD}, token: x}}\n", 2, "unknown field; known here: name, sha256"),
        (f"keys:\n- {{{GOOD}, name: b}}\n", 2, "name is written twice"),
        (f"keys: [{{{GOOD}}}, {{{GOOD}}}]\n", 1, "name is the same as in line 1"),
        (f"keys:\n- {{{GOOD}}}\n- {{{GOOD.replace('a,', 'b,')}}}\n", 3, "sha256 is the same as"),
        (f"keys:\n- {{{GOOD.replace('name: a', 'name: a b')}}}\n", 2, "name must be 1 to 64"),
        (f"keys:\n- {{{GOOD.replace('name: a', 'name: [a]')}}}\n", 2, "name must be 1 to 64"),
        (f"keys:\n- {{{GOOD.replace('0' * 64, 'hunter2')}}}\n", 2, "not the key"),
        (f"keys:\n- {{{GOOD}, expires: soon}}\n", 2, "expires must be a time as"),
        (f"keys:\n- {{{GOOD}, expires: [1]}}\n", 2, "expires must be a time as"),
        ("keys:\n- name: a\n  sha256: " + generate_key(), 3, "holds a key itself"),
        ("# mine: sk-live_0123456789abcdef\n", 1, "holds a key itself"),
        ("keys: [" + "{}, " * (MAX_KEYS + 1) + "]", 1, f"<= {MAX_KEYS}, got {MAX_KEYS + 1}"),
        ("#" * (MAX_FILE_BYTES + 1), 1, f"<= {MAX_FILE_BYTES} characters"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line_and_without_its_values(
    text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_keys(text, source="keys.yaml")
    assert caught.value.message.startswith(f"keys.yaml:{line}: ")
    assert message in caught.value.message
    for secret in ("hunter2", "sk-shoal-", "sk-live"):
        assert secret not in caught.value.message


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        assert parse_keys(text, source="f") == ()


@pytest.mark.parametrize("name", ["", "a b", "-a", "é", "a" * 65, "a\n", "a/b", "sk-" + "a" * 16])
def test_a_name_is_short_and_plain(name: str) -> None:
    assert not is_key_name(name)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "is not UTF-8"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read_keys_file(path)


def test_a_key_is_found_by_itself_alone(ring: KeyRing) -> None:
    assert ring.find("one") == "alice"
    assert ring.find("two") == "bob"
    for wrong in ("", "three", "One", "one ", hash_key("one").hex()):
        assert ring.find(wrong) is None


def test_every_key_is_compared_whichever_is_meant(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("serve.keys.hmac.compare_digest", compare)
    for presented in ("one", "two", "three"):
        compared.clear()
        ring.find(presented)
        assert compared == [hash_key("one"), hash_key("two")]


def test_a_key_ends_at_its_time(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(render_keys([entry("a", "one", expires=NOW + timedelta(seconds=5))]))
    ring = KeyRing(path, clock=clock, monotonic=clock)
    clock.now_s += 4.9
    assert ring.find("one") == "a"
    clock.now_s += 0.1
    assert ring.find("one") is None


def test_a_change_counts_within_a_second_and_not_at_every_look(
    ring: KeyRing, path: Path, clock: Clock
) -> None:
    replace(path, render_keys([entry("carol", "three")]))
    clock.now_s += 0.5
    assert ring.find("one") == "alice"
    clock.now_s += 0.5
    assert ring.find("one") is None
    assert ring.find("three") == "carol"


def test_a_file_changed_in_place_with_the_same_size_is_seen(
    ring: KeyRing, path: Path, clock: Clock
) -> None:
    path.write_text(path.read_text().replace("alice", "carol"))
    later = path.stat().st_mtime_ns + 1
    os.utime(path, ns=(later, later))
    clock.now_s += 1
    assert ring.find("one") == "carol"


def test_the_swap_of_a_secret_s_volume_is_seen(tmp_path: Path, clock: Clock) -> None:
    """Kubernetes: keys -> ..data/keys, ..data -> a folder of its own for each version."""
    for version, name in (("v1", "alice"), ("v2", "carol")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(render_keys([entry(name, "one")]))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys").symlink_to("..data/keys")
    ring = KeyRing(tmp_path / "keys", clock=clock, monotonic=clock)
    assert ring.find("one") == "alice"
    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    clock.now_s += 1
    assert ring.find("one") == "carol"


def test_a_broken_new_file_keeps_the_old_keys_and_is_logged_once(
    ring: KeyRing, path: Path, clock: Clock, messages: list[str]
) -> None:
    key = generate_key()
    replace(path, f"keys: [{key}]")
    for _ in range(5):
        clock.now_s += 1
        assert ring.find("one") == "alice"
    (message,) = messages
    assert message.startswith(f"{path}:1: holds a key itself")
    assert key not in message
    replace(path, render_keys([entry("carol", "three")]))
    clock.now_s += 1
    assert ring.find("one") is None


def test_a_file_that_vanishes_keeps_the_old_keys_and_is_logged_once(
    ring: KeyRing, path: Path, clock: Clock, messages: list[str]
) -> None:
    text = path.read_text()
    path.unlink()
    for _ in range(5):
        clock.now_s += 1
        assert ring.find("one") == "alice"
    (message,) = messages
    assert "No such file" in message
    path.write_text(text.replace("alice", "caroline"))
    clock.now_s += 1
    assert ring.find("one") == "caroline"


def test_no_log_line_and_no_repr_holds_a_key(path: Path, clock: Clock, messages: list[str]) -> None:
    key = generate_key()
    replace(path, render_keys([entry("a", key)]))
    ring = KeyRing(path, clock=clock, monotonic=clock)
    assert ring.find(key) == "a"
    replace(path, render_keys([entry("b", key)]))
    clock.now_s += 1
    assert ring.find(key) == "b"
    assert messages
    assert key not in "".join(messages) + repr(vars(ring))


def test_the_ring_needs_no_heavy_import() -> None:
    import subprocess
    import sys

    code = (
        "import sys, serve.keys\n"
        "print(sorted({'torch', 'ray', 'pydantic', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
