"""The serial line, bit by bit: bytes both ways, clocks that differ, what is no byte."""

import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, FallingEdge, RisingEdge, Timer

from ringwall.rtl.phy.uart import Uart
from ringwall.sim.run import params, run
from ringwall.sim.stream import CLOCK_NS, start


@pytest.mark.parametrize("divisor", [4, 5, 33])
def test_uart(request, divisor):
    run(Uart(divisor=divisor), module=__name__, node=request.node.nodeid, params={"divisor": divisor})


def test_parameters_are_checked():
    """UART-4: divisors that cannot be are refused with a sentence."""
    for bad in (3, 65537, "8"):
        with pytest.raises(ValueError, match="between 4 and 65536 cycles per bit, not"):
            Uart(divisor=bad)


async def begin(dut):
    dut.rx.value = 1
    received, to_send = await start(dut, "received", "to_send")
    dut.rx.value = 1
    await ClockCycles(dut.clk, 4)
    await Timer(700, "ps")
    return received, to_send


async def put_bits(dut, bits, bit_ps):
    for bit in bits:
        dut.rx.value = bit
        await Timer(bit_ps, "ps")


def bits_of(byte):
    return [0, *(byte >> n & 1 for n in range(8)), 1]


async def counted(dut, name, found):
    while True:
        await RisingEdge(dut.clk)
        found[name] = found.get(name, 0) + int(getattr(dut, name).value)


@cocotb.test(timeout_time=2, timeout_unit="ms")
async def bytes_pass(dut):
    """UART-1: every byte both ways at once; what comes may be 2 % faster or slower; 10 bits for a byte, none between."""
    rng, bit_ps = random.Random(cocotb.RANDOM_SEED), params()["divisor"] * CLOCK_NS * 1000
    received, to_send = await begin(dut)
    received.set_ready(1)
    got, sent, errors = [], list(range(256)), {}
    for name in ("framing_error", "overrun"):
        cocotb.start_soon(counted(dut, name, errors))
    cocotb.start_soon(received.watch(got))
    sending = cocotb.start_soon(to_send.put_many(sent))
    slower = 1.02 if params()["divisor"] >= 5 else 1.0  # of 4 cycles a middle is too near to both ends

    async def receive():
        bits = bytes(rng.getrandbits(8) for _ in range(200)) + bytes(range(56))
        for n, byte in enumerate(bits):
            await put_bits(dut, bits_of(byte), int(bit_ps * (slower, 1, 1 / slower)[n % 3]))
            if n % 2:
                await Timer(rng.choice([1, 700, bit_ps * 3]), "ps")
        return list(bits)

    receiving, seen = cocotb.start_soon(receive()), []
    await FallingEdge(dut.tx)
    begun = cocotb.simulator.get_sim_time()
    for n in range(256):
        await Timer(bit_ps // 2, "ps")
        bits = []
        for k in range(10):
            bits.append(int(dut.tx.value))
            if k < 9:
                await Timer(bit_ps, "ps")
        assert (bits[0], bits[9]) == (0, 1)
        seen.append(sum(bit << k for k, bit in enumerate(bits[1:9])))
        if n == 254:
            taken = cocotb.simulator.get_sim_time()[1] - begun[1]
        if n < 255:
            await FallingEdge(dut.tx)
    await sending
    assert seen == sent
    assert taken < 255 * 10 * bit_ps + 255 * CLOCK_NS * 1000
    expected = await receiving
    await ClockCycles(dut.clk, 20 * params()["divisor"])
    assert got == expected
    assert errors == {"framing_error": 0, "overrun": 0}


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def what_is_no_byte_is_dropped(dut):
    """UART-2: a pulse shorter than half a bit is nothing; a byte without a stop bit, and a break, are one framing error each."""
    bit_ps = params()["divisor"] * CLOCK_NS * 1000
    received, _ = await begin(dut)
    received.set_ready(1)
    got, errors = [], {}
    cocotb.start_soon(received.watch(got))
    cocotb.start_soon(counted(dut, "framing_error", errors))
    await put_bits(dut, [0, 1], CLOCK_NS * 1000)
    await Timer(20 * bit_ps, "ps")
    assert (got, errors["framing_error"]) == ([], 0)
    await put_bits(dut, [*bits_of(0x55)[:-1], 0, 1, 1], bit_ps)
    assert (got, errors["framing_error"]) == ([], 1)
    await put_bits(dut, [0] * 45 + [1, 1], bit_ps)
    assert (got, errors["framing_error"]) == ([], 2)
    await put_bits(dut, [*bits_of(0x6E), 1], bit_ps)
    assert (got, errors["framing_error"]) == ([0x6E], 2)


@cocotb.test(timeout_time=1, timeout_unit="ms")
async def byte_that_waits_stays(dut):
    """UART-3: a byte that is not taken stays what it was; those that come meanwhile are dropped, each an overrun."""
    bit_ps = params()["divisor"] * CLOCK_NS * 1000
    received, _ = await begin(dut)
    errors = {}
    cocotb.start_soon(counted(dut, "overrun", errors))
    for byte in (1, 2, 3):
        await put_bits(dut, [*bits_of(byte), 1], bit_ps)
    assert errors["overrun"] == 2
    assert await received.get() == 1
    await put_bits(dut, [*bits_of(4), 1], bit_ps)
    assert await received.get() == 4
