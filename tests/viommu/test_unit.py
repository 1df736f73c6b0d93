"""The virtio-iommu behind its gate, sentence by sentence of the standard; whatever is asked, the golden device judges the answer too."""

import struct

import cocotb
import pytest
from cocotb.triggers import ClockCycles, with_timeout

from ringwall.models.virtio.iommu_formats import (
    Attach,
    AttachFlag,
    Detach,
    Fault,
    FaultFlag,
    FaultReason,
    Map,
    MapFlag,
    Probe,
    Status,
    Unmap,
)
from ringwall.models.virtio.iommu_rules import Access
from ringwall.rtl.spec import virtio_iommu as spec
from ringwall.rtl.tlp.layouts import BurstStatus
from ringwall.rtl.viommu.device import X86_DOORBELLS, IommuDevice, Region
from ringwall.rtl.viommu.translator import Translator
from ringwall.sim.run import params, run
from ringwall.sim.stream import cycle
from ringwall.sim.viommu_bench import EVENTS, RECORD_BYTES, REQUESTS, Wall, WallBench

PAGE = 4096
ENDPOINTS = 1, 2, 3
DEVICE = IommuDevice(endpoints=ENDPOINTS, intervals=32, domain_range=(1, 100), events=4, entries=16,
                     regions=(X86_DOORBELLS, Region(0x10_0000, 0x10_1FFF)))  # fmt: skip
PLAIN = IommuDevice(endpoints=ENDPOINTS, intervals=16, regions=(), bypass=False, entries=16)
RW = MapFlag.READ | MapFlag.WRITE
OF_WIDTHS = ["framing_says_nothing", "properties_are_exact", "faults_are_told"]
TESTS = [
    "statuses_are_exact",
    "forms_are_exact",
    "framing_says_nothing",
    "properties_are_exact",
    "the_examples_of_unmap",
    "bypass_is_as_the_table_says",
    "pages_go_where_they_are_mapped",
    "only_interrupts_pass_the_window",
    "nothing_is_answered_before_the_drain",
    "faults_are_told",
    "event_buffers_can_be_taken_back",
    "reset_detaches_all",
]


def test_unit(request):
    run(Wall(width=256, device=DEVICE), module=__name__, node=request.node.nodeid,
        params={"width": 256, "plain": False}, testcase=TESTS)  # fmt: skip


@pytest.mark.parametrize("width", [64, 128, 512])
def test_widths(request, width):
    run(Wall(width=width, device=DEVICE), module=__name__, node=request.node.nodeid,
        params={"width": width, "plain": False}, testcase=OF_WIDTHS)  # fmt: skip


def test_plain(request):
    run(Wall(width=64, device=PLAIN), module=__name__, node=request.node.nodeid,
        params={"width": 64, "plain": True}, testcase="without_regions")  # fmt: skip


@pytest.mark.parametrize("bad", [
    {"input_bits": 40}, {"page_size_mask": 0}, {"page_size_mask": 1 << 11}, {"page_size_mask": 1 << 64}, {"domain_range": (2, 1)},
    {"regions": (X86_DOORBELLS, X86_DOORBELLS)}, {"regions": (Region(0, 0xFFF), Region(0, 0x1FFF))}])  # fmt: skip
def test_devices_are_checked(bad):
    """VIOMMU-REQ-1: a device that the standard does not allow, or that makes no sense, is refused with a sentence (V159, V205, V206)."""
    with pytest.raises(ValueError, match=r"must .*, not"):
        IommuDevice(**bad)


def test_parameters_are_checked():
    """VIOMMU-REQ-2: endpoints that are no functions, too many of them, regions of parts of pages: refused with a sentence."""
    for bad in ((8,), tuple(range(8)), (-1,)):
        with pytest.raises(ValueError, match=r"Endpoints must be at most 7 functions, not"):
            IommuDevice(endpoints=bad)
    for bad in ((0, 0x800), (0x800, 0xFFF), (0xFFFF, 0), (0, 1 << 64)):
        with pytest.raises(ValueError, match=r"must be whole pages .*, not"):
            Region(*bad)
    with pytest.raises(ValueError, match=r"must be 39, 48 or 57, not"):
        Translator(input_bits=32)


