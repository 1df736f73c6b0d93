"""What of the RISC-V IOMMU a build has beside the least."""

from dataclasses import dataclass, fields

from ..spec.riscv_iommu_registers import IGS_BOTH, IGS_MSI, IGS_WSI, MAX_COUNTERS


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the translation unit, by their names in ``capabilities``; without any it has base-format contexts, Sv39 and Svnapot.

    Parameters
    ----------
    Sv48, Sv57 : :class:`bool`
        Larger first-stage tables; Sv57 comes with Sv48.
    Svpbmt : :class:`bool`
        Page-based memory types: leaf entries of either stage may say NC or IO, and answers say it too.
    Sv39x4, Sv48x4, Sv57x4 : :class:`bool`
        Second stages; each comes with those before it.
    PD8, PD17, PD20 : :class:`bool`
        Process directories of one, two and three levels.
    MSI_FLAT : :class:`bool`
        Extended-format (64-byte) device contexts and MSI page tables in basic translate mode; needs a second stage.
    MSI_MRIF : :class:`bool`
        MSI page-table entries may name an interrupt file in memory, where the message is recorded; needs MSI_FLAT.
    AMO_MRIF : :class:`bool`
        It is recorded by AtomicOps; needs MSI_MRIF.
    AMO_HWAD : :class:`bool`
        Contexts may ask that A and D of leaf entries be set, by AtomicOps. [RVIOMMU1.0 3.4]
    ATS, T2GPA : :class:`bool`
        Translation requests, translated requests, ATS commands and page requests; devices are answered GPAs where contexts say so, which
        needs ATS and a second stage. [RVIOMMU1.0 3.6, 3.7]
    NL, S : :class:`bool`
        Invalidations of non-leaf entries too, and of ranges: either forgets all addresses. [RVIOMMU1.0 9.2, 9.3]
    HPM, counters : :class:`bool`, :class:`int`
        Performance counters: ``counters`` of events, 1 to 31, and one of cycles.
    DBG : :class:`bool`
        Debug translation through registers; then whoever asks for translations does not use the cookie 255.
    IGS : :class:`int`
        Interrupts: 0 by messages, 1 by wires, 2 by either as fctl.WSI says.

    Raises
    ------
    :exc:`ValueError`
        If one lacks what it needs, or is no truth value or number as it must be. [RVIOMMU1.0 6.3]
    """

    Sv48: bool = False
    Sv57: bool = False
    Svpbmt: bool = False
    Sv39x4: bool = False
    Sv48x4: bool = False
    Sv57x4: bool = False
    PD8: bool = False
    PD17: bool = False
    PD20: bool = False
    MSI_FLAT: bool = False
    MSI_MRIF: bool = False
    AMO_MRIF: bool = False
    AMO_HWAD: bool = False
    ATS: bool = False
    T2GPA: bool = False
    NL: bool = False
    S: bool = False
    HPM: bool = False
    counters: int = 7
    DBG: bool = False
    IGS: int = IGS_MSI

    def __post_init__(self):
        for name in self.flags():
            if getattr(self, name) not in (False, True):
                raise ValueError(f"Feature {name} must be True or False, not {getattr(self, name)!r}")
        if self.counters not in range(1, MAX_COUNTERS + 1):
            raise ValueError(f"Event counters must be 1 to {MAX_COUNTERS}, not {self.counters!r}")
        if self.IGS not in (IGS_MSI, IGS_WSI, IGS_BOTH):
            raise ValueError(f"IGS must be 0, 1 or 2, not {self.IGS!r}")
        for name, needed in (("Sv57", "Sv48"), ("Sv48x4", "Sv39x4"), ("Sv57x4", "Sv48x4"), ("MSI_FLAT", "Sv39x4"),
                             ("MSI_MRIF", "MSI_FLAT"), ("AMO_MRIF", "MSI_MRIF"), ("T2GPA", "ATS"), ("T2GPA", "Sv39x4")):  # fmt: skip
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"{needed} must be there for {name}, not {getattr(self, needed)!r}")

    @classmethod
    def flags(cls):
        """Return the names of all features that are there or not."""
        return [field.name for field in fields(cls) if field.type is bool]

    @property
    def capabilities(self):
        """Fields of ``capabilities`` that are not 0 for these features. [RVIOMMU1.0 6.3]"""
        return {"Sv39": 1, "IGS": self.IGS, **{name: int(getattr(self, name)) for name in self.flags()}}

    @property
    def has_messages(self):
        """Whether interrupts can be messages."""
        return self.IGS != IGS_WSI

    @property
    def has_wires(self):
        """Whether interrupts can be wires."""
        return self.IGS != IGS_MSI

    @property
    def has_second_stage(self):
        """Whether iohgatp can be other than Bare."""
        return self.Sv39x4

    @property
    def has_processes(self):
        """Whether pdtp can be other than Bare."""
        return self.PD8 or self.PD17 or self.PD20

    @property
    def has_atomics(self):
        """Whether the unit itself does AtomicOps."""
        return self.AMO_HWAD or self.AMO_MRIF

    @property
    def first_levels(self):
        """Levels of the largest first-stage table."""
        return 5 if self.Sv57 else 4 if self.Sv48 else 3

    @property
    def second_levels(self):
        """Levels of the largest second-stage table, 0 without."""
        return 5 if self.Sv57x4 else 4 if self.Sv48x4 else 3 if self.Sv39x4 else 0

    @property
    def levels(self):
        """Levels of the largest table."""
        return max(self.first_levels, self.second_levels)

    @property
    def guest_page_bits(self):
        """Page-number bits of the widest guest physical address. [RVPRIV Sv39x4]"""
        return 9 * self.second_levels + 2

    @property
    def page_bits(self):
        """Page-number bits of the widest address that can be translated, its sign left out."""
        return max(9 * self.first_levels, self.guest_page_bits if self.has_second_stage else 0)
