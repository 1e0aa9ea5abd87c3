"""The page in a real Chromium, over the real application with a fake model behind it.

Every test also holds that nothing was asked of another host, that the content policy had nothing to refuse, and that
the console has no error. To make docs/page.png anew, from the fake model or from a server that runs:

    T2RAY_PAGE_PNG=docs/page.png pytest tests/test_page.py -k screenshot
    T2RAY_PAGE_PNG=docs/page.png T2RAY_PAGE_URL=http://127.0.0.1:8000/ pytest tests/test_page.py -k screenshot
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import pytest
import uvicorn
from fake_backend import FakeBackend, expert
from pictures import picture
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from waiting import GUARD_S

from t2ray.api.app import create_api
from t2ray.config.serve import ApiConfig
from t2ray.core import Busy, GenerationError, Message, Mixture
from t2ray.pictures import opened

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium")
KEY = "a-key-that-only-this-test-knows"
WIDE = {"width": 1600, "height": 1000}
POLL_MS = 2000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=needs.CHROMIUM)
GUARD_MS = 120_000  # what does not come by then, never does
expect.set_options(timeout=GUARD_MS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """The application in a thread of this process, so that a test can look into its backend and hold it up."""

    def __init__(self, config: ApiConfig) -> None:
        self.app = create_api(config)
        self.fresh()
        self.url = f"http://127.0.0.1:{(port := free_port())}/"
        settings = uvicorn.Config(self.app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(settings)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(GUARD_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._up.set)
        await self._server.serve()

    def fresh(self) -> FakeBackend:
        self.backend = self.app.state.backend = FakeBackend()
        return self.backend

    def on_loop(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    def wait(self, event: asyncio.Event) -> None:
        asyncio.run_coroutine_threadsafe(event.wait(), self._loop).result(GUARD_S)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(GUARD_S)


@contextmanager
def serving(config: ApiConfig) -> Iterator[Site]:
    site = Site(config)
    try:
        yield site
    finally:
        site.close()


@pytest.fixture(scope="module")
def open_site() -> Iterator[Site]:
    with serving(ApiConfig()) as site:
        yield site


@pytest.fixture
def site(open_site: Site) -> Site:
    open_site.fresh()
    return open_site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, timeout=GUARD_MS)
        yield chromium
        chromium.close()


@contextmanager
def visit(browser: Browser, url: str, *, online: bool = True, **options: object) -> Iterator[Page]:
    """A page in a fresh profile, whose clock can be put forward to its next poll. At the end it must have kept to its
    origin, its policy and a clean console."""
    context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce"} | options)
    context.set_default_timeout(GUARD_MS)
    page = context.new_page()
    page.clock.install()
    complaints: list[str] = []

    def hear(kind: str, text: str, where: str) -> None:
        # Chromium itself reports every refused request; which of those are right is what the tests say.
        if kind in {"error", "warning"} and not ("Failed to load resource" in text and f"{url}v1/" in where):
            complaints.append(f"{kind}: {text} ({where})")

    page.on("console", lambda message: hear(message.type, message.text, message.location["url"]))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.on("request", lambda asked: asked.url.startswith(url) or complaints.append(f"left the origin: {asked.url}"))
    try:
        page.goto(url)
        if online:
            expect(page.locator("#status")).to_have_attribute("data-state", "online")
            expect(page.locator(".expert").first).to_be_attached()
        yield page
    finally:
        context.close()
    assert complaints == []


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with visit(browser, site.url) as page:
        yield page


def ask(page: Page, question: str, state: str = "done") -> Locator:
    """The answer to `question`, once it has come to `state`."""
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    answer = page.locator(".turn").last.locator(".answer").last
    expect(answer).to_have_attribute("data-state", state)
    return answer


def said(answer: Locator) -> str:
    return answer.locator(".answer-text").inner_text()


def bars(answer: Locator, block: str) -> list[list[str]]:
    """The rows of a block of bars: name and value."""
    rows = answer.locator(f".{block} .bar").all()
    return [[row.locator(f".bar-{part}").inner_text() for part in ("name", "value")] for row in rows]


def number(answer: Locator, name: str) -> str:
    return answer.locator(f'[data-figure="{name}"] dd').inner_text()


# ------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_grows_while_it_is_made_and_shows_who_makes_it(page: Page, site: Site) -> None:
    site.backend.pause_after = 3
    answer = ask(page, "17+25", "running")
    expect(answer.locator(".answer-text")).to_have_text("math:1 answers 17+25")
    expect(answer).to_have_attribute("aria-busy", "true")
    assert bars(answer, "alphas") == [["math v3", "1.00"]]
    assert number(answer, "Pass 2") == "…"
    site.on_loop(site.backend.go.set)
    expect(answer).to_have_attribute("data-state", "done")
    assert re.fullmatch(r"math:1 answers 17\+25 with( [a-z]+){8}", said(answer))
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announce")).to_have_text("The answer is complete.")


def test_reasoning_is_folded_above_its_answer_and_is_text(page: Page, site: Site) -> None:
    assert not ask(page, "1+2").locator(".reasoning").is_visible()
    site.backend.thinks, site.backend.says = True, ("<think>", "Hm <b>.", "</think>", "3")
    answer = ask(page, "1+2")
    assert said(answer) == "3"
    answer.get_by_text("Reasoning").click()
    assert answer.locator(".reasoning p").inner_text() == "Hm <b>."


def test_beside_an_answer_stand_alphas_probabilities_times_and_tokens(page: Page) -> None:
    answer = ask(page, "17+25")
    assert bars(answer, "alphas") == [["math v3", "1.00"]]
    assert bars(answer, "probabilities") == [
        ["math", "63.2 %"], ["others", "15.8 %"], ["code", "10.5 %"], ["pick", "10.5 %"]
    ]  # fmt: skip
    assert "cls chose math" in answer.locator(".probabilities h3").inner_text()
    assert number(answer, "Pass 1") == "4 ms"
    assert number(answer, "Pass 2").endswith(" ms")
    assert number(answer, "Tokens") == "1 in, 12 out"
    assert number(answer, "Model") == "t2ray"


def test_a_mixture_is_drawn_with_what_the_base_holds_and_a_layered_one_by_layer(page: Page, site: Site) -> None:
    site.backend.mixtures = {"deep": Mixture.of({"math": [0.5, 0.25, -0.25, 1.5], "code": -0.2})}
    with page.expect_response("**/v1/models"):
        page.reload()
    page.get_by_role("combobox").select_option("t2ray:fewshot/deep")
    answer = ask(page, "17+25")
    assert bars(answer, "alphas") == [["math v3", "≈ 0.50"], ["code v2", "−0.20"], ["base model", "0.70"]]
    assert answer.locator(".layers rect").count() == 4
    assert answer.locator(".probabilities").count() == 0
    assert number(answer, "Pass 1") == "none"


def test_moving_a_slider_asks_for_another_mixture_and_gets_another_answer(page: Page, site: Site) -> None:
    before = said(ask(page, "17+25"))
    page.get_by_label("Weight of math").fill("0.7")
    page.get_by_label("Weight of code").fill("0.3")
    expect(page.get_by_role("combobox")).to_have_value("hand")
    expect(page.locator("#model-in-use")).to_have_text("t2ray:math:0.7,code:0.3")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask again").click()
    assert sent.value.post_data_json["model"] == "t2ray:math:0.7,code:0.3"
    answers = page.locator(".answer")
    expect(answers).to_have_count(2)  # the first stays, to compare
    expect(answers.last).to_have_attribute("data-state", "done")
    assert said(answers.first) == before != said(answers.last)
    assert bars(answers.last, "alphas") == [["math v3", "0.70"], ["code v2", "0.30"]]
    assert site.backend.calls[-1][1] == Mixture.parse("math:0.7,code:0.3")
    page.get_by_role("button", name="All to 0").click()
    expect(page.locator("#model-in-use")).to_have_text("t2ray:base")


def test_whoever_is_chosen_is_asked(page: Page, site: Site) -> None:
    choice = page.get_by_role("combobox")
    values = choice.locator("option").evaluate_all("options => options.map((option) => option.value)")
    assert values == ["t2ray", "t2ray:prompt", "t2ray:cls", "t2ray:fewshot/sums", "t2ray:base", "hand"]
    for value in values[:-1]:
        choice.select_option(value)
        assert number(ask(page, "1+1"), "Model") == value
    assert [str(mixture) for _, mixture, _ in site.backend.calls] == ["math:1"] * 3 + ["code:0.2,math:0.7", "base"]


def test_the_conversation_is_sent_along_without_what_failed(page: Page, site: Site) -> None:
    first = said(ask(page, "one"))
    site.backend.failures["dispatch"] = GenerationError("its replica died")
    ask(page, "two", "failed")
    site.backend.failures.clear()
    ask(page, "three")
    sent = [(message.role, message.content) for message in site.backend.calls[-1][0]]
    assert sent == [("user", "one"), ("assistant", first), ("user", "three")]
    page.get_by_label("Send earlier turns along").uncheck()
    ask(page, "four")
    assert list(site.backend.calls[-1][0]) == [Message(role="user", content="four")]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_text("Ask, and see who answers.")).to_be_visible()


def test_sampling_is_what_the_controls_say_and_a_drawn_seed_is_shown(page: Page, site: Site) -> None:
    page.get_by_label("Temperature").fill("0.8")
    page.get_by_label("Max tokens").fill("5")
    answer = ask(page, "17+25")
    sampling = site.backend.calls[-1][2]
    assert (sampling.temperature, sampling.max_tokens) == (0.8, 5)
    assert number(answer, "Seed") == str(sampling.seed)
    expect(answer).to_contain_text("Cut at 5 tokens")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Max tokens").fill("")
    ask(page, "17+25")
    sampling = site.backend.calls[-1][2]
    assert sampling.seed == 7 and sampling.to_end


DROPPED = """([kind, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], "b.png", { type: "image/png" }));
  const given = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent(kind, { ...given, clipboardData: transfer })
    : new DragEvent(kind, { ...given, dataTransfer: transfer });
  document.getElementById("question").dispatchEvent(event);
}"""


def test_pictures_are_chosen_pasted_or_dropped_and_go_with_the_question(page: Page, site: Site) -> None:
    data = picture(40, 20, 1).data
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": data})
    for count, kind in ((1, "paste"), (2, "drop")):
        expect(page.locator("#tray img")).to_have_count(count)
        page.evaluate(DROPPED, [kind, base64.b64encode(data).decode()])
    expect(page.locator("#tray img")).to_have_count(3)
    page.get_by_label("Remove picture 2").click()
    expect(page.locator("#tray img")).to_have_count(2)
    ask(page, "17+25")
    expect(page.locator("#tray")).to_be_hidden()
    message = site.backend.calls[-1][0][-1]
    assert isinstance(message, Message) and message.text == "17+25" and len(message.images) == 2
    assert opened(message.images[0]).size == (40, 20)
    page.reload()
    expect(page.locator(".turn .pictures img")).to_have_count(2)


@pytest.mark.parametrize(("field", "value"), [("Max tokens", "0"), ("Max tokens", "2.5"), ("Seed", "-1")])
def test_a_number_that_cannot_be_used_is_told_and_neither_replaced_nor_sent(
    page: Page, site: Site, field: str, value: str
) -> None:
    number, told = page.get_by_label(field, exact=True), page.locator(".wrong:visible")
    number.fill(value)
    expect(told).to_contain_text(f"{field} is" if field != "Seed" else "A seed is")
    page.get_by_label("Your question").fill("17+25")
    page.keyboard.press("Enter")
    expect(number).to_be_focused()
    expect(number).to_have_value(value)
    expect(page.get_by_label("Your question")).to_have_value("17+25")
    assert page.locator(".answer").count() == 0 and site.backend.calls == []
    number.fill("3")
    expect(told).to_have_count(0)
    ask(page, "17+25")


def test_model_text_and_names_are_text_and_never_markup(page: Page, site: Site) -> None:
    attack = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    site.backend.experts["math"] = expert("math", domain=attack, problem=attack)
    page.reload()
    answer = ask(page, attack)
    assert attack in said(answer)
    page.get_by_role("button", name="math").click()
    expect(page.locator("#expert-details-math .failure")).to_have_text(attack)
    assert page.locator("img, #thread script, #experts script").count() == 0
    assert page.title() == "t2ray"


def answering(page: Page, text: str) -> None:
    """From now on every answer is `text`, in one piece."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


