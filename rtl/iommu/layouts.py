"""Payloads of the streams around the translation unit: translate, memory, drain."""

from amaranth import unsigned
from amaranth.lib import data, enum

from ..spec.riscv_iommu import MRIF_LOG2
from ..spec.riscv_iommu_registers import MessageCode, ResponseCode
from ..tlp.layouts import BurstStatus, more


class Kind(enum.Enum, shape=2):
    """What is asked. [RVIOMMU1.0 2.3]"""

    UNTRANSLATED = 0
    TRANSLATED = 1
    TRANSLATION = 2  # a translation request
    MESSAGE = 3  # whether the device may send page requests


class TranslateRequest(data.Struct):
    """Translate one 4 KiB page for one access. [RVIOMMU1.0 2.3, 3.3]"""

    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)
    privileged: unsigned(1)
    execute: unsigned(1)
    is_write: unsigned(1)
    is_prefetch: unsigned(1)  # fill the cache, answer nobody: no response, no fault record, dropped rather than waited for
    page: unsigned(52)  # IOVA bits 63:12
    offset: unsigned(12)  # IOVA bits 11:0, for iotval; and of a write, if the page is an interrupt file in memory
    cookie: unsigned(8)


class TranslateResponse(data.Struct):
    """Answer to a request that was no prefetch; answers come out of order, by cookie.

    ``size_log2`` of ``MRIF_LOG2`` without a fault: the page is an interrupt file in memory, of so many bytes, where nothing may be read or
    written, but an aligned dword that was to be written is handed over as a :class:`MrifWrite`. [RVIOMMU1.0 3.3.3]
    """

    cookie: unsigned(8)
    fault: unsigned(1)
    cause: unsigned(12)  # with fault [RVIOMMU1.0 4.2]
    page: unsigned(52)  # physical address bits 63:12
    readable: unsigned(1)
    writable: unsigned(1)
    size_log2: unsigned(6)  # 12, 16, 21, 30, ... of the translation used
    PBMT: unsigned(2)  # memory type that the page tables ask for: 0 as the platform says, 1 NC, 2 IO [RVPRIV 12]


def is_mrif(answer):
    """Return whether a :class:`TranslateResponse` names an interrupt file in memory."""
    return ~answer.fault & (answer.size_log2 == MRIF_LOG2)


class MrifTarget(data.Struct):
    """What the walker found about a page that is an interrupt file in memory, and who asked. [RVIOMMU1.0 3.3.3]"""

    cookie: unsigned(8)  # of the translation request
    address: unsigned(47)  # bits 55:9
    NPPN: unsigned(44)  # page of the notice, and its data
    NID: unsigned(11)
    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)
    privileged: unsigned(1)
    iotval: unsigned(64)  # the IOVA
    is_silent: unsigned(1)  # DTF: faults are not recorded
    is_translated: unsigned(1)  # the request was a translated one


class MrifWrite(data.Struct):
    """A dword that was to be written to an interrupt file in memory, byte 0 in bits 7:0."""

    cookie: unsigned(8)  # of the answer that said so
    data: unsigned(32)


class MrifDone(data.Struct):
    """End of a :class:`MrifWrite`: what it does can be seen by all, and so can its notice before anything that is sent later."""

    cookie: unsigned(8)
    status: BurstStatus


class AtsStatus(enum.Enum, shape=3):
    """How a translation request ends. [PCIe5 2.2.9]"""

    SUCCESS = 0
    UNSUPPORTED_REQUEST = 1
    COMPLETER_ABORT = 4


DwordRequest = more(TranslateRequest, is_dword=1)  # with ``is_dword``: to write a dword at a multiple of 4, as interrupts are


def request_layout(features):
    """Return the layout of a request: :class:`TranslateRequest`, or with ATS more of it.

    ``kind`` : what it is. A translation request reads; ``is_write``: it asks for write permission, too (NW is 0), ``execute``: for execute
    permission, too, which counts with a process_id only. ``is_CXL``: it is of a CXL device of type 1 or 2.
    """
    return more(TranslateRequest, kind=Kind, is_CXL=1) if features.ATS else TranslateRequest


def asked_layout(features):
    """Return the layout of a request on its way to the walker and back; ``is_again``: it was there and was given back, to be looked up."""
    return more(request_layout(features), is_again=1)


def response_layout(features):
    """Return the layout of an answer: :class:`TranslateResponse`, or with ATS more of it. [RVIOMMU1.0 3.6]

    ``kind`` is that of the request. Of a translation request: ``status``, with which ``fault`` is 0 for SUCCESS; R, W, Exe of the
    completion are ``readable``, ``writable``, ``executable``, without which ``page`` means nothing; the others are its Priv, Global,
    CXL.io, U. Its N and AMA are 0. ``PRPR`` is that of the device when it may send page requests.
    """
    if not features.ATS:
        return TranslateResponse
    return more(TranslateResponse, kind=Kind, status=AtsStatus, executable=1, privileged=1, is_global=1, CXL_io=1, untranslated_only=1,
                 PRPR=1)  # fmt: skip


