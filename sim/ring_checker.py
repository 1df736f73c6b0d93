"""Judges one split virtqueue: what the card writes for each chain against the golden device, and where it may write at all."""

from ..models.iommu.faults import AccessType
from ..models.memory import Iova
from ..models.tlp import TlpType
from .scoreboard import Mismatch

__all__ = ["RingChecker", "places"]

NEXT, WRITE = 1, 2  # flags of a descriptor [VIRTIO1.4 2.7.5]
PAGE = 4096


def _pieces(allowed, device_id, iova, length, access):
    """Yield (spa, length), one per page, of where ``length`` bytes at ``iova`` are for a device; spa None: out of its reach."""
    while length:
        piece = min(length, PAGE - iova % PAGE)
        yield next((one.spa for one in allowed.outcomes(device_id, Iova(iova), access) if one.spa is not None), None), piece
        iova, length = iova + piece, length - piece


def places(allowed, device_id, iova, length, access):
    """Return ``[(spa, length)]``, one per page, of where ``length`` bytes at ``iova`` are for a device.

    None when the device cannot reach all of them. Where old and new mappings are both allowed, the first that is found.
    """
    found = []
    for spa, piece in _pieces(allowed, device_id, iova, length, access):
        if spa is None:
            return None
        found.append((spa, piece))
    return found


class _Chain:
    """A chain that the driver made available, as software's memory describes it."""

    __slots__ = ("head", "is_in_reach", "readable", "writable")

    def __init__(self, head, readable, writable, is_in_reach):
        self.head, self.readable, self.writable = head, readable, writable  # lists of (spa, length), those in reach
        self.is_in_reach = is_in_reach


