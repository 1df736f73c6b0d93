"""Which malformed entry comes next: each of the golden model's defects by its name, until all have been met."""

from ..models.iommu.commands import command_defects
from ..models.iommu.defects import (
    DDTE_DEFECTS,
    PDTE_DEFECTS,
    DirectoryDefect,
    device_context_defects,
    msi_pte_defects,
    process_context_defects,
    pte_defects,
)

__all__ = ["MORE_CONTEXT_DEFECTS", "Deck", "decks"]

# Two checks of a device context that need more than one field to be wrong. [RVIOMMU1.0 3.1.4]
MORE_CONTEXT_DEFECTS = {
    "TC_T2GPA_SET_IOHGATP_BARE": DirectoryDefect(lambda dwords: [dwords[0] | 8, 0, *dwords[2:4], *([0] * 4)[: len(dwords) - 4]], check=7),
    "TC_SXL_SET_IOSATP_MODE_8": DirectoryDefect(
        lambda dwords: [dwords[0] & ~0x220 | 0x800, *dwords[1:3], dwords[3] & ~(0xF << 60) | 8 << 60, *dwords[4:]], check=11),
}  # fmt: skip


class Deck:
    """Names of defects, dealt in random order: those that nothing has ``met`` yet before the others, each once before one comes again."""

    def __init__(self, rng, names):
        self.rng, self.names, self.met, self._left = rng, list(names), set(), []

    def deal(self, fits=lambda name: True):
        """Return the next name that ``fits``, or None."""
        for more in ((), [name for name in self.names if name not in self.met], self.names):
            self._left += self.rng.sample(more, len(more))
            for n, name in enumerate(self._left):
                if fits(name):
                    return self._left.pop(n)
        return None


def decks(rng, capabilities):
    """Return a :class:`Deck` for each kind of entry that this IOMMU reads, commands among them, by its name."""
    has = capabilities.switched_on()
    contexts = device_context_defects(has, extended=capabilities.MSI_FLAT) | MORE_CONTEXT_DEFECTS
    found = {"DDT pointer": DDTE_DEFECTS, "device context": contexts, "first stage": pte_defects(has),
             "command": command_defects(has)}  # fmt: skip
    if capabilities.Sv39x4:
        found["second stage"] = pte_defects(has)
    if capabilities.PD8 or capabilities.PD17 or capabilities.PD20:
        found["process context"] = process_context_defects(has)
    if capabilities.PD17 or capabilities.PD20:
        found["PDT pointer"] = PDTE_DEFECTS
    if capabilities.MSI_FLAT:
        found["MSI entry"] = msi_pte_defects(has, is_mrif=False)
    if capabilities.MSI_MRIF:
        found["MRIF entry"] = msi_pte_defects(has, is_mrif=True)
    return {kind: Deck(rng, names) for kind, names in found.items()}
