"""Payloads of the streams around the transaction layer: TLP beats, bursts, burst data, burst ends."""

from functools import cache

from amaranth import unsigned
from amaranth.lib import data, enum

MAX_BURST_BYTES = 4096  # a burst never crosses a naturally aligned 4 KiB page [PCIe5 2.2.7]


def more(struct, **members):
    """Return the layout of a ``struct`` that has further members, behind its own."""
    return data.StructLayout({name: field.shape for name, field in data.Layout.cast(struct)} | members)


class BurstStatus(enum.Enum, shape=3):
    """How a burst ended, or what the gate decided about it."""

    OK = 0
    FAULT = 1  # refused by the IOMMU; nothing was sent
    UR = 2  # completion with Unsupported Request (or an unsupported completion status)
    CA = 3  # completion with Completer Abort
    TIMEOUT = 4  # no completion in time
    POISONED = 5  # completion with EP=1
    RESET = 6  # not sent, or given up: bus master off, function level reset, link down
    REFUSED = 7  # an AtomicOp that was not sent: not enabled, or not 4 or 8 bytes at a multiple of that


DIVERTED = BurstStatus.REFUSED  # verdict of a write, which no AtomicOp is: not sent; its dword goes to whoever records messages


class AtomicKind(enum.Enum, shape=2):
    """What a burst does to memory in one step. [PCIe5 6.15]"""

    NONE = 0
    FETCH_ADD = 1  # the operand is added
    SWAP = 2  # the operand is stored
    CAS = 3  # the second operand is stored if the first is what memory holds


class Header(data.Struct):
    """Decoded TLP header; fields that a type does not have are 0. [PCIe5 2.2]

    ``address`` is a byte address with bits 1:0 = 0; for configuration requests bits 11:2 are the register number; for messages header
    bytes 8 to 15 as one number.
    ``length_dw`` is 1..1024 for TLPs with a length, 0 for completions without data. ``byte_count`` is 1..4096.
    """

    fmt: unsigned(3)
    type: unsigned(5)
    tc: unsigned(3)
    id_based_ordering: unsigned(1)
    relaxed_ordering: unsigned(1)
    no_snoop: unsigned(1)
    digest: unsigned(1)  # TD
    poisoned: unsigned(1)  # EP
    at: unsigned(2)
    length_dw: unsigned(11)
    requester_id: unsigned(16)
    tag: unsigned(10)
    first_be: unsigned(4)
    last_be: unsigned(4)
    address: unsigned(64)
    completer_id: unsigned(16)  # configuration requests: the destination bus/device/function
    status: unsigned(3)
    byte_count_modified: unsigned(1)
    byte_count: unsigned(13)
    lower_address: unsigned(7)
    message_code: unsigned(8)


class Pasid(data.Struct):
    """What a PASID prefix says; without ``valid`` there is none. [PCIe5 6.20]"""

    valid: unsigned(1)
    value: unsigned(20)


