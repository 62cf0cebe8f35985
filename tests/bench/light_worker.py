"""``python -m tests.bench.light_worker BROKER DIRECT``: answers at once, on two ways.

It is attached to the broker, and a client may also connect to it at ``DIRECT``, with nothing in
between. Ended by a signal.
"""

from __future__ import annotations

import sys
import time

import zmq

from broker.protocol import encode
from broker.protocol import messages as m
from broker.protocol.names import new_incarnation
from tests.bench.light import MODEL, dealer, packets, reply_to

#: As many as are ever asked for at once here, so that the broker never waits for a credit.
_CREDITS = 16
_HEARTBEAT_S = 1.0


def main(broker: str, direct: str) -> None:
    context = zmq.Context()
    attached, bound = dealer(context), dealer(context)
    attached.connect(broker)
    bound.bind(direct)
    hello = encode(m.WorkerHello("light", new_incarnation(), MODEL, _CREDITS, ()))
    attached.send_multipart(hello.frames)
    poller = zmq.Poller()
    poller.register(attached, zmq.POLLIN)
    poller.register(bound, zmq.POLLIN)
    beats_at = time.monotonic() + _HEARTBEAT_S
    while True:
        poller.poll(1000 * _HEARTBEAT_S)
        for sock in (attached, bound):
            for packet in packets(sock):
                if isinstance(packet.message, m.Request):
                    sock.send_multipart(reply_to(packet).frames, copy=False)
        if time.monotonic() >= beats_at:
            attached.send_multipart(encode(m.Heartbeat(-1)).frames)
            beats_at = time.monotonic() + _HEARTBEAT_S


if __name__ == "__main__":
    main(*sys.argv[1:])
