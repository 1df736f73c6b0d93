"""The core pcie4c_uscale_plus of UltraScale+ parts with HBM: its ports, and its options for a card.

Ports and widths: PG213; Vivado's own wrapper of pcie4c_uscale_plus 1.0, as projects publish it (pcie_bridge_ep_pcie4c_ip), and, for
MSI-X, the instance in example/Alveo/fpga/rtl/fpga_au50.v of github.com/alexforencich/verilog-pcie. Options: the .tcl files of that
repository and of github.com/enjoy-digital/litepcie (phy/usppciephy.py); for a second function, projects with the IP of the same name for
Versal.
"""

from ..rtl.function.description import MsixCapability
from ..rtl.spec import ultrascale as spec
from .xilinx import INPUT, OUTPUT, Core, bar_options

__all__ = ["core", "ports"]

LANES = {256: 8, 512: 16}  # at 8 GT/s and 250 MHz
STRADDLE = {256: ("rc",), 512: ("cq", "rc")}  # that :class:`..rtl.verilog.UltraScaleCard` is to be told
MAX_PAYLOAD = 512

_INPUTS = {
    "pcie_cq_np_req": 2, "cfg_mgmt_addr": 10, "cfg_mgmt_function_number": 8, "cfg_mgmt_write": 1, "cfg_mgmt_write_data": 32,
    "cfg_mgmt_byte_enable": 4, "cfg_mgmt_read": 1, "cfg_mgmt_debug_access": 1, "cfg_msg_transmit": 1, "cfg_msg_transmit_type": 3,
    "cfg_msg_transmit_data": 32, "cfg_fc_sel": 3, "cfg_dsn": 64, "cfg_power_state_change_ack": 1, "cfg_err_cor_in": 1,
    "cfg_err_uncor_in": 1, "cfg_flr_done": 4, "cfg_vf_flr_func_num": 8, "cfg_vf_flr_done": 1, "cfg_link_training_enable": 1,
    "cfg_interrupt_int": 4, "cfg_interrupt_pending": 4, "cfg_interrupt_msix_address": 64, "cfg_interrupt_msix_data": 32,
    "cfg_interrupt_msix_int": 1, "cfg_interrupt_msix_vec_pending": 2, "cfg_interrupt_msi_function_number": 8,
    "cfg_pm_aspm_l1_entry_reject": 1, "cfg_pm_aspm_tx_l0s_entry_disable": 1, "cfg_config_space_enable": 1,
    "cfg_req_pm_transition_l23_ready": 1, "cfg_hot_reset_in": 1, "cfg_ds_port_number": 8, "cfg_ds_bus_number": 8,
    "cfg_ds_device_number": 5, "sys_clk": 1, "sys_clk_gt": 1, "sys_reset": 1,
}  # fmt: skip
_OUTPUTS = {
    "user_clk": 1, "user_reset": 1, "user_lnk_up": 1, "phy_rdy_out": 1, "pcie_rq_seq_num0": 6, "pcie_rq_seq_num_vld0": 1,
    "pcie_rq_seq_num1": 6, "pcie_rq_seq_num_vld1": 1, "pcie_rq_tag0": 8, "pcie_rq_tag1": 8, "pcie_rq_tag_av": 4, "pcie_rq_tag_vld0": 1,
    "pcie_rq_tag_vld1": 1, "pcie_tfc_nph_av": 4, "pcie_tfc_npd_av": 4, "pcie_cq_np_req_count": 6, "cfg_phy_link_down": 1,
    "cfg_phy_link_status": 2, "cfg_negotiated_width": 3, "cfg_current_speed": 2, "cfg_max_payload": 2, "cfg_max_read_req": 3,
    "cfg_function_status": 16, "cfg_function_power_state": 12, "cfg_vf_status": 504, "cfg_vf_power_state": 756, "cfg_link_power_state": 2,
    "cfg_mgmt_read_data": 32, "cfg_mgmt_read_write_done": 1, "cfg_err_cor_out": 1, "cfg_err_nonfatal_out": 1, "cfg_err_fatal_out": 1,
    "cfg_local_error_valid": 1, "cfg_local_error_out": 5, "cfg_ltssm_state": 6, "cfg_rx_pm_state": 2, "cfg_tx_pm_state": 2,
    "cfg_rcb_status": 4, "cfg_obff_enable": 2, "cfg_pl_status_change": 1, "cfg_tph_requester_enable": 4, "cfg_tph_st_mode": 12,
    "cfg_vf_tph_requester_enable": 252, "cfg_vf_tph_st_mode": 756, "cfg_msg_received": 1, "cfg_msg_received_data": 8,
    "cfg_msg_received_type": 5, "cfg_msg_transmit_done": 1, "cfg_fc_ph": 8, "cfg_fc_pd": 12, "cfg_fc_nph": 8, "cfg_fc_npd": 12,
    "cfg_fc_cplh": 8, "cfg_fc_cpld": 12, "cfg_bus_number": 8, "cfg_power_state_change_interrupt": 1, "cfg_flr_in_process": 4,
    "cfg_vf_flr_in_process": 252, "cfg_interrupt_sent": 1, "cfg_interrupt_msix_enable": 4, "cfg_interrupt_msix_mask": 4,
    "cfg_interrupt_msix_vf_enable": 252, "cfg_interrupt_msix_vf_mask": 252, "cfg_interrupt_msix_vec_pending_status": 1,
    "cfg_interrupt_msi_sent": 1, "cfg_interrupt_msi_fail": 1, "cfg_hot_reset_out": 1,
}  # fmt: skip


