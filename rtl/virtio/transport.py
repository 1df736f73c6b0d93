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
from .doorbells import Doorbells
from .layouts import ConfigWrite, Notification, QueueCommand, QueueOperation

# Our layout: BAR 0 has the four structures, BAR 2 the MSI-X table and its pending bits.
REGISTERS_BAR, REGISTERS_BYTES = 0, 0x4000
COMMON, ISR, DEVICE, NOTIFY = range(4)  # structure n lies at 0x1000 * n
STRUCTURE_BYTES = 0x1000
NOTIFY_MULTIPLIER = 4
MSIX_BAR, MSIX_BYTES, MSIX_PBA = 2, 0x1000, 0x800
MSIX_VECTORS_MAX = MSIX_PBA // 16

OFFERED = 1 << spec.F_VERSION_1 | 1 << spec.F_ACCESS_PLATFORM | 1 << spec.F_ORDER_PLATFORM  # what every ring engine can honour
KNOWN = OFFERED | sum(1 << bit for bit in (
    spec.F_INDIRECT_DESC, spec.F_EVENT_IDX, spec.F_RING_PACKED, spec.F_IN_ORDER, spec.F_SR_IOV, spec.F_NOTIFICATION_DATA,
    spec.F_NOTIF_CONFIG_DATA, spec.F_RING_RESET, spec.F_SUSPEND))  # fmt: skip
FEATURE_WORDS = 4  # of 32 bits: a driver can accept bits up to 127 [VIRTIO1.4 2.2]
STATUS_BYTE = 4  # of the word that device_status is in
QUEUE_WORDS = 4  # of a queue's settings: size and vector, then three addresses
HOLD = 16  # times 5 cycles that a device reset takes at least: what a stage between us and the engine holds arrives meanwhile


