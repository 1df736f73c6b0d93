"""The IOMMU of the golden host: translation requests, uses, invalidations, and that it sees what is wrong. [PCIe5 10]"""

import random
from dataclasses import replace

import pytest

from ringwall.models.host import ConfigWrite, Host
from ringwall.models.host_iommu import HostIommu, translation_entry
from ringwall.models.iommu.ats import AtsStatus, TranslationCompletion
from ringwall.models.iommu.commands import AtsInval
from ringwall.models.iommu.entries import SIZE_2M, SV39, DeviceContext, ProcessContext
from ringwall.models.iommu.registers import Capabilities
from ringwall.models.iommu.tables import Allocator, DeviceDirectory, PageTable, ProcessDirectory
from ringwall.models.iommu.unit import Unit
from ringwall.models.memory import GuestMemory
from ringwall.models.tlp import CplStatus, Pasid, Tlp, TlpType, decode, encode, memory_read, memory_write, stray_bits

POOL, RID = 0x8000_0000, 0x0100
IOVA, SPA, LARGE = 0x1000_0000, 0x1_2345_6000, 0x4000_0000


class Bench:
    """A host whose IOMMU maps a page and 2 MiB for function 0; the card is the test."""

    def __init__(self):
        self.memory = GuestMemory()
        self.allocator = allocator = Allocator(self.memory, POOL, 0x10_0000)
        self.iommu = HostIommu(Unit(self.memory, Capabilities(ATS=True, PD8=True)))
        self.host = Host(self.memory, rng=random.Random(1), iommu=self.iommu)
        self.host.assume_enabled(0, ats=True)
        self.table = PageTable(self.memory, allocator)
        self.table.map_page(IOVA, SPA)
        self.table.map_page(LARGE, 0x2_0000_0000, perms="ru", size=SIZE_2M)
        self.directory = directory = DeviceDirectory(self.memory, allocator, levels=1)
        directory.set(0, DeviceContext.sv39(self.table.root, PSCID=1, EN_ATS=True))
        self.iommu.unit.registers.write(0x10, 8, directory.ddtp)
        self.tag = 0

    def ask(self, address, **fields):
        """Return the answer to a request, by way of its dwords; the card has it then."""
        self.tag += 1
        tlp = replace(memory_read(address, 8, requester_id=RID, tag=self.tag, at=1), **fields)
        assert not stray_bits(encode(tlp))
        (reply,) = self.host.receive(encode(tlp))
        self.host.sent(reply)
        return reply.tlp

    def read(self, address, *, is_kept=False, **fields):
        self.tag += 1
        (reply,) = self.host.receive(memory_read(address, 4, requester_id=RID, tag=self.tag, **fields))
        if not is_kept:
            self.host.sent(reply)
        return reply.tlp

    def write(self, address, data=b"1234", **fields):
        self.host.receive(memory_write(address, data, requester_id=RID, **fields))

    def invalidate(self, address, **fields):
        """Return the Invalidate Request that a command sends."""
        self.iommu.unit.commands._execute(AtsInval(RID, address, **fields))
        (tlp,) = self.iommu.messages(Host.ROUTING_ID)
        return tlp

    def complete(self, tlp, **fields):
        self.host.receive(Tlp(**{"type": TlpType.MSG, "requester_id": RID, "message_code": 2, "message_routing": 2,
                                 "address": 1 << 32 | 1 << tlp.tag} | fields))  # fmt: skip

    def processes(self, frames):
        """Give function 0 tables for processes: PASID -> the frame of IOVA; 0 is also that of requests without one."""
        processes = ProcessDirectory(self.memory, self.allocator, levels=1)
        for pid, spa in frames.items():
            table = PageTable(self.memory, self.allocator)
            table.map_page(IOVA, spa)
            processes.set(pid, ProcessContext.first_stage(SV39, table.root, PSCID=pid))
        self.directory.set(0, DeviceContext.process_directory(processes.pdtp, EN_ATS=True, DPE=True))
        self.host.assume_enabled(0, ats=True, pasid_bits=4)

    def rule(self):
        """Return the one rule that was broken."""
        (found,) = self.host.violations
        self.host.violations.clear()
        return found


