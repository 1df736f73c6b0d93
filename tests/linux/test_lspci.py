"""The model's configuration spaces as text, decoded by Debian's lspci, which none of us wrote: field by field what was described."""

import itertools
import random
import subprocess

import pytest

from ringwall.models.aer import report_to_all
from ringwall.models.config_space import (
    BarDescription,
    CapabilityDescription,
    Cause,
    ConfigSpace,
    Correctable,
    FunctionDescription,
    acs_capability,
    aer_capability,
    ari_capability,
    ats_capability,
    dvsec_capability,
    msi_capability,
    msix_capability,
    pasid_capability,
    pcie_capability,
    power_capability,
    pri_capability,
    serial_number_capability,
    sriov_capability,
    vendor_capability,
    virtio_capability,
    virtual_function,
    vsec_capability,
)
from ringwall.models.events import TlpSent
from ringwall.models.host import ConfigRead, ConfigWrite
from ringwall.models.host import enumerate as enumerate_functions
from ringwall.models.passthrough import PassThrough
from ringwall.rtl.config import BlkConfig, EndpointConfig
from ringwall.rtl.endpoint import descriptions_of
from ringwall.sim.card import bench_config
from ringwall.sim.compiled import CompiledCard
from ringwall.sim.linux import debian, initramfs
from ringwall.sim.linux.judge import describe_functions

pytestmark = pytest.mark.guest


