"""``python -m ringwall.rtl.verilog``: its Verilog in a design around it, header, list of ports, core file, and how it ends."""

import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ringwall.models.host import Delay, Host, MemoryRead, MemoryWrite
from ringwall.models.host import enumerate as enumerate_functions
from ringwall.models.host import run as run_software
from ringwall.models.iommu import registers as model
from ringwall.models.memory import GuestMemory
from ringwall.models.tlp import encode
from ringwall.models.virtio.driver import StructureType, VirtioPciDriver
from ringwall.rtl import card_file
from ringwall.rtl.config import BlkConfig, EndpointConfig, IommuConfig, VirtioIommuConfig
from ringwall.rtl.generate import header, main, ports, registers_of
from ringwall.rtl.verilog import RawCard, Series7Card, TunnelCard, UltraScaleCard, ports_of
from ringwall.rtl.virtio.console import ConsoleDevice
from ringwall.rtl.virtio.net import NetDevice
from ringwall.rtl.virtio.rng import RngDevice
from ringwall.sim.builds import made_once

EXAMPLE = Path(__file__).resolve().parents[1] / "boards" / "example"
COMMAND = [sys.executable, "-m", "ringwall.rtl.verilog"]

# Around the design: for each line "beats, whether something is answered" it sends so many beats, given in the following lines, and prints
# what comes until a TLP has ended, or nothing came for long; then a dot.
BENCH = """
module bench;
  reg clk = 0, rx_valid = 0, rx_first = 0, rx_last = 0, done;
  reg [1:0] rx_keep = 0;
  reg [63:0] rx_data = 0;
  wire rx_ready, tx_valid, tx_first, tx_last;
  wire [1:0] tx_keep;
  wire [63:0] tx_data;
  integer count, answered, patience;
  top top (
    .clk(clk), .rst(1'b0), .link_down(1'b0), .rx_valid(rx_valid), .rx_ready(rx_ready), .rx_data(rx_data), .rx_keep(rx_keep),
    .rx_first(rx_first), .rx_last(rx_last), .tx_valid(tx_valid), .tx_ready(1'b1), .tx_data(tx_data), .tx_keep(tx_keep),
    .tx_first(tx_first), .tx_last(tx_last));
  always #2 clk = !clk;
  initial begin
    while ($fscanf(32'h80000000, "%d %d", count, answered) == 2) begin
      repeat (count) begin
        if ($fscanf(32'h80000000, "%b %b %b %h", rx_last, rx_first, rx_keep, rx_data) != 4) $finish;
        rx_valid = 1;
        @(posedge clk);
        while (!rx_ready) @(posedge clk);
        @(negedge clk);
      end
      rx_valid = 0;
      patience = answered ? 3000 : 100;
      done = 0;
      while (patience > 0 && !done) begin
        @(posedge clk);
        patience = patience - 1;
        if (tx_valid) $display("%b %h", tx_keep, tx_data);
        done = answered && tx_valid && tx_last;
        @(negedge clk);
      end
      $display(".");
      $fflush;
    end
    $finish;
  end
endmodule
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory, worker_id):
    """Return the folder into which the command wrote the example's card, once for all processes of this run."""

    def make(folder):
        done = subprocess.run([*COMMAND, "--config", EXAMPLE / "card.toml", "--out", folder], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        assert "elaborating example_card: 64 bits, functions: IommuConfig, BlkConfig, ConsoleDevice" in done.stderr

    base = tmp_path_factory.getbasetemp()
    return made_once((base if worker_id == "master" else base.parent) / "example", make)


class Simulated:
    """The example design in Icarus, with the golden host at its link."""

    def __init__(self, folder, verilog):
        (folder / "bench.v").write_text(BENCH)
        built = subprocess.run(["iverilog", "-g2005", "-Wall", "-Wno-timescale", "-s", "bench", "-o", folder / "bench.vvp",
                                folder / "bench.v", EXAMPLE / "top.v", verilog], capture_output=True, text=True, check=True)  # fmt: skip
        assert built.stderr == ""
        self.process = subprocess.Popen(["vvp", "-n", folder / "bench.vvp"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.host = Host(GuestMemory(), rng=random.Random(1))

    def perform(self, operation):
        if isinstance(operation, Delay):
            return None
        pending = self.host.start(operation)
        for tlp in pending.tlps:
            dwords = encode(tlp)
            beats = [f"{int(n + 2 >= len(dwords))} {int(n == 0)} {'11' if n + 1 < len(dwords) else '01'} "
                     f"{sum(dword << 32 * lane for lane, dword in enumerate(dwords[n : n + 2])):x}"
                     for n in range(0, len(dwords), 2)]  # fmt: skip
            print(len(beats), int(not pending.done), *beats, sep="\n", file=self.process.stdin, flush=True)
            got = []
            while (line := self.process.stdout.readline().strip()) != ".":
                keep, data = line.split()
                got += [int(data, 16) >> 32 * lane & 0xFFFF_FFFF for lane in range(2) if int(keep, 2) >> lane & 1]
            if got:
                self.host.receive(got)
        assert pending.done and not self.host.violations
        return pending.result

    def run(self, software):
        return run_software(software, self.perform)


def defines(text):
    """Return the numbers of a C header by name."""
    return {name: int(value, 0) for name, value in re.findall(r"^#define (\w+) (\w+)", text, re.MULTILINE)}


def test_example(example, tmp_path):
    """GEN-1: the example design in Icarus is enumerated by the golden host; IDs, BARs, MSI-X, virtio structures, doorbells and registers
    are where the header says."""
    simulated = Simulated(tmp_path, example / "example_card.v")
    functions = simulated.run(enumerate_functions(simulated.host))
    found = {"FUNCTIONS": len(functions)}
    for info in functions:
        f = f"F{info.function}_"
        assert not info.problems
        found |= {f"{f}VENDOR_ID": info.vendor, f"{f}DEVICE_ID": info.device, f"{f}CLASS": info.class_code}
        found |= {f"{f}BAR{index}_BYTES": bar.size for index, bar in info.bars.items()}
        found |= {f"{f}MSIX_VECTORS": info.msix.count, f"{f}MSIX_TABLE_BAR": info.msix.table_bar, f"{f}MSIX_PBA_BAR": info.msix.pba_bar,
                  f"{f}MSIX_TABLE": info.msix.table_offset, f"{f}MSIX_PBA": info.msix.pba_offset}  # fmt: skip
    found |= {f"F0_{name.upper()}": model.OFFSET[name] for name in (one.name for one in registers_of(IommuConfig()))}
    found["F0_REGISTERS_BAR"] = 0
    for info in functions[1:]:
        f, driver = f"F{info.function}_", VirtioPciDriver(info)
        simulated.run(driver.find())
        for kind in ("COMMON", "ISR", "DEVICE", "NOTIFY"):
            place = driver.structure(StructureType[kind])
            found |= {f"{f}{kind}": place.offset, f"{f}{kind}_BAR": place.bar, f"{f}{kind}_BYTES": place.length}
        found |= {f"{f}NOTIFY_MULTIPLIER": driver.notify_multiplier, f"{f}QUEUES": simulated.run(driver.load("num_queues"))}
        for n in range(found[f"{f}QUEUES"]):
            simulated.run(driver.store("queue_select", n))
            at = simulated.run(driver.load("queue_notify_off")) * driver.notify_multiplier
            found |= {f"{f}QUEUE{n}_SIZE": simulated.run(driver.load("queue_size")), f"{f}QUEUE{n}_DOORBELL": found[f"{f}NOTIFY"] + at}
    text = (example / "example_card.h").read_text()
    assert defines(text) == {f"EXAMPLE_CARD_{name}": value for name, value in found.items()}
    ddtp = functions[0].bars[0].address + found["F0_DDTP"]
    simulated.perform(MemoryWrite(ddtp, 8, 1))
    assert simulated.perform(MemoryRead(ddtp, 8)) == 1
    simulated.process.stdin.close()
    assert simulated.process.wait(timeout=60) == 0


CARDS = {
    "raw": lambda: RawCard(EndpointConfig(width=64, disks=(BlkConfig(),), devices=(NetDevice(), ConsoleDevice(), RngDevice()))),
    "series7": lambda: Series7Card(EndpointConfig(width=128, iommu=None)),
    "tunnel": lambda: TunnelCard(EndpointConfig(width=64)),
    "ultrascale": lambda: UltraScaleCard(EndpointConfig(width=256, disks=(), devices=(NetDevice(),))),
}


@pytest.mark.parametrize("link", CARDS)
def test_ports_are_told(link):
    """GEN-2: the list of ports has every port of a card, on each link and with each kind of device, and says what each is."""
    card = CARDS[link]()
    listed = ports(card)
    assert [name for name, *_ in listed] == ["clk", "rst", *ports_of(card)]
    assert not [name for name, _, _, text in listed if len(text.partition(": ")[2] or text) < 12]


def test_ports_are_those_of_the_verilog(example):
    """GEN-3: the example's list of ports has the names, directions and widths of its Verilog, and no other."""
    verilog, listed = ((example / name).read_text() for name in ("example_card.v", "example_card_ports.md"))
    module = re.search(r"^module example_card\(.*?^endmodule", verilog, re.MULTILINE | re.DOTALL)[0]
    declared = re.findall(r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", module, re.MULTILINE)
    found = {name: (way, int(high or 0) + 1) for way, high, name in declared}
    table = re.findall(r"^\| `(\w+)` \| (input|output) \| (\d+) \| (?:`clk`)? \| ([^|]+) \|$", listed, re.MULTILINE)
    assert {name: (way, int(bits)) for name, way, bits, _ in table} == found
    assert len(table) == listed.count("\n| `")


def test_header_compiles(example):
    """GEN-4: a C compiler takes the header, also twice in one file."""
    name = example / "example_card.h"
    text = f'#include "{name}"\n#include "{name}"\nstatic_assert(EXAMPLE_CARD_F2_QUEUE1_DOORBELL == 0x3004, "");\n'
    subprocess.run(["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-x", "c++", "-"], input=text, text=True, check=True)


def test_headers():
    """GEN-5: headers of other cards: without IOMMU, with virtio-iommu, with virtual functions, with the IOMMU's registers in a BAR of the
    disk; registers come with their features."""
    virtual = defines(header("a", EndpointConfig(iommu=None, disks=(BlkConfig(virtual_functions=2, queues=3),))))
    assert virtual["A_FUNCTIONS"] == 3 and virtual["A_F0_VIRTUAL_FUNCTIONS"] == 2
    assert virtual["A_F2_QUEUE2_DOORBELL"] == 0x3008 and "A_F2_DEVICE_ID" not in virtual and "A_F0_DDTP" not in virtual
    front = defines(header("a", EndpointConfig(iommu=VirtioIommuConfig())))
    assert (front["A_F0_DEVICE_ID"], front["A_F0_QUEUES"], front["A_F1_DEVICE_ID"]) == (0x1057, 2, 0x1042)
    rich = defines(header("a", EndpointConfig(iommu=IommuConfig(HPM=True, counters=2, DBG=True))))
    assert rich["A_F0_IOHPMEVT2"] == 0x168 and rich["A_F0_TR_RESPONSE"] == 0x268
    assert not {"A_F0_IOHPMCTR3", "A_F0_PQB"} & set(rich)
    shared = defines(header("a", EndpointConfig(iommu=IommuConfig(bar=4))))
    assert (shared["A_FUNCTIONS"], shared["A_F0_DEVICE_ID"], shared["A_F0_QUEUES"]) == (1, 0x1042, 1)
    assert (shared["A_F0_REGISTERS_BAR"], shared["A_F0_BAR4_BYTES"], shared["A_F0_DDTP"]) == (4, 0x1000, 0x010)


def test_core_file(example, tmp_path):
    """GEN-6: FuseSoC finds the core by its name and builds it with Icarus; a file that is no CAPI 2 it refuses."""
    tool = Path(sysconfig.get_path("scripts"), "fusesoc")

    def build(folder):
        command = [tool, "--config", tmp_path / "none.conf", "--cores-root", folder, "run", "--setup", "--build", "--target", "default",
                   "--tool", "icarus", "--build-root", tmp_path / "build", "ringwall:card:example_card"]  # fmt: skip
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    (tmp_path / "none.conf").write_text("")
    done = build(example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: Failed" not in done.stderr
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in example.glob("example_card.*"):
        (bad / path.name).write_text(path.read_text().replace("filesets: [", "filesetz: [") if path.suffix == ".core" else "")
    assert build(bad).returncode


def test_verilog_is_portable(example):
    """GEN-7: every process of the Verilog has a clock; every module, the disk's store too, has the card's name in front."""
    text = (example / "example_card.v").read_text()
    assert {line.removesuffix(" begin") for line in re.findall(r"always.*", text)} == {"always @(posedge clk)"}
    assert "ringwall_store" not in text and "example_card_store" in text
    assert not [name for name in re.findall(r"^module \\?(\S+?) ?\(", text, re.MULTILINE) if not re.match(r"example_card\b", name)]


def test_command(tmp_path, capsys):
    """GEN-8: --help and --example answer; files that are not there, not text or no cards and folders that cannot be end with status 2 and
    a sentence, and leave nothing behind."""
    assert main(["--example"]) == 0
    shown = capsys.readouterr()
    assert (shown.out.strip(), shown.err) == (card_file.example().strip(), "")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "bad").write_text("width = 96")
    (tmp_path / "good").write_text("width = 64")

    def said(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # of argparse
            status = end.code
        return status, *capsys.readouterr()

    out = "--out", tmp_path / "out"
    assert said("--help")[::2] == (0, "") and not said("--example")[0]
    for arguments, sentence in (
        ((), "--config and --out must both be there"), (("--config", "x"), "--config and --out must both be there"),
        (("--config", tmp_path / "absent", *out), "absent must be a file or folder of yours: No such file or directory."),
        (("--config", tmp_path, *out), "must be a file or folder of yours: Is a directory."),
        (("--config", tmp_path / "binary", *out), "binary must be text in UTF-8."),
        (("--config", tmp_path / "bad", *out), "bad: width: Width of the data path must be 64, 128, 256 or 512 bits, not 96."),
        (("--config", tmp_path / "good", "--out", tmp_path / "bad"), "bad must be a file or folder of yours: File exists."),
    ):  # fmt: skip
        status, shown, told = said(*arguments)
        assert (status, shown) == (2, "") and told.strip().endswith(sentence)
    assert not (tmp_path / "out").exists()
