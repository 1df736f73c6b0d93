"""Debug translation: software asks for one translation through registers, beside the gate."""

from amaranth import Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu_registers import OFFSET, PAGE_BITS, DebugControl, DebugResponse
from .features import Features
from .iotlb import superpages
from .layouts import request_layout, response_layout
from .registers import Bank

COOKIE = 255  # of the debug request: nobody else's
_FIELDS = {"busy": 1, "Priv": 1, "Exe": 1, "NW": 1, "PID": 0xFFFFF, "PV": 1, "DID": 0xFFFFFF}
WRITABLE = {"tr_req_iova": (1 << 64) - (1 << PAGE_BITS), "tr_req_ctl": DebugControl.const(_FIELDS).as_value()}  # [RVIOMMU1.0 6.24, 6.25]


class Debug(wiring.Component):
    """tr_req_iova, tr_req_ctl and tr_response in the path between gate and translator. [RVIOMMU1.0 5, 6.24 to 6.26]

    The request is an untranslated one: without NW a write, which no page allows that does not allow reads. Its fault is recorded as any
    other. It takes a cycle of the gate's requests, and nothing else. Writes to tr_req_iova and tr_req_ctl while Go/Busy is 1 are ignored.
    tr_response says the size of the translation that was used, 4 KiB where nothing translates.

    Latency: none for the gate.

    Parameters
    ----------
    features : :class:`.features.Features`
        Decides which sizes there are.

    Members
    -------
    bank : ``In(Bank())``
        The registers.
    request, response : ``In(stream.Signature(request_layout(features)))``, ``Out(stream.Signature(response_layout(features)))``
        Of the gate, which does not use ``COOKIE``.
    translate_request, translate_response : ``Out(stream.Signature(...))``, ``In(stream.Signature(...))``
        Likewise, of the translator.
    """

    def __init__(self, *, features=Features()):
        self.features = features
        super().__init__({
            "bank": In(Bank()),
            "request": In(stream.Signature(request_layout(features))),
            "response": Out(stream.Signature(response_layout(features))),
            "translate_request": Out(stream.Signature(request_layout(features))),
            "translate_response": In(stream.Signature(response_layout(features))),
        })

    def elaborate(self, platform):
        m = Module()
        bank, asks, answer = self.bank, self.translate_request, self.translate_response
        iova, control, result = Signal(64), Signal(DebugControl), Signal(DebugResponse)
        is_ours = answer.p.cookie == COOKIE
        m.d.comb += [
            self.response.payload.eq(answer.payload), self.response.valid.eq(answer.valid & ~is_ours),
            answer.ready.eq(self.response.ready | is_ours), asks.payload.eq(self.request.payload),
        ]  # fmt: skip

        with m.FSM():
            with m.State("WAIT_GO"):
                m.d.comb += [asks.valid.eq(self.request.valid), self.request.ready.eq(asks.ready)]
                with m.If(control.busy & (~asks.valid | asks.ready)):  # a request that is offered stays so
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += [
                    asks.valid.eq(1), asks.p.eq(0), asks.p.cookie.eq(COOKIE), asks.p.device_id.eq(control.DID),
                    asks.p.process_id_valid.eq(control.PV), asks.p.process_id.eq(control.PID),
                    asks.p.privileged.eq(control.Priv), asks.p.execute.eq(control.Exe),
                    asks.p.is_write.eq(~control.NW & ~control.Exe), asks.p.page.eq(iova[PAGE_BITS:]),
                ]  # fmt: skip
                with m.If(asks.ready):
                    m.next = "AWAIT"
            with m.State("AWAIT"):
                m.d.comb += [asks.valid.eq(self.request.valid), self.request.ready.eq(asks.ready)]
                with m.If(answer.valid & is_ours):
                    m.d.sync += control.busy.eq(0)
                    m.next = "WAIT_GO"

        # A size of 2 ** n pages is n - 1 ones and a 0 in front of the page. [RVIOMMU1.0 6.26]
        with m.If(answer.valid & is_ours):
            m.d.sync += [
                result.eq(0), result.fault.eq(answer.p.fault), result.PPN.eq(answer.p.page), result.PBMT.eq(answer.p.PBMT),
            ]
            for pages_log2, size_log2 in superpages(self.features):
                with m.If(answer.p.size_log2 == size_log2):
                    low = Const((1 << pages_log2 - 1) - 1, pages_log2)
                    m.d.sync += [result.PPN.eq(Cat(low, answer.p.page[pages_log2:])), result.S.eq(1)]

        registers = {"tr_req_iova": iova, "tr_req_ctl": control.as_value()}
        for name, register in registers.items():
            for n in range(8):
                with m.If(bank.write[n] & (bank.at == OFFSET[name] // 8) & ~control.busy):
                    m.d.sync += register[8 * n : 8 * n + 8].eq((bank.data & WRITABLE[name])[8 * n : 8 * n + 8])
        with m.If(bank.access):
            m.d.sync += bank.word.eq(0)
            with m.Switch(bank.at):
                for name, word in (registers | {"tr_response": result}).items():
                    with m.Case(OFFSET[name] // 8):
                        m.d.sync += bank.word.eq(word)
        return m