@pytest.fixture
def lspci(tmp_path):
    """Return a function that lets lspci decode spaces (anything with ``read``) and returns the lines of each."""
    folder = debian.fetch(initramfs.PACKAGES)
    command = [folder / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", folder / "usr/lib/x86_64-linux-gnu", folder / "usr/bin/lspci"]

    def run(*spaces):
        text = []
        for n in range(len(spaces)):
            data = b"".join(spaces[n].read(at, 4).to_bytes(4, "little") for at in range(0, 4096, 4))
            rows = [f"{at:03x}: {data[at : at + 16].hex(' ')}\n" for at in range(0, 4096, 16)]
            text.append(f"{n // 32:02x}:{n % 32:02x}.0 dump\n" + "".join(rows))
        (tmp_path / "dump").write_text("\n".join([*text, ""]))
        done = subprocess.run([*command, "-n", "-vvv", "-F", tmp_path / "dump"], capture_output=True, text=True, timeout=60, check=True)
        blocks = done.stdout.strip().split("\n\n")
        assert len(blocks) == len(spaces)
        return [[line.strip() for line in block.splitlines()] for block in blocks]

    return run


def space_of(*capabilities, ext=(), **fields):
    return ConfigSpace(FunctionDescription(0x1AF4, 0x1042, 0x018000, capabilities=capabilities, ext_capabilities=tuple(ext), **fields))


def sign(value):
    return "+" if value else "-"


def flags(names, value):
    """Return lspci's way of telling bits: a name and a sign for each, bit 0 first; an empty name is no field."""
    return " ".join(name + sign(value >> n & 1) for n, name in enumerate(names.split(",")) if name)


def follow(lines, first, count):
    """Return ``count`` lines behind the one that begins like this."""
    [at] = [n for n, line in enumerate(lines) if line.startswith(first)]
    return lines[at + 1 : at + 1 + count]


def test_lspci_header(lspci):
    """LSPCI-HEAD-1: IDs, class, Command and Status bit by bit, every kind of BAR, ROM, interrupt pin and line (R57, R58, R59, R60)."""
    bars = {0: BarDescription(4096), 2: BarDescription(1 << 20, prefetch=True), 4: BarDescription(4096, is_64=False),
            5: BarDescription(32, is_64=False, is_io=True)}  # fmt: skip
    spaces, wanted = [], []
    for n in range(16):
        command, status = 1 << n, 1 << n & 0xF900
        space = space_of(bars=bars, rom_bytes=65536, interrupt_pin=n % 5, revision=n, subsystem_vendor=0x1234, subsystem=0x5670 + n)
        space.write(0x04, 2, command)
        space.set_bits(0x06, 2, status)
        for at, value in ((0x10, 0xE000_0000), (0x18, 0x9000_0000), (0x20, 0xF000_0000), (0x24, 0xC000), (0x30, 0xF800_0001), (0x3C, 0x0B)):
            space.write(at, 4, value)
        spaces.append(space)
        if command & ~0x0547:
            command = 0
        off = "[disabled]"
        wanted.append([
            f"{n // 32:02x}:{n % 32:02x}.0 0180: 1af4:1042" + (f" (rev {n:02x})" if n else ""), f"Subsystem: 1234:{0x5670 + n:04x}",
            "Control: " + flags("I/O,Mem,BusMaster,SpecCycle,MemWINV,VGASnoop,ParErr,Stepping,SERR,FastB2B,DisINTx", command),
            f"Status: Cap- 66MHz- UDF- FastB2B- ParErr{sign(status >> 8 & 1)} DEVSEL=fast >TAbort{sign(status >> 11 & 1)} "
            f"<TAbort{sign(status >> 12 & 1)} <MAbort{sign(status >> 13 & 1)} >SERR{sign(status >> 14 & 1)} "
            f"<PERR{sign(status >> 15 & 1)} INTx-",
            *(["Latency: 0"] if command & 4 else []),
            f"Interrupt: pin {'?ABCD'[n % 5]} routed to IRQ 11",
            *(f"Region {at}: {what}" + ("" if command & enable else f" {off}") for at, what, enable in (
                (0, "Memory at e0000000 (64-bit, non-prefetchable)", 2), (2, "Memory at 90000000 (64-bit, prefetchable)", 2),
                (4, "Memory at f0000000 (32-bit, non-prefetchable)", 2), (5, "I/O ports at c000", 1))),
            "Expansion ROM at f8000000" + ("" if command & 2 else " [disabled by cmd]"),
        ])  # fmt: skip
    assert lspci(*spaces) == wanted


def test_lspci_power(lspci):
    """LSPCI-PM-1: power management with every offer, and states (R61)."""
    spaces, wanted = [], []
    for d1, d2, no_reset, pme, state, enable in itertools.product((0, 1), (0, 1), (0, 1), (0, 0x09, 0x1F), (0, 3), (0, 1)):
        space = space_of(power_capability(d1=bool(d1), d2=bool(d2), pme=pme, no_soft_reset=bool(no_reset)))
        space.write(0x44, 2, state | enable << 8)
        spaces.append(space)
        wanted.append([
            f"Flags: PMEClk- DSI- D1{sign(d1)} D2{sign(d2)} AuxCurrent=0mA PME("
            + ",".join(name + sign(pme >> n & 1) for n, name in enumerate(("D0", "D1", "D2", "D3hot", "D3cold"))) + ")",
            f"Status: D{state} NoSoftRst{sign(no_reset)} PME-Enable{sign(enable and pme)} DSel=0 DScale=0 PME-"])  # fmt: skip
    found = lspci(*spaces)
    assert [follow(lines, "Capabilities: [40] Power Management version 3", 2) for lines in found] == wanted


def test_lspci_msi(lspci):
    """LSPCI-MSI-1: the four layouts of MSI with every count, masks and pending bits; MSI-X (R62, R63, R64)."""
    spaces, wanted = [], []
    for is_64, has_masks, log2 in itertools.product((False, True), (False, True), range(6)):
        space = space_of(msi_capability(1 << log2, is_64=is_64, has_masks=has_masks), vendor_capability(b""))
        space.write(0x04, 2, 4)
        space.write(0x42, 2, 1 | log2 << 4)
        space.write(0x44, 4, 0xFEE0_1004)
        if is_64:
            space.write(0x48, 4, 0x12)
        space.write(0x48 + 4 * is_64, 2, 0x4FC0)
        if has_masks:
            space.write(0x4C + 4 * is_64, 4, 0xFFFF_FFFF)
            space.interrupt((1 << log2) - 1)
        spaces.append(space)
        masks = (1 << (1 << log2)) - 1
        wanted.append([
            f"Capabilities: [40] MSI: Enable+ Count={1 << log2}/{1 << log2} Maskable{sign(has_masks)} 64bit{sign(is_64)}",
            f"Address: {'00000012' if is_64 else ''}fee01004  Data: 4fc0",
            *([f"Masking: {masks:08x}  Pending: {masks & ~(masks >> 1):08x}"] if has_masks else []),
            f"Capabilities: [{0x40 + (12, 20, 16, 24)[2 * is_64 + has_masks]:x}] Vendor Specific Information: Len=03 <?>"])  # fmt: skip
    for lines, expected in zip(lspci(*spaces), wanted):
        at = lines.index(expected[0])
        assert lines[at : at + len(expected)] == expected
    spaces = [space_of(msix_capability(count, table_bar=0, table_offset=0x300, pba_bar=2, pba_offset=0x8000)) for count in (1, 3, 2048)]
    for n in range(3):
        spaces[n].write(0x42, 2, n << 14)
    assert [lines[-3:] for lines in lspci(*spaces)] == [
        [f"Capabilities: [40] MSI-X: Enable{sign(n & 2)} Count={count} Masked{sign(n & 1)}", "Vector table: BAR=0 offset=00000300",
         "PBA: BAR=2 offset=00008000"] for n, count in enumerate((1, 3, 2048))]  # fmt: skip


def test_lspci_express(lspci):
    """LSPCI-EXP-1: PCI Express with random offers and random settings of Device Control and Device Control 2, status bits."""
    rng = random.Random("LSPCI-EXP-1")
    timeouts = {0: "50us to 50ms", 1: "50us to 100us", 2: "1ms to 10ms", 5: "16ms to 55ms", 6: "65ms to 210ms", 9: "260ms to 900ms",
                10: "1s to 3.5s", 13: "4s to 13s", 14: "17s to 64s"}  # fmt: skip
    ranges = {1: "A", 2: "B", 3: "AB", 6: "BC", 7: "ABC", 14: "BCD", 15: "ABCD"}
    spaces, wanted = [], []
    for _ in range(40):
        mps, ext_tag, flr, atomic, status = rng.randrange(6), rng.randrange(2), rng.randrange(2), rng.randrange(8), rng.randrange(16)
        offered, ten, requester, prefixes = rng.choice(list(ranges)), rng.randrange(2), rng.randrange(2), rng.choice((0, 0, 1, 2, 4))
        control, timeout, more = rng.randrange(0x8000) & ~0x0680, rng.choice(list(timeouts)), rng.randrange(2)
        space = space_of(pcie_capability(
            mps_supported=128 << mps, ext_tag=bool(ext_tag), flr=bool(flr), link_capabilities=0x0040_0083, link_status=0x1083,
            timeout_ranges=offered, atomic_requester=bool(requester), atomic_completer=atomic, tag_10_completer=bool(ten),
            tag_10_requester=bool(ten), ido=bool(more), prefixes=prefixes), bars={0: BarDescription(4096)})  # fmt: skip
        space.write(0x10, 4, 0xE000_0000)
        space.write(0x48, 2, control)
        space.write(0x68, 2, timeout | 1 << 6 | 1 << 12 | 1 << 10 | 1 << 4)
        space.set_bits(0x4A, 2, status)
        spaces.append(space)
        control &= 0x78FF | ext_tag << 8
        wanted.append({
            "DevCap:": f"MaxPayload {128 << mps} bytes, PhantFunc 0, Latency L0s <64ns, L1 <1us",
            "ExtTag": f"{sign(ext_tag)} AttnBtn- AttnInd- PwrInd- RBE+ FLReset{sign(flr)} SlotPowerLimit 0W",
            "DevCtl:": flags("CorrErr,NonFatalErr,FatalErr,UnsupReq", control),
            "RlxdOrd": f"{sign(control >> 4 & 1)} ExtTag{sign(control >> 8 & 1)} PhantFunc- AuxPwr- NoSnoop{sign(control >> 11 & 1)}"
                       + (" FLReset-" if flr else ""),
            "MaxPayload": f"{128 << (control >> 5 & 7)} bytes, MaxReadReq {128 << (control >> 12 & 7)} bytes",
            "DevSta:": flags("CorrErr,NonFatalErr,FatalErr,UnsupReq,AuxPwr,TransPend", status),
            "LnkCap:": "Port #0, Speed 8GT/s, Width x8, ASPM not supported", "LnkSta:": "Speed 8GT/s, Width x8",
            "DevCap2:": f"Completion Timeout: Range {ranges[offered]}, TimeoutDis+ NROPrPrP- LTR-",
            "10BitTagComp": f"{sign(ten)} 10BitTagReq{sign(ten)} OBFF Not Supported, ExtFmt{sign(prefixes)} EETLPPrefix{sign(prefixes)}"
                            + (f", MaxEETLPPrefixes {prefixes}" if prefixes else ""),
            "AtomicOpsCap:": flags("32bit,64bit,128bitCAS", atomic),
            "DevCtl2:": f"Completion Timeout: {timeouts[timeout]}, TimeoutDis+ LTR- 10BitTagReq{sign(ten)} OBFF Disabled,",
            "AtomicOpsCtl:": f"ReqEn{sign(requester)}"})  # fmt: skip
    for lines, expected in zip(lspci(*spaces), wanted):
        block = follow(lines, "Capabilities: [40] Express (v2) Endpoint, MSI 00", 30)
        for name, rest in expected.items():
            [line] = [line for line in block if line.startswith(name)]
            assert line[len(name) :].strip().removesuffix(" (ok)") == rest


def test_lspci_aer(lspci):
    """LSPCI-AER-1: each error that lspci knows: status, masks, severities, pointer and header log (R40)."""
    names = "DLP,SDES,,,,,,,TLP,FCP,CmpltTO,CmpltAbrt,UnxCmplt,RxOF,MalfTLP,ECRC,UnsupReq,ACSViol"  # from bit 4 on
    causes = [cause for cause in Cause if cause.value.error is not None and cause is not Cause.INTERNAL]
    spaces, wanted = [], []
    for n, cause in enumerate(causes):
        space = space_of(pcie_capability(), ext=[aer_capability(uncorrectable=0x003F_F030, correctable=0x31C1)])
        bit = 1 << cause.value.error
        space.write(0x10C, 4, bit | 0x0010_0000)
        space.write(0x108, 4, 0x003F_F030 & ~bit)
        space.write(0x114, 4, 0)
        space.report_error(cause, [0x4A00_0000 + n, 2, 3])
        space.report_error(Correctable.REPLAY_TIMER)
        spaces.append(space)
        wanted.append([
            "UESta: " + flags(names, bit >> 4), "UEMsk: " + flags(names, (0x003F_F030 & ~bit) >> 4),
            "UESvrt: " + flags(names, (bit | 0x0010_0000) >> 4),
            "CESta: RxErr- BadTLP- BadDLLP- Rollover- Timeout+ AdvNonFatalErr-",
            "CEMsk: RxErr- BadTLP- BadDLLP- Rollover- Timeout- AdvNonFatalErr-",
            f"AERCap: First Error Pointer: {cause.value.error:02x}, ECRCGenCap- ECRCGenEn- ECRCChkCap- ECRCChkEn-",
            "MultHdrRecCap- MultHdrRecEn- TLPPfxPres- HdrLogCap-",
            f"HeaderLog: {0x4A00_0000 + n:08x} 00000002 00000003 00000000"])  # fmt: skip
    found = lspci(*spaces)
    assert [[line.replace(":\t", ": ") for line in follow(lines, "Capabilities: [100 v2] Advanced Error Reporting", 8)]
            for lines in found] == wanted  # fmt: skip


def test_lspci_extended(lspci):
    """LSPCI-EXT-1: the other extended capabilities, each with two sets of offers and settings (R52, R54)."""
    acs = "SrcValid,TransBlk,ReqRedir,CmpltRedir,UpstreamFwd,EgressCtrl,DirectTrans"
    bars = {0: BarDescription(16384, prefetch=True), 2: BarDescription(4096)}
    one = space_of(pcie_capability(), ext=[
        ats_capability(queue_depth=5), pri_capability(64), pasid_capability(20, execute=True), acs_capability(), ari_capability(3),
        serial_number_capability(0x0123_4567_89AB_CDEF), vsec_capability(0x1234, 5, bytes(8)),
        dvsec_capability(0x1AF4, 0x77, 2, b"\x11\x22"),
        sriov_capability(7, first_offset=4, stride=2, device=0x1001, bars=bars, has_ari=True, dependency=1)])  # fmt: skip
    two = space_of(pcie_capability(), ext=[
        ats_capability(), pri_capability(1, pasid_required=True), pasid_capability(8, privileged=True), acs_capability(0x6C, egress_bits=8),
        ari_capability(), serial_number_capability(1), vsec_capability(1, 0, b""), dvsec_capability(1, 2, 3, bytes(6)),
        sriov_capability(1, first_offset=1, stride=1, device=2)])  # fmt: skip
    two.write(two.ext_offsets[2] + 6, 2, 7)
    two.write(two.ext_offsets[0] + 6, 2, 0x8003)
    two.write(two.ext_offsets[1] + 12, 4, 0x21)
    two.write(two.ext_offsets[1] + 4, 2, 1)
    two.set_bits(two.ext_offsets[1] + 6, 2, 1)
    two.write(two.ext_offsets[3] + 6, 2, 0x44)
    sriov = one.ext_offsets[8]
    for at, value in ((0x20, 2), (0x24, 0x8000_0000), (0x2C, 0x9000_0000), (0x10, 3), (8, 0x19)):
        one.write(sriov + at, 4, value)
    for lines, name, expected in zip(
        [line for line in lspci(one, two) for _ in range(9)],
        ["Address Translation Service (ATS)", "Page Request Interface (PRI)", "Process Address Space ID (PASID)", "Access Control Services",
         "Alternative Routing-ID Interpretation (ARI)", "Device Serial Number", "Vendor Specific Information", "Designated Vendor-Specific",
         "Single Root I/O Virtualization (SR-IOV)"] * 2,
        [
            ["ATSCap: Invalidate Queue Depth: 05", "ATSCtl: Enable-, Smallest Translation Unit: 00"],
            ["PRICtl: Enable- Reset-", "PRISta: RF- UPRGI- Stopped+", "Page Request Capacity: 00000040, Page Request Allocation: 00000000"],
            ["PASIDCap: Exec+ Priv-, Max PASID Width: 14", "PASIDCtl: Enable- Exec- Priv-"],
            [f"ACSCap: {flags(acs, 0)}", f"ACSCtl: {flags(acs, 0)}"],
            ["ARICap: MFVC- ACS-, Next Function: 3", "ARICtl: MFVC- ACS-, Function Group: 0"],
            "01-23-45-67-89-ab-cd-ef", ": ID=1234 Rev=5 Len=010 <?>", ": Vendor=1af4 ID=0077 Rev=2 Len=12 <?>",
            ["IOVCap: Migration- 10BitTagReq- Interrupt Message Number: 000",
             "IOVCtl: Enable+ Migration- Interrupt- MSE+ ARIHierarchy+ 10BitTagReq-", "IOVSta: Migration-",
             "Initial VFs: 7, Total VFs: 7, Number of VFs: 3, Function Dependency Link: 01", "VF offset: 4, stride: 2, Device ID: 1001",
             "Supported Page Size: 00000553, System Page Size: 00000002", "Region 0: Memory at 0000000080000000 (64-bit, prefetchable)",
             "Region 2: Memory at 0000000090000000 (64-bit, non-prefetchable)"],
            ["ATSCap: Invalidate Queue Depth: 00", "ATSCtl: Enable+, Smallest Translation Unit: 03"],
            ["PRICtl: Enable+ Reset-", "PRISta: RF+ UPRGI- Stopped-", "Page Request Capacity: 00000001, Page Request Allocation: 00000021"],
            ["PASIDCap: Exec- Priv+, Max PASID Width: 08", "PASIDCtl: Enable+ Exec- Priv+"],
            [f"ACSCap: {flags(acs, 0x6C)}", f"ACSCtl: {flags(acs, 0x44)}"],
            ["ARICap: MFVC- ACS-, Next Function: 0", "ARICtl: MFVC- ACS-, Function Group: 0"],
            "00-00-00-00-00-00-00-01", ": ID=0001 Rev=0 Len=008 <?>", ": Vendor=0001 ID=0002 Rev=3 Len=16 <?>",
            ["IOVCap: Migration- 10BitTagReq- Interrupt Message Number: 000",
             "IOVCtl: Enable- Migration- Interrupt- MSE- ARIHierarchy- 10BitTagReq-", "IOVSta: Migration-",
             "Initial VFs: 1, Total VFs: 1, Number of VFs: 0, Function Dependency Link: 00", "VF offset: 1, stride: 1, Device ID: 0002"],
        ],
    ):  # fmt: skip
        [head] = [line for line in lines if line.startswith("Capabilities: [") and f" v1] {name}" in line]
        if isinstance(expected, str):
            assert head.partition(name)[2].strip() == expected
        else:
            assert [line.replace(":\t", ": ") for line in follow(lines, head, len(expected))] == expected


class Table:
    """Reset values of a function of a card, as the RTL's own table has them."""

    def __init__(self, function, number, count):
        self.words = function.map(number, count).words()

    def read(self, at, size):
        return self.words[at // 4].reset


def test_lspci_virtual_functions(lspci):
    """LSPCI-VF-1 (R54): a card's disk says where its virtual functions are; one of those is all ones in front and a disk behind."""
    config = EndpointConfig(disks=(BlkConfig(virtual_functions=2, vectors=3),))
    physical, virtual = lspci(*(Table(descriptions_of(config)[n], n, config.physical_functions) for n in (1, 2)))
    head = next(line for line in physical if "Single Root I/O Virtualization" in line)
    assert [line.replace(":\t", ": ") for line in follow(physical, head, 8)] == [
        "IOVCap: Migration- 10BitTagReq- Interrupt Message Number: 000",
        "IOVCtl: Enable- Migration- Interrupt- MSE- ARIHierarchy- 10BitTagReq-", "IOVSta: Migration-",
        "Initial VFs: 2, Total VFs: 2, Number of VFs: 0, Function Dependency Link: 01",
        "VF offset: 1, stride: 1, Device ID: 1042", "Supported Page Size: 00000553, System Page Size: 00000001",
        "Region 0: Memory at 0000000000000000 (64-bit, non-prefetchable)",
        "Region 2: Memory at 0000000000000000 (64-bit, non-prefetchable)"]
    assert virtual[0].startswith("00:01.0 0180: ffff:ffff")
    names = [[line.split("] ", 1)[1].partition(":")[0] for line in lines if line.startswith("Capabilities")]
             for lines in (physical, virtual)]  # fmt: skip
    assert names[1] == [name for name in names[0] if not name.startswith(("Power Management", "Single Root", "Device Serial Number"))]
    assert any("FLReset+" in line for line in virtual) and any("Count=3 Masked-" in line for line in virtual)
    assert not any(line.startswith(("Interrupt", "Region")) for line in virtual)
    assert any("RlxdOrd- ExtTag- PhantFunc- AuxPwr- NoSnoop-" in line for line in virtual), virtual


def test_lspci_virtio(lspci):
    """LSPCI-VIRTIO-1: virtio's structures in vendor capabilities."""
    space = space_of(virtio_capability(1, bar=0, at=0, length=0x40),
                     virtio_capability(2, bar=2, at=0x3000, length=4, notify_off_multiplier=8),
                     virtio_capability(3, bar=0, at=0x40, length=4), virtio_capability(4, bar=0, at=0x1000, length=0x100))  # fmt: skip
    [lines] = lspci(space)
    assert [line for line in lines if "VirtIO" in line or "offset=" in line] == [
        "Capabilities: [40] Vendor Specific Information: VirtIO: CommonCfg", "BAR=0 offset=00000000 size=00000040",
        "Capabilities: [50] Vendor Specific Information: VirtIO: Notify", "BAR=2 offset=00003000 size=00000004 multiplier=00000008",
        "Capabilities: [64] Vendor Specific Information: VirtIO: ISR", "BAR=0 offset=00000040 size=00000004",
        "Capabilities: [74] Vendor Specific Information: VirtIO: DeviceCfg", "BAR=0 offset=00001000 size=00000100"]  # fmt: skip


def test_lspci_views(lspci):
    """LSPCI-VIEW-1: a virtual function behind the pass-through view, and what that view hides (R54, R67)."""
    pcie = pcie_capability(flr=True, link_capabilities=0x83, link_status=0x1083)
    physical = FunctionDescription(0x1AF4, 0x1042, 0x018000, capabilities=(pcie,), interrupt_pin=1)
    virtual = virtual_function(physical, capabilities=(pcie, msix_capability(3, table_bar=0, table_offset=0, pba_bar=0, pba_offset=2048)),
                               ext_capabilities=(ats_capability(), ari_capability()))  # fmt: skip
    space = ConfigSpace(FunctionDescription(0x1AF4, 0x1042, 0x018000, capabilities=(pcie,), virtual=virtual, ext_capabilities=(
        sriov_capability(1, first_offset=1, stride=1, device=0x1042),)))  # fmt: skip
    space.write(0x110, 2, 1)
    space.write(0x108, 2, 1)
    [one] = space.virtual_functions
    shy = space_of(power_capability(pme=0x1F), CapabilityDescription(0x04, bytes(2)), pcie_capability(),
                   ext=[aer_capability(), pasid_capability(8), ari_capability()])  # fmt: skip
    seen, view, bare = lspci(PassThrough(one, ids=(0x1AF4, 0x1042)), PassThrough(shy), shy)
    assert seen[0] == "00:00.0 0180: 1af4:1042"
    assert not any(line.startswith(("Interrupt", "Region")) for line in seen)
    assert follow(seen, "Control:", 1)[0].startswith("Status: Cap+")
    assert "MaxPayload 128 bytes, MaxReadReq 128 bytes" in seen and "Vector table: BAR=0 offset=00000000" in seen
    assert [line.split("] ")[1].split(" (")[0] for line in seen if line.startswith("Capabilities")] == [
        "Express", "MSI-X: Enable- Count=3 Masked-", "Address Translation Service", "Alternative Routing-ID Interpretation"]  # fmt: skip
    heads = [[line for line in lines if line.startswith("Capabilities")] for lines in (bare, view)]
    assert [len(found) for found in heads] == [6, 4]
    assert [line for line in heads[0] if "PASID" not in line and "Slot ID" not in line] == heads[1]
    assert "PME(D0+,D1+,D2+,D3hot+,D3cold+)" in " ".join(bare) and "PME(D0-,D1-,D2-,D3hot-,D3cold-)" in " ".join(view)


@pytest.mark.parametrize("place, bits, value, wanted", [
    (0x40, 0xFF00, 0x4000, "[40] <chain looped>"), (0x48, 0xFF00, 0x4000, "[40] <chain looped>"),
    (0x100, 0xFFF0_0000, 0x1000_0000, "[100 v2] <chain looped>"), (0x148, 0xFFF0_0000, 0x1000_0000, "[100 v2] <chain looped>"),
    (0x148, 0xFFF0_0000, 0x1480_0000, "[148 v1] <chain looped>"),
])  # fmt: skip
def test_lspci_loops(lspci, place, bits, value, wanted):
    """LSPCI-LOOP-1: lspci says of a list that loops that it does, and the pass-through view of it ends too (R66)."""
    space = space_of(power_capability(), pcie_capability(), ext=[aer_capability(), ats_capability()])
    [straight] = lspci(space)
    space.replace_bits(place, bits, value)
    [lines] = lspci(space)
    assert not any("looped" in line for line in straight)
    assert [line.removeprefix("Capabilities: ") for line in lines if "looped" in line] == [wanted]
    assert PassThrough(space).conflicts


class Dump:
    """4096 bytes of a function of a card, as CfgRd gives them."""

    def __init__(self, card, function):
        self._dwords = [card.config_read(function, at, 4) for at in range(0, 4096, 4)]

    def read(self, offset, size):
        return int.from_bytes(self._dwords[offset // 4].to_bytes(4, "little")[offset % 4 :][:size], "little")


def test_lspci_card(lspci):
    """LSPCI-CARD-1: each function of the real card, read with CfgRd, is to lspci what the model is: fresh, set up, with errors."""
    config = bench_config(64)
    spaces, sent = [ConfigSpace(description) for description in describe_functions(config)], []

    def both(operation):
        """Perform an operation on the card, and a write on the model, too."""
        if isinstance(operation, ConfigWrite) and operation.function < len(spaces):
            spaces[operation.function].write(operation.offset, operation.size, operation.value)
        return card.perform(operation)

    def compare():
        dumps = [Dump(card, n) for n in range(len(spaces))]
        for got, model in zip(lspci(*dumps), lspci(*spaces)):
            assert got == model
        return lspci(*dumps)

    def fails():
        """Ask for a function that is not there, which all report."""
        sent.clear()
        assert both(ConfigRead(6, 0, 4)) == 0xFFFF_FFFF
        card.step(1000)
        report_to_all(spaces, Cause.UNSUPPORTED_NON_POSTED, sent[0][:3])

    with CompiledCard(config) as card:
        first = compare()
        card.observe = lambda event, tlp: sent.append(event.dwords) if isinstance(event, TlpSent) else None
        software, result = enumerate_functions(card.host), None
        try:
            while True:
                result = both(software.send(result))
        except StopIteration:
            pass
        fails()
        compare()
        for n, space in enumerate(spaces):
            aer, (pcie, msix, power) = space.ext_offsets[0], space.offsets[:3]
            for offset, size, value in (
                (aer + 8, 4, 0x1000 << n), (aer + 0xC, 4, 0x0010_0000 >> n), (aer + 0x14, 4, 0x40 << n), (4, 2, 0x0542),
                (pcie + 8, 2, 0x580F), (pcie + 0x10, 2, 0x48), (msix + 2, 2, 0xC000), (power + 4, 2, 0), (0x3C, 1, 11 + n),
            ):  # fmt: skip
                both(ConfigWrite(n, offset, size, value))
        fails()
        last = compare()
    names = ["Express (v2) Endpoint", "MSI-X:", "Power Management version 3", "Advanced Error Reporting", "Device Serial Number 02-00-00",
             "Access Control Services", "Alternative Routing-ID Interpretation"]  # fmt: skip
    for lines in first:
        assert all(any(name in line for line in lines if line.startswith("Capabilities")) for name in names)
    assert all(one != other for one, other in zip(first, last))
    assert all(any("UnsupReq+" in line for line in lines if line.startswith("UESta:")) for lines in last)
