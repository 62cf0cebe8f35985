from __future__ import annotations

import struct

import msgpack
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from broker.peer.tensors import from_packet, to_frames
from broker.protocol import (
    Limits,
    LocalProtocolError,
    RemoteProtocolError,
    VersionMismatchError,
    decode,
    encode,
    mapping_id,
    wire,
)
from broker.protocol import messages as m
from tests.broker.protocol import strategies

ID = m.RequestId("rank0", 7, 3)


def octets(packet: wire.Packet) -> list[bytes]:
    """The frames as they would come from a socket."""
    return [bytes(frame) for frame in packet.frames]


def offer(tensors: dict[str, torch.Tensor], frame_bytes: int = 1 << 20) -> wire.Packet:
    manifest, payload = to_frames(tensors, frame_bytes)
    return encode(m.MappingOffer("m0", 9, manifest), payload)


def sealed(body: object, kind: int = m.Heartbeat.KIND, *, version: int = wire.VERSION) -> bytes:
    """A header with a right checksum around any body: what a hostile peer can make."""
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    header = struct.pack("<4sBBHIIQ", wire.MAGIC, version, kind, 0, 0, len(packed), 0) + packed
    return header + struct.pack("<Q", xxhash.xxh3_64_intdigest(header))


@given(strategies.messages)
def test_every_message_survives_the_wire(message: m.Message) -> None:
    assert decode(octets(encode(message))).message == message


@given(strategies.tensors(), st.integers(1, 64))
def test_every_tensor_survives_the_wire_in_frames_of_any_size(drawn: dict, size: int) -> None:
    tensors = {
        name: torch.tensor(octets_.tolist(), dtype=torch.uint8)
        .view(getattr(torch, dtype))
        .view(shape)
        for name, (dtype, octets_, shape) in drawn.items()
        if dtype != "bool"
    }
    packet = decode(octets(offer(tensors, size)))
    packet.verify()
    back = from_packet(packet)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


def test_a_bool_tensor_a_scalar_and_an_empty_one_survive_the_wire() -> None:
    tensors = {
        "mask": torch.tensor([[True, False], [False, True]]),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3, dtype=torch.int64),
    }
    packet = decode(octets(offer(tensors)))
    back = from_packet(packet)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].shape == tensor.shape


def test_a_received_tensor_may_be_written_to() -> None:
    packet = decode(octets(offer({"a": torch.zeros(3), "b": torch.zeros(3)})))
    received = from_packet(packet)
    received["a"].fill_(1.0)
    assert received["a"].tolist() == [1.0, 1.0, 1.0]
    assert received["b"].tolist() == [0.0, 0.0, 0.0]  # none of another's memory


def test_contiguous_tensors_are_sent_from_their_own_memory() -> None:
    tensor = torch.zeros(1000)
    _, payload = to_frames({"a": tensor}, 512)
    tensor.fill_(1.0)
    assert bytes(payload[0]) == bytes(torch.ones(128).numpy().data)


@given(strategies.messages, st.data())
def test_a_flipped_bit_in_the_header_is_noticed(message: m.Message, data: st.DataObject) -> None:
    header = bytearray(encode(message).frames[0])
    bit = data.draw(st.integers(0, 8 * len(header) - 1))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        decode([bytes(header)])


@given(strategies.messages, st.data())
def test_a_cut_or_extended_header_is_no_message(message: m.Message, data: st.DataObject) -> None:
    header = bytes(encode(message).frames[0])
    with pytest.raises(RemoteProtocolError):
        decode([header[: data.draw(st.integers(0, len(header) - 1))]])
    with pytest.raises(RemoteProtocolError):
        decode([header + data.draw(st.binary(min_size=1, max_size=20))])


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_is_no_message(frames: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(frames)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.integers(0, 255),
)
def test_a_well_sealed_body_of_any_shape_is_a_message_or_a_remote_error(
    body: object, kind: int
) -> None:
    try:
        message = decode([sealed(body, kind)]).message
    except RemoteProtocolError:
        return
    assert decode(octets(encode(message))).message == message


def test_a_body_nested_too_deeply_is_refused() -> None:
    body = b"\x91" * 100_000 + b"\x00"
    with pytest.raises(RemoteProtocolError):
        decode([sealed(body)])
    nested: list = [1]
    for _ in range(900):  # as deep as msgpack goes
        nested = [nested]
    with pytest.raises(RemoteProtocolError, match="fields, got"):
        decode([sealed(nested)])
    for hello in ([nested], [nested, 1, "job", 0], ["c", nested, "job", 0]):
        with pytest.raises(RemoteProtocolError):
            decode([sealed(hello)])


def test_another_version_is_named_with_both_numbers() -> None:
    with pytest.raises(VersionMismatchError, match="version 9, this side speaks version 3"):
        decode([sealed([1], version=9)])


@pytest.mark.parametrize("change", ["drop", "repeat", "swap", "shorten", "lengthen"])
def test_payload_frames_that_are_not_those_of_the_header_are_refused(change: str) -> None:
    header, a, b = octets(offer({"a": torch.arange(3), "b": torch.arange(4)}))
    changed = {
        "drop": [header, a],
        "repeat": [header, a, b, b],
        "swap": [header, b, a],
        "shorten": [header, a, b[:-1]],
        "lengthen": [header, a, b + b"\0"],
    }[change]
    with pytest.raises(RemoteProtocolError):
        decode(changed)


