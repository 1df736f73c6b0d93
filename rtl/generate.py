"""A card for somebody's own design: ``python -m ringwall.rtl.verilog --config card.toml --out folder``.

It writes, for a card of the name NAME: NAME.v, Verilog; NAME.h, what software finds where; NAME_ports.md, its ports; NAME.core, for
FuseSoC.
"""

import argparse
import re
import sys
from importlib.metadata import version
from pathlib import Path

from amaranth.hdl import Value
from amaranth.lib import data, stream, wiring

from .card_file import BadCard, example, read
from .config import IommuConfig
from .endpoint import descriptions_of, queues_of
from .function.description import MsixCapability, VirtioCapability
from .function.extended import SriovCapability
from .spec import riscv_iommu_registers, virtio
from .verilog import portable, ports_of, to_rtlil

__all__ = ["core_file", "files_of", "header", "main", "port_list", "ports"]

STORE = "ringwall_store"  # the module that a Verilog file may have beside the card's own
STRUCTURES = {virtio.CFG_COMMON: "COMMON", virtio.CFG_ISR: "ISR", virtio.CFG_DEVICE: "DEVICE", virtio.CFG_NOTIFY: "NOTIFY"}


# -- what software finds --


def devices_of(config):
    """Return what each function of the card is: its IOMMU's configuration, or a :class:`.virtio.device.Device`."""
    return (*((config.iommu,) if config.first_disk else ()), *config.all_devices)


def header(name, config):
    """Return the C header: IDs, BARs and what lies in them, of each function; each value as the RTL has it."""
    prefix = name.upper()
    lines = [
        f"/* {name}: made by python -m ringwall.rtl.verilog of ringwall {version('ringwall')}; change the card, not this file.",
        "   Offsets are bytes from the beginning of the BAR that is named with them. */",
        f"#ifndef {prefix}_H", f"#define {prefix}_H", "", f"#define {prefix}_FUNCTIONS {config.functions}",
    ]  # fmt: skip
    for number, (description, device) in enumerate(zip(descriptions_of(config), devices_of(config))):
        lines += ["", f"/* Function {number}: {type(device).__name__}{', virtual' if description.is_virtual else ''} */"]
        found = [*_function(description, device), *(_registers(config.iommu.bar, config.iommu) if _shares(config, number) else ())]
        lines += [f"#define {prefix}_F{number}_{key} {value}" for key, value in found]
    return "\n".join([*lines, "", "#endif", ""])


def _shares(config, number):
    """Return whether function ``number`` has, beside its own, the registers of an IOMMU without a function."""
    return number == 0 and config.iommu_bar is not None


def _registers(bar, iommu):
    """Yield names and values of the registers of ``iommu`` in ``bar``."""
    yield "REGISTERS_BAR", f"{bar}"
    for register in registers_of(iommu):
        yield register.name.upper(), f"0x{register.offset:03x} /* {register.width} bits, {register.access} */"


def _function(description, device):
    """Yield names and values of a function."""
    if not description.is_virtual:
        yield from (("VENDOR_ID", f"0x{description.vendor_id:04x}"), ("DEVICE_ID", f"0x{description.device_id:04x}"),
                    ("CLASS", f"0x{description.class_code:06x}"))  # fmt: skip
    for bar in description.bars:
        yield f"BAR{bar.index}_BYTES", f"0x{bar.size_bytes:x}"
    msix = description.capability(MsixCapability)
    yield from (("MSIX_VECTORS", f"{msix.vectors}"), ("MSIX_TABLE_BAR", f"{msix.table_bar}"), ("MSIX_TABLE", f"0x{msix.table_offset:03x}"),
                ("MSIX_PBA_BAR", f"{msix.pba_bar}"), ("MSIX_PBA", f"0x{msix.pba_offset:03x}"))  # fmt: skip
    sriov = description.capability(SriovCapability)
    if sriov is not None:
        yield "VIRTUAL_FUNCTIONS", f"{sriov.total}"
    if isinstance(device, IommuConfig):
        yield from _registers(description.bars[0].index, device)
        return
    for structure in description.capabilities:
        if isinstance(structure, VirtioCapability):
            kind = STRUCTURES[structure.cfg_type]
            yield from ((f"{kind}_BAR", f"{structure.bar}"), (kind, f"0x{structure.offset:04x}"),
                        (f"{kind}_BYTES", f"0x{structure.length:x}"))  # fmt: skip
            notify = structure if kind == "NOTIFY" else None
    yield "NOTIFY_MULTIPLIER", f"{notify.notify_multiplier}"
    sizes = queues_of(device)
    yield "QUEUES", f"{len(sizes)}"
    for n, size in enumerate(sizes):
        yield f"QUEUE{n}_SIZE", f"{size}"
        yield f"QUEUE{n}_DOORBELL", f"0x{notify.offset + n * notify.notify_multiplier:04x}"


def registers_of(iommu):
    """Return the registers that an IOMMU of the configuration ``iommu`` has, by offset. [RVIOMMU1.0 6.1]"""
    spec = riscv_iommu_registers
    found = [*spec.REGISTERS, *(one for name, those in spec.FEATURE_REGISTERS.items() if getattr(iommu, name) for one in those)]
    absent = {f"{kind}{n}" for kind in ("iohpmctr", "iohpmevt") for n in range(iommu.counters + 1, spec.MAX_COUNTERS + 1)}
    return sorted((register for register in found if register.name not in absent), key=lambda register: register.offset)


# -- ports --


