"""Explains how a RISC-V IOMMU translates an address, from an image of memory: ``python -m ringwall.models.iommu explain --help``."""

from __future__ import annotations

import argparse
import mmap
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ..memory import AccessFault, Iova
from .ats import AtsStatus, translation_completion
from .bulk import U64, translate_many, u64
from .entries import FIRST_STAGE
from .faults import AccessType, Cause, TranslationFault
from .registers import Capabilities
from .walk import UNTRANSLATED_SIZE, FirstStage, Implementation, Iommu, PlainRegisters, Request, RequestKind

__all__ = ["Dump", "main"]

DEFAULT = Capabilities(Sv48=True, Sv57=True, Svpbmt=True, Sv39x4=True, Sv48x4=True, Sv57x4=True, AMO_HWAD=True, ATS=True, T2GPA=True,
                       PD8=True, PD17=True, PD20=True)
MOST = 1 << 26  # addresses of --random
UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class Dump:
    """Files of memory at their addresses; what is written is kept in memory alone."""

    def __init__(self, files: list[tuple[Path, int]]):
        self._parts: list[tuple[int, mmap.mmap]] = []
        for path, base in files:
            with path.open("rb") as file:
                self._parts.append((base, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))

    def read(self, address: int, length: int) -> bytes:
        """Return bytes that one file holds; `AccessFault` when none does."""
        base, part = self._part(address, length, False)
        return part[address - base:address - base + length]

    def write(self, address: int, data: bytes) -> None:
        """Change bytes, in memory and not in the file."""
        base, part = self._part(address, len(data), True)
        part[address - base:address - base + len(data)] = data

    def _part(self, address: int, length: int, is_write: bool) -> tuple[int, mmap.mmap]:
        for base, part in self._parts:
            if base <= address and address + length <= base + len(part):
                return base, part
        raise AccessFault(address, length, is_write, "not in the image")


def number(text: str) -> int:
    """Read an unsigned number of at most 64 bits."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"must be a number of at most 64 bits, as 1234 or 0x4d2, not {text!r}")
    return value


def positive(text: str) -> int:
    """Read a count."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    return value


def many(text: str) -> int:
    """Read a count of addresses whose answers fit into memory, about 40 bytes each."""
    value = positive(text)
    if value > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, not {text!r}")
    return value


def image(text: str) -> tuple[Path, int]:
    """Read ``FILE`` or ``FILE@ADDRESS``."""
    name, separator, base = text.rpartition("@")
    path = Path(name if separator else text)
    if not path.is_file() or not path.stat().st_size:
        raise argparse.ArgumentTypeError(f"must be a file with something in it, not {str(path)!r}")
    return path, number(base) if separator else 0


def capabilities(text: str) -> Capabilities:
    """Read a value of the register, or names: those of fields with one bit."""
    try:
        if text[:1].isdigit():
            return Capabilities.from_value(number(text))
        names = [name for name in text.split(",") if name]
        return Capabilities(**{"Sv39": "Sv39" in names, **dict.fromkeys(names, True)})
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"must be a value of the register or names of its fields, not {text!r} ({error})") from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m ringwall.models.iommu", description="A golden model of the RISC-V IOMMU, version 1.0.")
    one = top.add_subparsers(dest="command", required=True, metavar="explain").add_parser(
        "explain", help="print each step of a translation and its end",
        description="Prints each step of a translation, with its section of the specification, and what becomes of the request. "
                    "Ends with 0 when it is let through, 1 when it is not, 2 when the command line is wrong.",
        epilog="Without --capabilities everything is assumed but MSI page tables, Sv32 and big-endian tables.")  # fmt: skip
    one.add_argument("--memory", type=image, action="append", required=True, metavar="FILE[@ADDRESS]",
                     help="image of memory, and the address of its first byte (0); may be given more than once")
    one.add_argument("--ddtp", type=number, required=True, help="value of the register: PPN << 10 | mode")
    one.add_argument("--device", type=number, required=True, help="device_id, 24 bits")
    one.add_argument("--iova", type=number, help="the address; with --random the first of the range")
    one.add_argument("--process", type=number, help="process_id, 20 bits")
    one.add_argument("--fctl", type=number, default=0, help="value of the register (0)")
    one.add_argument("--capabilities", type=capabilities, default=DEFAULT, metavar="VALUE|NAMES",
                     help="0x..., or names of fields that are 1, as Sv39,Sv39x4,MSI_FLAT")
    access = one.add_mutually_exclusive_group()
    access.add_argument("--write", action="store_true", help="the device writes (it reads otherwise)")
    access.add_argument("--exec", action="store_true", help="the device reads to execute")
    one.add_argument("--priv", action="store_true", help="with supervisor privilege; needs --process")
    kind = one.add_mutually_exclusive_group()
    kind.add_argument("--translated", action="store_true", help="the address was translated before (ATS)")
    kind.add_argument("--ats", action="store_true", help="a translation request; asks for write permission with --write")
    one.add_argument("--no-atomics", action="store_true", help="the unit may not send atomic requests")
    several = one.add_mutually_exclusive_group()
    several.add_argument("--bulk", type=Path, metavar="FILE", help="translate the 64-bit little-endian addresses of this file")
    several.add_argument("--random", type=many, metavar="N", help=f"translate N random addresses, at most {MOST}")
    one.add_argument("--span", type=positive, help="with --random: bytes from --iova on; by default all that the first stage translates")
    one.add_argument("--seed", type=number, default=0, help="with --random (0)")
    return top