def test_features():
    """VIOMMU-REQ-3: MAP_UNMAP is offered, BYPASS never; without reserved regions there is no PROBE (V157, V158)."""
    for device in (DEVICE, PLAIN, IommuDevice()):
        assert device.device_features >> spec.F_MAP_UNMAP & 1 and not device.device_features >> 3 & 1
        assert device.device_features >> spec.F_PROBE & 1 == bool(device.regions)


async def begin(dut):
    """Return a bench, and a function that asks something and returns the status, or None for unwritten."""
    bench = await WallBench(dut, PLAIN if params()["plain"] else DEVICE).begin()

    async def ask(request, room=None):
        room = 4 + (bench.device.description.probe_size if isinstance(request, Probe) else 0) if room is None else room
        written = await bench.serve(request if isinstance(request, bytes) else request.pack(), room)
        assert len(written) in (0, room) and not any(written[-3:]) and (isinstance(request, Probe) or not any(written[:-4]))
        return Status(written[-4]) if written else None

    return bench, ask


def pages(first, count=1):
    """Return the first and last address of pages."""
    return first * PAGE, (first + count) * PAGE - 1


@cocotb.test(timeout_time=200, timeout_unit="us")
async def statuses_are_exact(dut):
    """VIOMMU-REQ-4 (R77, R78, R79, R80): every rule for ATTACH, DETACH, MAP and UNMAP, with the status that it gives here; the used
    length is the room, or 0."""
    _, ask = await begin(dut)
    good = Map(1, *pages(16, 4), 0x8000, RW)
    rows = [
        (Map(1, *pages(1), 0, RW), Status.NOENT),  # V185
        (Unmap(1, *pages(1)), Status.NOENT),  # V192
        (Attach(1, 1), Status.OK), (Attach(1, 1), Status.OK), (Attach(1, 2), Status.OK),  # V163, V172, V176
        (Attach(2, 3, AttachFlag.BYPASS), Status.OK),
        (Attach(1, 1, reserved=b"\0\0\0\1"), Status.INVAL),  # V169
        (Attach(1, 1, 2), Status.INVAL), (Attach(1, 1, 1 << 31), Status.INVAL),  # V170
        (Attach(1, 0), Status.NOENT), (Attach(1, 4), Status.NOENT), (Attach(1, 1 << 16 | 1), Status.NOENT),  # V171
        (Attach(0, 1), Status.RANGE), (Attach(101, 1), Status.RANGE),
        (Attach(1, 1, AttachFlag.BYPASS), Status.INVAL), (Attach(2, 1), Status.INVAL),  # V173
        (Detach(1, 0), Status.NOENT), (Detach(2, 1), Status.INVAL), (Detach(9, 1), Status.INVAL),  # V178, V179
        (good, Status.OK), (good, Status.INVAL), (Map(1, *pages(19, 2), 0, RW), Status.INVAL), (Map(1, *pages(15, 2), 0, RW), Status.INVAL),
        (Map(1, *pages(15, 6), 0, RW), Status.INVAL), (Map(1, *pages(17), 0, RW), Status.INVAL),  # V183
        (Map(1, 0x1001, 0x1FFF, 0, RW), Status.RANGE), (Map(1, 0x1000, 0x1FFE, 0, RW), Status.RANGE),
        (Map(1, 0x1000, 0x1FFF, 1, RW), Status.RANGE),  # V182
        (Map(1, *pages(1), 0, 8), Status.INVAL), (Map(1, *pages(1), 0, 1 << 31), Status.INVAL),  # V184
        (Map(2, *pages(1), 0, RW), Status.INVAL), (Unmap(2, *pages(1)), Status.INVAL),  # V186, V193
        (Map(1, 0x3000, 0x1FFF, 0, RW), Status.INVAL), (Unmap(1, 0x3000, 0x1FFF), Status.INVAL),  # V189
        (Map(1, 1 << 48, (1 << 48) + 0xFFF, 0, RW), Status.RANGE), (Map(1, 0, (1 << 64) - 1, 0, RW), Status.RANGE),
        (Map(1, *pages((1 << 36) - 1), 0, RW), Status.OK), (Map(1, (1 << 48) - PAGE, (1 << 48) + 0xFFF, 0, RW), Status.RANGE),  # V190
        (Map(1, *pages(0xFEE00), 0, RW), Status.INVAL), (Map(1, *pages(0xFEDFF, 2), 0, RW), Status.INVAL),
        (Map(1, *pages(0xFEEFF, 2), 0, RW), Status.INVAL), (Map(1, *pages(0x101), 0, RW), Status.INVAL),
        (Map(1, *pages(0xFF, 4), 0, RW), Status.INVAL), (Map(1, *pages(0xFEDFF), 0, RW), Status.OK),
        (Map(1, *pages(0x102), 0, RW), Status.OK),  # V207
        (Map(1, *pages(1), (1 << 56) - PAGE, RW), Status.OK), (Map(1, *pages(2, 2), (1 << 56) - PAGE, RW), Status.FAULT),
        (Map(1, *pages(2), (1 << 64) - PAGE, RW), Status.FAULT),
        (Map(1, *pages(2), 0, RW | MapFlag.MMIO), Status.OK), (Map(1, *pages(3), 0, 0), Status.OK),  # V191
        (Unmap(1, *pages(16, 4), reserved=b"\1\0\0\0"), Status.INVAL),  # V196
        (Unmap(1, *pages(16, 3)), Status.RANGE), (Unmap(1, 16 * PAGE + 1, 20 * PAGE - 1), Status.RANGE),
        (Unmap(1, 16 * PAGE, 20 * PAGE - 2), Status.RANGE),  # V194
        (Unmap(1, 15 * PAGE + 1, 20 * PAGE + 5), Status.OK), (good, Status.OK),
        (Unmap(1, 1 << 50, 1 << 51), Status.OK), (Unmap(1, 4 * PAGE, (1 << 64) - 1), Status.OK),
        (Unmap(1, 0, (1 << 64) - 1), Status.OK),  # V195
        (good, Status.OK), (Detach(1, 1, reserved=bytes(range(8))), Status.OK), (Unmap(1, *pages(16)), Status.RANGE),  # V177
        (Detach(1, 2), Status.OK), (good, Status.NOENT), (Attach(1, 2), Status.OK), (good, Status.OK),  # V181
        (Attach(3, 2), Status.OK), (good, Status.NOENT), (Attach(1, 2), Status.OK), (good, Status.OK),  # V174
        (Attach(4, 1), Status.OK), (Map(4, *pages(1), 0, RW), Status.OK), (Attach(1, 1), Status.OK),
        (Map(4, *pages(2), 0, RW), Status.NOENT),
        (Detach(1, 1), Status.OK),  # V174
        (Detach(2, 3), Status.OK), (Attach(2, 3), Status.OK), (Map(2, *pages(16), 0, RW), Status.OK),
    ]  # fmt: skip
    for request, status in rows:
        assert await ask(request) == status, f"{request}: must be {status!r}"
    for n in range(40):
        assert await ask(Map(2, *pages(2 * n + 100), 0, RW)) == (Status.OK if n < DEVICE.intervals - 2 else Status.NOMEM)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def forms_are_exact(dut):
    """VIOMMU-REQ-5 (R78): unknown types, every length too short by one, no room for a tail: unwritten; what could not be fetched: IOERR."""
    bench, ask = await begin(dut)
    valid = (Attach(1, 1), Map(1, *pages(1), 0, RW), Unmap(1, *pages(1)), Probe(1), Detach(1, 1))
    for kind in (0, 6, 0x81, 0xFF):
        for room in (0, 4, 100):
            assert await ask(bytes([kind]) + bytes(99), room) is None  # V164
    for request in valid:
        raw = request.pack()
        assert await ask(raw[:-1]) is None and await ask(raw[:1]) is None  # V168
        for room in range(4):
            assert await ask(raw, room) is None
    assert await ask(b"") is None
    for request in valid:
        assert await ask(request.pack()[:1] + b"\xff\xff\xff" + request.pack()[4:], None if isinstance(request, Probe) else 4) in (
            Status.OK, Status.INVAL)  # fmt: skip
    for status in (s for s in BurstStatus if s != BurstStatus.OK):
        for request in valid:
            assert await bench.ask(request.pack(), 4, status) == bytes([Status.IOERR, 0, 0, 0])
            assert await bench.ask(request.pack(), 3, status) == b""
    assert await ask(Detach(1, 1)) == Status.INVAL, "nothing was done"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def framing_says_nothing(dut):
    """VIOMMU-REQ-6 (R82): the tail is the end of the room, however much it is; bytes behind a request, and reserved ones in its head, are
    ignored; gaps in the stream too (V165, V166)."""
    _, ask = await begin(dut)
    for room in (4, 5, 8, 31, 32, 33, 35, 36, 37, 63, 64, 65, 66, 67, 68, 69, 100, 200):
        for request in (Attach(1, 1, head=b"\1\2\3"), Map(1, *pages(room), 0, RW, b"\xff\xff\xff")):
            assert await ask(request.pack() + bytes(range(room)), room) == Status.OK
    assert await ask(Unmap(1, *pages(4, 197)).pack() + bytes([255] * 300), 4) == Status.OK


