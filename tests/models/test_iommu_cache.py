"""What an IOMMU with caches may answer, against IOMMUs with caches that are right and wrong. [RVIOMMU1.0 3.8, 4.1]"""

import random
from dataclasses import replace

import pytest

from ringwall.models.iommu.cache import AllowedTranslations, Outcome
from ringwall.models.iommu.commands import IodirInvalDdt, IodirInvalPdt, IofenceC, IotinvalGvma, IotinvalVma
from ringwall.models.iommu.entries import SV39, SV39X4, MsiPte, ProcessContext
from ringwall.models.iommu.faults import AccessType, Cause, TranslationFault
from ringwall.models.iommu.registers import Capabilities, IommuMode
from ringwall.models.iommu.tables import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_64K,
    Allocator,
    DeviceContext,
    DeviceDirectory,
    MsiTable,
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


GUEST = 0x30_0000  # a second-stage root


def guest(context=DeviceContext(), gscid=9, device=3, allowed=None):
    """Device 3 with a second stage at GUEST, settled in mode 1LVL."""
    if allowed is None:
        allowed = AllowedTranslations()
        allowed.mode_changed(IommuMode.LVL1)
        allowed.mode_settled()
    allowed.context_changed(device, context.with_second_stage(SV39X4, GUEST, GSCID=gscid))
    return allowed


def done(allowed, *commands):
    """Submit these, and see the fence after them complete."""
    for command in commands:
        allowed.submitted(command)
    allowed.fence_completed()


def answers(allowed, iova, access=READ, device=3, **options):
    return {outcome.spa if outcome.cause is None else int(outcome.cause) for outcome in allowed.outcomes(device, iova, access, **options)}


def test_iommu_cache_second_stage():
    """MODEL-IOMMU-CACHE-10: a second stage's page stays until IOTINVAL.GVMA covers it: guest, address or range; VMA does not end it."""
    allowed = guest()
    assert answers(allowed, 0x5000) == {21}
    allowed.mapped(GUEST, 0x5000, 0x9000, SIZE_4K, "r", is_global=True)  # G is ignored
    allowed.mapped(GUEST, 0x20_0000, 0x60_0000, SIZE_2M, "rw")
    assert (answers(allowed, 0x5008), answers(allowed, 0x5008, WRITE)) == ({0x9008}, {23})
    allowed.unmapped(GUEST, 0x5000)
    allowed.unmapped(GUEST, 0x20_0000)
    for command in (IotinvalVma(), IotinvalVma(gscid=9), IotinvalVma(gscid=9, pscid=0), IotinvalGvma(gscid=8), IotinvalGvma(0x6000, 9),
                    IotinvalGvma(0x5000, 8), IodirInvalDdt()):
        done(allowed, command)
        assert answers(allowed, 0x5000) == {0x9000, 21}
        assert allowed.may_access(3, 0x9FFF, False)
    done(allowed, IotinvalGvma(0x3F_F000, 9))
    assert (answers(allowed, 0x20_0000), answers(allowed, 0x5000)) == ({21}, {0x9000, 21})
    for command in (IotinvalGvma(0x5000, 9), IotinvalGvma(0x3000, 9, is_range=True), IotinvalGvma(gscid=9), IotinvalGvma(),
                    IotinvalGvma(0x9000)):
        allowed.mapped(GUEST, 0x5000, 0x9000, SIZE_4K, "r")
        allowed.unmapped(GUEST, 0x5000)
        assert answers(allowed, 0x5000) == {0x9000, 21}
        done(allowed, command)
        assert answers(allowed, 0x5000) == {21}
        assert not allowed.may_access(3, 0x9000, False)


