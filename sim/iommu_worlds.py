"""Random software of an IOMMU: directories, contexts, guests, tables of every kind with good and bad entries, and how they change."""

from copy import copy
from dataclasses import replace

from ..models.iommu.ats import PageRequest
from ..models.iommu.commands import AtsInval, AtsPrgr, IodirInvalDdt, IodirInvalPdt, IotinvalGvma, IotinvalVma
from ..models.iommu.entries import (
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_N,
    PTE_R,
    PTE_U,
    PTE_V,
    PTE_W,
    PTE_X,
    SIZE_64K,
    SV39,
    SV39X4,
    SV48,
    SV48X4,
    SV57,
    SV57X4,
    MsiPte,
    ProcessContext,
)
from ..models.iommu.faults import AccessType
from ..models.iommu.hpm import EventSelector
from ..models.iommu.tables import Allocator, DeviceContext, DeviceDirectory, GuestView, MsiTable, PageTable, ProcessDirectory
from ..models.iommu.walk import RequestKind
from ..rtl.tlp.layouts import BurstStatus
from .iommu_decks import MORE_CONTEXT_DEFECTS

__all__ = ["ACCESS", "ASKED", "World"]

ACCESS = (AccessType.READ, AccessType.WRITE, AccessType.EXEC)
# What is asked, by number: access, kind, no_write, is_cxl; the first three are those of a device without translations of its own.
ASKED = (
    *((access, kind, False, False) for kind in (RequestKind.UNTRANSLATED, RequestKind.TRANSLATED) for access in ACCESS),
    *((access, RequestKind.ATS, no_write, is_cxl) for access in ACCESS[::2] for no_write in (False, True) for is_cxl in (False, True)),
)  # fmt: skip
UNTRANSLATED, TRANSLATED, ATS = ((0, 0, 1, 1, 2), (3, 4, 5), tuple(range(6, len(ASKED))))
PIDS = (0, 1, 0xFF, 0x100, 0x1FFFF, 0x20000, 0xFFFFF)
PID_BITS = (0, 8, 17, 20)
GUEST_POOL, GUEST_PAGES = 0x20_0000, 448
FILE_PAGES = 2  # of interrupt files in memory
MASK64 = (1 << 64) - 1


class _Guest:
    """A second stage, its guest's memory for tables (at ``run``, 2 MiB, or None: in single pages), its MSI table if it has one."""

    def __init__(self, world, GSCID, run):
        rng, has = world.rng, world.features
        self.GSCID, self.messages = GSCID, None
        self.scheme = rng.choice([scheme for scheme in (SV39X4, SV48X4, SV57X4) if scheme.name in has])
        self.second = table = PageTable(world.memory, world.allocator, scheme=self.scheme, features=has)
        if run is not None:
            table.map_page(GUEST_POOL, run, size=1 << 21, perms="rwu")
        else:
            for n in range(GUEST_PAGES):
                table.map_page(GUEST_POOL + (n << 12), world.allocator.page(), perms="rwu" if n % 4 else "ru",
                               a=not world.GADE or rng.random() < 0.5, d=not world.GADE or rng.random() < 0.5)  # fmt: skip
        self.view = GuestView(world.memory, table)
        self.allocator = Allocator(self.view, GUEST_POOL, GUEST_PAGES << 12, rng=rng)
        self.targets = [(GUEST_POOL, GUEST_PAGES << 12), (rng.getrandbits(59) & -4096, 4096)]
        for _ in range(14):
            size = rng.choice(self.scheme.sizes)
            gpa = rng.getrandbits(rng.choice([self.scheme.address_bits, min(self.scheme.address_bits, 50)])) & -size
            if rng.random() < 0.5:
                gpa = rng.choice(world.common_gpas) & -size
            if world.mapped(table, gpa, rng.getrandbits(56), size):
                self.targets.append((gpa, size))
        if "MSI_FLAT" in has and rng.random() < 0.7:
            gpa, size = rng.choice(self.targets[2:])
            pattern = gpa + rng.randrange(size) >> 12 & (1 << self.scheme.address_bits - 12) - 1
            mask = sum(1 << bit for bit in rng.sample(range(12), rng.randrange(5))) | rng.choice([0, 0, 1 << rng.randrange(29)])
            self.messages = MsiTable(world.memory, world.allocator, mask=mask, pattern=pattern)
            self.files = [(pattern & ~mask | _spread(n, mask)) << 12 for n in range(self.messages.entries)]
            for file in self.files:
                if rng.random() < 0.8:
                    self.messages.set(file, world.message_entry())
            self.targets += [(file, 4096) for file in self.files[:12]] * (4 if world.file_pages else 1)

    def joined(self, context):
        """Return ``context`` with this guest's second stage and MSI table."""
        context = context.with_second_stage(self.scheme, self.second.root, GSCID=self.GSCID)
        if self.messages is None:
            return context
        return context.with_msi_table(self.messages.root, mask=self.messages.mask, pattern=self.messages.pattern)