def ports(width):
    """Return direction and width of each port at ``width`` bits of data, by name."""
    lanes, wide = LANES[width], width == 512
    found = {name: (INPUT, bits) for name, bits in _INPUTS.items()} | {name: (OUTPUT, bits) for name, bits in _OUTPUTS.items()}
    found |= {f"pci_exp_{way}x{pole}": (INPUT if way == "r" else OUTPUT, lanes) for way in "rt" for pole in "pn"}
    for name, user, ready in (("m_axis_cq", spec.CQ_USER, 1), ("m_axis_rc", spec.RC_USER, 1), ("s_axis_cc", spec.CC_USER, 4),
                              ("s_axis_rq", spec.RQ_USER, 4)):  # fmt: skip
        forth, back = (OUTPUT, INPUT) if name[0] == "m" else (INPUT, OUTPUT)
        for signal, bits in (("tdata", width), ("tkeep", width // 32), ("tlast", 1), ("tuser", user[wide]), ("tvalid", 1)):
            found[f"{name}_{signal}"] = (forth, bits)
        found[f"{name}_tready"] = (back, ready)
    return found


def _options_of(n, description):
    """Return the options of function ``n``."""
    msix, code = description.capability(MsixCapability), description.class_code
    of_function = {
        f"PF{n}_DEVICE_ID": f"{description.device_id:04X}", f"PF{n}_REVISION_ID": f"{description.revision:02X}",
        f"PF{n}_SUBSYSTEM_VENDOR_ID": f"{description.subsystem_vendor_id:04X}", f"PF{n}_SUBSYSTEM_ID": f"{description.subsystem_id:04X}",
        f"PF{n}_Use_Class_Code_Lookup_Assistant": "false", f"PF{n}_CLASS_CODE": f"{code:06X}",
        f"pf{n}_class_code_base": f"{code >> 16:02X}", f"pf{n}_class_code_sub": f"{code >> 8 & 0xFF:02X}",
        f"pf{n}_class_code_interface": f"{code & 0xFF:02X}", "vendor_id" if n == 0 else f"pf{n}_vendor_id": f"{description.vendor_id:04X}",
        f"PF{n}_INTERRUPT_PIN": "NONE", f"pf{n}_msi_enabled": "false", f"pf{n}_msix_enabled": "true",
        f"PF{n}_MSIX_CAP_TABLE_SIZE": f"{msix.vectors - 1:03X}",
        f"PF{n}_MSIX_CAP_TABLE_BIR": f"BAR_{msix.table_bar + 1}:{msix.table_bar}",
        f"PF{n}_MSIX_CAP_TABLE_OFFSET": f"{msix.table_offset:08X}",
        f"PF{n}_MSIX_CAP_PBA_BIR": f"BAR_{msix.pba_bar + 1}:{msix.pba_bar}",
        f"PF{n}_MSIX_CAP_PBA_OFFSET": f"{msix.pba_offset:08X}",
    }  # fmt: skip
    of_function |= bar_options(description, lambda index, what: f"pf{n}_bar{index}_{what}".lower())
    return of_function


def core(width, descriptions, *, serial_number):
    """Return the :class:`.xilinx.Core` for a card of ``descriptions`` at ``width`` bits: 256 (eight lanes) or 512 (sixteen), 8 GT/s."""
    straddle = STRADDLE[width]
    options = {
        "mode_selection": "Advanced", "PL_LINK_CAP_MAX_LINK_SPEED": "8.0_GT/s", "PL_LINK_CAP_MAX_LINK_WIDTH": f"X{LANES[width]}",
        "axisten_if_width": f"{width}_bit", "axisten_freq": "250", "coreclk_freq": "500",
        **{f"AXISTEN_IF_{name}_ALIGNMENT_MODE": "DWORD_Aligned" for name in ("CQ", "CC", "RQ", "RC")},
        "axisten_if_enable_client_tag": "true", "extended_tag_field": "true", "pf0_dev_cap_max_payload": f"{MAX_PAYLOAD}_bytes",
        "PF0_DEV_CAP_FUNCTION_LEVEL_RESET_CAPABLE": "true", "MSI_X_OPTIONS": "MSI-X_External", "cfg_mgmt_if": "true",
        "ext_pcie_cfg_space_enabled": "false", "pf0_dsn_enabled": "true", "TL_PF_ENABLE_REG": str(len(descriptions)),
        "SRIOV_CAP_ENABLE": "false",
    }  # fmt: skip
    if width == 512:
        options |= {f"AXISTEN_IF_EXT_512_{name}_STRADDLE": str(name.lower() in straddle).lower() for name in ("CQ", "CC", "RQ", "RC")}
        options["AXISTEN_IF_EXT_512_RC_4TLP_STRADDLE"] = "false"
    else:
        options["AXISTEN_IF_RC_STRADDLE"] = str("rc" in straddle).lower()
    for n, description in enumerate(descriptions):
        options |= _options_of(n, description)
    return Core(
        kind="pcie4c_uscale_plus", ports=ports(width), options=options, clock="user_clk", reset="user_reset", buffer="IBUFDS_GTE4",
        buffer_outputs={"O": "sys_clk_gt", "ODIV2": "sys_clk"}, perst="sys_reset",
        ties={"cfg_config_space_enable": 1, "cfg_link_training_enable": 1, "cfg_dsn": serial_number})  # fmt: skip