MARKDOWN = """## Sums

The *sum* of **17** and `25`:

1. seven and five
2. the carry
   - [x] kept

| n | square |
|---|-------:|
| 3 | 9 |

```python
def add(a, b):
    return a + b
```

> so \\(x\\)
"""


def test_markdown_is_shown_as_what_it_says_and_as_written_on_demand(page: Page) -> None:
    answering(page, MARKDOWN)
    answer = ask(page, "17+25")
    body = answer.locator(".answer-text")
    shown = {"h4": "Sums", "em": "sum", "strong": "17", "p > code": "25", "ol > li > ul > li": "☑ kept",
             "th[data-align=right]": "square", "td >> nth=0": "3", ".code span": "python", "blockquote": "so \\(x\\)",
             "pre": "def add(a, b):\n    return a + b"}  # fmt: skip
    for selector, text in shown.items():
        expect(body.locator(selector)).to_have_text(text)
    answer.get_by_role("button", name="As written").click()
    assert body.evaluate("body => body.textContent") == MARKDOWN
    assert body.locator("*").count() == 0
    answer.get_by_role("button", name="As written").click()
    expect(body.locator("strong")).to_have_text("17")


ATTACKS = [
    "<img src=x onerror=attack()>", "<script>attack()</script>", "<svg onload=attack()>", "<iframe srcdoc='<b>'>",
    "[a](javascript:attack())", "[a](JaVaScRiPt:attack())", "[a](&#106;avascript:attack())", "[a](data:text/html,x)",
    "[a](\x01javascript:attack())", "[a](//other.example/x)", "[a](/v1/experts)", "![a](javascript:attack())",
    "![a](https://other.example/x.png)", "<javascript:attack()>", "[a]: javascript:attack()\n\n[a]",
    '[a](https://x.example "onmouseover=attack()")', "`<b>`", "```html\n<script>attack()</script>\n```",
    "```<img/onerror=attack()>\nx\n```", "| <b>x</b> |\n|---|\n| <img src=x onerror=attack()> |",
    "<b onclick=attack()>x</b>",
    "&lt;script&gt;attack()&lt;/script&gt;", "<style>*{display:none}</style>", "<a href='javascript:attack()'>a</a>",
    "> " * 5000 + "deep", "- " * 3000 + "deep", "[" * 5000, "**" * 5000, "<!-- x", "constructor\n\n__proto__",
]  # fmt: skip
MADE = {"P", "A", "CODE", "PRE", "DIV", "SPAN", "BUTTON", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "UL", "LI",
        "BLOCKQUOTE", "STRONG", "EM", "BR", "HR"}  # fmt: skip


