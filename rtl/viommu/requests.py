"""The request queue of a virtio-iommu: requests parsed, carried out, answered."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..iommu.gate import MAX_FUNCTIONS
from ..spec import virtio_iommu as spec
from ..stream.round_robin import number
from ..tlp.layouts import BurstStatus
from ..virtio.layouts import Chain
from ..virtio.ports import port_streams
from .intervals import Order, OrderKind, Outcome
from .layouts import SLOT_BITS, SLOTS, Endpoint, Forget
from .translator import FRAME_BITS, PAGE_BITS

FORGET_PAGES_LOG2 = 4  # so many pages are forgotten one by one, more as all
NEEDED = {spec.T_ATTACH: spec.ATTACH_BYTES, spec.T_DETACH: spec.DETACH_BYTES, spec.T_MAP: spec.MAP_BYTES, spec.T_UNMAP: spec.UNMAP_BYTES,
          spec.T_PROBE: spec.PROBE_BYTES}  # fmt: skip

# What the fields of requests are, from byte 0 of the device-readable part on. [VIRTIO1.4 5.13.6]
_Attach = data.StructLayout({"type": 8, "head": 24, "domain": 32, "endpoint": 32, "flags": 32, "reserved": 32})
_Map = data.StructLayout({"type": 8, "head": 24, "domain": 32, "virt_start": 64, "virt_end": 64, "phys_start": 64, "flags": 32})
_Unmap = data.StructLayout({"type": 8, "head": 24, "domain": 32, "virt_start": 64, "virt_end": 64, "reserved": 32})
_Probe = data.StructLayout({"type": 8, "head": 24, "endpoint": 32})
_Request = data.UnionLayout({"attach": _Attach, "map": _Map, "unmap": _Unmap, "probe": _Probe})


class Requests(wiring.Component):
    """Serves one request after the other: keeps which endpoint is in which domain, orders changes of the mappings. [VIRTIO1.4 5.13.6]

    The status is in the fourth of the last bytes that the device may write, whatever their number; those in front of it are the properties
    that were asked for, or zero. A request of a type that is unknown or was not negotiated, shorter than its type wants, or without room
    for its tail is given back unwritten; bytes behind a request are ignored. What could not be fetched ends in IOERR.

    Where the standard leaves it open: UNMAP with ``reserved`` set does nothing (INVAL); DETACH from a domain in which the endpoint is not:
    INVAL; MAP with its end not above its start, UNMAP with its end below it: INVAL; a MAP beyond the physical addresses that there are:
    FAULT; several faults: the first of flags, domain, alignment, range, order, reserved regions, physical addresses, what is mapped.

    ATTACH, DETACH and UNMAP are answered when no access by what was before is under way: after ``forget`` and a fence.

    Latency: about 20 cycles, the order, and the fence. Throughput: one at a time.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits: 64, 128, 256 or 512.
    device : :class:`.device.IommuDevice`
        What it tells of itself.

    Members
    -------
    chains, readable, writable
        The queue, see :func:`..virtio.ports.port_streams`.
    features : ``In(7)``
        What the driver accepted.
    orders, outcomes : ``Out(stream.Signature(Order(key_bits, 44)))``, ``In(stream.Signature(Outcome))``
        For the intervals; keys are page numbers below a slot.
    attachments : ``Out(Endpoint).array(8)``
        Where each function is attached.
    forget : ``Out(stream.Signature(Forget))``
        For the translator.
    fence, fenced : ``Out(stream.Signature(0))``, ``In(stream.Signature(0))``
        Of the gate.
    is_idle : ``Out(1)``
        There is no request.
    """

    def __init__(self, *, width, device):
        self.width, self.device = width, device
        self.key_bits = SLOT_BITS + device.input_bits - PAGE_BITS
        super().__init__({
            **port_streams(width),
            "features": In(7),
            "orders": Out(stream.Signature(Order(self.key_bits, FRAME_BITS))),
            "outcomes": In(stream.Signature(Outcome)),
            "attachments": Out(Endpoint).array(MAX_FUNCTIONS),
            "forget": Out(stream.Signature(Forget)),
            "fence": Out(stream.Signature(0)),
            "fenced": In(stream.Signature(0)),
            "is_idle": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        device, page_top = self.device, (1 << self.device.input_bits - PAGE_BITS) - 1
        beat = self.readable.payload
        chain, raw, beats, is_bad = Signal(Chain), Signal(8 * spec.MAP_BYTES), Signal(range(8)), Signal()
        request = _Request(raw)
        attach, mapping, unmap, kind = request.attach, request.map, request.unmap, request.attach.type

        # Domains, by slot.
        live, is_bypass = Signal(SLOTS), Signal(SLOTS)
        names = Array(Signal(32, name=f"domain_{slot}") for slot in range(SLOTS))
        attachments = Array(self.attachments)

        # Of the request: what its fields mean.
        exists, slot, free = Signal(), Signal(SLOT_BITS), Signal(SLOT_BITS)
        is_endpoint, function = Signal(), Signal(range(MAX_FUNCTIONS))
        is_whole, is_aligned, is_ordered, is_in_range, is_reserved, is_domain = (
            Signal(name=name) for name in ("is_whole", "is_aligned", "is_ordered", "is_in_range", "is_reserved", "is_domain"))
        length, phys_end = Signal(64), Signal(65)
        has = Signal(SLOTS)  # whose domain has the ID
        m.d.comb += has.eq(Cat(live[n] & (names[n] == attach.domain) for n in range(SLOTS)))

        here = Signal(Endpoint)  # where the endpoint is attached, or was until this request
        m.d.comb += here.eq(attachments[function])
        was, is_alone = Signal(Endpoint), Signal()
        m.d.comb += is_alone.eq(~Cat(one.attached & (one.slot == was.slot) for one in self.attachments).any())

        order, forgets_pages, clears = self.orders.p, Signal(), Signal()
        next_page, last_page = Signal(device.input_bits - PAGE_BITS), Signal(device.input_bits - PAGE_BITS)

        # The answer: ``left`` bytes still to give.
        lanes, out = self.width // 8, self.writable.p
        status, is_silent, left, first = Signal(8), Signal(), Signal(32), Signal()
        properties = [Const(int.from_bytes(device.properties[at : at + lanes], "little"), self.width)
                      for at in range(0, len(device.properties), lanes)]  # fmt: skip
        row = Signal(range(len(properties) + 1))

        def answer(code):
            m.d.sync += status.eq(code)
            m.next = "BEGIN_ANSWER"

        def page_of(address):
            return address[PAGE_BITS : device.input_bits]

        with m.FSM():
            with m.State("TAKE_CHAIN"):
                m.d.comb += [self.chains.ready.eq(1), self.is_idle.eq(1)]
                m.d.sync += [chain.eq(self.chains.payload), beats.eq(0), is_bad.eq(0), is_silent.eq(0), clears.eq(0)]
                with m.If(self.chains.valid):
                    m.next = "COLLECT"
                    with m.If(self.chains.p.readable_bytes == 0):
                        m.next = "MEASURE"
            with m.State("COLLECT"):
                m.d.comb += self.readable.ready.eq(1)
                with m.If(self.readable.valid):
                    for n in range(-(-len(raw) // self.width)):
                        with m.If(beats == n):
                            m.d.sync += raw[n * self.width : (n + 1) * self.width].eq(beat.data)
                    m.d.sync += beats.eq(beats + (beats != 7))
                    with m.If(beat.last):
                        m.d.sync += is_bad.eq(beat.status != BurstStatus.OK)
                        m.next = "MEASURE"
            with m.State("MEASURE"):
                granule = (1 << device.granule_bits) - 1
                starts = mapping.virt_start | mapping.phys_start
                m.d.sync += [
                    is_whole.eq(Cat((kind == one) & (chain.readable_bytes >= least) for one, least in self._needed().items()).any()),
                    exists.eq(has.any()), slot.eq(number(has)), free.eq(number((~live & -~live)[:SLOTS])),
                    is_domain.eq((attach.domain >= device.domain_range[0]) & (attach.domain <= device.domain_range[1])),
                    length.eq(mapping.virt_end - mapping.virt_start), is_ordered.eq(mapping.virt_end > mapping.virt_start),
                    is_aligned.eq((starts & granule == 0) & (mapping.virt_end & granule == granule)),
                    is_in_range.eq(mapping.virt_end[device.input_bits :] == 0),
                    is_reserved.eq(Cat(0, *((mapping.virt_start <= r.end) & (mapping.virt_end >= r.start) for r in device.regions)).any()),
                ]  # fmt: skip
                named = Mux(kind == spec.T_PROBE, request.probe.endpoint, attach.endpoint)
                m.d.sync += is_endpoint.eq(Cat(named == n for n in device.endpoints).any())
                m.d.sync += function.eq(named)
                m.next = "DECODE"
            with m.State("DECODE"):
                m.d.sync += [phys_end.eq(mapping.phys_start + length), was.eq(here)]
                is_off = ((kind == spec.T_MAP) | (kind == spec.T_UNMAP)) & ~self.features[spec.F_MAP_UNMAP]
                with m.If((chain.writable_bytes < spec.TAIL_BYTES) | ((~is_whole | is_off) & ~is_bad)):
                    m.d.sync += is_silent.eq(1)
                    m.next = "BEGIN_ANSWER"
                with m.Elif(is_bad):
                    answer(spec.S_IOERR)
                with m.Else():
                    with m.Switch(kind):
                        for one, name in ((spec.T_ATTACH, "ATTACH"), (spec.T_DETACH, "DETACH"), (spec.T_MAP, "MAP"),
                                          (spec.T_UNMAP, "UNMAP"), (spec.T_PROBE, "PROBE")):  # fmt: skip
                            with m.Case(one):
                                m.next = name

            with m.State("ATTACH"):
                wants_bypass = attach.flags[spec.ATTACH_F_BYPASS]
                is_unknown = (attach.flags[spec.ATTACH_F_BYPASS + 1 :] != 0) | (wants_bypass & ~self.features[spec.F_BYPASS_CONFIG])
                with m.If((attach.reserved != 0) | is_unknown):
                    answer(spec.S_INVAL)
                with m.Elif(~is_endpoint):
                    answer(spec.S_NOENT)
                with m.Elif(~is_domain):
                    answer(spec.S_RANGE)
                with m.Elif(exists & (is_bypass.bit_select(slot, 1) != wants_bypass)):
                    answer(spec.S_INVAL)
                with m.Elif(exists & was.attached & (was.slot == slot)):
                    answer(spec.S_OK)
                with m.Else():
                    target = Mux(exists, slot, free)
                    with m.If(~exists):
                        m.d.sync += [
                            live.bit_select(free, 1).eq(1), names[free].eq(attach.domain), is_bypass.bit_select(free, 1).eq(wants_bypass),
                        ]  # fmt: skip
                    m.d.sync += [
                        attachments[function].attached.eq(1), attachments[function].slot.eq(target),
                        attachments[function].is_bypass.eq(wants_bypass),
                    ]  # fmt: skip
                    m.next = "LEAVE"
            with m.State("DETACH"):
                with m.If(~is_endpoint):
                    answer(spec.S_NOENT)
                with m.Elif(~exists | ~was.attached | (was.slot != slot)):
                    answer(spec.S_INVAL)
                with m.Else():
                    m.d.sync += attachments[function].attached.eq(0)
                    m.next = "LEAVE"
            with m.State("LEAVE"):  # the domain in which the endpoint was ends with its last one
                with m.If(was.attached & is_alone):
                    m.d.sync += [live.bit_select(was.slot, 1).eq(0), clears.eq(~was.is_bypass)]
                m.next = "FENCE"
            with m.State("CLEAR"):  # behind the fence: until then what is under way finds all that was there
                m.d.comb += [
                    self.orders.valid.eq(1), order.kind.eq(OrderKind.REMOVE), order.first.eq(Cat(Const(0, len(next_page)), was.slot)),
                    order.last.eq(Cat(Const(-1, len(next_page)), was.slot)),
                ]  # fmt: skip
                with m.If(self.orders.ready):
                    m.next = "AWAIT_REMOVAL"

            with m.State("MAP"):
                with m.If((mapping.flags[spec.MAP_F_MMIO + 1 :] != 0) | (mapping.flags[spec.MAP_F_MMIO] & ~self.features[spec.F_MMIO])):
                    answer(spec.S_INVAL)
                with m.Elif(~exists):
                    answer(spec.S_NOENT)
                with m.Elif(is_bypass.bit_select(slot, 1)):
                    answer(spec.S_INVAL)
                with m.Elif(~is_aligned | ~is_in_range):
                    answer(spec.S_RANGE)
                with m.Elif(~is_ordered | is_reserved):
                    answer(spec.S_INVAL)
                with m.Elif(phys_end[FRAME_BITS + PAGE_BITS :] != 0):
                    answer(spec.S_FAULT)
                with m.Else():
                    m.next = "INSERT"
            with m.State("INSERT"):
                m.d.comb += [
                    self.orders.valid.eq(1), order.kind.eq(OrderKind.INSERT), order.first.eq(Cat(page_of(mapping.virt_start), slot)),
                    order.last.eq(Cat(page_of(mapping.virt_end), slot)), order.page.eq(mapping.phys_start[PAGE_BITS:]),
                    order.readable.eq(mapping.flags[spec.MAP_F_READ]), order.writable.eq(mapping.flags[spec.MAP_F_WRITE]),
                ]  # fmt: skip
                with m.If(self.orders.ready):
                    m.next = "AWAIT_INSERTION"
            with m.State("AWAIT_INSERTION"):
                m.d.comb += self.outcomes.ready.eq(1)
                with m.If(self.outcomes.valid):
                    answer(Mux(self.outcomes.payload == Outcome.DONE, spec.S_OK,
                               Mux(self.outcomes.payload == Outcome.FULL, spec.S_NOMEM, spec.S_INVAL)))  # fmt: skip

            with m.State("UNMAP"):
                last = Mux(is_in_range, page_of(unmap.virt_end), page_top)
                m.d.sync += [
                    next_page.eq(page_of(unmap.virt_start)), last_page.eq(last),
                    forgets_pages.eq((last - page_of(unmap.virt_start))[FORGET_PAGES_LOG2:] == 0),
                ]  # fmt: skip
                with m.If(~exists):
                    answer(spec.S_NOENT)
                with m.Elif((unmap.reserved != 0) | is_bypass.bit_select(slot, 1) | (unmap.virt_end < unmap.virt_start)):
                    answer(spec.S_INVAL)
                with m.Elif(unmap.virt_start[device.input_bits :] != 0):
                    answer(spec.S_OK)
                with m.Else():
                    m.next = "REMOVE"
            with m.State("REMOVE"):
                m.d.comb += [
                    self.orders.valid.eq(1), order.kind.eq(OrderKind.REMOVE), order.first.eq(Cat(page_of(unmap.virt_start), slot)),
                    order.last.eq(Cat(last_page, slot)),
                    order.cuts_first.eq(unmap.virt_start[:PAGE_BITS] != 0),
                    order.cuts_last.eq(is_in_range & ~unmap.virt_end[:PAGE_BITS].all()),
                ]  # fmt: skip
                with m.If(self.orders.ready):
                    m.next = "AWAIT_REMOVAL"
            with m.State("AWAIT_REMOVAL"):
                m.d.comb += self.outcomes.ready.eq(1)
                with m.If(self.outcomes.valid):
                    m.next = "FORGET"
                    with m.If(self.outcomes.payload != Outcome.DONE):
                        answer(spec.S_RANGE)

            with m.State("FORGET"):
                m.d.comb += [self.forget.valid.eq(1), self.forget.p.is_page.eq(forgets_pages & ~clears), self.forget.p.page.eq(next_page)]
                m.d.sync += next_page.eq(next_page + 1)
                with m.If(clears):
                    answer(spec.S_OK)
                with m.Elif(~forgets_pages | (next_page == last_page)):
                    m.next = "FENCE"
            with m.State("FENCE"):
                m.d.comb += self.fence.valid.eq(1)
                with m.If(self.fence.ready):
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += self.fenced.ready.eq(1)
                with m.If(self.fenced.valid):
                    answer(spec.S_OK)
                    with m.If(clears):
                        m.next = "CLEAR"

            with m.State("PROBE"):
                with m.If(~is_endpoint):
                    answer(spec.S_NOENT)
                with m.Elif(chain.writable_bytes < len(device.properties) + spec.TAIL_BYTES):
                    answer(spec.S_INVAL)
                with m.Else():
                    answer(spec.S_OK)
            with m.State("BEGIN_ANSWER"):
                m.d.sync += [
                    left.eq(Mux(is_silent, 0, chain.writable_bytes)), first.eq(1),
                    row.eq(Mux((kind == spec.T_PROBE) & (status == spec.S_OK), 0, len(properties))),
                ]  # fmt: skip
                m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += self.writable.valid.eq(1)
                with m.If(self.writable.ready):
                    m.d.sync += [left.eq(left - lanes), first.eq(0), row.eq(row + (row != len(properties)))]
                    with m.If(out.last):
                        m.next = "TAKE_CHAIN"

        content = Array([*properties, Const(0, self.width)])[row]
        near_bits = (lanes + spec.TAIL_BYTES - 1).bit_length()
        m.d.comb += [
            out.data.eq(Cat(
                Mux((left[near_bits:] == 0) & (left[:near_bits] == lane + spec.TAIL_BYTES), status, content.word_select(lane, 8))
                for lane in range(lanes))),
            out.first.eq(first), out.last.eq(left <= lanes), out.byte_count.eq(Mux(out.last, left, lanes)),
        ]  # fmt: skip
        return m

    def _needed(self):
        """Return the least device-readable bytes of each type that is served."""
        return {kind: least for kind, least in NEEDED.items() if kind != spec.T_PROBE or self.device.regions}
