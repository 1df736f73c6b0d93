"""The harness itself: a run that should fail must fail, and drivers and monitors see what happens."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cocotb
import pytest
from amaranth.hdl import Const, Module, ShapeCastable, Signal, Value, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge, Timer

from ringwall.rtl.verilog import convert
from ringwall.sim import builds
from ringwall.sim import run as harness
from ringwall.sim.card import bench_card
from ringwall.sim.run import params, ports, run
from ringwall.sim.stream import cycle, pack, pattern_ready, random_ready, start, unpack


class Kind(enum.Enum, shape=2):
    READ = 1
    WRITE = 2


class Item(data.Struct):
    low: 12
    kind: Kind
    near: data.StructLayout({"x": signed(5), "y": 3})
    table: data.ArrayLayout(15, 2)


class Register(wiring.Component):
    """One register between two streams: takes a new item when it is empty or is being emptied."""

    i: In(stream.Signature(Item))
    o: Out(stream.Signature(Item))

    def elaborate(self, platform):
        m = Module()
        full, held = Signal(), Signal(Item)
        m.d.comb += [self.i.ready.eq(~full | self.o.ready), self.o.valid.eq(full), self.o.payload.eq(held)]
        with m.If(self.i.ready):
            m.d.sync += [full.eq(self.i.valid), held.eq(self.i.payload)]
        return m


class Rude(wiring.Component):
    """Breaks the rules of a stream on demand: 1 withdraws ``valid``, 2 changes a stalled payload, 3 shows X in Icarus."""

    how: In(2)
    o: Out(stream.Signature(8))

    def elaborate(self, platform):
        m = Module()
        count = Signal(8)
        m.d.sync += count.eq(count + 1)
        m.submodules.memory = memory = Memory(shape=8, depth=4, init=[])
        port = memory.read_port()
        m.d.comb += port.en.eq(0)  # never read: its output is unknown
        m.d.comb += [self.o.valid.eq((self.how != 1) | count[1]), self.o.payload.eq(7)]
        with m.If(self.how == 2):
            m.d.comb += self.o.payload.eq(count)
        with m.If(self.how == 3):
            m.d.comb += self.o.payload.eq(port.data)
        return m


class Tied(wiring.Component):
    """An input that is always ready, an output that is always valid, and one without a payload."""

    i: In(stream.Signature(8, always_ready=True))
    level: Out(stream.Signature(8, always_valid=True))
    ticks: Out(stream.Signature(0))

    def elaborate(self, platform):
        m = Module()
        with m.If(self.i.valid):
            m.d.sync += self.level.payload.eq(self.i.payload)
        m.d.comb += self.ticks.valid.eq(self.level.payload[0])
        return m


class Still(wiring.Component):
    """Outputs that depend on a register that never changes, or on nothing."""

    level: Out(2)
    mixed: Out(data.StructLayout({"constant": 2, "held": 2}))

    def elaborate(self, platform):
        m = Module()
        state = Signal(2, init=2)
        m.d.sync += state.eq(state)
        with m.Switch(state):
            with m.Case(2):
                m.d.comb += [self.level.eq(3), self.mixed.held.eq(1)]
        m.d.comb += self.mixed.constant.eq(2)
        return m


class Circle(wiring.Component):
    """No loop of bits, but of registers: ``o.b`` depends on ``y``, which depends on ``o.a``; each has a default of its own."""

    x: In(1)
    o: Out(data.StructLayout({"a": 1, "b": 1}))

    def elaborate(self, platform):
        m = Module()
        y, state = Signal(2), Signal()
        m.d.sync += state.eq(~state)
        with m.If(self.x):
            m.d.comb += [self.o.a.eq(1), self.o.b.eq(y[0])]
        with m.If(self.o.a):
            m.d.comb += y.eq(1)
        with m.Elif(state):
            m.d.comb += y.eq(2)
        return m


class Chain(wiring.Component):
    """Each of four levels has a default and depends on the one before and on ``x``."""

    x: In(2)
    o: Out(2)

    def elaborate(self, platform):
        m = Module()
        before = self.x
        for n in range(4):
            level = Signal(2, name=f"level_{n}")
            with m.Switch(self.x):
                with m.Case(1):
                    m.d.comb += level.eq(1)
                with m.Case(3):
                    m.d.comb += level.eq(before)
            before = level
        m.d.comb += self.o.eq(before)
        return m


class Hasty(wiring.Component):
    """One bit of a register depends on another bit, which is assigned later: Verilog would read the default."""

    x: In(1)
    o: Out(2)

    def elaborate(self, platform):
        m = Module()
        with m.If(self.x):
            m.d.comb += [self.o[1].eq(self.o[0]), self.o[0].eq(1)]
        return m


def module_of(tmp_path, text):
    """Return the name of a module made of ``text``."""
    name = f"written_{abs(hash(text)):x}"
    file = tmp_path / f"{name}.py"
    file.write_text("import cocotb\nfrom cocotb.triggers import *\nfrom ringwall.sim.stream import *\n" + text)
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return name


@pytest.mark.parametrize("sim", ["icarus", "verilator"])
def test_streams(request, sim):
    """SIM-RUN-1: items arrive complete and in order under random back-pressure, on both simulators."""
    done = run(Register(), module=__name__, node=request.node.nodeid, params={"answer": [42]}, sim=sim,
               testcase=["streams_carry_everything", "put_and_get_move_one_item_per_cycle", "patterns_repeat"])  # fmt: skip
    assert [name.split(".")[-1] for name in done.tests] == [
        "streams_carry_everything", "put_and_get_move_one_item_per_cycle", "patterns_repeat"]  # fmt: skip


@cocotb.test(timeout_time=100, timeout_unit="us")
async def streams_carry_everything(dut):
    rng = random.Random(cocotb.RANDOM_SEED)
    assert params() == {"answer": [42]}
    assert ports()["i__payload"] == ("input", 52)
    i, o = await start(dut)
    got, when = [], []
    cocotb.start_soon(o.watch(got, when))
    cocotb.start_soon(random_ready(o, rng, 0.25))
    sent = [rng.getrandbits(52) for _ in range(500)]
    await i.put_many(sent[:400], gaps=lambda: rng.randrange(3))
    for payload in sent[400:]:
        await i.put(payload)
    await ClockCycles(dut.clk, 40)
    assert got == sent
    assert len(set(when)) == len(when) == 500, "two transfers in one cycle"
    assert 1500 < when[-1] - when[0] < 3000, "back-pressure is not as asked for"


@cocotb.test(timeout_time=100, timeout_unit="us")
async def put_and_get_move_one_item_per_cycle(dut):
    o, i = await start(dut, "o", "i")
    sent = [pack(Item, low=n, kind=Kind.WRITE, near={"x": -n % 16 - 16, "y": 5}, table=[n, 2 * n]) for n in range(100)]

    async def put():
        for payload in sent:
            await i.put(payload)

    cocotb.start_soon(put())
    begin = cycle()
    got = [await o.get() for _ in sent]
    assert cycle() - begin == 101
    assert got == sent
    last = unpack(Item, got[99])
    assert (last.low, last.kind, last.near.x, last.near.y, last.table) == (99, Kind.WRITE, -99 % 16 - 16, 5, [99, 198])


@cocotb.test(timeout_time=100, timeout_unit="us")
async def patterns_repeat(dut):
    i, o = await start(dut)
    got, when = [], []
    cocotb.start_soon(o.watch(got, when))
    cocotb.start_soon(pattern_ready(o, [1, 0, 0]))
    await i.put_many(range(30))
    await ClockCycles(dut.clk, 10)
    assert got == list(range(30))
    assert {b - a for a, b in itertools.pairwise(when)} == {3}


def test_ports(request):
    """SIM-RUN-2: streams with a constant valid or ready and without a payload work like others."""
    run(Tied(), module=__name__, node=request.node.nodeid, testcase="tied_streams_work")


@cocotb.test(timeout_time=100, timeout_unit="us")
async def tied_streams_work(dut):
    i, level, ticks = await start(dut, "i", "level", "ticks")
    await i.put_many([4, 6, 9])
    await RisingEdge(dut.clk)
    assert await level.get() == 9
    assert await ticks.get() == 0
    got = []
    cocotb.start_soon(ticks.watch(got))
    ticks.set_ready(1)
    await ClockCycles(dut.clk, 6)
    assert got in ([0] * 5, [0] * 6)
    with pytest.raises(ValueError, match=r"port of .* such as i, ticks, not 'nobody'"):
        await start(dut, "nobody")


@pytest.mark.parametrize("sim", ["icarus", "verilator"])
def test_still(request, sim):
    """SIM-RUN-12: an output is known from the start, also when nothing that it depends on ever changes, or nothing at all."""
    run(Still(), module=__name__, node=request.node.nodeid, sim=sim, testcase="level_is_known")


@cocotb.test(timeout_time=100, timeout_unit="us")
async def level_is_known(dut):
    await start(dut)
    assert dut.level.value == 3
    assert dut.mixed.value == 0b0110


@pytest.mark.parametrize("circuit", [Circle, Chain])
def test_zero_time(request, monkeypatch, tmp_path, circuit):
    """SIM-RUN-13: processes that wake each other in Icarus come to rest; without the translation they hang and the run is stopped."""
    run(circuit(), module=__name__, node=request.node.nodeid, sim="icarus", timeout_s=20, testcase="outputs_follow")
    untranslated = {Circle: harness._awake, Chain: lambda verilog: verilog.replace("always @*", "always_comb")}
    monkeypatch.setattr(harness, "_for_icarus", untranslated[circuit])
    monkeypatch.setattr(harness, "build_root", lambda: tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)no results were written.*stopped after 4 s"):
        run(circuit(), module=__name__, node=request.node.nodeid, sim="icarus", timeout_s=4, testcase="outputs_follow")


@cocotb.test(timeout_time=1, timeout_unit="us")
async def outputs_follow(dut):
    for _ in range(3):
        for x in range(2 ** ports()["x"][1]):
            dut.x.value = x
            await Timer(4, "ns")
            assert dut.o.value == {0: 0, 1: 3 if len(dut.x) == 1 else 1, 2: 0, 3: 3}[x]


def test_hasty():
    """SIM-RUN-14: a circuit whose Verilog depends on the order of the bits of one register is refused for Icarus."""
    with pytest.raises(RuntimeError, match=r"(?s)must assign one register and not read it.*o\[1\] = o\[0\];"):
        harness._for_icarus(convert(Hasty()))


FAILING = {
    "assertion": ("async def t(dut):\n    assert 1 == 2 - 0, 'told so'\n", "told so"),
    "exception": ("async def t(dut):\n    raise KeyError('gone')\n", "KeyError"),
    "background": ("async def t(dut):\n    await start(dut)\n    async def bad():\n        await RisingEdge(dut.clk)\n"
                   "        assert 0, 'behind'\n    cocotb.start_soon(bad())\n    await ClockCycles(dut.clk, 9)\n", "behind"),
    "hangs": ("async def t(dut):\n    await start(dut)\n    await dut.i__ready.falling_edge\n", "test_timeout|SimTimeoutError"),
    "stops": ("async def t(dut):\n    await Event().wait()\n", "simulator ran out of events|SimFailure|no results"),
    "exits": ("async def t(dut):\n    import os\n    os._exit(0)\n", "no results were written"),
    "loops": ("async def t(dut):\n    while True:\n        pass\n", "stopped after 3 s"),
    "import": ("async def t(dut):\n    pass\nimport no_such_module\n", "No module named 'no_such_module'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAILING)
def test_failure(request, tmp_path, kind):
    """SIM-RUN-3: a cocotb test that fails in any way fails the run, with its name, its reason and the seed."""
    text, reason = FAILING[kind]
    if kind in ("assertion", "exception", "background", "hangs"):
        reason = rf"(?s)\.t: (failure|error): .*({reason})"
    limit = "" if kind == "stops" else "timeout_time=1, timeout_unit='us'"
    module = module_of(tmp_path, f"@cocotb.test({limit})\n{text}")
    good = module_of(tmp_path, "@cocotb.test()\nasync def t(dut):\n    pass\n")
    run(Register(), module=good, node=request.node.nodeid)  # whose results must not count for the next run
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=reason) as caught:
        run(Register(), module=module, node=request.node.nodeid, seed=77, timeout_s=3 if kind == "loops" else 60)
    assert kind != "loops" or time.monotonic() - begin < 30
    assert "SEED=77 SIM=icarus" in str(caught.value)


def test_empty(request, tmp_path):
    """SIM-RUN-4: no test, a test that is not there, and a skipped test each fail the run."""
    node = request.node.nodeid
    with pytest.raises(AssertionError, match=r"No tests were discovered|no test ran"):
        run(Register(), module=module_of(tmp_path, "def test_x():\n    pass\n"), node=node)
    passing = "@cocotb.test()\nasync def t(dut):\n    pass\n"
    with pytest.raises(AssertionError, match="no test ran"):
        run(Register(), module=module_of(tmp_path, passing), node=node, testcase="u")
    with pytest.raises(AssertionError, match="test 'u' is not in"):
        run(Register(), module=module_of(tmp_path, passing), node=node, testcase=["t", "u"])
    with pytest.raises(AssertionError, match="skipped"):
        run(Register(), module=module_of(tmp_path, passing + "@cocotb.test(skip=True)\nasync def s(dut):\n    pass\n"), node=node)
    assert run(Register(), module=module_of(tmp_path, passing), node=node).tests[0].endswith(".t")


RUDE = {1: "valid was withdrawn before the transfer of 0x7", 2: "payload changed while stalled", 3: "not 0 or 1 in every bit: x+"}


@pytest.mark.parametrize("how", RUDE)
def test_watch(request, tmp_path, how):
    """SIM-RUN-5: the monitor catches a withdrawn valid, a payload that changes while stalled, and an unknown bit."""
    text = f"""