def virtio_function(*, device_type, class_code, queues, config_bytes, vectors, pcie=None, extended=(), virtual_functions=0, first_offset=1,
                    is_lowest=None, at=None):  # fmt: skip
    """Return the :class:`FunctionDescription` of a virtio function whose registers are a :class:`PciTransport`.

    ``config_bytes`` 0: a device without configuration. ``extended``: its extended capabilities; with them it reports errors.
    ``at``: offset of the virtio capabilities, by default behind the others.
    ``virtual_functions`` of the same kind have the same BARs, in an SR-IOV capability with ``first_offset`` and ``is_lowest``.

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
    places = ((spec.CFG_COMMON, COMMON, spec.COMMON_BYTES), (spec.CFG_ISR, ISR, 1),
              *(((spec.CFG_DEVICE, DEVICE, config_bytes),) if config_bytes else ()))  # fmt: skip
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
            *(VirtioCapability(kind, REGISTERS_BAR, n * STRUCTURE_BYTES, length, at=at if n == COMMON else None)
              for kind, n, length in places if length),
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

    **Queues.** A size that is no power of two up to the queue's largest is not taken, but any up to it with RING_PACKED; neither are
    size or addresses of an enabled queue. Enabling (a write of exactly 1) sends a QueueCommand. A doorbell of an enabled queue (see
    :class:`.doorbells.Doorbells`) is remembered until it is taken at ``kicks``; before DRIVER_OK it is nothing.
    [VIRTIO1.4 4.1.4.3, 4.1.5.2]

    **Queue reset**, with RING_RESET: 1 in queue_reset sends RESET when ``idle`` of the queue is 0, so that the engine has had its ENABLE.
    When ``idle`` is 1 again the queue's registers become as after a device reset, with queue_reset and queue_enable 0. From the
    write on its doorbells and notifications are nothing. [VIRTIO1.4 2.6.1, 4.1.4.3.1]

    **Suspend**, with SUSPEND: the bit, written while DRIVER_OK is set, raises ``suspend``. When ``suspended`` is 1 and no interrupt waits
    here, status shows SUSPEND in place of DRIVER_OK; then none is sent, and only status can be written. DRIVER_OK, written, drops
    ``suspend``; when ``suspended`` is 0 status shows it in place of SUSPEND, and changes that came meanwhile are told. [VIRTIO1.4 3.4]

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
        Bits of the device type: 0 to 23, 50 to 127.
    queues : tuple of :class:`int`
        Largest size of each queue: powers of two up to 32768.
    first_queue : :class:`int`
        Card-wide number of queue 0.
    config_bytes : :class:`int`
        Size of the device configuration: 0 to 4096.
    vectors : :class:`int`
        MSI-X vectors: 2 to 128.
    strict : :class:`bool`
        Refuse drivers that do not accept ACCESS_PLATFORM.
    transport_features : :class:`int`
        Further bits to offer: VERSION_1 and any of ``KNOWN``. The ring engine must honour RING_PACKED, INDIRECT_DESC, EVENT_IDX, IN_ORDER,
        RING_RESET and SUSPEND. SR_IOV is of a function with virtual ones. [VIRTIO1.4 6.2]
    dependencies : tuple of (:class:`int`, tuple of :class:`int`)
        Numbers of features, each with others of which the driver must accept one as well. [VIRTIO1.4 2.2.1]

    Members
    -------
    bus : ``In(RegisterBus())``
        Accesses of BAR 0.
    config : ``In(8 * config_bytes)``
        Device configuration, byte 0 in bits 7:0. It stays while ``suspended`` is 1.
    config_write : ``Out(ConfigWrite)``
        The driver writes to it; whose bytes these are shows them changed from the next cycle on, or ignores it.
    config_changed : ``In(1)``
        Pulse: ``config`` is another from this cycle on.
    msix_enable : ``In(1)``
        From configuration space.
    commands : ``Out(stream.Signature(QueueCommand))``
        Queues for the ring engine.
    kicks : ``Out(stream.Signature(6))``
        Card-wide numbers of queues whose doorbell rang; none before the engine has had the queue's ENABLE.
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
    idle : ``In(number of queues)``
        Of the ring engine: the queue is not enabled, and nothing of it is in flight. It falls with ENABLE.
    suspend, suspended : ``Out(1)``, ``In(1)``
        To, and from, ring engine and back end: nothing more is done for this function; nothing is.
    driver_ok, access_platform : ``Out(1)``
        The driver is ready; it accepted ACCESS_PLATFORM (else DMA bypasses the IOMMU).
    features : ``Out(128)``
        What driver and device agreed on; 0 before FEATURES_OK.
    interrupt : ``Out(1)``
        Interrupt Status of configuration space.

    Raises
    ------
    :exc:`ValueError`
        If a parameter is out of its range, or a feature cannot be honoured.
    """

    def __init__(self, *, function, device_features, queues, first_queue, config_bytes, vectors, strict=False, transport_features=OFFERED,
                 dependencies=()):  # fmt: skip
        queues = tuple(queues)
        if function not in range(256):
            raise ValueError(f"Function must be between 0 and 255, not {function!r}")
        if device_features < 0 or device_features & ~(spec.DEVICE_TYPE_FEATURES & ~(0b11 << 41)):
            raise ValueError(f"Device features must be bits 0 to 23 and 50 to 127, not {device_features!r}")
        if transport_features & ~KNOWN or not transport_features >> spec.F_VERSION_1 & 1:
            raise ValueError(f"Transport features must be VERSION_1 and bits of {KNOWN:#x}, not {transport_features!r}")
        offered = device_features | transport_features
        for feature, others in dependencies:
            if offered >> feature & 1 and not any(offered >> other & 1 for other in others):
                raise ValueError(f"Feature {feature} must be offered with one of {others!r}, not with {offered:#x} alone")
        if strict and not transport_features >> spec.F_ACCESS_PLATFORM & 1:
            raise ValueError(f"A strict function must offer ACCESS_PLATFORM, not {transport_features!r}")
        if not queues or any(size not in [1 << n for n in range(16)] for size in queues):
            raise ValueError(f"Largest sizes of queues must be powers of two up to 32768, at least one, not {queues!r}")
        if first_queue < 0 or first_queue + len(queues) > 64:
            raise ValueError(f"Queues of a card must have numbers below 64, not {first_queue!r} to {first_queue + len(queues) - 1!r}")
        if config_bytes not in range(STRUCTURE_BYTES + 1):
            raise ValueError(f"Device configuration must have 0 to {STRUCTURE_BYTES} bytes, not {config_bytes!r}")
        if vectors not in range(2, MSIX_VECTORS_MAX + 1):
            raise ValueError(f"MSI-X vectors must be between 2 and {MSIX_VECTORS_MAX}, not {vectors!r}")
        self.function, self.queues, self.first_queue, self.config_bytes = function, queues, first_queue, config_bytes
        self.device_features, self.transport_features, self.strict, self.vectors = device_features, transport_features, strict, vectors
        self.dependencies = tuple(dependencies)
        super().__init__({
            "bus": In(RegisterBus()),
            "config": In(8 * config_bytes),
            "config_changed": In(1),
            "config_write": Out(ConfigWrite),
            "msix_enable": In(1),
            "commands": Out(stream.Signature(QueueCommand)),
            "kicks": Out(stream.Signature(6)),
            "notifications": In(stream.Signature(Notification)),
            "interrupts": Out(stream.Signature(MsixRequest)),
            "needs_reset": In(1),
            "reset": In(1),
            "stop": Out(1),
            "stopped": In(1),
            "idle": In(len(queues)),
            "suspend": Out(1),
            "suspended": In(1),
            "driver_ok": Out(1),
            "access_platform": Out(1),
            "features": Out(128),
            "interrupt": Out(1),
        })

    @property
    def offered(self):
        """All feature bits that the function offers."""
        return self.device_features | self.transport_features

    def offers(self, feature):
        """Tell whether the function offers the feature of this number."""
        return bool(self.offered >> feature & 1)

    def elaborate(self, platform):
        m = Module()
        count = len(self.queues)
        most = Array(self.queues)

        status, is_resetting = Signal(8), Signal()
        device_select, driver_select = Signal(32), Signal(32)
        kept = max(2, -(-self.offered.bit_length() // 32))  # words of features
        accepted = Signal(32 * kept)
        beyond = Signal(4 * (FEATURE_WORDS - kept))  # bytes of those that are not kept and not 0
        config_vector, queue_select = Signal(16, init=spec.NO_VECTOR), Signal(16)
        generation, changed, config_due = Signal(8), Signal(), Signal()  # the configuration changed since the driver's last look
        isr = Signal(2)
        enabled, enable_due = Signal(count), Signal(count)
        resetting, reset_due = Signal(count), Signal(count)  # queues; those whose RESET is to be sent
        is_pausing = Signal()  # between a SUSPEND and the next DRIVER_OK

        m.submodules.settings = settings = Memory(shape=64, depth=QUEUE_WORDS * count, init=[])
        read, write = settings.read_port(), settings.write_port(granularity=8)
        queue, word = Signal(range(max(count, 2))), Signal(2)  # what is written
        read_queue, read_word = Signal.like(queue), Signal.like(word)
        m.d.comb += [
            read_queue.eq(queue), read_word.eq(word), read.addr.eq(Cat(read_word, read_queue)), write.addr.eq(Cat(word, queue)),
        ]  # fmt: skip
        size, vector = read.data[:16], read.data[16:32]

        live = status[spec.S_DRIVER_OK] & ~is_resetting
        is_suspended = status[spec.S_SUSPEND]
        m.d.comb += [
            self.stop.eq(is_resetting),
            self.suspend.eq(is_pausing & ~is_resetting),
            self.driver_ok.eq(live),
            self.features.eq(Mux(status[spec.S_FEATURES_OK], accepted, 0)),
            self.access_platform.eq(self.features[spec.F_ACCESS_PLATFORM]),
            self.interrupt.eq(isr.any() & ~self.msix_enable),
        ]

        # The access at work.
        request, answer = Signal(RegisterRequest), Signal(64)
        enables, data = Signal(8), Signal(64)  # of a write that counts, 0 else
        structure, at = request.offset[12:14], request.offset[:12]
        is_common = (structure == COMMON) & (request.offset[14:] == 0)
        selected, writable = Signal(), Signal(8, init=0xFF)
        with m.If(is_suspended & (structure != NOTIFY)):
            m.d.comb += writable.eq(Mux(is_common & (at == spec.WORD_DEVICE), 1 << STATUS_BYTE, 0))
        m.d.comb += [
            enables.eq(Mux(request.is_write & ~is_resetting & (request.offset[14:] == 0), request.byte_enable & writable, 0)),
            data.eq(request.data),
            selected.eq(queue_select < count),
        ]

        def merged(value, first):
            """``value``, whose lowest byte is number ``first`` of the word, with the enabled bytes written."""
            return Cat(Mux(enables[first + n], data.word_select(first + n, 8), value.word_select(n, 8)) for n in range(len(value) // 8))

        def feature_word(features, select):
            return Mux(select < FEATURE_WORDS, features.word_select(select[:2], 32), 0)

        offered, valid = Signal(32 * FEATURE_WORDS), Signal(32 * FEATURE_WORDS)
        is_enabled = (enabled.bit_select(queue, 1) & selected)[0]
        is_reset = (resetting.bit_select(queue, 1) & selected)[0]
        m.d.comb += [offered.eq(self.offered), valid.eq(accepted & offered)]
        with m.If(request.offset[14:] == 0):
            with m.Switch(structure):
                with m.Case(COMMON):
                    with m.Switch(at):
                        with m.Case(spec.WORD_DEVICE_FEATURE):
                            m.d.comb += answer.eq(Cat(device_select, feature_word(offered, device_select)))
                        with m.Case(spec.WORD_DRIVER_FEATURE):
                            m.d.comb += answer.eq(Cat(driver_select, feature_word(valid, driver_select)))
                        with m.Case(spec.WORD_DEVICE):
                            shown = (generation + changed)[:8]
                            m.d.comb += answer.eq(Cat(config_vector, Const(count, 16), status, shown, queue_select))
                        with m.Case(spec.WORD_QUEUE):
                            m.d.comb += answer.eq(Mux(
                                selected, Cat(size, vector, is_enabled, Signal(15), queue_select), spec.NO_VECTOR << 16))  # fmt: skip
                        with m.Case(spec.WORD_DESC, spec.WORD_DRIVER, spec.WORD_DEVICE_AREA):
                            m.d.comb += answer.eq(Mux(selected, read.data, 0))
                        if self.offers(spec.F_NOTIF_CONFIG_DATA) or self.offers(spec.F_RING_RESET):
                            with m.Case(spec.WORD_NOTIFY):
                                number = Mux(self.features[spec.F_NOTIF_CONFIG_DATA], queue_select + self.first_queue, 0)[:16]
                                m.d.comb += answer.eq(Mux(selected, Cat(number, is_reset), 0))
                with m.Case(ISR):
                    with m.If(at == 0):
                        m.d.comb += answer.eq(isr)
                with m.Case(DEVICE):
                    words = -(-self.config_bytes // 8)
                    with m.Switch(at[3:]):
                        for n in range(words):
                            with m.Case(n):
                                m.d.comb += answer.eq(self.config[64 * n : 64 * n + 64])

        def writes_one(at):
            """The 16-bit register at this byte of the word is set to 1, in one access or by its lower byte."""
            return enables[at] & (data.word_select(at, 8) == 1) & (~enables[at + 1] | (data.word_select(at + 1, 8) == 0))

        def known(number):
            return Mux((number < self.vectors) | (number == spec.NO_VECTOR), number, spec.NO_VECTOR)

        take_interrupt, interrupt_vector = Signal(), Signal(16)
        update = Signal()  # the access takes effect

        # What a write makes of the status: bits are added, and two of them must be earned.
        written, status_after = data.word_select(STATUS_BYTE, 8), Signal(8)
        refused = (accepted & ~offered).any() | beyond.any() | ~accepted[spec.F_VERSION_1]
        if self.strict:
            refused |= ~accepted[spec.F_ACCESS_PLATFORM]
        for feature, others in self.dependencies:
            if self.offers(feature):
                refused |= accepted[feature] & ~Cat(accepted[other] for other in others if self.offers(other)).any()
        simple = 1 << spec.S_ACKNOWLEDGE | 1 << spec.S_DRIVER | 1 << spec.S_FAILED
        features_ok = status[spec.S_FEATURES_OK] | (written[spec.S_FEATURES_OK] & ~refused)
        m.d.comb += status_after.eq(
            status | (written & simple) | (features_ok << spec.S_FEATURES_OK)
            | ((written[spec.S_DRIVER_OK] & features_ok & ~is_suspended) << spec.S_DRIVER_OK))  # fmt: skip

        m.submodules.doorbells = doorbells = Doorbells(count=count, first_queue=self.first_queue)
        wiring.connect(m, doorbells.kicks, wiring.flipped(self.kicks))
        m.d.comb += [
            doorbells.rings.eq(update & (structure == NOTIFY)), doorbells.word.eq(at[3:]), doorbells.enables.eq(enables),
            doorbells.data.eq(data), doorbells.is_live.eq((live | is_suspended) & ~is_resetting),
            doorbells.is_long.eq(self.features[spec.F_NOTIFICATION_DATA]), doorbells.by_data.eq(self.features[spec.F_NOTIF_CONFIG_DATA]),
            doorbells.allowed.eq(enabled & ~resetting), doorbells.held.eq(enable_due | self.idle),
            self.config_write.enable.eq(Mux(update & (structure == DEVICE), enables, 0)), self.config_write.word.eq(at[3:]),
            self.config_write.data.eq(data),
        ]  # fmt: skip

        command_taken, newly_enabled = Signal(count), Signal(count)
        with m.If(self.commands.valid & self.commands.ready):
            m.d.comb += command_taken.eq(1 << (self.commands.payload.queue - self.first_queue)[:6])
            m.d.sync += self.commands.valid.eq(0)
        m.d.sync += enable_due.eq((enable_due & ~command_taken) | newly_enabled)
        with m.If(self.interrupts.ready):
            m.d.sync += self.interrupts.valid.eq(0)
        m.d.comb += self.interrupts.payload.function.eq(self.function)
        with m.If(take_interrupt & self.msix_enable & (interrupt_vector != spec.NO_VECTOR)):
            m.d.sync += [self.interrupts.valid.eq(1), self.interrupts.payload.vector.eq(interrupt_vector)]

        # What waits for its turn beside register accesses.
        queue_turn, is_one = Signal.like(queue), Signal()  # ``is_one``: registers of one queue are cleared

        def of_turn(bits):
            return bits.bit_select(queue_turn, 1)[0] & ~self.commands.valid & ~is_resetting

        wants_enable = of_turn(enable_due)
        wants_reset = wants_end = Const(0)
        if self.offers(spec.F_RING_RESET):
            wants_reset = of_turn(reset_due & ~enable_due & ~self.idle)
            wants_end = of_turn(resetting & ~reset_due & self.idle) & ~self.interrupts.valid
        steps = max(count, HOLD)
        is_clearing, cleared, is_fresh = Signal(init=1), Signal(range(steps)), Signal(init=1)
        wants_notify = self.notifications.valid & ~self.interrupts.valid
        wants_config = config_due & ~self.interrupts.valid & ~is_suspended
        wants_clear = is_resetting & self.stopped & ~self.commands.valid & ~self.kicks.valid & ~self.interrupts.valid
        others = is_clearing | wants_clear | wants_notify | wants_config | wants_enable | wants_reset | wants_end
        was_bus = Signal()

        with m.FSM():
            with m.State("CHOOSE"):
                m.d.sync += [was_bus.eq(0), is_one.eq(0)]
                with m.If(~(wants_enable | wants_reset | wants_end)):
                    m.d.sync += queue_turn.eq(Mux(queue_turn == count - 1, 0, queue_turn + 1))
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
                with m.Elif(wants_enable):
                    m.d.comb += [read_queue.eq(queue_turn), read_word.eq(0)]
                    m.d.sync += [queue.eq(queue_turn), self.commands.payload.operation.eq(QueueOperation.ENABLE)]
                    m.next = "LOAD_SIZE"
                with m.Elif(wants_reset):
                    m.d.sync += [
                        self.commands.valid.eq(1), self.commands.payload.operation.eq(QueueOperation.RESET),
                        self.commands.payload.queue.eq(queue_turn + self.first_queue), reset_due.eq(reset_due & ~(1 << queue_turn)),
                    ]  # fmt: skip
                with m.Elif(wants_end):
                    m.d.sync += [queue.eq(queue_turn), word.eq(0), is_one.eq(1)]
                    m.next = "CLEAR"
                with m.Elif(wants_notify):
                    m.d.comb += [
                        self.notifications.ready.eq(1),
                        read_word.eq(0),
                        read_queue.eq(self.notifications.payload.queue - self.first_queue),
                    ]
                    m.d.sync += queue.eq(read_queue)
                    m.next = "NOTIFY"
                with m.Elif(is_clearing):
                    m.d.sync += [queue.eq(cleared), word.eq(0)]
                    m.next = "CLEAR"
                with m.Elif(wants_clear):
                    m.d.sync += [is_clearing.eq(1), cleared.eq(0)]
                if self.offers(spec.F_SUSPEND):
                    with m.If(live & is_pausing & self.suspended & ~self.notifications.valid & ~self.interrupts.valid):
                        m.d.sync += [status[spec.S_DRIVER_OK].eq(0), is_suspended.eq(1)]
                    with m.If(is_suspended & ~is_pausing & ~self.suspended & ~is_resetting):
                        m.d.sync += [status[spec.S_DRIVER_OK].eq(1), is_suspended.eq(0)]

            with m.State("ACCESS"):
                m.d.comb += update.eq(1)
                m.d.sync += self.bus.response.payload.data.eq(answer)
                m.next = "ANSWER"
                with m.If(is_common):
                    with m.Switch(at):
                        with m.Case(spec.WORD_DEVICE_FEATURE):
                            m.d.sync += device_select.eq(merged(device_select, 0))
                        with m.Case(spec.WORD_DRIVER_FEATURE):
                            m.d.sync += driver_select.eq(merged(driver_select, 0))
                            for n in range(4):
                                byte = data[32 + 8 * n : 40 + 8 * n]
                                with m.If(enables[4 + n] & ~status[spec.S_FEATURES_OK]):
                                    with m.Switch(merged(driver_select, 0)):
                                        for select in range(kept):
                                            with m.Case(select):
                                                m.d.sync += accepted.word_select(4 * select + n, 8).eq(byte)
                                        for select in range(FEATURE_WORDS - kept):
                                            with m.Case(kept + select):
                                                m.d.sync += beyond[4 * select + n].eq(byte != 0)
                        with m.Case(spec.WORD_DEVICE):
                            with m.If(enables[:2].any()):
                                m.d.sync += config_vector.eq(known(merged(config_vector, 0)))
                            with m.If(enables[STATUS_BYTE]):
                                m.d.sync += [status.eq(status_after), is_resetting.eq(written == 0)]
                                if self.offers(spec.F_SUSPEND):
                                    with m.If(is_suspended & written[spec.S_DRIVER_OK]):
                                        m.d.sync += is_pausing.eq(0)
                                    with m.Elif(live & written[spec.S_SUSPEND] & self.features[spec.F_SUSPEND]):
                                        m.d.sync += is_pausing.eq(1)
                                with m.If((written == 0) & (status == 0)):  # so that 0 is not to be seen before the end
                                    m.d.sync += status.eq(1 << spec.S_NEEDS_RESET)
                            with m.If(~request.is_write & request.byte_enable[5]):
                                m.d.sync += [generation.eq(shown), changed.eq(0)]
                            m.d.sync += queue_select.eq(merged(queue_select, 6))
                        with m.Case(spec.WORD_QUEUE):
                            wanted = merged(size, 0)
                            is_shaped = ((wanted & (wanted - 1)) == 0) | self.features[spec.F_RING_PACKED]
                            fits = (wanted != 0) & is_shaped & (wanted <= most[queue]) & ~is_enabled
                            m.d.comb += [
                                write.data.eq(Cat(Mux(fits, wanted, size), known(merged(vector, 2)))),
                                write.en.eq(Mux(selected & enables[:4].any(), 0b1111, 0)),
                            ]
                            with m.If(writes_one(4) & selected & ~is_enabled & ~is_reset):
                                m.d.comb += newly_enabled.eq(1 << queue)
                                m.d.sync += enabled.eq(enabled | newly_enabled)
                        with m.Case(spec.WORD_DESC, spec.WORD_DRIVER, spec.WORD_DEVICE_AREA):
                            m.d.comb += [write.data.eq(data), write.en.eq(Mux(selected & ~is_enabled, enables, 0))]
                        if self.offers(spec.F_RING_RESET):
                            with m.Case(spec.WORD_NOTIFY):
                                with m.If(writes_one(2) & selected & ~is_reset & self.features[spec.F_RING_RESET]):
                                    m.d.sync += [resetting.eq(resetting | (1 << queue)), reset_due.eq(reset_due | (is_enabled << queue))]
                with m.If((structure == ISR) & (request.offset[14:] == 0) & (at == 0) & ~request.is_write & request.byte_enable[0]):
                    m.d.sync += isr.eq(0)
            with m.State("ANSWER"):
                m.d.comb += self.bus.response.valid.eq(1)
                with m.If(self.bus.response.ready):
                    m.next = "CHOOSE"

            with m.State("NOTIFY"):
                with m.If(live & ~resetting.bit_select(queue, 1)[0]):
                    with m.If(self.msix_enable):
                        m.d.comb += [take_interrupt.eq(1), interrupt_vector.eq(vector)]
                    with m.Else():
                        m.d.sync += isr[spec.ISR_QUEUE].eq(1)
                m.next = "CHOOSE"

            # A queue for the engine.
            with m.State("LOAD_SIZE"):
                m.d.sync += [self.commands.payload.size.eq(size), self.commands.payload.queue.eq(queue + self.first_queue)]
                m.d.sync += [rule.eq(self.features[feature]) for rule, feature in (
                    (self.commands.payload.rules.packed, spec.F_RING_PACKED), (self.commands.payload.rules.indirect, spec.F_INDIRECT_DESC),
                    (self.commands.payload.rules.event_index, spec.F_EVENT_IDX), (self.commands.payload.rules.in_order, spec.F_IN_ORDER))]
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

            # One queue's settings to their reset values: the end of its reset, or a step of a device reset, which ends with the last.
            with m.State("CLEAR"):
                m.d.comb += write.data.eq(Mux(word == 0, Cat(Const(0, 16) | most[queue], Const(spec.NO_VECTOR, 16)), 0))
                with m.If(is_one | (cleared < count)):
                    m.d.comb += write.en.eq(-1)
                m.d.sync += word.eq(word + 1)
                with m.If(word == QUEUE_WORDS - 1):
                    m.d.sync += cleared.eq(cleared + 1)
                    m.next = "CHOOSE"
                with m.If((word == QUEUE_WORDS - 1) & is_one):
                    m.d.sync += [enabled.eq(enabled & ~(1 << queue)), resetting.eq(resetting & ~(1 << queue))]
                with m.Elif((word == QUEUE_WORDS - 1) & (cleared == steps - 1)):
                    m.d.sync += [
                        is_clearing.eq(0), is_fresh.eq(0), is_resetting.eq(0), status.eq(0), device_select.eq(0), driver_select.eq(0),
                        accepted.eq(0), beyond.eq(0), config_vector.eq(spec.NO_VECTOR), queue_select.eq(0), isr.eq(0), enabled.eq(0),
                        enable_due.eq(0), resetting.eq(0), reset_due.eq(0), is_pausing.eq(0),
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
