"""Pins of the NiteFury II: those of the LiteFury; see there for their source."""

from ..litefury.platform import LiteFuryPlatform

__all__ = ["NiteFuryPlatform"]


class NiteFuryPlatform(LiteFuryPlatform):
    """An M.2 card with an Artix-7 200T, four lanes at 5 GT/s."""

    device, package, speed = "xc7a200t", "fbg484", "2"
