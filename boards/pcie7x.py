"""The core pcie_7x of 7-series parts: its ports, and its options for a card of one function.

Ports and widths: PG054; pcie_7x 3.3 as CaptainDMA/100t484-1/ip/pcie_7x_0.xci of github.com/ufrisk/pcileech-fpga, commit c538c41, has it
with the same interfaces on. Options: that file, and phy/s7pciephy.py of github.com/enjoy-digital/litepcie, commit a71443e.
"""

from ..rtl.function.description import MsixCapability
from ..rtl.spec import series7 as spec
from .xilinx import INPUT, OUTPUT, Core, bar_options

__all__ = ["core", "ports"]

LANES = 4
CLOCKS = {64: "250", 128: "125"}  # MHz, at 5 GT/s on four lanes

_INPUTS = {
    "tx_cfg_gnt": 1, "rx_np_ok": 1, "rx_np_req": 1, "cfg_mgmt_di": 32, "cfg_mgmt_byte_en": 4, "cfg_mgmt_dwaddr": 10, "cfg_mgmt_wr_en": 1,
    "cfg_mgmt_rd_en": 1, "cfg_mgmt_wr_readonly": 1, "cfg_trn_pending": 1, "cfg_pm_halt_aspm_l0s": 1, "cfg_pm_halt_aspm_l1": 1,
    "cfg_pm_force_state_en": 1, "cfg_pm_force_state": 2, "cfg_dsn": 64, "cfg_interrupt": 1, "cfg_interrupt_assert": 1,
    "cfg_interrupt_di": 8, "cfg_interrupt_stat": 1, "cfg_pciecap_interrupt_msgnum": 5, "cfg_turnoff_ok": 1, "cfg_pm_wake": 1,
    "cfg_pm_send_pme_to": 1, "cfg_ds_bus_number": 8, "cfg_ds_device_number": 5, "cfg_ds_function_number": 3, "cfg_mgmt_wr_rw1c_as_rw": 1,
    "pl_directed_link_change": 2, "pl_directed_link_width": 2, "pl_directed_link_speed": 1, "pl_directed_link_auton": 1,
    "pl_upstream_prefer_deemph": 1, "pl_transmit_hot_rst": 1, "pl_downstream_deemph_source": 1, "sys_clk": 1, "sys_rst_n": 1,
    "pcie_drp_clk": 1, "pcie_drp_en": 1, "pcie_drp_we": 1, "pcie_drp_addr": 9, "pcie_drp_di": 16,
}  # fmt: skip
_OUTPUTS = {
    "user_clk_out": 1, "user_reset_out": 1, "user_lnk_up": 1, "user_app_rdy": 1, "tx_buf_av": 6, "tx_cfg_req": 1, "tx_err_drop": 1,
    "cfg_mgmt_do": 32, "cfg_mgmt_rd_wr_done": 1, "cfg_status": 16, "cfg_command": 16, "cfg_dstatus": 16, "cfg_dcommand": 16,
    "cfg_lstatus": 16, "cfg_lcommand": 16, "cfg_dcommand2": 16, "cfg_pcie_link_state": 3, "cfg_pmcsr_pme_en": 1,
    "cfg_pmcsr_powerstate": 2, "cfg_pmcsr_pme_status": 1, "cfg_received_func_lvl_rst": 1, "cfg_interrupt_rdy": 1, "cfg_interrupt_do": 8,
    "cfg_interrupt_mmenable": 3, "cfg_interrupt_msienable": 1, "cfg_interrupt_msixenable": 1, "cfg_interrupt_msixfm": 1,
    "cfg_to_turnoff": 1, "cfg_bus_number": 8, "cfg_device_number": 5, "cfg_function_number": 3, "cfg_bridge_serr_en": 1,
    "cfg_slot_control_electromech_il_ctl_pulse": 1, "cfg_root_control_syserr_corr_err_en": 1,
    "cfg_root_control_syserr_non_fatal_err_en": 1, "cfg_root_control_syserr_fatal_err_en": 1, "cfg_root_control_pme_int_en": 1,
    "cfg_aer_rooterr_corr_err_reporting_en": 1, "cfg_aer_rooterr_non_fatal_err_reporting_en": 1,
    "cfg_aer_rooterr_fatal_err_reporting_en": 1, "cfg_aer_rooterr_corr_err_received": 1, "cfg_aer_rooterr_non_fatal_err_received": 1,
    "cfg_aer_rooterr_fatal_err_received": 1, "pl_sel_lnk_rate": 1, "pl_sel_lnk_width": 2, "pl_ltssm_state": 6, "pl_lane_reversal_mode": 2,
    "pl_phy_lnk_up": 1, "pl_tx_pm_state": 3, "pl_rx_pm_state": 2, "pl_link_upcfg_cap": 1, "pl_link_gen2_cap": 1,
    "pl_link_partner_gen2_supported": 1, "pl_initial_link_width": 3, "pl_directed_change_done": 1, "pl_received_hot_rst": 1,
    "cfg_vc_tcvc_map": 7, "pcie_drp_do": 16, "pcie_drp_rdy": 1,
}  # fmt: skip