@cache
def TlpBeat(width, has_pasid=False):
    """One beat of a TLP inside the card: the header travels beside the first data beat.

    ``data`` holds payload dwords from lane 0 up, lowest address in bits 7:0 of each; ``dword_count`` is the number of
    valid dwords of this beat (all but the last beat are full; 0 in the only beat of a TLP without payload).
    ``header`` is valid with ``first`` only. ``damaged`` counts with ``last``: what came is not as long as the header says, so nothing of
    the TLP must be used; only a link adapter sets it. With ``has_pasid`` there is a ``pasid``, valid with ``first`` only.
    """
    return data.StructLayout({
        "header": Header, "data": width, "dword_count": range(width // 32 + 1), "first": 1, "last": 1, "damaged": 1,
        **({"pasid": Pasid} if has_pasid else {}),
    })  # fmt: skip


def connect_beats(m, source, sink):
    """Connect two streams of TLP beats, of which one may have no PASIDs: those are lost, or there are none."""
    names = sink.p.shape().members.keys() & source.p.shape().members.keys()
    m.d.comb += [sink.valid.eq(source.valid), source.ready.eq(sink.ready), *(sink.p[name].eq(source.p[name]) for name in sorted(names))]


class Malformed(data.Struct):
    """A pulse: a malformed TLP came and was discarded.

    ``header``: as it came, first dword in bits 31:0, each as the specification draws it; dwords that it does not have are 0.
    """

    found: unsigned(1)
    header: unsigned(128)


class Burst(data.Struct):
    """A request to read or write up to one 4 KiB page; never crosses a 4 KiB boundary.

    ``address`` is an IOVA in front of the gate and physical behind it. ``verdict`` is OK in front of the gate; behind it
    a burst that the gate refused carries FAULT: it is never sent, and is answered in its client's order. A write of an aligned dword
    may carry ``DIVERTED``.
    ``epoch`` belongs to the gate.

    An AtomicOp is a read of its operand's size, 4 or 8 bytes, naturally aligned: its answer is what memory held before. Its operand, or
    both of CAS, comes in the client's write data from lane 0 up, wherever the address is.
    """

    address: unsigned(64)
    length_bytes: unsigned(13)  # 1..4096
    is_write: unsigned(1)
    is_wall: unsigned(1)  # class: the IOMMU's own access, physical, not counted by the gate
    function: unsigned(8)
    pasid_valid: unsigned(1)
    pasid: unsigned(20)
    relaxed_ordering: unsigned(1)
    no_snoop: unsigned(1)
    client: unsigned(6)  # whose data and end streams serve it
    cookie: unsigned(12)  # the client's own; returned unchanged
    verdict: BurstStatus
    epoch: unsigned(1)
    atomic: AtomicKind  # with ``is_write`` 0


# A burst behind the gate of a card with host ATS: with the address type of its requests, and NW of a translation request.
# [PCIe5 10.2.1, 10.2.2]
AddressedBurst = more(Burst, at=2, no_write=1)


def burst_layout(host_ats):
    """Return the layout of a burst behind the gate, with or without host ATS."""
    return AddressedBurst if host_ats else Burst


class Hint(data.Struct):
    """A page that a function will soon ask for: worth translating now, and of no consequence if not."""

    function: unsigned(8)
    is_write: unsigned(1)
    page: unsigned(52)  # IOVA bits 63:12


@cache
def BurstData(width):
    """One beat of a burst's data. **Lanes follow the address**: the byte at address A travels in lane A mod (width/8).

    ``keep`` has one bit per byte: contiguous; only the first beat may start above lane 0 and only the last may end below the
    top. ``cookie`` and ``status`` matter for read data only: ``cookie`` on each beat, ``status`` with ``last``. A read
    that failed ends in exactly one beat with ``last``; its data is then meaningless.
    """
    return data.StructLayout(
        {"data": width, "keep": width // 8, "first": 1, "last": 1, "cookie": 12, "status": BurstStatus}
    )


class BurstDone(data.Struct):
    """End of a write burst: everything sent later by the card is behind it in the one transmit order."""

    cookie: unsigned(12)
    status: BurstStatus


class BurstRetired(data.Struct):
    """A device-class burst is over (written out, all completions arrived, failed, refused or timed out)."""

    function: unsigned(8)
    epoch: unsigned(1)


class ConfigState(data.Struct):
    """What the transaction layer must know of one function's configuration space."""

    bus: unsigned(8)  # captured from configuration writes
    device: unsigned(5)
    memory_enable: unsigned(1)
    bus_master: unsigned(1)
    mps_code: unsigned(3)  # Max_Payload_Size = 128 << code
    mrrs_code: unsigned(3)  # Max_Read_Request_Size = 128 << code
    extended_tag: unsigned(1)
    relaxed_ordering: unsigned(1)  # enabled by the host
    no_snoop: unsigned(1)
    msix_enable: unsigned(1)
    msix_mask: unsigned(1)  # Function Mask
    in_reset: unsigned(1)  # a function level reset is under way
    ten_bit_tag: unsigned(1)
    timeout: unsigned(4)  # completion timeout value [PCIe5 7.5.3.16]
    timeout_disable: unsigned(1)
    atomics: unsigned(1)  # AtomicOps may be requested


class ConfigRequest(data.Struct):
    """One configuration access to one function."""

    function: unsigned(8)
    bus: unsigned(8)  # destination ID: captured by writes
    device: unsigned(5)
    register: unsigned(10)  # dword index
    is_write: unsigned(1)
    byte_enable: unsigned(4)
    data: unsigned(32)


class ConfigResponse(data.Struct):
    """Answer to a :class:`ConfigRequest`; ``unsupported`` asks for a UR completion (absent function)."""

    data: unsigned(32)
    unsupported: unsigned(1)


class Invalidation(data.Struct):
    """An Invalidate Request: ``function`` forgets translations. [PCIe5 10.3.1]

    ``is_range``: the low bits of ``page`` say how many pages; the range of 2 << n has n ones there.
    """

    function: unsigned(3)
    requester_id: unsigned(16)  # who is told of the end
    itag: unsigned(5)
    page: unsigned(52)
    is_range: unsigned(1)


class PageResponse(data.Struct):
    """A PRG Response: the page request ``index`` of ``function`` ended with ``code``. [PCIe5 10.4.2]"""

    function: unsigned(3)
    index: unsigned(9)
    code: unsigned(4)


def page_response_layout(has_pasid):
    """Return the layout of a :class:`PageResponse`, with ``has_pasid`` one that may have a PASID."""
    return more(PageResponse, pasid=Pasid) if has_pasid else PageResponse


class DecodeRequest(data.Struct):
    """Which BAR serves this memory address? (``address`` bits 2:0 = 0.)"""

    address: unsigned(64)


class DecodeResponse(data.Struct):
    """Function, BAR and offset that an address belongs to; ``hit`` = 0 asks for Unsupported Request of ``function``.

    ``claimed``: the address lies in a BAR of the function, though it may refuse.
    """

    hit: unsigned(1)
    claimed: unsigned(1)
    function: unsigned(8)
    bar: unsigned(3)
    offset: unsigned(32)  # bytes, bits 2:0 = 0
