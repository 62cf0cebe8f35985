"""How large anything may get. Said in the handshake, checked on both sides."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Upper bounds for one message; the broker's are sent to every peer that says hello."""

    #: A model's config has 256 KiB at the most, a frame table 12 bytes a frame; the rest is room.
    max_header_bytes: int = 1 * MIB
    #: Of one message. Peers send some tens: large replies are several messages.
    max_frames: int = 8192
    #: libzmq allocates a frame at once when its length is announced, so this is also what a
    #: stranger can make the broker allocate: ``ZMQ_MAXMSGSIZE`` cuts off whoever announces more.
    max_frame_bytes: int = 64 * MIB
    #: Token ids and masks: 64 MiB is two million tokens a request.
    max_request_bytes: int = 64 * MIB
    #: `probs` of 8,192 tokens at D=32,000 is 1.2 GiB.
    max_reply_bytes: int = 4 * GIB


#: Longest string or byte string in a body; a model's config travels as JSON.
MAX_STRING_BYTES = 256 * KIB
#: Longest name: of a peer, a model, a job.
MAX_NAME_BYTES = 256
#: Longest sentence for people; the rest is cut.
MAX_TEXT_CHARACTERS = 2000
#: Longest tuple in a body: what a worker with the most credits may hold.
MAX_ITEMS = 4096
