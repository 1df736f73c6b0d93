"""The host's end of the tunnel, against its page by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringwall.models.tunnel import Arrived, Deframer, Frame, FrameKind, Hello, Peer, Taken, WrongVersion, encode_frame

bytes_of_line = st.lists(st.sampled_from([0x7D, 0x7E, 0x5D, 0x5E, 0, 255]) | st.integers(0, 255), max_size=40).map(bytes)
words = st.lists(st.integers(0, (1 << 32) - 1) | st.sampled_from([0x7E7D7E7D, 0x5D7E5E7D]), max_size=20).map(tuple)
number = st.integers(0, 255)
frames = st.builds(Frame, number, number, number, number, words)
HELLO = Frame(FrameKind.HELLO, body=(5, 0x1F0201, 300))


def test_example():
    """TUN-10: the example of the page, byte by byte; a body of flags and escapes."""
    raw = bytes.fromhex("7e 03 00 00 00 01 00 00 04 0f 00 00 00 97 a2 02 6d 7e")
    assert encode_frame(Frame(FrameKind.DATA, body=(0x04000001, 0xF))) == raw
    assert Deframer().feed(raw) == [Frame(3, body=(0x04000001, 0xF))]
    assert encode_frame(Frame(0x7E, 0x7D, 0, 0x20))[:7] == bytes.fromhex("7e 7d5e 7d5d 00 20")


@given(st.lists(frames | bytes_of_line, max_size=6), st.data())
def test_frames(items, data):
    """TUN-11: frames between garbage, cut anywhere on their way: each that garbage does not touch is found, and nothing else is."""
    line = b"".join(encode_frame(item) if isinstance(item, Frame) else b"\x7e" + item + b"\x7e" for item in items)
    at = data.draw(st.integers(0, len(line)))
    deframer = Deframer()
    found = deframer.feed(line[:at]) + deframer.feed(line[at:])
    assert [one for one in found if one is not None] == [item for item in items if isinstance(item, Frame)]


def sent(peer, now):
    """Return the frames that ``peer`` puts on the line."""
    return Deframer().feed(peer.output(now))


def said(peer, now, *frames):
    """Let the card say ``frames``; return what happened by them."""
    return peer.feed(b"".join(one if isinstance(one, bytes) else encode_frame(one) for one in frames), now)


def connected():
    peer = Peer(5, patience=100, keep_alive=1000)
    assert sent(peer, 0) == [Frame(FrameKind.RESET, body=(5,))]
    assert not said(peer, 1, HELLO)
    return peer


def test_hello():
    """TUN-12: RESET again and again until HELLO of this session; nothing else counts before; another version is refused with a sentence."""
    peer = Peer(5, patience=100, keep_alive=1000)
    peer.send([1, 2])
    assert [len(sent(peer, now)) for now in (0, 1, 99, 100, 150, 200)] == [1, 0, 0, 1, 0, 1]
    others = Frame(FrameKind.HELLO, body=(4, 0x1F0201, 300)), Frame(FrameKind.DATA, body=(1,)), Frame(FrameKind.HELLO, body=(5, 0x1F0201))
    assert not said(peer, 210, *others)
    assert peer.hello is None
    said(peer, 220, HELLO)
    assert peer.hello == Hello(lanes=2, window=0x1F, room=300)
    assert sent(peer, 221) == [Frame(FrameKind.DATA, 0, 0, 0, (1, 2))]
    with pytest.raises(WrongVersion, match="version 2, this one 1: build both"):
        said(Peer(5, patience=100, keep_alive=1000), 0, Frame(FrameKind.HELLO, body=(5, 0x1F0202, 300)))
    with pytest.raises(ValueError, match="number of 32 bits, not"):
        Peer(1 << 32, patience=1, keep_alive=1)


def test_sending():
    """TUN-13: no more than there is room for; NAK and the end of patience send again, in order; acknowledgements of nothing are ignored."""
    peer = connected()
    tlps = [[n] * 100 for n in range(5)]
    for dwords in tlps:
        peer.send(dwords)

    def numbers(now):
        return [(one.seq, one.body[0]) for one in sent(peer, now)]

    assert numbers(10) == [(0, 0), (1, 1), (2, 2)]
    assert said(peer, 20, Frame(FrameKind.ACK, 0, 2, 1)) == [Taken(tlps[0])]
    assert numbers(20) == [(3, 3)]
    assert not said(peer, 30, Frame(FrameKind.ACK, 0, 5, 0), Frame(FrameKind.ACK, 0, 1, 0), Frame(FrameKind.ACK, 0, 2, 3))
    assert numbers(30) == []
    said(peer, 40, Frame(FrameKind.NAK, 0, 2, 1))
    assert numbers(40) == [(2, 2), (3, 3)]
    assert [numbers(now) for now in (139, 140, 141)] == [[], [(2, 2), (3, 3)], []]
    assert said(peer, 150, Frame(FrameKind.ACK, 0, 4, 4)) == [Taken(dwords) for dwords in tlps[1:4]]
    assert not peer.is_quiet
    assert numbers(150) == [(4, 4)]
    assert said(peer, 160, Frame(FrameKind.ACK, 0, 5, 5)) == [Taken(tlps[4])]
    assert peer.is_quiet
    assert peer.statistics.again == 4
    assert [one.kind for now in (1000, 1149, 1150, 1151) for one in sent(peer, now)] == [FrameKind.PING]


def test_receiving():
    """TUN-14: what is waited for arrives once; what came is acknowledged again; what is missing gets one NAK until something comes."""
    peer = connected()
    data = [Frame(FrameKind.DATA, n, 0, 0, (n,)) for n in range(4)]
    damaged = encode_frame(data[0])[:-3] + b"\x7e"
    assert said(peer, 10, data[0], data[1]) == [Arrived([0]), Arrived([1])]
    assert sent(peer, 10) == [Frame(FrameKind.ACK, 0, 2, 2)]
    assert not said(peer, 20, data[1])
    assert sent(peer, 20) == [Frame(FrameKind.ACK, 0, 2, 2)]
    assert not said(peer, 30, data[3], damaged)
    assert sent(peer, 30) == [Frame(FrameKind.NAK, 0, 2, 2)]
    assert not said(peer, 40, data[3])
    assert sent(peer, 40) == []
    peer.send([7])
    assert said(peer, 50, data[2], damaged) == [Arrived([2])]
    assert sent(peer, 50) == [Frame(FrameKind.NAK, 0, 3, 3), Frame(FrameKind.DATA, 0, 3, 3, (7,))]
    said(peer, 60, Frame(FrameKind.PING, 0, 1, 1))
    assert sent(peer, 60) == [Frame(FrameKind.ACK, 0, 3, 3)]
    assert not said(peer, 70, Frame(FrameKind.DATA, 3, 0, 0), Frame(FrameKind.ACK, 0, 0, 0, (1,)), Frame(99, 0, 0, 0))
    assert sent(peer, 70) == []
    assert (peer.statistics.arrived, peer.statistics.repeated, peer.statistics.damaged) == (3, 1, 2)


@given(bytes_of_line)
def test_garbage(line):
    """TUN-15: bytes of any kind do nothing but damage."""
    peer = connected()
    assert not peer.feed(line, 10)
    assert peer.is_quiet or sent(peer, 10) == [Frame(FrameKind.NAK)]
    said(peer, 20, b"\x7e")
    sent(peer, 20)
    assert said(peer, 30, Frame(FrameKind.DATA, 0, 0, 0, (1,))) == [Arrived([1])]
