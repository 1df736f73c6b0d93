"""The 7-series block for PCI Express around a card: cocotbext-pcie's configuration space and port in front, AXI4-Stream beats behind.

Bytes of a TLP lie on the streams as on the wire: each dword with its first byte in bits 31:24. [PG054]
"""

import struct
from collections import deque

import cocotb
from cocotb.triggers import RisingEdge
from cocotbext.pcie.core.caps import MsixCapability, PciCap
from cocotbext.pcie.core.endpoint import Endpoint
from cocotbext.pcie.core.port import SimPort
from cocotbext.pcie.core.tlp import Tlp, TlpType

from .run import ports

__all__ = ["USER", "BlockFunction", "Series7Block", "Series7Streams"]

PM, PCIE, MSIX, USER = 0x40, 0x60, 0x9C, 0xA8  # capabilities in the block's configuration space; what is left to the user
CONFIG = (TlpType.CFG_READ_0, TlpType.CFG_WRITE_0)


class Series7Streams:
    """Drives ``m_axis_rx_*`` and takes ``s_axis_tx_*`` of ``dut``; posted requests and completions pass what ``rx_np_ok`` holds back.

    At 128 bits a TLP begins in the upper half of the beat in which the one before it ends in the lower, if it waits by then.

    Parameters
    ----------
    width : :class:`int`
        64 or 128.
    on_receive : callable
        Called with the bytes of each TLP of the card.
    pause : callable
        Asked in each cycle for each direction: whether it rests.
    """

    def __init__(self, dut, width, *, on_receive, pause=lambda: False):
        self.dut, self.lanes, self.on_receive, self.pause = dut, width // 32, on_receive, pause
        self.waiting, self.held, self.count = deque(), deque(), 0
        self.left, self.hits, self.straddled, self.discontinued, self.is_held_back = [], 0, 0, 0, False

    def send(self, raw, hits=0, *, non_posted=False, on_sent=lambda: None):
        """Let the bytes ``raw`` of a TLP follow what waits; ``hits``: the BARs that it hits."""
        self.count += 1
        dwords = list(struct.unpack(f">{len(raw) // 4}I", raw))
        (self.held if non_posted else self.waiting).append((self.count, dwords, hits, on_sent))

    def start(self):
        """Begin."""
        for name in ("tvalid", "tdata", "tkeep", "tlast", "tuser"):
            getattr(self.dut, f"m_axis_rx_{name}").value = 0
        self.dut.s_axis_tx_tready.value = 0
        cocotb.start_soon(self._receive())
        cocotb.start_soon(self._transmit())

    def _next(self):
        """Take the next TLP that may be delivered; return whether there is one."""
        is_ok = int(self.dut.rx_np_ok.value)
        self.is_held_back |= bool(self.held) and not is_ok
        if self.held and is_ok and not (self.waiting and self.waiting[0][0] < self.held[0][0]):
            _, self.left, self.hits, on_sent = self.held.popleft()
        elif self.waiting:
            _, self.left, self.hits, on_sent = self.waiting.popleft()
        else:
            return False
        on_sent()
        return True

    def _beat(self):
        """Return the next beat, (tdata, tkeep, tlast, tuser), or None."""
        sof = eof = 0
        if not self.left:
            if not self._next():
                return None
            sof = 0b10000
        lanes, self.left = self.left[: self.lanes], self.left[self.lanes :]
        if not self.left:
            eof = 0b10000 | 4 * len(lanes) - 1
            if self.lanes == 4 and len(lanes) <= 2 and self._next():
                lanes += [0xDEADBEEF] * (2 - len(lanes)) + self.left[:2]
                self.left, sof, self.straddled = self.left[2:], 0b11000, self.straddled + 1
        keep = (1 << 4 * len(lanes)) - 1 if self.lanes == 2 else 0xFFFF
        data = sum(dword << 32 * n for n, dword in enumerate(lanes))
        return data, keep, int(eof != 0), self.hits << 2 | sof << 10 | eof << 17

    async def _receive(self):
        beat, dut, edge = None, self.dut, RisingEdge(self.dut.clk)
        while True:
            if beat is None and not self.pause():
                beat = self._beat()
            dut.m_axis_rx_tvalid.value = beat is not None
            if beat is not None:
                for name, value in zip(("tdata", "tkeep", "tlast", "tuser"), beat):
                    getattr(dut, f"m_axis_rx_{name}").value = value
            await edge
            if beat is not None and int(dut.m_axis_rx_tready.value):
                beat = None

    async def _transmit(self):
        dut, edge, dwords = self.dut, RisingEdge(self.dut.clk), []
        while True:
            dut.s_axis_tx_tready.value = ready = not self.pause()
            await edge
            if not (ready and int(dut.s_axis_tx_tvalid.value)):
                continue
            data, keep, last = (int(getattr(dut, f"s_axis_tx_{name}").value) for name in ("tdata", "tkeep", "tlast"))
            count = keep.bit_count() // 4
            assert keep == (1 << 4 * count) - 1 and (last or count == self.lanes), f"a beat of the card keeps {keep:#x}"
            dwords += [data >> 32 * n & 0xFFFFFFFF for n in range(count)]
            if last:
                raw, dwords = struct.pack(f">{len(dwords)}I", *dwords), []
                if int(dut.s_axis_tx_tuser.value) >> 3 & 1:
                    self.discontinued += 1
                else:
                    self.on_receive(raw)


