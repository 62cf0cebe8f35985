"""The broker's HTTP port, for operators and probes: ``/healthz``, ``/readyz``, ``/status``."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import waitress
from waitress.server import BaseWSGIServer

from broker.errors import BrokerError

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
#: What load balancers and service managers ask; it tells nothing of who is there.
_PROBES = ("/healthz", "/readyz")
Page = tuple[str, str, bytes]  # status line, content type, body


class HttpServer:
    """Serves what ``snapshot`` tells of the broker. It can look, never act.

    With ``admits`` all but the two probes want ``Authorization: Bearer KEY``, and it decides.
    Raises :class:`BrokerError` when the address is taken or is none.
    """

    def __init__(
        self,
        address: str,
        snapshot: Callable[[], dict[str, Any]],
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._admits = admits
        self._pages: dict[str, Callable[[], Page]] = {
            "/healthz": lambda: ("200 OK", "text/plain", b"ok\n"),
            "/readyz": self._readyz,
            "/status": self._status,
        }
        try:
            self._server: BaseWSGIServer = waitress.create_server(
                self._application,
                listen=address,
                threads=2,
                connection_limit=100,
                ident="draftmq",
                asyncore_use_poll=True,  # select() ends at descriptor 1023
                max_request_header_size=16384,
                max_request_body_size=0,
                channel_timeout=30,
            )
        except (OSError, ValueError) as error:
            raise BrokerError(
                f"cannot serve HTTP on {address!r}: {error}; give --http HOST:PORT, or --http off"
            ) from error
        self.address = f"{self._server.effective_host}:{self._server.effective_port}"
        self._thread = threading.Thread(target=self._server.run, name="draftmq-http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.close()
        self._thread.join(timeout=5)

    def _application(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        page = self._pages.get(environ["PATH_INFO"])
        headers = []
        if environ["PATH_INFO"] not in _PROBES and not self._admitted(environ):
            headers = [("WWW-Authenticate", "Bearer")]
            status, kind = "401 Unauthorized", "text/plain"
            body = (
                b"an operator's key is needed: Authorization: Bearer draftmq-secret:operator:...\n"
            )
        elif page is None:
            status, kind, body = "404 Not Found", "text/plain", b"nothing here\n"
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", "text/plain", b"GET only\n"
        else:
            status, kind, body = page()
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *headers])
        return [body]

    def _admitted(self, environ: dict[str, Any]) -> bool:
        if self._admits is None:
            return True
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        return scheme.lower() == "bearer" and self._admits(token.strip())

    def _readyz(self) -> Page:
        """Ready once a worker is there: requests sent now will be served."""
        if self._snapshot()["workers"]:
            return "200 OK", "text/plain", b"ready\n"
        return "503 Service Unavailable", "text/plain", b"no worker is attached\n"

    def _status(self) -> Page:
        body = json.dumps(self._snapshot(), indent=1).encode()
        return "200 OK", "application/json", body
