"""The compiled IOMMU and the golden model, asked the same in random worlds: every answer, record, register and message is compared."""

import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..models.host import MemoryWrite
from ..models.host import run as run_software
from ..models.iommu.ats import AtsStatus, PageRequestQueue, TranslationCompletion, translation_completion
from ..models.iommu.commands import IofenceC, MessageCode, command_defects
from ..models.iommu.entries import PTE_A, PTE_D
from ..models.iommu.faults import Cause, FaultRecord, TransactionType, TranslationFault
from ..models.iommu.hpm import Event, EventIds, EventSelector
from ..models.iommu.msi import MrifFault, store_msi
from ..models.iommu.registers import OFFSET, Capabilities, CommandQueueStopped, IommuDriver, IommuMode, QueueCsr
from ..models.iommu.tables import Allocator
from ..models.iommu.unit import Unit
from ..models.iommu.walk import Iommu, Mrif, PlainRegisters, Request, RequestKind
from ..models.memory import AccessFault
from ..rtl.iommu.layouts import AtsStatus as Status
from ..rtl.iommu.layouts import Kind
from ..rtl.spec.riscv_iommu import MRIF_LOG2
from ..rtl.tlp.layouts import BurstStatus
from .compiled_iommu import ANSWER, PAGE_REQUEST, REQUEST, CompiledIommu, MarkedMemory
from .iommu_coverage import Coverage, refused_message, through, updated
from .iommu_decks import Deck, decks
from .iommu_worlds import ASKED, World

__all__ = ["Lockstep"]

BASE, SIZE, OWN = 0x8000_0000, 24 << 20, 1 << 20  # memory; the first part of it is that of queues and messages
PENDING_ARRAY = 0x400
COMPARED = ("ddtp", "cqb", "cqh", "cqt", "fqb", "fqh", "fqt", "cqcsr", "fqcsr", "ipsr", "icvec")
WIDE = ("ddtp", "cqb", "fqb", "icvec", "pqb")
PAGES = ("pqb", "pqh", "pqt", "pqcsr")  # with ATS
KINDS = {RequestKind.UNTRANSLATED: Kind.UNTRANSLATED, RequestKind.TRANSLATED: Kind.TRANSLATED, RequestKind.ATS: Kind.TRANSLATION}
REQUESTS = {RequestKind.UNTRANSLATED: Event.UNTRANSLATED_REQUEST, RequestKind.TRANSLATED: Event.TRANSLATED_REQUEST,
            RequestKind.ATS: Event.ATS_TRANSLATION_REQUEST}  # fmt: skip
FIELDS = {  # of ``REQUEST``, by number in ``ASKED``
    "access": [["read", "write", "exec"].index(access.value) for access, *_ in ASKED], "kind": [KINDS[kind].value for _, kind, *_ in ASKED],
    "writes": [kind is RequestKind.ATS and not no_write for _, kind, no_write, _ in ASKED], "is_CXL": [is_cxl for *_, is_cxl in ASKED],
}  # fmt: skip
MOST_OUTCOMES = 64
ROUNDS = 6  # in a world
WRITE = 1  # in ACCESS
FOCUSES = 4
ILLEGAL = 60  # commands
OVERFLOW_NEAR = 2000  # cycles
QUEUE_LOG2 = 12  # records
NO_MESSAGE = 1 << 31  # a dword that no interrupt file takes


class _Seen:
    """Memory as an IOMMU sees it: marks count; what it writes is kept in ``writes`` and goes nowhere.

    Bits that the other IOMMU has set are ``hidden`` (by the address of their words), so that a walk wants them set again.
    While ``choices`` is a list, a read of words that are in ``old`` brings, for each place in the list, what was there (1) or what is
    (0), 0 beyond its end; ``asked`` counts such reads.
    """

    def __init__(self, memory):
        self.memory, self.writes, self.old, self.choices, self.asked = memory, [], {}, None, 0
        self.hidden, self._is_latest = {}, False

    def read(self, address, length):
        memory = self.memory
        memory.check(address, length, False)
        found = memory.read(address, length)
        if self.choices is not None:
            words = [word for word in range(address & -8, address + length, 8) if word in self.old]
            if words:
                is_old = self.choices[self.asked] if self.asked < len(self.choices) else 0
                self.asked += 1
                if is_old:
                    whole = bytearray(found)
                    for word in words:
                        whole[word - address : word - address + 8] = self.old[word]
                    found = bytes(whole)
        if self._is_latest and length == 8 and found[7] >> 7:
            entry, group = int.from_bytes(found, "little"), np.frombuffer(memory.read(address & -128, 128), "<u8").tolist()
            for other in group:
                entry |= other if not (other ^ entry) & ~(PTE_A | PTE_D) else 0
            return entry.to_bytes(8, "little")
        if not self._is_latest and address in self.hidden:  # entries of page tables are read alone
            return (int.from_bytes(found, "little") & ~self.hidden[address]).to_bytes(length, "little")
        return found

    @contextmanager
    def latest(self):
        """Nothing is hidden, entries of 64 KiB have A and D of each other, since each may serve for all. [RVPRIV Svnapot]

        What is read and written meanwhile is forgotten.
        """
        asked, writes, self.asked, self.writes, self._is_latest = self.asked, self.writes, 0, [], True
        yield
        self.asked, self.writes, self._is_latest = asked, writes, False

    def write(self, address, data):
        self.memory.check(address, len(data), True)
        self.writes.append((address, bytes(data)))


