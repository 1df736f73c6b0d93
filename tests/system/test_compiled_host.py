"""The host bridge of the compiled card against a card of clay: beats that a test chooses, right and wrong ones."""

import itertools
import random
import shutil
import subprocess
import tomllib
from types import SimpleNamespace

import pytest

from ringwall.models.events import TlpReceived, TlpSent
from ringwall.models.host import CompletionPolicy, Host
from ringwall.models.memory import AccessFault, GuestMemory
from ringwall.models.tlp import Tlp, TlpType, decode, encode, memory_read, memory_write
from ringwall.sim import compiled
from ringwall.sim.builds import compile_library
from ringwall.sim.compiled import BrokenRule, CompiledCard

WIDTH = 64
LANES = WIDTH // 32
BASE, SIZE = 0x1_0000, 0x1_0000  # mapped memory
CONFIG = SimpleNamespace(width=WIDTH, read_buffer_bytes=16384, disks=())

# It has the ports of the wrapper. From its one file it plays beats: "first cycle, payload words"; a line is offered from its cycle on
# until it is taken (or, with "withdraw", for one cycle).
CLAY = """
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
struct VerilatedContext {};
struct Vcard {
  explicit Vcard(VerilatedContext *) {
    if (FILE *f = fopen(getenv("CLAY"), "r")) {
      Beat b;
      while (fscanf(f, "%lu %x %x %x %d", &b.cycle, &b.words[0], &b.words[1], &b.words[2], &b.fickle) == 5) beats[count++] = b;
      fclose(f);
    }
  }
  void eval() {
    if (clk && !was) {
      if (now && o_valid && ready) next++, held = 0;
      else if (o_valid && beats[next].fickle) beats[next].fickle == 1 ? (void)next++ : (void)(beats[next].words[0] ^= 1);
      now++;
      ready = o_ready;
      o_valid = next < count && beats[next].cycle <= now;
      if (o_valid) for (int n = 0; n < 3; n++) o_payload[n] = beats[next].words[n];
    }
    was = clk;
  }
  void final() {}
  struct Beat { unsigned long cycle; uint32_t words[3]; int fickle; } beats[20000];
  unsigned long now = 0;
  int count = 0, next = 0, held = 0;
  uint8_t clk = 0, was = 1, link_reset = 0, i_valid = 0, i_ready = 1, o_valid = 0, o_ready = 0, ready = 0;
  uint32_t i_payload[3], o_payload[3];
};
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clay")
    (folder / "Vcard.h").write_text(CLAY)
    (folder / "verilated.h").write_text("")
    subprocess.run(["c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", f"-DCARD_WIDTH={WIDTH}", "-I", str(folder),
                    "-o", str(folder / "card.so"), str(compiled._SOURCE)], check=True)  # fmt: skip
    return folder / "card.so"


@pytest.fixture
def clay(library, tmp_path, monkeypatch):
    """Return a function that makes a card that plays beats ``[(cycle, data, keep, first, last, fickle)]``."""
    cards = []

    def make(beats, *, mps=256, mrrs=512, bus_master=True, ext_tag=True, **parameters):
        text = ""
        for at, data, keep, first, last, fickle in beats:
            words = [*data, *[0] * (LANES - len(data)), keep | first << LANES | last << LANES + 1]
            text += f"{at} {' '.join(f'{word:x}' for word in words)} {fickle}\n"
        (tmp_path / "beats").write_text(text)
        monkeypatch.setenv("CLAY", str(tmp_path / "beats"))
        monkeypatch.setattr(compiled, "build", lambda config, **how: library)
        card = CompiledCard(CONFIG, mps=mps, mrrs=mrrs, **parameters)
        card.map(BASE, SIZE)
        card.host.assume_enabled(1, mps=mps, mrrs=mrrs, ext_tag=ext_tag)
        if not bus_master:
            card.host.function(1).bus_master = False
        card._follow()
        cards.append(card)
        return card

    yield make
    for card in cards:
        card.close()


def beats_of(dwords, at=10, fickle=0):
    """Return the beats of a TLP, the first offered from cycle ``at`` on."""
    parts = [dwords[n : n + LANES] for n in range(0, len(dwords), LANES)]
    return [(at, part, (1 << len(part)) - 1, n == 0, n == len(parts) - 1, fickle) for n, part in enumerate(parts)]


def read_of(address, length, tag=5, **fields):
    return encode(memory_read(address, length, requester_id=0x101, tag=tag, **fields))


def write_of(address, data, **fields):
    return encode(memory_write(address, data, requester_id=0x101, **fields))


GOOD = write_of(BASE, bytes(64))
FIRST, SECOND, *_ = beats_of(GOOD)

BAD_BEATS = {
    "first is 0": [(10, [0, 0], 3, 0, 0, 0)],
    "first is 1 on beat 1": [FIRST, FIRST],
    "last is 0 and keep is 0x1": [(10, [0], 1, 1, 0, 0)],
    "last is 1 and keep is 0x2": [FIRST, (10, [0, 0], 2, 0, 1, 0)],
    "last is 1 and keep is 0": [FIRST, (10, [], 0, 0, 1, 0)],
    "does not end after": [FIRST, *[SECOND] * 600],
}


@pytest.mark.parametrize("rule", BAD_BEATS)
def test_framing(clay, rule):
    """SYS-COMPHOST-1: beats out of the framing of the raw link end the run with the rule and the cycle."""
    card = clay(BAD_BEATS[rule])
    with pytest.raises(BrokenRule, match=f"cycle [0-9]+: .*{rule}"):
        card.step(5000)


@pytest.mark.parametrize("fickle, rule", [(1, "valid was withdrawn"), (2, "stalled beat changed")])
def test_stalled_beats(clay, fickle, rule):
    """SYS-COMPHOST-2: under stalls a beat that is withdrawn or changes ends the run; a patient card does not."""
    tlps = [beats_of(write_of(BASE + 4 * n, bytes([n] * 4)), 10 + 40 * n) for n in range(40)]
    patient = list(itertools.chain(*tlps))
    card = clay(patient, stalls=200)
    card.step(20_000)
    assert card.counts.writes == 40
    assert card.read(BASE, 160) == b"".join(bytes([n] * 4) for n in range(40))
    changed = [(*beat[:5], fickle) if n == 1 else beat for n, beat in enumerate(patient)]
    found = []
    for seed in range(8):
        card = clay(changed, stalls=200, seed=seed)
        try:
            card.step(20_000)
        except BrokenRule as error:
            found.append(str(error))
    assert found, "no stall met the beat that does not keep still"
    assert all(rule in text for text in found), found


def test_paced_link(clay):
    """SYS-COMPHOST-10: a filled paced link carries 63/64 of the interface, 8 bytes of it for each TLP, in either direction, and no less."""
    cycles, beats, dwords = 4000, 10, 3 + 16
    writes = [beat for _ in range(900) for beat in beats_of(write_of(BASE, bytes(64)))]
    reads = [beat for n in range(900) for beat in beats_of(read_of(BASE, 64, tag=n % 256), 10 + 8 * n)]
    for paced, expected in ((False, cycles / beats), (True, cycles * WIDTH / 8 * 63 / 64 / (4 * dwords + 8))):
        for name, tlps in (("writes", writes), ("sent", reads)):
            card = clay(tlps, paced=paced)
            card.step(2000)
            before = getattr(card.counts, name)
            card.step(cycles)
            assert abs(getattr(card.counts, name) - before - expected) < 2


def altered(dwords, *changes):
    """Return ``dwords`` with ``(index, mask)`` toggled."""
    made = list(dwords)
    for index, mask in changes:
        made[index] ^= mask
    return made


READ, WRITE, WIDE = read_of(BASE, 64), write_of(BASE, bytes(64)), read_of(1 << 32, 8)
BAD_TLPS = {
    "prefix or reserved Fmt": altered(READ, (0, 1 << 31)),
    "does not send this request": encode(Tlp(TlpType.CFGRD0, length_dw=1, requester_id=0x101, tag=1, first_be=15, completer_id=0)),
    "length is not that of the header": WRITE[:-1],
    "length is not that": [*READ, 0],
    "4 dwords for an address below 4 GiB": altered(WIDE, (2, 1)),
    "processing hint": altered(READ, (2, 1)),
    "byte enables: ": altered(READ, (1, 0xF0)),
    "byte enables": altered(read_of(BASE, 4), (1, 0x10)),
    "byte enables have gaps": altered(READ, (1, 0x04)),
    "crosses 4 KiB": altered(read_of(BASE, 128), (2, 0xFC0)),
    "traffic class": altered(READ, (0, 1 << 20)),
    "poison": altered(WRITE, (0, 1 << 14)),
    "no function of the card": altered(READ, (1, 1 << 16)),
    "no function of the card:": altered(READ, (1, 1 << 24)),
    "longer than Max_Payload_Size": write_of(BASE, bytes(260)),
    "longer than Max_Read_Request_Size": read_of(BASE, 516),
    "one whole dword": write_of(0xFEE0_0000, bytes(8)),
    "one whole dword:": write_of(0xFEE0_0000, bytes(2)),
}


@pytest.mark.parametrize("rule", BAD_TLPS)
def test_rules(clay, rule):
    """SYS-COMPHOST-3: malformed TLPs, and what the host did not enable, end the run. [PCIe5 2.2, 2.3]"""
    card = clay([*beats_of(WRITE), *beats_of(BAD_TLPS[rule], 30)])
    with pytest.raises(BrokenRule, match=rule):
        card.step(1000)
    assert card.counts.writes == 1


def test_more_rules(clay):
    """SYS-COMPHOST-4: tags in use or too wide, requests without bus master, attributes that are off. [PCIe5 2.2.6, 7.5.1.1.3]"""
    twice = [*beats_of(READ), *beats_of(READ, 60)]
    clay(twice, latency=2).step(1000)
    early = [*beats_of(read_of(BASE, 512)), *beats_of(read_of(BASE, 4), 60)]  # between the ends of the two pieces of an answer
    for rule, beats, parameters in (
        ("tag is still in use", twice, {"latency": 100}),
        ("tag is still in use", early, {"latency": 2}),
        ("tag is wider", beats_of(read_of(BASE, 4, tag=32)), {"ext_tag": False}),
        ("read without bus master", beats_of(READ), {"bus_master": False}),
        ("write without bus master", beats_of(WRITE), {"bus_master": False}),
    ):
        card = clay(beats, **parameters)
        with pytest.raises(BrokenRule, match=rule):
            card.step(1000)
    card = clay(beats_of(read_of(BASE, 4, relaxed_ordering=True)))
    card.host.function(1).relaxed_ordering = False
    card._follow()
    with pytest.raises(BrokenRule, match="attributes are not enabled"):
        card.step(1000)


def random_requests(rng, count):
    """Return random legal reads and writes of the card, also to where nothing is mapped, with gaps in the enables, of 0 bytes."""
    made = []
    for n in range(count):
        size = rng.choice([0, 1, 2, 3, 4, 5, 8, 63, 64, 65, 255, 256, 512, rng.randrange(513)])
        address = rng.choice([BASE, BASE + SIZE - 600, 0x9_0000, 1 << 40]) + rng.randrange(600)
        if rng.randrange(2):
            size = min(size, 256 - address % 4)
        size = min(size, 4096 - address % 4096)
        if rng.randrange(2):
            size = min(size, 256 - address % 4)
            request = memory_write(address, rng.randbytes(size), requester_id=0x101, relaxed_ordering=bool(rng.randrange(2)))
        else:
            size = min(size, 512 - address % 4)
            request = memory_read(address, size, requester_id=0x101, tag=n % 256, no_snoop=bool(rng.randrange(2)))
        dwords = encode(request)
        if request.length_dw == 1 and size and rng.randrange(3) == 0:
            dwords[1] = dwords[1] & ~15 | rng.choice([5, 9, 10, 11, 13])
        elif request.length_dw == 2 and request.address % 8 == 0 and rng.randrange(2):
            dwords[1] = dwords[1] & ~0xFF | rng.choice([5, 9, 3, 1]) << 4 | rng.choice([5, 10, 2, 15])
        made.append(dwords)
    return made


@pytest.mark.parametrize("split, rcb", [("max", 64), ("rcb", 128), ("random", 64), ("max", 128)])
def test_requests_as_model(clay, split, rcb):
    """SYS-COMPHOST-5: random legal requests: memory, completions and counts are those of the model of a host. [PCIe5 2.2.9, 2.3.1.1]"""
    rng, memory = random.Random(rcb), GuestMemory(all_ram=False)
    memory.add_range(BASE, SIZE)
    content = rng.randbytes(SIZE)
    memory.write(BASE, content)
    requests = random_requests(rng, 400)
    refused_writes = 0
    host = Host(memory, rng=rng, policy=CompletionPolicy(latency=8, split=split), rcb=rcb)
    host.assume_enabled(1)
    expected = []
    for n, dwords in enumerate(requests):
        for reply in host.receive(dwords, 600 * n):
            expected.append(reply.tlp)
            host.sent(reply)
        refused_writes += sum("write refused" in text for text in host.violations)
        assert all("write refused" in text for text in host.violations)
        host.violations.clear()
    card = clay([beat for n, dwords in enumerate(requests) for beat in beats_of(dwords, 10 + 600 * n)], split=split, rcb=rcb)
    card.write(BASE, content)
    got = []
    card.observe = lambda event, tlp: got.append(decode(event.dwords)) if isinstance(event, TlpSent) else None
    card.step(600 * 401)
    assert card.read(BASE, SIZE) == memory.read(BASE, SIZE) != content
    assert card.counts.refused_reads == host.statistics.unsupported > 0
    assert card.counts.dropped_writes == refused_writes > 0
    assert card.counts.read_bytes == host.statistics.read_bytes
    if split != "random":  # where to cut is free: then only the joined data is compared
        assert [masked(tlp) for tlp in got] == [masked(tlp) for tlp in expected]
    else:
        check_cuts(got, [decode(one) for one in requests], rcb)
    assert joined(got) == joined(expected)


def masked(tlp):
    """Return what of a completion is determined: all but bytes that were not asked for."""
    return str(tlp), tlp.length_dw, asked(tlp)


def asked(tlp):
    skip = tlp.lower_address % 4
    return tlp.data[skip : min(len(tlp.data), skip + tlp.byte_count)]


def joined(completions):
    """Return [(tag, status, data)] of whole answers."""
    found = []
    for key, answer in itertools.groupby(completions, key=lambda tlp: (tlp.tag, int(tlp.status))):
        found.append((*key, b"".join(asked(tlp) for tlp in answer)))
    return found


def check_cuts(completions, requests, rcb):
    """Completions of more than one piece are cut at boundaries, hold at most 256 bytes, and their counts fall as they should."""
    pieces = 0
    for _, answer in itertools.groupby(completions, key=lambda tlp: tlp.tag):
        answer = list(answer)
        pieces += len(answer) - 1
        for one, following in itertools.pairwise(answer):
            assert (one.lower_address + len(asked(one))) % rcb == 0
            assert following.lower_address == (one.lower_address + len(asked(one))) % 128
            assert following.byte_count == one.byte_count - len(asked(one))
        assert all(len(tlp.data) <= 256 for tlp in answer)
    assert pieces > 50


def test_order_of_answers(clay):
    """SYS-COMPHOST-6: reads are served when due, with memory as it is then; jitter lets answers overtake, never the pieces of one."""
    reads = [beat for n in range(64) for beat in beats_of(read_of(BASE + 512 * n, 512, tag=n), 10 + 4 * n)]
    for jitter in (0, 200):
        card, events = clay(reads, jitter=jitter, latency=50), []
        card.observe = lambda event, tlp, events=events: events.append((event, decode(event.dwords)))
        card.step(20_000)
        asked_at = {tlp.tag: event.cycle for event, tlp in events if isinstance(event, TlpReceived)}
        answers = [(tlp.tag, event.cycle) for event, tlp in events if isinstance(event, TlpSent)]
        assert all(at >= asked_at[tag] + 50 for tag, at in answers)
        tags = [tag for tag, _ in itertools.groupby(answers, key=lambda answer: answer[0])]
        assert sorted(tags) == list(range(64))
        assert (tags == sorted(tags)) is (jitter == 0)
    # A read is served 50 cycles after its end: a write that lands before that is in its answer, one that lands later is not.
    for at, seen in ((20, b"new!"), (200, b"old.")):
        card = clay([*beats_of(read_of(BASE, 4)), *beats_of(write_of(BASE, b"new!"), at)], latency=50)
        card.write(BASE, b"old.")
        got = []
        card.observe = lambda event, tlp, got=got: got.append(decode(event.dwords)) if isinstance(event, TlpSent) else None
        card.step(5000)
        assert [tlp.data for tlp in got] == [seen]
        assert card.read(BASE, 4) == b"new!"


def test_interrupts(clay):
    """SYS-COMPHOST-7: writes into the window are interrupts, in order, beside memory, and only there. [PCIe5 6.1.4]"""
    beats, at = [], 10
    for address in (0xFEE0_0000, 0xFEEF_FFFC, 0xFEE0_0010):
        beats += beats_of(write_of(address, address.to_bytes(4, "little")[:2] + b"\1\2"), at)
        at += 20
    for address in (0xFEDF_FFFC, 0xFEF0_0000):
        beats += beats_of(write_of(address, bytes(4)), at)
        at += 20
    card = clay(beats)
    card.step(1000)
    assert [address for address, _ in card.interrupts()] == [0xFEE0_0000, 0xFEEF_FFFC, 0xFEE0_0010]
    assert (card.counts.interrupts, card.counts.dropped_writes) == (3, 2)
    with pytest.raises(AccessFault):
        card.read(0xFEE0_0000, 4)


TINY = """
module top (
  input clk, input rst, input link_reset, input i__valid, input [65:0] i__payload, output i__ready, output o__valid,
  output [65:0] o__payload, input o__ready
);
  reg [31:0] count = 0;
  always @(posedge clk) count <= count + 1;
  assign i__ready = 1, o__valid = 0, o__payload = {2'b0, 32'b0, count};
