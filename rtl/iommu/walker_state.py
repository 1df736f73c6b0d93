"""What a walk is: its phases, its row, how it ends; and the walk at work, whose signals all parts of the walker share."""

from amaranth import Const, Mux, Signal
from amaranth.lib import data, enum

from ..spec import riscv_iommu as spec
from ..tlp.layouts import BurstStatus
from .contexts import context_layout
from .iotlb import entry_layout
from .layouts import Kind
from .walker_rules import Grant


class Phase(enum.Enum, shape=3):
    """What a walk waits for."""

    DIRECTORY = 0  # non-leaf entry of the device directory [RVIOMMU1.0 3.3.1]
    CONTEXT = 1
    FIRST = 2  # entry of a first-stage table [RVPRIV 10.3.2]
    SECOND = 3  # entry of a second-stage table
    PROCESS = 4  # non-leaf entry of a process directory [RVIOMMU1.0 3.3.2]
    PROCESS_CONTEXT = 5
    MSI = 6  # entry of an MSI page table [RVIOMMU1.0 3.3.3]
    LEAF = 7  # a purpose of SECOND only


# Causes of what may be wrong with an entry: it cannot be read, is not valid, is misconfigured, is poisoned. [RVIOMMU1.0 4.2]
DDT = spec.DDT_LOAD_FAULT, spec.DDT_NOT_VALID, spec.DDT_MISCONFIGURED, spec.DDT_CORRUPTED
PDT = spec.PDT_LOAD_FAULT, spec.PDT_NOT_VALID, spec.PDT_MISCONFIGURED, spec.PDT_CORRUPTED
MSI = spec.MSI_LOAD_FAULT, spec.MSI_NOT_VALID, spec.MSI_MISCONFIGURED, spec.MSI_CORRUPTED


def key_layout(features):
    """Return the layout of what two walks never have in common; a walk that may set A and D is for one kind of access."""
    return data.StructLayout({
        "device_id": 24, "page": 52, "process_id_valid": 1, **({"process_id": 20} if features.has_processes else {}),
        **({"is_write": 1, "execute": 1, "supervisor": 1} if features.AMO_HWAD else {}),
        **({"kind": Kind} if features.ATS else {}),
    })  # fmt: skip


def walk_layout(features):
    """Return the layout of a walk in flight.

    With AMO_HWAD: ``table`` is the page of the last access, ``is_updating`` says that it was an update and ``entry`` what that was to
    replace, ``failures`` counts updates that came too late. ``is_writing``: the second stage is asked, or was, whether the leaf table of
    the first may be written; ``skipped``: it was asked nothing about that table, which was a known one. With ATS ``is_global``: an entry
    that led to the leaf table of the first stage has G.
    """
    return data.StructLayout({
        "key": key_layout(features), "phase": Phase, "level": 3, "context": context_layout(features),
        **({"ENS": 1, "SUM": 1} if features.has_processes else {}),
        **({"purpose": Phase, "second_level": 3, "guest_page": 52, "first": Grant, "reach": 3, "G": 1, "PBMT": 2}
           if features.has_second_stage else {}),
        **({"table": 44, "is_updating": 1, "entry": 64, "failures": 3} if features.AMO_HWAD else {}),
        **({"is_writing": 1, "skipped": 1} if features.AMO_HWAD and features.has_second_stage else {}),
        **({"is_global": 1} if features.ATS else {}),
    })  # fmt: skip


class Waiter(data.Struct):
    """A request that waits for a walk."""

    cookie: 8
    is_write: 1
    execute: 1
    is_prefetch: 1
    process_id_valid: 1
    process_id: 20
    privileged: 1
    offset: 12


def waiter_layout(features):
    """Return the layout of a request that waits: :class:`Waiter`, or with ATS more of it."""
    if not features.ATS:
        return Waiter
    return data.StructLayout({name: field.shape for name, field in data.Layout.cast(Waiter)} | {"kind": Kind, "is_CXL": 1})