@cocotb.test(timeout_time=1, timeout_unit='us')
async def t(dut):
    (o,) = await start(dut, 'o')
    dut.how.value = {how}
    await ClockCycles(dut.clk, 2)
    cocotb.start_soon(o.watch([]))
    await ClockCycles(dut.clk, 20)
"""
    with pytest.raises(AssertionError, match="(?i)" + RUDE[how]):
        run(Rude(), module=module_of(tmp_path, text), node=request.node.nodeid, sim="icarus")
    assert run(Rude(), module=module_of(tmp_path, text.replace(f"value = {how}", "value = 0")), node=request.node.nodeid)


def test_seed(request, tmp_path, monkeypatch):
    """SIM-RUN-6: the seed is the one asked for, by argument, by variable, else from the test's own name."""
    node = request.node.nodeid
    text = "@cocotb.test()\nasync def t(dut):\n    print('number', cocotb.RANDOM_SEED)\n"

    def number(**arguments):
        done = run(Register(), module=module_of(tmp_path, text), node=node, **arguments)
        return done.seed, next(line for line in done.log.splitlines() if line.startswith("number"))

    monkeypatch.delenv("SEED", raising=False)
    own = number()
    assert own == number()
    assert number(seed=1) != own
    monkeypatch.setenv("SEED", "0x10")
    assert number()[0] == 16
    assert number(seed=16)[1] == number()[1] != own[1]


