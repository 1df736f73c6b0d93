"""UsedRings between a pretended fetch side, back ends and lanes; every access is judged in the order in which it leaves."""

import random
from collections import deque
from types import SimpleNamespace

import cocotb
import pytest
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from cocotb.triggers import ClockCycles, Event, Lock, RisingEdge

from ringwall.rtl.dma.layouts import WriterDone
from ringwall.rtl.tlp.layouts import BurstData, BurstDone, BurstStatus
from ringwall.rtl.virtio.layouts import Flight, Notification, QueueCommand, QueueOperation, RingAccess
from ringwall.rtl.virtio.used import ROOM, UsedRings
from ringwall.sim.run import params, run
from ringwall.sim.stream import Stream, cycle, pack, random_ready, start, unpack

PORTS = (  # function 0: two queues of one back end; function 1: one port that waits, one that does not
    SimpleNamespace(function=0, sizes=(64, 64), waits=False),
    SimpleNamespace(function=1, sizes=(64,), waits=True),
    SimpleNamespace(function=1, sizes=(64,), waits=False),
)
QUEUES = tuple((n, port.function) for n, port in enumerate(PORTS) for _ in port.sizes)
WITH_PACKETS = (64, 256)  # widths at which a back end has packets of several chains
BAD = tuple(status for status in BurstStatus if status != BurstStatus.OK)
WRITE, AVAIL, USED = 2, 1 << 7, 1 << 15
FOUR_GIB = 1 << 32


