"""Commands to and from bytes, illegal ones by name, and the queue one command at a time. [RVIOMMU1.0 4.1, 6.15]"""

import random

import pytest

from ringwall.models.iommu.commands import (
    COMMAND_DEFECTS,
    AtsInval,
    AtsMessage,
    AtsPrgr,
    CommandQueue,
    IllegalCommand,
    IodirInvalDdt,
    IodirInvalPdt,
    IofenceC,
    IotinvalGvma,
    IotinvalVma,
    MessageCode,
    command_defects,
    decode,
    wide_id,
)
from ringwall.models.iommu.registers import Capabilities, Igs, IommuMode, RegisterFile
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


def running(images, *, log2=2, capabilities=PLAIN, fctl=0, **options):
    """A queue of 2^log2 entries at QUEUE that holds ``images``, turned on."""
    memory = GuestMemory(all_ram=False)
    memory.add_range(QUEUE, 0x1000)
    registers = RegisterFile(capabilities, reset_mode=IommuMode.OFF)
    registers.write(8, 4, fctl)
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


ATS = Capabilities(ATS=True)
INVAL = AtsInval(0x1234, address=0x12_3456_7000, pid=0xABCDE, segment=0x56, is_range=True, is_global=True)
PRGR = AtsPrgr(0xFEDC, group=0x1A5, code=15, pid=3)


def test_iommu_commands_ats():
    """MODEL-IOMMU-CMD-9: ATS.INVAL and ATS.PRGR bit by bit, both ways; illegal without the capability, reserved bits with it."""
    images = {INVAL: raw(4 | 0xABCDE << 12 | 3 << 32 | 0x1234 << 40 | 0x56 << 56, 0x12_3456_7000 | 1 << 11 | 1),
              PRGR: raw(4 | 1 << 7 | 3 << 12 | 1 << 32 | 0xFEDC << 40, 0x1A5 << 32 | 15 << 44),
              AtsInval(0): raw(4), AtsPrgr(1, 0): raw(4 | 1 << 7 | 1 << 40)}
    for command, image in images.items():
        assert command.encode() == image
        assert decode(image, ATS) == command
        with pytest.raises(IllegalCommand):
            decode(image, PLAIN)
    assert decode(raw(4 | 0xFFFFF << 12 | 0xFF << 56), ATS) == AtsInval(0)  # operands without their valid bits
    for features in ({"ATS"}, {"NL", "S"}, {"ATS", "NL", "S"}):
        capabilities = Capabilities(**dict.fromkeys(features, True))
        for name, image in command_defects(features).items():
            with pytest.raises(IllegalCommand):
                decode(image, capabilities)
            assert name
    assert set(COMMAND_DEFECTS) - set(command_defects({"ATS", "NL", "S"})) == {
        "OPCODE_4", "IOTINVAL_VMA_RESERVED_34", "IOTINVAL_GVMA_RESERVED_34", "IOTINVAL_VMA_RESERVED_73", "IOTINVAL_GVMA_RESERVED_73"}
    for message, command in (("Requester", AtsInval(1 << 16)), ("Address", AtsInval(0, address=5)), ("Segment", AtsInval(0, segment=256)),
                             ("Process", AtsPrgr(0, 0, pid=1 << 20)), ("Page request group", AtsPrgr(0, 512)),
                             ("Response", AtsPrgr(0, 0, 16))):
        with pytest.raises(ValueError, match=message):
            command.encode()


