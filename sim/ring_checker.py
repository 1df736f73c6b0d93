"""Judges one virtqueue of virtio-blk: the ring by the rules of the specification, the data by the golden device."""

from collections.abc import MutableSet

from ..models.events import HostStore, Operation
from ..models.host import MemoryRead, MemoryWrite
from ..models.iommu.faults import AccessType
from ..models.memory import Access, AccessFault, Iova, Spa
from ..models.tlp import TlpType
from ..models.virtio.blk import HEADER_BYTES, SECTOR, BlkDevice, BlkStatus, BlkType
from ..models.virtio.driver import FIELDS, OPTIONAL_FIELDS, DeviceStatus
from ..models.virtio.judge import RULES, Notification, QueueEnabled, QueueReset, StatusWritten, Suspended
from ..models.virtio.virtqueue import make_judge, make_layout
from .scoreboard import Checker, MessageChecker, Mismatch

__all__ = ["DoubtfulBlkDevice", "RingChecker"]

PAGE = 4096
MAX_BYTES = 1 << 32  # of a chain [VIRTIO1.4 2.7.5.2]


class _Doubts(MutableSet):
    """The doubtful requests of a device; tells ``record`` of each change."""

    def __init__(self, record):
        self._all, self._record = set(), record

    def __contains__(self, one):
        return one in self._all

    def __iter__(self):
        return iter(self._all)

    def __len__(self):
        return len(self._all)

    def add(self, one):
        self._record("doubt", [int(part) for part in one])
        self._all.add(one)

    def discard(self, one):
        self._record("trust", [int(part) for part in one])
        self._all.discard(one)

    def clear(self):
        for one in list(self._all):
            self.discard(one)


class _Doubtful:
    """What a doubtful request may end in: OK as without doubt, or IOERR with no other bytes than the right ones, none, or as before."""

    def __init__(self, real):
        self.real = real

    def problem(self, before, after, used_len):
        """As :meth:`ringwall.models.virtio.blk.BlkResult.problem`."""
        if not after or after[-1] != BlkStatus.IOERR:
            return self.real.problem(before, after, used_len)
        for n in range(len(after) - 1):
            free = any(low <= n < high for one in self.real.outcomes for low, high in one.free)
            right = {before[n], 0, *(one.data[n] for one in self.real.outcomes if n < len(one.data))}
            if not free and after[n] not in right:
                return f"IOERR: byte {n} is {after[n]:#04x}, which is nothing that the device may give"
        return ""