def test_same_run_twice(request, tmp_path):
    """SIM-RUN-19: processes that ask for the same run at once, as for what several tests need, do so one after the other."""
    text = """
@cocotb.test()
async def t(dut):
    mark = Path("mark")
    assert not mark.exists()
    mark.touch()
    time.sleep(0.5)
    mark.unlink()
"""
    module = module_of(tmp_path, f"import time\nfrom pathlib import Path\n{text}")
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, Register(), module=module, node=request.node.nodeid) for _ in range(3)]
    assert all(len(one.result().tests) == 1 for one in runs)


@pytest.mark.parametrize("sim", ["icarus", "verilator"])
def test_waves(request, tmp_path, sim):
    """SIM-RUN-7: a waveform is written when asked for and holds the signals of the design."""
    import pywellen

    text = "@cocotb.test()\nasync def t(dut):\n    i, o = await start(dut)\n    await i.put(0x123)\n    await o.get()\n"
    done = run(Register(), module=module_of(tmp_path, text), node=request.node.nodeid, sim=sim, waves=True)
    wave = pywellen.Waveform(str(done.folder / "waves.fst"))
    signal = next(v for v in wave.all_vars() if v.full_name.endswith("top.o__payload")).signal
    assert 0x123 in [signal.value_at(ps) for ps in range(0, 30000, 1000)]


