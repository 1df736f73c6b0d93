"""Vivado projects of Xilinx cards, as far as they can be judged without Vivado: by Yosys, and against what the cards are."""

import json
import re
from collections import Counter
from importlib import import_module

import pytest

from ringwall.boards import pcie4c
from ringwall.boards.xilinx import CARD, black_box, build_project, card_ports, main, size_of_bar
from ringwall.boards.yosys import run
from ringwall.rtl.endpoint import descriptions_of
from ringwall.rtl.function.description import MsixCapability

CHANNELS = {"B8": "GTPE2_CHANNEL_X0Y4", "D11": "GTPE2_CHANNEL_X0Y5", "B10": "GTPE2_CHANNEL_X0Y6", "D9": "GTPE2_CHANNEL_X0Y7"}  # UG475
UNITS = {"Kilobytes": 1 << 10, "Megabytes": 1 << 20, "Gigabytes": 1 << 30}
BOARDS = [("alveo_u50", {"width": 256}), ("alveo_u50", {"width": 512}), ("litefury", {"width": 128}), ("litefury", {"width": 64}),
          ("nitefury", {"width": 128})]  # fmt: skip
PART = {"alveo_u50": "xcu50-fsvh2104-2-e", "litefury": "xc7a100tfgg484-2L", "nitefury": "xc7a200tfbg484-2"}
# Ports of the wrapper that are none of the block inside: clocks, resets, lanes, and what it makes of the block's of virtual functions.
NOT_OF_THE_BLOCK = {
    "pcie4c_uscale_plus": {"user_clk", "user_reset", "user_lnk_up", "phy_rdy_out", "sys_clk", "sys_clk_gt", "sys_reset", "pci_exp_rxp",
                           "pci_exp_rxn", "pci_exp_txp", "pci_exp_txn", "cfg_vf_status", "cfg_vf_power_state",
                           "cfg_vf_tph_requester_enable", "cfg_vf_tph_st_mode", "cfg_vf_flr_in_process", "cfg_interrupt_msix_vf_enable",
                           "cfg_interrupt_msix_vf_mask"},
    # Interfaces that the wrapper makes of others, and what it tells as whole registers.
    "pcie_7x": {"user_clk_out", "user_reset_out", "user_lnk_up", "user_app_rdy", "sys_clk", "pci_exp_rxp", "pci_exp_rxn", "pci_exp_txp",
                "pci_exp_txn", "cfg_status", "cfg_command", "cfg_dstatus", "cfg_dcommand", "cfg_dcommand2", "cfg_lstatus", "cfg_lcommand",
                "cfg_bus_number", "cfg_device_number", "cfg_function_number", "cfg_to_turnoff", "m_axis_rx_tkeep", "m_axis_rx_tlast",
                "m_axis_rx_tuser", "m_axis_rx_tvalid", "m_axis_rx_tready", "s_axis_tx_tkeep", "s_axis_tx_tlast", "s_axis_tx_tuser",
                "s_axis_tx_tvalid", "s_axis_tx_tready", "cfg_received_func_lvl_rst", "sys_rst_n"},
}  # fmt: skip
READY_COPIES = 22  # of the ready input of an interface, in the UltraScale+ cell
BLOCK = {"pcie4c_uscale_plus": "PCIE4CE4", "pcie_7x": "PCIE_2_1"}
OTHER_NAMES = {  # of the 7-series cell; with N: active low
    "tx_buf_av": "TRNTBUFAV", "tx_cfg_req": "TRNTCFGREQ", "tx_cfg_gnt": "TRNTCFGGNT", "tx_err_drop": "TRNTERRDROP", "rx_np_ok": "TRNRNPOK",
    "rx_np_req": "TRNRNPREQ", "cfg_turnoff_ok": "CFGPMTURNOFFOKN", "s_axis_tx_tdata": "TRNTD", "m_axis_rx_tdata": "TRNRD",
    "cfg_mgmt_rd_wr_done": "CFGMGMTRDWRDONEN", **{f"pcie_drp_{name}": f"DRP{name.upper()}" for name in
    ("clk", "en", "we", "addr", "di", "do", "rdy")},
}  # fmt: skip


