"""A small HTTP port for operators and probes: it can look, never act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import waitress
from waitress import wasyncore
from waitress.server import BaseWSGIServer

from broker.errors import BrokerError

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
#: What load balancers and service managers ask; it tells nothing of who is there.
_PROBES = ("/healthz", "/readyz")
Admits = Callable[[str], bool]
#: A browser asks its user for a password where it is offered ``Basic``.
_SCHEMES = ("Basic", "Bearer")
Page = tuple[str, str, bytes]  # status line, content type, body
Pages = Mapping[str, Callable[[Mapping[str, Any]], Page]]  # path -> WSGI environ -> page

#: Nothing is taken from elsewhere, nothing shows this in a frame, nothing is kept.
_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
_POLICY = (
    "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class WsgiServer:
    """Runs a WSGI application on ``HOST:PORT`` in threads of its own.

    Raises ``OSError`` or ``ValueError`` when the address is taken or is none.
    """

    def __init__(self, address: str, application: Application, name: str, **options: Any) -> None:
        #: all that waitress waits for: what listens, what is connected, what wakes it
        self._sockets: dict[int, Any] = {}
        self._server = waitress.create_server(
            application,
            self._sockets,
            listen=address,
            threads=2,
            connection_limit=100,
            ident="draftmq",
            asyncore_use_poll=True,  # select() ends at descriptor 1023
            max_request_header_size=16384,
            channel_timeout=30,
            **options,
        )
        self._listening = [o for o in self._sockets.values() if isinstance(o, BaseWSGIServer)]
        first = self._listening[0]
        self.address = f"{first.effective_host}:{first.effective_port}"
        self._trigger = first.trigger
        self._thread = threading.Thread(target=self._server.run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the answers that are being made, then close, also what browsers keep open."""
        self._server.task_dispatcher.shutdown(timeout=1)
        self._trigger.pull_trigger(self._leave)
        self._thread.join(timeout=5)
        self._trigger.close()

    def _leave(self) -> None:
        """On the server's own thread. What wakes it stays open, for it may be in use just now; so
        what listens is closed without its own ``close``, which would close that too.
        """
        self._trigger.del_channel()
        for listening in self._listening:
            wasyncore.dispatcher.close(listening)
        wasyncore.close_all(self._sockets)


class HttpServer(WsgiServer):
    """Serves ``pages`` on ``HOST:PORT``.

    With ``admits`` all but the two probes want the header ``Authorization``, and it decides.
    Raises :class:`BrokerError` when the address is taken or is none.
    """

    def __init__(self, address: str, pages: Pages, admits: Admits | None = None) -> None:
        self._pages = pages
        self._admits = admits
        try:
            super().__init__(address, self._application, "draftmq-http", max_request_body_size=0)
        except (OSError, ValueError) as error:
            raise BrokerError(
                f"cannot serve HTTP on {address!r}: {error}; give another --http HOST:PORT, or off"
            ) from error

    def _application(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        page = self._pages.get(environ["PATH_INFO"])
        extra: list[tuple[str, str]] = []
        if environ["PATH_INFO"] not in _PROBES and not self._admitted(environ):
            extra = [("WWW-Authenticate", f"{scheme} realm=draftmq") for scheme in _SCHEMES]
            wanted = "an operator's token is needed: Authorization: Bearer TOKEN, or as a password"
            status, kind, body = text(wanted, "401 Unauthorized")
        elif page is None:
            status, kind, body = text("nothing here", "404 Not Found")
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, body = text("GET only", "405 Method Not Allowed")
        else:
            try:
                status, kind, body = page(environ)
            except TimeoutError as error:  # whoever is looked at does not answer
                status, kind, body = text(str(error), "503 Service Unavailable")
        policy = _POLICY + _inline(body) if kind.startswith("text/html") else _POLICY
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *extra]
        start(status, [*headers, ("Content-Security-Policy", policy), *_HEADERS])
        return [body]

    def _admitted(self, environ: dict[str, Any]) -> bool:
        return self._admits is None or self._admits(environ.get("HTTP_AUTHORIZATION", ""))


def text(body: str, status: str = "200 OK") -> Page:
    """A line of plain text."""
    return status, "text/plain; charset=utf-8", body.encode() + b"\n"


def as_json(value: Any) -> Page:
    """A value as JSON."""
    return "200 OK", "application/json", json.dumps(value).encode()


def _inline(html: bytes) -> str:
    """What a page's own script and style need of the policy: their hashes, so nothing else runs."""
    allowed = "; img-src data:"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        allowed += f"; {tag}-src 'sha256-{digest}'"
    return allowed
