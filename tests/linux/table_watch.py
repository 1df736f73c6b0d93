"""Judges a card whose function 0 is a RISC-V IOMMU: from its TLPs alone, no function goes by a translation that was invalidated."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.iommu.commands import COMMAND_BYTES, IodirInvalDdt, IotinvalVma
from ringwall.models.iommu.commands import decode as decode_command
from ringwall.models.iommu.entries import DC_BYTES, DeviceContext
from ringwall.models.iommu.faults import RECORD_BYTES, FaultRecord
from ringwall.models.iommu.registers import Capabilities
from ringwall.models.tlp import TlpType, decode

__all__ = ["TableWatch"]

_PAGE, _ENTRY_BYTES = 4096, 8
_CQB, _CQH = 0x18, 0x20  # [RVIOMMU1.0 6.6, 6.7]
_PPN = (1 << 44) - 1
_LEVELS = {8: 3, 9: 4, 10: 5}  # of iosatp.MODE [RVPRIV Sv39]
_V, _R, _W, _X = 1, 2, 4, 8
_SLOTS = DC_BYTES * 128  # contexts of the lowest level of the directory


@dataclass
class _Known:
    """What was read from memory, and when the card asked for it: a context's PSCID (None: it passes addresses), or a leaf."""

    asked: int
    PSCID: int | None
    iova: int = 0
    pages: range = range(0)
    rights: int = 0


