"""What QEMU's trace events say that a guest did with a virtio-iommu, as requests and accesses; and how a device answers them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .iommu import IommuDevice
from .iommu_formats import TAIL_BYTES, Attach, Detach, Map, Probe, Request, Status, Unmap
from .iommu_rules import MSI_BYTES, Access

__all__ = ["Played", "Seen", "play", "read_trace"]

WRITE = 2  # of flag: what the access needs


@dataclass(frozen=True, slots=True)
class Seen:
    """An access, and where it went; a message is taken as one write of a dword."""

    access: Access
    phys: int


def read_trace(lines: Iterable[str], endpoints: Mapping[int, int] | None = None) -> list[Request | Seen]:
    """Return what ``lines`` tell, in their order; ``endpoints`` gives endpoints other numbers.

    An access without a line that says where it went was let through as it was, as QEMU does in the region of interrupts. Lines about
    other things are passed by.
    """
    found: list[Request | Seen] = []
    numbered = endpoints or {}
    for line in lines:
        name, _, rest = line.strip().partition(" ")
        told = {key: int(value, 0) for key, value in re.findall(r"(\w+)=\s*(0x[0-9a-f]+|\d+)\b", rest)}
        own = next((told[key] for key in ("endpoint", "dev", "rid") if key in told), 0)
        own = numbered.get(own, own)
        match name.removeprefix("virtio_iommu_"):
            case "fill_resv_property":
                found.append(Probe(own))
            case "attach":
                found.append(Attach(told["domain"], own))
            case "detach":
                found.append(Detach(told["domain"], own))
            case "map":
                found.append(Map(told["domain"], told["virt_start"], told["virt_end"], told["phys_start"], told["flags"]))
            case "unmap":
                found.append(Unmap(told["domain"], told["virt_start"], told["virt_end"]))
            case "translate":
                found.append(Seen(Access(own, told["addr"], bool(told["flag"] & WRITE), MSI_BYTES), told["addr"]))
            case "translate_out":
                access, phys = found[-1], int(re.findall(r"-> (0x[0-9a-f]+)", rest)[0], 16)
                if not isinstance(access, Seen) or f"{access.access.address:#x} ->" not in rest:
                    raise ValueError(f"Result must follow its access, not {line!r}")
                found[-1] = Seen(access.access, phys)
    return found


@dataclass
class Played:
    """How a trace went: requests and accesses by name, and what was not as recorded."""

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def play(events: Iterable[Request | Seen], device: IommuDevice) -> Played:
    """Let ``device`` answer what was recorded: each request OK, each access where it went."""
    played = Played()
    for event in events:
        name = type(event).__name__
        played.counts[name] = played.counts.get(name, 0) + 1
        if isinstance(event, Seen):
            one = event.access
            verdicts = device.translate(one.endpoint, one.address, one.is_write, one.length)
            if {verdict.phys for verdict in verdicts} != {event.phys}:
                played.problems.append(f"{event}: {', '.join(map(str, verdicts))}")
            continue
        room = TAIL_BYTES + (device.description.probe_size if isinstance(event, Probe) else 0)
        if device.execute(event.pack(), room)[-TAIL_BYTES:] != bytes([Status.OK, 0, 0, 0]):
            played.problems.append(f"{event}: not OK")
    return played
