"""Commands to and from bytes, illegal ones by name, and the queue one command at a time. [RVIOMMU1.0 4.1, 6.15]"""

import random

import pytest

from ringwall.models.iommu.commands import (
    COMMAND_DEFECTS,
    CommandQueue,
    IllegalCommand,
    IodirInvalDdt,
    IodirInvalPdt,
    IofenceC,
    IotinvalGvma,
    IotinvalVma,
    decode,
    wide_id,
)
from ringwall.models.iommu.registers import Capabilities, IommuMode, RegisterFile
from ringwall.models.memory import GuestMemory

PLAIN = Capabilities()
QUEUE = 0x10_0000
CQB, CQH, CQT, CQCSR, IPSR = 0x18, 0x20, 0x24, 0x48, 0x54  # [RVIOMMU1.0 6.1]
ON, CMD_ILL, CMD_TO, CQMF = 1 << 16, 1 << 10, 1 << 9, 1 << 8


def raw(low, high=0):
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


WORKED = [
    (IotinvalVma(), raw(1)),
    (IotinvalVma(address=0xFFFF_FFFF_FFFF_F000), raw(1 | 1 << 10, ((1 << 52) - 1) << 10)),
    (IotinvalVma(address=0, pscid=0), raw(1 | 1 << 10 | 1 << 32)),
    (IotinvalVma(address=0x12_3456_7000, pscid=0xABCDE, gscid=0x8421),
     raw(1 | 1 << 10 | 0xABCDE << 12 | 1 << 32 | 1 << 33 | 0x8421 << 44, 0x1234567 << 10)),
    (IotinvalGvma(gscid=7), raw(1 | 1 << 7 | 1 << 33 | 7 << 44)),
    (IofenceC(), raw(2)),
    (IofenceC(pr=True), raw(2 | 1 << 12)),
    (IofenceC(pw=True, address=0xFEDC_BA98_7654_3210, data=0xDEADBEEF),
     raw(2 | 1 << 10 | 1 << 13 | 0xDEADBEEF << 32, 0xFEDC_BA98_7654_3210 >> 2)),
    (IodirInvalDdt(), raw(3)),
    (IodirInvalDdt(device_id=0xABCDEF), raw(3 | 1 << 33 | 0xABCDEF << 40)),
    (IodirInvalPdt(device_id=1, process_id=0xFEDCB), raw(3 | 1 << 7 | 0xFEDCB << 12 | 1 << 33 | 1 << 40)),
]


def test_iommu_commands_worked_examples():
    """MODEL-IOMMU-CMD-1: each command is the bits that the specification draws, both ways."""
    for command, image in WORKED:
        assert command.encode() == image
        assert decode(image, PLAIN) == command
    # operands whose valid bit is 0 are ignored
    assert decode(raw(1 | 0xFFFFF << 12 | 0xFFFF << 44, ((1 << 52) - 1) << 10), PLAIN) == IotinvalVma()
    assert decode(raw(2 | 0xFFFF_FFFF << 32, (1 << 62) - 1), PLAIN) == IofenceC()
    assert decode(raw(3 | 0xFFFFFF << 40), PLAIN) == IodirInvalDdt()
    extended = Capabilities(NL=True, S=True)
    both = IotinvalVma(address=0x7000, non_leaf=True, is_range=True)
    assert both.encode() == raw(1 | 1 << 10 | 1 << 34, 7 << 10 | 1 << 9)
    assert decode(both.encode(), extended) == both
    assert decode(IofenceC(wsi=True).encode(), PLAIN, wsi=True) == IofenceC(wsi=True)