@cocotb.test(timeout_time=100, timeout_unit="us")
async def properties_are_exact(dut):
    """VIOMMU-REQ-7 (R79, R81): PROBE gives two RESV_MEM properties, one behind the other, zeroes up to the tail; an unknown endpoint or a
    list that is too short gets none (V197 to V206)."""
    bench, ask = await begin(dut)
    size = bench.device.description.probe_size
    wanted = b"".join(struct.pack("<HHB3sQQ", 1, 20, subtype, bytes(3), first, last)
                      for subtype, first, last in ((1, 0xFEE0_0000, 0xFEEF_FFFF), (0, 0x10_0000, 0x10_1FFF)))  # fmt: skip
    for room in (size + 4, size + 5, size + 100):
        written = await bench.serve(Probe(2, reserved=bytes(range(64))).pack(), room)
        assert written == wanted.ljust(room - 4, b"\0") + bytes(4)
    for room in (4, 5, size + 3):
        assert await bench.serve(Probe(2).pack(), room) == bytes(room - 4) + bytes([Status.INVAL, 0, 0, 0])
    for endpoint in (0, 4, 1 << 31 | 1):
        assert await ask(Probe(endpoint)) == Status.NOENT


@cocotb.test(timeout_time=100, timeout_unit="us")
async def without_regions(dut):
    """VIOMMU-REQ-8: nothing reserved, so no PROBE; no MAP and UNMAP unless negotiated, nor flags without their features (V191, V199)."""
    bench, ask = await begin(dut)
    assert await ask(Probe(1)) is None and await ask(Probe(1), 600) is None
    assert await ask(Attach(1, 1)) == Status.OK and await ask(Map(1, *pages(0xFEE00), 0, RW)) == Status.OK
    assert (await bench.access(Access(1, 0xFEE0_0000, True, 4))).phys == 0
    assert bench.device.config()[36] == 0
    bench.check_config()
    dut.features.value = 1 << spec.F_MAP_UNMAP
    assert await bench.ask(Map(1, *pages(1), 0, RW | MapFlag.MMIO).pack(), 4) == bytes([Status.INVAL, 0, 0, 0])
    assert await bench.ask(Attach(5, 2, AttachFlag.BYPASS).pack(), 4) == bytes([Status.INVAL, 0, 0, 0])
    dut.features.value = 0
    for request in (Map(1, *pages(1), 0, RW), Unmap(1, *pages(0xFEE00))):
        assert await bench.ask(request.pack(), 4) == b""