def test_iommu_cache_two_stages():
    """MODEL-IOMMU-CACHE-11: of two stages every pair of allowed answers is allowed; guests with one PSCID are apart, global or not."""
    allowed = guest(sv39(ROOT, 7))
    guest(sv39(OTHER, 7), gscid=8, device=4, allowed=allowed)
    allowed.context_changed(5, sv39(ROOT, 7))
    allowed.mapped(ROOT, 0x1000, 0x5000, SIZE_4K, "rw")
    assert (answers(allowed, 0x1000), answers(allowed, 0x1000, device=4)) == ({21}, {13})
    assert answers(allowed, 0x1000, device=5) == {0x5000}
    allowed.mapped(GUEST, 0x5000, 0x9_0000, SIZE_4K, "rw")
    allowed.mapped(GUEST, 0x6000, 0xA_0000, SIZE_4K, "r")
    assert answers(allowed, 0x1004) == {0x9_0004}
    allowed.unmapped(ROOT, 0x1000)
    allowed.mapped(ROOT, 0x1000, 0x6000, SIZE_4K, "rw")
    allowed.unmapped(GUEST, 0x5000)
    allowed.mapped(GUEST, 0x5000, 0xB_0000, SIZE_4K, "rw")
    assert answers(allowed, 0x1000) == {0x9_0000, 0xA_0000, 0xB_0000}
    assert answers(allowed, 0x1000, WRITE) == {0x9_0000, 23, 0xB_0000}
    for spa, writes in ((0x9_0000, True), (0xA_0000, False), (0xB_0000, True)):
        assert (allowed.may_access(3, spa, False), allowed.may_access(3, spa, True)) == (True, writes)
        assert set(allowed.iovas(3, spa + 8, False)) == {0x1008}
        assert not allowed.may_access(4, spa, False)
    for command in (IotinvalVma(), IotinvalVma(gscid=8), IotinvalVma(gscid=9, pscid=8), IotinvalVma(gscid=9, pscid=7, address=0x2000)):
        done(allowed, command)
        assert answers(allowed, 0x1000) == {0x9_0000, 0xA_0000, 0xB_0000}
    assert answers(allowed, 0x1000, device=5) == {0x6000}
    done(allowed, IotinvalVma(gscid=9, address=0x1000))
    assert answers(allowed, 0x1000) == {0xA_0000}
    assert not allowed.may_access(3, 0xB_0000, True)
    allowed.mapped(OTHER, 0x1000, 0x5000, SIZE_4K, "r", is_global=True)
    assert (answers(allowed, 0x1000), answers(allowed, 0x1000, device=4)) == ({0xA_0000}, {0x9_0000, 0xB_0000})
    done(allowed, IotinvalGvma(0x5000, 8))
    assert answers(allowed, 0x1000, device=4) == {0xB_0000}
    allowed.unmapped(OTHER, 0x1000)
    done(allowed, IotinvalVma(gscid=8, pscid=7))
    assert answers(allowed, 0x1000, device=4) == {0xB_0000, 13}
    done(allowed, IotinvalVma(gscid=8))
    assert answers(allowed, 0x1000, device=4) == {13}


