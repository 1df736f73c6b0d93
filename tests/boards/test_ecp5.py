"""ECP5 boards: clock, pins, and the open tools from a small circuit to its bitstream."""

import json
import re
from dataclasses import replace
from unittest import mock

import pytest
from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ringwall.boards import blocks, ecp5
from ringwall.boards import build as boards
from ringwall.boards.ecpix5 import build as ecpix5
from ringwall.boards.ecpix5 import platform as ecpix5_platform
from ringwall.boards.place import Placed
from ringwall.boards.sizes import NO_WIDE_MUXES, THOROUGH, mapped, size
from ringwall.boards.versa_ecp5 import build as versa_ecp5
from ringwall.boards.versa_ecp5 import platform as versa_platform
from ringwall.boards.yosys import relaxed
from ringwall.rtl.stream import queue
from ringwall.rtl.stream.ram import Ram
from ringwall.rtl.stream.skid_buffer import SkidBuffer
from ringwall.rtl.verilog import to_rtlil

PLATFORMS = {"ecpix5": ecpix5_platform.ECPIX585Platform, "versa_ecp5": versa_platform.VersaECP55GPlatform}
PINS = {  # ecpix5.py and lattice_versa_ecp5.py of github.com/litex-hub/litex-boards, commits 1781be1 and 8a3caca
    "ecpix5": {"clk100": "K23", "uart_0__rx": "R26", "uart_0__tx": "R24", "rgb_led_0__g": "R21"},
    "versa_ecp5": {"clk100": "P3", "uart_0__rx": "C11", "uart_0__tx": "A11", "led": "E16"},
}


class Deep(wiring.Component):
    """Two blocks in a block: of the names of their clock, which is one net, Yosys keeps as few as it may."""

    i: In(stream.Signature(8))
    o: Out(stream.Signature(8))

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = waiting = queue.Queue(8, 16)
        m.submodules.skid = skid = SkidBuffer(8)
        wiring.connect(m, wiring.flipped(self.i), waiting.i)
        wiring.connect(m, waiting.o, skid.i)
        wiring.connect(m, skid.o, wiring.flipped(self.o))
        return m


class Echo(wiring.Component):
    """In the place of a card: says back what it hears."""

    rx: In(stream.Signature(8))
    tx: Out(stream.Signature(8))
    link_up: Out(1)

    def elaborate(self, platform):
        m = Module()
        m.submodules.skid = skid = SkidBuffer(8)
        m.submodules.deep = deep = Deep()
        wiring.connect(m, wiring.flipped(self.rx), skid.i)
        wiring.connect(m, skid.o, deep.i)
        wiring.connect(m, deep.o, wiring.flipped(self.tx))
        m.d.sync += self.link_up.eq(self.rx.valid)
        return m


@pytest.mark.parametrize("board", PLATFORMS)
def test_pins(board):
    """BOARD-ECP5-1: each port of a board's top has the pin that another public source gives it, and no pin is for no port."""
    plan = ecp5.files_of(PLATFORMS[board](), ecp5.Top(Echo(), clock_mhz=50, baud=2_000_000))
    placed = dict(re.findall(r'LOCATE COMP "(\S+?)(?:__io|__p)" SITE "(\S+)"', plan.files["top.lpf"]))
    assert {name: next(pin for port, pin in placed.items() if port.startswith(name)) for name in PINS[board]} == PINS[board]
    assert len(placed) == len(PINS[board])
    top = plan.files["top.il"].split("module \\top\n")[1].split("\nend\n")[0]
    ports = set(re.findall(r"wire .*\b(?:input|output|inout) \d+ +\\(\S+?)(?:__io|__p|__n)\n", top))
    assert ports == set(placed)
    assert re.search(r'FREQUENCY PORT "clk100_0__(io|p)" 100000000', plan.files["top.lpf"])