@cocotb.test(timeout_time=100, timeout_unit="us")
async def the_examples_of_unmap(dut):
    """VIOMMU-REQ-9: the seven examples of the standard, a page for each number (V194, V195)."""
    bench, ask = await begin(dut)
    assert await ask(Attach(1, 1)) == Status.OK
    examples = [
        ([], (0, 4), True), ([(0, 9)], (0, 9), True), ([(0, 4), (5, 9)], (0, 9), True), ([(0, 9)], (0, 4), False),
        ([(0, 4), (5, 9)], (0, 4), True), ([(0, 4)], (0, 9), True), ([(0, 4), (10, 14)], (0, 14), True),
    ]  # fmt: skip
    for mappings, (first, last), succeeds in examples:
        for one, other in mappings:
            assert await ask(Map(1, *pages(one, other - one + 1), one << 20, RW)) == Status.OK
        assert await ask(Unmap(1, *pages(first, last - first + 1))) == (Status.OK if succeeds else Status.RANGE)
        for one, other in mappings:
            is_left = not succeeds or other > last
            for page in (one, other):
                verdict = await bench.access(Access(1, page * PAGE, False, 4))
                assert verdict.phys == ((one << 20) + (page - one) * PAGE if is_left else None)
        assert await ask(Unmap(1, *pages(0, 16))) == Status.OK