class Broken(wiring.Component):
    """UsedRings whose failures break their function until it is stopped, as in the ring engine."""

    def __init__(self, *, width):
        self.width = width
        ports = [SimpleNamespace(**vars(port) | {"waits": port.waits and width in WITH_PACKETS}) for port in PORTS]
        self.rings = UsedRings(width=width, functions=2, ports=ports)
        super().__init__({
            name: member for name, member in self.rings.signature.members.items() if name != "broken"
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.rings = rings = self.rings
        for name, member in self.signature.members.items():
            ours, theirs = getattr(self, name), getattr(rings, name)
            if member.is_signature:
                pairs = zip(ours, theirs, strict=True) if member.dimensions else [(ours, theirs)]
                for one, other in pairs:
                    if member.flow == Out:
                        wiring.connect(m, other, wiring.flipped(one))
                    else:
                        wiring.connect(m, wiring.flipped(one), other)
            elif member.flow == Out:
                m.d.comb += ours.eq(theirs)
            else:
                m.d.comb += theirs.eq(ours)
        m.d.sync += rings.broken.eq((rings.broken | rings.failed) & ~self.stop)
        return m


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_used(request, width):
    tests = ["rings_are_published"]
    if width == 256:
        tests += ["failures_publish_nothing", "stop_at_any_time", "reset_at_any_time", "chains_per_cycle", "nobody_waits_for_another",
                  "indices_wrap"]  # fmt: skip
    run(Broken(width=width), module=__name__, node=request.node.nodeid, testcase=tests, params={"width": width})


def test_parameters_are_checked():
    """VIRTIO-USED-8: bad widths, function counts, ports, queue counts and depths are refused with a sentence."""
    good = {"width": 64, "functions": 1, "ports": (SimpleNamespace(function=0, sizes=(16,), waits=False),)}
    for bad in ({"width": 63}, {"functions": 0}, {"ports": ()}, {"chains": 1},
                {"ports": (SimpleNamespace(function=1, sizes=(16,), waits=False),)},
                {"ports": (SimpleNamespace(function=0, sizes=(16,) * 65, waits=False),)}):
        with pytest.raises(ValueError, match=r"must be .*, not"):
            UsedRings(**good | bad)


class Ring:
    """What the driver of one queue sees and wants, and the chains that it is owed. Positions are counted without end."""

    def __init__(self, rng, queue, *, packed=None, event_index=None, in_order=None, size=None):
        self.queue = queue
        self.packed, self.event_index, self.in_order = (
            rng.getrandbits(1) if given is None else given for given in (packed, event_index, in_order))
        self.size = size or (rng.choice([1, 3, 5, 8, 13, 64, 100]) if self.packed else rng.choice([1, 2, 8, 16, 64]))
        base = rng.getrandbits(26) << 38 | queue << 32  # the ring lies in 4 GiB of its own
        self.descriptor = base + 16 * rng.randrange(1 << 16)
        self.driver = base + (1 << 30) + 4 * rng.randrange(64)
        self.device = base + (1 << 31) + 4 * rng.randrange(64)
        if not self.packed:
            self.driver += rng.choice([0, 2])
        self.finished = deque()  # chains that it has finished
        self.written = self.published = self.asked = self.sure = 0  # positions: elements written, visible, (surely) asked for
        self.ends = []  # when writes ended, and the position behind each
        self.durable = 0  # elements up to here are in writes that ended OK
        self.in_packet = self.kept = None  # more of the newest chain's packet will come; the position that is kept back, and its chain
        self.whole = {0}  # positions between packets
        self.kept_once = False
        self.packet_slots = 0  # of the packet that the back end has begun
        self.half = None  # the chain whose id is written and whose len is not
        self.question = None
        self.serving = True
        self.wanted, self.told, self.wish = 0, 0, None
        self.handed = 0  # position behind what back ends have
        self.is_idle = False

    @property
    def visible(self):
        return self.durable if self.packed else self.published

    def command(self):
        return pack(
            QueueCommand, operation=QueueOperation.ENABLE, queue=self.queue, size=self.size, descriptor_iova=self.descriptor,
            rules={"packed": self.packed, "event_index": self.event_index, "in_order": self.in_order},
            driver_iova=self.driver, device_iova=self.device)

    def take(self, ends, what):
        """Take finished chains up to the first that ``ends`` off the list: it, and what its element stands for; return it and the step."""
        step = 0
        while self.finished:
            chain = self.finished.popleft()
            step += chain.slots if self.packed else 1
            if ends(chain, step):
                self.in_packet = chain.more
                return chain, step
            assert self.in_order and chain.length == chain.writable, f"{chain} is left out before {what}"
        raise AssertionError(f"{what} is not finished")

    def descriptor_write(self, address, content):
        """Judge a used descriptor. The first of a packet is kept back: others come before it, and it comes when they are complete."""
        slot, offset = divmod(address - self.descriptor, 16)
        assert offset == 0 and 0 <= slot < self.size, f"descriptor at {address:#x}"
        length, ident, flags = (int.from_bytes(content[a:b], "little") for a, b in ((8, 12), (12, 14), (14, 16)))
        if self.kept and not self.in_packet:
            (position, chain), self.kept = self.kept, None
            assert chain.id == ident
        else:
            if slot != self.written % self.size:
                assert not self.kept
                ahead = (slot - self.written) % self.size
                first, step = self.take(lambda chain, step: step == ahead, f"slot {slot}")
                assert first.more, f"{first} is kept back"
                self.kept = self.written, first
                self.kept_once = True
                self.written += step
            position = self.written
            chain, step = self.take(lambda chain, step: chain.id == ident, f"{ident:#x}")
            assert self.kept or not chain.more, f"{chain} is shown before the rest of its packet"
            self.written += step
        wrap = 1 - position // self.size % 2
        assert slot == position % self.size
        assert (length, flags) == (chain.length, (AVAIL | USED) * wrap | WRITE * (chain.length != 0)), f"{chain} {flags:#x}"
        if not self.kept:
            self.whole.add(self.written)

    def write(self, address, content):
        """Judge a write; return the position that the driver may see when it has ended, or None if it is the used index."""
        if self.packed:
            assert len(content) % 16 == 0, f"a descriptor is torn: {len(content)} bytes"
            for n in range(0, len(content), 16):
                self.descriptor_write(address + n, content[n : n + 16])
            return max(self.whole)
        if address == self.device + 2:
            index = int.from_bytes(content, "little")
            assert len(content) == 2
            step = index - self.published & 0xFFFF
            assert step > 0 and self.published + step <= self.durable, f"index {index}: {self.published}, {self.durable}"
            self.published += step
            assert self.published in self.whole, f"index {index} is inside a packet"
            return None
        assert len(content) % 4 == 0
        for n in range(0, len(content), 4):
            place, word = self.device + 4 + 8 * (self.written % self.size), int.from_bytes(content[n : n + 4], "little")
            if self.half is None:
                assert address + n == place, f"id at {address + n:#x}, not {place:#x}"
                self.half = self.take(lambda chain, step, word=word: chain.id == word, f"{word:#x}")
            else:
                chain, step = self.half
                assert (address + n, word) == (place + 4, chain.length), f"len {word} of {chain}"
                self.half, self.written = None, self.written + step
                if not self.in_packet:
                    self.whole.add(self.written)
        return max(self.whole)

    def read(self, address, length):
        """Judge a read: the driver is asked about all that it has seen since the last question."""
        where = self.driver if self.packed or not self.event_index else self.driver + 4 + 2 * self.size
        assert (address, length) == (where, 4 if self.packed else 2)
        assert self.question is None, "two questions at once"
        low = self.visible
        if self.packed:  # of what was written just now nobody knows whether this question covers it
            low = max([self.sure, *(position for at, position in self.ends if at < cycle() - 600)])
        self.question = SimpleNamespace(sure=range(self.asked, low), possible=range(self.sure, self.visible))
        self.asked, self.sure = self.visible, low

    def answer(self, rng):
        """Return what the driver wants to hear, and remember whether it means a notification (None: nobody knows)."""
        question, self.question = self.question, None
        near = question.possible.stop + rng.choice([-3, -2, -1, -1, -1, 0, 1, 2, rng.randrange(-self.size, self.size + 1)])
        if not self.packed:
            value = near & 0xFFFF if self.event_index else rng.choice([0, 1, 0xFFFE, 0xFFFF])
            if self.event_index:
                wanted = any(entry & 0xFFFF == value for entry in question.sure)
            else:
                wanted = not value & 1
            content = value.to_bytes(2, "little")
        else:
            kind = rng.choice([0, 1, 2, 2, 2, 3])
            near = max(near, 0)
            off, wrap = near % self.size, 1 - near // self.size % 2
            if rng.random() < 0.05:
                off = rng.randrange(1 << 15)  # as a broken driver
            content = (off | wrap << 15 | kind << 16 | rng.getrandbits(14) << 18).to_bytes(4, "little")
            wanted = kind != 1
            if kind == 2 and self.event_index:
                sure, possible = (
                    any((entry % self.size, 1 - entry // self.size % 2) == (off, wrap) for entry in entries)
                    for entries in (question.sure, question.possible))
                wanted = sure or (None if possible or off >= self.size else False)
        self.wish = wanted
        self.wanted += wanted is not False
        return content


def fine(function):
    """Return how an access ends that nobody spoils."""
    return BurstStatus.OK


class Bench:
    """Drives and judges everything. ``write_status``, ``read_status``: how an access of a function ends."""

    def __init__(self, dut):
        self.dut, self.rng, self.width = dut, random.Random(cocotb.RANDOM_SEED), params()["width"]
        self.row, self.beat = max(self.width, 128) // 8, self.width // 8
        self.write_status = self.read_status = fine
        self.latency = lambda: self.rng.randrange(4, 60)
        self.depth = 2 * ROOM
        self.rings = [None] * len(QUEUES)
        self.used_ids = 0
        self.log = []

    async def begin(self, stalls=0.8, functions=(0, 1), back_ends=True):
        dut = self.dut
        self.commands, self.notes = await start(dut, "commands", "notifications")
        self.lanes = [
            SimpleNamespace(accesses=deque(), news=Event(), level=0, late=0, others=0, failed=False, blocked=False) for _ in range(2)
        ]
        self.flights = [Stream(dut, f"flights__{n}") for n in range(len(PORTS))]
        self.backs = [Stream(dut, f"finished__{n}") for n in range(len(PORTS))]
        self.held = [deque() for _ in PORTS]  # chains that each back end has
        self.going = [deque() for _ in PORTS]
        self.locks = [Lock() for _ in PORTS]
        self.others = stalls < 1
        for n in functions:
            push = Stream(dut, f"push__{n}")
            cocotb.start_soon(push.watch(SimpleNamespace(append=lambda payload, n=n: self.taken(n, payload))))
            if stalls < 1:
                cocotb.start_soon(random_ready(push, self.rng, stalls))
            else:
                push.set_ready(1)
            cocotb.start_soon(self.serve(n))
        if self.others:
            cocotb.start_soon(random_ready(self.notes, self.rng, 0.5))
        else:
            self.notes.set_ready(1)
        cocotb.start_soon(self.notes.watch(SimpleNamespace(append=self.noted)))
        self.failures = [0, 0]
        if back_ends:
            cocotb.start_soon(self.watch_failures())
            for n in range(len(PORTS)):
                cocotb.start_soon(self.finish(n))
        self.set_room()

    async def watch_failures(self):
        while True:
            await RisingEdge(self.dut.clk)
            value = int(self.dut.failed.value)
            for n in range(2):
                if value >> n & 1:
                    self.failures[n] += 1
                    self.lanes[n].failed = True

    def set_room(self):
        for lane in self.lanes:
            lane.room = lane.level <= self.depth - ROOM and not lane.blocked
            lane.late = 0 if lane.room else lane.late
        self.dut.room.value = sum(lane.room << n for n, lane in enumerate(self.lanes))

    def taken(self, function, payload):
        """An access left."""
        access, lane = unpack(RingAccess(self.width), payload), self.lanes[function]
        lane.level += 1
        lane.late += not lane.room
        assert lane.late <= ROOM, "room was not kept"
        queue = next((q for q, ring in enumerate(self.rings) if ring and ring.descriptor >> 32 == access.iova >> 32), None)
        assert queue is not None and QUEUES[queue][1] == function, f"access at {access.iova:#x} of function {function}"
        ring = self.rings[queue]
        self.log.append((cycle(), queue, access))
        assert ring.serving or not ring.is_idle, "an access of an idle queue"
        until = None
        if access.is_write:
            first = access.iova % self.row
            assert first + access.length_bytes <= self.row, "a write crosses a row"
            content = access.data.to_bytes(self.row, "little")[first : first + access.length_bytes]
            if access.length_bytes == 2:
                content = access.index.to_bytes(2, "little")
            until = ring.write(access.iova, content)
        else:
            ring.read(access.iova, access.length_bytes)
        lane.accesses.append((ring, access, until))
        lane.news.set()
        self.set_room()

    async def serve(self, function):
        """Carry out the accesses of a function in their order; reads are answered some time later."""
        lane, done, answers = self.lanes[function], Stream(self.dut, f"write_done__{function}"), Stream(self.dut, f"answers__{function}")
        waiting, layout = [], BurstData(self.width)
        due = 0
        while True:
            if self.others or lane.accesses or waiting:
                await RisingEdge(self.dut.clk)
            else:
                lane.news.clear()
                await lane.news.wait()
            now = cycle()
            if self.others and now % 64 == 0:  # of the lane, who come and go
                lane.level -= lane.others
                lane.others = self.rng.choice([0, 0, self.depth])
                lane.level += lane.others
                self.set_room()
            if lane.accesses and not lane.blocked and now >= due:
                ring, access, until = lane.accesses.popleft()
                lane.level -= 1
                self.set_room()
                due = now + self.latency() // 8
                if access.is_write:
                    status = self.write_status(function)
                    if status == BurstStatus.OK and not lane.failed:
                        if until is not None:
                            ring.durable = until
                            ring.ends.append((now, until))
                    lane.failed |= status != BurstStatus.OK
                    await done.put(pack(BurstDone, status=status))
                else:
                    waiting.append((now + self.latency(), ring, access))
            ripe = next((item for item in waiting if item[0] <= now), None)
            if ripe:
                waiting.remove(ripe)
                _, ring, access = ripe
                status = self.read_status(function)
                content = ring.answer(self.rng) if status == BurstStatus.OK else b""
                value = int.from_bytes(content, "little") << 8 * (access.iova % self.beat)
                await answers.put(pack(layout, data=value, first=1, last=1, cookie=access.cookie | 1 << 11, status=status))

    def noted(self, payload):
        ring = self.rings[unpack(Notification, payload).queue]
        ring.told += 1
        ring.wish = None
        assert ring.told <= ring.wanted, f"notification of queue {ring.queue} that nobody wants"
        assert ring.serving or not ring.is_idle, "a notification of an idle queue"

    async def finish(self, port):
        """The back end of a port: chains end in their order, when ``going`` says so."""
        held, going, back = self.held[port], self.going[port], self.backs[port]
        while True:
            if not going or not held:
                await RisingEdge(self.dut.clk)
                continue
            going.popleft()
            chain = held.popleft()
            status = chain.status
            if status == BurstStatus.OK:
                chain.ring.finished.append(chain)
            back._payload(pack(WriterDone, length_bytes=chain.length, status=status, more=chain.more))
            back._valid(1)
            await RisingEdge(self.dut.clk)
            while not back.read_ready():
                await RisingEdge(self.dut.clk)
            back._valid(0)

    async def enable(self, queue, **rules):
        ring = self.rings[queue] = Ring(self.rng, queue, **rules)
        await self.commands.put(ring.command())
        return ring

    async def send(self, queue, count=1, status=BurstStatus.OK, slots=None):
        """Hand ``count`` chains of a queue to its back end."""
        ring, port = self.rings[queue], QUEUES[queue][0]
        for left in reversed(range(count)):
            async with self.locks[port]:
                self.used_ids += 1
                writable = self.rng.choice([0, 0, 64, 100000])
                chain = SimpleNamespace(
                    ring=ring, id=self.used_ids & 0xFFFF, slots=slots or self.rng.choice([1, 1, 1, self.rng.randint(1, min(ring.size, 8))]),
                    writable=writable, length=self.rng.choice([writable, writable, self.rng.randint(0, writable)]), status=status)
                step = chain.slots if ring.packed else 1
                ring.packet_slots += step
                fits = left and ring.packet_slots + 8 <= ring.size
                chain.more = PORTS[port].waits and self.width in WITH_PACKETS and fits and self.rng.random() < 0.5
                ring.packet_slots *= chain.more
                while ring.serving and (len(self.held[port]) >= 60 or ring.handed + step > ring.visible + ring.size):
                    await RisingEdge(self.dut.clk)
                if not ring.serving:
                    return
                ring.handed += step
                await self.flights[port].put(pack(Flight, queue=queue, id=chain.id, slots=chain.slots, writable_bytes=writable))
                self.held[port].append(chain)

    async def until(self, condition, cycles=3000):
        begun = cycle()
        while not condition():
            await RisingEdge(self.dut.clk)
            assert cycle() - begun < cycles, "it takes too long"

    def level(self, name, n):
        return int(getattr(self.dut, name).value) >> n & 1

    def settled(self, ring):
        return not ring.finished and ring.visible == ring.written == ring.asked and ring.question is None

    async def stop(self, function):
        """Stop a function, forget what it had, and see that nothing more leaves."""
        dut = self.dut
        dut.stop.value = int(dut.stop.value) | 1 << function
        for queue, (_, owner) in enumerate(QUEUES):
            if owner == function:
                if self.rings[queue]:
                    self.rings[queue].serving = False
        await ClockCycles(dut.clk, 2)  # a flight on its way is through
        for port, description in enumerate(PORTS):
            if description.function == function:
                self.held[port].clear()
                self.going[port].clear()
        await self.until(lambda: self.level("quiet", function))
        lane = self.lanes[function]
        assert not lane.accesses
        count = len(self.log)
        for queue, (_, owner) in enumerate(QUEUES):
            if owner == function and self.rings[queue]:
                self.rings[queue].is_idle = True
                assert self.level("idle", queue)
        await ClockCycles(dut.clk, self.rng.choice([1, 40]))
        assert not any(QUEUES[queue][1] == function for _, queue, _ in self.log[count:])
        lane.failed = False
        dut.stop.value = int(dut.stop.value) & ~(1 << function)
        await RisingEdge(dut.clk)

    async def reset(self, queue):
        """Take a queue back; the back end of a port that waits throws its chains away, another one finishes them."""
        dut, ring, port = self.dut, self.rings[queue], QUEUES[queue][0]
        ring.serving = False
        if not PORTS[port].waits:
            self.going[port].extend([None] * 60)
        async with self.locks[port]:
            await self.commands.put(pack(QueueCommand, operation=QueueOperation.RESET, queue=queue))
        taken = cycle()
        if PORTS[port].waits:
            dut.port_stop.value = 1 << port
            self.held[port].clear()
            self.going[port].clear()
            await ClockCycles(dut.clk, 3)
            dut.port_stop.value = 0
        await self.until(lambda: self.level("idle", queue))
        assert not any(chain.ring is ring for chain in self.held[port]), "idle while chains are out"
        assert not any(ring is each for lane in self.lanes for each, _, _ in lane.accesses), "idle while writes are under way"
        assert ring.question is None
        ring.is_idle = True
        late = [at for at, each, access in self.log if each == queue and access.is_write and at > taken + 12]
        assert not late, f"accesses at {late}, taken back at {taken}"

    async def settle(self):
        """Let every back end finish, and see that all is published and told."""
        for going in self.going:
            going.extend([None] * 1000)
        await self.until(lambda: not any(self.held) and all(self.settled(ring) for ring in self.rings if ring and ring.serving), 9000)
        await self.until(lambda: self.level("quiet", 0) and self.level("quiet", 1))
        for going in self.going:
            going.clear()
        for ring in self.rings:
            assert not ring or not ring.serving or not ring.wish, f"queue {ring.queue} wants a notification"


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def rings_are_published(dut):
    """VIRTIO-USED-1: random rings of both kinds, rules, sizes, gaps and answers: elements, order, batches, packets, notifications."""
    bench = Bench(dut)
    await bench.begin()
    rng, kinds, kept = bench.rng, set(), 0
    for n in range(14):
        for queue in range(len(QUEUES)):
            ring = await bench.enable(queue, **({"packed": 1, "in_order": 0, "size": 64} if (n % 3, queue) == (0, 2) else {}))
            kinds.add((ring.packed, ring.event_index, ring.in_order))
        for _ in range(6):
            for going in bench.going:
                going.extend([None] * rng.choice([0, 1, 2, 30]))
            for queue in rng.sample(range(len(QUEUES)), rng.randrange(1, 5)):
                cocotb.start_soon(bench.send(queue, rng.choice([1, 2, 5, 20])))
            await ClockCycles(dut.clk, rng.choice([1, 10, 50, 200]))
        await bench.settle()
        assert bench.failures == [0, 0]
        kept += bench.rings[2].kept_once
        for function in range(2):
            await bench.stop(function)
    writes = [access for _, _, access in bench.log if access.is_write and access.length_bytes != 2]
    assert max(write.length_bytes for write in writes) == bench.row, "rows were never full"
    assert len(kinds) == 8 and (kept > 1) == (bench.width in WITH_PACKETS)


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def failures_publish_nothing(dut):
    """VIRTIO-USED-2: each status on writes, reads and chains is told as a failure once; nothing behind it is published; stop mends."""
    bench = Bench(dut)
    await bench.begin()
    rng, spoiled = bench.rng, {"write": 0, "read": 0, "chain": 0}
    for status in BAD:
        for queue, what in zip(rng.sample((0, 2, 3), 3), spoiled, strict=True):
            function = QUEUES[queue][1]
            for each in range(len(QUEUES)):
                await bench.enable(each)
            left = rng.randrange(4)

            def fate(asked, status=status, function=function):
                nonlocal left
                left -= asked == function
                return status if asked == function and left < 0 else BurstStatus.OK

            bench.write_status, bench.read_status = (fate if what == name else fine for name in ("write", "read"))
            bench.failures = [0, 0]
            for going in bench.going:
                going.extend([None] * 200)
            for each in range(len(QUEUES)):
                if each != queue:
                    cocotb.start_soon(bench.send(each, 12))
            if what == "chain":
                await bench.send(queue, left)
                await bench.send(queue, 1, status)
            cocotb.start_soon(bench.send(queue, 100))
            await bench.until(lambda function=function: bench.failures[function])
            await ClockCycles(dut.clk, 60)
            count = len(bench.log)
            await ClockCycles(dut.clk, 100)
            assert not any(QUEUES[each][1] == function for _, each, _ in bench.log[count:]), "a broken function goes on"
            await bench.until(lambda queue=queue: not bench.held[QUEUES[queue][0]])  # its chains are taken
            assert bench.failures[1 - function] == 0 and (bench.failures[function] == 1 or what == "write")
            spoiled[what] += 1
            bench.write_status = bench.read_status = fine
            await bench.stop(function)
            await bench.settle()
            await bench.stop(1 - function)
    assert min(spoiled.values()) == len(BAD)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def chains_per_cycle(dut):
    """VIRTIO-USED-5: the docstrings' latencies; chains one by one in 6 cycles each; 60 that wait in at most 3 each; print the figures."""
    bench = Bench(dut)
    await bench.begin(stalls=1)
    bench.latency = lambda: 24
    begun, ended, done = [], [], []
    for name, times in (("finished__0", begun), ("push__0", ended), ("write_done__0", done)):
        cocotb.start_soon(Stream(dut, name).watch([], times))
    for packed in (0, 1):
        await bench.enable(0, packed=packed, event_index=0, in_order=0, size=256)
        await bench.send(0, 1, slots=1)
        bench.going[0].append(None)
        await bench.settle()
        assert ended[0] - begun[0] in (4, 5) and ended[1] - done[0] == 7

        # One by one.
        begun.clear()
        cocotb.start_soon(bench.send(0, 120, slots=1))
        for _ in range(120):
            await ClockCycles(dut.clk, 6)
            bench.going[0].append(None)
        await bench.settle()
        single = begun[-1] - begun[0]

        # All at once.
        begun.clear()
        await bench.send(0, 60, slots=1)
        bench.going[0].extend([None] * 60)
        await bench.until(lambda: len(begun) == 60)
        batched = begun[-1] - begun[0]
        await bench.settle()
        dut._log.info("packed %d: %.2f cycles per chain of 119 one by one, %.2f of 59 at once", packed, single / 119, batched / 59)
        assert single <= 119 * 6 + 12 and batched <= 59 * 3
        for times in (begun, ended, done):
            times.clear()
        await bench.stop(0)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def nobody_waits_for_another(dut):
    """VIRTIO-USED-6: beside a function whose lane has no room another publishes as before; a port that always has chains lets others in."""
    bench = Bench(dut)
    await bench.begin(stalls=1)
    bench.latency = lambda: 24
    for queue in range(len(QUEUES)):
        await bench.enable(queue, packed=queue & 1, event_index=0, in_order=0, size=64)

    async def ten():
        begun = cycle()
        for _ in range(10):
            await bench.send(3, 1, slots=1)
            bench.going[2].append(None)
            await bench.until(lambda: bench.settled(bench.rings[3]))
        return cycle() - begun

    alone = await ten()
    bench.lanes[0].blocked = True
    for queue in (0, 1):
        await bench.send(queue, 20, slots=2)
    bench.going[0].extend([None] * 40)
    silent = await ten()
    sending = cocotb.start_soon(bench.send(2, 10000))
    bench.going[1].extend([None] * 10000)
    busy = await ten()
    assert not sending.done()
    sending.cancel()
    dut._log.info("%d cycles alone, %d beside a silent function, %d beside one and a busy port", alone, silent, busy)
    assert silent <= alone + 40 and busy <= 3 * alone
    assert not bench.rings[0].durable and bench.lanes[0].accesses
    bench.lanes[0].blocked = False
    bench.set_room()
    await bench.until(lambda: bench.settled(bench.rings[0]) and bench.settled(bench.rings[1]))


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def stop_at_any_time(dut):
    """VIRTIO-USED-3: a function that is stopped at any moment falls quiet and says nothing more; the other runs on; it works again."""
    bench = Bench(dut)
    await bench.begin()
    rng, function = bench.rng, 0
    for queue in range(len(QUEUES)):
        await bench.enable(queue)
    for _ in range(50):
        for going in bench.going:
            going.extend([None] * rng.choice([1, 5, 40]))
        for queue in range(len(QUEUES)):
            cocotb.start_soon(bench.send(queue, rng.choice([1, 5, 20])))
        await ClockCycles(dut.clk, rng.randrange(1, 160))
        function = rng.randrange(2)
        await bench.stop(function)
        for queue, (_, owner) in enumerate(QUEUES):
            if owner == function:
                await bench.enable(queue)
    await bench.settle()
    assert bench.failures == [0, 0]


@cocotb.test(timeout_time=4, timeout_unit="ms")
async def reset_at_any_time(dut):
    """VIRTIO-USED-4: a queue that is reset at any moment turns idle when its chains are back, none published; its neighbours run on."""
    bench = Bench(dut)
    await bench.begin()
    rng = bench.rng
    for queue in range(len(QUEUES)):
        await bench.enable(queue)
    for _ in range(50):
        for going in bench.going:
            going.extend([None] * rng.choice([1, 5, 40]))
        for queue in range(len(QUEUES)):
            cocotb.start_soon(bench.send(queue, rng.choice([1, 5, 20])))
        await ClockCycles(dut.clk, rng.randrange(1, 160))
        queue = rng.randrange(len(QUEUES))
        await bench.reset(queue)
        await ClockCycles(dut.clk, rng.choice([1, 60]))
        await bench.enable(queue)
    await bench.settle()
    assert bench.failures == [0, 0]


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def indices_wrap(dut):
    """VIRTIO-USED-7: 66000 chains of a split ring, IN_ORDER and EVENT_IDX: the used index wraps; nothing is lost or told too often."""
    bench = Bench(dut)
    await bench.begin(stalls=1, functions=(1,), back_ends=False)
    ring = await bench.enable(3, packed=0, event_index=1, in_order=1, size=64)
    ids = [pack(Flight, queue=3, id=n & 0xFFFF) for n in range(1 << 16)]
    count = 66000
    ring.finished.extend(SimpleNamespace(id=n & 0xFFFF, writable=0, length=0, slots=1, more=0) for n in range(count))
    giving = cocotb.start_soon(bench.flights[2].put_many(ids[n & 0xFFFF] for n in range(count)))
    bench.backs[2]._payload(0)
    bench.backs[2]._valid(1)  # all are finished as soon as they come
    await giving
    await bench.until(lambda: bench.settled(ring))
    bench.backs[2]._valid(0)
    await bench.until(lambda: bench.level("quiet", 1))
    assert ring.published == count and not ring.wish
    assert ring.told > 100
