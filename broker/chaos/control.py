"""The proxy's HTTP control: look, inject, heal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

from broker.chaos.faults import ChaosError, Kind, read_fault
from broker.chaos.proxy import ChaosProxy
from broker.watch.http import StartResponse, WsgiServer

_MAX_BODY_BYTES = 1 << 16


class Control(WsgiServer):
    """Serves ``GET /status``, ``POST /faults``, ``DELETE /faults`` and ``POST /cut``.

    Bodies are JSON. ``POST /faults`` takes a fault as a script has it, without times, and perhaps
    ``connection``, a number from ``/status``; ``POST /cut`` the same without ``kind``, or nothing.
    Raises :class:`ChaosError` when the address is taken or is none.
    """

    def __init__(self, address: str, proxy: ChaosProxy) -> None:
        self._proxy = proxy
        self._pages: dict[tuple[str, str], Callable[[bytes], dict[str, Any]]] = {
            ("GET", "/status"): lambda body: proxy.snapshot(),
            ("POST", "/faults"): lambda body: self._inject(_read(body)),
            ("DELETE", "/faults"): lambda body: self._heal(),
            ("POST", "/cut"): lambda body: self._inject({"kind": Kind.CUT} | _read(body)),
        }
        try:
            super().__init__(
                address,
                self._application,
                "draftmq-chaos-control",
                max_request_body_size=_MAX_BODY_BYTES,
            )
        except (OSError, ValueError) as error:
            raise ChaosError(
                f"cannot serve the control on {address!r}: {error}; give --control HOST:PORT"
            ) from error

    def _application(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        page = self._pages.get((method, path))
        said: dict[str, Any]
        if page is not None:
            try:
                status, said = "200 OK", page(environ["wsgi.input"].read())
            except ChaosError as error:
                status, said = "400 Bad Request", {"error": str(error)}
        elif there := [known for known, known_path in self._pages if known_path == path]:
            status, said = "405 Method Not Allowed", {"error": f"allowed: {', '.join(there)}"}
        else:
            status, said = "404 Not Found", {"error": "there are /status, /faults and /cut"}
        body = json.dumps(said, indent=1).encode() + b"\n"
        start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    def _inject(self, said: dict[str, Any]) -> dict[str, Any]:
        connection = said.pop("connection", None)
        if isinstance(connection, bool) or not isinstance(connection, (int, NoneType)):
            raise ChaosError(f"'connection' is {connection!r}; it must be a number from /status")
        return {"struck": self._proxy.inject(read_fault(said), connection)}

    def _heal(self) -> dict[str, Any]:
        self._proxy.heal()
        return {"healed": True}


def _read(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise ChaosError(f"the body is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise ChaosError(f"the body must be an object, not {type(said).__name__}")
    return said
