"""The page at / in a real Chromium, against a live server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def page(api: Any, browser: Any) -> Iterator[Any]:
    """The loaded page; fails on anything in its console, CSP violations included."""
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=api.url)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.set_default_timeout(60_000)
    opened.goto(api.url)
    opened.wait_for_selector("#model:enabled")
    yield opened
    context.close()
    assert complaints == []


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")


def test_a_question_is_answered_as_it_streams(api: Any, page: Any) -> None:
    api.say("An answer with <b>markup</b> & 你好 👋🏽.")
    ask(page, "What is <i>this</i>?")
    page.wait_for_selector(".facts:has-text('tokens/s')")
    assert page.inner_text(".turn.user .text") == "What is <i>this</i>?"
    assert page.inner_text(".turn.assistant .text") == "An answer with <b>markup</b> & 你好 👋🏽."
    assert "first after" in page.inner_text(".facts")
    assert page.inner_text("#status") == "Answer complete."


def test_the_conversation_goes_on(api: Any, page: Any) -> None:
    api.say("First answer")
    ask(page, "one")
    page.wait_for_selector(".facts:has-text('tokens')")
    ask(page, "two")
    page.wait_for_selector(".turn:nth-of-type(4) .facts:has-text('tokens')")
    tokenizer = api.model.tokenizer
    prompt = tokenizer.decode(api.last_request.prompts[0].token_ids)
    assert prompt.endswith("user\none\nassistant\nFirst answer\nuser\ntwo\nassistant\n")


@pytest.mark.parametrize("how", ["#stop", "Escape"])
def test_stop_ends_the_answer_and_aborts_the_request(api: Any, page: Any, how: str) -> None:
    api.say("word " * 150)
    api.dispatcher.step_s = 0.1
    ask(page, "Talk at length")
    page.wait_for_selector(".assistant .text:has-text('word word')")
    if how == "Escape":
        page.keyboard.press(how)
    else:
        page.click(how)
    assert api.run(api.dispatcher.left.get()) == api.last_request.request_id
    page.wait_for_selector(".facts:has-text('stopped')")
    assert page.is_visible("#send")


def test_settings_enter_the_request(api: Any, page: Any) -> None:
    page.click("summary")
    page.fill("#system", "Be brief")
    page.fill("#temperature", "0.3")
    page.fill("#max-tokens", "5")
    page.check("#json-mode")
    page.select_option("#model", "org/other")
    ask(page, "hi")
    page.wait_for_selector(".facts:has-text('cut at the most tokens')")
    request = api.last_request
    assert (request.model, request.sampling.temperature) == ("org/other", 0.3)
    assert (request.sampling.max_tokens, request.sampling.grammar.kind) == (5, "json_object")
    assert "Be brief" in api.model.tokenizer.decode(request.prompts[0].token_ids)


def test_the_request_can_be_copied_as_curl(api: Any, page: Any) -> None:
    api.say("ok")
    ask(page, "it's me")
    page.wait_for_selector(".facts:has-text('tokens')")
    page.click("#copy")
    page.wait_for_selector("#status:has-text('Copied.')")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith(f"curl -N {api.url}/v1/chat/completions ")
    assert "it'\\''s me" in command


def test_an_error_is_shown_and_the_question_is_kept(api: Any, browser: Any) -> None:
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(api.url)
    opened.wait_for_selector("#model:enabled")
    opened.click("summary")
    opened.fill("#max-tokens", "99999")
    ask(opened, "hi")
    opened.wait_for_selector("#error:has-text('max_tokens must be <= 400, got 99999 (400)')")
    assert opened.input_value("#question") == "hi"
    assert opened.query_selector(".turn") is None
    context.close()


def test_everything_has_a_name_and_fits_a_phone(api: Any, browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640})
    opened = context.new_page()
    opened.goto(api.url)
    opened.wait_for_selector("#model:enabled")
    opened.click("summary")
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    for control in opened.query_selector_all("input, select, textarea, button"):
        if control.is_visible():
            name = control.evaluate("node => node.labels?.[0]?.textContent || node.textContent")
            assert name.strip()
    context.close()
