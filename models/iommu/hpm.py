"""Performance counters: which events a counter takes, and what happens when it overflows. [RVIOMMU1.0 6.19 to 6.23]

What counts as one walk is left open by the text; here it is one descent of one table from its root, and each second-stage
translation of a first-stage or directory address is one of its own. A miss needs a stage that translates. The registers are in
`registers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["IDT_EVENTS", "Event", "EventIds", "EventSelector"]


class Event(IntEnum):
    """eventID of iohpmevt. [RVIOMMU1.0 6.23]"""

    NONE = 0
    UNTRANSLATED_REQUEST = 1
    TRANSLATED_REQUEST = 2
    ATS_TRANSLATION_REQUEST = 3
    TLB_MISS = 4
    DDT_WALK = 5
    PDT_WALK = 6
    FIRST_STAGE_WALK = 7
    SECOND_STAGE_WALK = 8


IDT_EVENTS = frozenset({Event.TLB_MISS, Event.FIRST_STAGE_WALK, Event.SECOND_STAGE_WALK})  # may be filtered by GSCID and PSCID


@dataclass(frozen=True)
class EventIds:
    """Whose event it was; None where an ID is not valid."""

    device_id: int
    process_id: int | None = None
    gscid: int | None = None
    pscid: int | None = None


@dataclass(frozen=True)
class EventSelector:
    """One iohpmevt register, field by field; OF is not part of it. [RVIOMMU1.0 6.23]"""

    event: int = 0
    dmask: bool = False
    pid_pscid: int = 0
    did_gscid: int = 0
    pv_pscv: bool = False
    dv_gscv: bool = False
    idt: bool = False

    @property
    def value(self) -> int:
        """The register with OF = 0."""
        for name, value, width in (("eventID", self.event, 15), ("PID_PSCID", self.pid_pscid, 20), ("DID_GSCID", self.did_gscid, 24)):
            if not 0 <= value < 1 << width:
                raise ValueError(f"{name} must be an unsigned number of {width} bits, not {value!r}")
        return (self.event | self.dmask << 15 | self.pid_pscid << 16 | self.did_gscid << 36 | self.pv_pscv << 60
                | self.dv_gscv << 61 | self.idt << 62)

    @classmethod
    def from_value(cls, value: int) -> EventSelector:
        """Read a register."""
        return cls(value & 0x7FFF, bool(value >> 15 & 1), value >> 16 & 0xFFFFF, value >> 36 & 0xFFFFFF, bool(value >> 60 & 1),
                   bool(value >> 61 & 1), bool(value >> 62 & 1))

    def takes(self, event: Event, ids: EventIds) -> bool:
        """Tell whether this event is counted."""
        if event == Event.NONE or self.event != event or (self.idt and event not in IDT_EVENTS):
            return False
        process, device = (ids.pscid, ids.gscid) if self.idt else (ids.process_id, ids.device_id)
        if self.pv_pscv and process != self.pid_pscid:
            return False
        if not self.dv_gscv:
            return True
        # DMASK: the bits up to and including the lowest 0 do not count
        ignored = self.did_gscid ^ self.did_gscid + 1 if self.dmask else 0
        return device is not None and not (device ^ self.did_gscid) & ~ignored & 0xFFFFFF
