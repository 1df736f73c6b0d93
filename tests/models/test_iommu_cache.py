"""What an IOMMU with caches may answer, against IOMMUs with caches that are right and wrong. [RVIOMMU1.0 3.8, 4.1]"""

import random

import pytest

from ringwall.models.iommu.cache import AllowedTranslations, Outcome
from ringwall.models.iommu.commands import IodirInvalDdt, IofenceC, IotinvalGvma, IotinvalVma
from ringwall.models.iommu.faults import AccessType, Cause, TranslationFault
from ringwall.models.iommu.registers import IommuMode
from ringwall.models.iommu.tables import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_64K,
    Allocator,
    DeviceContext,
    DeviceDirectory,
    PageTable,
)
from ringwall.models.iommu.walk import Iommu, PlainRegisters, Request
from ringwall.models.memory import GuestMemory

READ, WRITE, EXEC = AccessType.READ, AccessType.WRITE, AccessType.EXEC
ROOT, OTHER = 0x10_0000, 0x20_0000


def sv39(root, pscid):
    return DeviceContext.sv39(root, PSCID=pscid)


def domain():
    """Device 3 with PSCID 7 and the table at ROOT, settled in mode 1LVL."""
    allowed = AllowedTranslations()
    allowed.mode_changed(IommuMode.LVL1)
    allowed.mode_settled()
    allowed.context_changed(3, sv39(ROOT, 7))
    return allowed


def spas(allowed, iova, access=READ, device=3, **options):
    """The physical addresses among the outcomes; and "fault" when the page fault is one."""
    found = set()
    for outcome in allowed.outcomes(device, iova, access, **options):
        found.add("fault" if outcome.cause == access.page_fault else outcome.spa if outcome.cause is None
                  else outcome.cause)
    return found


def test_iommu_cache_page_changes():
    """MODEL-IOMMU-CACHE-1: an old page is allowed until an invalidation that covers it is complete, and no longer."""
    allowed = domain()
    assert spas(allowed, 0x5000) == {"fault"}
    allowed.mapped(ROOT, 0x5000, 0x9000, SIZE_4K, "r")
    assert spas(allowed, 0x5ABC) == {0x9ABC}
    assert spas(allowed, 0x5ABC, WRITE) == {"fault"}
    assert allowed.may_access(3, 0x9FFF, False)
    assert not allowed.may_access(3, 0x9FFF, True)
    assert not allowed.may_access(3, 0xA000, False)
    allowed.unmapped(ROOT, 0x5000)
    assert spas(allowed, 0x5000) == {0x9000, "fault"}
    allowed.mapped(ROOT, 0x5000, 0xB000, SIZE_4K, "rw")
    assert spas(allowed, 0x5000) == {0x9000, 0xB000}
    assert spas(allowed, 0x5000, WRITE) == {"fault", 0xB000}  # the old entry is read-only
    # covers nothing: another page, another PSCID, a guest, the second stage; and nothing before its fence
    for command in (IotinvalVma(address=0x6000), IotinvalVma(pscid=8), IotinvalVma(gscid=0), IotinvalGvma(),
                    IotinvalVma(address=0x5000, pscid=6), IodirInvalDdt()):
        allowed.submitted(command)
        allowed.fence_completed()
        assert spas(allowed, 0x5000) == {0x9000, 0xB000}
    allowed.invalidated(iova=0x5000, pscid=7)
    assert allowed.may_access(3, 0x9000, False)
    allowed.fence_completed()
    assert spas(allowed, 0x5000) == {0xB000}
    assert not allowed.may_access(3, 0x9000, False)


@pytest.mark.parametrize("command", [IotinvalVma(), IotinvalVma(pscid=7), IotinvalVma(address=0x5000),
                                     IotinvalVma(address=0x5000, pscid=7)], ids=["all", "pscid", "page", "both"])
