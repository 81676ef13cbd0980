"""The chat page in a real browser: Chromium by Selenium, where there is one."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from nkat.lm.load import LoadedModel
from tests.support.serving import Paced, Running, load_served, running, wait_until, write_model

pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install nkat[serve]")
webdriver: Any = pytest.importorskip("selenium.webdriver", reason="drives the browser: pip install selenium")

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium with a chromedriver here (Debian: apt install chromium-driver)"
)
HOSTILE = "<img src=x onerror=\"document.title='hit'\">"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_served(write_model(tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en", "--window-size=1000,800"):
        options.add_argument(flag)
    if sys.platform == "linux":
        options.add_argument("--no-sandbox")  # which root and containers cannot have
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


class Page:
    """What a person does with it."""

    def __init__(self, browser: Any, server: Running) -> None:
        self.browser, self.server = browser, server
        browser.get(f"{server.url}/")
        wait_until(lambda: self.all("#model option") or self.text("#problem"))

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.browser.find_element("css selector", selector).text

    def set(self, selector: str, value: object) -> None:
        """As if it were typed or moved there."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input')); "
        script += "arguments[0].dispatchEvent(new Event('change'))"
        self.browser.execute_script(script, self.all(selector)[0], str(value))

    def send(self, text: str) -> None:
        self.all("#prompt")[0].send_keys(text + "\n")

    def click(self, selector: str) -> None:
        self.all(selector)[0].click()

    def answers(self) -> list[str]:
        return [each.get_property("textContent") for each in self.all("li.assistant p")]

    def about(self) -> str:
        """What is said below the last answer, once it is there."""
        wait_until(lambda: not self.all("li[aria-busy]") and self.all("li.assistant:last-child small"))
        return self.all("li.assistant:last-child small")[0].text


def settings(page: Page) -> None:
    page.click("summary")
    page.set("#temperature", 0)
    page.set("#most", 12)


def test_a_chat_with_each_strength_of_theta(browser: Any, loaded: LoadedModel) -> None:
    with running(loaded, listed=(0.9,)) as server:
        page = Page(browser, server)
        assert [each.text for each in page.all("#model option")] == ["tiny", "tiny:base", "tiny:gamma=0.9"]
        settings(page)
        page.send("the hen and the inn")
        assert re.fullmatch(r"tiny · γ 0\.5 · \d+ tokens · [\d.]+ s", page.about())
        page.set("#gamma", 0.9)  # the same question, live
        assert page.text("#shown") == "γ 0.90"
        page.click("#again")
        wait_until(lambda: len(page.answers()) == 2)
        assert page.about().startswith("tiny:gamma=0.9 · γ 0.9 · ")
        page.set("#model", "tiny:base")
        assert not page.all("#strength")[0].is_displayed()
        page.click("#again")
        wait_until(lambda: len(page.answers()) == 3)
        assert page.about().startswith("tiny:base · without Θ · ")
        assert len(set(page.answers())) == 3
        page.set("#model", "tiny")
        page.send("and more")
        wait_until(lambda: len(page.answers()) == 4)
        page.about()
        prompts = [int(re.search(r"prompt (\d+)", line)[1]) for line in server.log if "/chat/" in line]
        assert prompts[0] == prompts[1] == prompts[2] < prompts[3]  # the conversation grew by what was said last
        page.click("#fresh")
        assert page.all("li") == []
        complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert complaints == []


def test_what_is_said_is_text(browser: Any, loaded: LoadedModel) -> None:
    with running(loaded) as server:
        page = Page(browser, server)
        settings(page)
        page.send(HOSTILE)
        page.about()
        assert page.text("li.user p") == HOSTILE
        assert page.all("img") == []
        assert browser.title == "NKAT"


def test_stop_and_what_goes_wrong(browser: Any, loaded: LoadedModel) -> None:
    paced = Paced()
    with running(loaded, paced) as server:
        page = Page(browser, server)
        page.send("Hello")
        for _ in range(3):
            paced.steps.release()
        wait_until(lambda: page.answers() == ["aaa"])
        assert not page.all("#send")[0].is_displayed()
        page.click("#stop")
        wait_until(lambda: paced.given_up == 1)
        assert page.about().endswith("stopped")
        paced.failure = RuntimeError("broken")
        page.send("Hello")
        wait_until(lambda: len(page.answers()) == 2)
        assert "failed to answer" in page.about()
        paced.failure = None
    page.send("Hello")
    wait_until(lambda: len(page.answers()) == 3)
    assert page.about() == "The server cannot be reached"


def test_a_key_is_asked_for(browser: Any, loaded: LoadedModel) -> None:
    with running(loaded, Paced(), keys=("the-key",)) as server:
        page = Page(browser, server)
        assert page.text("#problem") == "Give the API key in the settings"
        assert page.all("#key")[0].is_displayed()
        page.set("#key", "the-key")
        wait_until(lambda: page.all("#model option"))
        assert page.text("#problem") == ""


CONTRASTS = """
const parse = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (c) => { const [r, g, b] = parse(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const back = (e) => { for (;;) { const c = getComputedStyle(e).backgroundColor;
  if (c !== "rgba(0, 0, 0, 0)" || !e.parentElement) return c; e = e.parentElement; } };
return [...document.querySelectorAll("h1, label, summary, select, button, textarea, li p, li small")].map((e) => {
  const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
  return [e.outerHTML.slice(0, 60), (a + 0.05) / (b + 0.05)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_used_by_all(browser: Any, loaded: LoadedModel, scheme: str) -> None:
    """Contrast by WCAG 2 (AA: 4.5), names for those who cannot see it, and a phone's width."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        with running(loaded) as server:
            page = Page(browser, server)
            settings(page)
            page.send("the hen and the inn")
            page.about()
            contrasts = browser.execute_script(CONTRASTS)
            assert len(contrasts) > 12
            assert [pair for pair in contrasts if pair[1] < 4.5] == []
            dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
            assert dark == (scheme == "dark")
            for each in page.all("select, input, textarea, button, [role=log]"):
                assert not each.is_displayed() or each.accessible_name, each.get_attribute("id")
            size = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
            assert page.all("#send")[0].is_displayed()
            bottom = browser.execute_script("return document.getElementById('send').getBoundingClientRect().bottom")
            assert bottom <= 640
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_speaks_japanese_too(browser: Any, loaded: LoadedModel) -> None:
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "ja"})
    try:
        with running(loaded, Paced(), keys=("the-key",)) as server:
            page = Page(browser, server)  # which opens the settings, to be given a key
            assert browser.execute_script("return document.documentElement.lang") == "ja"
            words = [each.text for each in page.all("[data-say]") if each.is_displayed()] + [page.text("#problem")]
            assert len(words) > 8
            assert all(re.search("[ぁ-んァ-ン一-龯]", word) for word in words), words
    finally:
        browser.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en"})