def ports(width):
    """Return direction and width of each port at ``width`` bits of data, by name."""
    found = {name: (INPUT, bits) for name, bits in _INPUTS.items()} | {name: (OUTPUT, bits) for name, bits in _OUTPUTS.items()}
    found |= {f"pci_exp_{way}x{pole}": (INPUT if way == "r" else OUTPUT, LANES) for way in "rt" for pole in "pn"}
    for name, user, forth, back in (("m_axis_rx", spec.RX_USER, OUTPUT, INPUT), ("s_axis_tx", spec.TX_USER, INPUT, OUTPUT)):
        for signal, bits in (("tdata", width), ("tkeep", width // 8), ("tlast", 1), ("tuser", user), ("tvalid", 1)):
            found[f"{name}_{signal}"] = (forth, bits)
        found[f"{name}_tready"] = (back, 1)
    return found


def core(width, description, *, serial_number):
    """Return the :class:`.xilinx.Core` for a card whose only function is ``description``, at 64 or 128 bits: four lanes, 5 GT/s."""
    msix, code = description.capability(MsixCapability), description.class_code
    options = {
        "mode_selection": "Advanced", "Maximum_Link_Width": f"X{LANES}", "Link_Speed": "5.0_GT/s", "Trgt_Link_Speed": "4'h2",
        "Interface_Width": f"{width}_bit", "User_Clk_Freq": CLOCKS[width], "Ref_Clk_Freq": "100_MHz", "PCIe_Blk_Locn": "X0Y0",
        "Max_Payload_Size": "512_bytes", "Extended_Tag_Field": "true", "Buf_Opt_BMA": "true",
        "Vendor_ID": f"{description.vendor_id:04X}", "Device_ID": f"{description.device_id:04X}",
        "Revision_ID": f"{description.revision:02X}", "Subsystem_Vendor_ID": f"{description.subsystem_vendor_id:04X}",
        "Subsystem_ID": f"{description.subsystem_id:04X}", "Use_Class_Code_Lookup_Assistant": "false",
        "Class_Code_Base": f"{code >> 16:02X}", "Class_Code_Sub": f"{code >> 8 & 0xFF:02X}", "Class_Code_Interface": f"{code & 0xFF:02X}",
        "IntX_Generation": "false", "Legacy_Interrupt": "NONE", "MSI_Enabled": "false", "MSIx_Enabled": "true",
        "MSIx_Table_Size": f"{msix.vectors:X}",
        "MSIx_Table_Offset": f"{msix.table_offset:X}", "MSIx_Table_BIR": f"BAR_{msix.table_bar + 1}:{msix.table_bar}",
        "MSIx_PBA_Offset": f"{msix.pba_offset:X}", "MSIx_PBA_BIR": f"BAR_{msix.pba_bar + 1}:{msix.pba_bar}",
        "PCI_CFG_Space": "true", "PCI_CFG_Space_Addr": f"{spec.CAPABILITIES // 4:02X}", "EXT_PCI_CFG_Space": "false",
        "DSN_Enabled": "true", "pl_interface": "true", "cfg_mgmt_if": "true", "cfg_ctl_if": "true", "cfg_status_if": "true",
        "rcv_msg_if": "false", "cfg_fc_if": "false", "err_reporting_if": "false", "en_ext_clk": "false", "shared_logic_in_core": "false",
    }  # fmt: skip
    options |= bar_options(description, lambda index, what: f"Bar{index}_{what}")
    return Core(
        kind="pcie_7x", ports=ports(width), options=options, clock="user_clk_out", reset="user_reset_out", buffer="IBUFDS_GTE2",
        buffer_outputs={"O": "sys_clk"}, perst="sys_rst_n", ties={"cfg_dsn": serial_number})  # fmt: skip