@pytest.mark.parametrize("batch", [ATTACKS[:10], ATTACKS[10:20], ATTACKS[20:]])
def test_no_answer_becomes_an_element_an_address_or_a_script_of_its_own(page: Page, batch: list[str]) -> None:
    page.evaluate("() => { window.attack = () => (document.title = 'attacked') }")
    for text in batch:
        answering(page, text)
        body = ask(page, "17+25").locator(".answer-text")
        made, links, attributes = body.evaluate(
            """body => { const all = [...body.querySelectorAll("*")]; return [
                all.map((node) => node.tagName), all.filter((node) => node.href).map((node) => node.href),
                all.flatMap((node) => node.getAttributeNames())] }"""
        )
        assert set(made) <= MADE, (text[:60], set(made) - MADE)
        assert all(link.startswith("https://") for link in links), (text[:60], links)
        assert not [name for name in attributes if name.startswith("on") or name in {"style", "src", "srcdoc"}]
        page.get_by_role("button", name="New conversation").click()
    assert page.title() == "t2ray"


def test_a_reload_leaves_the_conversation_the_strategy_and_the_sliders(page: Page, site: Site) -> None:
    first = said(ask(page, "one"))
    page.get_by_label("Weight of math").fill("0.7")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("9")
    page.get_by_label("Seed", exact=True).fill("4")
    site.backend.pause_after = 3
    second = ask(page, "two", "running")
    expect(second.locator(".answer-text")).to_contain_text("math:0.7 answers")
    half = said(second)
    page.reload()
    expect(page.locator("#model-in-use")).to_have_text("t2ray:math:0.7")
    expect(page.get_by_label("Weight of math")).to_have_value("0.7")
    assert [said(answer) for answer in page.locator(".answer").all()] == [first, half]
    expect(page.locator(".answer").last).to_have_attribute("data-state", "stopped")
    assert bars(page.locator(".answer").last, "alphas") == [["math v3", "0.70"], ["base model", "0.30"]]
    assert number(page.locator(".answer").last, "Seed") == "4"
    site.backend.pause_after = None
    ask(page, "three")
    prompt, mixture, sampling = site.backend.calls[-1]
    assert [message.content for message in prompt] == ["one", first, "two", half, "three"]
    assert (str(mixture), sampling.temperature, sampling.max_tokens, sampling.seed) == ("math:0.7", 0.5, 9, 4)
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    expect(page.get_by_text("Ask, and see who answers.")).to_be_visible()