def test_iommu_cache_processes():
    """MODEL-IOMMU-CACHE-12: a process's context stays until IODIR.INVAL_PDT for it, or INVAL_DDT; wide and forbidden ids are refused."""
    allowed, directory = AllowedTranslations(), 0x50_0000
    allowed.mode_changed(IommuMode.LVL1)
    allowed.mode_settled()
    for device in (3, 4):
        allowed.context_changed(device, DeviceContext.process_directory(1 << 60 | directory >> 12, DPE=device == 4))
    allowed.mapped(ROOT, 0x1000, 0x9000, SIZE_4K, "rw")
    allowed.mapped(OTHER, 0x1000, 0xA000, SIZE_4K, "rw")
    assert [answers(allowed, 0x1000, pid=pid) for pid in (None, 5, 256)] == [{0x1000}, {266}, {260}]
    assert answers(allowed, 0x1000, device=4) == {266}
    allowed.process_context_changed(directory, 5, ProcessContext.first_stage(SV39, ROOT, PSCID=1))
    allowed.process_context_changed(directory, 0, ProcessContext.first_stage(SV39, OTHER, PSCID=2))
    assert [answers(allowed, 0x1000, pid=pid) for pid in (5, 0)] == [{0x9000}, {0xA000}]
    assert (answers(allowed, 0x1000, device=4), answers(allowed, 0x2000, pid=5)) == ({0xA000}, {13})
    assert allowed.may_access(4, 0x9000, True)
    assert set(allowed.iovas(3, 0x1234, False)) == {0x1234}  # a request without process is not translated
    allowed.process_context_changed(directory, 5, ProcessContext.first_stage(SV39, OTHER, PSCID=2))
    for command in (IodirInvalPdt(4, 5), IodirInvalPdt(3, 0), IodirInvalDdt(4), IotinvalVma()):
        assert answers(allowed, 0x1000, pid=5) == {0x9000, 0xA000}
        done(allowed, command)
    assert answers(allowed, 0x1000, pid=5, device=4) == {0xA000}
    done(allowed, IodirInvalPdt(3, 5))
    assert answers(allowed, 0x1000, pid=5) == {0xA000}
    since = allowed.now
    allowed.process_context_changed(directory, 5, Cause.PDT_ENTRY_MISCONFIGURED)
    assert answers(allowed, 0x1000, pid=5) == {0xA000, 267}
    allowed.process_context_changed(directory, 5, ProcessContext(PSCID=4))
    assert answers(allowed, 0x1000, pid=5, since=since) == {0xA000, 267, 0x1000}
    for command in (IodirInvalDdt(3), IodirInvalDdt()):
        done(allowed, command)
        assert answers(allowed, 0x1000, pid=5) == {0x1000}
        allowed.process_context_changed(directory, 5, ProcessContext.first_stage(SV39, OTHER, PSCID=2))
        done(allowed, command)
        assert answers(allowed, 0x1000, pid=5) == {0xA000}
        allowed.process_context_changed(directory, 5, ProcessContext())
    allowed.context_changed(6, sv39(ROOT, 3))
    assert answers(allowed, 0x1000, device=6, pid=1) == {260}
    wide = AllowedTranslations(extended=True)
    wide.mode_changed(IommuMode.LVL1)
    wide.mode_settled()
    assert [answers(wide, 0, device=device) for device in (63, 64)] == [{258}, {260}]


def test_iommu_cache_pointers():
    """MODEL-IOMMU-CACHE-13: a pointer that a superpage replaced may lead to a fault until an invalidation without address, or with NL."""
    memory = GuestMemory()
    allocator, allowed = Allocator(memory, 0x8000_0000, 0x40_0000), domain()
    for table, gscid, fault in ((PageTable(memory, allocator, observer=allowed), None, 13),
                                (PageTable(memory, allocator, scheme=SV39X4, observer=allowed), 9, 21)):
        if gscid is None:
            allowed.context_changed(3, sv39(table.root, 7))
        else:
            allowed.context_changed(3, DeviceContext().with_second_stage(SV39X4, table.root, GSCID=gscid))
        done(allowed, IodirInvalDdt(), IotinvalVma())
        kind = IotinvalVma if gscid is None else IotinvalGvma
        for command, ends in ((kind(0x21_0000, gscid=gscid), False), (kind(0x21_0000, gscid=gscid, non_leaf=True), True),
                              (kind(0x41_0000, gscid=gscid, non_leaf=True), False), (kind(gscid=gscid), True)):
            table.map_page(0x20_3000, 0x9000)
            table.unmap(0x20_3000)
            done(allowed, kind(0x20_3000, gscid=gscid))
            table.map_page(0x20_0000, 0x60_0000, size=SIZE_2M)
            assert answers(allowed, 0x20_5000) == {0x60_5000, fault}
            assert answers(allowed, 0x40_0000) == {fault}
            done(allowed, command)
            assert answers(allowed, 0x20_5000) == {0x60_5000} | (set() if ends else {fault})
            done(allowed, kind(gscid=gscid))
            table.unmap(0x20_0000)
            done(allowed, kind(gscid=gscid))


