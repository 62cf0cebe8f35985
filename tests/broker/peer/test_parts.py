from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.peer.parts import Assembly, in_parts
from broker.protocol import LocalProtocolError, Packet, RemoteProtocolError, decode, encode
from broker.protocol import messages as m
from tests.broker.protocol import strategies

SPECS = (m.TensorSpec("a", "uint8", (5,), 2), m.TensorSpec("b", "uint8", (4,), 1))
FRAMES = [b"abc", b"de", b"fghi"]


def reply(*manifest: m.TensorSpec, parts: int = 0) -> m.Reply:
    request_id = m.RequestId("c", 1, 1)
    fields = (request_id, "w", "t", "f", (1, 2, 3), 0, "", "probs", 0.5, "", manifest)
    return m.Reply(*fields, parts=parts)


def received(packets: tuple[Packet, ...]) -> list[Packet]:
    return [decode([bytes(frame) for frame in packet.frames]) for packet in packets]


@given(strategies.tensors(), st.integers(1, 7), st.integers(1, 40))
def test_tensors_survive_in_parts_of_any_size(
    drawn: dict[str, tuple[str, np.ndarray, tuple[int, ...]]], frame_bytes: int, part_bytes: int
) -> None:
    payload, manifest = [], []
    for name, (dtype, octets, shape) in drawn.items():
        frames = [
            octets[at : at + frame_bytes].tobytes() for at in range(0, octets.size, frame_bytes)
        ]
        manifest.append(m.TensorSpec(name, dtype, shape, len(frames)))
        payload += frames
    first, *parts = received(in_parts(reply(*manifest), payload, nbytes=part_bytes))
    assert first.message.parts == len(parts)
    assert [part.message.number for part in parts] == list(range(len(parts)))
    assert all(len(part.payload) == 1 or part_size(part) <= part_bytes for part in parts)
    assembly = Assembly(first.message.manifest)
    for packet in [first, *parts]:
        assembly.add(packet)
    assert assembly.complete
    for octets, (_, expected, _) in zip(assembly.octets, drawn.values(), strict=True):
        assert octets.tobytes() == expected.tobytes()


def part_size(part: Packet) -> int:
    return sum(map(len, part.payload))


def test_a_small_reply_is_one_message_as_it_always_was() -> None:
    (only,) = in_parts(reply(*SPECS), FRAMES, nbytes=9)
    assert only.message.parts == 0
    assert list(only.payload) == FRAMES


def test_a_reply_is_cut_between_frames_when_it_has_one_byte_too_many() -> None:
    first, *parts = in_parts(reply(*SPECS), FRAMES, nbytes=8)
    assert first.payload == ()
    assert [list(part.payload) for part in parts] == [[b"abc", b"de"], [b"fghi"]]


@pytest.mark.parametrize(
    ("message", "payload", "complaint"),
    [
        (reply(*SPECS, parts=2), FRAMES, "3 payload frames, the tensors are said to come else"),
        (reply(*SPECS, parts=4), [], "3 frames cannot come in 4 parts"),
        (reply(*SPECS, parts=-1), [], "parts is -1, allowed are 0"),
        (reply(parts=1), [], "0 frames cannot come in 1 parts"),
        (
            reply(replace(SPECS[0], frames=6), parts=1),
            [],
            "tensor 'a' of 5 bytes cannot have 6 frames",
        ),
        (reply(replace(SPECS[0], frames=0), parts=1), [], "of 5 bytes cannot have 0 frames"),
        (m.Part(m.RequestId("c", 1, 1), 0), [], "part 0 has 0 payload frames"),
        (m.Part(m.RequestId("c", 1, 1), -1), [b"x"], "number is -1, allowed are 0"),
    ],
)
def test_what_cannot_be_in_parts_is_refused(
    message: m.Message, payload: list[bytes], complaint: str
) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        encode(message, payload)


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([b"abcdef"], "a frame has 6 bytes where its tensor has 5 left, in 2 frames"),
        ([b"abc", b"d"], "a frame has 1 bytes where its tensor has 2 left, in 1 frames"),
        ([b"abc", b"def"], "a frame has 3 bytes where its tensor has 2 left, in 1 frames"),
        ([b"abcde", b"f"], "a frame has 1 bytes where its tensor has 0 left, in 1 frames"),
        ([*FRAMES, b"j"], "a frame has 1 bytes where its tensor has 0 left, in 0 frames"),
    ],
)
def test_frames_that_are_not_those_of_the_manifest_are_refused(
    frames: list[bytes], complaint: str
) -> None:
    assembly = Assembly(SPECS)
    with pytest.raises(RemoteProtocolError, match=complaint):
        assembly.add(encode(m.Part(m.RequestId("c", 1, 1), 0), frames))


def test_a_damaged_frame_is_refused_and_nothing_behind_it_is_taken() -> None:
    _, part, _ = in_parts(reply(*SPECS), FRAMES, nbytes=5)
    damaged = decode([part.frames[0], b"abc", b"dX"])
    assembly = Assembly(SPECS)
    with pytest.raises(RemoteProtocolError, match="payload frame 1 of Part is damaged"):
        assembly.add(damaged)
    assert not assembly.complete


def test_tensors_are_not_complete_before_their_last_frame() -> None:
    _, *parts = in_parts(reply(*SPECS), FRAMES, nbytes=4)
    assembly = Assembly(SPECS)
    complete = []
    for part in parts:
        assembly.add(part)
        complete.append(assembly.complete)
    assert complete == [False, False, True]