def test_clock():
    """BOARD-ECP5-2: a PLL's dividers make the frequency, within the data sheet's limits; what it cannot make, and a line it cannot serve,
    is refused."""
    for target in (25, 50, 60, 70, 75, 80, 100, 125):
        reference, feedback, output = ecp5.Pll(100, target).dividers()
        assert 100 * feedback == target * reference
        assert 400 <= target * output <= 800
        assert 10 <= 100 / reference <= 400
    with pytest.raises(ValueError, match="The clock must be one that a PLL makes from 100 MHz, not 64 MHz"):
        ecp5.Pll(100, 64).dividers()  # its detector would run at 4 MHz
    assert ecp5.Top(Echo(), clock_mhz=80, baud=3_000_000).divisor == 27
    with pytest.raises(ValueError, match="The line's rate must be the clock of 50 MHz divided by a whole number, within 2 %, not 12000000"):
        ecp5.Top(Echo(), clock_mhz=50, baud=12_000_000)


def test_bitstream(tmp_path):
    """BOARD-ECP5-3: a small circuit becomes a bitstream and a result; too slow for its clock is an error, for its goal not,
    and leaves no bitstream of an earlier one."""
    said = []
    top = ecp5.Top(Echo(), clock_mhz=50, baud=2_000_000)
    result = ecp5.build("ecpix5", "echo", PLATFORMS["ecpix5"](), top, tmp_path, say=said.append)
    assert (tmp_path / "top.bit").stat().st_size > 10_000
    assert result["fmax"]["sync"] > 50
    assert 20 < result["lut"] < 300
    assert result["ff"] > 20
    assert (result["bram"], result["dsp"]) == (0, 0)
    assert [text.split()[0] for text in said] == ["yosys", "yosys", "nextpnr-ecp5"]
    eager = ecp5.Top(Echo(), clock_mhz=50, baud=2_000_000, goal_mhz=1000)  # no ECP5 is as fast
    assert 50 < ecp5.build("ecpix5", "eager", PLATFORMS["ecpix5"](), eager, tmp_path / "eager")["fmax"]["sync"] < 1000
    said_of = json.loads((tmp_path / "eager/report.json").read_text())["fmax"]
    assert [round(clock["constraint"]) for clock in said_of.values()] == [1000]
    slow = Placed(frequency=49.96, path=("card",), delay=20.0, routing=15.0, goal=1000)
    with (mock.patch.object(ecp5, "build_bitstream"), mock.patch.object(ecp5, "read_report", return_value=slow),
          pytest.raises(RuntimeError, match=r"No bitstream to use: 49\.96 MHz, FAIL at 50 MHz, through card")):  # fmt: skip
        ecp5.build("ecpix5", "slow", PLATFORMS["ecpix5"](), eager, tmp_path)
    with (mock.patch.object(ecp5, "build_bitstream"), mock.patch.object(ecp5, "read_report", return_value=replace(slow, goal=50.0)),
          pytest.raises(RuntimeError, match=r"nextpnr placed for 50\.00 MHz, not for 1000: see .*top\.tim")):  # fmt: skip
        ecp5.build("ecpix5", "forgotten", PLATFORMS["ecpix5"](), eager, tmp_path)
    fast = ecp5.Top(Echo(), clock_mhz=400, baud=2_000_000)
    with pytest.raises(RuntimeError, match=r"No bitstream(.|\n)*FAIL at 400"):
        ecp5.build("ecpix5", "too fast", PLATFORMS["ecpix5"](), fast, tmp_path)
    assert not (tmp_path / "top.bit").exists()  # that of the first circuit


def test_command(tmp_path, capsys):
    """BOARD-ECP5-4: the command writes a board's project and no bitstream when asked for that; the cards are configurations that stand."""
    asked = {}

    def build(folder, *, synthesize, say):
        asked[folder.name] = synthesize
        return {"lut": 1, "fmax": {"sync": 90.0}}

    ecp5.main(build, "board", ["--out", str(tmp_path / "a")])
    ecp5.main(build, "board", ["--out", str(tmp_path / "b"), "--project"])
    assert asked == {"a": True, "b": False}
    assert json.loads((tmp_path / "a/result.json").read_text())["lut"] == 1
    assert not (tmp_path / "b/result.json").exists()
    assert "openFPGALoader" in capsys.readouterr().out


def test_boards_by_name(capsys):
    """BOARD-NAME-1: ``make board`` knows every board, and says which there are when it does not."""
    assert {"ecpix5", "versa_ecp5"} < set(boards.BOARDS)
    with pytest.raises(SystemExit) as caught:
        boards.main(["breadboard"])
    assert caught.value.code == 2
    assert "the board must be one of alveo_u50, ecpix5, litefury" in capsys.readouterr().err