def make(request):
    """Return board, configuration, card, core and files; the card's own Verilog is empty."""
    name, options = request.param
    board = import_module(f"ringwall.boards.{name}.build")
    config = board.config_of(**options)
    card = board.card_of(config)
    return name, config, card, board.core_of(config), board.files_of(config, card, "")


def fixture(boards):
    return pytest.fixture(make, scope="module", params=boards, ids=lambda board: "-".join(map(str, [board[0], *board[1].values()])))


made = fixture(BOARDS)
made_ultrascale, made_series7 = (fixture([board for board in BOARDS if (board[0] == "alveo_u50") == is_it]) for is_it in (True, False))


def module(folder, name, *passes):
    """Return a module after ``passes`` of Yosys, as it writes it."""
    run(*passes, f"select ={name}", f"write_json -selected {folder / 'one.json'}")
    return json.loads((folder / "one.json").read_text())["modules"][name]


def test_top(made, tmp_path):
    """BOARD-XILINX-1: Yosys elaborates the top; ports of card and core are joined by name, as wide as they are."""
    _, _, card, core, files = made
    boxes = {CARD: card_ports(card), core.module: core.ports}
    (tmp_path / "top.v").write_text(files["top.v"])
    (tmp_path / "boxes.v").write_text("".join(black_box(name, ports) for name, ports in boxes.items()))
    sources = ("read_verilog -lib +/xilinx/cells_sim.v +/xilinx/cells_xtra.v", f"read_verilog {tmp_path}/boxes.v {tmp_path}/top.v")
    by_name = module(tmp_path, "top", *sources)["cells"]
    cells = by_name.values()
    for cell in cells:
        for port, bits in cell["connections"].items() if cell["type"] in boxes else ():
            assert len(bits) == boxes[cell["type"]][port][1], f"{cell['type']} {port}"
    joined = {cell["type"]: cell["connections"] for cell in cells}
    needed = {name for name, (direction, _) in core.ports.items() if direction == "input"}
    assert needed <= set(joined[core.module])
    same = {name: name for name in boxes[CARD] if name in core.ports} | {"clk": core.clock, "rst": core.reset}
    for name, theirs in same.items():
        assert joined[CARD][name] == joined[core.module][theirs][: boxes[CARD][name][1]], name
    for output, name in core.buffer_outputs.items():
        assert joined[core.module][name] == joined[core.buffer][output]
    assert joined[core.module][core.perst] == by_name["perst"]["connections"]["i"]
    top = module(tmp_path, "top", *sources, "hierarchy -check -top top", "check -assert")
    by_type = Counter(cell["type"] for cell in top["cells"].values())
    assert by_type[CARD] == by_type[core.module] == by_type[core.buffer] == 1


def test_block_ports(made, tmp_path):
    """BOARD-XILINX-2: ports of the core that go into the hard block are ports of the cell in Yosys' library, as wide."""
    _, config, _, core, _ = made
    cell = module(tmp_path, BLOCK[core.kind], "read_verilog -lib +/xilinx/cells_xtra.v",
                  f"setattr -mod -unset blackbox ={BLOCK[core.kind]}")
    ports = {name: (port["direction"], len(port["bits"])) for name, port in cell["ports"].items()}
    missing = NOT_OF_THE_BLOCK[core.kind]
    assert missing <= set(core.ports)
    for name, (direction, width) in core.ports.items():
        if name in missing:
            continue
        same = name.replace("_", "").upper()
        theirs = ports[OTHER_NAMES.get(name) or (same if same in ports else f"{same}N")]
        copies = READY_COPIES if name in ("m_axis_cq_tready", "m_axis_rc_tready") else 1
        if "_axis_" in name and config.width in (64, 512):
            assert theirs[0] == direction, name  # the cell has 256 bits, and 128
        else:
            assert theirs == (direction, width * copies), name