class RingChecker:
    """The golden device executes each chain when the card returns it; every byte that the card wrote for it is compared.

    Checked: used elements name chains that are available, once each; the used index grows by at most what is outstanding and
    is written behind its elements and their data; writable buffers hold what the golden device says, and the reported length
    is one that it allows; the function writes nowhere but into writable buffers of available chains and its used ring.
    [VIRTIO1.4 2.7.6 to 2.7.8]

    A chain with bytes that the device cannot reach is not executed: its data is not compared, but the bytes in reach may be written.

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
        IOVAs of the three parts.
    device : object
        ``execute(readable, writable_len)`` returns an object with ``written`` (the bytes that the device writes, from the first
        writable byte on; None: free) and ``used_len_allowed`` (a container of lengths).
    free : list of [start, length]
        Where else the function may write: interrupts.

    Attributes
    ----------
    finished : list of (cycle, head, readable bytes, writable bytes)
        Chains that came back.
    """

    def __init__(self, memory, golden, allowed, *, function, size, desc, avail, used, device, free=()):
        self.memory, self.golden, self.allowed, self.device, self.free = memory, golden, allowed, device, free
        self.function, self.size, self.desc, self.avail, self.used = function, size, desc, avail, used
        self.comparisons, self.finished = 0, []
        self._avail_index = self._used_index = 0
        self._chains = {}  # head -> chain
        self._writable = {}  # page -> list of (start, end) that may be written
        self._ring = []  # places of the used ring
        self._looked_at = None  # allowed.now when _ring was found

    def take(self, event, tlp):
        if tlp is None or tlp.type is not TlpType.MWR or tlp.requester_id & 0xFF != self.function:
            return []
        start, length = tlp.byte_span()
        end = start + length
        if any(low <= start and end <= low + size for low, size in self.free):
            return []
        if self._looked_at != self.allowed.now:
            self._looked_at = self.allowed.now
            self._ring = places(self.allowed, self.function, self.used, 6 + 8 * self.size, AccessType.WRITE) or []
        for base, size in self._ring:
            if base <= start and end <= base + size:
                index = self._spa_of_index()
                return self._returned(event) if start <= index < end else []
        for again in (False, True):
            if any(low <= start and end <= high for low, high in self._writable.get(start // PAGE, ())):
                return []
            if not again:
                found = self._look_for_chains()
                if found:
                    return found
        return [Mismatch("write outside of writable buffers and used ring", str(tlp), f"{len(self._chains)} chains are available")]

    def finish(self):
        return []

    def _spa_of_index(self):
        (spa, _), = places(self.allowed, self.function, self.used + 2, 2, AccessType.WRITE) or [(-1, 0)]
        return spa

    def _load(self, memory, iova, length, access=AccessType.READ):
        """Return bytes at ``iova`` as the device reaches them, None when it does not."""
        found = places(self.allowed, self.function, iova, length, access)
        return None if found is None else b"".join(memory.read(spa, size) for spa, size in found)

    def _look_for_chains(self):
        """Take note of what the driver made available since; returns mismatches of the driver, which end a run as well."""
        raw = self._load(self.golden, self.avail + 2, 2)
        if raw is None:
            return []
        index = int.from_bytes(raw, "little")
        while self._avail_index != index:
            raw = self._load(self.golden, self.avail + 4 + 2 * (self._avail_index % self.size), 2)
            if raw is None:
                return []
            chain = self._chain(int.from_bytes(raw, "little"))
            if chain is None:
                return []  # a malformed chain: the card never returns it
            self._avail_index = self._avail_index + 1 & 0xFFFF
            if chain.head in self._chains:
                return [Mismatch("the driver made a chain available twice", "-", f"head {chain.head}")]
            self._chains[chain.head] = chain
            for spa, size in chain.writable:
                self._writable.setdefault(spa // PAGE, []).append((spa, spa + size))
        return []

    def _chain(self, head):
        readable, writable, at, is_in_reach = [], [], head, True
        for _ in range(self.size):
            if at >= self.size:
                return None
            raw = self._load(self.golden, self.desc + 16 * at, 16)
            if raw is None:
                return None
            address, length = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:12], "little")
            flags, following = int.from_bytes(raw[12:14], "little"), int.from_bytes(raw[14:], "little")
            access = AccessType.WRITE if flags & WRITE else AccessType.READ
            for spa, size in _pieces(self.allowed, self.function, address, length, access):
                if spa is None:
                    is_in_reach = False
                else:
                    (writable if flags & WRITE else readable).append((spa, size))
            if not flags & NEXT:
                return _Chain(head, readable, writable, is_in_reach)
            at = following
        return None

    def _returned(self, event):
        """The card wrote the used index: judge each chain that it returns."""
        raw = self._load(self.memory, self.used + 2, 2)
        index = int.from_bytes(raw or bytes(2), "little")
        found = self._look_for_chains()
        count = index - self._used_index & 0xFFFF
        if count > len(self._chains):
            return [Mismatch("used index runs ahead", f"from {self._used_index} to {index}", f"{len(self._chains)} chains are out")]
        while not found and self._used_index != index:
            element = self._load(self.memory, self.used + 4 + 8 * (self._used_index % self.size), 8) or bytes(8)
            head, length = int.from_bytes(element[:4], "little"), int.from_bytes(element[4:], "little")
            self._store(self.used + 4 + 8 * (self._used_index % self.size), element)
            self._used_index = self._used_index + 1 & 0xFFFF
            chain = self._chains.pop(head, None)
            if chain is None:
                return [Mismatch(f"used element {self._used_index - 1 & 0xFFFF} names a chain that is not available",
                                 f"id {head}", f"available are {sorted(self._chains)}")]  # fmt: skip
            found = self._judge(event, chain, length)
        self._store(self.used + 2, self._used_index.to_bytes(2, "little"))
        return found

    def _store(self, iova, data):
        at = 0
        for spa, size in places(self.allowed, self.function, iova, len(data), AccessType.WRITE) or ():
            self.golden.write(spa, data[at : at + size])
            at += size

    def _judge(self, event, chain, length):
        """Execute one returned chain and compare."""
        self.comparisons += 1
        for spa, size in chain.writable:
            self._writable[spa // PAGE].remove((spa, spa + size))
        if not chain.is_in_reach:
            for spa, size in chain.writable:
                self.golden.write(spa, self.memory.read(spa, size))
            return []
        readable = b"".join(self.golden.read(spa, size) for spa, size in chain.readable)
        room = sum(size for _, size in chain.writable)
        result = self.device.execute(readable, room)
        self.finished.append((event.cycle, chain.head, len(readable), room))
        card = b"".join(self.memory.read(spa, size) for spa, size in chain.writable)
        before = b"".join(self.golden.read(spa, size) for spa, size in chain.writable)
        model = card if result.written is None else result.written + before[len(result.written) :]
        at = 0
        for spa, size in chain.writable:
            self.golden.write(spa, model[at : at + size])
            at += size
        found = []
        if card != model:
            at = next(n for n in range(room) if card[n] != model[n])
            found.append(Mismatch(f"chain {chain.head}: byte {at} of {room} writable bytes differs",
                                  card[at : at + 32].hex(" ", 4), model[at : at + 32].hex(" ", 4)))  # fmt: skip
        if length not in result.used_len_allowed:
            found.append(Mismatch(f"chain {chain.head}: used length", str(length), f"one of {result.used_len_allowed}"))
        return found
