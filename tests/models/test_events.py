"""Events to and from the lines of a log."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringwall.models import events
from ringwall.models.events import HostStore, Note, Operation, RunHeader, Setup, TlpReceived, TlpSent, Told, from_json
from ringwall.models.host import ConfigRead, ConfigWrite, Delay, MemoryRead, MemoryWrite, WaitInterrupt

cycles = st.integers(0, 1 << 40)
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5)  # fmt: skip
names = st.dictionaries(st.text(), plain, max_size=3)
addresses = st.integers(0, (1 << 64) - 8)
operations = st.one_of(
    st.builds(ConfigRead, st.integers(0, 7), st.integers(0, 1023).map(lambda n: 4 * n), st.sampled_from([1, 2, 4])),
    st.builds(ConfigWrite, st.integers(0, 7), st.integers(0, 1023).map(lambda n: 4 * n), st.just(4), st.integers(0, (1 << 32) - 1)),
    st.builds(MemoryRead, addresses, st.sampled_from([1, 2, 4, 8])),
    st.builds(MemoryWrite, addresses, st.just(8), st.integers(0, (1 << 64) - 1)),
    st.builds(Delay, cycles),
    st.builds(WaitInterrupt, st.integers(0, 7), st.integers(0, 2047), cycles),
)
dwords = st.lists(st.integers(0, (1 << 32) - 1), max_size=8)
any_event = st.one_of(
    st.builds(RunHeader, st.text(), st.integers(), names, st.dictionaries(st.text(), st.text(), max_size=3)),
    st.builds(Setup, cycles, st.text(), names),
    st.builds(TlpSent, cycles, dwords),
    st.builds(TlpReceived, cycles, dwords),
    st.builds(Operation, cycles, operations, st.one_of(st.none(), st.booleans(), st.integers(0, (1 << 64) - 1))),
    st.builds(HostStore, cycles, addresses, st.binary(max_size=20)),
    st.builds(Told, cycles, st.text(), st.lists(plain, max_size=3)),
    st.builds(Note, cycles, st.text()),
)


@given(any_event)
def test_events_round_trip(event):
    """MODEL-EV-1: every event is one line of JSON that gives the same event back, of the same type."""
    line = event.to_json()
    assert "\n" not in line
    assert json.loads(line)["event"] == type(event).__name__
    again = from_json(line)
    assert again == event
    assert type(again) is type(event)


def test_events_are_all_covered():
    """MODEL-EV-2: the strategies above build every kind of event and of operation that there is."""
    kinds = {kind.__name__ for kind in events._Tlp.__subclasses__() + events.Event.__subclasses__()} - {"_Tlp"}
    assert kinds == {strategy.__name__ for strategy in (RunHeader, Setup, TlpSent, TlpReceived, Operation, HostStore, Told, Note)}
    assert kinds <= set(events.__all__)
    assert set(events._OPERATIONS.values()) == set(events.host.Operation.__args__)


def test_events_text():
    """MODEL-EV-3: the lines as they are written, readable without this program."""
    assert TlpSent(7, [1, 0xC0F, 0xFDAFF040]).to_json() == '{"event":"TlpSent","cycle":7,"dwords":"00000001 00000c0f fdaff040"}'
    assert HostStore(8, 4096, b"\1\xff").to_json() == '{"event":"HostStore","cycle":8,"address":4096,"data":"01ff"}'
    assert Operation(9, MemoryRead(4096, 8), 5).to_json() == (
        '{"event":"Operation","cycle":9,"operation":{"name":"MemoryRead","address":4096,"size":8},"result":5}')  # fmt: skip


@pytest.mark.parametrize("line", [
    "", "{", "[]", "5", '"x"', "{}", '{"event":"Nothing"}', '{"event":["Note"]}', '{"event":"Note","cycle":1}',
    '{"event":"Note","cycle":1,"text":"","more":2}', '{"event":"TlpSent","cycle":1,"dwords":"0000000g"}',
    '{"event":"TlpSent","cycle":1,"dwords":"000000"}', '{"event":"TlpSent","cycle":1,"dwords":[1,2]}',
    '{"event":"HostStore","cycle":1,"address":0,"data":5}',
    '{"event":"Operation","cycle":1,"operation":{"name":"MemoryRead","address":0,"size":3},"result":0}',
    '{"event":"Operation","cycle":1,"operation":{"name":"Nothing"},"result":0}',
    '{"event":"Operation","cycle":1,"operation":{"address":0},"result":0}',
    '{"event":"Operation","cycle":1,"operation":7,"result":0}',
])  # fmt: skip
def test_events_refuse(line):
    """MODEL-EV-4: a line that is no event is a ValueError that shows it, whatever it is."""
    with pytest.raises(ValueError, match="must be an event, not"):
        from_json(line)