@cocotb.test(timeout_time=200, timeout_unit="us")
async def bypass_is_as_the_table_says(dut):
    """VIOMMU-TR-1 (R22, R85, R88): attached or not, to a domain or a bypass domain, config.bypass 0 or 1: where an access goes; bypass is
    0 or 1, and written only with the feature (V160, V167)."""
    bench, ask = await begin(dut)
    bench.check_config()
    for bypass in (0, 1):
        await bench.write_bypass(bypass)
        for flags in (None, 0, AttachFlag.BYPASS):
            if flags is not None:
                assert await ask(Attach(7, 2, flags)) == Status.OK
            passes = bypass if flags is None else flags == AttachFlag.BYPASS
            for is_write in (False, True):
                for address in (0x5000, 0x10_0000, (1 << 64) - PAGE, 0xFEE0_0010):
                    verdict = await bench.access(Access(2, address, is_write, 8))
                    assert verdict.phys == (address if passes else None)
            if flags is not None:
                assert await ask(Detach(7, 2)) == Status.OK
    dut.features.value = 0
    shown = int(dut.config.value)
    dut.config_write.value = int(dut.config_write.value) | 1 << 4 | 4 << 8
    await ClockCycles(dut.clk, 20)
    assert int(dut.config.value) == shown and (await bench.access(Access(2, 0, True, 8))).phys == 0


