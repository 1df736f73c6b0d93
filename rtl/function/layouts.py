"""Payloads and interfaces between the parts of functions: interrupts, settings, errors."""

from amaranth import unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = [
    "ErrorKind", "ErrorMessage", "ErrorReport", "FunctionSettings", "MsixRequest", "Operation", "UpdateBus", "UpdateRequest",
    "UpdateResponse", "VirtualBar",
]  # fmt: skip


class MsixRequest(data.Struct):
    """Send (or hold pending) MSI-X vector ``vector`` of ``function``."""

    function: unsigned(8)
    vector: unsigned(11)


class FunctionSettings(data.Struct):
    """What the host has set in capabilities that not every function has; 0 where the function has not."""

    is_d3hot: unsigned(1)  # only configuration accesses are served, nothing is sent [PCIe5 5.3.1.4.1]
    msi_enable: unsigned(1)
    msi_multiple: unsigned(3)  # log2 of the vectors that may be used
    msi_address: unsigned(64)
    msi_data: unsigned(16)
    msi_mask: unsigned(32)
    timeout: unsigned(4)  # completion timeout value [PCIe5 7.5.3.16]
    timeout_disable: unsigned(1)
    atomics: unsigned(1)  # AtomicOps may be requested
    ten_bit_tags: unsigned(1)
    ats_enable: unsigned(1)
    ats_stu: unsigned(5)  # smallest translation unit is 4096 << stu bytes
    pri_enable: unsigned(1)
    pri_reset: unsigned(1)  # pulse
    pri_allocation: unsigned(32)
    pasid_enable: unsigned(1)
    pasid_execute: unsigned(1)
    pasid_privileged: unsigned(1)
    request_redirect: unsigned(1)  # of ACS
    completion_redirect: unsigned(1)
    direct_translated: unsigned(1)
    vf_enable: unsigned(1)
    vf_memory_enable: unsigned(1)
    vf_count: unsigned(16)


class VirtualBar(data.Struct):
    """A BAR of virtual functions: that of the first is at ``base``, of each other behind the one in front of it. [PCIe5 9.2.1.1.1]

    Each takes ``SriovCapability.apertures(bar)[page]`` bits of address.
    """

    base: unsigned(64)
    page: unsigned(5)


class Operation(enum.Enum, shape=2):
    """What an :class:`UpdateRequest` does to its dword."""

    READ = 0
    SET = 1  # bits that are 1 in ``data``
    WRITE = 2


class UpdateRequest(data.Struct):
    """One access of the card itself to a dword of configuration space, whatever software may do with it.

    From one with ``is_last`` 0 to the next with ``is_last`` 1 software's accesses wait: all of them are one step. Whoever has begun
    goes on without waiting for anything but responses.
    """

    function: unsigned(8)
    register: unsigned(10)  # dword index
    operation: Operation
    data: unsigned(32)
    is_last: unsigned(1)


class UpdateResponse(data.Struct):
    """What the dword held in front of the update; 0 where there is none."""

    data: unsigned(32)


class UpdateBus(wiring.Signature):
    """Requests out, a response in for each (seen from the initiator). At most one request is outstanding."""

    def __init__(self):
        super().__init__({
            "request": Out(stream.Signature(UpdateRequest)),
            "response": In(stream.Signature(UpdateResponse)),
        })

    def __repr__(self):
        return "UpdateBus()"


class ErrorKind(enum.Enum, shape=7):
    """What can go wrong: a bit of AER's Uncorrectable Error Status, 32 + one of Correctable Error Status, 64 + one of Status.

    [PCIe5 7.8.4.2, 7.8.4.5, 7.5.1.1.4]
    """

    DATA_LINK = 4
    POISONED = 12
    FLOW_CONTROL = 13
    COMPLETION_TIMEOUT = 14
    COMPLETER_ABORT = 15
    UNEXPECTED_COMPLETION = 16
    OVERFLOW = 17
    MALFORMED = 18
    UNSUPPORTED = 20
    INTERNAL = 22
    RECEIVER = 32
    BAD_TLP = 32 + 6
    BAD_DLLP = 32 + 7
    REPLAY_ROLLOVER = 32 + 8
    REPLAY_TIMEOUT = 32 + 12
    CORRECTED_INTERNAL = 32 + 14
    RECEIVED_TARGET_ABORT = 64 + 12  # a completion with Completer Abort came
    RECEIVED_MASTER_ABORT = 64 + 13  # one with Unsupported Request


class ErrorReport(data.Struct):
    """Something went wrong in the name of ``function``, or of all functions where it belongs to none (``is_for_all``).

    ``header``: the TLP's, first dword in bits 31:0, each as the specification draws it; a fourth that it does not have is 0. Without a TLP
    it is 0; of an internal error that lost none, all ones. [PCIe5 6.2.4.2, 6.2.10]
    """

    function: unsigned(8)
    is_for_all: unsigned(1)
    kind: ErrorKind
    header: unsigned(128)


class ErrorMessage(data.Struct):
    """Send the message ``code`` (ERR_COR, ERR_NONFATAL or ERR_FATAL) to the root complex. [PCIe5 2.2.8.3]"""

    requester_id: unsigned(16)
    code: unsigned(8)
