"""The page behind keys, in a real Chromium: it asks for one, keeps it in its tab, and says so."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve.keys import ApiKey, generate_key, hash_key, render_keys

from .conftest import Api

pytestmark = pytest.mark.browser
KEY = generate_key()


@pytest.fixture(scope="module")
def locked(served: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(render_keys([ApiKey("me", hash_key(KEY), datetime.now(UTC))]))
    api = Api(*served, keys_file=path)
    api.start()
    yield api
    api.stop()


@pytest.fixture
def page(locked: Api, browser: Any) -> Iterator[Any]:
    """The page as it first opens; its console may name the 401 and nothing else."""
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=locked.url)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.set_default_timeout(60_000)
    opened.goto(locked.url)
    opened.wait_for_selector("#key-form:visible")
    yield opened
    context.close()
    assert [text for text in complaints if "401 (Unauthorized)" not in text] == []


def enter(page: Any, key: str) -> None:
    page.fill("#api-key", key)
    page.keyboard.press("Enter")


def test_a_key_is_asked_for_and_opens_the_conversation(locked: Api, page: Any) -> None:
    assert page.get_attribute("#api-key", "type") == "password"
    assert not page.is_visible("#composer")
    assert not page.is_visible("#document")
    assert not page.is_visible("#error")
    enter(page, f" {KEY} ")
    page.wait_for_selector("#model:enabled")
    assert not page.is_visible("#key-form")
    locked.say("An answer behind keys")
    page.fill("#question", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".facts:has-text('tokens')")
    assert page.inner_text(".turn.assistant .text") == "An answer behind keys"


def test_a_wrong_key_is_said_to_be_wrong_and_forgotten(page: Any) -> None:
    enter(page, "sk-shoal-wrong")
    page.wait_for_selector("#key-problem:has-text('does not know this key')")
    assert page.evaluate("sessionStorage.length") == 0
    assert page.input_value("#api-key") == ""
    enter(page, "caf\u00e9 \U0001f511")
    page.wait_for_selector("#key-problem:has-text('not an API key')")
    enter(page, KEY)
    page.wait_for_selector("#model:enabled")
    assert not page.is_visible("#key-problem")


def test_the_key_is_kept_in_this_tab_alone(page: Any) -> None:
    enter(page, KEY)
    page.wait_for_selector("#model:enabled")
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert KEY not in page.content()
    assert KEY not in page.url
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#key-form:visible")


def test_a_key_can_be_forgotten(page: Any) -> None:
    enter(page, KEY)
    page.wait_for_selector("#model:enabled")
    page.click("summary")
    page.click("#forget-key")
    page.wait_for_selector("#key-form:visible")
    assert page.evaluate("sessionStorage.length") == 0
    assert not page.is_visible("#key-problem")


def test_a_key_that_ends_in_a_conversation_is_asked_for_again(page: Any) -> None:
    enter(page, KEY)
    page.wait_for_selector("#model:enabled")
    page.evaluate("setKey('sk-shoal-revoked')")
    page.fill("#question", "still there?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-problem:has-text('does not know this key')")
    enter(page, KEY)
    page.wait_for_selector("#composer:visible")
    assert page.input_value("#question") == "still there?"


def test_the_copied_command_names_a_variable_and_not_the_key(page: Any) -> None:
    enter(page, KEY)
    page.wait_for_selector("#model:enabled")
    page.fill("#question", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".facts:has-text('tokens')")
    page.click("#copy")
    page.wait_for_selector("#status:has-text('Copied.')")
    command = page.evaluate("navigator.clipboard.readText()")
    assert '-H "authorization: Bearer $SHOAL_API_KEY"' in command
    assert KEY not in command


def test_the_form_fits_a_phone(locked: Api, browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640})
    opened = context.new_page()
    opened.goto(locked.url)
    opened.wait_for_selector("#key-form:visible")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    assert opened.evaluate("document.querySelector('#api-key').labels[0].textContent.trim()")
    opened.screenshot(path=str(tmp_path / "phone.png"))
    context.close()