endmodule
"""


def test_waves(tmp_path, monkeypatch):
    """SYS-COMPHOST-9: a card with waves behaves as one without, and leaves an FST file that ends with its last cycle."""
    compile_library(tmp_path, top="card", verilog=TINY, **compiled._surroundings(CONFIG.width, True))
    monkeypatch.setattr(compiled, "build", lambda config, waves, **how: tmp_path / "card.so" if waves else None)
    ends = []
    for number, cycles in enumerate((1000, 3000)):
        path = tmp_path / f"{number}.fst"
        with CompiledCard(CONFIG, waves=path, idle_after=10_000) as card:
            assert card.step(cycles) == cycles
        head = path.read_bytes()[:329]
        assert int.from_bytes(head[0:9], "big") == 329  # a header block, complete
        ends.append(int.from_bytes(head[17:25], "big"))
    assert ends[1] - ends[0] == 2000 * 8
    with pytest.raises(FileNotFoundError):
        CompiledCard(CONFIG, waves=tmp_path / "nowhere" / "x.fst")


def test_constants(tmp_path):
    """SYS-COMPHOST-11: a circuit with bits that would stay 0, as nothing ever sets them, is refused with a sentence."""
    verilog = TINY.replace("  always @(posedge", "  always @*\n    count[3:2] = 2'h2;\n  always @(posedge")
    with pytest.raises(RuntimeError, match=r"count\[3:2\] is constant"):
        compile_library(tmp_path, top="card", verilog=verilog, **compiled._surroundings(CONFIG.width, False))


def test_compiler_is_there():
    """SYS-COMPHOST-8: what the library needs is installed, and an installed package has its source."""
    assert shutil.which("c++")
    data = tomllib.loads((compiled._SOURCE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ringwall.sim"]
    for path in (compiled._SOURCE, compiled._WAVES):
        assert path.is_file() and any(path.match(pattern) for pattern in data)