class _Files:
    """Interrupt files as the model keeps them, in ``pages`` of ``memory``, whose marks count."""

    def __init__(self, memory, pages):
        self.memory, self.pages = memory, {page: bytearray(memory.read(page, 4096)) for page in pages}

    def read(self, address, length):
        self.memory.check(address, length, False)
        at = address % 4096
        return bytes(self.pages[address - at][at : at + length])

    def write(self, address, data):
        self.memory.check(address, len(data), True)
        at = address % 4096
        self.pages[address - at][at : at + len(data)] = data

    def differ(self):
        """Return the pages that are not as the IOMMU has made them."""
        return [page for page, content in self.pages.items() if self.memory.read(page, 4096) != content]


@dataclass(frozen=True)
class Outcome:
    """What a request may get.

    Not compared: ``rows`` of the coverage that it counts for, ``wanted``: (address, A and D to be set), ``events`` of an empty IOMMU.
    """

    cause: int = 0
    page: int = 0
    size: int = 0
    readable: bool = False
    writable: bool = False
    pbmt: int = 0
    iotval2: int = 0
    is_logged: bool = False
    mrif: Mrif | None = None
    is_silent: bool = False
    rows: tuple = field(default=(), compare=False)
    wanted: tuple = field(default=(), compare=False)
    events: tuple = field(default=(), compare=False)

    def refuses(self, answer, asked):
        """Say what is wrong with ``answer`` (an element of ``ANSWER``, as a tuple) to ``asked`` (a number in ``ASKED``), or return None."""
        page, _, _, cause, fault, readable, writable, size_log2, pbmt, stored, *_ = answer
        if self.cause:
            return None if fault and cause == self.cause else "another cause"
        if fault:
            return "a fault"
        if (self.mrif is not None) != (size_log2 == MRIF_LOG2):
            return "an interrupt file, or none"
        if self.mrif is not None:
            return "a permission" if readable or writable else None
        if stored:
            return "a message that is none"
        if page != self.page:
            return "another page"
        if pbmt != self.pbmt:
            return "another memory type"
        if readable > self.readable or writable > self.writable:
            return "a permission too many"
        if not (readable, writable, True)[FIELDS["access"][asked]]:
            return "not the permission asked for"
        return None if size_log2 >= 12 and self.size >> size_log2 else "another size"


@dataclass(frozen=True)
class Completed:
    """What a translation request may get: a completion of the golden model for the page at ``iova``; ``cause`` as is recorded, or 0.

    ``writable``: it may be, also where the completion says otherwise.
    """

    completion: TranslationCompletion
    writable: bool
    iova: int
    cause: int = 0
    iotval2: int = 0
    is_logged: bool = False
    rows: tuple = field(default=(), compare=False)
    wanted: tuple = field(default=(), compare=False)
    events: tuple = field(default=(), compare=False)

    mrif = None

    def refuses(self, answer, asked):
        """As of :class:`Outcome`."""
        answer, wanted = dict(zip(ANSWER.names, answer)), self.completion
        if Status(answer["status"]).name != wanted.status.name or answer["fault"] != (wanted.status is not AtsStatus.SUCCESS):
            return "another status"
        if answer["fault"]:
            return None
        for name in ("readable", "writable", "executable", "privileged"):
            if answer[name] != getattr(wanted, name) and not (name == "writable" and answer[name] and self.writable):
                return f"another {name}"
        if not wanted.readable and not wanted.writable:
            return None
        if answer["page"] != (wanted.address | self.iova & wanted.size - 1) >> 12:
            return "another page"
        if (answer["is_global"], answer["CXL_io"], answer["untranslated_only"]) != (
                wanted.is_global, wanted.cxl_io, wanted.untranslated_only):  # fmt: skip
            return "other attributes"
        return None if answer["size_log2"] >= 12 and wanted.size >> answer["size_log2"] else "another size"


class _Records:
    """A fault queue that only keeps what is reported."""

    def __init__(self):
        self.found = []

    def report(self, record):
        self.found.append(record)