def test_a_strategy_that_is_gone_after_a_reload_gives_way_to_the_automatic_one(page: Page, site: Site) -> None:
    page.get_by_role("combobox").select_option("t2ray:fewshot/sums")
    site.backend.mixtures.clear()
    page.reload()
    expect(page.get_by_role("combobox")).to_have_value("t2ray")


def test_a_question_is_edited_in_its_place_and_what_came_after_it_goes(page: Page, site: Site) -> None:
    first = said(ask(page, "one"))
    ask(page, "two")
    ask(page, "three")
    page.get_by_role("button", name="Edit").nth(1).click()
    field = page.get_by_label("Your question, to be asked anew")
    expect(field).to_have_value("two")
    expect(page.get_by_text("The turn after it will go.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".turn")).to_have_count(3)
    page.get_by_role("button", name="Edit").nth(1).click()
    field.fill("2")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".answer").last).to_have_attribute("data-state", "done")
    assert [message.content for message in site.backend.calls[-1][0]] == ["one", first, "2"]
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_role("heading", name="two")).to_have_count(0)


def test_the_code_that_is_shown_gives_the_answer_that_the_page_gives(page: Page, site: Site) -> None:
    page.get_by_label("Weight of math").fill("0.7")
    answer = said(ask(page, 'it\'s "17+25" $HOME \\n'))
    page.get_by_role("button", name="Use it from code").click()
    shell, python = page.get_by_role("dialog").locator("pre").all_inner_texts()
    page.get_by_role("button", name="Close").click()
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=GUARD_S)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == answer, done.stderr
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=GUARD_S)
    assert done.stdout.strip() == answer, done.stderr
    assert {str(mixture) for _, mixture, _ in site.backend.calls} == {"math:0.7"}