def test_constraints(made):
    """BOARD-XILINX-3: every port of the top has a pin and every pin a port; no pin twice; the reference clock has its frequency."""
    name, _, _, _, files = made
    ports, (top,) = set(), re.findall(r"^module top\(.*?^endmodule", files["top.v"], re.MULTILINE | re.DOTALL)
    for way, width, port in re.findall(r"^  (input|output)( \[\d+:0\])? (\w+);", top, re.MULTILINE):
        ports |= {f"{port}[{n}]" for n in range(int(width[2:-3]) + 1)} if width else {port}
        assert (way == "output") == any(name in port for name in ("tx", "hbm_cattrip", "clkreq"))
    placed = dict(re.findall(r'^set_property LOC (\w+) \[get_ports "(.*)"\]', files["top.xdc"], re.MULTILINE))
    assert {port.replace("\\", "") for port in placed.values()} == ports and len(placed) == len(ports)
    assert "create_clock -name pcie_0__clk__p -period 10.0 " in files["top.xdc"]
    for port in re.findall(r"get_ports (\w+)\]", files["top.xdc"]):
        assert port in ports
    assert f"-part {PART[name]}\n" in files["top.tcl"]


def test_core_options(made_ultrascale):
    """BOARD-XILINX-4: what Tcl sets of an UltraScale+ core is what the card's functions are: IDs, class, BARs, MSI-X, their number."""
    _, config, _, core, files = made_ultrascale
    options = dict(re.findall(r"CONFIG\.(\w+) \{(.*)\}", files["top.tcl"]))
    assert options == core.options
    assert f"create_ip -vendor xilinx.com -library ip -name {core.kind} -module_name {core.module}" in files["top.tcl"]
    functions = descriptions_of(config)
    assert int(options["TL_PF_ENABLE_REG"]) == len(functions) == 2 and options["axisten_if_width"] == f"{config.width}_bit"
    assert options["PL_LINK_CAP_MAX_LINK_WIDTH"] == f"X{core.ports['pci_exp_rxp'][1]}"
    for n, function in enumerate(functions):
        msix, vendor = function.capability(MsixCapability), options["vendor_id" if n == 0 else f"pf{n}_vendor_id"]
        numbers = {name: int(options[f"PF{n}_{name}"], 16) for name in ("DEVICE_ID", "REVISION_ID", "SUBSYSTEM_VENDOR_ID", "SUBSYSTEM_ID",
                   "CLASS_CODE", "MSIX_CAP_TABLE_SIZE", "MSIX_CAP_TABLE_OFFSET", "MSIX_CAP_PBA_OFFSET")}  # fmt: skip
        assert [int(vendor, 16), *numbers.values()] == [
            function.vendor_id, function.device_id, function.revision, function.subsystem_vendor_id, function.subsystem_id,
            function.class_code, msix.vectors - 1, msix.table_offset, msix.pba_offset]  # fmt: skip
        code = "".join(options[f"pf{n}_class_code_{part}"] for part in ("base", "sub", "interface"))
        assert int(code, 16) == function.class_code
        assert options[f"PF{n}_MSIX_CAP_TABLE_BIR"] == options[f"PF{n}_MSIX_CAP_PBA_BIR"] == f"BAR_{msix.table_bar + 1}:{msix.table_bar}"
        found = {bar: int(options[f"pf{n}_bar{bar}_size"]) * UNITS[options[f"pf{n}_bar{bar}_scale"]]
                 for bar in (0, 2, 4) if options[f"pf{n}_bar{bar}_enabled"] == "true"}  # fmt: skip
        assert found == {bar.index: bar.size_bytes for bar in function.bars}
        assert all(options[f"pf{n}_bar{bar}_64bit"] == "true" for bar in found)
    straddled = {name: value for name, value in options.items() if "STRADDLE" in name}
    assert {name.split("_")[-2].lower() for name, value in straddled.items() if value == "true"} == set(pcie4c.STRADDLE[config.width])


