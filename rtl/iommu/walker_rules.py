"""What requests, addresses and contexts must be; nothing here has state."""

from amaranth import Const, Mux
from amaranth.lib import data

from ..spec import riscv_iommu as spec
from .layouts import Kind

# What a leaf of the first stage grants to users with ``U`` 1, to supervisors with 0 or SUM; ``is_bare``: to all, there is no first stage.
Grant = data.StructLayout({"readable": 1, "writable": 1, "executable": 1, "U": 1, "is_bare": 1})


def first_grants(grant, is_write, execute, supervisor, SUM):
    """Return whether the first stage lets this access pass. [RVIOMMU1.0 3.3 step 17; RVPRIV 10.3.2]"""
    user_page = (is_write | ~execute) & SUM
    granted = Mux(is_write, grant.writable, Mux(execute, grant.executable, grant.readable))
    return granted & (grant.is_bare | Mux(supervisor, ~grant.U | user_page, grant.U))


def device_id_parts(features):
    """Return where the parts of a device_id lie, lowest level first. [RVIOMMU1.0 3.1]"""
    return spec.EXTENDED_DDI if features.MSI_FLAT else spec.DDI


def first_may_use(grant, execute, supervisor, SUM):
    """Return whether the first stage has something for the privilege of a translation request. [RVIOMMU1.0 3.6, 3.2.3]"""
    return grant.is_bare | Mux(supervisor, ~grant.U | (SUM & ~execute), grant.U)


def passes_first(asked, features):
    """Return whether ``asked``, a request or the key of a walk, has no use for a first stage. [RVIOMMU1.0 3.3 steps 6 to 9]"""
    return (asked.kind == Kind.TRANSLATED) | (asked.kind == Kind.MESSAGE) if features.ATS else Const(0, 1)


def needs_process(context, asked, features):
    """Return whether a process context decides on ``asked``, a request or the key of a walk. [RVIOMMU1.0 3.3 steps 10 to 13]"""
    if not features.has_processes:
        return Const(0, 1)
    result = context.PDTV & (context.fsc_mode != spec.MODE_BARE) & (asked.process_id_valid | context.DPE)
    return result & ~passes_first(asked, features) if features.ATS else result


def is_refused(context, asked, features):
    """Return whether the device context forbids what ``asked`` is, or its process_id. [RVIOMMU1.0 3.3 step 7, 3.7]"""
    result = asked.process_id_valid & ~context.PDTV
    if features.has_processes:
        mode, process_id = context.fsc_mode, asked.process_id
        too_wide = ((mode == spec.MODE_PD8) & process_id[8:].any()) | ((mode == spec.MODE_PD17) & process_id[17:].any())
        result = asked.process_id_valid & (~context.PDTV | too_wide)
    if features.ATS:
        result = Mux(asked.kind == Kind.MESSAGE, ~context.EN_PRI, result | ((asked.kind != Kind.UNTRANSLATED) & ~context.EN_ATS))
    return result


def is_canonical(page, mode, features):
    """Return whether ``page`` is an address of the first-stage ``mode``. [RVPRIV 10.4.1]"""

    def within(levels):
        high = page[9 * levels - 1 :]
        return ~high.any() | high.all()

    result = within(3)
    for number, has in ((spec.MODE_SV48, features.Sv48), (spec.MODE_SV57, features.Sv57)):
        if has:
            result = Mux(mode == number, within(spec.LEVELS[number]), result)
    return result


def is_guest_page(page, mode, features):
    """Return whether ``page`` is an address of the second-stage ``mode``. [RVPRIV Sv39x4]"""
    result = ~page[9 * 3 + 2 :].any()
    for number, has in ((spec.MODE_SV48, features.Sv48x4), (spec.MODE_SV57, features.Sv57x4)):
        if has:
            result = Mux(mode == number, ~page[9 * spec.LEVELS[number] + 2 :].any(), result)
    return result