def build_register(n):
    return str(harness._build(Register(), "icarus", False))


def test_build(monkeypatch, tmp_path):
    """SIM-RUN-8: processes that need the same circuit at once build it once; another circuit gets another build."""
    monkeypatch.setattr(harness, "build_root", lambda: tmp_path)
    calls = tmp_path / "calls"
    compile_once = harness._build_icarus

    def counted(work, waves):
        with open(calls, "a") as file:
            file.write("x")
        compile_once(work, waves)

    monkeypatch.setattr(harness, "_build_icarus", counted)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.map(build_register, range(8))
    assert len(set(folders)) == 1
    assert calls.read_text() == "x"
    assert not list(tmp_path.glob("*.part"))
    assert harness._build(Rude(), "icarus", False).name not in folders[0]
    assert json.loads((tmp_path / folders[0] / "ports.json").read_text())["o__valid"] == ["output", 1]


class Adder(wiring.Component):
    """Has a parameter; ``hidden`` is one that no text stands for."""

    def __init__(self, amount, hidden=None):
        self.amount, self.hidden = amount, hidden
        super().__init__({"i": In(Item), "o": Out(Item), "sum": Out(12)})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.sum.eq(self.i.low + Value.cast(self.amount))
        return m


class Odd(ShapeCastable):
    """A shape that no text stands for."""

    def as_shape(self):
        return unsigned(3)

    def const(self, init):
        return Const(init or 0, 3)

    def __call__(self, value):
        return value

    def from_bits(self, raw):
        return raw


