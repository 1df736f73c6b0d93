"""The Vivado project of the Alveo U50: ``python -m ringwall.boards.alveo_u50.build --out dir``."""

from ...rtl.config import BlkConfig, EndpointConfig, IommuConfig
from ...rtl.endpoint import descriptions_of
from ...rtl.verilog import UltraScaleCard, convert
from .. import pcie4c
from ..xilinx import CARD, Top, build_project, main, project, report
from .platform import CONFIGURATION, AlveoU50Platform, AlveoU50x8Platform

__all__ = ["STATE", "build", "card_of", "config_of", "core_of", "files_of"]

BOARD = "alveo_u50"
PLATFORMS = {256: AlveoU50x8Platform, 512: AlveoU50Platform}
STATE = ("Alveo U50: project written by Ringwall, ports checked by Yosys. Never run through Vivado, not seen on hardware.\n"
         "To go on: vivado -mode batch -source top.tcl")  # fmt: skip


def config_of(width=256):
    """Return the card: a RISC-V IOMMU, and a disk of 1 MiB in block RAM."""
    return EndpointConfig(width=width, iommu=IommuConfig(entries=64), disks=(BlkConfig(capacity_sectors=2048),))


def card_of(config):
    """Return the :class:`..rtl.verilog.UltraScaleCard` that fits the core."""
    return UltraScaleCard(config, straddle=pcie4c.STRADDLE[config.width], max_payload=pcie4c.MAX_PAYLOAD)


def core_of(config):
    """Return the :class:`..xilinx.Core` that the card needs."""
    return pcie4c.core(config.width, descriptions_of(config), serial_number=config.serial_number)


def files_of(config, card, verilog):
    """Return the files of the project, by name; ``verilog`` is the text of the module of ``card``."""
    settings = [f"set_property {name} {value} [current_design]" for name, value in CONFIGURATION.items()]
    return project(PLATFORMS[config.width](), Top(card, core_of(config), levels={"hbm_cattrip": 0}), verilog,
                   add_constraints="\n".join(["set_false_path -from [get_ports pcie_0__perst_n__io]", *settings]))  # fmt: skip


def build(folder, *, synthesize=True, width=256):
    """Write the project into ``folder``; return its result, sizes of the card as Yosys maps it if ``synthesize``."""
    config = config_of(width)
    card = card_of(config)
    build_project(folder, files_of(config, card, convert(card, CARD)), STATE)
    configuration = f"RISC-V IOMMU and disk, {width} bits"
    return report(BOARD, configuration, "xcup", card) if synthesize else {"board": BOARD, "configuration": configuration}


if __name__ == "__main__":
    main(build, "ringwall.boards.alveo_u50.build", widths=tuple(PLATFORMS))
