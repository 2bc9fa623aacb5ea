"""The playground in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from serving import listening

from detox_guard import GuardPolicy
from detox_guard.server import ServerConfig, create_app
from detox_guard.server.keys import Keys, new_key
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from detox_guard import Chunk, DetoxiGen

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens the page; fails for anything that the browser complains of."""
    complaints: list[str] = []
    contexts = []

    def opened(url: str, **how: Any) -> Any:
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [one for one in complaints if "401" not in one] == []


def whole(page: Any, replies: int) -> None:
    """Wait until so many replies have their figures."""
    page.locator(".reply .facts").filter(has_text="tokens").nth(replies - 1).wait_for()


def ask(page: Any, words: str) -> None:
    page.get_by_label("Message").fill(words)
    page.get_by_label("Message").press("Enter")


def test_three_replies_side_by_side_with_tokens_figures_and_what_was_taken_back(
    model: DetoxiGen, open_page: Any
) -> None:
    said = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=12, seed=3, alpha=3.0).text
    scorer = ScriptedScorer(said[2:6])
    app = create_app(model, ServerConfig(guard=GuardPolicy(scorer=scorer)))
    with listening(app) as url:
        page = open_page(url)
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Seed").fill("3")
        page.get_by_label("Most tokens").fill("12")
        ask(page, "Hi")
        whole(page, 3)
        assert page.locator(".reply h3").all_inner_texts() == ["plain", "steered", "guarded"]
        guarded = page.locator(".reply").nth(2)
        guarded.locator("summary").first.click()
        assert said[2:6].lower() in guarded.locator("s").first.inner_text().lower()
        steered = page.locator(".reply").nth(1)
        assert "".join(steered.locator(".t").all_text_contents()) == said
        first, second = steered.locator(".t").nth(0), steered.locator(".t").nth(1)
        assert [first.get_attribute("tabindex"), second.get_attribute("tabindex")] == ["0", "-1"]
        first.focus()
        before = steered.get_by_role("status").inner_text()
        page.keyboard.press("ArrowRight")
        after = steered.get_by_role("status").inner_text()
        assert "before 0." in before or "before 1." in before
        assert before != after
        assert [first.get_attribute("tabindex"), second.get_attribute("tabindex")] == ["-1", "0"]


class Halting:
    """A model whose replies stop half-way until they may go on."""

    def __init__(self, model: DetoxiGen, chunks: int) -> None:
        self.go_on = threading.Event()
        self._model, self._chunks = model, chunks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def astream(self, *args: Any, **how: Any) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._model.astream(*args, **how)) as chunks:
            count = 0
            async for chunk in chunks:
                if count == self._chunks:
                    await asyncio.to_thread(self.go_on.wait, 30)
                count += 1
                yield chunk


@pytest.mark.parametrize("way", ["steered", "guarded"])
def test_tokens_are_tinted_as_they_come(model: DetoxiGen, open_page: Any, way: str) -> None:
    reply = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=12, seed=3, alpha=6.0, calm_share=1.0)
    assert reply.trace is not None
    halting = Halting(model, 3)
    halting.params = model.params.replace(calm_share=1.0)
    guard = GuardPolicy(scorer=ScriptedScorer("nothing"), unit=3)
    with listening(create_app(halting, ServerConfig(guard=guard))) as url:
        page = open_page(url)
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Seed").fill("3")
        page.get_by_label("Most tokens").fill("12")
        page.get_by_label("Steering").fill("6")
        ask(page, "Hi")
        panel = page.locator(".reply").filter(has=page.get_by_role("heading", name=way))
        tokens = panel.locator(".t")
        tokens.nth(2).wait_for(state="attached")
        assert page.locator(".reply.busy").count() == 3
        assert 3 <= tokens.count() < len(reply.trace)
        tokens.nth(0).focus()
        page.keyboard.press("ArrowRight")
        halting.go_on.set()
        whole(page, 3)
        assert tokens.all_text_contents() == [token.text for token in reply.trace.tokens]
        tints = [one.evaluate("it => Number(it.style.getPropertyValue('--s'))") for one in tokens.all()]
        assert tints == pytest.approx([token.strength for token in reply.trace.tokens], abs=0.006)
        assert max(tints) > 0
        assert tokens.nth(1).evaluate("it => it === document.activeElement")
        assert panel.locator(".text").text_content() == reply.text


def test_a_chat_goes_on_with_its_passages_and_settings(open_page: Any) -> None:
    model = ScriptedDetoxiGen(["First.", "Second."])
    with listening(create_app(model)) as url:
        page = open_page(url, **PHONE)
        page.get_by_label("System prompt").fill("Be kind.")
        page.get_by_label("Passages").fill("One fox.\n\nTwo dogs.")
        page.get_by_label("Steering").fill("4.5")
        ask(page, "Who?")
        whole(page, 1)
        page.get_by_label("Passages").fill("")
        ask(page, "And?")
        whole(page, 2)
        assert page.locator(".text").all_inner_texts() == ["First.", "Second."]
        page.get_by_role("button", name="Copy as Python").click()
        code = page.locator("#code").inner_text()
    sent = [call.prompt.messages for call in model.calls]
    assert [one["role"] for one in sent[1]] == ["system", "user", "assistant", "user"]
    assert "[2] Two dogs." in sent[0][1]["content"]
    assert sent[1][-1]["content"] == "And?"
    assert model.calls[0].params.alpha == 4.5
    assert model.calls[0].params.guard is not None
    assert f'base_url="{url}/v1"' in code
    assert '"alpha": 4.5' in code


def test_a_server_with_keys_asks_for_one_and_compares_nothing(open_page: Any) -> None:
    key, line = new_key("ann")
    app = create_app(ScriptedDetoxiGen(["Fine."]), keys=Keys({line.split(":")[1]: "ann"}))
    with listening(app) as url:
        page = open_page(url)
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use key").click()
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_role("button", name="Compare").click()
        assert "nothing to compare" in page.get_by_role("alert").inner_text()
        ask(page, "Hi")
        whole(page, 1)
        assert page.locator(".reply h3").all_inner_texts() == ["guarded"]
        assert key not in page.content()


def test_what_fails_is_told(open_page: Any) -> None:
    with listening(create_app(ScriptedDetoxiGen([RuntimeError("x")]), ServerConfig(guard=None))) as url:
        page = open_page(url)
        ask(page, "Hi")
        page.get_by_text("The server failed.").wait_for()


@pytest.mark.parametrize("how", [{}, {"color_scheme": "dark"}, PHONE], ids=["desk", "dark", "phone"])
def test_axe_finds_nothing_serious(open_page: Any, model: DetoxiGen, how: dict[str, Any]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    said = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=12, seed=3, alpha=3.0).text
    with listening(create_app(model, ServerConfig(guard=GuardPolicy(scorer=ScriptedScorer(said[2:6]))))) as url:
        page = open_page(url, **how)
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Seed").fill("3")
        page.get_by_label("Most tokens").fill("12")
        ask(page, "Hi")
        whole(page, 3)
        page.locator("summary").first.click()
        page.get_by_role("button", name="Copy as curl").click()
        page.locator(".t").last.evaluate("it => it.style.setProperty('--s', '1')")  # as hard as can be
        found = axe.Axe().run(page).response["violations"]
        wide = page.evaluate("() => document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert [(one["id"], one["impact"]) for one in found if one["impact"] in ("serious", "critical")] == []
    assert not wide
