"""The link adapter of the Xilinx 7-series integrated block for PCI Express (PCIE_2_1) in its AXI4-Stream wrapper."""

from amaranth import Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import series7 as spec
from ..spec.ultrascale import STATUS_MASTER
from ..stream.arbiter import Arbiter
from ..tlp.codec import is_completion, is_message
from ..tlp.layouts import Malformed, TlpBeat
from .raw import RawPhy
from .series7_axis import WIDTHS, FromAxis, ToAxis, bar_address
from .ultrascale_config import ConfigMirror, MirroredFunction

__all__ = ["WIDTHS", "Series7Phy", "block_ports"]

NONPOSTED = 4  # requests of the host that wait for an answer; then the block is to hold back others


def block_ports(width):
    """Return the members of a signature that are ports of the block's wrapper, seen from the card, under its names."""
    rx = {"tdata": width, "tkeep": width // 8, "tlast": 1, "tuser": spec.RX_USER, "tvalid": 1}
    tx = rx | {"tuser": spec.TX_USER}
    return {
        **{f"m_axis_rx_{name}": In(bits) for name, bits in rx.items()}, "m_axis_rx_tready": Out(1),
        **{f"s_axis_tx_{name}": Out(bits) for name, bits in tx.items()}, "s_axis_tx_tready": In(1),
        "tx_cfg_gnt": Out(1), "rx_np_ok": Out(1), "rx_np_req": Out(1), "user_lnk_up": In(1),
        "cfg_bus_number": In(8), "cfg_device_number": In(5), "cfg_command": In(16), "cfg_dcommand": In(16), "cfg_dcommand2": In(16),
        "cfg_pmcsr_powerstate": In(2), "cfg_interrupt_msixenable": In(1), "cfg_interrupt_msixfm": In(1),
        "cfg_to_turnoff": In(1), "cfg_turnoff_ok": Out(1),
    }  # fmt: skip


class Series7Phy(wiring.Component):
    """Joins the two TLP streams of an endpoint of one function to the receive and the transmit interface of the block.

    TLPs are those of a raw link, see :class:`.raw.RawPhy`, but for the address of a request: the block has judged it, and the card finds
    its BARs at :func:`.series7_axis.bar_address`. The block owns configuration space but for the user's capabilities, whose requests
    come like any other TLP. What the card must know of the rest comes in ``received`` as configuration writes, in front of every TLP
    that came later: see :class:`.ultrascale_config.ConfigMirror`. Messages in ``to_send`` go nowhere: errors are the block's to report.
    While 4 non-posted requests of the host wait for their answers ``rx_np_ok`` is 0: the block holds back others and lets posted ones
    pass. Its request to turn the power off is granted at once.

    Latency: 5 cycles to us at 64 bits, 6 at 128; 2 from us. Throughput: one beat per cycle; at 128 bits a TLP that begins in the middle
    of a beat takes one more at times.

    Parameters
    ----------
    width : :class:`int`
        64 or 128.
    function : :class:`.ultrascale_config.MirroredFunction`
        The function.
    bar_bytes : mapping
        Size of each of its BARs, by index: at most 256 MiB.

    Members
    -------
    m_axis_rx_*, s_axis_tx_*, tx_*, rx_*, cfg_*, user_lnk_up : ports
        Of the block, see :func:`block_ports`.
    link_reset : ``Out(1)``
        For the card: the link is down.
    discarding : ``In(1)``
        From the card: all begins anew. A TLP that was being sent ends as discontinued, what is left of one that was coming is dropped.
    received, to_send : TLP streams
        To and from the transaction layer.
    in_reset, max_payload : ``In(1)``, ``In(3)``
        From the card.
    malformed : ``Out(Malformed)``
        See :class:`.raw.RawReceiver`.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, function, bar_bytes):
        self.width, self.function, self.bar_bytes = width, function, dict(bar_bytes)
        if width not in WIDTHS:
            raise ValueError(f"Link width must be 64 or 128 bits, not {width!r}")
        if not isinstance(function, MirroredFunction):
            raise TypeError(f"The function behind the block must be a MirroredFunction, not {function!r}")
        if set(function.bars) != set(self.bar_bytes):
            raise ValueError(f"Sizes must be those of BARs {sorted(function.bars)!r}, not of {sorted(self.bar_bytes)!r}")
        tlps = stream.Signature(TlpBeat(width))
        super().__init__({
            **block_ports(width), "link_reset": Out(1), "discarding": In(1), "received": Out(tlps), "to_send": In(tlps), "in_reset": In(1),
            "max_payload": In(3), "malformed": Out(Malformed),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        width = self.width

        def add(name, component):
            m.submodules[name] = ResetInserter({"sync": self.discarding})(component)
            return component

        raw = add("raw", RawPhy(width=width))
        mirror = add("mirror", ConfigMirror(width=width, functions=(self.function,), address=lambda function, bar: bar_address(bar)))
        arbiter = add("arbiter", Arbiter(TlpBeat(width), 2, packets=True))
        m.submodules.from_axis = source = FromAxis(width=width, bar_bytes=self.bar_bytes)
        m.submodules.to_axis = sink = ToAxis(width=width)
        wiring.connect(m, source.o, raw.i)
        wiring.connect(m, raw.o, sink.i)
        m.d.comb += [self.link_reset.eq(~self.user_lnk_up), raw.max_payload.eq(self.max_payload), self.malformed.eq(raw.malformed)]
        for part, prefix in ((source, "m_axis_rx"), (sink, "s_axis_tx")):
            m.d.comb += part.discarding.eq(self.discarding)
            for name in ("tdata", "tkeep", "tlast", "tuser", "tvalid", "tready"):
                ours, theirs = getattr(self, f"{prefix}_{name}"), getattr(part, name)
                is_ours = part.signature.members[name].flow == Out
                m.d.comb += ours.eq(theirs) if is_ours else theirs.eq(ours)

        # No TLP goes on while the card does not know all that came before it; one that was offered stays.
        offered, pass_on, port = Signal(), Signal(), arbiter.i[0]
        m.d.comb += [
            pass_on.eq(offered | ~mirror.changing), port.payload.eq(raw.received.payload),
            port.valid.eq(raw.received.valid & pass_on), raw.received.ready.eq(port.ready & pass_on),
        ]  # fmt: skip
        with m.If(self.discarding):
            m.d.sync += offered.eq(0)
        with m.Elif(port.valid):
            m.d.sync += offered.eq(~(port.ready & port.payload.last))
        write, theirs = arbiter.i[1], mirror.writes
        m.d.comb += [
            write.valid.eq(theirs.valid), theirs.ready.eq(write.ready), write.payload.eq(theirs.payload),
            write.payload.header.completer_id[3:8].eq(self.cfg_device_number),
        ]  # fmt: skip
        wiring.connect(m, arbiter.o, wiring.flipped(self.received))

        # What is sent: messages and answers to the mirror go nowhere.
        beat, header = self.to_send.payload, self.to_send.payload.header
        is_answer, to_nobody, kept = Signal(), Signal(), Signal()
        m.d.comb += [
            is_answer.eq(is_completion(header) & header.tag[9]),
            to_nobody.eq(Mux(beat.first, is_answer | is_message(header), kept)),
            raw.to_send.payload.eq(beat), raw.to_send.valid.eq(self.to_send.valid & ~to_nobody),
            self.to_send.ready.eq(raw.to_send.ready | to_nobody),
            mirror.answered.eq(self.to_send.valid & beat.first & is_answer),
        ]
        with m.If(self.to_send.valid & self.to_send.ready):
            m.d.sync += kept.eq(to_nobody)

        # Non-posted requests of the host that wait for their answer in the card.
        waiting, is_waiting, held = Signal(8), Signal(), Signal()
        request = port.payload.header
        posted = is_completion(request) | is_message(request) | (request.fmt[pcie.FMT_DATA] & (request.type == pcie.TYPE_MEMORY))
        came = port.valid & port.ready & port.payload.last & ~port.payload.damaged & is_waiting
        answered = self.to_send.valid & self.to_send.ready & beat.first & is_completion(header) & ~is_answer
        m.d.comb += [is_waiting.eq(Mux(port.payload.first, ~posted, held)), self.rx_np_ok.eq(waiting < NONPOSTED),
                     self.rx_np_req.eq(self.rx_np_ok)]  # fmt: skip
        with m.If(port.valid & port.ready):
            m.d.sync += held.eq(is_waiting)
        m.d.sync += waiting.eq(Mux(self.discarding, 0, waiting + came - (answered & (waiting != 0))))

        control, power = self.cfg_command[spec.COMMAND_MASTER], self.cfg_pmcsr_powerstate
        m.d.comb += [
            mirror.cfg_bus_number.eq(self.cfg_bus_number), mirror.cfg_function_status[STATUS_MASTER].eq(control),
            mirror.cfg_interrupt_msix_enable[0].eq(self.cfg_interrupt_msixenable),
            mirror.cfg_interrupt_msix_mask[0].eq(self.cfg_interrupt_msixfm), mirror.cfg_function_power_state[:2].eq(power),
            mirror.device_control[0].eq(self.cfg_dcommand), mirror.device_control_2[0].eq(self.cfg_dcommand2),
            mirror.device_control_known.eq(1), mirror.in_reset.eq(self.in_reset),
            self.tx_cfg_gnt.eq(1), self.cfg_turnoff_ok.eq(self.cfg_to_turnoff),
        ]  # fmt: skip
        return m
