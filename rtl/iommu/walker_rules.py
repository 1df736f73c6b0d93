"""What requests, addresses and contexts must be; nothing here has state."""

from amaranth import Const, Mux
from amaranth.lib import data

from ..spec import riscv_iommu as spec

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


def needs_process(context, process_id_valid, features):
    """Return whether a process context decides on a request. [RVIOMMU1.0 3.3 steps 10 to 13]"""
    if not features.has_processes:
        return Const(0, 1)
    return context.PDTV & (context.fsc_mode != spec.MODE_BARE) & (process_id_valid | context.DPE)


def is_refused(context, process_id_valid, process_id, features):
    """Return whether the device context forbids the request's process_id. [RVIOMMU1.0 3.3 step 7]"""
    if not features.has_processes:
        return process_id_valid & ~context.PDTV
    too_wide = ((context.fsc_mode == spec.MODE_PD8) & process_id[8:].any()) | ((context.fsc_mode == spec.MODE_PD17) & process_id[17:].any())
    return process_id_valid & (~context.PDTV | too_wide)


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
