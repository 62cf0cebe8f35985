"""The live page as a browser shows it: ``pytest -m browser``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from broker.core import BrokerConfig
from broker.protocol import encode
from broker.protocol import messages as m
from broker.service import Broker
from tests.broker.core.rig import model
from tests.broker.watch.browser import browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker(http="127.0.0.1:0", config=BrokerConfig(liveness_s=60.0)) as running:
        yield running


@pytest.fixture
def page(chromium: Any, broker: Broker) -> Iterator[Any]:
    """The page, open; at the end, whatever the browser complained of fails the test."""
    complaints: list[str] = []
    opened = chromium.new_page()
    opened.set_default_timeout(15_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    opened.goto(f"http://{broker.http_address}/")
    try:
        yield opened
        assert not complaints
    finally:
        opened.close()


@contextlib.contextmanager
def peer(endpoint: str, *messages: m.Message) -> Iterator[zmq.Socket[bytes]]:
    """Something that says these messages and stays."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(endpoint)
        for message in messages:
            socket.send_multipart(encode(message).frames)
        yield socket
    finally:
        context.destroy(linger=0)


def worker(name: str) -> m.WorkerHello:
    return m.WorkerHello(name, 1, model(), 2, ())


def requests(client: str, *numbers: int) -> list[m.Message]:
    ids = [m.RequestId(client, 1, number) for number in numbers]
    asked = [m.Request(id, "generate", "", 7, 100, "", "probs", 60.0, ()) for id in ids]
    return [m.ClientHello(client, 1, "job", 3), *asked]


def test_an_idle_broker_is_live_and_says_what_is_missing(page: Any) -> None:
    page.locator("#link", has_text="live").wait_for()
    assert page.locator("#warnings li").all_inner_texts() == ["no worker is attached"]
    assert page.locator("#clients").inner_text() == "no trainer is here"


def test_workers_ranks_and_queue_appear_as_they_come_and_go(page: Any, broker: Broker) -> None:
    page.locator("#warnings", has_text="no worker is attached").wait_for()
    with (
        peer(broker.client_endpoint, *requests("a", 1, 2, 3)),
        peer(broker.worker_endpoint, worker("first")) as socket,
    ):
        row = page.locator("#workers tbody tr", has_text="first")
        row.get_by_text("2 of 2").wait_for()
        assert "busy" in row.inner_text()
        rank = page.locator("#clients tbody tr", has_text="job").inner_text().split()
        assert rank[:5] == ["3", "job", "a", "7", "3"]
        assert page.locator("#warnings li").count() == 0
        socket.send_multipart(encode(m.Goodbye("enough")).frames)
        page.locator("#workers", has_text="no worker is attached").wait_for()


def test_rates_are_drawn(page: Any, broker: Broker) -> None:
    reply = m.Reply(
        *(m.RequestId("a", 1, 1), "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 0.5, "", ())
    )
    page.locator("#link", has_text="live").wait_for()
    with (
        peer(broker.client_endpoint, *requests("a", 1)),
        peer(broker.worker_endpoint, worker("w")) as socket,
    ):
        page.locator("#workers", has_text="1 of 2").wait_for()
        socket.send_multipart(encode(reply).frames)
        page.locator("#counters div", has_text="replies").get_by_text("1").wait_for()
        drawn = page.locator("#tiles svg polyline").first.get_attribute("points")
        heights = {point.split(",")[1] for point in drawn.split()}
        assert len(heights) > 1, "the reply is not to be seen"


def test_names_of_peers_are_text_and_nothing_else(page: Any, broker: Broker) -> None:
    name = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with peer(broker.worker_endpoint, worker(name)):
        page.locator("#workers", has_text="<img").wait_for()
        assert page.locator("#workers td").first.inner_text() == name
        assert page.locator("img").count() == 0


def test_a_broker_that_is_gone_is_said_to_be_gone(chromium: Any) -> None:
    opened = chromium.new_page()
    with Broker(http="127.0.0.1:0") as broker:
        opened.goto(f"http://{broker.http_address}/")
        opened.locator("#link[data-state=live]").wait_for(timeout=15_000)
    opened.locator("#link[data-state=lost]").wait_for(timeout=15_000)
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(chromium: Any, broker: Broker, scheme: str) -> None:
    """The contrast of every text is at least what WCAG 2 wants (AA, 4.5)."""
    opened = chromium.new_page(color_scheme=scheme)
    opened.goto(f"http://{broker.http_address}/")
    opened.locator("#warnings li").wait_for(timeout=15_000)
    low = opened.evaluate(
        """() => {
          const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
          const light = (color) => {
            const [r, g, b] = numbers(color).map((part) => {
              part /= 255;
              return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (element) => {
            for (; element; element = element.parentElement) {
              const color = getComputedStyle(element).backgroundColor;
              if (numbers(color)[3] !== 0) return color;
            }
          };
          return [...document.querySelectorAll("h1, h2, span, li, dt, dd, td, a, footer")]
            .filter((element) => element.textContent.trim())
            .map((element) => {
              const pair = [getComputedStyle(element).color, behind(element)].map(light).sort();
              return [element.textContent.trim(), (pair[1] + 0.05) / (pair[0] + 0.05)];
            })
            .filter(([, contrast]) => contrast < 4.5);
        }"""
    )
    opened.close()
    assert low == []