class DoubtfulBlkDevice(BlkDevice):
    """The golden device, told of requests whose bytes may not get through: those may end in IOERR, and their sectors are in doubt.

    Parameters
    ----------
    record : callable
        Is told of every call that software makes, before it is done: ``record(method, arguments)``, as :meth:`repeat` takes them.

    Attributes
    ----------
    doubtful : set of (type, sector)
        Such requests.
    """

    def __init__(self, capacity_sectors, *, record=lambda method, arguments: None, **parameters):
        super().__init__(capacity_sectors, **parameters)
        self._record, self.doubtful = record, _Doubts(record)

    def repeat(self, method, arguments):
        """Do what was recorded."""
        match method:
            case "doubt":
                self.doubtful.add(tuple(arguments))
            case "trust":
                self.doubtful.discard(tuple(arguments))
            case "forget":
                self.forget(*arguments)
            case "carry_out":
                self.carry_out(bytes.fromhex(arguments[0]))
            case _:
                raise ValueError(f"What a golden device was told must be one of its methods, not {method!r}")

    def forget(self, sector, count):
        self._record("forget", [sector, count])
        super().forget(sector, count)

    def forget_request(self, request):
        """The sectors that an OUT should have written are in doubt."""
        if request.kind == BlkType.OUT:
            self.forget(request.sector, -(-(len(request.sent) - HEADER_BYTES) // SECTOR))

    def carry_out(self, sent):
        """A request with these readable bytes was carried out, whatever the judge could see of it."""
        self._record("carry_out", [sent.hex()])
        super().execute(sent, 1)

    def settle(self, request):
        """A doubtful request ended: an OUT that says OK was carried out."""
        if request.status == BlkStatus.OK:
            self.carry_out(request.sent)
        else:
            self.forget_request(request)

    def lost(self, header, length):
        """A request of ``length`` readable bytes, which begin with ``header``, was returned, and it cannot be known what it did."""
        if len(header) < HEADER_BYTES or int.from_bytes(header[:4], "little") == BlkType.OUT:
            sector = int.from_bytes(header[8:16], "little") if len(header) >= HEADER_BYTES else 0
            super().forget(sector, -(-(length - HEADER_BYTES) // SECTOR) if len(header) >= HEADER_BYTES else self.capacity)

    def execute(self, readable, writable_len):
        kind, sector = int.from_bytes(readable[:4], "little"), int.from_bytes(readable[8:16], "little")
        if (kind, sector) not in self.doubtful:
            return super().execute(readable, writable_len)
        if kind != BlkType.OUT:
            return _Doubtful(super().execute(readable, writable_len))
        self.lost(readable[:HEADER_BYTES], len(readable))
        return _Doubtful(super().execute(BlkType.FLUSH.to_bytes(HEADER_BYTES, "little"), writable_len))


class _View:
    """Memory as a device reaches it: pages as one allowed translation leads to them."""

    def __init__(self, memory, allowed, function):
        self.memory, self.allowed, self.function = memory, allowed, function
        self._pages, self._at = {}, -1

    def page(self, iova, access):
        """Return where the page of this address is; None: out of reach."""
        if self._at != self.allowed.now:
            self._pages.clear()
            self._at = self.allowed.now
        place = iova // PAGE, access
        if place not in self._pages:
            outcomes = self.allowed.outcomes(self.function, Iova(iova & -PAGE), access)
            self._pages[place] = min((one.spa for one in outcomes if one.spa is not None), default=None)
        return self._pages[place]

    def pieces(self, iova, length, access):
        """Yield (IOVA, SPA, length), one per page; SPA None: out of reach."""
        while length:
            size = min(length, PAGE - iova % PAGE)
            page = self.page(iova, access)
            yield iova, None if page is None else page + iova % PAGE, size
            iova, length = iova + size, length - size

    def read(self, address, length):
        """Return bytes that the device can read."""
        found = list(self.pieces(address, length, AccessType.READ))
        if any(spa is None for _, spa, _ in found):
            raise AccessFault(address, length, False, "unmapped")
        return b"".join(self.memory.read(Spa(spa), size) for _, spa, size in found)


class _QueueRegisters:
    """What software wrote to the registers of one queue, and when that reset or enabled it. [VIRTIO1.4 4.1.4.3]

    Parameters
    ----------
    status : :class:`int`
        Bus address of device_status.
    queue : :class:`int`
        Its number.
    """

    NAMES = {offset: name for name, (offset, _) in (FIELDS | OPTIONAL_FIELDS).items()}

    def __init__(self, status, queue):
        self.base, self.queue = status - FIELDS["device_status"][0], queue
        self.selected, self.values, self.resets = 0, {}, False

    def read(self, address, value):
        """Return whether this read shows that the reset of the queue is complete."""
        if self._name(address) != "queue_reset" or self.selected != self.queue or not self.resets or value != 0:
            return False
        self.resets = False
        return True

    def wrote(self, address, size, value):
        """Return whether this write enables the queue."""
        name = self._name(address)
        if name == "queue_select":
            self.selected = value
        if self.selected != self.queue or name is None:
            return False
        self.resets = self.resets or (name == "queue_reset" and value == 1)
        low = 8 * (address - self.base - (FIELDS | OPTIONAL_FIELDS)[name][0])
        self.values[name] = self.values.get(name, 0) & ~((1 << 8 * size) - 1 << low) | value << low
        return name == "queue_enable" and value == 1

    def _name(self, address):
        offset = address - self.base
        return self.NAMES.get(offset, self.NAMES.get(offset - 4) if 0x20 <= offset < 0x38 else None)

    def layout(self, features):
        """Return where software put it."""
        return make_layout(features, *(self.values[name] for name in ("queue_size", "queue_desc", "queue_driver", "queue_device")))


class RingChecker(Checker):
    """The golden device executes each chain when the card returns it; every byte that the card wrote for it is compared.

    The ring itself, where the function reads and writes, and its notifications are judged by
    :class:`ringwall.models.virtio.judge.RingJudge`. Whether the function may reach a page is :class:`AccessChecker`'s.

    A chain with bytes that the device cannot reach, or could not any more when it came back, is not executed: its data is not
    compared, and its sectors are unknown to the golden device.

    Parameters
    ----------
    memory, golden : :class:`ringwall.models.memory.GuestMemory`
        What the card sees; what software wrote and the golden device answers.
    allowed : :class:`ringwall.models.iommu.cache.AllowedTranslations`
    function : :class:`int`
        PCI function number, and device_id.
    size : :class:`int`
        Descriptors of the queue.
    desc, avail, used : :class:`int`
        IOVAs of descriptor area, driver area and device area.
    device : object
        ``execute(readable, writable_len)`` returns an object with ``problem(before, after, used_len)``, why writable bytes that
        held ``before`` and hold ``after`` cannot be ("": they can); ``lost(header, length)`` as :class:`DoubtfulBlkDevice`.
    status : :class:`int` or None
        Bus address of device_status: software's accesses to it and the registers around it tell when device and queue run, and where.
        None: they run already.
    vector : :class:`int` or None
        MSI-X vector of the queue.
    messages : :class:`.scoreboard.MessageChecker` or None
        Of the function; without it notifications are not judged.
    index : :class:`int`
        Both indices at the start.
    patience : :class:`int`
        Cycles after which at the end of the run a chain must have come back, and a notification have arrived.
    features : :class:`int`
        What was negotiated, as far as it concerns rings.
    queue : :class:`int`
        Number of the queue.
    granule : :class:`int`
        The card may round its reads out to whole blocks of so many bytes.
    pages_come : :class:`bool`
        The function waits for pages that were out of reach: where they are when the chain comes back counts.

    Attributes
    ----------
    finished : list of (cycle, head, readable bytes, writable bytes)
        Chains that came back and were executed.
    """

    def __init__(self, memory, golden, allowed, *, function, size, desc, avail, used, device, status=None, vector=None, messages=None,
                 index=0, patience=60_000, features=0, queue=0, granule=4, pages_come=False):  # fmt: skip
        self.pages_come = pages_come
        self.memory, self.golden, self.allowed, self.function, self.device = memory, golden, allowed, function, device
        self.status, self.vector, self.messages, self.patience = status, vector, messages, patience
        self.features, self.finished = features, []
        self._registers = None if status is None else _QueueRegisters(status, queue)
        self._view, self._now, self._looked_at, self._resets = _View(golden, allowed, function), 0, -1, False
        self._written = []  # where that is of the ring which software writes and the judge must know of: (SPA, length)
        self._chains = {}  # Available -> ([(IOVA, SPA, length)] of readable and of writable bytes)
        self._found, self._told = [], 0
        self._layout = make_layout(features, size, desc, avail, used)  # at the start, and after each reset of the device
        self.judge = make_judge(
            self._layout, self._view, features, is_ready=status is None, index=index,
            has_vector=vector is not None, granule=granule, on_available=self._is_available, on_returned=self._is_returned)  # fmt: skip

    @classmethod
    def of_session(cls, session, *, function, device, **parameters):
        """Make it from a session; ``device``: ``capacity_sectors``, ``serial`` and ``content`` (from sector 0 on), both hexadecimal.

        The golden device is ``session.devices[function]``.
        """
        def record(method, arguments):
            session.told("device", [function, method, arguments])

        made = DoubtfulBlkDevice(device["capacity_sectors"], serial=bytes.fromhex(device.get("serial", "")), record=record)
        content = bytes.fromhex(device.get("content", ""))
        made.store[: len(content)] = content
        session.devices[function] = made
        messages = [one for one in session.board.checkers if isinstance(one, MessageChecker) and one.function == function]
        return cls(session.memory, session.golden, session.allowed, function=function, device=made,
                   messages=messages[0] if messages else None, **parameters)  # fmt: skip

    def take(self, event, tlp):
        self._now = getattr(event, "cycle", self._now)
        if tlp is not None:
            if tlp.requester_id & 0xFF == self.function and tlp.type in (TlpType.MRD, TlpType.MWR):
                self._look()
                self._requested(tlp)
        elif isinstance(event, HostStore):
            self._look()
            end = event.address + len(event.data)
            if any(start < end and event.address < start + size for start, size in self._written):
                self.judge.stored(self._now)
        elif isinstance(event, Operation):
            self._operated(event.operation, event.result)
        return self._verdict()

    def finish(self):
        if self.vector is not None and (self.messages is None or self.messages.is_masked(self.vector)):
            self.judge.duties.clear()
        self.judge.end(self._now, is_finished=True, patience=self.patience)
        self._lose()
        return self._verdict()

    def _verdict(self):
        """Return what was found since last time: broken rules first."""
        broken, self._told = self.judge.found[self._told :], len(self.judge.found)
        found = [Mismatch(f"{one.rule} of function {self.function} [VIRTIO1.4 {RULES[one.rule][1]}]", one.what, RULES[one.rule][2])
                 for one in broken] + self._found  # fmt: skip
        self._found = []
        return found

    def _look(self):
        """Translations may have changed, and with them what the ring holds."""
        if self._looked_at != self.allowed.now:
            self._looked_at = self.allowed.now
            self._written = [(spa, size) for part in self.judge.driver_parts()
                             for _, spa, size in self._view.pieces(*part, AccessType.READ) if spa is not None]  # fmt: skip
            self.judge.stored(self._now)

    def _operated(self, operation, result):
        """Software's accesses to the registers. [VIRTIO1.4 2.1, 2.4, 2.6.1, 3.4]"""
        if self._registers is not None and isinstance(operation, MemoryWrite):
            if self._registers.wrote(operation.address, operation.size, operation.value) and self.judge.closed == "V014":
                self.judge.take(self._now, QueueEnabled(self._registers.layout(self.features)))
                self._looked_at = -1
        elif self._registers is not None and isinstance(operation, MemoryRead) and self._registers.read(operation.address, result):
            self._lose()
            self.judge.take(self._now, QueueReset())
        if getattr(operation, "address", None) != self.status or self.status is None:
            return
        if isinstance(operation, MemoryWrite):
            self._resets = operation.value == 0
            if not self._resets:
                self._look()
                self.judge.take(self._now, StatusWritten(operation.value))
        elif isinstance(operation, MemoryRead) and result is not None:
            if self._resets and result == 0:
                self._resets = False
                self._lose()
                self.judge.layout, self._looked_at = self._layout, -1
                self.judge.take(self._now, StatusWritten(0))
            elif result & DeviceStatus.NEEDS_RESET:
                self.judge.needs_reset = True
            elif result & (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK) == DeviceStatus.SUSPEND and self.judge.is_ready:
                self.judge.take(self._now, Suspended())

    def _requested(self, tlp):
        """The function reads or writes."""
        is_write = tlp.type is TlpType.MWR
        if is_write and self.messages is not None and self.messages.claims(tlp):
            if self.messages.vector_of(tlp) == self.vector:
                self.judge.take(self._now, Notification())
            return
        start, length = tlp.byte_span()
        iovas = list(self.allowed.iovas(self.function, Spa(start), is_write))
        if not iovas:
            return
        iova = next((one for one in iovas if self.judge.knows(one, length, is_write=is_write)), iovas[0])
        if not is_write:
            self.judge.take(self._now, Access(iova, bytes(length), False, "the card"))
            return
        data = self.memory.read(Spa(start), length)
        if any(at <= iova and iova + length <= at + size for at, size in self.judge.own_parts()):
            self.golden.write(Spa(start), data)  # what it says is judged when it counts
        self.judge.take(self._now, Access(iova, data, True, "the card"))

    def _is_available(self, one):
        """The driver made a chain available: where are its bytes?"""
        if not one.chain.is_complete or sum(length for _, length in one.chain.readable + one.chain.writable) > MAX_BYTES:
            self._chains[one] = None
            return
        self._chains[one] = tuple(
            [piece for address, length in buffers for piece in self._view.pieces(address, length, access)]
            for buffers, access in ((one.chain.readable, AccessType.READ), (one.chain.writable, AccessType.WRITE)))  # fmt: skip

    def _is_there(self, pieces, access):
        """All of them were in reach, and are still where they were."""
        return all(spa is not None and (
            self._view.page(iova, access) == spa & -PAGE
            or spa in {one.spa for one in self.allowed.outcomes(self.function, Iova(iova), access)}) for iova, spa, _ in pieces)

    def _found_now(self, iova, access):
        """Where the byte is, None: out of reach."""
        page = self._view.page(iova, access)
        return None if page is None else page + iova % PAGE

    def _copy(self, one):
        """Whatever the card wrote for this chain is taken as right."""
        for _, spa, size in self._chains.pop(one)[1]:
            if spa is not None:
                self.golden.write(Spa(spa), self.memory.read(Spa(spa), size))

    def _lose(self):
        """Chains that are out do not come back: the card may have written what it likes into their buffers."""
        for one in list(self._chains):
            if self._chains[one] is None:
                del self._chains[one]
            else:
                self._copy(one)

    def _is_returned(self, one, length):
        """Execute one returned chain and compare."""
        self.comparisons += 1
        if self._chains[one] is None:
            if not one.chain.is_complete:
                self._found.append(Mismatch(
                    f"chain {one.chain.head} is returned although it has no end [VIRTIO1.4 2.7.5.2]", f"length {length}", one.chain.error))
            del self._chains[one]
            return
        readable, writable = self._chains[one]
        if self.pages_come:
            readable, writable = self._chains[one] = tuple(
                [(iova, self._found_now(iova, access) if spa is None else spa, size) for iova, spa, size in pieces]
                for pieces, access in ((readable, AccessType.READ), (writable, AccessType.WRITE)))  # fmt: skip
        if not self._is_there(readable, AccessType.READ) or not self._is_there(writable, AccessType.WRITE):
            header = b""
            for _, spa, size in readable:
                if spa is None or len(header) >= HEADER_BYTES:
                    break
                header += self.golden.read(Spa(spa), size)
            self.device.lost(header[:HEADER_BYTES], sum(size for _, _, size in readable))
            self._copy(one)
            return
        sent = b"".join(self.golden.read(Spa(spa), size) for _, spa, size in readable)
        before, after = (b"".join(memory.read(Spa(spa), size) for _, spa, size in writable) for memory in (self.golden, self.memory))
        result = self.device.execute(sent, len(after))
        self.finished.append((self._now, one.chain.head, len(sent), len(after)))
        self._copy(one)
        problem = result.problem(before, after, 0)  # the length is judged by V040 and V041
        if problem:
            at = next((n for n in range(len(after)) if after[n] != before[n]), 0)
            self._found.append(Mismatch(
                f"chain {one.chain.head} of function {self.function}: {len(after)} writable bytes are not what the device answers "
                "[VIRTIO1.4 5.2.6]", f"from byte {at} on {after[at : at + 32].hex(' ', 4)}", problem))  # fmt: skip