def test_the_examples_are_those_of_the_served_model(page: Page, site: Site) -> None:
    examples = page.locator("#examples button")
    expect(examples.first).to_contain_text("pencils")
    site.backend.base = "tiny"
    page.reload()
    expect(examples.first).to_have_text("17+25")
    examples.first.click()
    expect(page.locator(".answer")).to_have_attribute("data-state", "done")
    assert site.backend.calls[-1][0][-1].content == "17+25"


def test_copy_gives_the_answer(browser: Browser, site: Site) -> None:
    with visit(browser, site.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        answer = ask(page, "17+25")
        answer.get_by_role("button", name="Copy").click()
        expect(answer.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == said(answer)


# ------------------------------------------------------------------------------------------------- stopping and faults


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_aborts_on_the_server(page: Page, site: Site, way: str) -> None:
    site.backend.pause_after = 3
    answer = ask(page, "17+25", "running")
    expect(answer.locator(".answer-text")).to_have_text("math:1 answers 17+25")
    assert len(site.backend.running) == 1
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-state", "stopped")
    site.wait(site.backend.idle)
    assert len(site.backend.aborted) == 1
    assert said(answer) == "math:1 answers 17+25"  # what has come stays, and the next question can be asked
    site.backend.pause_after = None
    ask(page, "1+1")
    assert site.backend.calls[-1][0][1] == Message(role="assistant", content="math:1 answers 17+25")


def test_a_stream_that_breaks_says_why_and_can_be_tried_again(page: Page, site: Site) -> None:
    site.backend.break_after = 3
    site.backend.failures["stream"] = GenerationError("the replica that wrote this died")
    answer = ask(page, "17+25", "failed")
    expect(answer.get_by_role("alert")).to_contain_text("the replica that wrote this died")
    expect(answer.get_by_role("alert")).to_contain_text("Request")
    assert said(answer) == "math:1 answers 17+25"
    site.backend.failures.clear()
    site.backend.break_after = None
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator(".answer")).to_have_attribute("data-state", "done")


def test_a_stream_that_just_ends_is_not_taken_for_an_answer(page: Page) -> None:
    half = 'data: {"choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": null}]}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=half, content_type="text/event-stream"))
    answer = ask(page, "17+25", "failed")
    expect(answer.get_by_role("alert")).to_contain_text("closed the connection before its end")
    assert said(answer) == "4"


def test_a_refusal_is_said_with_what_the_server_said_of_it(page: Page, site: Site) -> None:
    site.backend.failures["dispatch"] = Busy("all replicas are busy")
    alert = ask(page, "17+25", "failed").get_by_role("alert")
    expect(alert).to_contain_text(re.compile(r"all replicas are busy.* Try again in \d+ s", re.DOTALL))


def test_a_killed_server_is_said_and_its_return_is_noticed(browser: Browser) -> None:
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "fake_backend.py"), "--port", str(port), "--pace", "0.5"]
        return subprocess.Popen(command, cwd=HERE.parent)

    def wait_for(server: subprocess.Popen[bytes]) -> None:
        while server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server ended with {server.returncode}")

    server = start()
    try:
        wait_for(server)
        with visit(browser, f"http://127.0.0.1:{port}/") as page:
            answer = ask(page, "17+25", "running")
            expect(answer.locator(".answer-text")).to_contain_text("math:1")
            server.kill()
            server.wait()
            expect(answer).to_have_attribute("data-state", "failed")
            expect(answer.get_by_role("alert")).to_contain_text("connection was lost")
            page.clock.fast_forward(POLL_MS)
            expect(page.locator("#status")).to_have_text("offline, trying again")
            expect(page.locator("#banner")).to_contain_text("The server does not answer")
            answer.get_by_role("button", name="Try again").click()
            expect(page.locator(".answer").get_by_role("alert")).to_contain_text("The server does not answer")
            server = start()
            wait_for(server)
            page.clock.fast_forward(POLL_MS)
            expect(page.locator("#status")).to_have_text("online")
            expect(page.locator("#banner")).to_be_hidden()
            page.get_by_label("Max tokens").fill("2")
            page.get_by_role("button", name="Try again").click()
            expect(page.locator(".answer")).to_have_attribute("data-state", "done")
    finally:
        server.kill()
        server.wait()


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2RAY_API_KEYS", f"user:{KEY}")
    with serving(ApiConfig()) as locked, visit(browser, locked.url, online=False) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        expect(page.locator("#status")).to_have_text("key needed")
        page.get_by_label("API key", exact=True).fill("no-such-key-at-all")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("this API key is not known")
        page.get_by_label("API key", exact=True).fill(f" {KEY} ")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#status")).to_have_text("online")
        expect(dialog).to_be_hidden()
        ask(page, "17+25")
        assert asked and not [address for address in asked if KEY in address]
        kept = page.evaluate("({...sessionStorage})")
        assert [name for name, value in kept.items() if KEY in value] == ["t2ray-key"]
        assert page.evaluate("document.cookie + JSON.stringify(localStorage) + location") == "{}" + locked.url
        page.reload()
        expect(page.locator("#status")).to_have_text("online")  # the tab still has it
        page.get_by_role("button", name="Key", exact=True).click()
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("#status")).to_have_text("key needed")
        assert KEY not in page.evaluate("JSON.stringify(sessionStorage)")


