"""An OpenAI-compatible endpoint, asked with patience: retries, backoff, a key that nobody sees."""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from trainer_client.data.files import BadLine
from trainer_client.errors import TrainerClientError

#: Answers that say: later, or again.
_AGAIN = (408, 409, 425, 429)
#: Answers that no other request would change: the key, the path, the model.
_NEVER = (401, 403, 404)
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 60.0
#: Of an answer: what is longer is no text that a model wrote.
_MOST_BYTES = 64 << 20


class EndpointError(TrainerClientError):
    """An endpoint does not answer, or refuses this client."""


class Endpoint:
    """``url`` ends where ``/chat/completions`` begins; ``key`` goes into a header and nowhere else.

    Safe to use from several threads. ``stop`` ends all waits for another try.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        timeout_s: float = 600.0,
        retries: int = 6,
        first_delay_s: float = _FIRST_DELAY_S,
        stop: threading.Event | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"the endpoint {url!r} is no address; say http://HOST:8000/v1")
        if parts.username or parts.password or parts.query:
            raise EndpointError(
                "the endpoint's address has a password or a key in it; keys come "
                "from the environment (--api-key-env)"
            )
        self.url = url.rstrip("/")
        self._key, self._timeout_s, self._retries = key, timeout_s, retries
        self._first_delay_s = first_delay_s
        self._stop = stop or threading.Event()
        #: tries beyond each request's first
        self.retried = 0

    def ask(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises :class:`BadLine` where the endpoint refuses this request, and :class:`EndpointError`
        where it refuses all, or gives no answer in any of the tries.
        """
        said = "nothing"
        for number in range(self._retries + 1):
            if self._stop.is_set():
                break
            if number:
                self.retried += 1
            try:
                return self._once(path, request)
            except urllib.error.HTTPError as error:
                said, after = self._refused(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                said, after = f"{type(error).__name__}: {error}", 0.0
            if number < self._retries:
                delay = min(_LONGEST_DELAY_S, self._first_delay_s * 2**number)
                self._stop.wait(max(after, delay * random.uniform(0.5, 1.0)))
        raise EndpointError(
            f"{self.url} gave no answer in {self._retries + 1} tries (last: {said}); see that it "
            "runs, then run the same command again: it goes on where it stopped"
        )

    def _once(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = json.dumps(request).encode()
        asked = urllib.request.Request(f"{self.url}/{path}", body, headers)
        with urllib.request.urlopen(asked, timeout=self._timeout_s) as response:
            answer = json.loads(response.read(_MOST_BYTES))
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise ValueError("an answer without choices")
        return answer

    def _refused(self, error: urllib.error.HTTPError) -> tuple[str, float]:
        """What an HTTP error says, and for how long to wait at least before another try."""
        with error:
            try:
                text = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            except (OSError, http.client.HTTPException):
                text = ""
        said = f"HTTP {error.code} {text}"
        if self._key:
            said = said.replace(self._key, "***")
        if error.code in _NEVER:
            raise EndpointError(
                f"{self.url} refuses: {said}; look at --endpoint, --model and the key"
            ) from None
        if error.code < 500 and error.code not in _AGAIN:
            raise BadLine(
                f"{self.url} refuses this request: {said}", f"HTTP {error.code}"
            ) from None
        try:
            return said, min(_LONGEST_DELAY_S, float(error.headers.get("Retry-After") or 0))
        except ValueError:  # a date
            return said, 0.0
