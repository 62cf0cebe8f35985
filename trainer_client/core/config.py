"""Settings of a client."""

from __future__ import annotations

from dataclasses import dataclass

from broker.numbers import check_numbers


@dataclass(frozen=True)
class ClientConfig:
    """How patient a client is, each default with its reason."""

    #: A request unanswered for so long is sent again; a lost connection resends at once, so this
    #: covers only what vanishes without one. Doubled after each resend.
    resend_s: float = 5.0
    #: Resends are small and cost a broker that knows the request nothing.
    resend_max_s: float = 30.0
    #: Silence about a missing broker or worker for so long; a restart takes less.
    notice_s: float = 3.0
    #: And how often it is repeated.
    notice_again_s: float = 30.0

    def __post_init__(self) -> None:
        check_numbers(self, above_0="resend_s resend_max_s notice_s notice_again_s")