class Lockstep:
    """An IOMMU and the model of one, in one random world after the other.

    Anything in which they differ raises AssertionError with what was asked.

    Parameters
    ----------
    unit : :class:`ringwall.rtl.iommu.unit.Iommu`
    rng : :class:`random.Random`

    Attributes
    ----------
    coverage : :class:`.iommu_coverage.Coverage`
    requests, walks, worlds : :class:`int`
        Compared; those of them that differ in device, process, privilege, access, page or the tables; and how often all began anew.
    """

    def __init__(self, unit, *, rng):
        self.rng = rng
        self.capabilities = Capabilities(**{name: bool(value) for name, value in unit.features.capabilities.items()})
        self.memory = MarkedMemory(BASE, SIZE)
        self.iommu = CompiledIommu(unit, self.memory, seed=rng.getrandbits(30))
        self.seen = _Seen(self.memory)
        self.golden = Unit(self.seen, self.capabilities, vectors=unit.vectors, queue_log2_max=unit.queue_log2_max,
                           reset_mode=IommuMode.OFF if unit.strict else IommuMode.BARE, counters=unit.features.counters)  # fmt: skip
        self.counters = unit.features.counters if unit.features.HPM else 0
        self.walker = Iommu(self.seen, self.capabilities, registers=PlainRegisters())
        self.own, self._page_faults = Allocator(self.memory, BASE, OWN), _Records()
        self._page_requests = PageRequestQueue(self.golden.registers, self.seen, self.golden.iommu, self._page_faults)
        hpm = [f"{name}{n}" for name in ("iohpmctr", "iohpmevt") for n in range(1, self.counters + 1)]
        hpm += ["iocountovf"] if self.counters else []
        self.compared = {name: OFFSET[name] for name in (*COMPARED, *(PAGES if self.capabilities.ATS else ()), *hpm)}
        self.driver = IommuDriver(0, self.memory, self.own, poll_cycles=8)
        self.decks, self._commands = decks(rng, self.capabilities), command_defects(self.capabilities.switched_on())
        self.coverage = Coverage(self.capabilities, self.decks)
        self.requests = self.walks = self.worlds = 0
        self.world, self.files = None, _Files(self.memory, ())
        self._ticked = None  # at which cycle the model's counter of cycles was right
        self._messages, self._troubles = self.own.page(), Deck(rng, ["illegal", "illegal", "commands", "fence", "records", "overflow"])
        self.run(self._begin())
        self.compare()

    def _begin(self):
        driver = self.driver
        if (yield from driver.read("capabilities")) != self.capabilities.value:
            raise AssertionError("capabilities are others than the model's")
        yield from driver.set_ddtp(IommuMode.OFF)
        yield from driver.enable_command_queue(6)
        yield from driver.enable_fault_queue(QUEUE_LOG2)
        if self.capabilities.ATS:
            self._pages_base = self.own.pages(4)

    def run(self, software):
        """Run software on the IOMMU; what it writes to registers, the model's registers get, too."""
        return run_software(software, self._perform)

    def _perform(self, operation):
        result = self.iommu.perform(operation)
        if isinstance(operation, MemoryWrite):
            self.golden.registers.write(operation.address, operation.size, operation.value)
            if self.golden.send_interrupts():
                self.iommu.settle()  # a message may fail, and its record raise the next
        return result

    def command(self, commands):
        """Submit ``commands`` and a fence, and wait for it."""
        self.run(self.driver.submit(commands))
        self.run(self.driver.fence())
        for one in commands:
            self.coverage.command(one)

    def _poke(self, name, value):
        """Write a register of the page-request queue, of both."""
        size = 8 if name in WIDE else 4
        self._perform(MemoryWrite(OFFSET[name], size, int(value)))

    def _run_commands(self):
        """Let the golden queue go on, where functions complete each invalidation when it is sent; compare the messages."""
        queue, sent = self.golden.commands, []
        while self.golden.run_commands() or queue.sent:
            for one in queue.sent:
                if one.code is MessageCode.INVALIDATION_REQUEST:
                    queue.invalidation_completed(one.rid, 1 << one.itag, 1, segment=one.segment)
            sent += queue.sent
            queue.sent.clear()
        _, messages = self.iommu.sent()
        found = [tuple(one[name].item() for name in ("code", "RID", "payload", "process", "segment")) for one in messages]
        wanted = [(int(one.code), one.rid, one.payload, -1 if one.pid is None else one.pid, -1 if one.segment is None else one.segment)
                  for one in sent]  # fmt: skip
        if found != wanted:
            raise AssertionError(f"Messages are {found}, not {wanted}")

    def pages(self, count):
        """Let devices send page requests; compare responses, and all that `compare` does."""
        messages = [self.world.message() for _ in range(count)]
        array = np.zeros(count, PAGE_REQUEST)
        for n, one in enumerate(messages):
            array[n] = (one.address >> 12, one.device_id, -1 if one.pid is None else one.pid, one.group, one.priv, one.is_exec, one.reads,
                        one.writes, one.is_last)  # fmt: skip
        self.iommu.send(array)
        self.iommu.settle()
        (responses, _), wanted = self.iommu.sent(), []
        for one in messages:
            if (response := self._page_requests.receive(one)) is not None:
                wanted.append((response.device_id, -1 if response.pid is None else response.pid, response.group, int(response.code)))
                self.coverage.met([f"group response {response.code.name}{'' if response.pid is None else ', PASID'}"])
        if (found := [tuple(map(int, one)) for one in responses.tolist()]) != wanted:
            raise AssertionError(f"Group responses are {found}, not {wanted}")
        self.coverage.met([f"page request, cause {int(one.cause)}" for one in self._page_faults.found])
        expected = Counter(one.pack() for one in self._page_faults.found)
        self._page_faults.found.clear()
        self._count(())
        self.compare(None, expected)
        csr, bits = self.golden.registers.pqcsr, {"pqmf": QueueCsr.MF, "pqof": QueueCsr.OF}
        self.coverage.met([f"pqcsr.{name}" for name, bit in bits.items() if csr & bit])
        if csr & (QueueCsr.MF | QueueCsr.OF) and self.rng.random() < 0.5:  # messages that come now are not taken either
            self.pages(2)
        self._poke("pqh", self.golden.registers.pqt)
        self._poke("pqcsr", csr & (QueueCsr.EN | QueueCsr.IE) | QueueCsr.MF | QueueCsr.OF)  # or its interrupt would come beside others
        self.run(self.driver.write("ipsr", 15))

    def page_queue(self):
        """Let the page-request queue be of another size, off, full or failing, and be mended."""
        rng, memory = self.rng, self.memory
        self._poke("pqcsr", 0)
        self.iommu.settle()
        log2 = rng.choice([1, 2, 5, 10])
        self._poke("pqb", self._pages_base >> 2 | log2 - 1)
        self.pages(3)
        self._poke("pqcsr", QueueCsr.EN | QueueCsr.IE)
        self.pages(10)
        memory.mark(self._pages_base, 4 * 4096, BurstStatus.UR)
        self.pages(4)
        memory.mark(self._pages_base, 4 * 4096, BurstStatus.OK)
        self.pages(4)
        self.pages(20)

    def __str__(self):
        counts = ", ".join(f"{getattr(self.iommu.counts, name)} {name}" for name, _ in self.iommu.counts._fields_)
        return f"{self.requests} requests, {self.walks} of them different, {self.worlds} worlds, {self.iommu.cycle} cycles: {counts}"

    # -- a run --

    def play(self, requests):
        """Compare ``requests`` more, or some above."""
        end = self.requests + requests
        while self.requests < end:
            self.worlds += 1
            try:
                self.new_world()
                for _ in range(ROUNDS):
                    self.select()
                    self.change()
                    self.exact(100)
                    self.race(60)
                    self.exact(100)
                for _ in range(FOCUSES):
                    self.focus()
                self.trouble()
                if self.capabilities.ATS:
                    self.page_queue()
                for _ in range(3):
                    self.command(self.world.spoil_word())
                    self.exact(40, most=2)
                    if self.capabilities.ATS:
                        self.pages(4)
            except AssertionError as error:
                error.add_note(f"in world {self.worlds}, cycle {self.iommu.cycle}, after {self.requests} requests")
                raise

    # -- its parts --

    def new_world(self):
        """Let software begin anew: another directory, other tables, other interrupts; caches are told of it."""
        rng, driver, memory = self.rng, self.driver, self.memory
        memory.mark(BASE, SIZE, BurstStatus.OK)
        for name, values in (("latency", (1, 8, 40)), ("jitter", (0, 8, 40, 200)), ("gaps", (0, 8, 200)), ("stalls", (0, 8, 100))):
            setattr(self.iommu.options, name, rng.choice(values))
        self.iommu.options.outstanding = rng.choice([1, 8, 64, 256])
        self.run(driver.set_ddtp(IommuMode.OFF))
        self.world = World(rng, memory, Allocator(memory, BASE + OWN, SIZE - OWN, rng=rng), self.capabilities, self.decks)
        self.files = _Files(memory, self.world.file_pages)
        others = rng.sample(range(4), 3)  # one message at a time of a vector
        registers = {"icvec": sum(vector << at for vector, at in zip((rng.randrange(4), *others), (0, 4, 8, 12)))}
        for vector in range(4):
            registers |= {f"msi_addr_{vector}": self._messages + 16 * vector if rng.random() < 0.9 else BASE - 16,
                          f"msi_data_{vector}": rng.getrandbits(32), f"msi_vec_ctl_{vector}": rng.random() < 0.2}  # fmt: skip
        for name, value in registers.items():
            self.run(driver.write(name, value))
        self.select()
        self.exact(20, most=1)  # Off
        self.command(self.world.everything())
        self.run(driver.set_ddtp(IommuMode.BARE + self.world.levels, self.world.directory.root))
        self.compare()

    def select(self):
        """Let the counters count something else, most of them about to overflow, many not for the first time."""
        rng, registers = self.rng, {}
        self.compare()
        for n in range(1, self.counters + 1):
            registers |= {f"iohpmevt{n}": self.world.selector().value | rng.getrandbits(1) << 63,
                          f"iohpmctr{n}": (1 << 64) - rng.choice([1, 50, 1 << 60])}  # fmt: skip
        if self.counters:
            registers |= {"iohpmcycles": rng.getrandbits(1) << 63 | (1 << 63) - rng.choice([10_000, 1 << 60]),
                          "iocountinh": rng.getrandbits(32) & rng.getrandbits(32)}  # fmt: skip
        for name, value in registers.items():
            self.run(self.driver.write(name, value))
        self._ticked = None
        self._tick()

    def change(self):
        """Let tables change, and invalidate what has changed."""
        commands = [one for _ in range(self.rng.choice([1, 1, 2, 3])) for one in self.world.change()]
        if self.rng.random() < 0.3:
            commands.append(IofenceC(address=self._messages + 256 + 4 * self.rng.randrange(64), data=self.rng.getrandbits(32)))
        if self.capabilities.ATS and self.rng.random() < 0.3:
            commands += self.world.to_devices()
        if commands:
            self.command(commands)

    def focus(self):
        """Change what a few requests need, again and again, while caches hold nothing else."""
        self.world.focus(self.rng.choice([1, 2, 3]))
        for _ in range(4):
            self.command(self.world.everything())
            self.race(8, is_focused=True)
            self.exact(6, is_focused=True)
            self.change()
            self.exact(6, is_focused=True)

    def exact(self, count, *, most=8, **options):
        """Compare ``count`` requests, about ``most`` for each page and access, with the walk of tables that do not change."""
        asked, array = self._drawn(count, most, **options)
        self.iommu.ask(array)
        answers, stores, updates = self._taken()
        outcomes = self._outcomes(asked, updates)
        # An update begins its walk anew; without AMO_HWAD a walk for many goes on behind what one of them may not.
        walks_more = self.world.SADE or self.world.GADE or not self.capabilities.AMO_HWAD
        self._count(asked, {} if walks_more else outcomes)
        self._judge(asked, array, answers, stores, lambda n, answer: [outcomes[asked[n]]])
        self._justify(updates, [outcomes.values()])
        with self.seen.latest():
            for address, bits in {one for outcome in outcomes.values() for one in outcome.wanted}:
                if bits & ~(found := int.from_bytes(self.seen.read(address, 8), "little")):
                    raise AssertionError(f"The entry at {address:#x} is {found:#x}, without {bits:#x}")

    def race(self, count, **options):
        """As `exact`, while one entry, or the mode, changes and is invalidated: who is answered meanwhile may get either."""
        rng, memory, driver = self.rng, self.memory, self.driver
        asked, array = self._drawn(count, 2, is_racing=True, **options)
        array["data"] = NO_MESSAGE  # to which of two files it would go is open
        self.iommu.ask(array)
        self.iommu.step(rng.randrange(1, rng.choice([40, 400]) + count))
        before = self.golden.registers.ddtp
        memory.journal = {}
        begun = self.iommu.cycle
        is_mode = rng.random() < 0.15
        if is_mode:
            self.run(driver.set_ddtp(rng.choice([IommuMode.OFF, IommuMode.BARE])))
        else:
            self.command(self.world.change(is_single=True))
        ended = self.iommu.cycle
        old, memory.journal = memory.journal, None
        answers, stores, updates = self._taken()
        news = self._outcomes(asked, updates)
        self.seen.old, self.seen.choices = old, [1] * 1000
        olds = self._outcomes(asked, updates, ddtp=before)
        self.seen.choices = None
        offs = self._outcomes(asked, updates, ddtp=IommuMode.OFF) if is_mode else {}  # the way to Bare leads through Off

        def allowed(n, answer):
            key, answered = asked[n], answer[2]
            if answered < begun:
                return [olds[key]]
            if answered >= ended:  # the fence waits for answers to who was there before it
                return [news[key]]
            found = [olds[key], news[key], *([offs[key]] if is_mode else self._mixed(key, old))]
            if found[0] != found[1]:
                is_new, is_old = (not side[key].refuses(answer, key[3]) for side in (news, olds))
                self.coverage.met(["race: as it is" if is_new else "race: as it was" if is_old else "race: mixed"])
            return found

        self._count(asked)
        self._judge(asked, array, answers, stores, allowed)
        self._justify(updates, itertools.chain([olds.values(), news.values()], (self._mixed(key, old) for key in dict.fromkeys(asked))))
        if is_mode:
            self.exact(40)
            self.run(driver.set_ddtp(IommuMode.BARE + self.world.levels, self.world.directory.root))

    def trouble(self):
        """Let a queue fail: illegal commands, a command that cannot be fetched, a record that cannot be written, too many records."""
        rng, driver, memory = self.rng, self.driver, self.memory
        kind = self._troubles.deal()
        if kind == "illegal":
            for _ in range(ILLEGAL):
                name = self.decks["command"].deal()
                self._stopped([self._commands[name]])
                self.coverage.met([("command", name)])
        elif kind in ("commands", "fence"):
            if kind == "commands":
                memory.mark(driver.cq_base, 4096, rng.choice([BurstStatus.UR, BurstStatus.POISONED]))
            self._stopped([IofenceC(address=BASE - 64)] if kind == "fence" else [])
        elif kind == "records":
            memory.mark(driver.fq_base, 32 << QUEUE_LOG2, BurstStatus.UR)
            self.exact(60)
            memory.mark(driver.fq_base, 32 << QUEUE_LOG2, BurstStatus.OK)
        else:
            self.run(driver.enable_fault_queue(rng.choice([1, 2, 4])))
            self.exact(100)
            self.exact(30)
            self.run(driver.enable_fault_queue(QUEUE_LOG2))
        self.compare()

    def _stopped(self, bad):
        """Let the command queue stop at one of the commands ``bad`` or one before, and go on."""
        try:
            self.run(self.driver.submit([*self.world.everything(), *bad]))
            self.run(self.driver.fence())
        except CommandQueueStopped as stopped:
            self.coverage.met([f"cqcsr.{'cqmf' if stopped.cqcsr & QueueCsr.MF else 'cmd_ill'}"])
        else:
            raise AssertionError(f"The command queue did not stop: {bad}")
        self.compare()
        self.memory.mark(self.driver.cq_base, 4096, BurstStatus.OK)
        self.run(self.driver.replace_stopped_command())
        self.run(self.driver.fence())

    # -- requests and what they may get --

    def _drawn(self, count, most, **options):
        """Return keys of ``count`` requests, and the array of them with random offsets."""
        rng = self.rng
        few = [self.world.request(**options) for _ in range(-(-count // rng.randrange(1, most + 1)))]
        asked = few + rng.choices(few, k=count - len(few))
        rng.shuffle(asked)
        device, process, privileged, access, iova = zip(*asked)
        array = np.zeros(count, REQUEST)
        array["device"], array["privileged"] = device, privileged
        for name, values in FIELDS.items():
            array[name] = np.take(values, access)
        array["process"] = [-1 if pid is None else pid for pid in process]
        offsets = [rng.choice([0, 0, 0, rng.getrandbits(12), 4 * rng.randrange(4)]) for _ in asked]
        array["iova"] = np.array(iova, "<u8") | np.array(offsets, "<u8")
        array["data"] = [rng.getrandbits(11) if rng.random() < 0.9 else rng.getrandbits(32) for _ in asked]
        return asked, array

    def _outcomes(self, asked, updates, *, ddtp=None):
        """Return the golden outcome of each request, as if the bits that ``updates`` have set were not set."""
        self.walker.registers.ddtp = self.golden.registers.ddtp if ddtp is None else ddtp
        self.seen.hidden = hidden = Counter()
        for _, address, compare, swap, found in updates.tolist():
            hidden[address] |= compare ^ swap if found == compare else 0
        found = {key: self._walk(key) for key in dict.fromkeys(asked)}
        self.walks += len(found)
        return found

    def _walk(self, key):
        device, pid, privileged, asked, iova = key
        access, *more = ASKED[asked]
        seen, request = self.seen, Request(device, iova, access, pid, privileged, *more)
        seen.asked, others, seen.writes = 0, seen.writes, []
        kind, outcome = self._completed(request) if request.kind is RequestKind.ATS else self._translated(request)
        wanted, seen.writes = seen.writes, others
        wanted = tuple([(address, int.from_bytes(data, "little") & (PTE_A | PTE_D)) for address, data in wanted])
        outcome["events"] = tuple(self.walker.events)
        if (self.world.SADE or self.world.GADE) and not outcome.get("writable", True):  # D may be there by now, for others
            with seen.latest():
                if kind is Completed:
                    outcome["writable"] = translation_completion(self.walker, request)[0].writable
                else:
                    outcome["writable"] = self.walker.translate(request).writable
        return kind(**outcome, wanted=wanted)

    def _completed(self, request):
        """Return the fields of what a translation request may get."""
        completion, record = translation_completion(self.walker, request)
        is_used = completion.status is not AtsStatus.SUCCESS or completion.readable or completion.writable
        rows = (f"completion {completion.status.value}{'' if is_used else ', no access'}",)
        cause = int(record.cause) if record else 0
        return Completed, {"completion": completion, "writable": completion.writable, "iova": request.iova, "cause": cause,
                           "is_logged": record is not None, "rows": rows}  # fmt: skip

    def _translated(self, request):
        """Return the fields of what any other request may get."""
        try:
            found = self.walker.translate(request, trace=True)
        except TranslationFault as fault:
            rows = self.coverage.rows(fault.cause, fault.iotval2, request.ttyp, self.walker.steps, self.world.planted)
            rows += updated(self.walker.steps)
            if not fault.is_logged:
                rows += ("no record: DTF",)
            return Outcome, {"cause": int(fault.cause), "iotval2": fault.iotval2, "is_logged": fault.is_logged, "rows": rows}
        rows = updated(self.walker.steps)
        if request.kind is RequestKind.TRANSLATED:
            rows += (f"translated request, {'looked up' if found.gpa is not None else 'passed'}",)
        if found.mrif is not None:
            return Outcome, {"mrif": found.mrif, "is_silent": self.walker.context.DTF, "rows": rows}
        rows += through(found.size), *([f"memory type {found.pbmt}"] * bool(found.pbmt)), *(["interrupt file"] * found.is_msi)
        return Outcome, {"page": found.spa >> 12, "size": found.size, "readable": found.readable, "writable": found.writable,
                         "pbmt": found.pbmt, "rows": rows}  # fmt: skip

    def _mixed(self, key, old):
        """Return what a walk may come to that finds each time it reads a changed entry what it was or what it is."""
        found, waiting = [], [[]]
        self.seen.old = old
        while waiting and len(found) < MOST_OUTCOMES:
            self.seen.choices = choices = waiting.pop()
            found.append(self._walk(key))
            taken = choices + [0] * (self.seen.asked - len(choices))
            waiting += [[*taken[:n], 1] for n in range(len(choices), self.seen.asked)]
        self.seen.choices = None
        return found

    # -- comparison --

    def _count(self, asked, outcomes=None):
        """Let the model's counters be what the others are: of each request they have one, of walks no more than with empty caches."""
        registers, least, most = self.golden.registers, Counter(), Counter()
        for key, count in Counter(asked).items() if self.counters else ():
            device, pid, _, way, _ = key
            for number in registers.counted([(REQUESTS[ASKED[way][1]], EventIds(device, pid))]):
                least[number] += count
                most[number] += count
            walks = [one for one in outcomes[key].events if one[0] not in REQUESTS.values()] if outcomes else []
            for number in registers.counted(walks):
                most[number] += count
        for n in range(1, self.counters + 1):
            event = EventSelector.from_value(registers.read(OFFSET[f"iohpmevt{n}"], 8)).event
            grown = self.iommu.access(OFFSET[f"iohpmctr{n}"], 8) - registers.read(OFFSET[f"iohpmctr{n}"], 8) & (1 << 64) - 1
            if not least[n] <= grown <= (most[n] if outcomes or event in REQUESTS.values() else grown):
                raise AssertionError(f"Counter {n} of event {event} has {grown} more, not {least[n]} to {most[n]}")
            for _ in range(grown):
                registers.advance(n)
            self.coverage.met([f"event {event} counted"] * bool(grown))

    def _taken(self):
        """Return what there was until nothing moves: answers, stores, updates."""
        self.iommu.settle()
        self._tick()
        self.iommu.settle()
        return self.iommu.take()

    def _tick(self):
        """Let the model's cycles be what went by, and none overflow soon."""
        registers, place, mask = self.golden.registers, OFFSET["iohpmcycles"], (1 << 63) - 1
        while self.counters:
            now, cycle = self.iommu.access(place, 8) & mask, self.iommu.cycle
            grown = now - registers.read(place, 8) & mask
            if self._ticked is None:
                registers.write(place, 8, now | registers.read(place, 8) & ~mask)
            elif grown != (expected := 0 if registers.read(OFFSET["iocountinh"], 4) & 1 else cycle - self._ticked):
                raise AssertionError(f"The counter of cycles has {grown} more, not {expected}")
            else:
                registers.tick(grown)
            self._ticked = cycle
            if mask - now > OVERFLOW_NEAR:
                return
            self.iommu.step(OVERFLOW_NEAR)

    def _justify(self, updates, sides):
        """Check that an outcome in ``sides``, of which no more than needed are looked at, wants each of ``updates`` that was done."""
        wanted, sides = Counter(), iter(sides)
        for _, address, compare, swap, found in updates.tolist():
            if address & -4096 in self.files.pages:
                continue
            if found != compare:
                self.coverage.met(["update: the entry has changed"])
                continue
            while swap ^ compare ^ (more := swap & ~compare) or more & ~wanted[address]:
                outcomes = next(sides, None)
                if outcomes is None:
                    raise AssertionError(f"The entry at {address:#x} became {swap:#x}, which nobody wants of {compare:#x}")
                for outcome in outcomes:
                    for place, bits in outcome.wanted:
                        wanted[place] |= bits

    def _judge(self, asked, array, answers, stores, allowed):
        """Compare answers, then all that `compare` does."""
        expected, doubtful = Counter(), []
        iovas, data, stored = array["iova"].tolist(), array["data"].tolist(), answers["stored"].tolist()
        for n, answer in enumerate(answers.tolist()):
            key, found = asked[n], allowed(n, answer)
            good = [one for one in found if not one.refuses(answer, key[3])]
            if not good:
                wrong = f"{found[0].refuses(answer, key[3])}: {dict(zip(answers.dtype.names, answer))}"
                raise AssertionError(f"{self._told(key)}: {wrong}, not {found}")
            self.coverage.met(good[0].rows)
            if good[0].mrif is not None and FIELDS["access"][key[3]] == WRITE and iovas[n] % 4 == 0:
                record, status = self._message(key, iovas[n], data[n], good[0])
                expected[record] += 1
                if stored[n] != 1 + status.value:
                    raise AssertionError(f"{self._told(key)}: a message ends with {stored[n]} - 1, not {status}")
            if any(one.cause for one in good):
                records = {self._record(key, iovas[n], one) for one in good}  # may differ while a race lasts
                if len(records) == 1:
                    expected[records.pop()] += 1
                else:
                    doubtful.append(records)
        self.requests += len(asked)
        del expected[None]
        self.compare(stores, expected, doubtful)

    def _message(self, key, iova, data, outcome):
        """Do what an aligned dword does to the file of ``outcome``; return the record, or None, and how it ends."""
        row, cause = "message recorded", None
        try:
            notice = store_msi(self.files, outcome.mrif, iova, data.to_bytes(4, "little"))
            if notice is None:
                row = "no message: ignored"
            else:
                self.seen.write(notice.address, notice.data.to_bytes(4, "little"))
        except MrifFault as fault:
            cause = fault.cause
            row = refused_message(cause)
        except AccessFault:
            row, cause = "notice out of reach", Cause.MRIF_ACCESS_FAULT
        self.coverage.met([row])
        if cause is None:
            return None, BurstStatus.OK
        return self._record(key, iova, Outcome(int(cause), is_logged=not outcome.is_silent)), BurstStatus.FAULT

    def _told(self, key):
        device, pid, privileged, access, iova = key
        return f"device {device:#x} process {pid} {'supervisor' if privileged else 'user'} {ASKED[access]} at {iova:#x}"

    @staticmethod
    def _record(key, iova, outcome):
        """Return the bytes of the record of a refused request, or None."""
        if not outcome.is_logged:
            return None
        device, pid, privileged, asked, _ = key
        access, *more = ASKED[asked]
        ttyp, iotval2 = Request(device, iova, access, pid, privileged, *more).ttyp, outcome.iotval2
        if outcome.cause in (20, 21, 23) and not iotval2 & 1:  # of the page itself: with its offset
            iotval2 |= iova & 0xFFC
        return FaultRecord(outcome.cause, ttyp, device, pid, pid is not None and privileged, iova, iotval2).pack()

    def compare(self, stores=None, expected=None, doubtful=()):
        """Compare records, what was written to memory, and registers; then take records out of the queue."""
        golden, driver, seen = self.golden, self.driver, self.seen
        if stores is None:
            _, stores, _ = self._taken()
        expected = Counter() if expected is None else expected
        queue = range(driver.fq_base, driver.fq_base + 32 * driver.fq_entries)
        written = [(int(one["address"]), one["data"].tobytes()[: one["length"]], int(one["status"])) for one in stores]
        records = [data for address, data, status in written if address in queue and status == BurstStatus.OK.value]
        ours = [data for data in records if FaultRecord.unpack(data).ttyp != TransactionType.NONE]
        left = Counter(ours)
        for choices in doubtful:
            found = next((one for one in choices if one is not None and left[one] > expected[one]), None)
            if found is None and None not in choices:
                raise AssertionError(f"No record of {[FaultRecord.unpack(one) for one in choices]}")
            if found is not None:
                expected[found] += 1
        surplus = left - expected
        if surplus:
            raise AssertionError(f"Records of nothing: {[FaultRecord.unpack(one) for one in surplus]}")
        self._run_commands()
        for record in map(FaultRecord.unpack, [*records, *(expected - left).elements()]):
            self.coverage.record(record)
            if record.ttyp == TransactionType.NONE:
                golden.send_interrupts()  # which makes the record
            else:
                golden.faults.report(record)
        golden.send_interrupts()

        def summed(writes):
            return Counter((address, data) if address not in queue else data for address, data in writes)

        if differing := self.files.differ():
            raise AssertionError(f"Interrupt files at {[hex(page) for page in differing]} differ")
        good = summed((address, data) for address, data, status in written
                      if status == BurstStatus.OK.value and address & -4096 not in self.files.pages)
        if good != (wanted := summed(seen.writes)):
            raise AssertionError(f"Written {good - wanted}, not {wanted - good}")
        seen.writes.clear()
        for name, offset in self.compared.items():
            size = 8 if name in WIDE or name.startswith("iohpm") else 4
            now, model = (side(offset, size) for side in (self.iommu.access, golden.registers.read))
            if now != model:
                raise AssertionError(f"{name} is {now:#x}, not {model:#x}")
        pending = self.iommu.access(PENDING_ARRAY, 8)
        if pending != sum(1 << vector for vector in golden.registers.pending):
            raise AssertionError(f"Pending messages are {pending:#x}, not {golden.registers.pending}")
        overflows = golden.registers.read(OFFSET["iocountovf"], 4) if self.counters else 0
        self.coverage.met(["overflow of an event counter"] * (overflows > 1) + ["overflow of the counter of cycles"] * (overflows & 1))
        self.coverage.met([f"fqcsr.{name}" for name in ("fqmf", "fqof") if getattr(golden.registers, name)])
        if records or golden.registers.fqof or golden.registers.fqmf:
            self.run(driver.read_faults())
        self.run(driver.write("ipsr", 15))  # what lasts raises its interrupt again
