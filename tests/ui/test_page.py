"""The page in headless Chromium over a made-up fleet: what it shows, as it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ui.browser import Server, opened
from tests.ui.fleet import FakeFleet
from tests.ui.test_hub import page_app

_WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as running:
        yield running


class Shown:
    """A page on a fleet of its own; anything the browser complains of fails the test."""

    def __init__(self, browser: Any, fleet: FakeFleet, **settings: Any) -> None:
        self.fleet = fleet
        self.complaints: list[str] = []
        self.server = Server(lambda: page_app(fleet, every_s=0.05))
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(_WAIT_MS)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(self.server.url + "/ui")

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and "ERR_" not in message.text:
            self.complaints.append(message.text)

    def expect(self, script: str) -> None:
        """Until the expression is true in the page."""
        deadline = time.monotonic() + _WAIT_MS / 1000
        while not self.page.evaluate(script):  # wait_for_function is code from text: CSP forbids
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def close(self) -> None:
        self.context.close()
        self.server.stop()
        assert self.complaints == []


@pytest.fixture
def shown(browser: Any) -> Iterator[Shown]:
    page = Shown(browser, FakeFleet(), viewport={"width": 1200, "height": 900})
    yield page
    page.close()


def test_a_replica_that_moves_is_seen_moving(shown: Shown) -> None:
    shown.expect("document.getElementById('connection').textContent === 'live'")
    shown.page.select_option("#layer", "3")
    shown.expect("document.getElementById('heat').dataset.layer === '3'")
    cell = "[aria-label^='expert 7 on g2:']"
    absent = "[aria-label='expert 7: no replica on g2']"
    shown.page.wait_for_selector(absent)
    shown.fleet.add(3, 7, 2, "layer 3 was slowest")
    shown.fleet.look()
    shown.page.wait_for_selector(cell)
    said = shown.page.get_attribute(cell, "aria-label")
    assert "50 % of its load, 2 replicas" in said
    assert "fresh" in shown.page.get_attribute(cell, "class")
    shown.expect("document.getElementById('events').innerText.includes('expert 7 added on g2')")
    shown.fleet.drop(3, 7, 1)
    shown.fleet.look()
    shown.page.wait_for_selector("[aria-label='expert 7: no replica on g1']")
    assert "100 % of its load" in shown.page.get_attribute(cell, "aria-label")
    assert shown.text("#events li:first-child").endswith("layer 3 expert 7 removed from g1")
    shown.page.click(cell)
    shown.expect("document.getElementById('detail').textContent.includes('layer 3 was slowest')")
    shown.expect("document.getElementById('subtitle').textContent.includes('epoch 3')")


def test_a_group_that_dies_and_comes_back(shown: Shown) -> None:
    shown.expect("document.querySelectorAll('#fleet .state.ready').length === 3")
    shown.fleet.rows[1] |= {"state": "lost", "deaths": 1, "last_error": "killed <b>now</b>"}
    shown.fleet.look()
    shown.expect("document.querySelectorAll('#fleet .state.lost').length === 1")
    assert shown.text("#tile-groups") == "2 of 3"
    assert shown.text("#events li.alarm .text") == "group g1 was lost: killed <b>now</b>"
    shown.fleet.rows.append(shown.fleet.group("g3"))
    wider = shown.fleet.resident
    shown.fleet.resident = wider[:, :, [0, 1, 2, 2]] & [True, True, True, False]
    shown.fleet.rows[1] |= {"state": "ready"}
    shown.fleet.epoch += 1
    shown.fleet.look()
    shown.expect("document.querySelectorAll('#fleet .state.ready').length === 4")
    shown.expect("document.querySelectorAll('#heat [role=rowheader]').length === 4")


def test_keyboard_and_names_for_screen_readers(shown: Shown) -> None:
    shown.page.wait_for_selector("#heat [role=gridcell]")
    page = shown.page
    page.focus("#heat [tabindex='0']")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "End"):
        page.keyboard.press(key)
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused) == "expert 15 on g0: " + page.evaluate(focused).split(": ")[1]
    assert page.inner_text("#detail") == page.evaluate(focused)
    page.keyboard.press("Enter")
    shown.expect("document.getElementById('detail').textContent.includes('placed at start')")
    assert page.locator("#heat [tabindex='0']").count() == 1, "one stop for the tab key"
    for chart in page.locator(".chart svg").all():
        assert chart.get_attribute("aria-label")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, select')].filter(e => "
        "!e.getAttribute('aria-label') && !(e.labels && e.labels.length)).length"
    )
    assert nameless == 0


def test_a_controller_that_is_away_and_a_connection_that_is_lost(shown: Shown) -> None:
    pill = "document.getElementById('connection').textContent"
    shown.expect(f"{pill} === 'live'")
    shown.fleet.away = True
    shown.expect(f"{pill} === 'controller away'")
    assert "What you see is old" in shown.text("#notice")
    assert shown.page.locator("#fleet tbody tr").count() == 3, "what was known stays"
    shown.fleet.away = False
    shown.expect(f"{pill} === 'live'")
    shown.server.stop()
    shown.expect(f"{pill} === 'connection lost'")
    shown.fleet.add(0, 0, 1)
    shown.fleet.look()
    shown.server.start()
    shown.expect(f"{pill} === 'live'")
    shown.expect("document.getElementById('events').innerText.includes('expert 0 added on g1')")
    assert shown.page.is_hidden("#notice")


def test_before_anything_is_known(browser: Any) -> None:
    fleet = FakeFleet()
    fleet.rows, fleet.resident = [], np_empty(fleet)
    fleet.observer = type(fleet.observer)()
    page = Shown(browser, fleet)
    page.expect("document.getElementById('fleet').innerText.includes('there are no groups')")
    page.expect("document.getElementById('heat').innerText.includes('no expert has')")
    assert "collecting" in page.text("#chart-tokens")
    page.close()


def test_a_controller_that_was_never_heard_of(browser: Any) -> None:
    fleet = FakeFleet()
    fleet.away = True
    page = Shown(browser, fleet)
    page.expect("document.getElementById('connection').textContent === 'controller away'")
    assert "old" not in page.text("#notice"), "there is nothing yet that could be old"
    for place in ("#fleet", "#heat"):
        assert "waiting for the placement controller" in page.text(place)
    page.close()


def np_empty(fleet: FakeFleet) -> Any:
    return fleet.resident[:, :, :0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1920])
def test_nothing_sticks_out_and_text_can_be_read(browser: Any, scheme: str, width: int) -> None:
    fleet = FakeFleet(layers=2, experts=64, groups=8)
    fleet.rows[2] |= {"state": "lost", "deaths": 1}
    fleet.look()
    page = Shown(browser, fleet, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.page.wait_for_selector("#heat [role=gridcell]")
    page.page.wait_for_selector("#events .alarm")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in (".muted", "td", ".pill", ".state.ready", ".state.lost", ".alarm .text", "a"):
        ratio = page.page.evaluate(CONTRAST, selector)
        assert ratio >= 4.5, f"{selector}: {ratio:.2f}"
    page.close()


# WCAG 2's contrast of the first visible match with the background it is on
CONTRAST = """selector => {
  const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = [...document.querySelectorAll(selector)].find(e => e.offsetParent);
  let behind = element, ground = [0, 0, 0, 0];
  while (behind && (ground[3] === 0)) {
    const found = rgb(getComputedStyle(behind).backgroundColor);
    ground = found.length === 3 ? [...found, 1] : found;
    behind = behind.parentElement;
  }
  const [a, b] = [light(rgb(getComputedStyle(element).color)), light(ground)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