def test_iommu_cache_scopes(command):
    """MODEL-IOMMU-CACHE-2: each form of IOTINVAL.VMA ends what it covers: address spaces, pages, global entries or not."""
    allowed = domain()
    allowed.context_changed(4, sv39(OTHER, 8))
    pages = [(ROOT, 0x5000, 0x9_0000, False), (ROOT, 0x6000, 0xA_0000, False), (OTHER, 0x5000, 0xB_0000, False),
             (ROOT, 0x20_0000, 0xC_0000, False)]
    for root, iova, spa, is_global in pages:
        allowed.mapped(root, iova, spa, SIZE_4K, "rw", is_global=is_global)
        allowed.unmapped(root, iova)
    allowed.mapped(OTHER, 0x5000, 0xD_0000, SIZE_4K, "rw", is_global=True)
    allowed.unmapped(OTHER, 0x5000)
    assert spas(allowed, 0x5000) == {0x9_0000, 0xD_0000, "fault"}  # a global entry of another table
    allowed.submitted(command)
    allowed.fence_completed()
    left = {spa for spa in (0x9_0000, 0xA_0000, 0xB_0000, 0xC_0000, 0xD_0000)
            if allowed.may_access(3, spa, True) or allowed.may_access(4, spa, True)}
    keeps_pages, keeps_spaces = command.address is not None, command.pscid is not None
    assert left == ({0xA_0000, 0xC_0000} if keeps_pages else set()) | ({0xB_0000, 0xD_0000} if keeps_spaces else set())


def test_iommu_cache_sizes():
    """MODEL-IOMMU-CACHE-3: any address in a superpage covers it; in a 64 KiB page only the 4 KiB named is sure to go."""
    allowed = domain()
    allowed.mapped(ROOT, 0x4000_0000, 0x8000_0000, SIZE_1G, "rw")
    allowed.mapped(ROOT, 0x20_0000, 0x60_0000, SIZE_2M, "rw")
    allowed.mapped(ROOT, 0x1_0000, 0x7_0000, SIZE_64K, "rw")
    assert spas(allowed, 0x7FFF_FFFF) == {0xBFFF_FFFF}
    assert spas(allowed, 0x3F_F000) == {0x7F_F000}
    assert spas(allowed, 0x1_FFFF) == {0x7_FFFF}
    for spa in (0x8000_0000, 0xBFFF_FFFF, 0x60_0000, 0x7F_FFFF, 0x7_0000, 0x7_FFFF):
        assert allowed.may_access(3, spa, True)
    for spa in (0x7FFF_FFFF, 0xC000_0000, 0x5F_FFFF, 0x80_0000, 0x6_FFFF, 0x8_0000):
        assert not allowed.may_access(3, spa, True)
    for iova in (0x4000_0000, 0x20_0000, 0x1_0000):
        allowed.unmapped(ROOT, iova)
    for iova in (0x7FFF_F000, 0x30_0000, 0x1_3000):
        allowed.invalidated(iova=iova)
    allowed.fence_completed()
    assert [allowed.may_access(3, spa, True) for spa in (0x8000_0000, 0xBFFF_FFFF, 0x60_0000, 0x7F_FFFF)] == [False] * 4
    assert [allowed.may_access(3, 0x7_0000 + n * 0x1000, True) for n in range(16)] == [n != 3 for n in range(16)]
    # a range (S=1): page number ...0111 covers 16 pages
    allowed.submitted(IotinvalVma(address=0x1_7000, is_range=True))
    allowed.fence_completed()
    assert not any(allowed.may_access(3, 0x7_0000 + n * 0x1000, True) for n in range(16))


def test_iommu_cache_fences():
    """MODEL-IOMMU-CACHE-4: a fence ends what was gone before its invalidations were submitted, and only theirs."""
    allowed = domain()
    for n in range(3):
        allowed.mapped(ROOT, 0x1000 * n, 0x10_0000 + 0x1000 * n, SIZE_4K, "rw")
    allowed.unmapped(ROOT, 0)
    allowed.invalidated(iova=0x0)
    first = allowed.submitted(IofenceC())
    allowed.unmapped(ROOT, 0x1000)
    allowed.invalidated(iova=0x1000)
    second = allowed.submitted(IofenceC())
    allowed.unmapped(ROOT, 0x2000)
    left = [allowed.may_access(3, 0x10_0000 + 0x1000 * n, True) for n in range(3)]
    assert left == [True, True, True]
    allowed.fence_completed(first)
    assert [allowed.may_access(3, 0x10_0000 + 0x1000 * n, True) for n in range(3)] == [False, True, True]
    # mapped and unmapped again between the submission and the end of the fence: may have been cached in between
    allowed.mapped(ROOT, 0x1000, 0x30_0000, SIZE_4K, "rw")
    allowed.unmapped(ROOT, 0x1000)
    allowed.fence_completed(second)
    assert [allowed.may_access(3, 0x10_0000 + 0x1000 * n, True) for n in range(3)] == [False, False, True]
    assert allowed.may_access(3, 0x30_0000, True)
    # a queue that stopped: invalidations that no fence covered may not have been done
    allowed.invalidated()
    allowed.commands_aborted()
    allowed.fence_completed()
    assert allowed.may_access(3, 0x30_0000, True)
    allowed.invalidated()
    allowed.fence_completed()
    assert not any(allowed.may_access(3, spa, True) for spa in (0x10_2000, 0x30_0000))


