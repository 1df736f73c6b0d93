"""The link adapter of the Xilinx UltraScale+ integrated block for PCI Express (PCIE4)."""

from amaranth import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import ultrascale as spec
from ..stream.arbiter import Arbiter
from ..tlp.layouts import TlpBeat
from .ultrascale_config import ConfigMirror, DeviceControlPoll, MirroredFunction
from .ultrascale_link import Ender, Starter
from .ultrascale_receive import CqReceiver, RcReceiver
from .ultrascale_send import Sender
from .ultrascale_straddle import Destraddler

__all__ = ["WIDTHS", "MirroredFunction", "UltraScalePhy", "hard_block_ports"]

WIDTHS = (64, 128, 256, 512)
COMPLETION_DWORDS = 3 + 32  # of the longest completion: a register read of 128 bytes
NONPOSTED = 4  # requests that want an answer and are in the card at a time


def hard_block_ports(width):
    """Return the members of a signature that are the block's ports, seen from the card, under the block's names."""
    wide = width == 512
    ports: dict = {}
    for name, user, flow, back in (
        ("m_axis_cq", spec.CQ_USER, In, Out), ("m_axis_rc", spec.RC_USER, In, Out),
        ("s_axis_cc", spec.CC_USER, Out, In), ("s_axis_rq", spec.RQ_USER, Out, In),
    ):  # fmt: skip
        for signal, bits in (("tdata", width), ("tkeep", width // 32), ("tlast", 1), ("tuser", user[wide]), ("tvalid", 1)):
            ports[f"{name}_{signal}"] = flow(bits)
        ports[f"{name}_tready"] = back(1)
    for n in range(2):
        ports |= {f"pcie_rq_seq_num{n}": In(spec.SEQ_BITS), f"pcie_rq_seq_num_vld{n}": In(1)}
    functions = spec.MAX_FUNCTIONS
    return ports | {
        "pcie_cq_np_req": Out(2),
        "user_lnk_up": In(1),
        "cfg_hot_reset_out": In(1),
        "cfg_bus_number": In(8),
        "cfg_function_status": In(spec.STATUS_BITS * functions),
        "cfg_function_power_state": In(spec.POWER_BITS * functions),
        "cfg_power_state_change_interrupt": In(1),
        "cfg_power_state_change_ack": Out(1),
        "cfg_err_cor_in": Out(1),
        "cfg_err_uncor_in": Out(1),
        "cfg_interrupt_msix_enable": In(functions),
        "cfg_interrupt_msix_mask": In(functions),
        "cfg_flr_in_process": In(functions),
        "cfg_flr_done": Out(functions),
        "cfg_mgmt_addr": Out(10),
        "cfg_mgmt_function_number": Out(8),
        "cfg_mgmt_read": Out(1),
        "cfg_mgmt_read_data": In(32),
        "cfg_mgmt_read_write_done": In(1),
        # Nothing is written there: these stay 0.
        "cfg_mgmt_write": Out(1),
        "cfg_mgmt_write_data": Out(32),
        "cfg_mgmt_byte_enable": Out(4),
        "cfg_mgmt_debug_access": Out(1),
    }


class UltraScalePhy(wiring.Component):
    """Joins the two TLP streams of an endpoint to the four packet interfaces of the hard block.

    The block must be configured as the section "UltraScale+ hard block" of rtl/README.md says: dword-aligned, client tags, no
    straddling of what we send. The block owns configuration space; what the card must know of it comes in ``received`` as
    configuration writes, in front of every request that came later: see :class:`.ultrascale_config.ConfigMirror`. Requests of the
    host get addresses as those BARs have them: see :class:`.ultrascale_receive.CqReceiver`. A completion in ``to_send`` does not
    overtake a posted request in front of it: see :class:`.ultrascale_send.Sender`. At most 4 non-posted requests of the host are in
    the card at a time, so that their completions never hold up posted requests.

    Latency: 6 cycles for requests of the host, 2 for completions to us, 2 for our requests, 4 for our completions. Throughput: one beat
    per cycle; two packets in one straddled beat take two cycles.

    Parameters
    ----------
    width : :class:`int`
        64, 128, 256 or 512.
    functions : tuple of :class:`MirroredFunction`
        Physical functions, 1 to 4.
    max_payload : :class:`int`
        Largest Max_Payload_Size that the block offers, bytes: 128 to 1024.
    straddle : collection of :class:`str`
        Interfaces on which the block puts two packets into a beat: "rc" at 256 and 512 bits, "cq" at 512; "rc4": four, on RC at 512.
    pcie_capability : :class:`int`
        Offset of the block's PCI Express capability.
    order_cycles : :class:`int`
        See :class:`.ultrascale_send.Sender`.

    Members
    -------
    m_axis_cq_*, s_axis_cc_*, s_axis_rq_*, m_axis_rc_*, pcie_*, cfg_*, user_lnk_up : ports
        Of the block, see :func:`hard_block_ports`.
    link_reset : ``Out(1)``
        For the card: the link is down or in hot reset.
    discarding : ``In(1)``
        From the card: all begins anew. A packet that was being sent ends as discontinued, what is left of one that was coming is dropped.
    received, to_send : TLP streams
        To and from the transaction layer.
    in_reset : ``In(functions)``
        From the card: functions in function level reset.
    malformed : ``Out(1)``
        Pulse: a packet from the block was dropped or cut.
    order_lost : ``Out(1)``
        Pulse, see ``lost`` of :class:`.ultrascale_send.Sender`.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        If a parameter is out of its range.
    """

    def __init__(self, *, width, functions, max_payload=512, straddle=(), pcie_capability=spec.PCIE_CAPABILITY, order_cycles=250_000):
        self.width, self.functions, self.max_payload = width, tuple(functions), max_payload
        self.straddle, self.pcie_capability, self.order_cycles = frozenset(straddle), pcie_capability, order_cycles
        if width not in WIDTHS:
            raise ValueError(f"Link width must be 64, 128, 256 or 512 bits, not {width!r}")
        if len(self.functions) not in range(1, spec.MAX_FUNCTIONS + 1):
            raise ValueError(f"Functions behind the hard block must be between 1 and {spec.MAX_FUNCTIONS}, not {len(self.functions)!r}")
        for function in self.functions:
            if not isinstance(function, MirroredFunction):
                raise TypeError(f"A function behind the hard block must be a MirroredFunction, not {function!r}")
        if max_payload not in (128, 256, 512, 1024):
            raise ValueError(f"Largest payload must be 128, 256, 512 or 1024 bytes, not {max_payload!r}")
        allowed = {512: {"rc", "rc4", "cq"}, 256: {"rc"}}.get(width, set())
        if not self.straddle <= allowed:
            raise ValueError(f"Straddled interfaces at {width} bits must be among {sorted(allowed)!r}, not {sorted(self.straddle)!r}")
        if self.straddle >= {"rc", "rc4"}:
            raise ValueError(f"RC must be straddled by two packets or by four, not {sorted(self.straddle)!r}")
        if pcie_capability not in range(0x40, 0x100, 4):
            raise ValueError(f"The block's PCI Express capability must lie at a multiple of 4 below 256, not {pcie_capability!r}")
        if order_cycles < 64:
            raise ValueError(f"Patience with the block's reports must be at least 64 cycles, not {order_cycles!r}")
        tlps = stream.Signature(TlpBeat(width))
        super().__init__({
            **hard_block_ports(width),
            "link_reset": Out(1),
            "discarding": In(1),
            "received": Out(tlps),
            "to_send": In(tlps),
            "in_reset": In(len(self.functions)),
            "malformed": Out(1),
            "order_lost": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        width, count, wide = self.width, len(self.functions), self.width == 512
        requests = self._add(m, "requests", CqReceiver(width=width, max_payload=self.max_payload))
        completions = self._add(m, "completions", RcReceiver(width=width))
        sender = self._add(m, "sender", Sender(
            width=width, completion_beats=NONPOSTED * -(-COMPLETION_DWORDS * 32 // width), order_cycles=self.order_cycles))
        m.submodules.poll = poll = DeviceControlPoll(functions=count, capability=self.pcie_capability)
        mirror = self._add(m, "mirror", ConfigMirror(width=width, functions=self.functions))
        arbiter = self._add(m, "arbiter", Arbiter(TlpBeat(width), 3, packets=True))
        m.d.comb += self.link_reset.eq(~self.user_lnk_up | self.cfg_hot_reset_out)
        wiring.connect(m, requests.origins, sender.origins)
        wiring.connect(m, wiring.flipped(self.to_send), sender.i)
        wiring.connect(m, completions.o, arbiter.i[0])
        wiring.connect(m, mirror.writes, arbiter.i[1])
        wiring.connect(m, arbiter.o, wiring.flipped(self.received))

        # No request of the host goes on while the card does not know all that came before it; one that was offered stays.
        offered, pass_on, port = Signal(), Signal(), arbiter.i[2]
        m.d.comb += [
            pass_on.eq(offered | ~mirror.changing),
            port.payload.eq(requests.o.payload),
            port.valid.eq(requests.o.valid & pass_on),
            requests.o.ready.eq(port.ready & pass_on),
        ]
        with m.If(self.discarding):
            m.d.sync += offered.eq(0)
        with m.Elif(port.valid):
            m.d.sync += offered.eq(~(port.ready & port.payload.last))

        # Non-posted requests: the block may deliver one more each time that one was answered. It forgets what it may without a link.
        granted = Signal(range(NONPOSTED + 1))
        grant = granted != NONPOSTED
        m.d.comb += self.pcie_cq_np_req.eq(grant & ~self.discarding)
        m.d.sync += granted.eq(Mux(self.discarding, 0, granted + grant - sender.answered - requests.refused))

        self._connect_receiver(m, "m_axis_cq", requests, wide)
        self._connect_receiver(m, "m_axis_rc", completions, wide)
        for prefix, packets in (("s_axis_rq", sender.rq), ("s_axis_cc", sender.cc)):
            beat, ports = packets.payload, {name: getattr(self, f"{prefix}_{name}") for name in ("tdata", "tkeep", "tlast", "tuser")}
            last_lane = Signal(4, name=f"{prefix}_last_lane")
            for n in range(width // 32):
                with m.If(beat.keep[n]):
                    m.d.comb += last_lane.eq(n)
            m.submodules[f"{prefix[-2:]}_ender"] = ender = Ender()
            m.d.comb += [
                ender.discarding.eq(self.discarding), ender.last.eq(beat.last),
                ender.valid.eq(packets.valid), packets.ready.eq(ender.ready),
                getattr(self, f"{prefix}_tvalid").eq(ender.passed_valid),
                ender.passed_ready.eq(getattr(self, f"{prefix}_tready")),
                ports["tdata"].eq(beat.data), ports["tlast"].eq(ender.passed_last),
                ports["tkeep"].eq(Mux(ender.discontinue, -1, beat.keep)),
            ]  # fmt: skip
            user, is_rq = ports["tuser"], prefix == "s_axis_rq"
            places = (spec.RQ_DISCONTINUE, spec.RQ512_DISCONTINUE) if is_rq else (spec.CC_DISCONTINUE, spec.CC512_DISCONTINUE)
            fields = [(places[wide], ender.discontinue)]
            if wide:
                sop, eop, eop_at = ((spec.RQ512_SOP, spec.RQ512_EOP, spec.RQ512_EOP_AT) if is_rq
                                    else (spec.CC512_SOP, spec.CC512_EOP, spec.CC512_EOP_AT))  # fmt: skip
                fields += [(sop, beat.first & ~ender.discontinue), (eop, ender.passed_last),
                           (eop_at, last_lane | ender.discontinue.replicate(4))]  # fmt: skip
                if is_rq:
                    fields += [(spec.RQ512_FIRST_BE, beat.first_be), (spec.RQ512_LAST_BE, beat.last_be), (spec.RQ512_SEQ, beat.sequence)]
            elif is_rq:
                fields += [(spec.RQ_FIRST_BE, beat.first_be), (spec.RQ_LAST_BE, beat.last_be),
                           (spec.RQ_SEQ_LOW, beat.sequence[:4]), (spec.RQ_SEQ_HIGH, beat.sequence[4:])]  # fmt: skip
            for at, value in fields:
                m.d.comb += user[at : at + len(value)].eq(value)

        for n, report in enumerate(sender.reports):
            m.d.comb += [
                report.valid.eq(getattr(self, f"pcie_rq_seq_num_vld{n}")),
                report.number.eq(getattr(self, f"pcie_rq_seq_num{n}")),
            ]
        for name in ("cfg_bus_number", "cfg_function_status", "cfg_interrupt_msix_enable", "cfg_interrupt_msix_mask", "cfg_flr_in_process",
                     "cfg_function_power_state", "cfg_power_state_change_interrupt"):  # fmt: skip
            m.d.comb += getattr(mirror, name).eq(getattr(self, name))
        m.d.comb += [
            self.cfg_mgmt_addr.eq(poll.cfg_mgmt_addr), self.cfg_mgmt_function_number.eq(poll.cfg_mgmt_function_number),
            self.cfg_mgmt_read.eq(poll.cfg_mgmt_read), poll.cfg_mgmt_read_data.eq(self.cfg_mgmt_read_data),
            poll.cfg_mgmt_read_write_done.eq(self.cfg_mgmt_read_write_done),
            mirror.device_control_known.eq(poll.known),
            *(theirs.eq(value) for theirs, value in zip(mirror.device_control, poll.values)),
            *(theirs.eq(value) for theirs, value in zip(mirror.device_control_2, poll.values_2)),
            mirror.answered.eq(sender.mirrored), mirror.in_reset.eq(self.in_reset),
            self.cfg_flr_done.eq(mirror.cfg_flr_done), self.cfg_power_state_change_ack.eq(mirror.cfg_power_state_change_ack),
            self.order_lost.eq(sender.lost),
            self.malformed.eq(requests.malformed | completions.malformed),
        ]

        # Errors that only the adapter sees. A lost report is one if all functions are bus masters: the block drops the others' requests.
        masters = Cat(self.cfg_function_status.word_select(n, spec.STATUS_BITS)[spec.STATUS_MASTER] for n in range(count))
        m.d.sync += [
            self.cfg_err_cor_in.eq(sender.lost & masters.all() & ~self.discarding),
            self.cfg_err_uncor_in.eq(~self.discarding & (
                (requests.malformed & ~requests.discontinued) | (completions.malformed & ~completions.discontinued))),
        ]  # fmt: skip
        return m

    def _add(self, m, name, component):
        m.submodules[name] = ResetInserter({"sync": self.discarding})(component)
        return component

    def _connect_receiver(self, m, prefix, receiver, wide):
        """Join one of the block's two packet interfaces towards us to its receiver, through a destraddler where it is straddled."""
        user = getattr(self, f"{prefix}_tuser")
        valid, ready = getattr(self, f"{prefix}_tvalid"), getattr(self, f"{prefix}_tready")
        is_cq = prefix == "m_axis_cq"
        discontinue_at = ((spec.CQ_DISCONTINUE, spec.CQ512_DISCONTINUE) if is_cq else (spec.RC_DISCONTINUE, spec.RC512_DISCONTINUE))[wide]
        first_be, last_be = (spec.CQ512_FIRST_BE, spec.CQ512_LAST_BE) if wide else (spec.CQ_FIRST_BE, spec.CQ_LAST_BE)
        beat = receiver.i.payload
        m.submodules[f"{prefix[-2:]}_starter"] = starter = Starter()
        m.d.comb += [starter.discarding.eq(self.discarding), starter.valid.eq(valid), ready.eq(starter.ready)]
        segments = 2 * (prefix[-2:] in self.straddle) or 4 * (not is_cq and "rc4" in self.straddle)
        if not segments:
            last = getattr(self, f"{prefix}_tlast")
            m.d.comb += [
                starter.goes_on.eq(~last), receiver.i.valid.eq(starter.passed_valid),
                starter.passed_ready.eq(receiver.i.ready),
                beat.data.eq(getattr(self, f"{prefix}_tdata")), beat.keep.eq(getattr(self, f"{prefix}_tkeep")),
                beat.last.eq(getattr(self, f"{prefix}_tlast")), beat.discontinue.eq(user[discontinue_at]),
            ]  # fmt: skip
            if is_cq:
                m.d.comb += [beat.first_be.eq(user[first_be : first_be + 4]), beat.last_be.eq(user[last_be : last_be + 4])]
            return
        apart = self._add(m, f"{prefix[-2:]}_destraddler", Destraddler(width=self.width, segments=segments))
        wiring.connect(m, apart.o, receiver.i)
        several = apart.i.payload
        m.d.comb += [
            apart.i.valid.eq(starter.passed_valid), starter.passed_ready.eq(apart.i.ready),
            starter.goes_on.eq(starter.inside + sum(several.starts) > sum(several.ends)),
            several.data.eq(getattr(self, f"{prefix}_tdata")), several.discontinue.eq(user[discontinue_at]),
        ]  # fmt: skip
        if wide:
            sop, sop_at, eop, eop_at = (
                (spec.CQ512_SOP, spec.CQ512_SOP_AT, spec.CQ512_EOP, spec.CQ512_EOP_AT) if is_cq
                else (spec.RC512_SOP, spec.RC512_SOP_AT, spec.RC512_EOP, spec.RC512_EOP_AT))  # fmt: skip
            for n in range(segments):
                m.d.comb += [
                    several.starts[n].eq(user[sop + n]), several.places[n].eq(user[sop_at + 2 * n : sop_at + 2 * n + 2] >> (segments == 2)),
                    several.ends[n].eq(user[eop + n]), several.lanes[n].eq(user[eop_at + 4 * n : eop_at + 4 * n + 4]),
                ]  # fmt: skip
                if is_cq:
                    m.d.comb += [
                        several.first_be[n].eq(user[first_be + 4 * n : first_be + 4 * n + 4]),
                        several.last_be[n].eq(user[last_be + 4 * n : last_be + 4 * n + 4]),
                    ]
        else:
            # Where the first start lies is not said: in the upper half exactly when a packet is under way.
            m.d.comb += [
                Cat(several.starts).eq(user[spec.RC_SOF : spec.RC_SOF + 2]),
                several.places[0].eq(apart.under_way), several.places[1].eq(1),
            ]  # fmt: skip
            for n, at in enumerate((spec.RC_EOF_0, spec.RC_EOF_1)):
                m.d.comb += [several.ends[n].eq(user[at]), several.lanes[n].eq(user[at + 1 : at + 4])]