class _Space:
    """A first stage, or none, and addresses worth asking for; ``scheme`` None passes what it is given.

    With ``root`` nobody knows what is there.
    """

    def __init__(self, world, guest, scheme, PSCID, *, root=None):
        self.world, self.guest, self.scheme, self.PSCID, self.root, self.table = world, guest, scheme, PSCID, root or 0, None
        self.places = []  # IOVAs
        if root is not None:
            self.places = [_canonical(world.rng.getrandbits(64) & -4096, scheme.address_bits) for _ in range(4)]
            return
        memory, allocator = (guest.view, guest.allocator) if guest else (world.memory, world.allocator)
        if scheme is None:
            self.places = [gpa + world.rng.randrange(size) for gpa, size in world.targets(guest) for _ in range(3)]
            self.places += world.common_gpas * 2
            return
        self.table = PageTable(memory, allocator, scheme=scheme, features=world.features)
        self.root = self.table.root
        for _ in range(12):
            self.map()

    @property
    def fsc(self):
        """Fields of a context that lead here."""
        return {"fsc_mode": self.scheme.mode, "fsc_ppn": self.root >> 12} if self.scheme else {"fsc_mode": 0, "fsc_ppn": 0}

    def map(self):
        """Map one more page, of any size."""
        world, rng, scheme = self.world, self.world.rng, self.scheme
        size = rng.choice(scheme.sizes)
        is_common = rng.random() < 0.4
        iova = _canonical((rng.choice(world.common) if is_common else rng.getrandbits(64)) & -size, scheme.address_bits)
        gpa, extent = rng.choice(world.targets(self.guest))
        is_global = size <= 1 << 21 and not is_common and rng.random() < 0.15  # where no other space has a page
        if world.mapped(self.table, iova, gpa + rng.randrange(extent), size, is_first=True, g=is_global):
            self.add(iova)
            if is_global:
                world.global_pages.append((range(iova, iova + size), self))

    def add(self, iova):
        """Let pages of the mapping at ``iova`` be asked for."""
        mapping, rng = self.table.mappings[iova], self.world.rng
        inside = [(gpa, extent) for gpa, extent in self.world.targets(self.guest)
                  if gpa < mapping.spa + mapping.size and mapping.spa < gpa + extent]  # fmt: skip
        for _ in range(2 if mapping.size == 4096 else 8):
            gpa, extent = rng.choice(inside) if inside and rng.random() < 0.9 else (rng.getrandbits(62), 1)
            self.places.append(iova + (gpa + rng.randrange(extent) - mapping.spa) % mapping.size)


class _Device:
    """A device: its context, and where requests go, ``space`` without process directories and ``processes`` with them."""

    def __init__(self, world, device_id):
        rng, has = world.rng, world.features
        self.device_id, self.directory, self.space, self.processes = device_id, None, None, {}
        self.guest = guest = rng.choice([None, *world.guests]) if rng.random() < 0.6 or not world.guests else rng.choice(world.guests)
        context = DeviceContext(DTF=rng.random() < 0.2, SADE=world.SADE, GADE=world.GADE, **world.device_bits(guest))
        levels = [n for n, name in enumerate(("PD8", "PD17", "PD20"), 1) if name in has]
        if rng.random() < (0.6 if levels else 0.15):
            context = replace(context, PDTV=True, DPE=rng.random() < 0.5)
            if level := rng.choice([0, *levels * 3]):
                memory, allocator = (guest.view, guest.allocator) if guest else (world.memory, world.allocator)
                self.directory = ProcessDirectory(memory, allocator, levels=level, features=has)
                self.processes = {pid: world.space(guest) for pid in PIDS if not pid >> PID_BITS[level]}
                for pid in self.processes:
                    self.directory.set(pid, self.process(world, pid))
                context = replace(context, fsc_mode=level, fsc_ppn=self.directory.root >> 12)
        else:
            self.space = space = world.space(guest)
            context = replace(context, PSCID=space.PSCID, **space.fsc)
        self.context = guest.joined(context) if guest else context
        world.directory.set(device_id, self.context)

    def process(self, world, pid):
        """Return a good context of a process with its space."""
        space, rng = self.processes[pid], world.rng
        return ProcessContext(ENS=rng.random() < 0.7, SUM=rng.random() < 0.5, PSCID=space.PSCID, **space.fsc)

    def leads_to(self, pid):
        """Return the space of a request, or None for the one without a first stage."""
        if not self.context.PDTV:
            return self.space
        return self.processes.get(0 if pid is None and self.context.DPE else pid)