class Wider(Adder):
    pass


def test_known_components(monkeypatch, tmp_path):
    """SIM-RUN-15: a component is elaborated once for its class, attributes and sources; one with an attribute without a name each time."""
    elaborated, make = [], builds._elaborate
    monkeypatch.setattr(builds, "_elaborate", lambda component: elaborated.append(component) or make(component))
    monkeypatch.delenv("RINGWALL_NIGHTLY", raising=False)
    names = [builds.circuit(adder, tmp_path)[1] for adder in (Adder(1), Adder(2), Wider(2), Adder(1), Adder(Kind.WRITE), Adder(2))]
    assert len(elaborated) == 4, "Adder(1), Adder(2), Wider(2), Adder(Kind.WRITE)"
    assert names[0] == names[3]
    assert names[1] == names[2] == names[4] == names[5], "two names may stand for one circuit"
    assert names[0] != names[1]
    text, name = builds.circuit(Adder(1), tmp_path)
    assert (text, name) == (convert(Adder(1)), names[0])
    monkeypatch.setattr(builds, "_text", lambda path: "another text")
    builds.circuit(Adder(1), tmp_path)
    assert len(elaborated) == 5
    for hidden in (lambda: 0, Signal(), data.StructLayout({"x": Odd()})):
        builds.circuit(Adder(3, hidden), tmp_path)
        builds.circuit(Adder(3, hidden), tmp_path)
    assert len(elaborated) == 11
    local = type("Local", (Adder,), {})
    builds.circuit(local(3), tmp_path)
    builds.circuit(local(3), tmp_path)
    assert len(elaborated) == 13


def test_names_that_say_too_little(monkeypatch, tmp_path):
    """SIM-RUN-17: in nightly runs a name that two circuits share is found."""
    monkeypatch.setattr(builds._Described, "of", lambda self, thing: "the same")
    monkeypatch.delenv("RINGWALL_NIGHTLY", raising=False)
    assert builds.circuit(Adder(1), tmp_path) == builds.circuit(Adder(2), tmp_path)
    monkeypatch.setenv("RINGWALL_NIGHTLY", "1")
    builds.circuit(Adder(1), tmp_path)
    with pytest.raises(RuntimeError, match="stands for more than one circuit: the same"):
        builds.circuit(Adder(2), tmp_path)


class Rows(wiring.Component):
    """A memory, some rows of which begin alike."""

    i: In(4)
    o: Out(7)

    def elaborate(self, platform):
        m = Module()
        m.submodules.rows = rows = Memory(shape=7, depth=16, init=[5, 5, 5, 5, 9, 5, 100, 100])
        read = rows.read_port(domain="comb")
        m.d.comb += [read.addr.eq(self.i), self.o.eq(read.data)]
        return m