def test_entries():
    """MODEL-HIOMMU-1: an entry is drawn from its highest byte on: address, S with the size below it, N, Global, Priv, Exe, U, W, R."""
    def entry(**fields):
        return translation_entry(TranslationCompletion(AtsStatus.SUCCESS, **fields)).hex()

    assert entry(address=0x1234_5678_9ABC_D000, readable=True) == "123456789abcd001"
    assert entry(address=0x1_0020_0000, size=SIZE_2M, writable=True) == "00000001002ff802"
    assert entry(size=8192, no_snoop=True, is_global=True) == "0000000000000c20"
    assert entry(privileged=True, executable=True, untranslated_only=True) == "000000000000001c"


def test_requests():
    """MODEL-HIOMMU-2: a translation request gets one entry, UR or CA; a page without permission an empty one; NW is bit 0."""
    b = Bench()
    answer = b.ask(IOVA)
    assert (answer.type, answer.status, answer.byte_count, answer.data.hex()) == (TlpType.CPLD, CplStatus.SC, 8, "0000000123456003")
    assert b.ask(LARGE + 0x3000, no_write=True).data.hex() == "00000002000ff801"
    assert b.ask(IOVA + 0x1000).data == bytes(8)
    tlp = decode(encode(replace(memory_read(0x5_0000_1000, 8, requester_id=RID, tag=1, at=1), no_write=True)))
    assert (tlp.address, tlp.no_write, tlp.at) == (0x5_0000_1000, True, 1)
    b.iommu.unit.registers.write(0x10, 8, 0)  # Off
    assert b.ask(IOVA).status == CplStatus.UR
    assert not b.host.violations


@pytest.mark.parametrize(("fields", "rule"), [
    ({"length_dw": 3}, "length is 3"), ({"first_be": 3}, "byte enables"), ({"address": IOVA + 8}, "not aligned"),
])  # fmt: skip
def test_bad_requests(fields, rule):
    """MODEL-HIOMMU-3: translation requests of an odd length, with bytes left out, of part of a page are found."""
    b = Bench()
    b.tag += 1
    b.host.receive(replace(memory_read(IOVA, 8, requester_id=RID, tag=b.tag, at=1), **fields))
    assert rule in b.rule()


def test_uses():
    """MODEL-HIOMMU-4: untranslated requests are translated or refused; translated ones need a translation that was given to their
    function, for their direction, and ATS Enable."""
    b = Bench()
    b.memory.write(SPA, b"abcd")
    assert b.read(IOVA).data == b"abcd"
    assert b.read(IOVA + 0x1000).status == CplStatus.UR
    b.write(LARGE)
    assert b.memory.read(0x2_0000_0000, 4) == bytes(4)
    assert not b.host.violations
    b.read(SPA, at=2)
    assert "does not have" in b.rule()
    b.ask(IOVA)
    b.ask(LARGE)
    assert b.read(SPA, at=2).data == b"abcd"
    b.write(SPA, b"efgh", at=2)
    assert b.memory.read(SPA, 4) == b"efgh"
    b.read(0x2_0000_0000 + 0x1F_F000, at=2)
    assert not b.host.violations
    b.write(0x2_0000_0000, at=2)
    assert "does not have" in b.rule()
    b.host.assume_enabled(0)
    b.read(SPA, at=2)
    assert "address type" in b.rule()


def test_invalidations():
    """MODEL-HIOMMU-5: what was given before an Invalidate Request is gone with its completion, what was given since stays; a use behind it,
    a read without an answer, a completion that nobody waits for or that is malformed are found."""
    b = Bench()
    b.ask(IOVA)
    tlp = b.invalidate(IOVA)
    assert (tlp.type, tlp.message_code, tlp.message_routing, tlp.address, tlp.data) == (
        TlpType.MSGD, 1, 2, RID << 48, IOVA.to_bytes(8, "big"))  # fmt: skip
    b.read(SPA, at=2)  # not complete yet
    b.complete(tlp)
    assert not b.host.violations
    b.read(SPA, at=2)
    assert "does not have" in b.rule()
    b.ask(IOVA)
    tlp = b.invalidate((1 << 63) - 0x1000, is_range=True)
    b.ask(IOVA)
    b.complete(tlp)
    b.read(SPA, at=2)
    assert not b.host.violations
    tlp = b.invalidate(IOVA)
    b.read(SPA, at=2, is_kept=True)
    b.complete(tlp)
    assert "has no answer yet" in b.rule()
    b.complete(tlp)
    assert "not under way" in b.rule()
    for fields, rule in (({"type": TlpType.MSGD, "length_dw": 1, "data": bytes(4)}, "routing"), ({"message_routing": 0}, "routing"),
                         ({"tag": 1}, "routing"), ({"address": 1 << 48 | 1 << 32 | 1}, "it is for 0x0001")):  # fmt: skip
        b.complete(b.invalidate(IOVA), **fields)
        assert rule in b.rule()
    b.iommu.forget(RID)
    b.read(SPA, at=2)
    assert "does not have" in b.rule()