def test_iommu_cache_msi():
    """MODEL-IOMMU-CACHE-14: an MSI entry stays until IOTINVAL.GVMA covers its page; one that is not valid is not cached."""
    memory = GuestMemory()
    allocator = Allocator(memory, 0x8000_0000, 0x40_0000)
    allowed = AllowedTranslations(extended=True)
    allowed.mode_changed(IommuMode.LVL1)
    allowed.mode_settled()
    table = MsiTable(memory, allocator, mask=1, pattern=0x28, observer=allowed)
    guest(DeviceContext().with_msi_table(table.root, mask=1, pattern=0x28), allowed=allowed)
    allowed.mapped(GUEST, 0, 0x60_0000, SIZE_2M, "rwx")
    assert [answers(allowed, iova) for iova in (0x2_8000, 0x2_9000, 0x2_A000)] == [{262}, {262}, {0x62_A000}]
    table.set(0x2_8000, MsiPte(spa=0x7000))
    assert (answers(allowed, 0x2_8010, WRITE), answers(allowed, 0x2_8010, EXEC)) == ({0x7010}, {1})
    assert allowed.may_access(3, 0x7FFF, True)
    assert set(allowed.iovas(3, 0x7008, True)) == {0x2_8008}
    assert not allowed.may_access(3, 0x62_8000, True)
    table.set(0x2_8000, MsiPte(mrif_address=0x8200, notice_address=0x9000, nid=1))
    undo = table.corrupt(0x2_8000, "MSI_PTE_MODE_2", set())
    undo()
    assert {(one.spa, one.mrif) for one in allowed.outcomes(3, 0x2_8000, WRITE)} == {(0x7000, None), (None, 0x8200)}
    for command in (IotinvalGvma(0x2_9000, 9), IotinvalGvma(gscid=8), IotinvalVma(gscid=9)):
        done(allowed, command)
        assert allowed.may_access(3, 0x7000, True)
    done(allowed, IotinvalGvma(0x2_8000, 9))
    assert not allowed.may_access(3, 0x7000, True)
    table.clear(0x2_8000)
    assert answers(allowed, 0x2_8000) == {None, 262}
    done(allowed, IotinvalGvma())
    assert answers(allowed, 0x2_8000) == {262}


class CachingTwoStages:
    """Two stages with caches for first-stage leaves, second-stage leaves and pairs, never full; invalidated rightly, or not (``bug``)."""

    def __init__(self, memory, ddtp, rng, bug=None):
        self.rng, self.bug = rng, bug
        self.registers, self.memory, self.contexts = PlainRegisters(ddtp), memory, {}
        self.first, self.second, self.pairs = {}, {}, {}

    def translate(self, device, iova, access):
        context = self.contexts.get(device)
        walk = Iommu(self.memory, FULL, registers=self.registers)
        if context is None:
            try:
                context = self.contexts[device] = walk.locate(Request(device, 0, READ))
            except TranslationFault as fault:
                return Outcome(cause=fault.cause)
        key, page = (context.GSCID, context.PSCID, iova >> 12), iova >> 12
        if key in self.pairs and self.rng.random() < 0.5:
            gpa, spa, perms, more = self.pairs[key]
        else:
            gpa, perms = self.first.get(key, (None, ""))
            if gpa is None or self.rng.random() < 0.4:
                found = self.walked(replace(context, iohgatp_mode=0), page, access)
                if isinstance(found, Cause):
                    return Outcome(cause=found)
                self.first[key] = gpa, perms = found
            if PERM[access] not in perms:
                return Outcome(cause=access.page_fault)
            spa, more = self.second.get((context.GSCID, gpa), (None, ""))
            if spa is None or self.rng.random() < 0.4:
                found = self.walked(replace(context, fsc_mode=0), gpa, access)
                if isinstance(found, Cause):
                    return Outcome(cause=found)
                self.second[context.GSCID, gpa] = spa, more = found
            self.pairs[key] = gpa, spa, perms, more
        if PERM[access] not in perms:
            return Outcome(cause=access.page_fault)
        return Outcome(spa=spa << 12 | iova & 0xFFF) if PERM[access] in more else Outcome(cause=access.guest_page_fault)

    def walked(self, context, page, access):
        """One stage alone, from a context that stands for a cached one: the page and what it permits, or the fault."""
        self.memory.write(0x7000_0000, context.pack())
        walk = Iommu(self.memory, FULL, registers=PlainRegisters(0x7_0000 << 10 | 2))
        try:
            found = walk.translate(Request(0, page << 12, access))
        except TranslationFault as fault:
            return fault.cause
        return found.spa >> 12, {perm for perm, has in zip("rwx", (found.readable, found.writable, found.executable)) if has}

    def execute(self, command):
        match command:
            case IodirInvalDdt():
                self.contexts = {one: context for one, context in self.contexts.items() if command.device_id not in (None, one)}
            case IotinvalVma():
                def keeps(key):
                    return (command.gscid != key[0] or command.pscid not in (None, key[1])
                            or (command.address is not None and command.address >> 12 != key[2]))
                self.first = {key: one for key, one in self.first.items() if keeps(key)}
                if self.bug != "pairs survive VMA":
                    self.pairs = {key: one for key, one in self.pairs.items() if keeps(key)}
            case IotinvalGvma():
                def stays(gscid, gpa):
                    return command.gscid is not None and (command.gscid != gscid or (
                        command.address is not None and command.address >> 12 != gpa))
                self.second = {key: one for key, one in self.second.items() if stays(*key)}
                if self.bug != "pairs survive GVMA":
                    self.pairs = {key: one for key, one in self.pairs.items() if stays(key[0], one[0])}