def test_rows(tmp_path):
    """SIM-RUN-18: rows of a memory that begin alike become loops, and nothing else changes."""
    text, _ = builds.circuit(Rows(), tmp_path)
    loop = r"^( +)for \(integer row = (\d+); row <= (\d+); row = row \+ 1\) (\S+)\[row\] = (.*);\n"
    assert [(m[2], m[3], m[5]) for m in re.finditer(loop, text, re.MULTILINE)] == [
        ("0", "3", "7'h05"), ("6", "7", "7'h64"), ("8", "15", "7'h00")]  # fmt: skip
    unrolled = re.sub(loop, lambda m: "".join(f"{m[1]}{m[4]}[{n}] = {m[5]};\n" for n in range(int(m[2]), int(m[3]) + 1)), text, flags=re.M)
    assert unrolled == re.sub(r"(\S) \[(\d+)\] = ", r"\1[\2] = ", convert(Rows()))


def test_sources_are_all():
    """SIM-RUN-16: what stands for the sources has every file that a card is made from."""
    described = builds._Described()
    described.of(bench_card(64))
    text = described.sources()
    used = {Path(module.__file__).resolve() for name, module in sys.modules.items() if name.startswith("ringwall.rtl.")}
    used.add(Path(sys.modules["ringwall.sim.counted"].__file__).resolve())
    assert len(used) > 30
    assert all(path.read_text() in text for path in used)


def test_build_error(monkeypatch, tmp_path):
    """SIM-RUN-9: a circuit that the simulator refuses raises with the simulator's message, and is tried again next time."""
    monkeypatch.setattr(harness, "build_root", lambda: tmp_path)
    monkeypatch.setattr(harness, "circuit", lambda component, root: ("module top(a);\n  input a ;\n  wire 3;\nendmodule\n", "bad"))
    with pytest.raises(RuntimeError, match=r"(?s)iverilog returned .*syntax error"):
        harness._build(Register(), "icarus", False)
    monkeypatch.undo()
    monkeypatch.setattr(harness, "build_root", lambda: tmp_path)
    assert (harness._build(Register(), "icarus", False) / "sim.vvp").is_file()


def test_arguments(request):
    """SIM-RUN-10: wrong arguments are refused with a sentence; the conversion gives the same text every time."""
    with pytest.raises(ValueError, match="Simulator must be one of icarus, verilator, not 'spice'"):
        run(None, module=__name__, node=request.node.nodeid, sim="spice")
    with pytest.raises(TypeError, match=r"must be an amaranth.lib.wiring.Component, not 3"):
        convert(3)
    assert convert(Register()) == convert(Register())
    assert os.environ["AMARANTH_USE_YOSYS"] == "builtin"


def test_pack():
    """SIM-RUN-11: pack and unpack agree with Amaranth's own constants, and refuse what does not fit."""
    rng = random.Random(5)
    layout = data.Layout.cast(Item)
    for _ in range(200):
        near = {"x": rng.randrange(-16, 16), "y": rng.randrange(8)}
        table = [rng.getrandbits(15), rng.getrandbits(15)]
        fields = {"low": rng.getrandbits(12), "kind": rng.choice(list(Kind)), "near": near, "table": table}
        bits = pack(Item, **fields)
        assert bits == layout.const(fields).as_bits() == pack(layout, **fields)
        got = unpack(Item, bits)
        assert (got.low, got.kind, vars(got.near), got.table) == tuple(fields.values())
        assert pack(Item, **vars(got)) == bits
    assert unpack(Item, 0).kind == 0
    for wrong, message in [({"low": 4096}, "low: Value must fit an unsigned field of 12 bits, not 4096"), ({"low": -1}, "not -1"),
                           ({"near": {"x": 16}}, "near: x: Value must fit a signed field of 5 bits, not 16"),
                           ({"kine": 1}, "Field must be one of low, kind, near, table, not 'kine'"),
                           ({"table": [1, 2, 3]}, "at most 2 items, not 3")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pack(Item, **wrong)