class AtsMessage(data.Struct):
    """Message to a function: an invalidation request, or a group response that software made. [RVIOMMU1.0 4.1.4]"""

    code: MessageCode
    RID: unsigned(16)
    DSV: unsigned(1)
    DSEG: unsigned(8)  # 0 without DSV
    PV: unsigned(1)
    PID: unsigned(20)  # 0 without PV
    itag: unsigned(5)  # of an invalidation request
    payload: unsigned(64)  # bytes 8 to 15 of the message, as PAYLOAD of the command has them


class InvalidationCompletion(data.Struct):
    """Message of a function: of ``count`` (0: 8) for each ITag one has come."""

    RID: unsigned(16)
    DSV: unsigned(1)
    DSEG: unsigned(8)
    itags: unsigned(32)  # a bit for each
    count: unsigned(3)


class PageRequest(data.Struct):
    """Page request message, or stop marker: last, without reads and writes. [RVIOMMU1.0 4.3]"""

    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)
    privileged: unsigned(1)
    execute: unsigned(1)
    reads: unsigned(1)
    writes: unsigned(1)
    is_last: unsigned(1)
    group: unsigned(9)
    page: unsigned(52)


class GroupResponse(data.Struct):
    """Group response that the IOMMU itself makes. [RVIOMMU1.0 3.7]"""

    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)  # 0 without process_id_valid
    group: unsigned(9)
    code: ResponseCode


class MemoryRead(data.Struct):
    """The IOMMU's own read: 8..64 bytes, a multiple of 8, inside one aligned 64-byte block; physical address."""

    address: unsigned(64)
    length_bytes: unsigned(7)
    cookie: unsigned(8)


class MemoryUpdate(data.Struct):
    """Put ``swap`` where ``compare`` still is, in one step: 8 bytes at a multiple of 8; answered like a read, by what was there before."""

    address: unsigned(64)
    compare: unsigned(64)
    swap: unsigned(64)
    cookie: unsigned(8)


class MemoryReadData(data.Struct):
    """8 bytes of a read, ascending addresses; beats of two reads never mix. A failed read is one beat with ``last``."""

    cookie: unsigned(8)
    data: unsigned(64)
    status: BurstStatus  # with last
    last: unsigned(1)


class MemoryWrite(data.Struct):
    """One beat of the IOMMU's own write of 4..64 bytes inside an aligned 64-byte block; byte i of the write is in beat i//8.

    ``address``, ``length_bytes`` and ``cookie`` are valid on every beat.
    """

    address: unsigned(64)
    length_bytes: unsigned(7)
    cookie: unsigned(8)
    data: unsigned(64)
    last: unsigned(1)


class MemoryWriteDone(data.Struct):
    """End of a write: everything sent later by the card is behind it."""

    cookie: unsigned(8)
    status: BurstStatus


class FaultReport(data.Struct):
    """One fault that is to be recorded; whoever reports it has taken DTF of the device context into account. [RVIOMMU1.0 4.2]"""

    cause: unsigned(12)
    ttyp: unsigned(6)  # 0: no inbound transaction; then device and process are 0
    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)  # 0 without process_id_valid
    privileged: unsigned(1)  # 0 without process_id_valid
    iotval: unsigned(64)
    iotval2: unsigned(64)


class InvalidateKind(enum.Enum, shape=3):
    """Which caches an :class:`Invalidate` is about."""

    VMA = 0  # first-stage translations [RVIOMMU1.0 4.1.1]
    GVMA = 1  # second-stage translations, and what was made of them [RVIOMMU1.0 4.1.1]
    DDT = 2  # device contexts, and process contexts with them [RVIOMMU1.0 4.1.3]
    ALL = 3  # everything
    PDT = 4  # process contexts [RVIOMMU1.0 4.1.3]


class Invalidate(data.Struct):
    """Forget cached entries; operands without their valid bit are ignored. Forgetting more than asked is legal."""

    kind: InvalidateKind
    av: unsigned(1)
    page: unsigned(52)  # address bits 63:12
    pscv: unsigned(1)
    pscid: unsigned(20)
    gv: unsigned(1)
    gscid: unsigned(16)
    dv: unsigned(1)
    device_id: unsigned(24)


class Events(data.Struct):
    """What there is to count in a cycle, and whose it is. [RVIOMMU1.0 6.23]"""

    kinds: unsigned(9)  # bit n: event n
    device_id: unsigned(24)
    process_id_valid: unsigned(1)
    process_id: unsigned(20)
    PSCV: unsigned(1)
    PSCID: unsigned(20)
    GSCV: unsigned(1)
    GSCID: unsigned(16)
