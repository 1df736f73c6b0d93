"""virtio over PCI: what a virtio driver sees of a function, and what the ring engine is told of it."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..function.description import (
    Bar,
    FunctionDescription,
    MsixCapability,
    PasidCapability,
    PcieCapability,
    PowerCapability,
    SriovCapability,
    VirtioCapability,
    VirtioWindow,
)
from ..function.layouts import MsixRequest
from ..regs.bus import RegisterBus, RegisterRequest
from ..spec import virtio as spec
from .layouts import Notification, QueueCommand, QueueOperation

# Our layout: BAR 0 has the four structures, BAR 2 the MSI-X table and its pending bits.
REGISTERS_BAR, REGISTERS_BYTES = 0, 0x4000
COMMON, ISR, DEVICE, NOTIFY = range(4)  # structure n lies at 0x1000 * n
STRUCTURE_BYTES = 0x1000
NOTIFY_MULTIPLIER = 4
MSIX_BAR, MSIX_BYTES, MSIX_PBA = 2, 0x1000, 0x800
MSIX_VECTORS_MAX = MSIX_PBA // 16

OFFERED = 1 << spec.F_VERSION_1 | 1 << spec.F_ACCESS_PLATFORM | 1 << spec.F_ORDER_PLATFORM  # what ring engine and transport can honour
QUEUE_WORDS = 4  # of a queue's settings: size and vector, then three addresses
HOLD = 16  # times 5 cycles that a device reset takes at least: what a stage between us and the engine holds arrives meanwhile


def virtio_function(*, device_type, class_code, queues, config_bytes, vectors, pcie=None, extended=(), virtual_functions=0, first_offset=1,
                    is_lowest=None):  # fmt: skip
    """Return the :class:`FunctionDescription` of a virtio function whose registers are a :class:`PciTransport`.

    ``extended``: its extended capabilities; with them it reports errors. ``virtual_functions`` of the same kind have the same BARs, in an
    SR-IOV capability with ``first_offset`` and ``is_lowest``.

    Raises
    ------
    :exc:`ValueError`
        When a number is out of its range.
    """
    if not 2 <= vectors <= MSIX_VECTORS_MAX:
        raise ValueError(f"MSI-X vectors of a virtio function must be between 2 and {MSIX_VECTORS_MAX}, not {vectors!r}")
    device_id = spec.DEVICE_ID_BASE + device_type
    bars = (Bar(REGISTERS_BAR, REGISTERS_BYTES), Bar(MSIX_BAR, MSIX_BYTES))
    sriov = (SriovCapability(virtual_functions, device_id, first_offset, bars=bars, is_lowest=is_lowest),) if virtual_functions else ()
    places = ((spec.CFG_COMMON, COMMON, spec.COMMON_BYTES), (spec.CFG_ISR, ISR, 1), (spec.CFG_DEVICE, DEVICE, config_bytes))
    return FunctionDescription(
        vendor_id=spec.VENDOR_ID,
        device_id=device_id,
        class_code=class_code,
        subsystem_vendor_id=spec.VENDOR_ID,
        subsystem_id=device_id,
        bars=bars,
        capabilities=(
            pcie or PcieCapability(has_flr=True, has_prefixes=any(isinstance(c, PasidCapability) for c in extended)),
            MsixCapability(vectors, MSIX_BAR, 0, MSIX_BAR, MSIX_PBA),
            PowerCapability(keeps_state=False),
            *(VirtioCapability(kind, REGISTERS_BAR, n * STRUCTURE_BYTES, length) for kind, n, length in places),
            VirtioCapability(spec.CFG_NOTIFY, REGISTERS_BAR, NOTIFY * STRUCTURE_BYTES, NOTIFY_MULTIPLIER * queues, NOTIFY_MULTIPLIER),
            VirtioWindow(),
        ),
        extended=(*extended, *sriov),
        reports_errors=bool(extended),
    )


class PciTransport(wiring.Component):
    """The registers of one virtio function: status, features, queue settings, doorbells, interrupts, device configuration.

    **Status.** Bits are only added; a write of 0 begins a device reset. FEATURES_OK is not taken when the driver accepted a bit that is
    not offered, or not VERSION_1, or, in a strict build, not ACCESS_PLATFORM; DRIVER_OK not without FEATURES_OK. While a device
    reset is under way ``stop`` is 1, status reads as before (NEEDS_RESET if that was 0), and writes do nothing; when
    ``stopped`` came, all is as after power-on and status reads 0. A rise of ``reset``
    begins one too; NEEDS_RESET shows until its end. [VIRTIO1.4 2.1, 2.2, 2.4]

    **Queues.** A size that is no power of two up to the queue's largest is not taken; neither are size or addresses of an
    enabled queue. Enabling (a write of exactly 1) sends a QueueCommand. A doorbell (16 bits, the queue's number at the queue's
    place) of an enabled queue is remembered until it is taken at ``kicks``; before DRIVER_OK it is nothing. [VIRTIO1.4 4.1.4.3, 4.1.5.2]

    **Interrupts.** A notification of a queue, a change of the configuration and NEEDS_RESET become MSI-X vectors, or ISR bits
    while MSI-X is off; a change sets its ISR bit in any case. Nothing before DRIVER_OK. A vector that the function does not
    have reads back as NO_VECTOR. [VIRTIO1.4 4.1.4.5, 4.1.5.1]

    Latency: 2 cycles from register request to response; 2 from doorbell to kick, one more per other queue; 2 from notification to MSI-X
    request. Throughput: a notification is served after each register access at the latest.

    Parameters
    ----------
    function : :class:`int`
        PCI function number.
    device_features : :class:`int`
        Bits of the device type: 0 to 23, 50 to 63.
    queues : tuple of :class:`int`
        Largest size of each queue: powers of two up to 32768.
    first_queue : :class:`int`
        Card-wide number of queue 0.
    config_bytes : :class:`int`
        Size of the device configuration: 1 to 4096.
    vectors : :class:`int`
        MSI-X vectors: 2 to 128.
    strict : :class:`bool`
        Refuse drivers that do not accept ACCESS_PLATFORM.
    transport_features : :class:`int`
        Further bits to offer: VERSION_1 and any of those that ring engine and transport can honour. Default all of them. SR_IOV of a
        function with virtual ones besides. [VIRTIO1.4 6.2]

    Members
    -------
    bus : ``In(RegisterBus())``
        Accesses of BAR 0.
    config : ``In(8 * config_bytes)``
        Device configuration, byte 0 in bits 7:0; read-only for the driver.
    config_changed : ``In(1)``
        Pulse: ``config`` is another from this cycle on.
    msix_enable : ``In(1)``
        From configuration space.
    commands : ``Out(stream.Signature(QueueCommand))``
        Queues for the ring engine.
    kicks : ``Out(stream.Signature(6))``
        Card-wide numbers of queues whose doorbell rang; none in front of the queue's command.
    notifications : ``In(stream.Signature(Notification))``
        Used buffer notifications for queues of this function.
    interrupts : ``Out(stream.Signature(MsixRequest))``
        Vectors to send.
    needs_reset : ``In(1)``
        Pulse: the device cannot go on.
    reset : ``In(1)``
        A function level reset is under way; ``stop`` is 1 from the cycle behind its rise until the function is as after power-on.
    stop, stopped : ``Out(1)``, ``In(1)``
        To, and from, all that works for this function: see "Stop" in rtl/README.md.
    driver_ok, access_platform : ``Out(1)``
        The driver is ready; it accepted ACCESS_PLATFORM (else DMA bypasses the IOMMU).
    features : ``Out(64)``
        What driver and device agreed on; 0 before FEATURES_OK.
    interrupt : ``Out(1)``
        Interrupt Status of configuration space.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range, or a feature cannot be honoured.
    """

    def __init__(self, *, function, device_features, queues, first_queue, config_bytes, vectors, strict=False, transport_features=OFFERED):
        queues = tuple(queues)
        if function not in range(256):
            raise ValueError(f"Function must be between 0 and 255, not {function!r}")
        if device_features < 0 or device_features & ~(spec.DEVICE_TYPE_FEATURES & (1 << 64) - 1 & ~(0b11 << 41)):
            raise ValueError(f"Device features must be bits 0 to 23 and 50 to 63, not {device_features!r}")
        if transport_features & ~(OFFERED | 1 << spec.F_SR_IOV) or not transport_features >> spec.F_VERSION_1 & 1:
            raise ValueError(f"Transport features must be VERSION_1 and bits of {OFFERED:#x}, not {transport_features!r}")
        if strict and not transport_features >> spec.F_ACCESS_PLATFORM & 1:
            raise ValueError(f"A strict function must offer ACCESS_PLATFORM, not {transport_features!r}")
        if not queues or any(size not in [1 << n for n in range(16)] for size in queues):
            raise ValueError(f"Largest sizes of queues must be powers of two up to 32768, at least one, not {queues!r}")
        if first_queue < 0 or first_queue + len(queues) > 64:
            raise ValueError(f"Queues of a card must have numbers below 64, not {first_queue!r} to {first_queue + len(queues) - 1!r}")
        if config_bytes not in range(1, STRUCTURE_BYTES + 1):
            raise ValueError(f"Device configuration must have 1 to {STRUCTURE_BYTES} bytes, not {config_bytes!r}")
        if vectors not in range(2, MSIX_VECTORS_MAX + 1):
            raise ValueError(f"MSI-X vectors must be between 2 and {MSIX_VECTORS_MAX}, not {vectors!r}")
        self.function, self.queues, self.first_queue, self.config_bytes = function, queues, first_queue, config_bytes
        self.device_features, self.transport_features, self.strict, self.vectors = device_features, transport_features, strict, vectors
        super().__init__({
            "bus": In(RegisterBus()),
            "config": In(8 * config_bytes),
            "config_changed": In(1),
            "msix_enable": In(1),
            "commands": Out(stream.Signature(QueueCommand)),
            "kicks": Out(stream.Signature(6)),
            "notifications": In(stream.Signature(Notification)),
            "interrupts": Out(stream.Signature(MsixRequest)),
            "needs_reset": In(1),
            "reset": In(1),
            "stop": Out(1),
            "stopped": In(1),
            "driver_ok": Out(1),
            "access_platform": Out(1),
            "features": Out(64),
            "interrupt": Out(1),
        })

    @property
    def offered(self):
        """All feature bits that the function offers."""
        return self.device_features | self.transport_features

    def elaborate(self, platform):
        m = Module()
        count = len(self.queues)
        most = Array(self.queues)

        status, is_resetting = Signal(8), Signal()
        device_select, driver_select = Signal(32), Signal(32)
        accepted, beyond = Signal(64), Signal(8)  # driver's features; bytes of features 64..127 that are not 0
        config_vector, queue_select = Signal(16, init=spec.NO_VECTOR), Signal(16)
        generation, changed, config_due = Signal(8), Signal(), Signal()  # the configuration changed since the driver's last look
        isr = Signal(2)
        enabled, enable_due, kick_due = Signal(count), Signal(count), Signal(count)

        m.submodules.settings = settings = Memory(shape=64, depth=QUEUE_WORDS * count, init=[])
        read, write = settings.read_port(), settings.write_port(granularity=8)
        queue, word = Signal(range(max(count, 2))), Signal(2)  # what is written
        read_queue, read_word = Signal.like(queue), Signal.like(word)
        m.d.comb += [
            read_queue.eq(queue), read_word.eq(word), read.addr.eq(Cat(read_word, read_queue)), write.addr.eq(Cat(word, queue)),
        ]  # fmt: skip
        size, vector = read.data[:16], read.data[16:32]

        live = status[spec.S_DRIVER_OK] & ~is_resetting
        m.d.comb += [
            self.stop.eq(is_resetting),
            self.driver_ok.eq(live),
            self.features.eq(Mux(status[spec.S_FEATURES_OK], accepted, 0)),
            self.access_platform.eq(self.features[spec.F_ACCESS_PLATFORM]),
            self.interrupt.eq(isr.any() & ~self.msix_enable),
        ]

        # The access at work.
        request, answer = Signal(RegisterRequest), Signal(64)
        enables, data = Signal(8), Signal(64)  # of a write that counts, 0 else
        merged = Signal(64)  # ``answer`` of this word with the enabled bytes written
        structure, at = request.offset[12:14], request.offset[:12]
        selected = Signal()
        m.d.comb += [
            enables.eq(Mux(request.is_write & ~is_resetting & (request.offset[14:] == 0), request.byte_enable, 0)),
            data.eq(request.data),
            selected.eq(queue_select < count),
            merged.eq(Cat(Mux(b, data.word_select(n, 8), answer.word_select(n, 8)) for n, b in enumerate(enables))),
        ]

        def feature_word(features, select):
            return Mux(select == 0, features & 0xFFFFFFFF, Mux(select == 1, features >> 32, 0))[:32]

        offered = Signal(64)
        is_enabled = (enabled.bit_select(queue, 1) & selected)[0]
        m.d.comb += offered.eq(self.offered)
        with m.If(request.offset[14:] == 0):
            with m.Switch(structure):
                with m.Case(COMMON):
                    with m.Switch(at):
                        with m.Case(spec.WORD_DEVICE_FEATURE):
                            m.d.comb += answer.eq(Cat(device_select, feature_word(offered, device_select)))
                        with m.Case(spec.WORD_DRIVER_FEATURE):
                            m.d.comb += answer.eq(Cat(driver_select, feature_word(accepted & offered, driver_select)))
                        with m.Case(spec.WORD_DEVICE):
                            shown = (generation + changed)[:8]
                            m.d.comb += answer.eq(Cat(config_vector, Const(count, 16), status, shown, queue_select))
                        with m.Case(spec.WORD_QUEUE):
                            m.d.comb += answer.eq(Mux(
                                selected, Cat(size, vector, is_enabled, Signal(15), queue_select), spec.NO_VECTOR << 16))  # fmt: skip
                        with m.Case(spec.WORD_DESC, spec.WORD_DRIVER, spec.WORD_DEVICE_AREA):
                            m.d.comb += answer.eq(Mux(selected, read.data, 0))
                with m.Case(ISR):
                    with m.If(at == 0):
                        m.d.comb += answer.eq(isr)
                with m.Case(DEVICE):
                    words = -(-self.config_bytes // 8)
                    with m.Switch(at[3:]):
                        for n in range(words):
                            with m.Case(n):
                                m.d.comb += answer.eq(self.config[64 * n : 64 * n + 64])

        def known(number):
            return Mux((number < self.vectors) | (number == spec.NO_VECTOR), number, spec.NO_VECTOR)

        take_interrupt, interrupt_vector = Signal(), Signal(16)
        update = Signal()  # the access takes effect
        is_common = (structure == COMMON) & (request.offset[14:] == 0)

        # What a write makes of the status: bits are added, and two of them must be earned.
        written, status_after = data[32:40], Signal(8)
        refused = (accepted & ~offered).any() | beyond.any() | ~accepted[spec.F_VERSION_1]
        if self.strict:
            refused |= ~accepted[spec.F_ACCESS_PLATFORM]
        simple = 1 << spec.S_ACKNOWLEDGE | 1 << spec.S_DRIVER | 1 << spec.S_FAILED
        features_ok = status[spec.S_FEATURES_OK] | (written[spec.S_FEATURES_OK] & ~refused)
        m.d.comb += status_after.eq(
            status | (written & simple) | (features_ok << spec.S_FEATURES_OK)
            | ((written[spec.S_DRIVER_OK] & features_ok) << spec.S_DRIVER_OK))  # fmt: skip

        # Doorbells: 16 bits, the queue's number, at the queue's place.
        rings = Signal(count)
        for n in range(count):
            half = n % 2
            with m.If((structure == NOTIFY) & (at[3:] == n // 2)):
                m.d.comb += rings[n].eq((enables[4 * half : 4 * half + 4] == 0b0011) & (data[32 * half : 32 * half + 16] == n))

        kick_turn = Signal.like(queue)
        kick_here = Signal(count)
        m.d.comb += kick_here.eq(1 << kick_turn)
        m.d.sync += kick_turn.eq(Mux(kick_turn == count - 1, 0, kick_turn + 1))
        with m.If(self.kicks.ready):
            m.d.sync += self.kicks.valid.eq(0)
        kick_taken = Signal(count)
        with m.If(~self.kicks.valid & (kick_due & ~enable_due & kick_here).any() & live):
            m.d.comb += kick_taken.eq(kick_here)
            m.d.sync += [self.kicks.valid.eq(1), self.kicks.payload.eq(kick_turn + self.first_queue)]
        m.d.sync += kick_due.eq(Mux(live, (kick_due & ~kick_taken) | Mux(update, rings & enabled, 0), 0))

        command_taken, newly_enabled = Signal(count), Signal(count)
        with m.If(self.commands.valid & self.commands.ready):
            m.d.comb += command_taken.eq(1 << (self.commands.payload.queue - self.first_queue)[:6])
            m.d.sync += self.commands.valid.eq(0)
        m.d.sync += enable_due.eq((enable_due & ~command_taken) | newly_enabled)
        m.d.comb += self.commands.payload.operation.eq(QueueOperation.ENABLE)
        with m.If(self.interrupts.ready):
            m.d.sync += self.interrupts.valid.eq(0)
        m.d.comb += self.interrupts.payload.function.eq(self.function)
        with m.If(take_interrupt & self.msix_enable & (interrupt_vector != spec.NO_VECTOR)):
            m.d.sync += [self.interrupts.valid.eq(1), self.interrupts.payload.vector.eq(interrupt_vector)]

        # What waits for its turn beside register accesses.
        enable_turn = Signal.like(queue)
        wants_enable = enable_due.bit_select(enable_turn, 1)[0] & ~self.commands.valid & ~is_resetting
        steps = max(count, HOLD)
        is_clearing, cleared, is_fresh = Signal(init=1), Signal(range(steps)), Signal(init=1)
        wants_notify = self.notifications.valid & ~self.interrupts.valid
        wants_config = config_due & ~self.interrupts.valid
        wants_clear = is_resetting & self.stopped & ~self.commands.valid & ~self.kicks.valid & ~self.interrupts.valid
        others = is_clearing | wants_clear | wants_notify | wants_config | wants_enable
        was_bus = Signal()

        with m.FSM():
            with m.State("CHOOSE"):
                m.d.sync += [was_bus.eq(0), enable_turn.eq(Mux(enable_turn == count - 1, 0, enable_turn + 1))]
                with m.If(self.bus.request.valid & ~is_fresh & ~(was_bus & others)):
                    m.d.comb += [
                        self.bus.request.ready.eq(1),
                        read_queue.eq(queue_select),
                        read_word.eq(self.bus.request.payload.offset[3:5] + 1),
                    ]
                    m.d.sync += [request.eq(self.bus.request.payload), queue.eq(read_queue), word.eq(read_word), was_bus.eq(1)]
                    m.next = "ACCESS"
                with m.Elif(wants_config):
                    m.d.sync += config_due.eq(0)
                    with m.If(live):
                        m.d.comb += [take_interrupt.eq(1), interrupt_vector.eq(config_vector)]
                        m.d.sync += isr[spec.ISR_CONFIG].eq(1)
                with m.Elif(wants_notify):
                    m.d.comb += [
                        self.notifications.ready.eq(1),
                        read_word.eq(0),
                        read_queue.eq(self.notifications.payload.queue - self.first_queue),
                    ]
                    m.next = "NOTIFY"
                with m.Elif(wants_enable):
                    m.d.comb += [read_queue.eq(enable_turn), read_word.eq(0)]
                    m.d.sync += queue.eq(enable_turn)
                    m.next = "LOAD_SIZE"
                with m.Elif(is_clearing):
                    m.d.sync += [queue.eq(cleared), word.eq(0)]
                    m.next = "CLEAR"
                with m.Elif(wants_clear):
                    m.d.sync += [is_clearing.eq(1), cleared.eq(0)]

            with m.State("ACCESS"):
                m.d.comb += update.eq(1)
                m.d.sync += self.bus.response.payload.data.eq(answer)
                m.next = "ANSWER"
                with m.If(is_common):
                    with m.Switch(at):
                        with m.Case(spec.WORD_DEVICE_FEATURE):
                            m.d.sync += device_select.eq(merged[:32])
                        with m.Case(spec.WORD_DRIVER_FEATURE):
                            m.d.sync += driver_select.eq(merged[:32])
                            for n in range(4):
                                byte = data[32 + 8 * n : 40 + 8 * n]
                                with m.If(enables[4 + n] & ~status[spec.S_FEATURES_OK]):
                                    with m.Switch(merged[:32]):
                                        for select in range(2):
                                            with m.Case(select):
                                                m.d.sync += accepted.word_select(4 * select + n, 8).eq(byte)
                                            with m.Case(2 + select):
                                                m.d.sync += beyond[4 * select + n].eq(byte != 0)
                        with m.Case(spec.WORD_DEVICE):
                            with m.If(enables[:2].any()):
                                m.d.sync += config_vector.eq(known(merged[:16]))
                            with m.If(enables[4]):
                                m.d.sync += [status.eq(status_after), is_resetting.eq(written == 0)]
                                with m.If((written == 0) & (status == 0)):  # so that 0 is not to be seen before the end
                                    m.d.sync += status.eq(1 << spec.S_NEEDS_RESET)
                            with m.If(~request.is_write & request.byte_enable[5]):
                                m.d.sync += [generation.eq(shown), changed.eq(0)]
                            m.d.sync += queue_select.eq(merged[48:])
                        with m.Case(spec.WORD_QUEUE):
                            wanted = merged[:16]
                            fits = (wanted != 0) & ((wanted & (wanted - 1)) == 0) & (wanted <= most[queue]) & ~is_enabled
                            m.d.comb += [
                                write.data.eq(Cat(Mux(fits, wanted, size), known(merged[16:32]))),
                                write.en.eq(Mux(selected & enables[:4].any(), 0b1111, 0)),
                            ]
                            one = enables[4] & (data[32:40] == 1) & (~enables[5] | (data[40:48] == 0))
                            with m.If(one & selected & ~is_enabled):
                                m.d.comb += newly_enabled.eq(1 << queue)
                                m.d.sync += enabled.eq(enabled | newly_enabled)
                        with m.Case(spec.WORD_DESC, spec.WORD_DRIVER, spec.WORD_DEVICE_AREA):
                            m.d.comb += [write.data.eq(data), write.en.eq(Mux(selected & ~is_enabled, enables, 0))]
                with m.If((structure == ISR) & (request.offset[14:] == 0) & (at == 0) & ~request.is_write & request.byte_enable[0]):
                    m.d.sync += isr.eq(0)
            with m.State("ANSWER"):
                m.d.comb += self.bus.response.valid.eq(1)
                with m.If(self.bus.response.ready):
                    m.next = "CHOOSE"

            with m.State("NOTIFY"):
                with m.If(live):
                    with m.If(self.msix_enable):
                        m.d.comb += [take_interrupt.eq(1), interrupt_vector.eq(vector)]
                    with m.Else():
                        m.d.sync += isr[spec.ISR_QUEUE].eq(1)
                m.next = "CHOOSE"

            # A queue for the engine.
            with m.State("LOAD_SIZE"):
                m.d.sync += [self.commands.payload.size.eq(size), self.commands.payload.queue.eq(queue + self.first_queue)]
                m.d.comb += read_word.eq(1)
                m.next = "LOAD_DESCRIPTORS"
            with m.State("LOAD_DESCRIPTORS"):
                m.d.sync += self.commands.payload.descriptor_iova.eq(read.data)
                m.d.comb += read_word.eq(2)
                m.next = "LOAD_DRIVER"
            with m.State("LOAD_DRIVER"):
                m.d.sync += self.commands.payload.driver_iova.eq(read.data)
                m.d.comb += read_word.eq(3)
                m.next = "LOAD_DEVICE"
            with m.State("LOAD_DEVICE"):
                m.d.sync += [self.commands.payload.device_iova.eq(read.data), self.commands.valid.eq(~is_resetting)]
                m.next = "CHOOSE"

            # One queue's settings to their reset values; the last step ends the reset.
            with m.State("CLEAR"):
                m.d.comb += write.data.eq(Mux(word == 0, Cat(Const(0, 16) | most[queue], Const(spec.NO_VECTOR, 16)), 0))
                with m.If(cleared < count):
                    m.d.comb += write.en.eq(-1)
                m.d.sync += word.eq(word + 1)
                with m.If(word == QUEUE_WORDS - 1):
                    m.d.sync += cleared.eq(cleared + 1)
                    m.next = "CHOOSE"
                with m.If((word == QUEUE_WORDS - 1) & (cleared == steps - 1)):
                    m.d.sync += [
                        is_clearing.eq(0), is_fresh.eq(0), is_resetting.eq(0), status.eq(0), device_select.eq(0), driver_select.eq(0),
                        accepted.eq(0), beyond.eq(0), config_vector.eq(spec.NO_VECTOR), queue_select.eq(0), isr.eq(0), enabled.eq(0),
                        enable_due.eq(0),
                    ]  # fmt: skip

        with m.If(self.needs_reset & ~is_resetting):
            m.d.sync += status[spec.S_NEEDS_RESET].eq(1)
        with m.If(self.needs_reset | self.config_changed):
            m.d.sync += config_due.eq(1)
        with m.If(self.config_changed):
            m.d.sync += changed.eq(1)
        was_reset = Signal()
        m.d.sync += was_reset.eq(self.reset)
        with m.If(self.reset & ~was_reset):  # 0 is not to be seen before the end
            m.d.sync += [is_resetting.eq(1), status[spec.S_NEEDS_RESET].eq(1)]
        return m
