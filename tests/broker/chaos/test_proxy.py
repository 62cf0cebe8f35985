"""Each fault on real sockets, between a client and a server that echoes."""

from __future__ import annotations

import contextlib
import random
import socket
import time

import pytest

from broker.chaos.faults import ChaosError, How, Which, read_fault
from broker.chaos.proxy import ChaosProxy
from tests.broker.chaos.conftest import Bench, ask, read, silent
from tests.waiting import eventually

MIB = 1 << 20


def test_without_faults_every_byte_passes_unchanged_both_ways(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.client(proxy)
    data = random.Random(0).randbytes(100_000)
    for _ in range(40):
        assert ask(client, data) == data
    assert proxy.snapshot()["counters"]["bytes_up"] == 4_000_000


def test_the_end_of_one_way_passes_and_the_other_goes_on(bench: Bench) -> None:
    client = bench.talking(bench.proxy())
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert read(client, 11) == b"last words"
    eventually(lambda: bench.echo.endings == ["fin"])


def test_backpressure_reaches_the_sender(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):  # nobody reads what comes back
        client.sendall(bytes(256 * MIB))
    assert proxy.snapshot()["counters"]["bytes_up"] < 128 * MIB


@pytest.mark.parametrize("how", list(How))
def test_cut_ends_both_sides_in_the_way_that_was_asked_for(bench: Bench, how: How) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    assert proxy.cut(how=how) == 1
    if how is How.RST:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        assert client.recv(1) == b""
    eventually(lambda: bench.echo.endings == [how.value])
    eventually(lambda: proxy.snapshot()["connections"] == [])
    assert bench.talking(proxy)


def test_one_of_several_is_cut_and_the_newest_when_that_is_asked(bench: Bench) -> None:
    proxy = bench.proxy()
    clients = [bench.talking(proxy) for _ in range(4)]
    assert proxy.cut(Which.NEWEST, How.FIN) == 1
    assert clients.pop().recv(1) == b""
    assert proxy.cut(Which.ONE, How.FIN) == 1
    eventually(lambda: len(proxy.snapshot()["connections"]) == 2)
    assert sum(not silent(client, 0.02) for client in clients) == 1


def test_a_stall_keeps_everything_and_loses_nothing(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    proxy.inject(read_fault({"kind": "stall", "direction": "down"}))
    client.sendall(b"waits")
    eventually(lambda: bench.echo.received.endswith(b"waits"))
    assert silent(client, 0.2)
    proxy.heal()
    assert read(client, 5) == b"waits"


def test_a_stall_ends_by_itself(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    began = time.monotonic()
    proxy.inject(read_fault({"kind": "stall", "for": 0.3}))
    assert ask(client, b"back") == b"back"
    assert 0.3 <= time.monotonic() - began < 3


def test_a_throttle_holds_its_rate(bench: Bench) -> None:
    proxy = bench.proxy({"kind": "throttle", "at": 0, "bytes_per_s": 100_000, "direction": "up"})
    client = bench.client(proxy)
    began = time.monotonic()
    assert ask(client, bytes(50_000)) == bytes(50_000)
    assert 0.45 <= time.monotonic() - began < 3


def test_a_delay_keeps_order_and_does_not_add_up(bench: Bench) -> None:
    proxy = bench.proxy({"kind": "delay", "at": 0, "delay_s": 0.1, "jitter_s": 0.05})
    client = bench.client(proxy)
    began = time.monotonic()
    for number in range(50):
        client.sendall(bytes([number]))
        time.sleep(0.002)
    assert read(client, 50) == bytes(range(50))
    assert 0.2 <= time.monotonic() - began < 2


def test_truncate_forwards_a_part_and_cuts(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    proxy.inject(read_fault({"kind": "truncate", "direction": "up"}))
    client.sendall(bytes(1000))
    eventually(lambda: bench.echo.endings == ["rst"])
    assert len(bench.echo.received) < len(b"hello") + 1000


def test_corrupt_flips_as_many_bits_as_it_says(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    proxy.inject(read_fault({"kind": "corrupt", "direction": "down"}))
    got = ask(client, bytes(1000))
    assert int.from_bytes(got).bit_count() == 1
    assert ask(client, bytes(1000)) == bytes(1000)


def test_half_close_tells_one_side_that_no_more_comes(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    proxy.inject(read_fault({"kind": "half-close", "direction": "up"}))
    eventually(lambda: bench.echo.endings == ["fin"])
    assert client.recv(1) == b""  # the echo server closes, too


def test_refuse_closes_new_connections_and_leaves_the_old(bench: Bench) -> None:
    proxy = bench.proxy()
    client = bench.talking(proxy)
    proxy.inject(read_fault({"kind": "refuse"}))
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        ask(bench.client(proxy), b"?")
    assert ask(client, b"still here") == b"still here"
    proxy.heal()
    assert bench.talking(proxy)
    assert proxy.snapshot()["counters"]["refused"] == 1


def test_a_blackhole_swallows_and_what_lost_bytes_never_comes_back(bench: Bench) -> None:
    proxy = bench.proxy()
    lost, spared = bench.talking(proxy), bench.talking(proxy)
    proxy.inject(read_fault({"kind": "blackhole"}))
    lost.sendall(b"gone")
    eventually(lambda: proxy.snapshot()["counters"]["bytes_swallowed"] == 4)
    proxy.heal()
    lost.sendall(b"gone, too")
    assert silent(lost, 0.2)
    assert ask(spared, b"nothing was lost here") == b"nothing was lost here"
    lost.close()
    eventually(lambda: bench.echo.endings == ["rst"])


def test_a_reset_passes_on(bench: Bench) -> None:
    client = bench.talking(bench.proxy())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    eventually(lambda: bench.echo.endings == ["rst"])


def test_an_upstream_that_is_not_there_is_counted_and_waited_for(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with ChaosProxy(upstream=f"tcp://127.0.0.1:{port}") as proxy:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            ask(bench.client(proxy), b"?")
        assert proxy.snapshot()["counters"]["upstream_failed"] == 1
        with socket.create_server(("127.0.0.1", port)) as upstream:
            client = bench.client(proxy)
            client.sendall(b"now")
            upstream.settimeout(10)
            accepted, _ = upstream.accept()
            assert read(accepted, 3) == b"now"
            accepted.close()


def test_two_pairs_in_one_proxy_and_a_rule_for_one(bench: Bench) -> None:
    ends = [bench.echo.endpoint] * 2
    with ChaosProxy(["tcp://127.0.0.1:0"] * 2, ends) as proxy:
        first, second = (bench.client(endpoint) for endpoint in proxy.endpoints)
        assert ask(first, b"1") + ask(second, b"2") == b"12"
        assert proxy.cut(how=How.FIN, pair=2) == 1
        assert second.recv(1) == b""
        assert ask(first, b"on") == b"on"


def test_the_same_seed_corrupts_the_same_bits(bench: Bench) -> None:
    def corrupted(seed: int) -> bytes:
        rule = {"kind": "corrupt", "per_mib": 30, "direction": "up"}
        return ask(bench.client(bench.proxy(rule, seed=seed)), bytes(MIB // 4))

    assert corrupted(5) == corrupted(5) != corrupted(6)


def test_many_connections_that_come_and_go_leave_nothing_behind(bench: Bench) -> None:
    proxy = bench.proxy({"kind": "cut", "every": 0.01, "connections": "one"})
    for _ in range(200):
        with contextlib.suppress(OSError), contextlib.closing(bench.client(proxy)) as client:
            ask(client, b"x" * 100)
    eventually(lambda: not proxy.snapshot()["connections"])
    assert proxy.snapshot()["counters"]["accepted"] == 200
    assert not proxy._plan.connections


@pytest.mark.parametrize(
    ("listen", "upstream", "wanted"),
    [
        ("127.0.0.1:5555", "tcp://127.0.0.1:1", "'127.0.0.1:5555' is no address; write tcp://"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:x", "'tcp://127.0.0.1:x' is no address"),
        ("tcp://127.0.0.1:0", [], "there are 1 and 0"),
        ("tcp://0.0.0.0:0", "tcp://127.0.0.1:1", "say --insecure"),
    ],
)
def test_wrong_addresses_are_refused(listen: str, upstream: str, wanted: str) -> None:
    with pytest.raises(ChaosError) as error:
        ChaosProxy(listen, upstream)
    assert wanted in str(error.value)


def test_an_address_that_is_taken_is_said(bench: Bench) -> None:
    taken = bench.proxy().endpoint
    with pytest.raises(ChaosError, match="choose another --listen"), ChaosProxy(taken, taken):
        pass