@pytest.mark.parametrize("name", sorted(COMMAND_DEFECTS))
def test_iommu_commands_illegal(name):
    """MODEL-IOMMU-CMD-2: each malformed command is illegal, stops the queue at itself, and a good one goes on."""
    with pytest.raises(IllegalCommand):
        decode(COMMAND_DEFECTS[name], PLAIN)
    memory, registers, queue = running([IotinvalVma().encode(), COMMAND_DEFECTS[name]])
    assert queue.step() == IotinvalVma()
    assert queue.step() is None
    assert registers.read(CQCSR, 4) == ON | CMD_ILL | 1
    assert registers.read(CQH, 4) == 1
    memory.write(QUEUE + 16, IodirInvalDdt().encode())
    assert queue.step() is None
    registers.write(CQCSR, 4, CMD_ILL | 1)
    assert queue.step() == IodirInvalDdt()
    assert (registers.read(CQCSR, 4), registers.read(CQH, 4)) == (ON | 1, 2)


def test_iommu_commands_every_bit_counts():
    """MODEL-IOMMU-CMD-3: of random 16 bytes, decode refuses or keeps every bit that is not an ignored operand."""
    rng = random.Random(3)
    legal = 0
    for _ in range(20000):
        opcode, func3 = rng.choice([1, 1, 2, 3]), rng.choice([0, 0, 0, 1])
        bits = {rng.randrange(10, 128) for _ in range(rng.randrange(5))}
        image = (opcode | func3 << 7 | sum(1 << bit for bit in bits)).to_bytes(16, "little")
        try:
            command = decode(image, PLAIN)
        except IllegalCommand:
            continue
        legal += 1
        lost = int.from_bytes(image, "little") ^ int.from_bytes(command.encode(), "little")
        ignored = {1: 0xFFFFF << 12 | 0xFFFF << 44 | ((1 << 52) - 1) << 74, 2: 0xFFFF_FFFF << 32 | ((1 << 62) - 1) << 64,
                   3: 0xFFFFFF << 40}[opcode]
        assert not lost & ~ignored
    assert 2000 < legal < 18000


def test_iommu_commands_capabilities():
    """MODEL-IOMMU-CMD-4: NL, S and WSI bits are reserved or not as the capabilities say; wide ids are named."""
    for name, bit in (("NL", 34), ("S", 73)):
        image = (1 | 1 << 10 | 1 << bit).to_bytes(16, "little")
        decode(image, Capabilities(**{name: True}))
        with pytest.raises(IllegalCommand):
            decode(image, PLAIN)
    wide = Capabilities(PD17=True)
    assert wide_id(IodirInvalPdt(0, 0x1FFFF), wide, IommuMode.LVL1) is None
    assert "PID wider than 17" in wide_id(IodirInvalPdt(0, 0x20000), wide, IommuMode.LVL1)
    assert "without process" in wide_id(IodirInvalPdt(0, 0), PLAIN, IommuMode.LVL1)
    for mode, bits in ((IommuMode.LVL1, 7), (IommuMode.LVL2, 16)):
        assert wide_id(IodirInvalDdt((1 << bits) - 1), PLAIN, mode) is None
        assert f"DID wider than {bits}" in wide_id(IodirInvalDdt(1 << bits), PLAIN, mode)
    for mode in (IommuMode.OFF, IommuMode.BARE, IommuMode.LVL3):
        assert wide_id(IodirInvalDdt(0xFFFFFF), PLAIN, mode) is None
    assert wide_id(IotinvalVma(), PLAIN, IommuMode.LVL1) is None
    for refuses, seen in ((True, None), (False, IodirInvalDdt(0x80))):
        _, registers, queue = running([IodirInvalDdt(0x80).encode()], refuses_wide_ids=refuses)
        registers.write(0x10, 8, 2 | 1 << 10)
        assert queue.step() == seen
        assert bool(registers.read(CQCSR, 4) & CMD_ILL) == refuses