def test_iommu_cache_contexts():
    """MODEL-IOMMU-CACHE-5 (R27): contexts stay until IODIR.INVAL_DDT, pages under a PSCID until IOTINVAL.VMA as well."""
    allowed = domain()
    allowed.mapped(ROOT, 0x1000, 0x9000, SIZE_4K, "rw")
    allowed.mapped(OTHER, 0x1000, 0xA000, SIZE_4K, "rw")
    assert not allowed.may_access(3, 0xA000, True)
    assert allowed.outcomes(5, 0x1000, READ) == {Outcome(cause=Cause.DDT_ENTRY_NOT_VALID)}
    assert not allowed.may_access(5, 0x9000, True)
    # from one domain to another: both until the directory cache is empty
    allowed.context_changed(3, sv39(OTHER, 8))
    assert spas(allowed, 0x1000) == {0x9000, 0xA000}
    allowed.submitted(IodirInvalDdt(device_id=4))
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0x9000, 0xA000}
    allowed.submitted(IodirInvalDdt(device_id=3))
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0xA000}
    # another table under the same PSCID: the old pages stay until that PSCID is invalidated
    allowed.context_changed(3, sv39(ROOT, 8))
    allowed.submitted(IodirInvalDdt())
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0x9000, 0xA000}
    allowed.invalidated(pscid=8)
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0x9000}
    # both commands before one fence, as the specification tells software to
    allowed.context_changed(3, sv39(OTHER, 8))
    allowed.submitted(IodirInvalDdt(device_id=3))
    allowed.invalidated(pscid=8)
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0xA000}
    # a context that was good until after the command was submitted may have been cached again
    allowed.submitted(IodirInvalDdt())
    allowed.context_changed(3, sv39(ROOT, 9))
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0x9000, 0xA000}
    allowed.context_changed(3, sv39(OTHER, 8))
    allowed.submitted(IodirInvalDdt())
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0xA000}
    # a refusal is not cached; the valid context before it is
    allowed.context_changed(3, Cause.DDT_ENTRY_MISCONFIGURED)
    assert spas(allowed, 0x1000) == {0xA000, Cause.DDT_ENTRY_MISCONFIGURED}
    since = allowed.now
    allowed.context_changed(3, DeviceContext())
    assert allowed.may_access(3, 0xDEAD_B000, True)
    assert spas(allowed, 0x1000, since=since) == {0xA000, 0x1000, Cause.DDT_ENTRY_MISCONFIGURED}
    allowed.submitted(IodirInvalDdt())
    allowed.fence_completed()
    assert spas(allowed, 0x1000) == {0x1000}
    allowed.context_changed(3, sv39(OTHER, 8))
    allowed.submitted(IodirInvalDdt(device_id=3))
    allowed.fence_completed()
    assert not allowed.may_access(3, 0xDEAD_B000, True)


def test_iommu_cache_modes():
    """MODEL-IOMMU-CACHE-6: Bare allows everything, Off nothing; between the write of ddtp and its end both count."""
    allowed = AllowedTranslations()
    top = (1 << 64) - 1
    assert allowed.may_access(0xFFFFFF, top, True)
    assert allowed.outcomes(9, top, READ) == {Outcome(spa=top)}
    start = allowed.now
    allowed.mode_changed(IommuMode.OFF)
    assert allowed.outcomes(9, 0, READ) == {Outcome(spa=0), Outcome(cause=Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED)}
    assert allowed.may_access(9, 0, True)
    allowed.mode_settled()
    assert not allowed.may_access(9, 0, True)
    assert allowed.may_access(9, 0, True, since=start)
    assert allowed.outcomes(9, 0, READ) == {Outcome(cause=Cause.ALL_INBOUND_TRANSACTIONS_DISALLOWED)}
    allowed.context_changed(0x80, DeviceContext())
    for mode, device, cause in ((IommuMode.LVL1, 0x80, 260), (IommuMode.LVL2, 0x80, None), (IommuMode.LVL2, 1, 258),
                                (IommuMode.LVL3, 0x80, None), (IommuMode.LVL2, 1 << 16, 260)):
        allowed.mode_changed(mode)
        allowed.mode_settled()
        assert allowed.outcomes(device, 0x1000, READ) == {Outcome(cause=cause) if cause else Outcome(spa=0x1000)}
        assert allowed.may_access(device, 0x1000, True) == (cause is None)