def test_processes():
    """MODEL-HIOMMU-6: each PASID, and none, has translations of its own; an Invalidate Request, which carries its PASID, ends those of that
    process, a global one all; a use behind it is found, a use of what another process was given is none of the host's business."""
    b, frames = Bench(), {0: SPA, 3: SPA + 0x1000, 9: SPA + 0x2000}
    b.processes(frames)
    for pid, spa in frames.items():
        pasid = Pasid(pid) if pid else None
        assert int.from_bytes(b.ask(IOVA, pasid=pasid).data, "big") == spa | 3
        b.memory.write(spa, bytes([pid] * 4))
        assert b.read(IOVA, pasid=pasid).data == b.read(spa, at=2).data == bytes([pid] * 4)
    assert not b.host.violations
    for orders, gone in (({"pid": 3}, {3}), ({}, {0}), ({"pid": 3, "is_global": True}, {9})):
        tlp = b.invalidate(IOVA, **orders)
        assert tlp.pasid == (Pasid(3) if "pid" in orders else None)
        b.complete(tlp)
        for pid in gone:
            b.read(frames.pop(pid), at=2)
            assert "does not have" in b.rule()
        for spa in frames.values():
            b.read(spa, at=2)
        assert not b.host.violations


@pytest.mark.parametrize(("at", "fields", "rule"), [
    (0, {"pasid": Pasid(16)}, "wider than"), (0, {"pasid": Pasid(1, execute=True)}, "without being supported"),
    (1, {"pasid": Pasid(1, privileged=True)}, "without being supported"), (2, {"pasid": Pasid(3)}, "where there may be none"),
])  # fmt: skip
def test_bad_pasids(at, fields, rule):
    """MODEL-HIOMMU-7: a PASID that is too wide, asks for modes that are not there, or is on a translated request, an interrupt or a message
    that is no Page Request, is found; on a Page Request it may be."""
    b = Bench()
    b.processes({3: SPA})
    b.ask(IOVA, pasid=Pasid(3))
    (reply,) = b.host.receive(replace(memory_read(SPA if at == 2 else IOVA, 8, requester_id=RID, tag=99, at=at), **fields))
    b.host.sent(reply)
    assert rule in b.rule()
    b.write(b.host.msi_window[0], pasid=Pasid(3))
    assert "where there may be none" in b.rule()
    tlp = b.invalidate(IOVA, pid=3)
    b.complete(tlp, pasid=Pasid(3))
    assert "where there may be none" in b.rule()
    b.iommu.allocation = 1
    b.host.receive(Tlp(TlpType.MSG, requester_id=RID, message_code=4, pasid=Pasid(3), address=IOVA | 5))
    assert not b.host.violations
    b.host.assume_enabled(0, ats=True)
    b.write(IOVA, pasid=Pasid(3))
    assert "is not enabled" in b.rule()


@pytest.mark.parametrize("how", ["ATS", "FLR", "VF Enable"])
def test_resets(how):
    """MODEL-HIOMMU-8: a function that ends, or is reset, has no translations any more, nor have virtual functions that end with it."""
    b, express, sriov, ats = Bench(), 0x40, 0x100, 0x140
    b.host.attach(1, 0)
    b.host.assume_enabled(1, ats=True)
    b.directory.set(1, DeviceContext.sv39(b.table.root, PSCID=2, EN_ATS=True))
    function = b.host.function(0)
    function.pcie, function.sriov, function.ats = express, sriov, ats
    for rid in (RID, RID | 1):
        b.ask(IOVA, requester_id=rid)
    offset, value = {"ATS": (ats + 6, 0), "FLR": (express + 8, 1 << 15), "VF Enable": (sriov + 8, 0)}[how]
    (tlp,) = b.host.start(ConfigWrite(0, offset, 2, value)).tlps
    b.host.receive(Tlp(TlpType.CPL, requester_id=tlp.requester_id, tag=tlp.tag, completer_id=RID, byte_count=4))
    assert {grant.requester_id for grant in b.iommu._grants} == {"ATS": {RID | 1}, "FLR": set(), "VF Enable": {RID}}[how]
    assert not b.host.violations