class TableWatch:
    """Observes a compiled card; raises :exc:`AssertionError` at the first access to a page that no translation in force leads to.

    A translation is in force from where the card read it in memory until the invalidation of it, or of its context, is over, which software
    knows when it reads a queue's head behind it; what the card had asked for in front of that command ends with it. A function is judged
    from the first read of its context on. Contexts are of base format, of endpoints below 128, with first stages alone; no leaf is of
    64 KiB.

    Attributes
    ----------
    counts : :class:`collections.Counter`
        Commands by name, ``contexts``, ``leaves`` and among them ``large`` ones read, ``accesses`` that were judged.
    faults : :class:`collections.Counter`
        (device_id, cause, page) of the records that the card wrote.
    """

    def __init__(self, card):
        self.counts, self.faults = Counter(), Counter()
        self._now, self._registers, self._bar = 0, {}, {}
        self._reads, self._looks = {}, {}  # tag -> (what, address, bytes left, data so far), of function 0; tag -> offset, of the host
        self._contexts = defaultdict(list)  # function -> of _Known
        self._leaves = []  # of _Known
        self._tables = {}  # page -> PSCID, level, first IOVA
        self._commands = []  # that may not be over: (address, time when the card had it, command)
        self._observe, card.observe = card.observe, self.observe

    def observe(self, event, tlp):
        self._now += 1
        if isinstance(event, TlpReceived):
            if tlp.type.is_completion:
                self._looked(tlp)
            elif tlp.requester_id & 7:
                self._accessed(tlp)
            elif tlp.type is TlpType.MRD:
                self._reads[tlp.tag] = [self._now, tlp.address, 4 * tlp.length_dw, b""]
            elif tlp.type is TlpType.MWR and 4 * tlp.length_dw == RECORD_BYTES:
                record = FaultRecord.unpack(tlp.data)
                self.faults[record.device_id, record.cause, record.iotval // _PAGE * _PAGE] += 1
        elif isinstance(event, TlpSent):
            self._sent(decode(event.dwords))
        if self._observe is not None:
            self._observe(event, tlp)

    # -- what the host does --

    def _sent(self, tlp):
        if tlp.type is TlpType.CPLD and not tlp.requester_id & 7 and tlp.tag in self._reads:
            read = self._reads[tlp.tag]
            read[3] += tlp.data
            if len(read[3]) == read[2]:
                self._learned(*self._reads.pop(tlp.tag))
        elif tlp.type is TlpType.CFGWR0 and not tlp.completer_id & 7 and tlp.register in (0x10, 0x14):
            self._bar[tlp.register] = int.from_bytes(tlp.data, "little")
        elif tlp.type in (TlpType.MRD, TlpType.MWR):
            offset = tlp.address - (self._bar.get(0x14, 0) << 32 | self._bar.get(0x10, 0) & ~0xF)
            if tlp.type is TlpType.MWR:
                for at in range(0, len(tlp.data), 4):
                    self._registers[offset + at] = int.from_bytes(tlp.data[at : at + 4], "little")
            elif offset == _CQH:
                self._looks[tlp.tag] = self._now

    def _looked(self, tlp):
        """The head of the command queue was read: what is in front of it is over."""
        if self._looks.pop(tlp.tag, None) is None or tlp.type is not TlpType.CPLD:
            return
        base = ((self._registers.get(_CQB + 4, 0) << 32 | self._registers.get(_CQB, 0)) >> 10 & _PPN) * _PAGE
        head = base + COMMAND_BYTES * int.from_bytes(tlp.data, "little")
        while self._commands and self._commands[0][0] != head:
            _, time, command = self._commands.pop(0)
            if isinstance(command, IotinvalVma):
                self._leaves = [one for one in self._leaves if one.asked > time or not _is_meant(command, one)]
            elif isinstance(command, IodirInvalDdt):
                for function in list(self._contexts) if command.device_id is None else [command.device_id]:
                    self._contexts[function] = [one for one in self._contexts[function] if one.asked > time]

    # -- what the card reads --

    def _learned(self, asked, address, size, data):
        if size == COMMAND_BYTES:
            command = decode_command(data, Capabilities())
            self.counts[type(command).__name__] += 1
            self._commands.append((address, self._now, command))
        elif size == DC_BYTES:
            self._context(asked, address % _SLOTS // DC_BYTES, DeviceContext.unpack(data))
        elif size == _ENTRY_BYTES and address // _PAGE in self._tables:
            self._entry(asked, address, int.from_bytes(data, "little"))

    def _context(self, asked, function, context):
        self.counts["contexts"] += 1
        levels = _LEVELS.get(context.fsc_mode, 0)
        self._contexts[function].append(_Known(asked, context.PSCID if levels else None))
        if levels:
            self._tables[context.fsc_ppn] = context.PSCID, levels - 1, 0

    def _entry(self, asked, address, entry):
        PSCID, level, iova = self._tables[address // _PAGE]
        iova |= address % _PAGE // _ENTRY_BYTES << 12 + 9 * level
        page, rights = entry >> 10 & _PPN, entry & (_R | _W | _X)
        if not entry & _V:
            return
        if rights:
            assert not entry >> 63, f"Leaf {entry:#x} is of 64 KiB, which is not judged"
            self.counts["leaves"] += 1
            self.counts["large"] += level > 0
            self._leaves.append(_Known(asked, PSCID, iova, range(page, page + (1 << 9 * level)), rights))
        else:
            self._tables[page] = PSCID, level - 1, iova

    # -- what a function does --

    def _accessed(self, tlp):
        function, size = tlp.requester_id & 7, 4 * tlp.length_dw
        if tlp.type not in (TlpType.MRD, TlpType.MWR) or function not in self._contexts:
            return
        self.counts["accesses"] += 1
        spaces = {one.PSCID for one in self._contexts[function]}
        if None in spaces:
            return
        right = _R if tlp.type is TlpType.MRD else _W
        for page in range(tlp.address // _PAGE, (tlp.address + size - 1) // _PAGE + 1):
            assert any(one.PSCID in spaces and page in one.pages and one.rights & right for one in self._leaves), (
                f"{tlp} goes by no translation of function {function} that is in force [RVIOMMU1.0 4.1.1]")  # fmt: skip


def _is_meant(command, leaf):
    if command.pscid is not None and command.pscid != leaf.PSCID:
        return False
    return command.address is None or 0 <= command.address - leaf.iova < len(leaf.pages) * _PAGE
