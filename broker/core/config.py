"""What can be set about a broker's behaviour, each default with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.numbers import check_numbers
from broker.protocol import Limits
from broker.protocol.limits import GIB, MIB


@dataclass(frozen=True)
class BrokerConfig:
    """Rules that the broker keeps and, where they bind peers, says in its welcome."""

    limits: Limits = field(default_factory=Limits)
    #: Requests one client may have here at once. Prefetch is rarely deeper than 8; what is over
    #: waits in the client, where it costs the broker nothing.
    window: int = 16
    #: Peers say something this often; a restarted broker hears of all in a second.
    heartbeat_s: float = 1.0
    #: Silence after which a peer counts as lost: five heartbeats, so that no single one matters.
    liveness_s: float = 5.0
    #: A request that was on this many workers when they died is refused: it is the likely cause.
    max_losses: int = 3
    #: A named model that no worker serves is an error only after this, so that a pool that is just
    #: starting, or reconnecting to a restarted broker, is waited for.
    model_grace_s: float = 10.0
    #: A request that runs for so many times its expected time runs a second time elsewhere, on the
    #: wire; the first answer wins (Dean and Barroso, "The Tail at Scale", CACM 2013). 0: never.
    hedge_after: float = 3.0
    #: But not before so long: short requests vary by more than a multiple of their time.
    hedge_floor_s: float = 1.0
    #: Share of the running requests that may run twice; one may always. A pool that is slow as a
    #: whole would only be slowed down further.
    hedge_share: float = 0.05
    #: A request is not passed over for longer than this by later ones, be it in the queue or where
    #: it waits for room: about what a caller with a deadline of a minute can bear.
    patience_s: float = 10.0
    #: A reply whose next part does not begin to come within so long is broken off: the request runs
    #: again elsewhere. A part has 4 MiB, and counts as coming while any byte of it moves.
    part_s: float = 15.0
    #: Replies that may lie here for one client, expected or not yet taken: a few of the largest
    #: that trainers ask for. Beyond it its requests wait.
    max_client_bytes: int = 1 * GIB
    #: And for all clients together.
    max_total_bytes: int = 8 * GIB
    #: Requests that may lie here for one client: a window of much longer ones than trainers send.
    #: What is over is let go, and asked for again when there is room.
    max_client_request_bytes: int = 128 * MIB
    #: And for all clients together.
    max_total_request_bytes: int = 1 * GIB
    #: Answers kept until the client says it has them: a resend costs no second forward.
    held_answer_bytes: int = 256 * MIB
    #: And no longer than this: its client has given the request up, or its acknowledgement is lost.
    #: Clients ask again at least every 30 s.
    held_answer_s: float = 60.0
    #: A connection that has not said hello by then is closed: an honest one does within
    #: milliseconds of its handshake, which has 5 s.
    hello_s: float = 10.0
    #: Connections without a hello at once; the oldest goes for the next. After a restart thousands
    #: of honest peers come at once, and each is a stranger for a moment.
    max_strangers: int = 1024
    #: Vocab mappings kept; a mapping of 32,000 ids is 256 KB.
    held_mapping_bytes: int = 64 * MIB

    def __post_init__(self) -> None:
        check_numbers(
            self,
            above_0="window heartbeat_s liveness_s max_losses held_answer_s hello_s max_strangers "
            "patience_s part_s "
            "max_client_bytes max_total_bytes max_client_request_bytes max_total_request_bytes",
            not_negative="model_grace_s hedge_after hedge_floor_s hedge_share",
        )
        if self.liveness_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"liveness_s ({self.liveness_s}) must be at least twice heartbeat_s "
                f"({self.heartbeat_s}), or one late heartbeat takes a healthy peer down"
            )