def test_iommu_commands_ats_messages():
    """MODEL-IOMMU-CMD-10: messages carry PASID, segment and payload; ITags are used in order, and IOFENCE.C waits for completions."""
    commands = [INVAL, AtsInval(2), PRGR, IofenceC()]
    _, registers, queue = running([one.encode() for one in commands], log2=3, capabilities=ATS)
    assert [queue.step() for _ in range(4)] == [*commands[:3], None]
    assert queue.sent == [
        AtsMessage(MessageCode.INVALIDATION_REQUEST, 0x1234, INVAL.payload, 0xABCDE, 0x56, 0),
        AtsMessage(MessageCode.INVALIDATION_REQUEST, 2, 0, itag=1),
        AtsMessage(MessageCode.PAGE_REQUEST_GROUP_RESPONSE, 0xFEDC, 0xFEDC << 48 | 15 << 44 | 0x1A5 << 32, 3)]
    # not expected: another function, another segment, an ITag that waits for nobody, none at all
    for rid, itags, segment in ((2, 1, 0x56), (0x1234, 1, None), (0x1234, 1, 0x57), (2, 4, None), (2, 0, None), (2, 3, None)):
        assert not queue.invalidation_completed(rid, itags, 1, segment=segment)
    assert queue.invalidation_completed(0x1234, 1, 2, segment=0x56)  # the first of two
    assert queue.invalidation_completed(2, 2, 1)
    assert queue.step() is None
    assert queue.invalidation_completed(0x1234, 1, 2, segment=0x56)
    assert queue.step() == IofenceC()
    assert registers.read(CQH, 4) == 4
    # of eight, coded 0
    _, _, queue = running([AtsInval(7).encode(), IofenceC().encode()], capabilities=ATS)
    queue.step()
    for _ in range(8):
        assert queue.step() is None
        assert queue.invalidation_completed(7, 1, 0)
    assert queue.step() == IofenceC()


def test_iommu_commands_ats_timeouts():
    """MODEL-IOMMU-CMD-11: a timeout is told once, by the next IOFENCE.C, at which the queue stops; no free ITag holds ATS.INVAL back."""
    commands = [AtsInval(1), AtsInval(2), AtsInval(3), IofenceC(), IotinvalVma()]
    _, registers, queue = running([one.encode() for one in commands], log2=3, capabilities=ATS, itags=2)
    assert [queue.step() for _ in range(3)] == [*commands[:2], None]
    assert queue.invalidation_completed(1, 1, 1)
    assert queue.step() == commands[2]
    assert queue.sent[-1].itag == 0
    queue.invalidations_timed_out()
    assert queue.step() is None
    assert (registers.read(CQCSR, 4), registers.read(CQH, 4)) == (ON | CMD_TO | 1, 3)
    assert queue.step() is None
    registers.write(CQCSR, 4, CMD_TO | 1)
    assert [queue.step() for _ in range(2)] == commands[3:]
    queue.invalidations_timed_out()  # of nothing
    assert not queue.invalidation_completed(3, 1, 1)
    for itags in (0, 33):
        with pytest.raises(ValueError, match="ITags"):
            CommandQueue(registers, queue.memory, itags=itags)


def test_iommu_commands_big_endian_and_wires():
    """MODEL-IOMMU-CMD-12: fctl.BE turns commands and the fence's data around; with fctl.WSI a fence may set fence_w_ip; PAS holds."""
    capabilities = Capabilities(END=True, IGS=Igs.BOTH, PAS=40)
    fence = IofenceC(wsi=True, address=QUEUE + 0x800, data=0x1122_3344)
    images = [b"".join(image[n:n + 8][::-1] for n in (0, 8)) for image in (fence.encode(), IotinvalVma(pscid=0x12345).encode())]
    memory, registers, queue = running([*images, b"".join(IofenceC(address=1 << 40).encode()[n:n + 8][::-1] for n in (0, 8))],
                                       capabilities=capabilities, fctl=3)
    memory.add_range(1 << 40, 0x1000)  # is there, and beyond PAS
    assert [queue.step() for _ in range(2)] == [fence, IotinvalVma(pscid=0x12345)]
    assert memory.read(QUEUE + 0x800, 4) == b"\x11\x22\x33\x44"
    assert registers.read(CQCSR, 4) == ON | 1 << 11 | 1
    assert queue.step() is None
    assert registers.read(CQCSR, 4) == ON | 1 << 11 | CQMF | 1
    _, registers, queue = running([fence.encode()], capabilities=capabilities)
    assert queue.step() is None
    assert registers.read(CQCSR, 4) == ON | CMD_ILL | 1
