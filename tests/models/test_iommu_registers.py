"""The register file against the register map, and the driver against a card made of the models. [RVIOMMU1.0 6]"""

from dataclasses import replace

import pytest

from ringwall.models.host import Delay, MemoryRead, MemoryWrite, run
from ringwall.models.iommu.cache import AllowedTranslations, Outcome
from ringwall.models.iommu.commands import CommandQueue, IodirInvalDdt, IofenceC, IotinvalVma
from ringwall.models.iommu.faults import AccessType, Cause, FaultQueue, FaultRecord, TranslationFault
from ringwall.models.iommu.hpm import Event, EventIds, EventSelector
from ringwall.models.iommu.registers import (
    OFFSET,
    REGISTERS,
    Capabilities,
    CommandQueueStopped,
    Igs,
    InterruptMessage,
    IommuDriver,
    IommuDriverError,
    IommuMode,
    QueueCsr,
    RegisterFile,
    UnspecifiedAccess,
    register_list,
)
from ringwall.models.iommu.tables import Allocator, DeviceContext, PageTable
from ringwall.models.iommu.walk import Iommu, Request
from ringwall.models.memory import GuestMemory

BAR = 0x10_0000_0000
DDTP, CQB, CQH, CQT, FQB, FQH, FQT, CQCSR, FQCSR, IPSR, ICVEC = (
    0x10, 0x18, 0x20, 0x24, 0x28, 0x30, 0x34, 0x48, 0x4C, 0x54, 0x2F8)
ONES, ONES64 = (1 << 32) - 1, (1 << 64) - 1


def test_iommu_registers_capabilities():
    """MODEL-IOMMU-REG-1: the capabilities register, bit by bit, both ways; impossible ones are refused."""
    assert Capabilities().value == 0x38_0000_0210  # PAS=56, Sv39, version 1.0
    for name, bit in (("Sv32", 8), ("Sv48", 10), ("Svrsw60t59b", 14), ("Svpbmt", 15), ("Sv32x4", 16), ("Sv39x4", 17),
                      ("Sv48x4", 18), ("Sv57x4", 19), ("AMO_MRIF", 21), ("MSI_FLAT", 22), ("MSI_MRIF", 23),
                      ("AMO_HWAD", 24), ("ATS", 25), ("T2GPA", 26), ("END", 27), ("HPM", 30), ("DBG", 31), ("PD8", 38),
                      ("PD17", 39), ("PD20", 40), ("QOSID", 41), ("NL", 42), ("S", 43)):
        one = replace(Capabilities(), **{name: True})
        assert one.value == 0x38_0000_0210 | 1 << bit
        assert Capabilities.from_value(one.value) == one
        assert one.switched_on() == {"Sv39", name}
    assert Capabilities(IGS=Igs.BOTH, PAS=40).value == 0x28_2000_0210
    assert replace(Capabilities(), Sv48=True, Sv57=True).value & 0xE00 == 0xE00
    for message, values in (("PAS", {"PAS": 57}), ("IGS", {"IGS": 3}), ("Version", {"version": 256}),
                            ("Sv57 must come with Sv48", {"Sv57": True}), ("Sv48 must", {"Sv39": False, "Sv48": True})):
        with pytest.raises(ValueError, match=message):
            replace(Capabilities(), **values)


