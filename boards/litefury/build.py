"""The Vivado project of the LiteFury: ``python -m ringwall.boards.litefury.build --out dir``."""

from ...rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ...rtl.endpoint import descriptions_of
from ...rtl.verilog import Series7Card, convert
from .. import pcie7x
from ..xilinx import CARD, Top, build_project, main, project, report
from .platform import CONFIGURATION, TRANSCEIVERS, LiteFuryPlatform

__all__ = ["STATE", "build", "build_of", "card_of", "config_of", "core_of", "files_of"]

STATE = ("{}: project written by Ringwall, ports checked by Yosys. Never run through Vivado, not seen on hardware.\n"
         "To go on: vivado -mode batch -source top.tcl")  # fmt: skip


def config_of(width=128):
    """Return the card: a disk of 128 KiB in block RAM and its IOMMU, in one function; at 125 MHz (128 bits) or 250 MHz (64 bits)."""
    return EndpointConfig(width=width, iommu=IommuConfig(entries=64, walks=4, bar=4), disks=(BlkConfig(capacity_sectors=256),))


def card_of(config):
    """Return the :class:`..rtl.verilog.Series7Card`."""
    return Series7Card(config)


def core_of(config):
    """Return the :class:`..xilinx.Core` that the card needs."""
    (description,) = descriptions_of(config)
    return pcie7x.core(config.width, description, serial_number=config.serial_number)


def files_of(config, card, verilog, platform=LiteFuryPlatform):
    """Return the files of the project, by name; ``verilog`` is the text of the module of ``card``."""
    channel = "gt_wrapper_i/gtp_channel.gtpe2_channel_i"
    places = [f"reset_property LOC [get_cells -hierarchical -filter {{NAME=~pcie/*{channel}}}]"]
    places += [f"set_property LOC {place} [get_cells -hierarchical -filter {{NAME=~pcie/*pipe_lane[{lane}].{channel}}}]"
               for lane, place in enumerate(TRANSCEIVERS)]  # fmt: skip
    settings = [f"set_property {name} {value} [current_design]" for name, value in CONFIGURATION.items()]
    return project(platform(), Top(card, core_of(config), levels={"clkreq": 1}), verilog, script_after_synth="\n".join(places),
                   add_constraints="\n".join(["set_false_path -from [get_ports pcie_0__perst_n__io]", *settings]))  # fmt: skip


def build_of(folder, name, platform, *, synthesize, width=128):
    """Write the project of the board ``name`` into ``folder``; return its result."""
    config = config_of(width)
    card, configuration = card_of(config), f"RISC-V IOMMU and disk in one function, {width} bits"
    build_project(folder, files_of(config, card, convert(card, CARD), platform), STATE.format(name))
    return report(name, configuration, "xc7", card) if synthesize else {"board": name, "configuration": configuration}


def build(folder, *, synthesize=True):
    """Write the project into ``folder``; return its result, sizes of the card as Yosys maps it if ``synthesize``."""
    return build_of(folder, "litefury", LiteFuryPlatform, synthesize=synthesize)


if __name__ == "__main__":
    main(build, "ringwall.boards.litefury.build")