def test_iommu_cache_misuse():
    """MODEL-IOMMU-CACHE-7: events that contradict one another are refused with a sentence."""
    allowed = domain()
    allowed.mapped(ROOT, 0x1_0000, 0x7_0000, SIZE_64K, "rw")
    with pytest.raises(ValueError, match="mapped twice"):
        allowed.mapped(ROOT, 0x1_0000, 0x9_0000, SIZE_64K, "rw")
    for root, iova in ((ROOT, 0x1_1000), (OTHER, 0x1_0000), (ROOT, 0)):
        with pytest.raises(ValueError, match="where a mapped page starts"):
            allowed.unmapped(root, iova)


class CachingIommu:
    """An IOMMU with caches that never run full, invalidated as the specification says, or wrongly (``bug``)."""

    def __init__(self, iommu, rng, bug=None):
        self.iommu, self.rng, self.bug = iommu, rng, bug
        self.contexts, self.pages = {}, {}

    def context(self, device):
        if device not in self.contexts:
            memory, root = self.iommu.memory, self.iommu.registers.ddtp >> 10 << 12
            context = DeviceContext.unpack(memory.read(root + device * 32, 32))
            if context.V:
                self.contexts[device] = context
            return context
        return self.contexts[device]

    def translate(self, device, iova, access):
        """Return an `Outcome`; hits the caches two times in three."""
        context = self.context(device)
        if not context.V:
            return Outcome(cause=Cause.DDT_ENTRY_NOT_VALID)
        if context.fsc_mode == 0:
            return Outcome(spa=iova)
        hits = [(base, page) for (pscid, base), page in self.pages.items()
                if base <= iova < base + page.size and (pscid == context.PSCID or page.is_global)]
        if hits and self.rng.random() < 0.67:
            base, page = self.rng.choice(hits)
            can = {READ: page.readable, WRITE: page.writable, EXEC: page.executable}[access]
            return Outcome(spa=page.spa + iova - base) if can else Outcome(cause=access.page_fault)
        walk = Iommu(self.iommu.memory, registers=PlainRegisters(ddtp=2 | self.scratch(context) >> 12 << 10))
        try:
            found = walk.translate(Request(0, iova, access))
        except TranslationFault as fault:
            return Outcome(cause=fault.cause)
        size = SIZE_4K if found.size == SIZE_64K and self.rng.random() < 0.5 else found.size
        base = iova // size * size
        self.pages[context.PSCID, base] = type(found)(
            found.spa - (iova - base), size, found.readable, found.writable, found.executable, 0, found.is_global)
        return Outcome(spa=found.spa)

    def scratch(self, context):
        """A directory of one entry, so that the golden walk starts from the cached context."""
        self.iommu.memory.write(0x7000_0000, context.pack())
        return 0x7000_0000

    def execute(self, command):
        if isinstance(command, IodirInvalDdt) and self.bug != "IODIR ignored":
            self.contexts = {device: context for device, context in self.contexts.items()
                             if command.device_id not in (None, device)}
        if isinstance(command, IotinvalVma):
            if self.bug == "PSCID form ignored" and command.pscid is not None:
                return
            if self.bug == "address form ignored" and command.address is not None:
                return
            self.pages = {
                key: page for key, page in self.pages.items()
                if (command.pscid is not None and (page.is_global or key[0] != command.pscid))
                or (command.address is not None and not self.holds(key[1], page, command.address))}

    def holds(self, base, page, address):
        size = SIZE_4K if self.bug == "superpages forgotten" else page.size
        return base <= address < base + size