def test_iommu_registers_map():
    """MODEL-IOMMU-REG-2: names, offsets, widths and resets are those of the register map; all else reads 0, ignores writes."""
    offsets = {"capabilities": (0, 64), "fctl": (8, 32), "ddtp": (16, 64), "cqb": (24, 64), "cqh": (32, 32),
               "cqt": (36, 32), "fqb": (40, 64), "fqh": (48, 32), "fqt": (52, 32), "cqcsr": (72, 32),
               "fqcsr": (76, 32), "ipsr": (84, 32), "icvec": (760, 64)}
    for n in range(16):
        offsets |= {f"msi_addr_{n}": (768 + 16 * n, 64), f"msi_data_{n}": (776 + 16 * n, 32),
                    f"msi_vec_ctl_{n}": (780 + 16 * n, 32)}
    assert {one.name: (one.offset, one.width) for one in REGISTERS} == offsets
    resets = {"capabilities": 0x38_0000_0210, "ddtp": 1} | {f"msi_vec_ctl_{n}": 1 for n in range(16)}
    registers = RegisterFile()
    for name, (offset, width) in offsets.items():
        assert registers.read(offset, width // 8) == resets.get(name, 0)
        if width == 64:
            assert registers.read(offset + 4, 4) == resets.get(name, 0) >> 32
    assert RegisterFile(reset_mode=IommuMode.OFF).read(DDTP, 8) == 0
    assert not any(one.name.startswith("msi_") for one in register_list(Capabilities(IGS=Igs.WSI)))
    used = {offset + at for offset, width in offsets.values() for at in range(0, width // 8, 4)}
    for offset in set(range(0, 4096, 4)) - used:
        registers.write(offset, 4, ONES)
        assert registers.read(offset, 4) == 0
    for offset, size in ((1, 4), (4, 8), (0, 2), (0, 1), (4096, 4), (4092, 8), (-4, 4), (CQH, 8), (FQH, 8), (0x308, 8)):
        with pytest.raises(UnspecifiedAccess):
            registers.read(offset, size)
        with pytest.raises(UnspecifiedAccess):
            registers.write(offset, size, 0)
    with pytest.raises(ValueError, match="fit 4 bytes"):
        registers.write(8, 4, 1 << 32)


def test_iommu_registers_written_with_ones():
    """MODEL-IOMMU-REG-3: all ones leave only the bits that exist; PAS cuts page numbers; halves can be written alone."""
    for offset, width, value in (
        (0x000, 64, 0x38_0000_0210), (0x008, 32, 0), (DDTP, 64, 0x003F_FFFF_0000_0001), (CQB, 64, 0x003F_FFFF_FFFF_FC0F),
        (FQB, 64, 0x003F_FFFF_FFFF_FC0F), (CQH, 32, 0), (CQT, 32, 1), (FQH, 32, 1), (FQT, 32, 0), (CQCSR, 32, 0x1_0003),
        (FQCSR, 32, 0x1_0003), (IPSR, 32, 0), (ICVEC, 64, 0x33), (0x300, 64, 0x00FF_FFFF_FFFF_FFFC),
        (0x308, 32, ONES), (0x30C, 32, 1), (0x3F0, 64, 0x00FF_FFFF_FFFF_FFFC),
    ):
        registers = RegisterFile()
        registers.write(offset, width // 8, (1 << width) - 1)
        assert registers.read(offset, width // 8) == value, hex(offset)
    for vectors, value in ((1, 0), (2, 0x11), (16, 0xFF)):
        registers = RegisterFile(vectors=vectors)
        registers.write(ICVEC, 4, ONES)
        assert registers.read(ICVEC, 4) == value
    narrow = RegisterFile(Capabilities(PAS=40), queue_log2_max=13)
    narrow.write(CQB, 8, ONES64)
    assert narrow.read(CQB, 8) == (1 << 28) - 1 << 10 | 12
    registers = RegisterFile()
    registers.write(CQB + 4, 4, 0x12345)
    registers.write(CQB, 4, 0x8000_0403)
    assert registers.read(CQB, 8) == 0x1_2345_8000_0403
    for wrong, options in (("Mode", {"reset_mode": IommuMode.LVL1}), ("Vectors", {"vectors": 3}), ("LOG2SZ", {"queue_log2_max": 33}),
                           ("Width of counters", {"counter_bits": 31}), ("Event counters", {"counters": 32})):
        with pytest.raises(ValueError, match=wrong):
            RegisterFile(**options)


def test_iommu_registers_ddtp_transitions():
    """MODEL-IOMMU-REG-4: from each mode to each value of iommu_mode, by one 8-byte write and by two halves."""
    for wide in (True, False):
        for old in IommuMode:
            for new in range(16):
                registers = RegisterFile(reset_mode=IommuMode.OFF)

                def write(value, registers=registers, wide=wide):
                    if wide:
                        registers.write(DDTP, 8, value)
                    else:
                        registers.write(DDTP + 4, 4, value >> 32)
                        registers.write(DDTP, 4, value & ONES)

                write(0x12_3456_789A << 10 | old)
                assert registers.read(DDTP, 8) == 0x12_3456_789A << 10 | old
                write(0x12_3456_7000 << 10 | new)  # differs in the low half only
                legal = new == 0 or (new <= 4 and old <= 1)
                seen = registers.read(DDTP, 8)
                assert seen & 0x3FF == (new if legal else old)
                assert seen >> 10 == (0x12_3456_7000 if legal else 0x12_3456_789A)
    # the high half alone: taken in Off and Bare, without effect on a directory in use
    registers = RegisterFile()
    registers.write(DDTP + 4, 4, 0x30)
    assert registers.read(DDTP, 8) == 0x30_0000_0001
    registers.write(DDTP, 4, 0x400 | 3)
    registers.write(DDTP + 4, 4, 0x31)
    assert registers.read(DDTP, 8) == 0x30_0000_0403


def test_iommu_registers_queues():
    """MODEL-IOMMU-REG-5: sizes cut the indices; a queue that is on keeps its base; enabling clears what it must."""
    registers = RegisterFile()
    for base, tail in ((CQB, CQT), (FQB, FQH)):
        registers.write(base, 8, 0x500 << 10 | 3)  # 16 entries
        registers.write(tail, 4, 0x1234_567D)
        assert registers.read(tail, 4) == 0xD
        registers.write(base, 8, 0x500 << 10 | 1)
        assert registers.read(tail, 4) == 1
    registers.write(CQH, 4, 1)
    registers.write(FQT, 4, 1)
    assert (registers.read(CQH, 4), registers.read(FQT, 4)) == (0, 0)
    for base, csr in ((CQB, CQCSR), (FQB, FQCSR)):
        registers.write(csr, 4, 1)
        registers.write(base, 8, 0x600 << 10 | 2)
        registers.write(base + 4, 4, 1)
        assert registers.read(base, 8) == 0x500 << 10 | 1
        registers.write(csr, 4, 0)
        registers.write(base, 8, 0x600 << 10 | 2)
        assert registers.read(base, 8) == 0x600 << 10 | 2
    registers.write(CQCSR, 4, 1)
    registers.write(FQCSR, 4, 1)
    registers.command_done()
    registers.command_error("cqmf")
    registers.command_error("cmd_ill")
    registers.fault_recorded()
    registers.fault_queue_error("fqof")
    registers.fault_queue_error("fqmf")
    assert (registers.read(CQCSR, 4), registers.read(FQCSR, 4)) == (0x1_0501, 0x1_0301)
    registers.write(CQCSR, 4, 0x401)
    registers.write(FQCSR, 4, 0x201)
    assert (registers.read(CQCSR, 4), registers.read(FQCSR, 4)) == (0x1_0101, 0x1_0101)
    assert (registers.read(CQH, 4), registers.read(FQT, 4)) == (1, 1)
    for csr in (CQCSR, FQCSR):
        registers.write(csr, 4, 0)
        assert registers.read(csr, 4) == 0x100  # off, the error stays to be read
        registers.write(csr, 4, 1)
        assert registers.read(csr, 4) == 0x1_0001
    assert (registers.read(CQH, 4), registers.read(FQT, 4)) == (0, 0)


def test_iommu_registers_interrupts():
    """MODEL-IOMMU-REG-6: ipsr is set by what is enabled, once; it comes back while the cause lasts; M holds messages."""
    registers = RegisterFile()
    for vector in range(4):
        registers.write(0x300 + 16 * vector, 8, 0xFEE0_0000 + 16 * vector)
        registers.write(0x308 + 16 * vector, 4, 0x40 + vector)
        registers.write(0x30C + 16 * vector, 4, 0)
    registers.write(ICVEC, 4, 0x12)  # civ 2, fiv 1
    command, fault = InterruptMessage(2, 0xFEE0_0020, 0x42), InterruptMessage(1, 0xFEE0_0010, 0x41)

    def sent():
        found, registers.messages[:] = list(registers.messages), []
        return found

    registers.write(CQCSR, 4, 1)
    registers.write(FQCSR, 4, 1)
    registers.command_error("cmd_ill")
    registers.fault_recorded()
    assert (registers.read(IPSR, 4), sent()) == (0, [])  # not enabled
    registers.write(CQCSR, 4, 3)
    registers.write(FQCSR, 4, 3)
    assert (registers.read(IPSR, 4), sent()) == (1, [command])  # the error lasts, the record was an event
    registers.fault_recorded()
    assert (registers.read(IPSR, 4), sent()) == (3, [fault])
    registers.fault_recorded()
    registers.command_error("cqmf")
    assert sent() == []  # pending already
    registers.write(IPSR, 4, 3)
    assert (registers.read(IPSR, 4), sent()) == (1, [command])  # two errors still stand
    registers.write(CQCSR, 4, 0x503)
    registers.write(IPSR, 4, 1)
    assert (registers.read(IPSR, 4), sent()) == (0, [])
    registers.fault_queue_error("fqof")
    assert (registers.read(IPSR, 4), sent()) == (2, [fault])
    registers.write(IPSR, 4, 1)  # not this bit
    assert (registers.read(IPSR, 4), sent()) == (2, [])
    registers.write(FQCSR, 4, 0x203)
    registers.write(IPSR, 4, 2)
    registers.write(0x31C, 4, 1)  # vector 1 masked
    registers.fault_recorded()
    assert (registers.read(IPSR, 4), sent()) == (2, [])
    assert registers.pending == {1}
    registers.write(0x318, 4, 0x99)
    registers.write(0x31C, 4, 0)
    assert (sent(), registers.pending) == ([replace(fault, data=0x99)], set())
    registers.write(0x31C, 4, 1)
    registers.write(0x31C, 4, 0)
    assert sent() == []  # once only


class GoldenCard:
    """A card made of the models alone: performs the driver's operations, one command per Delay."""

    def __init__(self, *, stuck=(), **options):
        self.memory = GuestMemory()
        self.registers = RegisterFile(**options)
        self.commands, self.faults = CommandQueue(self.registers, self.memory), FaultQueue(self.registers, self.memory)
        self.iommu = Iommu(self.memory, registers=self.registers)
        self.stuck, self.done, self.widths = dict(stuck), [], set()

    def perform(self, operation):
        match operation:
            case MemoryRead(address=address, size=size):
                self.widths.add(size)
                return self.stuck.get(address - BAR, self.registers.read(address - BAR, size))
            case MemoryWrite(address=address, size=size, value=value):
                self.widths.add(size)
                self.registers.write(address - BAR, size, value)
            case Delay():
                self.done.append(self.commands.step())
        return None

    def drive(self, software):
        return run(software, self.perform)

    def request(self, *arguments):
        """Translate; a fault goes to the fault queue. Returns an `Outcome`."""
        request = Request(*arguments)
        try:
            return Outcome(spa=self.iommu.translate(request).spa)
        except TranslationFault as fault:
            record = self.iommu.record(request, fault)
            if record:
                self.faults.report(record)
            return Outcome(cause=fault.cause)


def driven(*, levels=2, wide=True, **options):
    """A golden card, a driver that brought it up, and what is allowed."""
    card, allowed = GoldenCard(), AllowedTranslations()
    driver = IommuDriver(BAR, card.memory, Allocator(card.memory, 0x8000_0000, 0x40_0000), allowed=allowed, wide=wide,
                         polls=50, **options)
    card.drive(driver.init(levels, cq_log2=3, fq_log2=2))
    return card, driver, allowed


@pytest.mark.parametrize("wide", [True, False])
def test_iommu_registers_driver_life(wide):
    """MODEL-IOMMU-REG-7: bring-up, a domain, its change and its end; the golden card's answers stay allowed and exact."""
    card, driver, allowed = driven(levels=2, wide=wide)
    assert card.widths == ({4, 8} if wide else {4})
    assert driver.capabilities == Capabilities()
    assert card.registers.mode == IommuMode.LVL2
    assert card.registers.read(ICVEC, 4) == 0x10
    device, iova, write = 0x1234, 0x1_5000, AccessType.WRITE

    def agrees(expected):
        outcome = card.request(device, iova, write)
        assert outcome == expected
        assert allowed.outcomes(device, iova, write) == {outcome}

    agrees(Outcome(cause=Cause.DDT_ENTRY_NOT_VALID))
    table = PageTable(card.memory, driver.allocator, observer=allowed)
    driver.directory.set(device, DeviceContext.sv39(table.root, PSCID=5))
    card.drive(driver.invalidate_context(device, pscid=5))
    agrees(Outcome(cause=Cause.WRITE_PAGE_FAULT))
    table.map_page(iova, 0x77_7000)
    agrees(Outcome(spa=0x77_7000))
    table.unmap(iova)
    assert allowed.may_access(device, 0x77_7000, True)
    card.drive(driver.invalidate(iova=iova, pscid=5))
    assert not allowed.may_access(device, 0x77_7000, True)
    agrees(Outcome(cause=Cause.WRITE_PAGE_FAULT))
    records = card.drive(driver.read_faults())
    assert records == [FaultRecord(cause=cause, ttyp=3, device_id=device, iotval=iova) for cause in (258, 15, 15)]
    assert card.drive(driver.read_faults()) == []
    for mode, outcome in ((IommuMode.OFF, Outcome(cause=Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED)),
                          (IommuMode.BARE, Outcome(spa=iova))):
        card.drive(driver.set_ddtp(mode))
        agrees(outcome)
    card.drive(driver.set_ddtp(IommuMode.LVL2, driver.directory.root))
    card.drive(driver.set_ddtp(IommuMode.BARE))  # through Off
    agrees(Outcome(spa=iova))


def test_iommu_registers_driver_queue_wraps():
    """MODEL-IOMMU-REG-8: more commands than the queue holds wait for room, run in order, and none is lost."""
    card, driver, _ = driven()
    card.done.clear()
    commands = [IotinvalVma(pscid=n) for n in range(40)]
    card.drive(driver.submit(commands))
    card.drive(driver.fence())
    done = [command for command in card.done if command]
    assert done == [*commands, IofenceC(pr=True, pw=True)]


def test_iommu_registers_driver_illegal_command():
    """MODEL-IOMMU-REG-9: an illegal command stops the queue, is reported, replaced, and the queue goes on."""
    card, driver, _ = driven()
    card.drive(driver.submit([IotinvalVma(), bytes(16), IodirInvalDdt(3)]))  # entries 3, 4, 5: three were for `init`
    with pytest.raises(CommandQueueStopped) as caught:
        card.drive(driver.fence())
    assert (caught.value.cqcsr & QueueCsr.CMD_ILL, caught.value.cqh) == (QueueCsr.CMD_ILL, 4)
    card.done.clear()
    card.drive(driver.replace_stopped_command())
    card.drive(driver.invalidate())
    assert [command for command in card.done if command] == [
        IofenceC(), IodirInvalDdt(3), IofenceC(pr=True, pw=True), IotinvalVma(), IofenceC(pr=True, pw=True)]
    assert card.registers.read(CQCSR, 4) == 0x1_0003


def test_iommu_registers_driver_fault_overflow():
    """MODEL-IOMMU-REG-10: an overflown fault queue is read, counted and works again."""
    card, driver, _ = driven()
    for n in range(9):
        card.request(n, 0x1000, AccessType.READ)
    records = card.drive(driver.read_faults())
    assert [record.device_id for record in records] == [0, 1, 2]
    assert driver.fault_overflows == 1
    card.request(77, 0x1000, AccessType.READ)
    assert [record.device_id for record in card.drive(driver.read_faults())] == [77]
    assert driver.fault_overflows == 1


def test_iommu_registers_driver_lost_commands():
    """MODEL-IOMMU-REG-13: invalidations lost with a queue that stopped or was turned off do not count as done."""
    card, driver, allowed = driven()
    table = PageTable(card.memory, driver.allocator, observer=allowed)
    driver.directory.set(1, DeviceContext.sv39(table.root, PSCID=5))
    card.drive(driver.invalidate_context(1))

    def is_left():
        return allowed.may_access(1, 0x9000, False)

    def page_goes():
        table.map_page(0x1000, 0x9000)
        table.unmap(0x1000)
        card.drive(driver.submit([IotinvalVma()]))  # the golden card runs commands in delays: not yet

    page_goes()
    card.drive(driver.enable_command_queue(3))
    card.drive(driver.fence())
    assert is_left()
    card.drive(driver.invalidate())
    assert not is_left()
    page_goes()
    card.drive(driver.submit([bytes(16)]))
    with pytest.raises(CommandQueueStopped):
        card.drive(driver.fence())
    card.drive(driver.replace_stopped_command())
    card.drive(driver.fence())
    assert is_left()
    card.drive(driver.invalidate())
    assert not is_left()


@pytest.mark.parametrize("stuck, match", [
    ({0x00: 0x38_0000_0220}, "Version"), ({DDTP: 1 << 4}, "ddtp.busy"), ({DDTP: 0x3}, "ddtp must read back"),
    ({CQCSR: 0}, "cqon"), ({FQCSR: 1 << 17}, "fqcsr to turn off"), ({CQB: 0x7FF << 10 | 2}, "cqb must read back"),
    ({CQH: 8}, "cqh must be below 8"), ({CQH: 0}, "IOFENCE.C to complete"), ({ICVEC: 0}, "icvec"),
    ({0x00: ONES64}, "Version"), ({CQH: ONES}, "cqh must be below"), ({0x00: 0x3F_0000_0210}, "PAS"),
])
def test_iommu_registers_driver_hostile_card(stuck, match):
    """MODEL-IOMMU-REG-11: a register that never becomes what it must, or says nonsense, ends in one error, not a hang."""
    card = GoldenCard(stuck=stuck)
    driver = IommuDriver(BAR, card.memory, Allocator(card.memory, 0x8000_0000, 0x40_0000), polls=50)
    with pytest.raises(IommuDriverError, match=match):
        card.drive(driver.init(2, cq_log2=3, fq_log2=2))


def test_iommu_registers_driver_reads_sizes_back():
    """MODEL-IOMMU-REG-12: a queue that the IOMMU makes smaller is used at the size it has; pages come back."""
    card = GoldenCard(queue_log2_max=3)
    driver = IommuDriver(BAR, card.memory, Allocator(card.memory, 0x8000_0000, 0x40_0000), polls=50)
    card.drive(driver.init(1, cq_log2=9, fq_log2=9))
    assert (driver.cq_entries, driver.fq_entries) == (8, 8)
    card.drive(driver.submit([IotinvalVma(pscid=n) for n in range(30)]))
    card.drive(driver.fence())
    free = driver.allocator.free_count
    for is_first_off in (True, False, False):
        if is_first_off:
            card.drive(driver.disable_queue("cqcsr"))
            assert card.registers.read(CQCSR, 4) == 0
        card.drive(driver.enable_command_queue(9))
        card.drive(driver.fence())
        assert card.registers.base("cqb") == driver.cq_base
    assert driver.allocator.free_count == free
    card.stuck = {FQT: 8}
    with pytest.raises(IommuDriverError, match="fqt must be below 8"):
        card.drive(driver.read_faults())
    with pytest.raises(ValueError, match="2\\^1 to 2\\^16"):
        card.drive(driver.enable_fault_queue(17))
    with pytest.raises(ValueError, match="16 bytes"):
        card.drive(driver.submit([bytes(15)]))
    assert OFFSET["icvec"] == 760


FULL = Capabilities(ATS=True, HPM=True, DBG=True, QOSID=True, END=True, IGS=Igs.BOTH)


def test_iommu_registers_full_map():
    """MODEL-IOMMU-REG-14: each optional register is where the map has it when its capability is 1, else reads 0; ones leave its bits."""
    optional = {
        "ATS": {"pqb": (0x38, 64, 0x003F_FFFF_FFFF_FC0F), "pqh": (0x40, 32, 0xFFFF), "pqt": (0x44, 32, 0), "pqcsr": (0x50, 32, 0x1_0003)},
        "HPM": {"iocountovf": (0x58, 32, 0), "iocountinh": (0x5C, 32, 0xFF), "iohpmcycles": (0x60, 64, ONES64)}
        | {f"iohpmctr{n}": (0x68 + 8 * n - 8, 64, ONES64) for n in range(1, 8)}
        | {f"iohpmevt{n}": (0x160 + 8 * n - 8, 64, ONES64) for n in range(1, 8)},
        "DBG": {"tr_req_iova": (0x258, 64, ONES64 - 0xFFF), "tr_req_ctl": (0x260, 64, 0xFFFF_FF01_FFFF_F00F),
                "tr_response": (0x268, 64, 0)},
        "QOSID": {"iommu_qosid": (0x270, 32, 0x0FFF_0FFF)},
    }
    for name, registers in optional.items():
        having = RegisterFile(Capabilities(**{name: True}))
        added = {one.name: (one.offset, one.width) for one in register_list(having.capabilities)}
        assert set(added) - {one.name for one in REGISTERS} == set(registers)
        for register, (offset, width, value) in registers.items():
            assert added[register] == (offset, width)
            having.write(offset, width // 8, (1 << width) - 1)
            assert having.read(offset, width // 8) == value, register
            without = RegisterFile()
            without.write(offset, 4, ONES)
            assert without.read(offset, 4) == 0
    assert "iohpmctr31" in {one.name for one in register_list(FULL, counters=31)}
    assert RegisterFile(FULL).read(ICVEC, 4) == 0
    for capabilities, value in ((Capabilities(ATS=True), 0x3033), (Capabilities(HPM=True), 0x333), (FULL, 0x3333)):
        registers = RegisterFile(capabilities)
        registers.write(ICVEC, 8, ONES64)
        assert registers.read(ICVEC, 8) == value
    registers = RegisterFile(Capabilities(IGS=Igs.WSI))
    assert (registers.read(8, 4), registers.read(0x300, 8)) == (2, 0)


def test_iommu_registers_features():
    """MODEL-IOMMU-REG-15: fctl takes BE, WSI, GXL where they can be chosen, in Off and with all queues off, and keeps its value else."""
    for capabilities, gxl_writable, value in ((FULL, True, 7), (FULL, False, 3), (Capabilities(END=True), False, 1),
                                              (Capabilities(), True, 4)):
        registers = RegisterFile(capabilities, reset_mode=IommuMode.OFF, gxl_writable=gxl_writable)
        registers.write(8, 4, ONES)
        assert registers.read(8, 4) == value
        registers.write(DDTP, 8, 1)
        registers.write(8, 4, 0)
        assert registers.read(8, 4) == value
    assert RegisterFile(FULL, gxl=True).read(8, 4) == 4
    for csr in (CQCSR, FQCSR, 0x50):
        registers = RegisterFile(FULL, reset_mode=IommuMode.OFF)
        registers.write(csr, 4, 1)
        registers.write(8, 4, 1)
        assert registers.read(8, 4) == 0
        registers.write(csr, 4, 0)
        registers.write(8, 4, 1)
        assert registers.read(8, 4) == 1


def test_iommu_registers_wires():
    """MODEL-IOMMU-REG-16: with fctl.WSI a wire is high while an ipsr bit of its vector is, and no message is sent; fence_w_ip counts."""
    registers = RegisterFile(FULL, reset_mode=IommuMode.OFF)
    registers.write(8, 4, 2)
    registers.write(ICVEC, 4, 0x3121)  # civ 1, fiv 2, pmiv 1, piv 3
    for csr in (CQCSR, FQCSR, 0x50):
        registers.write(csr, 4, 3)
    registers.fence_signalled()
    assert (registers.wires, registers.read(CQCSR, 4)) == ({1}, 0x1_0803)
    registers.page_request_recorded()
    registers.fault_recorded()
    assert (registers.wires, registers.read(IPSR, 4)) == ({1, 2, 3}, 0b1011)
    registers.write(IPSR, 4, 0b1111)
    assert (registers.wires, registers.read(IPSR, 4)) == ({1}, 1)  # the fence still stands, records were events
    registers.write(CQCSR, 4, 0x803)
    registers.write(IPSR, 4, 1)
    assert (registers.wires, registers.messages, registers.pending) == (set(), [], set())
    registers.page_queue_error("pqof")
    registers.write(IPSR, 4, 8)
    assert (registers.wires, registers.read(0x50, 4)) == ({3}, 0x1_0203)


def test_iommu_registers_counters():
    """MODEL-IOMMU-REG-17: counters wrap at their width, set OF once, raise pmip when OF becomes 1, and stand while inhibited."""
    for bits in (32, 48, 64):
        registers = RegisterFile(FULL, counters=3, counter_bits=bits)
        registers.write(0x308, 4, 0x42)
        registers.write(0x30C, 4, 0)
        event = [(Event.TRANSLATED_REQUEST, EventIds(1))]
        registers.write(0x168, 8, 2)  # iohpmevt2
        registers.write(0x70, 8, (1 << bits) - 2)
        for n, (value, overflows) in enumerate((((1 << bits) - 1, 0), (0, 4), (1, 4))):
            registers.count(event)
            assert (registers.read(0x70, 8), registers.read(0x58, 4), registers.read(IPSR, 4)) == (value, overflows, 4 * (n > 0))
        assert registers.read(0x168, 8) == 1 << 63 | 2
        assert registers.messages == [InterruptMessage(0, 0, 0x42)]
        registers.write(IPSR, 4, 4)
        registers.write(0x70, 8, (1 << bits) - 1)
        registers.count(event)
        assert (registers.read(0x70, 8), registers.read(IPSR, 4)) == (0, 0)  # OF stood already
        registers.write(0x168, 8, 2)
        assert registers.read(0x58, 4) == 0
        registers.write(0x5C, 4, 0b0100)
        registers.count(event)
        assert registers.read(0x70, 8) == 0
        registers.tick(5)
        registers.write(0x5C, 4, 0b0001)
        registers.tick(5)
        registers.count(event)
        assert (registers.read(0x60, 8), registers.read(0x70, 8)) == (5, 1)
        registers.write(0x5C, 4, 0)
        registers.write(0x60, 8, (1 << min(bits, 63)) - 3)
        registers.tick(4)
        assert (registers.read(0x60, 8), registers.read(0x58, 4), registers.read(IPSR, 4)) == (1 << 63 | 1, 1, 4)
    assert not RegisterFile().counters


def test_iommu_registers_event_filters():
    """MODEL-IOMMU-REG-18: every row of the tables of filters: DV_GSCV, PV_PSCV, IDT, DMASK, and events without the other kind of IDs."""
    ids = EventIds(0x12_3456, 0x777, 0x3456, 0x888)
    nobody = EventIds(0x12_3456)
    for event in Event:
        for idt in (False, True):
            for dv in (False, True):
                for pv in (False, True):
                    selector = EventSelector(event, idt=idt, dv_gscv=dv, pv_pscv=pv, did_gscid=0x3456 if idt else 0x12_3456,
                                             pid_pscid=0x888 if idt else 0x777)
                    assert EventSelector.from_value(selector.value) == selector
                    counts = event != Event.NONE and (not idt or event in (4, 7, 8))
                    assert selector.takes(event, ids) == counts
                    assert selector.takes(event, nobody) == (counts and not pv and not (dv and idt))
                    assert not selector.takes(Event((event + 1) % 9), ids)
                    for wrong in (replace(ids, device_id=0x12_3457), replace(ids, gscid=0x3457)):
                        assert selector.takes(event, wrong) == (counts and not (dv and (wrong.gscid != 0x3456) == idt))
                    for wrong in (replace(ids, process_id=0x776), replace(ids, pscid=0x889)):
                        assert selector.takes(event, wrong) == (counts and not (pv and (wrong.pscid != 0x888) == idt))
    for did, first, last in ((0x12_345B, 0x12_3458, 0x12_345F), (0x12_347F, 0x12_3400, 0x12_34FF), (0x12_7FFF, 0x12_0000, 0x12_FFFF),
                             (0x12_3456, 0x12_3456, 0x12_3457), (0xFF_FFFF, 0, 0xFF_FFFF)):
        selector = EventSelector(1, dmask=True, did_gscid=did, dv_gscv=True)
        for device in (first, last, first - 1, last + 1, did):
            assert selector.takes(Event.UNTRANSLATED_REQUEST, EventIds(device & 0xFF_FFFF)) == (first <= device & 0xFF_FFFF <= last)
    assert EventSelector(8, True, 5, 6, True, True, True).value == 8 | 1 << 15 | 5 << 16 | 6 << 36 | 7 << 60
    for message, values in (("eventID", {"event": 1 << 15}), ("PID_PSCID", {"pid_pscid": 1 << 20}), ("DID_GSCID", {"did_gscid": -1})):
        with pytest.raises(ValueError, match=message):
            _ = EventSelector(**values).value