@cocotb.test(timeout_time=200, timeout_unit="us")
async def pages_go_where_they_are_mapped(dut):
    """VIOMMU-TR-2 (R27): two domains map one address to different places; permissions hold; large intervals are cached in the sizes that
    fit, and translate from their first page to their last (V187, V188)."""
    bench, ask = await begin(dut)
    for number in (1, 2):
        assert await ask(Attach(number, number)) == Status.OK
        assert await ask(Map(number, *pages(0x300), number << 32, RW)) == Status.OK
    assert await ask(Map(1, *pages(0x301), 5 << 32, MapFlag.READ)) == Status.OK
    assert await ask(Map(1, *pages(0x302), 6 << 32, MapFlag.WRITE)) == Status.OK
    for _ in range(2):
        for number in (1, 2):
            assert (await bench.access(Access(number, 0x30_0123, True, 16))).phys == (number << 32) + 0x123
        assert (await bench.access(Access(3, 0x30_0123, True, 16))).phys == 0x30_0123, "not attached: bypass"
        for page, is_write, is_refused in ((0x301, False, False), (0x301, True, True), (0x302, False, True), (0x302, True, False)):
            assert ((await bench.access(Access(1, page << 12, is_write, 4))).phys is None) == is_refused
    for first, count, phys in (
        (0x400, 16, 0x7000_0000), (0x811, 47, 0x1_0001_1000), (0x2_0000, 512, 0x20_0000), (0x2_0200, 1000, 0x20_1000),
        (0x80_0000, 0x8_0000, 0x40_0000_0000), (0x90_0001, 0x8_0000, 0x8000_1000),
    ):  # fmt: skip
        assert await ask(Map(1, *pages(first, count), phys, RW)) == Status.OK
        for page in (0, count - 1, count // 2, 1, count - 2, 0):
            for _ in range(2):
                assert (await bench.access(Access(1, (first + page) * PAGE + 8, False, 8))).phys == phys + page * PAGE + 8
        for page in (first - 1, first + count):
            assert (await bench.access(Access(1, page * PAGE, False, 8))).phys is None
        assert await ask(Unmap(1, *pages(first, count))) == Status.OK
        for page in (0, count - 1, count // 2):
            assert (await bench.access(Access(1, (first + page) * PAGE + 8, False, 8))).phys is None


@cocotb.test(timeout_time=100, timeout_unit="us")
async def only_interrupts_pass_the_window(dut):
    """VIOMMU-TR-3: of an attached endpoint in the MSI region aligned dword writes pass untranslated, everything else is refused (V208)."""
    bench, ask = await begin(dut)
    assert await ask(Attach(1, 1)) == Status.OK
    for address in (0xFEE0_0004, 0xFEE1_2340, 0xFEEF_FFFC):
        for length, is_write, offset in ((4, True, 0), (4, False, 0), (8, True, -4), (2, True, 0), (2, True, 2), (3, True, 1)):
            passes = length == 4 and is_write
            verdict = await bench.access(Access(1, address + offset, is_write, length))
            assert verdict.phys == (address if passes else None), (hex(address + offset), length, is_write)
    for address in (0xFEDF_FFFC, 0xFEF0_0000, 0x10_0000):
        assert (await bench.access(Access(1, address, True, 4))).phys is None


@cocotb.test(timeout_time=100, timeout_unit="us")
async def nothing_is_answered_before_the_drain(dut):
    """VIOMMU-FENCE-1 (R15): while an access by an old mapping is under way UNMAP, DETACH and an ATTACH elsewhere wait, MAP does not; what
    comes behind goes by what is then. bypass is shown as written when no access by what it was is under way (V180, V181, V213)."""
    bench, ask = await begin(dut)
    delay, access = 600, Access(1, 0x5000, True, 8)
    for request, expected in ((Unmap(1, *pages(5)), None), (Detach(1, 1), 0x5000), (Attach(2, 1), None)):
        assert await ask(Attach(1, 1)) == Status.OK and await ask(Map(1, *pages(5), 9 << 40, RW)) == Status.OK
        assert (await bench.access(access)).phys == 9 << 40
        bench.latency = lambda: delay
        over = await bench.send(access)
        began = cycle()
        await ClockCycles(dut.clk, 8)
        assert await ask(Map(1, *pages(0x700), 0, RW)) == Status.OK and cycle() - began < 150 and not over.is_set()
        assert await ask(request) == Status.OK
        assert over.is_set() and over.verdict.phys == 9 << 40 and delay < cycle() - began < delay + 200
        bench.latency = lambda: 5
        assert (await bench.access(access)).phys == expected
        await bench.reset()
    bench.latency = lambda: delay
    over = await bench.send(access)
    await ClockCycles(dut.clk, 8)
    await bench.write_bypass(0)
    assert over.is_set() and over.verdict.phys == 0x5000 and (await bench.access(access)).phys is None


@cocotb.test(timeout_time=100, timeout_unit="us")
async def faults_are_told(dut):
    """VIOMMU-EVT-1: each refusal gives one record of 24 bytes, with reason, direction and address, in a buffer of its own; buffers too
    small come back unwritten, and without any records wait, a few of them, then they are counted (V209, V210, V211, V212)."""
    bench, ask = await begin(dut)
    await bench.write_bypass(0)
    assert await ask(Attach(1, 2)) == Status.OK and await ask(Map(1, *pages(1), 0, MapFlag.READ)) == Status.OK
    accesses = [(Access(1, 0x1234_5678_9ABC, True, 1), FaultReason.DOMAIN), (Access(2, 0x2008, False, 8), FaultReason.MAPPING),
                (Access(2, 0x1FFF, True, 1), FaultReason.MAPPING), (Access(2, (1 << 64) - 8, False, 8), FaultReason.MAPPING)]  # fmt: skip
    records = [Fault(reason, (FaultFlag.WRITE if a.is_write else FaultFlag.READ) | FaultFlag.ADDRESS, a.endpoint, a.address)
               for a, reason in accesses]  # fmt: skip
    for access, record in zip(accesses, records):
        assert (await bench.access(access[0])).phys is None
        for room in (0, 23):
            await bench.give(EVENTS, b"surplus"[: room % 8], room)
            assert await bench.packet(EVENTS) == b""
        for room in (24, 100):
            if room == 100:
                assert (await bench.access(access[0])).phys is None
            await bench.give(EVENTS, bytes(room % 3), room)
            raw = await bench.packet(EVENTS)
            assert raw == record.pack() and not bench.device.reported(raw, len(raw))
    for _ in range(7):
        assert (await bench.access(accesses[0][0])).phys is None
    assert int(dut.dropped.value) == 7 - DEVICE.events
    for _ in range(DEVICE.events):
        await bench.give(EVENTS, b"", RECORD_BYTES)
        raw = await bench.packet(EVENTS)
        assert not bench.device.reported(raw, len(raw))
    assert not bench.device.unreported(7 - DEVICE.events)


@cocotb.test(timeout_time=100, timeout_unit="us")
async def event_buffers_can_be_taken_back(dut):
    """VIOMMU-EVT-2: while suspended no event buffer is taken, and none while no fault is there; it is not suspended before a record has
    arrived; port_stop takes and drops what comes, and the record waits for another one (V019, V023)."""
    bench, _ = await begin(dut)
    await bench.write_bypass(0)
    given = cocotb.start_soon(bench.give(EVENTS, b"", RECORD_BYTES))
    await ClockCycles(dut.clk, 50)
    assert not given.done()
    dut.suspend.value = 1
    assert (await bench.access(Access(1, 0, True, 1))).phys is None
    await ClockCycles(dut.clk, 50)
    assert not given.done() and int(dut.suspended.value)
    dut.settled__1.value = 0
    await ClockCycles(dut.clk, 2)
    assert not int(dut.suspended.value)
    dut.suspend.value = 0
    dut.port_stop.value = 1 << EVENTS
    await given
    await bench.give(EVENTS, b"abc", RECORD_BYTES)
    await ClockCycles(dut.clk, 4)
    assert int(dut.port_stopped.value) == 1 << EVENTS and bench.beats[EVENTS].empty()
    dut.port_stop.value = 0
    await bench.give(EVENTS, b"", RECORD_BYTES)
    assert Fault.unpack(await bench.packet(EVENTS)).reason == FaultReason.DOMAIN


@cocotb.test(timeout_time=200, timeout_unit="us")
async def reset_detaches_all(dut):
    """VIOMMU-RST-1: a reset, at any time of a request or of lookups, ends when nothing is under way: all are detached, no mapping is left,
    bypass is what it was; restore makes it what it was at power-on (V161, V162)."""
    bench, ask = await begin(dut)
    rng = bench.rng
    for n in range(12):
        for endpoint in ENDPOINTS:
            assert await ask(Attach(1, endpoint)) == Status.OK
        for page in range(8):
            assert await ask(Map(1, *pages(page), 1 << 40, RW)) == Status.OK
        bench.latency = lambda: rng.choice([5, 200])
        sent = [await bench.send(Access(one, page << 12, False, 8)) for page in range(8) for one in ENDPOINTS if rng.random() < 0.5]
        request = Unmap(1, *pages(0, 8)) if n % 2 else Detach(1, 1)
        await bench.give(REQUESTS, request.pack(), 4)
        await ClockCycles(dut.clk, rng.randrange(60))
        await with_timeout(bench.reset(), 10, "us")
        assert all(over.is_set() for over in sent)
        while not bench.beats[REQUESTS].empty():
            bench.beats[REQUESTS].get_nowait()
        bypass = rng.getrandbits(1)
        await bench.write_bypass(bypass)
        await bench.reset()
        assert (await bench.access(Access(1, 0, False, 8))).phys == (0 if bypass else None)
        assert await ask(Unmap(1, *pages(0, 8))) == Status.NOENT and await ask(Detach(1, 1)) == Status.INVAL
    await bench.write_bypass(0)
    dut.restore.value = 1
    await ClockCycles(dut.clk, 20)
    assert int(dut.config.value) >> 8 * spec.CONFIG_BYPASS == 1