def random_run(seed, bug=None, steps=1500):
    """Random software and requests; return how the caching IOMMU's answers left what is allowed, or None."""
    rng = random.Random(seed)
    memory = GuestMemory()
    allocator = Allocator(memory, 0x8000_0000, 0x80_0000)
    allowed = AllowedTranslations()
    directory = DeviceDirectory(memory, allocator, levels=1, observer=allowed)
    iommu = Iommu(memory, registers=PlainRegisters(ddtp=directory.ddtp))
    allowed.mode_changed(IommuMode.LVL1)
    allowed.mode_settled()
    card = CachingIommu(iommu, rng, bug)
    tables = [PageTable(memory, allocator, observer=allowed) for _ in range(3)]
    contexts = [sv39(tables[0].root, 1), sv39(tables[1].root, 2), sv39(tables[2].root, 1), sv39(tables[0].root, 3),
                DeviceContext()]
    slots = [(n * SIZE_4K, SIZE_4K) for n in range(4)] + [(SIZE_64K, SIZE_64K), (SIZE_2M, SIZE_2M), (SIZE_1G, SIZE_1G)]
    queue = []
    for step in range(steps):
        action = rng.randrange(10)
        table = rng.choice(tables)
        if action == 0:
            iova, size = rng.choice(slots)
            if iova in table.mappings:
                table.unmap(iova)
            else:
                table.map_page(iova, rng.randrange(8) * size, size=size, perms=rng.choice(["ru", "rwu", "rxu"]),
                               g=rng.random() < 0.2)
        elif action == 1 and table.mappings:
            table.protect(rng.choice(sorted(table.mappings)), rng.choice(["ru", "rwu", "rwxu"]))
        elif action == 2:
            device = rng.randrange(3)
            if rng.random() < 0.2:
                directory.clear(device)
            else:
                directory.set(device, rng.choice(contexts))
        elif action == 3:
            base, size = rng.choice(slots)
            page, pscid = base + rng.randrange(size // SIZE_4K) * SIZE_4K, rng.randrange(1, 4)
            queue.append(rng.choice([
                IotinvalVma(), IotinvalVma(pscid=pscid), IotinvalVma(address=page), IotinvalVma(address=page),
                IotinvalVma(address=page, pscid=pscid), IodirInvalDdt(), IodirInvalDdt(rng.randrange(3))]))
            allowed.submitted(queue[-1])
        elif action == 4:
            token = allowed.submitted(IofenceC())
            while queue:
                card.execute(queue.pop(0))
            allowed.fence_completed(token)
        elif action == 5 and queue:  # executed before the fence asks for it, and then again
            card.execute(queue[0])
        else:
            device, access = rng.randrange(3), rng.choice(list(AccessType))
            base, size = rng.choice(slots)
            iova = base + rng.randrange(size)
            outcome = card.translate(device, iova, access)
            if outcome not in allowed.outcomes(device, iova, access):
                return f"step {step}: device {device} {access} {iova:#x}: {outcome}"
            if outcome.spa is not None and access != EXEC and not allowed.may_access(device, outcome.spa, access == WRITE):
                return f"step {step}: device {device} may not access {outcome.spa:#x}"
    return None if bug else exactness(rng, memory, allowed, directory, tables, slots)


def exactness(rng, memory, allowed, directory, tables, slots):
    """With every cache emptied, and no PSCID for two tables, only the answer of the walk is left; return what is not."""
    for device, table in enumerate(tables):
        directory.set(device, sv39(table.root, 10 + device))
    token = [allowed.submitted(command) for command in (IodirInvalDdt(), IotinvalVma(), IofenceC())][-1]
    allowed.fence_completed(token)
    iommu = Iommu(memory, registers=PlainRegisters(ddtp=directory.ddtp))
    everywhere = [page for table in tables for page in table.mappings.values() if page.is_global]
    for device in range(3):
        for base, size in slots:
            for access in AccessType:
                iova = base + rng.randrange(size)
                try:
                    outcome = Outcome(spa=iommu.translate(Request(device, iova, access)).spa)
                except TranslationFault as fault:
                    outcome = Outcome(cause=fault.cause)
                found = allowed.outcomes(device, iova, access)
                is_global = any(page.iova <= iova < page.iova + page.size for page in everywhere)
                if found != {outcome} and not (is_global and outcome in found):
                    return f"device {device} {iova:#x}: {found}, not {outcome}"
    return None


@pytest.mark.parametrize("seed", range(8))
def test_iommu_cache_random(seed):
    """MODEL-IOMMU-CACHE-8 (R27): whatever an IOMMU with caches answers under random software is allowed; flushed, exact."""
    assert random_run(seed) is None


@pytest.mark.parametrize("bug", ["IODIR ignored", "PSCID form ignored", "address form ignored", "superpages forgotten"])
def test_iommu_cache_catches(bug):
    """MODEL-IOMMU-CACHE-9: an IOMMU that leaves out part of an invalidation is caught."""
    assert any(random_run(seed, bug) for seed in range(8))
