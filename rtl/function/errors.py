"""Errors: what goes wrong becomes status bits in configuration space, and messages."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from ..spec import pcie
from ..spec import pcie_config as spec
from ..tlp.layouts import ConfigState
from .description import AerCapability, check_functions, physical_count, virtual_functions_of
from .layouts import ErrorKind, ErrorMessage, ErrorReport, Operation, UpdateBus

__all__ = ["Errors"]

UNCORRECTABLE, CORRECTABLE, STATUS = 0, 1, 2  # kind[5:7] of an ErrorReport
_BITS = dict(spec.STATUS_ERRORS)  # of Status
_DEVICE, _AER = 1, 2  # what a step's dword is in; 0 is the header

# What is done about one report: dword, operation. The steps of AER are left out where there is none, those from
# CONTROL_WRITE to the last of HEADER where nothing is logged, those of _OF_PHYSICAL at a physical function.
_STEPS = (
    ("COMMAND", 0, 0x04, Operation.SET),
    ("PHYSICAL_COMMAND", 0, 0x04, Operation.READ),
    ("PHYSICAL_DEVICE", _DEVICE, spec.DEVICE_CONTROL, Operation.READ),
    ("SEVERITY", _AER, spec.AER_SEVERITY, Operation.READ),
    ("UNCORRECTABLE_MASK", _AER, spec.AER_UNCORRECTABLE_MASK, Operation.READ),
    ("CORRECTABLE_MASK", _AER, spec.AER_CORRECTABLE_MASK, Operation.READ),
    ("CONTROL", _AER, spec.AER_CONTROL, Operation.READ),
    ("UNCORRECTABLE_STATUS", _AER, spec.AER_UNCORRECTABLE_STATUS, Operation.SET),
    ("CORRECTABLE_STATUS", _AER, spec.AER_CORRECTABLE_STATUS, Operation.SET),
    ("CONTROL_WRITE", _AER, spec.AER_CONTROL, Operation.WRITE),
    *((f"HEADER_{n}", _AER, spec.AER_HEADER_LOG + 4 * n, Operation.WRITE) for n in range(4)),
    ("DEVICE", _DEVICE, spec.DEVICE_CONTROL, Operation.SET),
    ("SYSTEM_ERROR", 0, 0x04, Operation.SET),
)
_NUMBERS = {name: n for n, (name, *_) in enumerate(_STEPS)}
_OF_PHYSICAL = ("PHYSICAL_COMMAND", "PHYSICAL_DEVICE")
_DECIDING = (*_OF_PHYSICAL, "SEVERITY", "UNCORRECTABLE_MASK", "CORRECTABLE_MASK")  # asked of the physical function of a virtual one


class Errors(wiring.Component):
    """Logs what goes wrong in configuration space of its function, and gives the message that reports it.

    Each report is one step for software. With AER: its status bit; First Error Pointer and header log of the first uncorrectable error that
    is not masked, until software clears the status bit that the pointer is at; mask and severity decide about the message. Without:
    severities are the defaults. An uncorrectable error of non-fatal severity is advisory, and so reported as correctable, when it is a
    Completer Abort or an unsupported request that was answered, an unexpected completion, or a poisoned TLP. Status and Device
    Status are set in any case. An error of all functions is logged by all physical ones, and each kind of message leaves once, in the name
    of the first function that has it enabled. A virtual function logs its errors itself; enables, masks and severities are its physical
    function's. [PCIe5 6.2.3, 6.2.4, 6.2.5, 7.5.1.1.4, 9.4.2]

    Reports of functions that are not there or that report no errors are taken and dropped.

    Latency: at most 64 cycles per function from a report to its message, if configuration space answers at once. Throughput: one report
    at a time; a message that is not taken holds up the next, so whoever reports must be able to drop.

    Parameters
    ----------
    functions : tuple of :class:`.description.FunctionDescription`
        As for :class:`.config_space.ConfigSpace`.

    Members
    -------
    reports : ``In(stream.Signature(ErrorReport))``
        What went wrong.
    updates : ``Out(UpdateBus())``
        To :class:`.config_space.ConfigSpace`.
    messages : ``Out(stream.Signature(ErrorMessage))``
        To the transmitter.
    state : ``In(ConfigState)``, one per function
        From :class:`.config_space.ConfigSpace`.
    present : ``In(functions)``
        A bit per function: it is there. Those of physical ones are 1.

    Raises
    ------
    :exc:`ValueError`, :exc:`TypeError`
        If ``functions`` are not 1 to 8 descriptions.
    """

    def __init__(self, *, functions):
        self.functions = check_functions(functions)
        super().__init__({
            "reports": In(stream.Signature(ErrorReport)),
            "updates": Out(UpdateBus()),
            "messages": Out(stream.Signature(ErrorMessage)),
            "state": In(ConfigState).array(len(self.functions)),
            "present": In(len(self.functions)),
        })

    def elaborate(self, platform):
        m = Module()
        count, last_physical = len(self.functions), physical_count(self.functions) - 1
        owners = [virtual_functions_of(self.functions).get(n, (n, 0))[0] for n in range(count)]
        request, response = self.updates.request, self.updates.response
        report, function, step = Signal(ErrorReport), Signal(range(count)), Signal(range(len(_STEPS)))
        sent = Signal(3)  # messages of this report that have left, or need not: correctable, non-fatal, fatal

        # Of the function, and of the one whose settings are its own: of each step the dword's block.
        maps = [f.map(n, count) for n, f in enumerate(self.functions)]
        settings = Array(owners)[function]
        is_virtual = settings != function

        def bases(number):
            return [Const(0), *(
                Array(next((block.offset // 4 for block in function_map.blocks if block.name == name), 0) for function_map in maps)[number]
                for name in ("pcie", AerCapability.name)
            )]  # fmt: skip

        own, decides = bases(function), bases(settings)
        has_aer = Array(int(f.capability(AerCapability) is not None) for f in self.functions)[function]
        reports_errors = Array(int(f.reports_errors) for f in self.functions)[function]
        requester_id = Array(Cat(Const(n, 3), state.device, state.bus) for n, state in enumerate(self.state))[function]

        # Of the TLP, and of the kind of error.
        kind, bit = report.kind.as_value(), report.kind.as_value()[:5]
        tlp_format, tlp_type = report.header[29:32], report.header[24:29]
        is_completion = tlp_type[1:] == pcie.TYPE_COMPLETION >> 1
        is_posted = tlp_type[4] | ((tlp_type == pcie.TYPE_MEMORY) & tlp_format[pcie.FMT_DATA])
        group = kind[5:]

        def is_kind(*kinds):
            return Cat(report.kind == item for item in kinds).any()

        # What configuration space says.
        serr, parity_response, enables = Signal(), Signal(), Signal(4)
        severity, uncorrectable_masked, correctable_masked, advisory_masked = Signal(), Signal(), Signal(), Signal()
        control, is_logged = Signal(32), Signal()
        is_fatal, is_advisory, is_correctable, is_unsupported = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            is_fatal.eq((group == UNCORRECTABLE) & severity),
            is_unsupported.eq(is_kind(ErrorKind.UNSUPPORTED)),
            is_advisory.eq(~is_fatal & (is_kind(ErrorKind.UNEXPECTED_COMPLETION, ErrorKind.POISONED)
                                        | (is_kind(ErrorKind.UNSUPPORTED, ErrorKind.COMPLETER_ABORT) & ~is_posted))),
            is_correctable.eq((group == CORRECTABLE) | is_advisory),
        ]  # fmt: skip
        is_masked = Mux(is_advisory, advisory_masked, Mux(group == CORRECTABLE, correctable_masked, uncorrectable_masked))
        is_enabled = Mux(is_correctable, enables[0], Mux(is_fatal, enables[2], enables[1])) & (~is_unsupported | enables[3])
        is_system_error = ~is_masked & ~is_correctable & serr
        severities = Cat(is_correctable, ~is_correctable & ~is_fatal, is_fatal)
        is_message = ~is_masked & (is_enabled | is_system_error)

        # What a step writes.
        is_status_set = (group == UNCORRECTABLE) & ~(is_advisory & advisory_masked)
        m.d.comb += [request.payload.function.eq(function), request.payload.data.eq(0)]
        with m.If(Cat(step == _NUMBERS[name] for name in _DECIDING).any()):
            m.d.comb += request.payload.function.eq(settings)
        status = Signal(32)
        m.d.comb += [
            status[16 + _BITS["signaled_target_abort"]].eq(is_kind(ErrorKind.COMPLETER_ABORT)),
            status[16 + _BITS["detected_parity"]].eq(is_kind(ErrorKind.POISONED)),
            status[16 + _BITS["received_target_abort"]].eq(is_kind(ErrorKind.RECEIVED_TARGET_ABORT)),
            status[16 + _BITS["received_master_abort"]].eq(is_kind(ErrorKind.RECEIVED_MASTER_ABORT)),
        ]
        data = {
            "COMMAND": status,
            "UNCORRECTABLE_STATUS": is_status_set << bit,
            "CORRECTABLE_STATUS": is_correctable << Mux(is_advisory, spec.ADVISORY_BIT, bit),
            "CONTROL_WRITE": Cat(bit, control[5:]),
            **{f"HEADER_{n}": report.header.word_select(n, 32) for n in range(4)},
            "DEVICE": Cat(Const(0, 16), severities, is_unsupported),
            "SYSTEM_ERROR": ((is_system_error << 16 + _BITS["signaled_system_error"])
                             | ((is_kind(ErrorKind.POISONED) & is_completion & parity_response) << 16 + _BITS["master_data_parity"])),
        }  # fmt: skip
        with m.Switch(step):
            for n, (name, base, offset, operation) in enumerate(_STEPS):
                with m.Case(n):
                    m.d.comb += [
                        request.payload.register.eq((decides if name in _DECIDING else own)[base] + offset // 4),
                        request.payload.operation.eq(operation),
                        request.payload.data.eq(data.get(name, 0)),
                    ]
        m.d.comb += [
            request.payload.is_last.eq((step == _NUMBERS["SYSTEM_ERROR"]) | (group == STATUS)),
            self.messages.payload.requester_id.eq(requester_id),
            self.messages.payload.code.eq(Mux(is_correctable, spec.ERR_COR, Mux(is_fatal, spec.ERR_FATAL, spec.ERR_NONFATAL))),
        ]

        answer = response.payload.data
        with m.FSM():
            with m.State("TAKE"):
                incoming = self.reports.payload
                m.d.comb += self.reports.ready.eq(1)
                m.d.sync += [report.eq(incoming), function.eq(Mux(incoming.is_for_all, 0, incoming.function)), sent.eq(0)]
                is_known = Cat(incoming.kind == item for item in ErrorKind).any()
                is_there = Cat(self.present, Const(0, 256 - count)).bit_select(incoming.function, 1)
                with m.If(self.reports.valid & is_known & (incoming.is_for_all | is_there)):
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                fatal = 0
                for _, place, is_default_fatal, _ in spec.UNCORRECTABLE:
                    fatal |= int(is_default_fatal) << place
                m.d.sync += [step.eq(0), severity.eq(Const(fatal, 32).bit_select(bit, 1))]
                m.d.sync += [uncorrectable_masked.eq(0), correctable_masked.eq(0), advisory_masked.eq(0), is_logged.eq(0)]
                m.next = "CONTINUE"
                with m.If(reports_errors):
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += request.valid.eq(1)
                with m.If(request.ready):
                    m.next = "HEAR"
            with m.State("HEAR"):
                m.d.comb += response.ready.eq(1)
                with m.If(response.valid):
                    m.d.sync += step.eq(step + 1)
                    m.next = "ASK"
                    with m.Switch(step):
                        with m.Case(_NUMBERS["COMMAND"]):
                            m.d.sync += [serr.eq(answer[spec.COMMAND_SERR]), parity_response.eq(answer[spec.COMMAND_PARITY_RESPONSE])]
                            with m.If(~is_virtual):
                                m.d.sync += step.eq(Mux(has_aer, _NUMBERS["SEVERITY"], _NUMBERS["DEVICE"]))
                            with m.If(group == STATUS):
                                m.next = "CONTINUE"
                        with m.Case(_NUMBERS["PHYSICAL_COMMAND"]):
                            m.d.sync += [serr.eq(answer[spec.COMMAND_SERR]), parity_response.eq(answer[spec.COMMAND_PARITY_RESPONSE])]
                        with m.Case(_NUMBERS["PHYSICAL_DEVICE"]):
                            m.d.sync += enables.eq(answer)
                            with m.If(~has_aer):
                                m.d.sync += step.eq(_NUMBERS["DEVICE"])
                        with m.Case(_NUMBERS["SEVERITY"]):
                            m.d.sync += severity.eq(answer.bit_select(bit, 1))
                        with m.Case(_NUMBERS["UNCORRECTABLE_MASK"]):
                            m.d.sync += uncorrectable_masked.eq(answer.bit_select(bit, 1))
                        with m.Case(_NUMBERS["CORRECTABLE_MASK"]):
                            m.d.sync += [correctable_masked.eq(answer.bit_select(bit, 1)), advisory_masked.eq(answer[spec.ADVISORY_BIT])]
                        with m.Case(_NUMBERS["CONTROL"]):
                            m.d.sync += control.eq(answer)
                        with m.Case(_NUMBERS["UNCORRECTABLE_STATUS"]):
                            is_occupied = answer.bit_select(control[:5], 1)
                            m.d.sync += is_logged.eq(is_status_set & ~uncorrectable_masked & ~is_occupied)
                        with m.Case(_NUMBERS["CORRECTABLE_STATUS"]):
                            with m.If(~is_logged):
                                m.d.sync += step.eq(_NUMBERS["DEVICE"])
                        with m.Case(_NUMBERS["DEVICE"]):
                            with m.If(~is_virtual):
                                m.d.sync += enables.eq(answer)
                        with m.Case(_NUMBERS["SYSTEM_ERROR"]):
                            m.next = "CONTINUE"
                            with m.If(is_message & ~(sent & severities).any()):
                                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += self.messages.valid.eq(1)
                with m.If(self.messages.ready):
                    m.d.sync += sent.eq(sent | severities)
                    m.next = "CONTINUE"
            with m.State("CONTINUE"):
                m.d.sync += function.eq(function + 1)
                m.next = "TAKE"
                with m.If(report.is_for_all & (function != last_physical)):
                    m.next = "BEGIN"
        return m