def ports(card):
    """Return ``(name, "input" or "output", bits, what it is)`` of each port of the Verilog of ``card``, in order; all are of the clock clk.

    What it is says the docstring of whoever has the member: the card, or the back end of a device.
    """
    known, texts, found = ports_of(card), _members(type(card)), [
        ("clk", "input", 1, "Clock of all ports; its rising edge counts."),
        ("rst", "input", 1, "Synchronous reset: all becomes as at power-on. May stay 0: registers and memories have initial values."),
    ]  # fmt: skip
    outside = {f"{name}_{place.number}": (name, place) for place in card.endpoint.users for name in place.function.outside}
    for path, member, value in card.signature.flatten(card):
        name = "__".join(map(str, path))
        if name not in known:
            continue
        if path[0] in outside:
            inner, place = outside[path[0]]
            kind = type(place.function.back_end)
            text = f"Function {place.number}, {kind.__name__}: {_text_of(_members(kind), inner)}"
        else:
            text = _text_of(texts, path[0])
        is_stream = isinstance(getattr(card.signature.members[path[0]], "signature", None), stream.Signature)
        handshake = {"valid": "There is an item.", "ready": "It is taken, if there is one."}.get(path[-1]) if is_stream else None
        text = handshake or " ".join(filter(None, [text, _fields(member.shape)]))
        found.append((name, "input" if member.flow == wiring.In else "output", len(Value.cast(value)), text))
    return found


def _members(kind):
    """Return the texts of the section Members of a class's docstring, by the names (``*`` for any) that stand in front of them."""
    section = re.search(r"\n *Members\n *-+\n(.*?)(?=\n *\w+\n *---|\Z)", kind.__doc__ or "", re.DOTALL)
    texts, names = {}, []
    for line in section[1].splitlines() if section else ():
        if re.match(r"    \S", line):
            names = [name.strip() for name in line.strip().partition(" : ")[0].split(",")]
        elif line.strip():
            for name in names:
                texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


def _text_of(texts, name):
    """Return the text of ``name``, without marks of references."""
    text = next((text for key, text in texts.items() if re.fullmatch(re.escape(key).replace(r"\*", ".*"), name)), "")
    return re.sub(r":\w+:`\.?([^`]*)`", r"\1", text).replace("``", "").replace("|", "/")


def _fields(shape):
    """Return where the fields of a payload are, as text."""
    if not isinstance(shape, data.Layout) and not (isinstance(shape, type) and issubclass(shape, data.Struct)):
        return ""
    named = [(key, item.offset, item.width) for key, item in data.Layout.cast(shape)]
    return "Bits: " + ", ".join(f"{key} {low + width - 1}:{low}" if width > 1 else f"{key} {low}" for key, low, width in named) + "."


def port_list(name, card):
    """Return the document of the ports."""
    lines = [f"# Ports of `{name}`", "", "| port | direction | bits | clock | what it is |", "|---|---|---:|---|---|"]
    lines += [f"| `{port}` | {way} | {bits} | {'' if port == 'clk' else '`clk`'} | {text} |" for port, way, bits, text in ports(card)]
    return "\n".join([*lines, ""])


# -- FuseSoC, and all together --


def core_file(name):
    """Return the core description file: what FuseSoC knows the card by. [CAPI2 core]"""
    return f"""\
CAPI=2:

name: ringwall:card:{name}:{version("ringwall")}
description: "PCI Express endpoint with an IOMMU of its own and virtio devices behind it"

filesets:
  rtl:
    files:
      - {name}.v
    file_type: verilogSource
  software:
    files:
      - {name}.h: {{is_include_file: true}}
    file_type: cSource

targets:
  default:
    filesets: [rtl, software]
    toplevel: {name}
"""


def files_of(wanted, *, tell=lambda what: None):
    """Return the files of the card that ``wanted`` (a :class:`.card_file.CardFile`) asks for, ``{name: text}``; ``tell`` hears of progress.

    Raises
    ------
    :exc:`.card_file.BadCard`
        If it cannot be made.
    """
    name, config = wanted.name, wanted.config
    tell(f"elaborating {name}: {config.width} bits, functions: {', '.join(type(one).__name__ for one in devices_of(config))}")
    rtlil, listed = wanted.checked(lambda card: (to_rtlil(card, name), port_list(name, card)))
    tell("writing Verilog")
    return {
        f"{name}.v": portable(rtlil).replace(STORE, f"{name}_store"), f"{name}.h": header(name, config), f"{name}_ports.md": listed,
        f"{name}.core": core_file(name),
    }  # fmt: skip


def main(arguments=None):
    """Run the command; return its exit status: 0 files were written, 2 a setting that does not do."""
    parser = argparse.ArgumentParser(
        prog="python -m ringwall.rtl.verilog", description="Write a card as Verilog, for a design of your own.",
        epilog="Exit status: 0 written, 2 a setting that does not do.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="what the card is made of, in TOML; --example shows one")
    parser.add_argument("--out", metavar="FOLDER", help="where the files go: NAME.v, NAME.h, NAME_ports.md, NAME.core")
    parser.add_argument("--example", action="store_true", help="print a configuration with every parameter and its default, and end")
    given = parser.parse_args(arguments)
    if given.example:
        print(example())
        return 0
    if given.config is None or given.out is None:
        parser.error("--config and --out must both be there")

    def tell(what):
        print(what, file=sys.stderr, flush=True)

    try:
        wanted = read(Path(given.config).read_text(encoding="utf-8"))
        folder = Path(given.out)
        folder.mkdir(parents=True, exist_ok=True)
        files = files_of(wanted, tell=tell)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            tell(f"{folder / name}")
    except BadCard as error:
        tell(f"{given.config}: {error}")
        return 2
    except UnicodeDecodeError:
        tell(f"{given.config} must be text in UTF-8.")
        return 2
    except OSError as error:
        tell(f"{error.filename} must be a file or folder of yours: {error.strerror}.")
        return 2
    return 0
