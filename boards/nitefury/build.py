"""The Vivado project of the NiteFury II: ``python -m ringwall.boards.nitefury.build --out dir``."""

from functools import partial

from ..litefury.build import build_of, card_of, config_of, core_of
from ..litefury.build import files_of as litefury_files
from ..xilinx import main
from .platform import NiteFuryPlatform

__all__ = ["build", "card_of", "config_of", "core_of", "files_of"]

files_of = partial(litefury_files, platform=NiteFuryPlatform)


def build(folder, *, synthesize=True):
    """Write the project into ``folder``; return its result, sizes of the card as Yosys maps it if ``synthesize``."""
    return build_of(folder, "nitefury", NiteFuryPlatform, synthesize=synthesize)


if __name__ == "__main__":
    main(build, "ringwall.boards.nitefury.build")