class World:
    """What software made of memory, at random, for an IOMMU with these capabilities; little-endian, no address space twice under one tag.

    Changes return the commands after which no old answer is allowed. [RVIOMMU1.0 7.3]

    Attributes
    ----------
    file_pages, notices : list
        Pages of interrupt files in memory, and for notices; with MSI_MRIF.
    planted : dict
        Address of an 8-byte word of a bad entry -> (kind, name) of what is wrong, as in ``decks``.
    """

    def __init__(self, rng, memory, allocator, capabilities, cards):
        self.rng, self.memory, self.allocator, self.decks = rng, memory, allocator, cards
        self.capabilities, self.features = capabilities, capabilities.switched_on()
        self.planted, self._undo, self._spoilt = {}, [], set()  # of process directories with bad pointers
        # The same numbers and addresses in each guest and the host.
        self.SADE, self.GADE = ("AMO_HWAD" in self.features and rng.random() < 0.6 for _ in range(2))  # so says every context
        self.common, self.common_gpas = ([rng.getrandbits(38) & -4096 for _ in range(6)] for _ in range(2))
        self.PSCIDs = [rng.randrange(1 << 18) << 2 | n for n in range(3)]
        self._bad_targets = [(rng.getrandbits(56) & -4096, 4096) for _ in range(8)]
        self.levels = rng.choice([1, 2, 3])
        guests = rng.choice([1, 2, 2, 3]) if capabilities.Sv39x4 else 0
        runs = [allocator.pages(512) if rng.random() < 0.3 else None for _ in range(guests)]  # before single pages scatter
        self.directory = DeviceDirectory(memory, allocator, levels=self.levels, extended=capabilities.MSI_FLAT, features=self.features)
        self.directory.defects = self.directory.defects | MORE_CONTEXT_DEFECTS
        self.file_pages = [allocator.page() for _ in range(FILE_PAGES if capabilities.MSI_MRIF else 0)]  # of interrupt files
        self.notices = [allocator.page() for _ in range(4)] if capabilities.MSI_MRIF else []
        for page in self.file_pages:
            memory.write(page, rng.randbytes(4096))
        self.guests = [_Guest(self, rng.choice([0, rng.randrange(1 << 14)]) << 2 | n, run) for n, run in enumerate(runs)]
        self._spaces, self._bare, self.global_pages = {guest: [] for guest in (None, *self.guests)}, {}, []
        self._recent = []  # (device, device_id, process_id, page) of what was asked for
        bits = self.directory.device_id_bits
        ids = list(dict.fromkeys([rng.randrange(1 << bits) if rng.random() < 0.7 else rng.randrange(40) for _ in range(28)]))
        self._ids, self.devices = set(ids), [_Device(self, number) for number in ids[:8]]
        self.bad = [copy(rng.choice(self.devices)) for _ in ids[8:]]
        for device, device.device_id in zip(self.bad, ids[8:]):
            self.directory.set(device.device_id, device.context)
        for device in self.bad:
            self._spoil_device(device.device_id)
        for guest in self._spaces:
            for space in self._spaces[guest]:
                self.spoil(space.table, "first stage", space)
        for guest in self.guests:
            self.spoil(guest.second, "second stage", guest)
            for file in guest.files[:3] if guest.messages else ():
                entry = memory.read(guest.messages.entry_address(file), 1)[0]
                if entry & 1:
                    self.plant("MSI entry" if entry & 6 == 6 else "MRIF entry",
                               lambda name, g=guest, f=file: g.messages.corrupt(f, name, self.features))  # fmt: skip
        for device in self.devices:
            if device.directory:
                for pid in rng.sample(found := list(device.processes)[2:], min(len(found), rng.choice([0, 1, 2]))):
                    level = rng.randrange(device.directory.levels) if pid > 0xFF else 0
                    if level:
                        self._spoilt.add(device.directory)
                    self.plant("PDT pointer" if level else "process context",
                               lambda name, d=device, p=pid, at=level: d.directory.corrupt(p, name, level=at or 1))  # fmt: skip

    # -- what the parts are made with --

    def targets(self, guest):
        """Return (address, bytes) of what a first stage may lead to."""
        return guest.targets if guest else self._bad_targets

    def mapped(self, table, address, to, size, *, is_first=False, **options):
        """Map a page, with random permissions unless ``options`` say which; False when it overlaps another."""
        rng = self.rng
        if any(one.iova < address + size and address < one.iova + one.size for one in table.mappings.values()):
            return False
        kinds = ["rwxu"] * 12 + ["rwu", "rwu", "ru", "rxu", "xu"] + (["rw", "rwx", "r"] if is_first else [])
        few = self.SADE if is_first else self.GADE
        chosen = {"perms": rng.choice(kinds), "a": rng.random() < (0.5 if few else 0.97), "d": rng.random() < (0.4 if few else 0.95),
                  "pbmt": rng.choice([0, 0, 1, 2]) if "Svpbmt" in self.features else 0}  # fmt: skip
        table.map_page(address, to & -size & (1 << 56) - 1, size=size, **chosen | options)
        return True

    def message_entry(self, **fields):
        """Return an MSI entry: a page anywhere or an interrupt file, some of them and of their notices out of reach."""
        rng = self.rng
        if not self.file_pages or rng.random() < 0.4:
            return MsiPte(spa=rng.getrandbits(56) & -4096, **fields)
        file = rng.choice(self.file_pages) + 512 * rng.randrange(8) if rng.random() < 0.85 else rng.getrandbits(56) & -512
        notice = rng.choice(self.notices) if rng.random() < 0.85 else rng.getrandbits(56) & -4096
        return MsiPte(mrif_address=file, notice_address=notice, nid=rng.getrandbits(11), **fields)

    def device_bits(self, guest):
        """Return fields of a context about what the device may send, and whether it is answered guest addresses."""
        rng = self.rng
        if not self.capabilities.ATS or rng.random() < 0.15:
            return {"EN_ATS": False, "EN_PRI": False, "PRPR": False, "T2GPA": False}
        may_send = rng.random() < 0.7
        return {"EN_ATS": True, "EN_PRI": may_send, "PRPR": may_send and rng.random() < 0.5,
                "T2GPA": bool(guest) and self.capabilities.T2GPA and rng.random() < 0.6}  # fmt: skip

    def space(self, guest):
        """Return an address space, new or one that others have."""
        rng, found = self.rng, self._spaces[guest]
        if rng.random() < 0.15:
            return self.bare(guest)
        scheme = rng.choice([scheme for scheme in (SV39, SV48, SV57) if scheme.name in self.features])
        if rng.random() < 0.06:  # with a guest: a page of its tables, one of its pages, or far away
            root = rng.choice([rng.getrandbits(56), rng.choice(self.targets(guest))[0]]) & -4096 & (1 << 56) - 1
            self.PSCIDs.append(self.PSCIDs[-1] + 1)
            return _Space(self, guest, scheme, self.PSCIDs[-1], root=root)
        if len(found) < 3:
            found.append(_Space(self, guest, scheme, self.PSCIDs[len(found)]))
            return found[-1]
        return rng.choice(found)

    def _some_space(self, guest):
        """Return an address space that there is."""
        return self.rng.choice([*self._spaces[guest], self.bare(guest)])

    def bare(self, guest):
        """Return the space without a first stage."""
        if guest not in self._bare:
            self._bare[guest] = _Space(self, guest, None, 0)
        return self._bare[guest]

    def _spoil_device(self, number):
        """Plant a defect in the context of a device, or in a pointer to it."""
        bits = 6 if self.capabilities.MSI_FLAT else 7
        alone = [level for level in range(1, self.levels)
                 if all(number >> bits + 9 * (level - 1) != one.device_id >> bits + 9 * (level - 1) for one in self.devices)]  # fmt: skip
        if alone and self.rng.random() < 0.4:
            self.plant("DDT pointer", lambda name: self.directory.corrupt(number, name, level=alone[0]))
        else:
            self.plant("device context", lambda name: self.directory.corrupt(number, name))

    # -- defects --

    def plant(self, kind, corrupt, fits=lambda name: True):
        """Let ``corrupt(name)`` plant the next defect of ``kind`` that ``fits``."""
        name = self.decks[kind].deal(fits)
        if name is None:
            return
        before, self.memory.journal = self.memory.journal, {}
        undo = corrupt(name)
        words, self.memory.journal = self.memory.journal, before
        if not words.keys().isdisjoint(self.planted):  # one defect in an entry says what is wrong
            undo()
            return
        for word in words:
            self.planted[word] = kind, name
        self._undo.append((words, undo))

    def mend(self):
        """Take one defect out; returns whether there was one."""
        if not self._undo:
            return False
        words, undo = self._undo.pop(self.rng.randrange(len(self._undo)))
        undo()
        for word in words:
            del self.planted[word]
        return True

    def spoil(self, table, kind, owner):
        """Plant defects in a table: pages of their own that are asked for, so that not all the others suffer."""
        rng, found = self.rng, table.defects
        for n in range(9):
            where = ("leaf", "superpage", "pointer")[n % 3]
            size = 4096 if where != "superpage" else rng.choice([size for size in table.scheme.sizes if size > SIZE_64K])
            page = rng.getrandbits(table.scheme.address_bits - (1 if kind == "first stage" else 0)) & -size
            if kind == "first stage":
                page = _canonical(page, table.scheme.address_bits)
            to = rng.choice(self.targets(owner.guest))[0] if kind == "first stage" else rng.getrandbits(56)
            if not self.mapped(table, page, to, size, perms="rwxu", a=True, d=True, pbmt=0):
                continue
            if kind == "first stage":
                owner.places += [page] * 2
            else:
                owner.targets.append((page, size))
                for space in (*self._spaces[owner], self.bare(owner)):
                    if space.table is None:
                        space.places += [page] * 2
                    else:
                        iova = _canonical(rng.getrandbits(64) & -4096, space.scheme.address_bits)
                        if self.mapped(space.table, iova, page, 4096, is_first=True):
                            space.places.append(iova)
            self.plant(kind, lambda name, p=page: table.corrupt(p, name), lambda name, w=where: found[name].where == w)
        for space in self._spaces[owner] * 2 if kind == "second stage" else ():  # pages of tables
            mapping = rng.choice(list(space.table.mappings.values()))
            place = space.table._slot(mapping.iova, space.scheme.level_of_size(mapping.size))
            if table._mapping(place).size == 4096 and place & -4096 != space.table.root:
                self.plant(kind, lambda name, p=place: table.corrupt(p & -4096, name),
                           lambda name: found[name].where == "leaf" and AccessType.READ in found[name].faults)  # fmt: skip

    # -- changes: each returns commands --

    def change(self, *, is_single=False):
        """Make a random change and return the commands for it; with ``is_single`` no more than one entry changes, at once."""
        kinds = [self._change_page] * 4 + [self._change_table] * 2 + [self._change_device] * 2
        if not is_single:
            kinds += [self._mend] + [self._new_page] * 3
        if self.guests:
            kinds += [self._change_guest_page] * 3 + [self._change_message]
        if self.capabilities.PD8 or self.capabilities.PD17 or self.capabilities.PD20:
            kinds += [self._change_process] * 2
        for _ in range(8):
            commands = self.rng.choice(kinds)(is_single)
            if commands is not None:
                return commands
        return []

    def everything(self):
        """Return commands after which nothing old is allowed."""
        return [IodirInvalDdt(), IotinvalVma(), *([IotinvalGvma()] if self.guests else [])]

    def _rewrite(self, table, mapping, to):
        """Let a mapped page be another, or none, with one store unless it is of 64 KiB; False when something is wrong with its entry."""
        at, count = table._slot(mapping.iova, table.scheme.level_of_size(mapping.size)), 16 if mapping.size == SIZE_64K else 1
        if self._places(table, at, count) & self.planted.keys():
            return False
        entry = self._entry(mapping, to, self.GADE if table in [guest.second for guest in self.guests] else self.SADE)
        for n in range(count):
            table.memory.write(at + 8 * n, entry)
        return True

    def _entry(self, mapping, to, is_updated):
        """Return a random entry for the size of ``mapping``; one of ten is not valid. With ``is_updated`` many have A or D clear."""
        rng, is_napot = self.rng, mapping.size == SIZE_64K
        flags = rng.choice(["rwxu"] * 5 + ["ru", "xu", "rwu"])
        new = PTE_V | PTE_G * mapping.is_global | sum(
            bit for letter, bit in zip("rwxu", (PTE_R, PTE_W, PTE_X, PTE_U)) if letter in flags)
        new |= PTE_A * (not is_updated or rng.random() < 0.5) | PTE_D * (rng.random() < (0.4 if is_updated else 0.9))
        new |= ((to & -mapping.size & (1 << 56) - 1) >> 12 | 8 * is_napot) << 10 | PTE_N * is_napot
        return (new if rng.random() < 0.9 else 0).to_bytes(8, "little")

    def _places(self, table, at, count):
        """Return where words of ``table`` are in memory."""
        places = {at + 8 * n for n in range(count)}
        return {table.memory.second_stage.spa_of(place) for place in places} if isinstance(table.memory, GuestView) else places

    def _used(self):
        """Return a recent request, the space and the mapping that it went to; or None for each."""
        for one in self.rng.sample(self._recent, len(self._recent)):
            device, _, pid, iova = one
            space = device.leads_to(pid)
            if space and space.table:
                try:
                    return one, space, space.table._mapping(iova)
                except ValueError:
                    continue
        return None, None, None

    def _change_page(self, is_single):
        rng, (one, space, mapping) = self.rng, self._used()
        if not mapping or (is_single and mapping.size == SIZE_64K):
            return None
        if not self._rewrite(space.table, mapping, rng.choice(self.targets(space.guest))[0]):
            return None
        self._ask_again(one)
        gscid = space.guest.GSCID if space.guest else None
        by_page = mapping.size != SIZE_64K and rng.random() < 0.6
        by_space = not mapping.is_global and rng.random() < 0.6
        page = mapping.iova + (rng.randrange(mapping.size) & -4096)
        return [IotinvalVma(page if by_page else None, space.PSCID if by_space else None, gscid)]

    def _change_table(self, is_single):
        """Let another table take the place of the last one to a page, with another page in it."""
        rng, (one, space, mapping) = self.rng, self._used()
        level = space.scheme.level_of_size(mapping.size) if space else 0
        if not space or level + 1 == space.scheme.levels or mapping.size == SIZE_64K or space.table.allocator.free_count < 16:
            return None
        table, memory = space.table, space.table.memory
        slot, pointer = table._slot(mapping.iova, level), table._slot(mapping.iova, level + 1)
        if (self._places(table, slot & -4096, 512) | self._places(table, pointer, 1)) & self.planted.keys():
            return None
        journal, self.memory.journal = self.memory.journal, None  # nobody knows of the new table yet
        new = table.allocator.page()
        memory.write(new, memory.read(slot & -4096, 4096))
        memory.write(new + slot % 4096, self._entry(mapping, rng.choice(self.targets(space.guest))[0], self.SADE))
        self.memory.journal = journal
        memory.write(pointer, (new >> 2 | PTE_V).to_bytes(8, "little"))
        self._ask_again(one)
        by_space = not mapping.is_global and rng.random() < 0.6
        return [IotinvalVma(pscid=space.PSCID if by_space else None, gscid=space.guest.GSCID if space.guest else None)]

    def _ask_again(self, one):
        """Let the next requests be more often this one, which something has changed for."""
        self._recent += [one] * 12

    def _gpas(self):
        """Yield recent requests, each with its guest and an address of it that was needed."""
        for one in self.rng.sample(self._recent, len(self._recent)):
            device, _, pid, iova = one
            space = device.leads_to(pid)
            if device.guest and (space is None or space.scheme is None):
                yield one, device.guest, iova
            elif device.guest and space.table:
                try:
                    mapping = space.table._mapping(iova)
                except ValueError:
                    continue
                if self.rng.random() < 0.4:
                    yield one, device.guest, space.table._slot(iova, space.scheme.level_of_size(mapping.size))
                yield one, device.guest, mapping.spa + iova - mapping.iova

    def _used_in_guest(self):
        """Return a recent request, its guest, and the mapping of the second stage for a page or a page of tables; or None for each."""
        for one, guest, gpa in self._gpas():
            try:
                return one, guest, guest.second._mapping(gpa)
            except ValueError:
                continue
        return None, None, None

    def _change_guest_page(self, is_single):
        rng, (one, guest, mapping) = self.rng, self._used_in_guest()
        if not guest or (is_single and mapping.size == SIZE_64K):
            return None
        if GUEST_POOL <= mapping.iova < GUEST_POOL + (GUEST_PAGES << 12):
            if not self._move(guest.second, mapping):
                return None
        elif not self._rewrite(guest.second, mapping, rng.getrandbits(56)):
            return None
        self._ask_again(one)
        by_page = mapping.size != SIZE_64K and rng.random() < 0.6
        return [IotinvalGvma(mapping.iova if by_page else None, guest.GSCID if rng.random() < 0.8 or by_page else None)]

    def _move(self, second, mapping):
        """Move a page of a guest's tables to another place; False when it has defects."""
        at = second._slot(mapping.iova, 0)
        if mapping.size != 4096 or at in self.planted or {*range(mapping.spa, mapping.spa + 4096, 8)} & self.planted.keys():
            return False
        to, journal = self.allocator.page(), self.memory.journal
        self.memory.journal = None  # nobody knows of the new place yet
        self.memory.write(to, self.memory.read(mapping.spa, 4096))
        self.memory.journal = journal
        second.mappings[mapping.iova] = replace(mapping, spa=to)
        pte = int.from_bytes(self.memory.read(at, 8), "little")
        self.memory.write(at, (pte & ~((1 << 44) - 1 << 10) | to >> 2).to_bytes(8, "little"))
        return True

    def _change_message(self, is_single):
        guest = self.rng.choice(self.guests)
        if not guest.messages:
            return None
        file = self.rng.choice(guest.files)
        if guest.messages.entry_address(file) not in self.planted:
            guest.messages.set(file, self.message_entry(V=self.rng.random() < 0.8))
        return [IotinvalGvma(file if self.rng.random() < 0.5 else None, guest.GSCID)]

    def _change_device(self, is_single):
        """[RVIOMMU1.0 7.3.1]"""
        rng, found = self.rng, [one for one in self._recent if one[0] in self.devices]
        if not found:
            return None
        device = (one := rng.choice(found))[0]
        if self.directory.entry_address(device.device_id) in self.planted:
            return None
        old = device.context
        if device.context.PDTV:
            device.context = replace(device.context, DTF=rng.random() < 0.3, DPE=rng.random() < 0.5)
        else:
            device.space = space = self._some_space(device.guest)
            device.context = replace(device.context, DTF=rng.random() < 0.3, PSCID=space.PSCID, **space.fsc)
        device.context = replace(device.context, **self.device_bits(device.guest))
        self.directory.set(device.device_id, device.context)
        self._ask_again(one)
        commands = [IodirInvalDdt(device.device_id if rng.random() < 0.8 else None)]
        if not device.guest:
            return [*commands, IotinvalVma(pscid=old.PSCID if not old.PDTV and old.fsc_mode else None)]
        return [*commands, IotinvalVma(gscid=device.guest.GSCID), IotinvalGvma(gscid=device.guest.GSCID)]

    def _change_process(self, is_single):
        """[RVIOMMU1.0 7.3.2]"""
        rng, found = self.rng, [one for one in self._recent if one[0] in self.devices and one[2] in one[0].processes]
        if not found:
            return None
        device, _, pid, _ = one = rng.choice(found)
        if device.directory in self._spoilt:
            return None
        at = device.directory.entry_address(pid)
        if (device.guest.second.spa_of(at) if device.guest else at) in self.planted:
            return None
        device.processes[pid] = self._some_space(device.guest)
        device.directory.set(pid, rng.choice([device.process(self, pid)] * 4 + [ProcessContext(V=False)]))
        self._ask_again(one)
        return [IodirInvalPdt(device.device_id, pid), IotinvalVma(gscid=device.guest.GSCID if device.guest else None)]

    def _mend(self, is_single):
        self.mend()
        return self.everything()

    def _new_page(self, is_single):
        """What was asked for and not there comes to be there: nothing of it can be cached. [RVIOMMU1.0 3.8]"""
        for one in self._recent:
            device, _, pid, iova = one
            space = device.leads_to(pid)
            if not space or not space.table or not space.scheme.accepts(iova) or space.table.allocator.free_count < 16:
                continue
            if self.mapped(space.table, iova, self.rng.choice(self.targets(space.guest))[0], 4096, is_first=True):
                self._ask_again(one)
                return []
        return None

    def spoil_word(self):
        """Let a word be poisoned or out of reach that was read not long ago; return commands as a change does."""
        rng, memory = self.rng, self.memory
        status, kind = rng.choice([BurstStatus.POISONED, BurstStatus.UR]), rng.choice(
            ["device", "process", "first", "second", *["file"] * (4 if self.file_pages else 1)])
        one, place, mapping, length = rng.choice(self._recent), None, None, 8
        if kind == "process":
            able = [one for one in self._recent if one[0].directory and one[0].directory not in self._spoilt]
            if able:
                device, _, pid, _ = one = rng.choice(able)
                place = device.directory.entry_address(pid if pid in device.processes else 0, rng.randrange(device.directory.levels))
                place = device.guest.second.spa_of(place) if device.guest else place
        elif kind == "file":
            if found := next((found for found in self._gpas() if found[1].messages and found[1].messages.holds(found[2])), None):
                one, place = found[0], found[1].messages.entry_address(found[2]) + rng.choice([0, 8])
                if self.file_pages and rng.random() < 0.7:
                    place, length = rng.choice(self.file_pages), 4096
        elif kind == "first" and (found := self._used())[0]:
            one, space, mapping = found
            place = space.table._slot(mapping.iova, rng.randrange(space.scheme.level_of_size(mapping.size), space.scheme.levels))
            place = space.guest.second.spa_of(place) if space.guest else place
        elif kind == "second" and (found := self._used_in_guest())[0]:
            one, guest, mapping = found
            place = guest.second._slot(mapping.iova, guest.scheme.level_of_size(mapping.size))
        if place is None:
            place = self.directory.entry_address(one[0].device_id, rng.randrange(self.levels))
        memory.mark(place, 128 if mapping and mapping.size == SIZE_64K else length, status)  # which of 16 equal entries is read is open
        self._ask_again(one)
        return self.everything()

    # -- counters --

    def selector(self):
        """Return a random selector of what counts: everybody's events, or those of a device, guest, process or address space there is."""
        rng, device, is_space = self.rng, self.rng.choice([*self.devices, *self.bad]), self.rng.random() < 0.5
        pid = rng.choice(self.PSCIDs) if is_space else rng.choice([*device.processes, 1])
        number = device.context.GSCID if is_space else device.device_id
        if is_masked := rng.random() < 0.3:  # what is below a bit, and the bit, which is 0, do not count
            number = number & -2 << (bit := rng.randrange(4)) | (1 << bit) - 1
        event, by_process, by_device = rng.choice([1, 1, *range(10)]), rng.random() < 0.4, rng.random() < 0.4
        return EventSelector(event, is_masked, pid, number, by_process, by_device, is_space)

    # -- requests --

    def focus(self, count):
        """Forget all but ``count`` recent requests."""
        self._recent = self.rng.sample(self._recent, min(count, len(self._recent)))

    def request(self, *, is_racing=False, is_focused=False):
        """Return (device, process or None, is supervisor, number in ``ASKED``, page address) of a request worth making.

        With ``is_racing`` for no global page, so that contexts may change under it; with ``is_focused`` a recent one.
        """
        rng, chance = self.rng, self.rng.random()
        if self._recent and rng.random() < (0.97 if is_focused else 0.5):
            device, number, pid, iova = rng.choice(self._recent)
            space = device.leads_to(pid) or self.bare(device.guest)
        else:
            device = rng.choice(self.bad if self.bad and chance < 0.15 else self.devices)
            number = rng.getrandbits(rng.choice([6, 8, 16, 24]))
            if chance < 0.98 or number in self._ids:
                number = device.device_id
            pid = rng.choice([None, *device.processes]) if rng.random() < 0.95 else rng.choice(PIDS)
            space = device.leads_to(pid) or self.bare(device.guest)
            iova = rng.choice(space.places) if space.places else rng.getrandbits(64)
            if rng.random() < 0.1:
                iova = rng.choice([*self.common, iova ^ 1 << rng.randrange(64), iova ^ 1 << rng.randrange(12, 20)])
            iova &= MASK64 & -4096
            self._recent = [*self._recent[-40:], (device, number, pid, iova)]
        kinds = rng.choice([UNTRANSLATED, TRANSLATED, ATS]) if self.capabilities.ATS else UNTRANSLATED
        if kinds is TRANSLATED and device.guest:
            found = next((gpa for _, guest, gpa in self._gpas() if guest is device.guest), None) if rng.random() < 0.6 else None
            gpa, size = rng.choice(device.guest.targets)
            iova = (gpa + rng.randrange(size) if found is None else found) & MASK64 & -4096
        # A page that is global in one space is not there, or another, in others: software must not ask for it.
        if any(iova in pages and (is_racing or owner is not space) for pages, owner in self.global_pages):
            return self.request(is_racing=is_racing)  # another
        return number, pid, rng.random() < 0.25, rng.choice(kinds), iova

    def message(self):
        """Return a page request or a stop marker."""
        rng = self.rng
        device = rng.choice(self._recent)[1] if rng.random() < 0.6 else rng.choice([*self.devices, *self.bad]).device_id
        if rng.random() < 0.02:
            device = rng.getrandbits(24)
        reads, writes, is_last, priv, is_exec = (rng.random() < 0.6 for _ in range(5))
        pid = rng.choice([None, *PIDS])
        return PageRequest(device, rng.getrandbits(52) << 12, rng.getrandbits(9), reads, writes, is_last, pid, priv, is_exec)

    def to_devices(self):
        """Return ATS commands."""
        rng = self.rng
        pid, segment, rid = rng.choice([None, rng.getrandbits(20)]), rng.choice([None, rng.getrandbits(8)]), rng.getrandbits(16)
        return [rng.choice([AtsPrgr(rid, rng.getrandbits(9), rng.getrandbits(4), pid, segment),
                            AtsInval(rid, rng.getrandbits(52) << 12, rng.random() < 0.5, rng.random() < 0.5, pid, segment)])
                for _ in range(rng.choice([1, 3, 12]))]  # fmt: skip


def _canonical(iova, bits):
    """Return ``iova`` with the bits above those that are translated as they must be."""
    return ((iova & (1 << bits) - 1) ^ 1 << bits - 1) - (1 << bits - 1) & MASK64


def _spread(number, mask):
    """Put the bits of ``number`` where ``mask`` has ones."""
    found = 0
    while mask:
        low = mask & -mask
        found, number, mask = found | (low if number & 1 else 0), number >> 1, mask ^ low
    return found