def test_iommu_commands_refusals():
    """MODEL-IOMMU-CMD-5: operands that do not fit are refused with a sentence."""
    for message, command in (("Address must", IotinvalVma(address=0x800)), ("Address must", IotinvalVma(address=1 << 64)),
                             ("PSCID", IotinvalVma(pscid=1 << 20)), ("GSCID", IotinvalGvma(gscid=-1)),
                             ("Address of IOFENCE", IofenceC(address=2)), ("Data of IOFENCE", IofenceC(data=1 << 32)),
                             ("Device id", IodirInvalDdt(1 << 24)), ("Device id", IodirInvalPdt(-1, 0)),
                             ("Process id", IodirInvalPdt(0, 1 << 20))):
        with pytest.raises(ValueError, match=message):
            command.encode()
    with pytest.raises(ValueError, match="16 bytes"):
        decode(bytes(8), PLAIN)


def running(images, *, log2=2, **options):
    """A queue of 2^log2 entries at QUEUE that holds ``images``, turned on."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(QUEUE, 0x1000)
    registers = RegisterFile()
    for n, image in enumerate(images):
        memory.write(QUEUE + 16 * n, image)
    registers.write(CQB, 8, QUEUE >> 12 << 10 | log2 - 1)
    registers.write(CQCSR, 4, 1)
    registers.write(CQT, 4, len(images))
    return memory, registers, CommandQueue(registers, memory, **options)


def test_iommu_commands_queue():
    """MODEL-IOMMU-CMD-6: commands run in order and wrap; empty and off do nothing; enabling starts again at entry 0."""
    commands = [IotinvalVma(pscid=n) for n in range(3)]
    memory, registers, queue = running([command.encode() for command in commands])
    assert [queue.step() for _ in range(4)] == [*commands, None]
    memory.write(QUEUE + 48, IodirInvalDdt().encode())
    memory.write(QUEUE, IofenceC().encode())
    registers.write(CQT, 4, 1)
    assert [queue.step() for _ in range(3)] == [IodirInvalDdt(), IofenceC(), None]
    assert registers.read(CQH, 4) == 1
    registers.write(CQT, 4, 2)
    registers.write(CQCSR, 4, 0)
    assert queue.step() is None
    assert registers.read(CQCSR, 4) == 0
    registers.write(CQCSR, 4, 1)
    assert registers.read(CQH, 4) == 0
    assert [queue.step() for _ in range(3)] == [IofenceC(), commands[1], None]


def test_iommu_commands_fence_writes():
    """MODEL-IOMMU-CMD-7: IOFENCE.C stores its 4 bytes, little-endian; where it cannot, cqmf, and cqh stays at it."""
    fence = IofenceC(address=QUEUE + 0x804, data=0x1122_3344)
    memory, registers, queue = running([fence.encode(), IofenceC(address=0x8_0000, data=1).encode()])
    memory.write(QUEUE + 0x800, b"\xFF" * 12)
    assert queue.step() == fence
    assert memory.read(QUEUE + 0x800, 12) == b"\xFF" * 4 + b"\x44\x33\x22\x11" + b"\xFF" * 4
    assert queue.step() is None
    assert (registers.read(CQCSR, 4), registers.read(CQH, 4)) == (ON | CQMF | 1, 1)
    memory.add_range(0x8_0000, 0x1000)
    registers.write(CQCSR, 4, CQMF | 1)
    assert queue.step() == IofenceC(address=0x8_0000, data=1)
    assert memory.read(0x8_0000, 4) == b"\x01\0\0\0"


def test_iommu_commands_fetch_fault():
    """MODEL-IOMMU-CMD-8: a command that cannot be fetched is cqmf; cleared, the same one is fetched again."""
    memory, registers, queue = running([IotinvalVma().encode(), IodirInvalDdt().encode()])
    registers.write(CQCSR, 4, 3)  # interrupts on
    memory.poison(QUEUE + 31, 1)
    assert queue.step() == IotinvalVma()
    assert [queue.step() for _ in range(2)] == [None, None]
    assert (registers.read(CQCSR, 4), registers.read(CQH, 4)) == (ON | CQMF | 3, 1)
    assert registers.read(IPSR, 4) == 1
    memory.unpoison(QUEUE + 31, 1)
    registers.write(CQCSR, 4, CQMF | 3)
    assert queue.step() == IodirInvalDdt()
