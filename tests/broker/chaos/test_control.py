"""The HTTP control."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from broker.chaos.control import Control
from broker.chaos.faults import ChaosError
from broker.chaos.proxy import ChaosProxy
from tests.broker.chaos.conftest import Bench, ask


class Http:
    def __init__(self, address: str) -> None:
        self._address = address

    def __call__(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        url = f"http://{self._address}{path}"
        request = urllib.request.Request(url, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def proxy(bench: Bench) -> ChaosProxy:
    return bench.proxy()


@pytest.fixture
def http(proxy: ChaosProxy) -> Iterator[Http]:
    control = Control("127.0.0.1:0", proxy)
    control.start()
    yield Http(control.address)
    control.stop()


def test_status_shows_connections_and_counters(bench: Bench, proxy: ChaosProxy, http: Http) -> None:
    bench.talking(proxy)
    status, shown = http("GET", "/status")
    assert status == 200
    assert shown["listen"] == proxy.endpoints
    (connection,) = shown["connections"]
    assert (connection["number"], connection["bytes_up"]) == (1, len(b"hello"))
    assert shown["counters"]["accepted"] == 1
    assert set(shown["injected"].values()) == {0}


def test_faults_are_injected_shown_and_healed(bench: Bench, proxy: ChaosProxy, http: Http) -> None:
    client = bench.talking(proxy)
    stall = {"kind": "stall", "direction": "down"}
    assert http("POST", "/faults", stall) == (200, {"struck": 1})
    _, shown = http("GET", "/status")
    assert shown["active"] == [stall | {"connection": None}]
    assert shown["injected"]["stall"] == 1
    client.sendall(b"x")
    assert http("DELETE", "/faults") == (200, {"healed": True})
    assert client.recv(1) == b"x"


def test_cut_takes_all_or_those_that_are_named(bench: Bench, proxy: ChaosProxy, http: Http) -> None:
    clients = [bench.talking(proxy) for _ in range(4)]
    assert http("POST", "/cut", {"connection": 2, "how": "fin"}) == (200, {"struck": 1})
    assert clients[1].recv(1) == b""
    assert ask(clients[0], b"still") == b"still"
    assert http("POST", "/cut", {"connections": "newest", "how": "fin"}) == (200, {"struck": 1})
    assert clients[3].recv(1) == b""
    assert http("POST", "/cut") == (200, {"struck": 2})
    assert http("POST", "/cut", {"connection": 99}) == (200, {"struck": 0})


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "wanted"),
    [
        ("POST", "/faults", {"kind": "crash"}, 400, "'kind' is 'crash'; it must be one of cut"),
        ("POST", "/faults", {}, 400, "'kind' is missing"),
        ("POST", "/faults", {"kind": "cut", "at": 3}, 400, "there is no field 'at'"),
        ("POST", "/faults", b"{", 400, "the body is not JSON"),
        ("POST", "/faults", b"\xff", 400, "the body is not JSON"),
        ("POST", "/faults", [1], 400, "the body must be an object, not list"),
        ("POST", "/faults", b"[" * 50_000, 400, "the body is not JSON"),
        ("POST", "/cut", {"connection": "x"}, 400, "it must be a number from /status"),
        ("POST", "/cut", {"connection": True}, 400, "it must be a number from /status"),
        ("GET", "/faults", None, 405, "allowed: POST, DELETE"),
        ("GET", "/", None, 404, "there are /status, /faults and /cut"),
    ],
)
def test_wrong_requests_say_what_is_allowed(
    http: Http, method: str, path: str, body: object, status: int, wanted: str
) -> None:
    code, said = http(method, path, body)
    assert code == status
    assert wanted in said["error"]


def test_an_address_that_is_taken_is_said(proxy: ChaosProxy) -> None:
    taken = proxy.endpoint.removeprefix("tcp://")
    with pytest.raises(ChaosError, match="give --control HOST:PORT"):
        Control(taken, proxy)