def test_a_flipped_bit_of_the_version_is_damage_and_not_another_version() -> None:
    header = bytearray(sealed([1]))
    header[4] ^= 1
    with pytest.raises(RemoteProtocolError, match="checksum") as error:
        decode([bytes(header)])
    assert not isinstance(error.value, VersionMismatchError)


def test_a_damaged_payload_frame_passes_the_broker_and_is_found_at_the_end() -> None:
    header, _, b = octets(offer({"a": torch.arange(3), "b": torch.arange(3)}))
    packet = decode([header, b[:-1] + b"\x01", b])
    with pytest.raises(RemoteProtocolError, match="payload frame 0 of MappingOffer is damaged"):
        packet.verify()


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (m.TensorSpec("a", "float33", (2,), 1), "dtype 'float33'"),
        (m.TensorSpec("a", "int64", (-2,), 1), "is -2, allowed are 0 to"),
        (m.TensorSpec("a", "int64", (1,) * 9, 1), "impossible shape"),
        (m.TensorSpec("a", "int64", (3,), 1), "takes 24 bytes, its frames have 16"),
        (m.TensorSpec("a", "int64", (2,), 2), "claims 2 frames, 1 are left"),
        (m.TensorSpec("a", "int64", (0,), 0), "the manifest accounts for 0"),
    ],
)
def test_a_manifest_that_is_not_the_payload_is_refused(spec: m.TensorSpec, match: str) -> None:
    with pytest.raises(LocalProtocolError, match=match):
        encode(m.MappingOffer("m0", 9, (spec,)), [bytes(16)])


def test_two_tensors_of_one_name_are_refused() -> None:
    spec = m.TensorSpec("a", "int64", (0,), 0)
    with pytest.raises(LocalProtocolError, match="two tensors are called 'a'"):
        encode(m.MappingOffer("m0", 9, (spec, spec)))


def test_limits_are_kept_on_both_sides_with_both_numbers() -> None:
    small = Limits(max_frame_bytes=10, max_request_bytes=100)
    spec = m.TensorSpec("a", "uint8", (11,), 1)
    message = m.MappingOffer("m0", 9, (spec,))
    with pytest.raises(LocalProtocolError, match="11 bytes, allowed are 1 to 10"):
        encode(message, [bytes(11)], small)
    with pytest.raises(RemoteProtocolError, match="11 bytes, allowed are 1 to 10"):
        decode(octets(encode(message, [bytes(11)])), small)
    in_three = m.MappingOffer("m0", 9, (m.TensorSpec("a", "uint8", (3,), 3),))
    packet = encode(in_three, [b"a", b"b", b"c"])
    with pytest.raises(RemoteProtocolError, match="3 payload frames, the limit is 2"):
        decode(octets(packet), Limits(max_frames=2))
    large = m.MappingOffer("m0", 9, (m.TensorSpec("a", "uint8", (101,), 11),))
    with pytest.raises(LocalProtocolError, match="the payload has 101 bytes, the limit is 100"):
        encode(large, [bytes(10)] * 10 + [bytes(1)], small)


@pytest.mark.parametrize(
    "message",
    [
        m.Heartbeat("three"),
        m.Heartbeat(True),
        m.Heartbeat(1 << 64),
        m.Cancel("rank0#3"),
        m.ClientHello("c", 1, "j", None),
        m.HelloWanted("x" * 300_000),
        m.Received(tuple([ID] * 20_000)),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_a_local_error(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError, match=type(message).__name__):
        encode(message)


def test_what_is_no_message_cannot_be_sent() -> None:
    with pytest.raises(LocalProtocolError, match="not a message"):
        encode(ID)  # type: ignore[arg-type]


def test_a_mapping_is_named_by_its_content() -> None:
    ids = torch.tensor([1, 5, 9])
    _, payload = to_frames({"ids": ids})
    _, in_two = to_frames({"ids": ids}, 12)
    assert mapping_id(10, payload) == mapping_id(10, in_two)
    assert mapping_id(10, payload) != mapping_id(11, payload)


def test_the_tables_of_the_specification_are_those_of_the_code() -> None:
    from broker.protocol import document

    written = document.PATH.read_text(encoding="utf-8")
    assert document.render(written) == written, "run python -m broker.protocol.document"


def direct_reply(*specs: m.TensorSpec) -> m.Reply:
    transfer = m.Transfer("w/c", 1, 0)
    return m.Reply(ID, "w", "model", "f", (1, 2, 3), 0, "m0", "hidden", 0.5, "", specs, transfer)


def test_a_direct_reply_has_a_manifest_and_no_frames() -> None:
    message = direct_reply(m.TensorSpec("aux", "float32", (2, 3), 0))
    assert decode(octets(encode(message))).message == message


def test_a_direct_reply_with_frames_or_over_the_limit_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="the tensors are said to come elsewhere"):
        encode(direct_reply(m.TensorSpec("aux", "uint8", (4,), 1)), [b"1234"])
    large = direct_reply(m.TensorSpec("aux", "uint8", (4096,), 0))
    with pytest.raises(LocalProtocolError, match="has 4096 bytes, the limit is 1024"):
        encode(large, limits=Limits(max_reply_bytes=1024))
