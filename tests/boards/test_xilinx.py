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

UNITS = {"Kilobytes": 1 << 10, "Megabytes": 1 << 20, "Gigabytes": 1 << 30}
BOARDS = [("alveo_u50", {"width": 256}), ("alveo_u50", {"width": 512})]
PART = {"alveo_u50": "xcu50-fsvh2104-2-e"}
# Ports of the wrapper that are none of the block inside: clocks, resets, lanes, and what it makes of the block's of virtual functions.
NOT_OF_THE_BLOCK = {
    "pcie4c_uscale_plus": {"user_clk", "user_reset", "user_lnk_up", "phy_rdy_out", "sys_clk", "sys_clk_gt", "sys_reset", "pci_exp_rxp",
                           "pci_exp_rxn", "pci_exp_txp", "pci_exp_txn", "cfg_vf_status", "cfg_vf_power_state",
                           "cfg_vf_tph_requester_enable", "cfg_vf_tph_st_mode", "cfg_vf_flr_in_process", "cfg_interrupt_msix_vf_enable",
                           "cfg_interrupt_msix_vf_mask"},
}  # fmt: skip
READY_COPIES = 22  # of the ready input of an interface, in the UltraScale+ cell
BLOCK = {"pcie4c_uscale_plus": "PCIE4CE4"}


@pytest.fixture(scope="module", params=BOARDS, ids=lambda board: "-".join(map(str, [board[0], *board[1].values()])))
def made(request):
    """Return board, its module, configuration, card, core and files; the card's own Verilog is empty."""
    name, options = request.param
    board = import_module(f"ringwall.boards.{name}.build")
    config = board.config_of(**options)
    card = board.card_of(config)
    return name, config, card, board.core_of(config), board.files_of(config, card, "")


def module(folder, name, *passes):
    """Return a module after ``passes`` of Yosys, as it writes it."""
    run(*passes, f"select ={name}", f"write_json -selected {folder / 'one.json'}")
    return json.loads((folder / "one.json").read_text())["modules"][name]


def test_top(made, tmp_path):
    """BOARD-XILINX-1: Yosys elaborates the top; what it joins to card and core are ports of theirs, with their direction and width."""
    _, _, card, core, files = made
    boxes = {CARD: card_ports(card), core.module: core.ports}
    (tmp_path / "top.v").write_text(files["top.v"])
    (tmp_path / "boxes.v").write_text("".join(black_box(name, ports) for name, ports in boxes.items()))
    sources = ("read_verilog -lib +/xilinx/cells_sim.v +/xilinx/cells_xtra.v", f"read_verilog {tmp_path}/boxes.v {tmp_path}/top.v")
    cells = module(tmp_path, "top", *sources)["cells"].values()
    for cell in cells:
        for port, bits in cell["connections"].items() if cell["type"] in boxes else ():
            assert len(bits) == boxes[cell["type"]][port][1], f"{cell['type']} {port}"
    joined = {cell["type"]: set(cell["connections"]) for cell in cells}
    needed = {name for name, (direction, _) in core.ports.items() if direction == "input"}
    assert needed <= joined[core.module]
    mine = set(boxes[CARD]) & set(core.ports)
    assert mine <= joined[CARD] & joined[core.module] and {"clk", "rst"} <= joined[CARD]
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
        theirs = ports[name.replace("_", "").upper()]
        copies = READY_COPIES if name in ("m_axis_cq_tready", "m_axis_rc_tready") else 1
        if config.width == 512 and "_axis_" in name:
            assert theirs[0] == direction, name  # 512 bits are made of 256 outside the cell
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


def test_core_options(made):
    """BOARD-XILINX-4: what Tcl sets of an UltraScale+ core is what the card's functions are: IDs, class, BARs, MSI-X, their number."""
    _, config, _, core, files = made
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
    with pytest.raises(ValueError, match="at least a kibibyte, not 512"):
        size_of_bar(512)