# -------------------------------------------------------------------------------------------------- experts and load


def test_an_expert_tells_its_facts_and_its_heat_is_fetched_when_it_is_opened(page: Page, site: Site) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    row = page.locator('.expert[data-name="math"]')
    expect(row).to_contain_text("v3")
    expect(row).to_contain_text("96 %")
    assert not [url for url in asked if "/v1/experts/" in url]
    opener = page.get_by_role("button", name="math")
    opener.click()
    expect(opener).to_have_attribute("aria-expanded", "true")
    expect(row.locator(".heat rect")).to_have_count(4 * 7)
    assert [url for url in asked if "/v1/experts/" in url] == [f"{site.url}v1/experts/math"]
    expect(row.get_by_role("img")).to_have_accessible_name(re.compile("^math: mean .* Largest: .* in layer"))
    opener.click()
    expect(row.locator(".heat")).to_be_hidden()


def test_an_expert_that_cannot_be_used_or_only_classifies_has_no_slider(page: Page, site: Site) -> None:
    site.backend.experts["code"] = expert("code", problem="its shape does not fit")
    page.reload()
    expect(page.locator('.expert[data-name="code"]')).to_contain_text("unavailable")
    assert page.locator("#experts input").evaluate_all("all => all.map((input) => input.id)") == [
        "expert-slider-math", "expert-slider-pick"
    ]  # fmt: skip
    page.locator("#expert-code").click()
    expect(page.locator("#expert-details-code")).to_contain_text("its shape does not fit")