def test_series7_options(made_series7):
    """BOARD-XILINX-6: what Tcl sets of a 7-series core is what the card's function is, and where its capabilities lie."""
    _, config, card, core, files = made_series7
    options = dict(re.findall(r"CONFIG\.(\w+) \{(.*)\}", files["top.tcl"]))
    (function,) = descriptions_of(card.config)
    msix = function.capability(MsixCapability)
    assert options == core.options and options["Interface_Width"] == f"{config.width}_bit"
    assert int(options["User_Clk_Freq"]) * config.width == 16_000  # four lanes of 4 Gbit/s
    ids = [int(options[name], 16) for name in ("Vendor_ID", "Device_ID", "Revision_ID", "Subsystem_Vendor_ID", "Subsystem_ID")]
    assert ids == [function.vendor_id, function.device_id, function.revision, function.subsystem_vendor_id, function.subsystem_id]
    assert int("".join(options[f"Class_Code_{part}"] for part in ("Base", "Sub", "Interface")), 16) == function.class_code
    numbers = [int(options[f"MSIx_{name}"], 16) for name in ("Table_Size", "Table_Offset", "PBA_Offset")]
    assert numbers == [msix.vectors, msix.table_offset, msix.pba_offset]
    assert options["MSIx_Table_BIR"] == options["MSIx_PBA_BIR"] == f"BAR_{msix.table_bar + 1}:{msix.table_bar}"
    found = {bar: int(options[f"Bar{bar}_Size"]) * UNITS[options[f"Bar{bar}_Scale"]] for bar in (0, 2, 4) if
             options[f"Bar{bar}_Enabled"] == "true"}  # fmt: skip
    assert found == {bar.index: bar.size_bytes for bar in function.bars} and options["MSI_Enabled"] == "false"
    places = {block.name: block.offset for block in function.map().blocks if block.name.startswith("virtio")}
    assert options["PCI_CFG_Space"] == "true" and int(options["PCI_CFG_Space_Addr"], 16) * 4 == min(places.values()) == 0xA8
    lanes = re.findall(r"set_property LOC (GTPE2_CHANNEL_X0Y\d) .*pipe_lane\[(\d)\]", files["top.tcl"])
    pins = re.findall(r'set_property LOC (\w+) \[get_ports "pcie_0__rx__p.\[(\d)\]"', files["top.xdc"])
    assert {lane: CHANNELS[pin] for pin, lane in pins} == {lane: place for place, lane in lanes} and len(lanes) == 4


def test_command(tmp_path, capsys):
    """BOARD-XILINX-5: the command of a board writes files and says where Vivado takes over; a BAR that the core cannot have is refused."""

    def build(folder, *, synthesize):
        build_project(folder, {"top.tcl": "quit\n"}, "never run")
        return {"board": "x", "lut": 7} if synthesize else {}

    main(build, "x", ["--out", str(tmp_path / "a")])
    assert (tmp_path / "a/top.tcl").read_text() == "quit\n" and (tmp_path / "a/README").read_text() == "never run\n"
    assert "From here it takes Vivado" in capsys.readouterr().err and not (tmp_path / "a/result.json").exists()
    main(build, "x", ["--out", str(tmp_path / "b"), "--sizes"])
    assert json.loads((tmp_path / "b/result.json").read_text())["lut"] == 7
    with pytest.raises(SystemExit):
        main(build, "x", [])
    asked = []
    for more in ([], ["--width", "512"]):
        main(lambda folder, *, synthesize, width: asked.append(width), "x", ["--out", str(tmp_path), *more], widths=(256, 512))
    assert asked == [256, 512]
    with pytest.raises(SystemExit):
        main(build, "x", ["--out", str(tmp_path), "--width", "128"], widths=(256, 512))
    with pytest.raises(ValueError, match="at least a kibibyte, not 512"):
        size_of_bar(512)