def request_of(options: argparse.Namespace) -> Request:
    """Return the request that the options describe."""
    kind = RequestKind.ATS if options.ats else RequestKind.TRANSLATED if options.translated else RequestKind.UNTRANSLATED
    access = AccessType.EXEC if options.exec else AccessType.WRITE if options.write and not options.ats else AccessType.READ
    if options.priv and options.process is None:
        raise ValueError("--priv needs --process")
    return Request(options.device, Iova(options.iova or 0), access, options.process, options.priv, kind,
                   no_write=options.ats and not options.write)


def size_text(size: int) -> str:
    """Return 2 MiB for 2097152."""
    return "all addresses" if size == UNTRANSLATED_SIZE else next(f"{size // unit} {name}" for unit, name in UNITS if size >= unit)


def verdict(iommu: Iommu, request: Request) -> tuple[str, bool]:
    """Translate with a trace; return what became of it, and whether it was let through."""
    is_ats = request.kind is RequestKind.ATS
    try:
        found = iommu.translate(request, trace=True)
    except TranslationFault as fault:
        record = "recorded" if iommu.record(request, fault) else "not recorded (DTF)"
        text, is_good = f"{fault.cause.name} ({int(fault.cause)}), iotval {fault.iotval:#x}, iotval2 {fault.iotval2:#x}, {record}", False
    else:
        rights = "".join(name if has else "-" for name, has in (("r", found.readable), ("w", found.writable), ("x", found.executable)))
        where, is_good = f"SPA {found.spa:#x}", True
        if found.mrif is not None:
            where = f"interrupt file in memory at {found.mrif.address:#x}, notice {found.mrif.nid} to {found.mrif.notice_address:#x}"
        text = f"{where}, {size_text(found.size)}, {rights}, {('PMA', 'NC', 'IO')[found.pbmt]}" + ", global" * found.is_global
    text += f"; {iommu.last_read_count} table reads, {iommu.update_count} updates of A and D"
    if is_ats:
        completion = translation_completion(iommu, request)[0]
        rights = "".join(name if has else "-" for name, has in (
            ("r", completion.readable), ("w", completion.writable), ("x", completion.executable)))
        has_address = completion.readable or completion.writable
        text = (f"completion {completion.status.value}" + f", {rights}" * (completion.status is AtsStatus.SUCCESS)
                + f", {completion.address:#x}, {size_text(completion.size)}" * has_address + f"; {text}")
    return text, is_good


def addresses(options: argparse.Namespace, iommu: Iommu, request: Request) -> np.ndarray:
    """Return the IOVAs of --bulk or --random."""
    if options.bulk:
        raw = options.bulk.read_bytes()
        if not raw or len(raw) % 8:
            raise ValueError(f"File of --bulk must hold one or more addresses of 8 bytes, not {len(raw)!r} bytes")
        return np.frombuffer(raw, "<u8")
    span = options.span
    if span is None:
        walk = iommu.begin(request)
        try:
            plan = iommu.plan(walk)
        except TranslationFault:
            plan = None
        scheme = FIRST_STAGE[walk.context.SXL].get(plan.mode) if isinstance(plan, FirstStage) else None
        span = 1 << (scheme.address_bits - (scheme.pte_bytes == 8) if scheme else 39)
    span = min(span, (1 << 64) - request.iova)
    return np.random.default_rng(options.seed).integers(0, span, options.random, U64, endpoint=False) + u64(request.iova)


def bulk(iommu: Iommu, request: Request, iovas: np.ndarray) -> bool:
    """Translate all, print what became of them and how fast; tell whether all were let through."""
    begun = time.perf_counter()
    answers = translate_many(iommu, request, iovas)
    seconds = time.perf_counter() - begun
    found = Counter(answers.cause.tolist())
    for cause, count in sorted(found.items()):
        print(f"{count:12} {'translated' if not cause else f'{Cause(cause).name} ({cause})'}")
    for size, count in sorted(Counter(answers.size_log2[answers.cause == 0].tolist()).items()):
        print(f"{count:12} of them in {size_text(1 << size)}")
    print(f"{len(answers)} addresses in {seconds:.3f} s, {len(answers) / seconds:,.0f} per second; {answers.slow_count} step by step")
    return set(found) == {0}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    top = parser()
    options = top.parse_args(arguments)
    try:
        request = request_of(options)
        if options.iova is None and not options.bulk and not options.random:
            raise ValueError("one of --iova, --bulk and --random is needed")
        iommu = Iommu(Dump(options.memory), options.capabilities, registers=PlainRegisters(options.ddtp, options.fctl),
                      implementation=Implementation(gxl_writable=bool(options.fctl & 4), atomics=not options.no_atomics))
        if options.ddtp & 0xF > 4:
            raise ValueError(f"Mode of --ddtp must be 0 to 4, not {options.ddtp & 0xF}")
        if options.bulk or options.random:
            return 0 if bulk(iommu, request, addresses(options, iommu, request)) else 1
    except (OSError, ValueError, MemoryError) as error:
        top.error(str(error))
    text, is_good = verdict(iommu, request)
    for step in iommu.steps:
        print(step)
    print(f"verdict: {text}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