def test_new_experts_appear_by_themselves_and_sliders_keep_their_place(page: Page, site: Site) -> None:
    page.get_by_label("Weight of math").fill("0.7")
    site.backend.experts |= {f"expert-{i}": expert(f"expert-{i}") for i in range(40)}
    page.clock.fast_forward(20_000)
    expect(page.locator(".expert")).to_have_count(44)
    expect(page.get_by_label("Weight of math")).to_have_value("0.7")
    page.get_by_label("Show the experts").fill("expert-3")
    expect(page.locator(".expert:visible")).to_have_count(11)


def test_the_load_is_the_servers(page: Page, site: Site) -> None:
    site.backend.pause_after = 3
    answer = ask(page, "17+25", "running")
    page.clock.fast_forward(POLL_MS)
    running = page.locator('#load-figures [data-figure="Running"] dd')
    expect(running).to_have_text("1")
    expect(page.locator("#load-rate")).to_have_text("8")
    site.on_loop(site.backend.go.set)
    expect(answer).to_have_attribute("data-state", "done")
    page.clock.fast_forward(POLL_MS)
    expect(running).to_have_text("0")
    expect(page.locator('#load-figures [data-figure="Requests"] dd')).to_have_text("1")


# ---------------------------------------------------------------------------------------------- keyboard and appearance