def test_report(tmp_path):
    """BOARD-REPORT-1: the table has a line for each result; that of boards/README.md is what the results say."""
    (tmp_path / "x").mkdir()
    one = {"board": "x", "configuration": "c", "tool": "t 1", "date": "2026-11-22", "lut": 5, "ff": 6, "bram": 1.5, "dsp": 0, "levels": 7,
           "path": ["endpoint.core.gate", "phy"]}  # fmt: skip
    (tmp_path / "x/result.json").write_text(json.dumps([one, {**one, "fmax": {"sync": 81.4}}]))
    assert boards.rows(tmp_path)[2:] == ["| x | c | 5 | 6 | 1.5 | 0 | not placed | 7 | core.gate, phy | t 1, 2026-11-22 |",
                                         "| x | c | 5 | 6 | 1.5 | 0 | 81 | 7 | core.gate, phy | t 1, 2026-11-22 |"]  # fmt: skip
    text = (boards.HERE / "README.md").read_text()
    assert boards.report(text, boards.rows()) == text
    with pytest.raises(ValueError, match=r"boards/README\.md must have the lines"):
        boards.report("# boards\n", [])


def test_blocks():
    """BOARD-BLOCKS-1: cells count for their block and for those it is in; growth over 5 % is told, the smallest block first."""
    cells = {f"core.gate.x{n}.lut": {"type": "LUT4"} for n in range(600)} | {f"core.{n}_LUT4": {"type": "LUT4"} for n in range(20)}
    cells |= {f"$auto${n}": {"type": "TRELLIS_FF"} for n in range(501)}
    found = blocks.by_block(cells)
    assert found == {"lut": {"": 620, "core": 620, "core.gate": 600}, "ff": {"": 501}}
    assert blocks.grown(found, found) == []
    before = {"lut": {"": 600, "core": 590, "core.gate": 570}, "ff": {"": 501}}
    assert blocks.grown(found, before) == ["core.gate grew from 570 to 600 LUTs", "core grew from 590 to 620 LUTs"]


@pytest.mark.parametrize("board", [ecpix5.BOARD, versa_ecp5.BOARD], ids=lambda board: board.name)
def test_cards(board):
    """BOARD-ECP5-5: the card of a board is 64 bits wide, behind a tunnel, with a disk that its block RAM holds."""
    assert board.config.width == 64
    assert sum(disk.capacity_sectors for disk in board.config.disks) * 512 <= 256 << 10
    assert board.top().divisor == 25


class Row(wiring.Component):
    """A RAM that is always written, and its port."""

    i: In(8)
    o: Out(8)

    def __init__(self, is_transparent):
        self.is_transparent = is_transparent
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.rows = rows = Ram(shape=8, depth=4, init=[])
        write = rows.write_port()
        read = rows.read_port(transparent_for=(write,) if self.is_transparent else ())
        m.d.comb += [write.en.eq(1), write.data.eq(self.i), read.addr.eq(self.i), self.o.eq(read.data)]
        return m


def test_rams():
    """BOARD-RAM-1: a queue in block RAM has no register beside it for its items, but with a memory whose old data count; a port that is
    transparent stays so; the boards' plans have both that and the thorough script."""
    counts = {}
    for kind in (Ram, Memory):
        with mock.patch.object(queue, "Ram", kind):
            _, counts[kind], blocks, _ = size(mapped("ECP5", queue.Queue(64, 512)))
        assert blocks == 2
    assert counts[Ram] < 64 < counts[Memory]
    files = ecp5.files_of(PLATFORMS["ecpix5"](), ecp5.Top(Echo(), clock_mhz=50, baud=2_000_000)).files
    assert "COLLISION_X_MASK 1'1" in files["top.il"]
    assert THOROUGH in files["top.ys"] and NO_WIDE_MUXES in files["top.ys"]
    for transparent, mask in ((False, "1"), (True, "0")):
        text = relaxed(to_rtlil(Row(transparent)))
        assert re.findall(r"COLLISION_X_MASK (.*)", text) == [f"1'{mask}"]
