"""Keys made, listed and revoked in a store, by functions and by the command."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import CommandError, UsageError
from cluster.keys import (
    ChangedError,
    FileStore,
    KeyStore,
    create_key,
    default_path,
    has_usable_key,
    list_keys,
    own_key,
    parse_lifetime,
    revoke_key,
)
from serve.keys import MAX_KEYS, ApiKey, KeyRing, hash_key, render_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "keys.yaml"


@pytest.fixture
def store(path: Path) -> FileStore:
    return FileStore(path)


def shoal(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", "keys", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "XDG_CONFIG_HOME": str(home)},
    )


def test_a_key_that_was_made_opens_and_one_that_was_revoked_does_not(
    store: FileStore, path: Path
) -> None:
    key = create_key(store, "me")
    assert KeyRing(path).find(key) == "me"
    revoke_key(store, "me")
    assert KeyRing(path).find(key) is None
    assert list_keys(store) == ()


def test_the_file_holds_no_key_and_is_its_owner_s_alone(store: FileStore, path: Path) -> None:
    key = create_key(store, "me")
    assert key not in path.read_text()
    assert hash_key(key).hex() in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == ["keys.yaml"]


def test_a_lifetime_ends_the_key(store: FileStore) -> None:
    create_key(store, "short", lifetime=timedelta(hours=1))
    (key,) = list_keys(store)
    assert key.expires is not None
    assert key.expires - key.created == timedelta(hours=1)
    now_s = datetime.now(UTC).timestamp()
    assert not key.is_expired(now_s)
    assert key.is_expired(now_s + 3601)


def test_what_cannot_be_done_is_refused_and_changes_nothing(store: FileStore, path: Path) -> None:
    create_key(store, "me")
    before = path.read_text()
    with pytest.raises(UsageError, match="has a key named 'me' already"):
        create_key(store, "me")
    with pytest.raises(UsageError, match="got 'a b'"):
        create_key(store, "a b")
    with pytest.raises(UsageError, match="has no key named 'you'") as caught:
        revoke_key(store, "you")
    assert caught.value.hint == "Its keys: me"
    assert path.read_text() == before


def test_a_store_holds_at_most_so_many_keys(store: FileStore, path: Path) -> None:
    path.parent.mkdir(parents=True)
    now = datetime.now(UTC)
    path.write_text(
        render_keys(ApiKey(f"k{index}", hash_key(str(index)), now) for index in range(MAX_KEYS))
    )
    with pytest.raises(UsageError, match=f"<= {MAX_KEYS} keys"):
        create_key(store, "one-more")


def test_a_broken_file_is_named_and_not_overwritten(store: FileStore, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("keys:\n- sk-shoal-0123456789abcdef\n")
    for action in (list_keys, lambda store: create_key(store, "a")):
        with pytest.raises(UsageError, match=rf"{path}:2: holds a key itself"):
            action(store)
    assert "sk-shoal-0123456789abcdef" in path.read_text()


def test_writers_at_the_same_time_lose_no_key(path: Path) -> None:
    names = [f"k{index}" for index in range(12)]
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda name: create_key(FileStore(path), name), names))
    assert sorted(key.name for key in list_keys(FileStore(path))) == sorted(names)
    ring = KeyRing(path)
    assert [ring.find(key) for key in keys] == names


class Contended:
    """A store that somebody else changes between every reading and writing, `times` times."""

    place = "contended"
    options = ""

    def __init__(self, times: int) -> None:
        self.text: str | None = None
        self._times = times

    def read(self) -> str | None:
        return self.text

    def write(self, text: str, previous: str | None) -> None:
        if self._times:
            self._times -= 1
            create_key(self, f"other{self._times}")
            raise ChangedError("contended was changed")
        self.text = text


def test_a_change_in_between_is_read_and_kept() -> None:
    store: KeyStore = Contended(1)
    create_key(store, "mine")
    assert [key.name for key in list_keys(store)] == ["other0", "mine"]


def test_a_store_that_never_holds_still_is_an_error() -> None:
    class Restless(Contended):
        def write(self, text: str, previous: str | None) -> None:
            raise ChangedError("restless was changed")

    with pytest.raises(CommandError, match="was changed"):
        create_key(Restless(0), "mine")


def test_a_write_over_something_else_is_refused(store: FileStore) -> None:
    store.write("a", None)
    with pytest.raises(ChangedError):
        store.write("b", None)
    with pytest.raises(ChangedError):
        store.write("b", "other")
    store.write("b", "a")
    assert store.read() == "b"


def test_a_name_that_is_taken_is_refused_with_the_command_that_frees_it(tmp_path: Path) -> None:
    elsewhere = FileStore(tmp_path / "keys.yaml")
    create_key(elsewhere, "me")
    with pytest.raises(CommandError) as refused:
        create_key(elsewhere, "me")
    assert refused.value.hint.endswith(f"shoal keys revoke me --file {tmp_path / 'keys.yaml'}")
    assert FileStore(default_path()).options == ""


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    create_key(FileStore(tmp_path / "link"), "me")
    assert (tmp_path / "link").is_symlink()
    assert "me" in (tmp_path / "real").read_text()


@pytest.mark.parametrize(
    ("text", "lifetime"),
    [("12h", timedelta(hours=12)), ("30d", timedelta(days=30)), ("8w", timedelta(weeks=8))],
)
def test_a_lifetime_is_hours_days_or_weeks(text: str, lifetime: timedelta) -> None:
    assert parse_lifetime(text) == lifetime


@pytest.mark.parametrize("text", ["", "0d", "-1d", "1.5d", "30", "d", "5m", "36501d", "9" * 20])
def test_another_lifetime_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(UsageError, match="as 12h, 30d or 8w") as caught:
        parse_lifetime(text)
    assert repr(text) in caught.value.message


def test_a_key_is_usable_until_it_expires() -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    expired = ApiKey("a", hash_key("a"), past, past)
    assert not has_usable_key(())
    assert not has_usable_key((expired,))
    assert has_usable_key((expired, ApiKey("b", hash_key("b"), past)))


def test_the_default_file_is_below_the_user_s_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert default_path() == Path("/home/u/.config/shoal/keys.yaml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_path() == Path("/home/u/.config/shoal/keys.yaml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert default_path() == Path("/x/shoal/keys.yaml")


def test_one_s_own_key_is_of_the_option_then_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    assert own_key(None) is None
    monkeypatch.setenv("SHOAL_API_KEY", " sk-a \n")
    assert own_key(None) == "sk-a"
    (tmp_path / "mine").write_text("sk-b\n")
    assert own_key(tmp_path / "mine") == "sk-b"
    with pytest.raises(UsageError, match="No such file"):
        own_key(tmp_path / "none")


def test_a_file_of_hashes_is_not_taken_for_a_key(store: FileStore, path: Path) -> None:
    create_key(store, "me")
    with pytest.raises(UsageError, match="must be one API key") as caught:
        own_key(path)
    assert "hashes" in caught.value.hint


def test_the_command_prints_the_key_alone_and_once(tmp_path: Path) -> None:
    made = shoal("create", "me", "--expires", "30d", home=tmp_path)
    assert made.returncode == 0
    key = made.stdout.strip()
    assert KeyRing(tmp_path / "shoal" / "keys.yaml").find(key) == "me"
    assert key not in made.stderr
    listed = shoal("list", "--json", home=tmp_path)
    (report,) = json.loads(listed.stdout)
    assert (report["name"], report["is_expired"]) == ("me", False)
    assert key not in listed.stdout + shoal("list", home=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["create", "a b"], 2, "a key's name is"),
        (["create", "a", "--expires", "soon"], 2, "--expires must be"),
        (["revoke", "nobody"], 2, "has no key named 'nobody'"),
        (["list", "--namespace", "x"], 2, "go with --secret NAME"),
        (["list", "--secret", "x", "--file", "y"], 2, "exclude each other"),
        (["create", "a", "--file", "/proc/nothing/keys"], 2, "cannot be written"),
    ],
)
def test_what_the_command_refuses_it_explains(
    arguments: list[str],
    exit_code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["keys", *arguments])
    assert isinstance(result.exception, CommandError)
    assert result.exception.exit_code == exit_code
    assert message in result.exception.message
    assert not (tmp_path / "shoal").exists()


def test_the_command_lists_and_revokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, file = CliRunner(), ["--file", str(tmp_path / "k")]
    assert "There is no key" in runner.invoke(app, ["keys", "list", *file]).stderr
    runner.invoke(app, ["keys", "create", "me", *file])
    assert "me " in runner.invoke(app, ["keys", "list", *file]).stdout
    revoked = runner.invoke(app, ["keys", "revoke", "me", *file])
    assert "no longer in" in revoked.stderr
    assert list_keys(FileStore(tmp_path / "k")) == ()
