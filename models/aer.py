"""What a function does when it finds an error: status bits, log, and the message that it sends. [PCIe5 6.2]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from .capabilities import EXT_AER, UNCORRECTABLE_FATAL

if TYPE_CHECKING:
    from .config_space import ConfigSpace

__all__ = ["Cause", "Correctable", "Message", "Uncorrectable", "report", "report_to_all"]


class Uncorrectable(IntEnum):
    """Bit numbers of Uncorrectable Error Status. [PCIe5 7.8.4.2]"""

    DATA_LINK_PROTOCOL, POISONED, FLOW_CONTROL, COMPLETION_TIMEOUT, COMPLETER_ABORT = 4, 12, 13, 14, 15
    UNEXPECTED_COMPLETION, RECEIVER_OVERFLOW, MALFORMED, ECRC, UNSUPPORTED_REQUEST, ACS_VIOLATION = 16, 17, 18, 19, 20, 21
    INTERNAL, MC_BLOCKED, ATOMIC_EGRESS, PREFIX_BLOCKED, POISONED_EGRESS = 22, 23, 24, 25, 26


class Correctable(IntEnum):
    """Bit numbers of Correctable Error Status. [PCIe5 7.8.4.5]"""

    RECEIVER, BAD_TLP, BAD_DLLP, REPLAY_ROLLOVER, REPLAY_TIMER, ADVISORY, INTERNAL, LOG_OVERFLOW = 0, 6, 7, 8, 12, 13, 14, 15


class Message(IntEnum):
    """Message codes. [PCIe5 2.2.8.3]"""

    ERR_COR, ERR_NONFATAL, ERR_FATAL = 0x30, 0x31, 0x33


MASTER_DATA_PARITY, SIGNALED_TARGET_ABORT, RECEIVED_TARGET_ABORT = 1 << 8, 1 << 11, 1 << 12  # Status [PCIe5 7.5.1.1.4]
RECEIVED_MASTER_ABORT, SIGNALED_SYSTEM_ERROR, DETECTED_PARITY = 1 << 13, 1 << 14, 1 << 15
PARITY_RESPONSE, SERR = 1 << 6, 1 << 8  # Command [PCIe5 7.5.1.1.3]


@dataclass(frozen=True)
class _Row:
    error: Uncorrectable | Correctable | None
    is_advisory: bool = False  # as long as its severity is non-fatal [PCIe5 6.2.3.2.4]
    status: int = 0  # bits of Status
    parity_status: int = 0  # those that need Parity Error Response


class Cause(Enum):
    """What happened to an endpoint, as a row of the table of errors. [PCIe5 6.2.7]"""

    UNSUPPORTED_NON_POSTED = _Row(Uncorrectable.UNSUPPORTED_REQUEST, True)
    UNSUPPORTED_POSTED = _Row(Uncorrectable.UNSUPPORTED_REQUEST)
    ABORTED_NON_POSTED = _Row(Uncorrectable.COMPLETER_ABORT, True, SIGNALED_TARGET_ABORT)
    ABORTED_POSTED = _Row(Uncorrectable.COMPLETER_ABORT, False, SIGNALED_TARGET_ABORT)
    UNEXPECTED_COMPLETION = _Row(Uncorrectable.UNEXPECTED_COMPLETION, True)
    COMPLETION_TIMEOUT = _Row(Uncorrectable.COMPLETION_TIMEOUT)
    RECEIVED_UR = _Row(None, False, RECEIVED_MASTER_ABORT)
    RECEIVED_CA = _Row(None, False, RECEIVED_TARGET_ABORT)
    POISONED_COMPLETION = _Row(Uncorrectable.POISONED, True, DETECTED_PARITY, MASTER_DATA_PARITY)
    POISONED_REQUEST = _Row(Uncorrectable.POISONED, True, DETECTED_PARITY)
    SENT_POISONED = _Row(None, False, 0, MASTER_DATA_PARITY)
    MALFORMED = _Row(Uncorrectable.MALFORMED)
    ECRC = _Row(Uncorrectable.ECRC)
    RECEIVER_OVERFLOW = _Row(Uncorrectable.RECEIVER_OVERFLOW)
    FLOW_CONTROL = _Row(Uncorrectable.FLOW_CONTROL)
    DATA_LINK_PROTOCOL = _Row(Uncorrectable.DATA_LINK_PROTOCOL)
    INTERNAL = _Row(Uncorrectable.INTERNAL)


def report(space: ConfigSpace, what: Cause | Uncorrectable | Correctable, header: Sequence[int] | None = None, *,
           is_advisory: bool | None = None) -> Message | None:  # fmt: skip
    """Log an error in ``space`` and return the message that must be sent for it, None for none. [PCIe5 6.2.5]

    Parameters
    ----------
    header : list of 3 or 4 :class:`int` or None
        Dwords of the TLP that is to blame, None when there is none.
    is_advisory : :class:`bool` or None
        Whether the function goes on, so that a non-fatal error is only advisory; None: as usual for the cause.

    Raises
    ------
    :exc:`ValueError`
        For an error that the function does not report, without a PCI Express capability, for a header that is none.
    """
    if header is not None and (len(header) not in (3, 4) or not all(0 <= dword < 1 << 32 for dword in header)):
        raise ValueError(f"A header must be three or four dwords, not {header!r}")
    pcie, aer = space.pcie, space.ext_place(EXT_AER)
    if pcie is None:
        raise ValueError("A function that reports errors must have a PCI Express capability")
    row = what.value if isinstance(what, Cause) else _Row(what)
    settings = space if space.physical is None else space.physical  # a virtual function has none of its own [PCIe5 9.3.5.4]
    aer_settings = settings.ext_place(EXT_AER)
    command, control = settings.read(4, 2), settings.read((settings.pcie or 0) + 8, 2)
    space.set_bits(6, 2, row.status | (row.parity_status if command & PARITY_RESPONSE else 0))
    if row.error is None:
        return None
    bit = 1 << row.error
    is_correctable = isinstance(row.error, Correctable)
    if aer is not None and not space.rw1c_bits(aer + (0x10 if is_correctable else 4)) & bit:
        raise ValueError(f"An error must be one that the function reports, not {row.error!r}")
    severity, mask, correctable_mask = UNCORRECTABLE_FATAL, 0, 0
    if aer is not None and aer_settings is not None:
        mask, severity, correctable_mask = (settings.read(aer_settings + at, 4) for at in (8, 12, 0x14))

    is_fatal = not is_correctable and bool(severity & bit)
    is_role_based = bool(space.read(pcie + 4, 4) >> 15 & 1)
    is_advisory = (row.is_advisory if is_advisory is None else is_advisory) and is_role_based and not is_correctable and not is_fatal
    is_unsupported = row.error is Uncorrectable.UNSUPPORTED_REQUEST
    is_unwanted = is_unsupported and not control & 8  # Unsupported Request Reporting Enable
    space.set_bits(pcie + 10, 2, (1 if is_correctable or is_advisory else 4 if is_fatal else 2) | is_unsupported << 3)

    if is_correctable or is_advisory:
        noted = bit if is_correctable else 1 << Correctable.ADVISORY
        if aer is not None:
            space.set_bits(aer + 0x10, 4, noted)
            if correctable_mask & noted:
                return None
            if is_advisory:
                _log(space, aer, row.error, header, bool(mask & bit))
        return Message.ERR_COR if control & 1 and not is_unwanted else None

    if aer is not None:
        _log(space, aer, row.error, header, bool(mask & bit))
        if mask & bit:
            return None
    has_serr = bool(command & SERR)
    if not has_serr and (is_unwanted or not control & (4 if is_fatal else 2)):
        return None
    if has_serr:
        space.set_bits(6, 2, SIGNALED_SYSTEM_ERROR)
    return Message.ERR_FATAL if is_fatal else Message.ERR_NONFATAL


def _log(space: ConfigSpace, aer: int, error: Uncorrectable, header: Sequence[int] | None, is_masked: bool) -> None:
    """Latch pointer and header at the first unmasked error, then set the status bit. [PCIe5 6.2.4.2]"""
    pointer, status = space.read(aer + 0x18, 4) & 0x1F, space.read(aer + 4, 4)
    if not is_masked and not status >> pointer & 1:
        space.replace_bits(aer + 0x18, 0x1F, error)
        space.has_header = header is not None
        for n, dword in enumerate([*(header or ()), 0, 0, 0, 0][:4]):
            space.replace_bits(aer + 0x1C + 4 * n, 0xFFFF_FFFF, dword)
    space.set_bits(aer + 4, 4, 1 << error)


def report_to_all(spaces: Sequence[ConfigSpace], what: Cause | Uncorrectable | Correctable,
                  header: Sequence[int] | None = None) -> dict[Message, set[int]]:  # fmt: skip
    """Log an error that is of no one function in every physical one; return for each message that must go out once who may send it.

    Virtual functions among ``spaces`` have no part in it. [PCIe5 6.2.4, 9.4.2]
    """
    found: dict[Message, set[int]] = {}
    for n, space in enumerate(spaces):
        if space.physical is not None:
            continue
        message = report(space, what, header)
        if message is not None:
            found.setdefault(message, set()).add(n)
    return found