class Outcome(enum.Enum, shape=3):
    """How a walk, or a request without one, ends."""

    MAPPED = 0
    PAGE_FAULT = 1  # the cause follows the access
    ACCESS_FAULT = 2  # the cause follows the access
    FAULT = 3  # the cause is known
    GUEST_PAGE_FAULT = 4  # the cause follows the access


class Work:
    """The walk at work, the entry at work and what they come to: signals.

    Attributes
    ----------
    at, walk, context, key
        Number and row of the walk, and its members.
    stale, is_stale
        A bit per walk: an invalidation met it; that of this walk.
    demanded
        A bit per walk: it is not for prefetches alone.
    doublewords, status, entry, directory
        What was read, how the read ended, and how else its first doubleword is called.
    next_ppn
        Page of the next read; of a guest in front of BEGIN_SECOND.
    outcome, cause, mapped
        How the walk ends, and with what.
    first, second
        What the leaf of either stage grants.
    identity, is_msi, is_mrif
        The page is its own translation; it is one of an MSI page table; an interrupt file in memory.
    dtf
        Faults of the device are not recorded now.
    has_guest, is_second, page, level
        There is a second stage; it is at work; page that the stage at work translates, level of its table.
    """

    def __init__(self, walks, features):
        two_stages = features.has_second_stage
        self.features = features
        self.stale, self.demanded = Signal(walks), Signal(walks)
        self.at, self.walk = Signal(max((walks - 1).bit_length(), 1)), Signal(walk_layout(features))
        walk = self.walk
        self.context, self.key = walk.context, walk.key
        self.is_stale = self.stale.bit_select(self.at, 1)
        self.doublewords = [Signal(64, name=f"doubleword_{n}") for n in range(8 if features.MSI_FLAT else 4)]
        self.status = Signal(BurstStatus)
        self.entry, self.directory = spec.PageTableEntry(self.doublewords[0]), spec.DirectoryEntry(self.doublewords[0])
        self.next_ppn = Signal(52 if two_stages else 44)
        self.outcome, self.cause, self.mapped = Signal(Outcome), Signal(12), Signal(entry_layout(features))
        self.first = walk.first if two_stages else Signal(Grant)
        self.second = Signal(data.StructLayout({"readable": 1, "writable": 1, "executable": 1}))
        self.identity, self.is_msi, self.dtf = Signal(), Signal(), Signal()
        self.is_mrif = Signal() if features.MSI_MRIF else Const(0, 1)
        self.has_guest = self.context.guest_mode != spec.MODE_BARE if two_stages else Const(0, 1)
        self.is_second = walk.phase == Phase.SECOND if two_stages else Const(0, 1)
        self.page = Mux(self.is_second, walk.guest_page, self.key.page) if two_stages else self.key.page
        self.level = Mux(self.is_second, walk.second_level, walk.level) if two_stages else walk.level

    def fail(self, kind, number=0):
        """Return assignments that let the walk end as ``kind``."""
        return [self.outcome.eq(kind), self.cause.eq(number)]

    def refuse(self, m, causes, is_valid, is_bad):
        """End the walk if what was read is of no use; what becomes of it otherwise is the caller's ``m.Else()``."""
        load_fault, not_valid, misconfigured, corrupted = causes
        m.next = "END_WALK"
        with m.If(self.status == BurstStatus.POISONED):
            m.d.sync += self.fail(Outcome.FAULT, corrupted)
        with m.Elif(self.status != BurstStatus.OK):
            m.d.sync += self.fail(Outcome.FAULT, load_fault)
        with m.Elif(~is_valid):
            m.d.sync += self.fail(Outcome.FAULT, not_valid)
        with m.Elif(is_bad):
            m.d.sync += self.fail(Outcome.FAULT, misconfigured)

    def access(self, m):
        """Read at ``next_ppn``, which is a guest's with a second stage."""
        m.next = "READ"
        if self.features.has_second_stage:
            with m.If(self.has_guest):
                m.next = "BEGIN_SECOND"