def test_the_keyboard_reaches_and_works_everything_and_shows_where_it_is(page: Page, site: Site) -> None:
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_attribute("data-state", "done")
    assert site.backend.calls[-1][0][-1].content == "first\nsecond"
    expect(page.get_by_label("Your question")).to_be_focused()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const at = document.activeElement;
              const shown = at.id === "question" ? at.closest(".field") : at;
              return [at.id || at.textContent.trim(), at === document.body || getComputedStyle(shown).outlineStyle];
            }"""
        )
        if name in reached:
            break
        assert outline != "none", f"{name} does not show that it has the focus"
        if name == "expert-slider-math":
            page.keyboard.press("ArrowRight")
        if name == "expert-code":
            page.keyboard.press("Enter")
        if outline is not True:
            reached.append(name)
    wanted = {
        *("Skip to the question", "fresh", "theme", "thread", "Edit", "Copy", "Ask again", "question", "send", "code"),
        *("strategy", "expert-math", "expert-slider-math", "expert-code", "temperature", "max-tokens"),
        *("seed", "memory"),
    }
    assert wanted <= set(reached), wanted - set(reached)
    expect(page.locator("#model-in-use")).to_have_text("t2ray:math:0.05")
    expect(page.locator("#expert-details-code .heat")).to_be_visible()


def test_everything_that_takes_input_has_a_name(page: Page) -> None:
    ask(page, "17+25")
    for control in page.locator("button, input, select, textarea, [role=img], [role=log]").all():
        expect(control).to_have_accessible_name(re.compile(r"\w")) if control.is_visible() else None


@pytest.mark.parametrize("width", [400, 860, 1600])
def test_nothing_is_wider_than_the_window(browser: Browser, site: Site, width: int) -> None:
    with visit(browser, site.url, viewport={"width": width, "height": 800}) as page:
        site.backend.experts["x" * 60] = expert("x" * 60)
        page.reload()
        expect(page.locator(".expert")).to_have_count(5)
        ask(page, "y" * 300 + " 17+25")
        narrow = page.get_by_role("button", name="Experts")
        for _ in range(2):
            for box in ("html", "#thread", "#panel"):
                wide, room = page.locator(box).evaluate("box => [box.scrollWidth, box.clientWidth]")
                assert wide <= room, f"{box} at {width} px is {wide} px wide"
            if narrow.is_visible():
                narrow.click()
                page.locator("#expert-math").click()
                expect(page.locator(".heat")).to_be_visible()


# Every visible text's colour against what lies behind it, every bar's against its track (WCAG 1.4.3 and 1.4.11): how
# many were judged, and those that fall short.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour.length < 4 || colour[3] === 1 ? colour : behind(node.parentElement);
  };
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const bad = [];
  let judged = 0;
  const judge = (what, colour, back, least) => {
    const [dark, bright] = [light(parse(colour)), light(back)].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < least) bad.push(`${what}: ${ratio.toFixed(2)}, not ${least}`);
    judged += 1;
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const [text, parent] = [walk.currentNode.data.trim(), walk.currentNode.parentElement];
    if (!text || !parent.checkVisibility() || parent.closest(".unseen, option, script, svg")) continue;
    judge(text.slice(0, 40), getComputedStyle(parent).color, behind(parent), 4.5);
  }
  const all = (selector) => document.querySelectorAll(selector);
  for (const text of all(".heat text")) judge("heat", getComputedStyle(text).fill, behind(text), 4.5);
  for (const box of all("input, textarea")) {
    judge(box.id, getComputedStyle(box, "::placeholder").color, behind(box.closest(".field") ?? box), 4.5);
  }
  for (const mark of all(".bar-fill, .swatch, .dot")) {
    judge(mark.className, getComputedStyle(mark).backgroundColor, behind(mark.parentElement), 3);
  }
  return [judged, bad];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_reading_needs(browser: Browser, site: Site, scheme: str) -> None:
    site.backend.experts |= {name: expert(name, problem="broken" if name == "e" else None) for name in "abcdef"}
    with visit(browser, site.url, color_scheme=scheme) as page:
        page.get_by_role("button", name="math").click()
        expect(page.locator(".heat")).to_be_visible()
        for name in "abcd":
            page.get_by_label(f"Weight of {name}", exact=True).fill("0.2")
        ask(page, "17+25")
        page.get_by_role("combobox").select_option("t2ray")
        ask(page, "17+25")
        site.backend.failures["dispatch"] = GenerationError("its replica died")
        ask(page, "17+25", "failed")
        page.evaluate("for (const id of ['banner', 'key']) document.getElementById(id).hidden = false")
        page.locator("#banner").evaluate("banner => banner.append('The server does not answer.')")
        page.locator("#key").click()
        judged, bad = page.evaluate(CONTRAST)
        assert judged > 100
        assert not bad
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", ground)[0]) < 128) == (scheme == "dark")


def test_the_colours_can_be_chosen_and_are_remembered(page: Page) -> None:
    button = page.locator("#theme")
    for wanted in ("light", "dark"):
        button.click()
        expect(page.locator("html")).to_have_attribute("data-theme", wanted)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    button.click()
    expect(page.locator("html")).not_to_have_attribute("data-theme", re.compile("."))


def test_nothing_moves_where_motion_is_not_wanted(browser: Browser, site: Site) -> None:
    moving = """() => [getComputedStyle(document.querySelector(".answer-text"), "::after").animationName,
                       getComputedStyle(document.querySelector(".bar-fill")).transitionDuration]"""
    for motion, wanted in (("reduce", ["none", "0s"]), ("no-preference", ["blink", "0.25s"])):
        backend = site.fresh()
        backend.pause_after = 2
        with visit(browser, site.url, reduced_motion=motion) as page:
            expect(ask(page, "17+25", "running").locator(".bar-fill").first).to_be_attached()
            assert page.evaluate(moving) == wanted


# ---------------------------------------------------------------------------------------------------------- screenshot


@pytest.mark.skipif("T2RAY_PAGE_PNG" not in os.environ, reason="needs T2RAY_PAGE_PNG (the picture to write)")
def test_screenshot(browser: Browser, site: Site) -> None:
    from PIL import Image

    url = os.environ.get("T2RAY_PAGE_URL", site.url)
    with visit(browser, url, color_scheme="light") as page:
        ask(page, "17+25")
        ask(page, "hello Anna, how are you?")
        page.get_by_role("button", name="math").click()
        expect(page.locator(".heat")).to_be_visible()
        page.get_by_label("Weight of math").fill("0.7")
        page.get_by_label("Weight of code").fill("0.1")
        ask(page, "17+8-5")
        picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(os.environ["T2RAY_PAGE_PNG"], optimize=True)
