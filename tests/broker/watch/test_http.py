from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import zmq

from broker.errors import BrokerError
from broker.protocol import encode
from broker.protocol import messages as m
from broker.service import Broker
from broker.watch.http import HttpServer, text
from tests.waiting import eventually


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the HTTP port of a broker where nobody is."""
    with Broker(http="127.0.0.1:0") as broker:
        assert broker.http_address is not None
        yield broker.http_address


@pytest.fixture(autouse=True)
def _nothing_left_open() -> None:
    """The broker of this module outlives each test."""


def get(
    address: str, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/", 200, "text/html; charset=utf-8"),
        ("/healthz", 200, "text/plain; charset=utf-8"),
        ("/readyz", 503, "text/plain; charset=utf-8"),
        ("/status", 200, "application/json"),
        ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8"),
        ("/trace", 200, "application/json"),
        ("/nothing", 404, "text/plain; charset=utf-8"),
        ("/../etc/passwd", 404, "text/plain; charset=utf-8"),
    ],
)
def test_pages_and_their_kinds(address: str, path: str, status: int, kind: str) -> None:
    got, headers, body = get(address, path)
    assert (got, headers["Content-Type"]) == (status, kind)
    assert body
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(address: str, method: str) -> None:
    assert get(address, "/status", method)[0] == 405


def test_a_head_has_no_body(address: str) -> None:
    status, headers, body = get(address, "/status", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_status_is_json_with_a_clock_for_rates(address: str) -> None:
    first, second = (json.loads(get(address, "/status")[2]) for _ in range(2))
    assert first["now_s"] < second["now_s"]
    assert first["uptime_s"] > 0


def test_openmetrics_is_served_to_those_who_ask(address: str) -> None:
    _, headers, body = get(address, "/metrics", Accept="application/openmetrics-text")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_the_page_is_one_file_and_the_policy_admits_only_its_own_script_and_style(
    address: str,
) -> None:
    _, headers, body = get(address, "/")
    html = body.decode()
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", html)
    assert not re.search(r"""\son\w+=|\sstyle=""", html)  # the policy would stop these


def test_a_server_leaves_nothing_behind_though_a_browser_keeps_its_connection() -> None:
    before = threading.active_count()
    server = HttpServer("127.0.0.1:0", {"/": lambda environ: text("here")})
    server.start()
    kept = http.client.HTTPConnection(server.address, timeout=10)
    kept.request("GET", "/")
    assert kept.getresponse().read() == b"here\n"
    server.stop()
    assert threading.active_count() == before
    assert kept.sock.recv(1) == b""
    kept.close()


def test_a_server_that_another_thread_wakes_as_it_stops_stops_all_the_same() -> None:
    server = HttpServer("127.0.0.1:0", {})
    server.start()
    with server._trigger.lock:  # as ``stop`` does, but for its own wake-up
        server._trigger.thunks.append(server._leave)
    server._trigger.pull_trigger()
    server._thread.join(timeout=5)
    assert not server._thread.is_alive()
    server._trigger.pull_trigger()  # that comes now; its descriptor must not be another's
    server._trigger.close()


def test_a_name_with_several_addresses_is_listened_on() -> None:
    server = HttpServer("127.0.0.1:0 127.0.0.2:0", {"/": lambda environ: text("here")})
    server.start()
    assert get(server.address, "/")[0] == 200
    server.stop()


def test_a_page_that_breaks_is_an_error_and_the_next_is_served() -> None:
    def broken(environ: object) -> tuple[str, str, bytes]:
        raise RuntimeError("as planned")

    server = HttpServer("127.0.0.1:0", {"/broken": broken, "/": lambda environ: text("here")})
    server.start()
    try:
        assert [get(server.address, path)[0] for path in ("/broken", "/")] == [500, 200]
    finally:
        server.stop()


def test_an_address_that_is_taken_is_an_error_that_says_so(address: str) -> None:
    with pytest.raises(BrokerError, match=f"cannot serve HTTP on '{address}'"):
        HttpServer(address, {})


def test_serving_http_loads_no_torch() -> None:
    program = "import broker.watch.pages, broker.service, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_loop_that_stands_still_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.service._STANDS_S", 0.2)
    with Broker(http="127.0.0.1:0") as broker, zmq.Context() as context:
        address = broker.http_address
        assert address is not None
        assert get(address, "/healthz")[0] == 200
        with broker._lock, context.socket(zmq.DEALER) as dealer:  # as a handler without an end
            dealer.linger = 0
            dealer.connect(broker.client_endpoint)
            dealer.send(encode(m.ClientHello("rank0", 1, "", 0)).frames[0])
            eventually(lambda: get(address, "/healthz")[0] == 503)
            assert get(address, "/status")[0] == 503
        eventually(lambda: get(address, "/healthz")[0] == 200)
