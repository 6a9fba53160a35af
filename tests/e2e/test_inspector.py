"""The inspector in a browser: what a person does with it, in front of a running stack.

Screenshots are left in build/inspector. Without Chromium the test is skipped, or fails where NEED_CHROMIUM is set.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from qaq_core.models import LoadedModel
from services.common.embedded_redis import EmbeddedRedis
from tests.services.gateway.conftest import running_stack

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

PICTURES = Path(__file__).parents[2] / "build" / "inspector"
PATIENCE_S = 120
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1360,1140"),
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "needs Debian's packages chromium and chromium-driver"
        if "NEED_CHROMIUM" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    """What a person sees of the page, and does."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(f"return {script}", *arguments)

    def find(self, identifier: str) -> Any:
        return self.browser.find_element("id", identifier)

    def text(self, identifier: str) -> str:
        return str(self.find(identifier).text)

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, PATIENCE_S, 0.2).until(lambda _: holds(), what)

    def stop(self) -> None:
        """Ends the answer, if it has not ended by itself."""
        self.run("document.getElementById('stop').click()")
        self.until(lambda: not self.find("stop").is_displayed() and self.text("state") == "at rest", "the end")

    @property
    def kinds(self) -> list[str]:
        """How each token is tinted."""
        return list(self.run("[...document.querySelectorAll('.t')].map((token) => token.classList[1])"))

    @property
    def gauge(self) -> float:
        """Share of half precision that the cache takes, in percent."""
        return float(self.run("parseFloat(document.getElementById('held').style.width)"))

    @property
    def distance(self) -> float:
        """Nats between the cache and full precision over the last tokens; 0 before any is compared."""
        found = re.search(r"KL divergence (\S+) nats", self.text("shadow-text"))
        return float(found[1]) if found else 0.0

    @property
    def colours(self) -> int:
        """Colours of the map."""
        pixels = "const m = document.getElementById('heat'); const d = m.getContext('2d').getImageData(0, 0, m.width, "
        pixels += (
            "m.height).data; return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4*i, 4*i+3)+'')).size"
        )
        return int(self.browser.execute_script(pixels))

    def show(self, scheme: str, width: int, height: int, name: str) -> None:
        """Takes a picture of the page in a theme and a size, on which nothing may stick out."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert self.run("document.documentElement.scrollWidth <= innerWidth")
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.until(lambda: self.run("document.getAnimations().length === 0"), "the page to be still")
        self.browser.save_screenshot(str(PICTURES / f"{name}.png"))


def walk(page: Page, url: str) -> None:
    """From the empty page to a cache that shrinks and recovers."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.browser.get(f"{url}/")
    page.until(lambda: "context" in page.text("model"), "the model's name")
    assert not page.find("bits").is_enabled()
    page.find("shadow").click()
    page.find("example").click()
    page.find("prompt").send_keys(Keys.ENTER)
    page.until(lambda: page.find("stop").is_displayed(), "the answer to begin")
    page.until(lambda: {"b1", "b2", "b3", "exact"} & {*page.kinds} and page.find("bits").is_enabled(), "tinted tokens")
    seen = len(page.kinds)
    page.until(lambda: len(page.kinds) > seen, "more tokens")
    page.until(lambda: "over the last 32 tokens" in page.text("shadow-text"), "a comparison with full precision")
    near = page.distance
    page.stop()
    assert page.colours > 3
    assert "lemons" in page.text("tokens")

    before, held = page.kinds, page.gauge
    assert {"exact", "coming"} & {before[0], before[-1]}  # the first is a sink; the last is not computed yet
    page.find("bits").send_keys(Keys.HOME)
    page.until(lambda: page.gauge < 0.9 * held, "a smaller cache")
    assert "times its own price" in page.text("price")
    squeezed = page.kinds
    assert len(squeezed) == len(before)
    assert squeezed != before
    # The next answer is further from full precision.
    page.find("prompt").send_keys("Tell it again." + Keys.ENTER)
    page.until(lambda: page.distance > 2 * near, "a larger distance from full precision")
    page.stop()
    held = page.gauge
    page.find("bits").send_keys(Keys.END)
    page.until(lambda: page.gauge > 1.1 * held, "the bits to come back")
    page.until(lambda: "coming back" not in page.text("price"), "all bits")
    page.until(lambda: page.browser.find_elements("css selector", "#exceptions .answered"), "exceptions")
    assert "vectors asked for more bits" in page.text("totals")

    ActionChains(page.browser).move_to_element(
        page.browser.find_elements("css selector", ".t.b1, .t.b2, .t.b3")[0]
    ).perform()
    assert all(name in page.text("token") for name in ("key", "value", "attention", "age", "re-quantized"))
    pointed = page.text("token")
    page.find("tokens").send_keys(Keys.ARROW_RIGHT)
    assert page.text("token") != pointed
    page.find("heat").send_keys(Keys.ARROW_DOWN)
    assert page.text("cell").startswith("Layer 1, ")
    assert len(page.browser.find_elements("css selector", "#sessions .current")) == 1
    assert len(page.browser.find_elements("css selector", "#workers code")) == 1
    page.show("light", 1360, 1140, "light")
    page.show("dark", 1360, 1140, "dark")
    page.show("light", 390, 2300, "narrow")


async def test_a_person_watches_a_cache(
    browser: Any, redis: Redis, redis_server: EmbeddedRedis, shallow_smollm2: LoadedModel, model_path: Path
) -> None:
    async with running_stack(redis_server, shallow_smollm2, model_path, preset="balanced") as stack:
        await asyncio.to_thread(walk, Page(browser), stack.url)
        # The operator's list is refused without a key of one, which is how the page finds out.
        told = [each["message"] for each in browser.get_log("browser") if each["level"] == "SEVERE"]
        assert [each for each in told if "all_tenants=true" not in each] == []
        await asyncio.to_thread(browser.get, "about:blank")  # its streams end before the stack does
