"""Line e: bytes and time of one step's supervision, from the request to tensors in the trainer.

At H=4096, D=32000, T=2048 and B=1, through worker, broker and client, in each encoding, beside
NeMo AutoModel's remote target at the same shape. On both sides the tensors stand ready in place of
what a target computes. ``python -m tests.bench.encodings`` runs it alone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from tests.bench.lines import Line, Progress
from tests.bench.peers.nemo import NAME as NEMO
from tests.bench.peers.nemo import nemo
from tests.bench.pool import Pool, pool
from tests.bench.ready import DRAFT_VOCAB, HIDDEN_SIZE, TOKENS
from tests.vocab import shuffled
from trainer_client.targets.remote import RemoteEagle3TargetModel

ENCODINGS = ("hidden", "topk", "probs")
_REPLIES = 5
_MIB = 1 << 20
#: What of the peer's bytes, and how many times faster.
_BYTES, _FASTER = 0.22, 20
#: No bound: a figure to be seen.
_TOLD = ""
#: Of which the projection is timed.
_SLOTS = 16


@dataclass
class _Seen:
    """Of one encoding, or of the peer."""

    nbytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """MiB and seconds of each encoding, and what of NeMo's they are."""
    rounds = 1 if quick else 2
    seen = {encoding: _Seen() for encoding in ENCODINGS}
    theirs = _Seen()
    with nemo(progress, quick=quick) as peer, pool(["tests.bench.ready:ready"]) as started:
        for number in range(1, rounds + 1):
            progress(f"a step's supervision, round {number} of {rounds}")
            if peer is not None:
                seconds, theirs.nbytes = peer.supervision(TOKENS, HIDDEN_SIZE, DRAFT_VOCAB)
                theirs.seconds.append(seconds)
            for encoding, of in seen.items():
                _take(started, encoding, of)
        progress("the trainer's own projection of hidden states")
        projection_s = _projection_s(started)
    return _lines(seen, theirs if theirs.seconds else None, projection_s)


def _take(started: Pool, encoding: str, seen: _Seen) -> None:
    """A few replies, one after another; the first makes connections and memory, and is left out."""
    with started.client(encoding=encoding) as client:
        _map_all(client)
        asked = torch.ones(1, TOKENS, dtype=torch.int64)
        for number in range(1 + _REPLIES):
            before = client.counters()["reply_bytes"]
            began = time.perf_counter()
            batch = client.generate_batch(asked, asked, asked)
            if number:
                seen.seconds.append(time.perf_counter() - began)
            seen.nbytes = client.counters()["reply_bytes"] - before
            del batch


def _map_all(client: RemoteEagle3TargetModel) -> None:
    ids = shuffled(torch.arange(DRAFT_VOCAB))
    client.set_vocab_mapping(ids, torch.ones(DRAFT_VOCAB, dtype=torch.bool))


def _projection_s(started: Pool) -> float:
    """Seconds in which this machine's CPU makes probabilities of all hidden states.

    Worked out from a few slots, for it grows as they do, and takes long: 0.5 Tflop in all.
    """
    with started.client() as client:
        _map_all(client)
        head = client.lm_head_rows().weight
    hidden = torch.randn(_SLOTS, HIDDEN_SIZE, dtype=head.dtype)
    began = time.perf_counter()
    torch.softmax((hidden @ head.T).float(), dim=-1)
    return (time.perf_counter() - began) * TOKENS / _SLOTS


def _lines(seen: dict[str, _Seen], theirs: _Seen | None, projection_s: float) -> list[Line]:
    lines = []
    for encoding, of in seen.items():
        bounded = encoding == "hidden"
        small = theirs is not None and of.nbytes <= _BYTES * theirs.nbytes
        fast = theirs is not None and of.median_s * _FASTER <= theirs.median_s
        lines += [
            Line(
                f"{encoding}, a step's supervision",
                of.nbytes / _MIB,
                "MiB",
                f"<= {_BYTES} of the peer's" if bounded else _TOLD,
                small or not bounded,
                NEMO,
                None if theirs is None else theirs.nbytes / _MIB,
            ),
            Line(
                f"{encoding}, until the trainer has it",
                of.median_s,
                "s",
                f"{_FASTER} times faster than the peer" if bounded else _TOLD,
                fast or not bounded,
                NEMO,
                None if theirs is None else theirs.median_s,
            ),
        ]
    name = "hidden, projection if the trainer were this CPU"
    return [*lines, Line(name, projection_s, "s", _TOLD, True)]


if __name__ == "__main__":
    from tests.bench.alone import run_alone

    run_alone(measure)
