"""The page-request queue: messages of devices to records in memory, or to responses of the IOMMU itself."""

from amaranth import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec.riscv_iommu import TYPE_DISALLOWED
from ..spec.riscv_iommu_registers import MessageCode, PageRequestRecord, ResponseCode
from .layouts import GroupResponse, Kind, MemoryWrite, MemoryWriteDone, PageRequest, request_layout, response_layout
from .records import RecordWriter
from .registers import QueueControl


class PageRequests(wiring.Component):
    """Writes a 16-byte record for each page request or stop marker and moves pqt on once it is in memory. [RVIOMMU1.0 3.7, 4.3, 6.17]

    The translator is asked first whether the device may send them, and reports a fault if not. What does not come into the queue is
    dropped, and if it is the last of its group and no stop marker answered by a group response: Invalid Request if the device may not
    (cause 260), Response Failure if its context cannot be had or the queue is off or has failed, Success if the queue is full or was.
    A message that finds the queue full sets pqof, one whose write fails pqmf.

    Throughput: 1 message at a time; the next is taken when the response of the last has been.

    Parameters
    ----------
    features : :class:`.features.Features`
        With ATS.

    Members
    -------
    page_request, group_response : ``In(stream.Signature(PageRequest))``, ``Out(stream.Signature(GroupResponse))``
        Messages, and responses to them.
    request, response : ``Out(stream.Signature(request_layout(features)))``, ``In(stream.Signature(response_layout(features)))``
        Of the translator.
    control, has_failed : ``In(QueueControl())``, ``In(1)``
        The queue's registers; pqmf.
    write, write_done : ``Out(stream.Signature(MemoryWrite))``, ``In(stream.Signature(MemoryWriteDone))``
        Memory.
    """

    def __init__(self, *, features):
        super().__init__({
            "page_request": In(stream.Signature(PageRequest)),
            "group_response": Out(stream.Signature(GroupResponse)),
            "request": Out(stream.Signature(request_layout(features))),
            "response": In(stream.Signature(response_layout(features))),
            "control": In(QueueControl()),
            "has_failed": In(1),
            "write": Out(stream.Signature(MemoryWrite)),
            "write_done": In(stream.Signature(MemoryWriteDone)),
        })

    def elaborate(self, platform):
        m = Module()
        control, found, answer = self.control, self.response.p, self.group_response.p
        message, code, PRPR = Signal(PageRequest), Signal(ResponseCode), Signal()
        writer = RecordWriter(m, self, PageRequestRecord)
        record, has_process = writer.record, message.process_id_valid
        m.d.comb += [
            self.request.p.kind.eq(Kind.MESSAGE), self.request.p.device_id.eq(message.device_id),
            self.request.p.process_id_valid.eq(has_process), self.request.p.process_id.eq(message.process_id),
            self.request.p.privileged.eq(message.privileged), self.request.p.offset.eq(MessageCode.PAGE_REQUEST),  # its iotval
            record.DID.eq(message.device_id), record.PV.eq(has_process), record.PID.eq(Mux(has_process, message.process_id, 0)),
            record.PRIV.eq(has_process & message.privileged), record.EXEC.eq(has_process & message.execute),
            record.R.eq(message.reads), record.W.eq(message.writes), record.L.eq(message.is_last), record.group_index.eq(message.group),
            record.page.eq(message.page),
            answer.device_id.eq(message.device_id), answer.group.eq(message.group), answer.code.eq(code),
            answer.process_id_valid.eq(has_process & (PRPR | (code == ResponseCode.RESPONSE_FAILURE))),
            answer.process_id.eq(Mux(answer.process_id_valid, message.process_id, 0)),
        ]
        with m.FSM() as fsm:
            with m.State("TAKE"):
                m.d.comb += self.page_request.ready.eq(1)
                m.d.sync += [message.eq(self.page_request.p), writer.word.eq(0)]
                with m.If(self.page_request.valid):
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += self.request.valid.eq(1)
                with m.If(self.request.ready):
                    m.next = "LEARN"
            with m.State("LEARN"):
                m.d.comb += self.response.ready.eq(1)
                m.d.sync += [
                    PRPR.eq(found.PRPR),
                    code.eq(Mux(found.cause == TYPE_DISALLOWED, ResponseCode.INVALID_REQUEST, ResponseCode.RESPONSE_FAILURE)),
                ]  # fmt: skip
                with m.If(self.response.valid):
                    m.next = "DECIDE"
                    with m.If(found.fault):
                        m.next = "RESPOND"
            with m.State("DECIDE"):
                m.next = "RESPOND"
                with m.If(~control.on | ~control.enable | self.has_failed):
                    m.d.sync += code.eq(ResponseCode.RESPONSE_FAILURE)
                with m.Elif(control.stopped | writer.full):
                    m.d.comb += control.refused.eq(~control.stopped)
                    m.d.sync += code.eq(ResponseCode.SUCCESS)
                with m.Else():
                    m.next = "WRITE"
            writer.add_states(m, then="TAKE", failed="RESPOND")
            with m.State("RESPOND"):
                m.d.comb += self.group_response.valid.eq(message.is_last & (message.reads | message.writes))
                with m.If(self.group_response.ready | ~self.group_response.valid):
                    m.next = "TAKE"
        with m.If(~fsm.ongoing("WRITE") & ~fsm.ongoing("WAIT_DONE")):
            m.d.sync += control.on.eq(control.enable)
        return m