class BlockFunction(Endpoint):
    """The block's configuration space: one function, its capabilities, a chain that goes on where the user's begin."""

    def __init__(self, description, msix):
        super().__init__()
        self.vendor_id, self.device_id, self.revision_id = description.vendor_id, description.device_id, description.revision
        self.class_code = description.class_code
        self.subsystem_vendor_id, self.subsystem_id = description.subsystem_vendor_id, description.subsystem_id
        self.register_capability(self.pm_cap, offset=PM // 4)
        self.register_capability(self.pcie_cap, offset=PCIE // 4)
        cap = self.msix_cap = MsixCapability()
        cap.msix_table_size = msix.vectors - 1
        cap.msix_table_bar_indicator_register, cap.msix_table_offset = msix.table_bar, msix.table_offset
        cap.msix_pba_bar_indicator_register, cap.msix_pba_offset = msix.pba_bar, msix.pba_offset
        self.register_capability(cap, offset=MSIX // 4)
        users = PciCap()
        users.cap_id, users.length = 9, (0x100 - USER) // 4
        self.register_capability(users, offset=USER // 4)
        self.pcie_cap.max_payload_size_supported, self.pcie_cap.extended_tag_supported = 2, True
        for bar in description.bars:
            self.configure_bar(bar.index, bar.size_bytes, bar.is_64, bar.is_prefetchable)

    def hits(self, address):
        """Return a bit for each BAR register of the BAR that a request hits."""
        found = self.match_bar(address)
        return 0 if found is None else 0b11 << found[0]


class Series7Block:
    """The block between ``dut``, a :class:`ringwall.rtl.verilog.Series7Card`, and ``port`` of cocotbext-pcie's root complex.

    Takes the place of :class:`.second_host.Bridge`. ``link`` is a :class:`Series7Streams`, ``function`` the configuration space.
    """

    def __init__(self, dut, port, *, width, function, pause=lambda: False):
        self.dut, self.function = dut, function
        self.port = SimPort(fc_init=[[64, 1024, 64, 64, 0, 0]] * 8)
        for end in (port, self.port):
            end.max_link_speed, end.max_link_width = 2, 4
        self.port.rx_handler = self._to_card
        self.port.connect(port)
        function.upstream_tx_handler = self.port.send
        self.received = deque()
        for name, (way, _) in ports().items():
            if way == "input" and name.startswith(("cfg_", "user_")):
                getattr(dut, name).value = 0
        self.link = Series7Streams(dut, width, on_receive=self.received.append, pause=pause)

    def start(self):
        """Begin; after the reset."""
        self.dut.user_lnk_up.value = 1
        self.link.start()
        cocotb.start_soon(self._from_card())
        cocotb.start_soon(self.show())

    async def show(self):
        """Let the card see the configuration."""
        read, dut = self.function.read_config_register, self.dut
        dut.cfg_bus_number.value, dut.cfg_device_number.value = self.function.pcie_id.bus, self.function.pcie_id.device
        dut.cfg_command.value = await read(1) & 0xFFFF
        dut.cfg_dcommand.value = await read(PCIE // 4 + 2) & 0xFFFF
        dut.cfg_dcommand2.value = await read(PCIE // 4 + 10) & 0xFFFF
        dut.cfg_pmcsr_powerstate.value = await read(PM // 4 + 1) & 3
        control = await read(MSIX // 4)
        dut.cfg_interrupt_msixenable.value, dut.cfg_interrupt_msixfm.value = control >> 31, control >> 30 & 1

    async def _to_card(self, tlp):
        if tlp.fmt_type in CONFIG and not (tlp.completer_id.function == 0 and USER <= tlp.address < 0x100):
            if self.function.match_tlp(tlp):
                await self.function.upstream_recv(tlp)
                await self.show()
            else:
                tlp.release_fc()
                await self.port.send(Tlp.create_ur_completion_for_tlp(tlp, self.function.pcie_id))
            return
        if tlp.is_completion() or tlp.fmt_type in CONFIG:
            hits = 0
        elif not (hits := self.function.hits(tlp.address)):
            raise AssertionError(f"the root complex must not send what hits nothing: {tlp!r}")
        self.link.send(bytes(tlp.pack()), hits, non_posted=tlp.is_nonposted(), on_sent=tlp.release_fc)

    async def _from_card(self):
        while True:
            while not self.received:
                await RisingEdge(self.dut.clk)
            tlp = Tlp.unpack(self.received.popleft())
            assert tlp.check()
            await self.port.send(tlp)
