"""Ports of a virtio back end, driven without rings: chains and their readable bytes in, packets out."""

import random

import cocotb
from amaranth.lib import data
from cocotb.triggers import RisingEdge

from ..rtl.dma.layouts import ChainBeat
from ..rtl.tlp.layouts import BurstStatus
from ..rtl.virtio.layouts import Chain
from .run import params
from .stream import Stream, pack, reader, start, unpack

__all__ = ["BackEndBench", "BackEndPort", "beats_of", "taken_packets"]


def beats_of(layout, content, **last):
    """Return the payloads of the packet ``content``, at least one; ``last``: further fields of its last beat."""
    lanes = data.Layout.cast(layout)["data"].width // 8
    parts = [content[at : at + lanes] for at in range(0, len(content), lanes)] or [b""]
    return [
        pack(layout, data=int.from_bytes(part, "little"), byte_count=len(part), first=n == 0, last=n == len(parts) - 1,
             **(last if n == len(parts) - 1 else {}))
        for n, part in enumerate(parts)
    ]  # fmt: skip


def taken_packets(layout, beats):
    """Remove whole packets from the front of ``beats`` (payloads) and return them: ``(bytes, last beat)``; their form is checked."""
    lanes, packets, content, used = data.Layout.cast(layout)["data"].width // 8, [], b"", 0
    for n, beat in enumerate(unpack(layout, payload) for payload in beats):
        if bool(beat.first) != (n == used) or not (beat.last or beat.byte_count == lanes):
            raise AssertionError(f"beat {n - used} of a packet is {beat}")
        content += beat.data.to_bytes(lanes, "little")[: beat.byte_count]
        if beat.last:
            packets.append((content, beat))
            content, used = b"", n + 1
    del beats[:used]
    return packets


class BackEndPort:
    """Port ``n`` of the back end ``dut`` with data width ``width``.

    Attributes
    ----------
    chains, readable, writable : :class:`Stream`
        Its streams; whoever wants answers makes ``writable`` ready.
    answers : list
        Payloads of the beats that came at ``writable``.
    """

    def __init__(self, dut, n, width):
        self.clk, self.layout = dut.clk, ChainBeat(width)
        self._last = pack(self.layout, last=1)
        self.chains, self.readable, self.writable = (Stream(dut, f"{name}__{n}") for name in ("chains", "readable", "writable"))
        self.answers = []
        cocotb.start_soon(self.writable.watch(self.answers))

    async def give(self, readable=b"", writable_bytes=0, status=BurstStatus.OK):
        """Hand over a chain with the bytes ``readable``, whose fetch ended in ``status``."""
        await self.chains.put(pack(Chain, readable_bytes=len(readable), writable_bytes=writable_bytes))
        if readable:
            await self.readable.put_many(beats_of(self.layout, readable, status=status))

    async def answer(self):
        """Return the bytes of the next packet of ``writable``."""
        while not (packets := taken_packets(self.layout, self.answers[: self._end()])):
            await RisingEdge(self.clk)
        del self.answers[: self._end()]
        return packets[0][0]

    def _end(self):
        """Return where the first packet of ``answers`` ends."""
        return next((n + 1 for n, beat in enumerate(self.answers) if beat & self._last), 0)


class BackEndBench:
    """A back end ``dut`` with some ports. Parameter of the run is ``width``; ``lanes`` are the bytes of a beat.

    A back end that is ``suspended`` and gives something at a waiting port, or is ``stopped`` and gives or has not taken something at any,
    raises AssertionError. [rtl/virtio/README.md]
    """

    def __init__(self, dut):
        self.dut = dut

    async def begin(self, ports=1, *, waiting=(0,)):
        """Reset; return that many :class:`BackEndPort`, whose movers have settled; ``waiting``: those that wait for the outside."""
        self.rng, self.width = random.Random(cocotb.RANDOM_SEED), params()["width"]
        self.lanes = self.width // 8
        await start(self.dut)
        for n in range(ports):
            getattr(self.dut, f"settled__{n}").value = 1
            getattr(self.dut, f"assured__{n}").value = 1
        made = [BackEndPort(self.dut, n, self.width) for n in range(ports)]
        cocotb.start_soon(self._watch("suspended", [made[n].writable for n in waiting]))
        cocotb.start_soon(self._watch("stopped", [one for port in made for one in (port.chains, port.readable, port.writable)]))
        return made

    async def gives_an_empty_buffer_back(self, port):
        """Give a waiting ``port`` a buffer without room, suspend at once; AssertionError when it is not back, or not suspended for good."""
        port.writable.set_ready(1)
        await port.give(writable_bytes=0)
        self.dut.suspend.value = 1
        while not self.dut.suspended.value:
            await RisingEdge(self.dut.clk)
        await RisingEdge(self.dut.clk)
        assert port.answers and self.dut.suspended.value

    async def _watch(self, name, streams):
        level, read, edge = getattr(self.dut, name), reader(getattr(self.dut, name)), RisingEdge(self.dut.clk)
        while True:
            if not read():
                await RisingEdge(level)
            await edge
            for one in streams if read() else ():
                if one.read_valid():
                    raise AssertionError(f"{one.name} is valid while {name} is 1")