PERM = {READ: "r", WRITE: "w", EXEC: "x"}
FULL = Capabilities(Sv39x4=True)


def two_stage_run(seed, bug=None, steps=600):
    """Random software on two guests; return how the answers left what is allowed, or None."""
    rng = random.Random(seed)
    memory, allowed = GuestMemory(), AllowedTranslations()
    allocator = Allocator(memory, 0x8000_0000, 0x80_0000)
    directory = DeviceDirectory(memory, allocator, levels=1, observer=allowed)
    allowed.mode_changed(IommuMode.LVL1)
    allowed.mode_settled()
    # tables of the guests are read without second stage: their pages never move
    firsts = [PageTable(memory, allocator, observer=allowed) for _ in range(3)]
    seconds = [PageTable(memory, allocator, observer=allowed, scheme=SV39X4) for _ in range(2)]
    for n, (first, second) in enumerate(((0, 0), (1, 0), (2, 1))):
        directory.set(n, sv39(firsts[first].root, 5 + n % 2).with_second_stage(SV39X4, seconds[second].root, GSCID=second))
    card, queue = CachingTwoStages(memory, directory.ddtp, rng, bug), []
    for step in range(steps):
        action, page = rng.randrange(9), rng.randrange(4) << 12
        if action < 3:
            table = rng.choice([*firsts, *seconds])
            if page in table.mappings:
                table.unmap(page)
            else:
                table.map_page(page, rng.randrange(4) << 12, perms=rng.choice(["rwu", "ru", "rwxu"]))
        elif action == 3:
            gscid, pscid, address = rng.choice([0, 1]), rng.choice([None, 5, 6]), rng.choice([None, page])
            commands = IotinvalVma(address, pscid, gscid), IotinvalGvma(address, rng.choice([None, gscid])), IodirInvalDdt()
            queue.append(rng.choice(commands))
            allowed.submitted(queue[-1])
        elif action == 4:
            token = allowed.submitted(IofenceC())
            while queue:
                card.execute(queue.pop(0))
            allowed.fence_completed(token)
        else:
            device, access, iova = rng.randrange(3), rng.choice(list(AccessType)), page | rng.randrange(4096)
            outcome = card.translate(device, iova, access)
            if outcome not in allowed.outcomes(device, iova, access):
                return f"step {step}: device {device} {access} {iova:#x}: {outcome}"
            if outcome.spa is not None and access != EXEC and iova not in allowed.iovas(device, outcome.spa, access == WRITE):
                return f"step {step}: device {device} does not reach {outcome.spa:#x}"
    return None


@pytest.mark.parametrize("bug", [None, "pairs survive VMA", "pairs survive GVMA"])
def test_iommu_cache_two_stages_random(bug):
    """MODEL-IOMMU-CACHE-15 (R27): what caches of leaves and of pairs answer is allowed; pairs that outlive an invalidation are caught."""
    found = [two_stage_run(seed, bug) for seed in range(4)]
    assert any(found) if bug else not any(found), found
