"""The control queue of virtio-net."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..spec import virtio_net as spec
from .net_layouts import Settings
from .ports import port_streams
from .serializer import Serializer

ADDRESS_BYTES = 6


def table_hash(address):
    """The place of an Ethernet address (48 bits, byte 0 in bits 7:0) in a table of 64: the exclusive or of its groups of 6 bits."""
    groups = [address[n : n + 6] for n in range(0, 48, 6)]
    while len(groups) > 1:
        groups = [a ^ b for a, b in zip(groups[::2], groups[1::2], strict=True)]
    return groups[0]


class ControlPort(wiring.Component):
    """Serves the control queue: receive modes, address table, address, number of pairs. [VIRTIO1.4 5.1.9.5]

    A command has exactly the bytes that it needs; one that is anything else, is not known, was not agreed on, could not be fetched or
    has no room for its answer changes nothing, and is answered ERR. An OK comes when the command has taken effect.

    Latency: a cycle per byte and a few more.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    pairs : :class:`int`
        Pairs of queues there are.

    Members
    -------
    features : ``In(128)``
        What was agreed on.
    settings : ``In(Settings)``
        As they are.
    change, changed : ``Out(1)``, ``Out(Settings)``
        Pulse: they are to become ``changed``.
    settled : ``In(1)``
        Nothing goes on that ``settings`` forbid.
    Others
        See :func:`.ports.port_streams`.
    """

    def __init__(self, *, width, pairs):
        self.width, self.pairs = width, pairs
        super().__init__({
            **port_streams(width), "features": In(128), "settings": In(Settings), "change": Out(1), "changed": Out(Settings),
            "settled": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.serializer = serializer = Serializer(width=self.width)
        wiring.connect(m, wiring.flipped(self.readable), serializer.i)
        item, has = serializer.o.payload, self.features
        kind, command, good, has_room = Signal(8), Signal(8), Signal(), Signal()
        value, count, size = Signal(8 * ADDRESS_BYTES), Signal(3), Signal(3)  # the newest bytes; how many of an item are here, and make one
        newest = Signal.like(value)
        table, entries, is_count, lists = Signal(64), Signal(32), Signal(), Signal(2)  # lists of the table that are over
        is_mode, is_table, is_address, is_pairs = (Signal() for _ in range(4))
        m.d.comb += [
            newest.eq(value >> 8 | item.byte << 40),
            self.changed.eq(self.settings),
            self.writable.payload.first.eq(1),
            self.writable.payload.last.eq(1),
            self.writable.payload.byte_count.eq(has_room),
            self.writable.payload.data.eq(Mux(good, spec.ACK_OK, spec.ACK_ERR)),
        ]
        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += self.chains.ready.eq(1)
                m.d.sync += [
                    has_room.eq(self.chains.payload.writable_bytes != 0), good.eq(0), table.eq(0), lists.eq(0), count.eq(0), is_count.eq(1),
                ]  # fmt: skip
                with m.If(self.chains.valid):
                    m.next = "TAKE_CLASS"
                    with m.If(self.chains.payload.readable_bytes == 0):
                        m.next = "ANSWER"
            for state, target, following in (("TAKE_CLASS", kind, "TAKE_COMMAND"), ("TAKE_COMMAND", command, "KNOW")):
                with m.State(state):
                    m.d.comb += serializer.o.ready.eq(1)
                    m.d.sync += target.eq(item.byte)
                    with m.If(serializer.o.valid):
                        m.next = following
                        with m.If(item.end):
                            m.next = "ANSWER"
            with m.State("KNOW"):
                mode = (kind == spec.CTRL_RX) & ((command == spec.CTRL_RX_PROMISC) | (command == spec.CTRL_RX_ALLMULTI))
                pairs_set = (kind == spec.CTRL_MQ) & (command == spec.CTRL_MQ_VQ_PAIRS_SET) & (self.pairs > 1)
                m.d.sync += [
                    is_mode.eq(mode & has[spec.F_CTRL_RX]),
                    is_table.eq((kind == spec.CTRL_MAC) & (command == spec.CTRL_MAC_TABLE_SET) & has[spec.F_CTRL_RX]),
                    is_address.eq((kind == spec.CTRL_MAC) & (command == spec.CTRL_MAC_ADDR_SET) & has[spec.F_CTRL_MAC_ADDR]),
                    is_pairs.eq(pairs_set & has[spec.F_MQ]),
                    size.eq(Mux(kind == spec.CTRL_RX, 1, Mux(kind == spec.CTRL_MQ, 2, ADDRESS_BYTES))),
                ]
                with m.If((kind == spec.CTRL_MAC) & (command == spec.CTRL_MAC_TABLE_SET)):
                    m.d.sync += size.eq(4)
                m.next = "TAKE_DATA"
            with m.State("TAKE_DATA"):
                m.d.comb += serializer.o.ready.eq(1)
                with m.If(serializer.o.valid & item.end):
                    fits = Mux(is_table, (lists == 2) & (count == 0), count == size)
                    m.d.sync += good.eq(item.ok & fits & has_room & (is_mode | is_table | is_address | is_pairs))
                    m.next = "APPLY"
                with m.Elif(serializer.o.valid):
                    m.d.sync += [value.eq(newest), count.eq(count + (count != 7))]
                    with m.If(is_table & (count + 1 == size)):
                        m.d.sync += count.eq(0)
                        self._list_item(m, newest, is_count, entries, lists, size, table)
            with m.State("APPLY"):
                pairs = value[32:]
                m.d.sync += good.eq(good & ~(is_mode & (value[41:] != 0)) & ~(is_pairs & ((pairs == 0) | (pairs > self.pairs))))
                m.next = "CHANGE"
            with m.State("CHANGE"):
                m.d.comb += self.change.eq(good)
                with m.If(is_mode & (command == spec.CTRL_RX_PROMISC)):
                    m.d.comb += self.changed.promiscuous.eq(value[40])
                with m.If(is_mode & (command == spec.CTRL_RX_ALLMULTI)):
                    m.d.comb += self.changed.all_multicast.eq(value[40])
                with m.If(is_table):
                    m.d.comb += self.changed.table.eq(table)
                with m.If(is_address):
                    m.d.comb += self.changed.mac.eq(value)
                with m.If(is_pairs):
                    m.d.comb += self.changed.pairs.eq(value[32:])
                m.next = "SETTLE"
            with m.State("SETTLE"):
                with m.If(self.settled):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += self.writable.valid.eq(1)
                with m.If(self.writable.ready):
                    m.next = "TAKE_CHAIN"
        return m

    @staticmethod
    def _list_item(m, newest, is_count, entries, lists, size, table):
        """A number of entries, or an entry, of the address table is here whole."""
        with m.If(is_count):
            number = newest[16:]
            m.d.sync += [entries.eq(number), is_count.eq(number == 0), size.eq(Mux(number == 0, 4, ADDRESS_BYTES))]
            with m.If(number == 0):
                m.d.sync += lists.eq(lists + (lists != 3))
        with m.Else():
            m.d.sync += [table.eq(table | 1 << table_hash(newest)), entries.eq(entries - 1)]
            with m.If(entries == 1):
                m.d.sync += [lists.eq(lists + (lists != 3)), is_count.eq(1), size.eq(4)]
