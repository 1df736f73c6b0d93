"""One function's data mover: a reader and a writer that share a client of gate and requester."""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..stream.arbiter import Arbiter
from ..tlp.layouts import Burst, Hint
from .layouts import ChainBeat, Segment, WriterDone, client_ports
from .reader import Reader
from .writer import Writer


class ScatterGather(wiring.Component):
    """Moves the bytes of scatter lists: readable lists out as packets, packets into writable lists.

    The contracts of :class:`.reader.Reader` and :class:`.writer.Writer`; reads and writes of one client leave through one
    stream of bursts, in turn.

    Latency, throughput: theirs.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    function, client : :class:`int`
        Identify the bursts at gate and requester.

    Members
    -------
    readable, writable : ``In(stream.Signature(Segment))``
        Scatter lists.
    o : ``Out(stream.Signature(ChainBeat(width)))``
        The bytes of readable lists.
    i : ``In(stream.Signature(ChainBeat(width)))``
        The bytes for writable lists.
    flows : ``In(1)``
        Of the writer.
    finished : ``Out(stream.Signature(WriterDone))``
        The ends of writable lists.
    hints : ``Out(stream.Signature(Hint))``
        Of the writer; the reader asks early enough.
    failed, settled, assured : ``Out(1)``
        Of the writer.
    passed : ``In(1)``
        Of the writer.
    bursts, read_data, write_data, write_done
        Towards gate and requester.
    stop, stopped : ``In(1)``, ``Out(1)``
        See "Stop" in rtl/README.md.
    """

    def __init__(self, *, width, function, client):
        self.width, self.function, self.client = width, function, client
        super().__init__({
            "readable": In(stream.Signature(Segment)),
            "writable": In(stream.Signature(Segment)),
            "o": Out(stream.Signature(ChainBeat(width))),
            "i": In(stream.Signature(ChainBeat(width))),
            "flows": In(1),
            "finished": Out(stream.Signature(WriterDone)),
            "hints": Out(stream.Signature(Hint)),
            "failed": Out(1),
            "settled": Out(1),
            "passed": In(1),
            "assured": Out(1),
            **client_ports(width),
            "stop": In(1),
            "stopped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.reader = reader = Reader(width=self.width, function=self.function, client=self.client)
        m.submodules.writer = writer = Writer(width=self.width, function=self.function, client=self.client)
        m.submodules.bursts = bursts = Arbiter(Burst, 2, direct=True)
        for inner, outer in (
            (reader.segments, self.readable), (reader.o, self.o), (reader.read_data, self.read_data),
            (writer.segments, self.writable), (writer.i, self.i), (writer.done, self.finished),
            (writer.write_data, self.write_data), (writer.write_done, self.write_done), (writer.hints, self.hints),
            (bursts.o, self.bursts),
        ):
            wiring.connect(m, inner, wiring.flipped(outer))
        wiring.connect(m, reader.bursts, bursts.i[0])
        wiring.connect(m, writer.bursts, bursts.i[1])
        m.d.comb += [
            self.failed.eq(writer.failed),
            self.settled.eq(writer.settled),
            self.assured.eq(writer.assured),
            writer.passed.eq(self.passed),
            reader.stop.eq(self.stop),
            writer.flows.eq(self.flows),
            writer.stop.eq(self.stop),
            self.stopped.eq(reader.stopped & writer.stopped),
        ]
        return m
