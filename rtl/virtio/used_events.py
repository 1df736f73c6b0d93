"""The used side's second half: the used index, what the driver wants to hear, notifications."""

from amaranth import C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..spec import virtio_ring as spec
from ..stream.queue import Queue
from ..stream.round_robin import number, round_robin
from ..tlp.layouts import BurstData, BurstStatus
from .layouts import Notification, QueueCommand, RingAccess
from .used_writer import Written, count_up


class Cookie(data.Struct):
    """Cookie of a read: its queue, and the 16-bit lane in which the answer begins."""

    queue: 6
    lane: 5


class Answer(data.Struct):
    """What was read for a queue."""

    queue: 6
    word: 32
    is_good: 1


class Ring(data.Struct):
    """What a command says of one queue."""

    packed: 1
    event_index: 1
    size: 16
    device: 62  # in units of 4 bytes [VIRTIO1.4 2.7, 2.8]
    driver: 64


class Context(data.Struct):
    """How far one queue is."""

    position: 16
    count: 17  # entries of the ring since the driver was asked last
    asked_position: 16
    asked_count: 17


class UsedEvents(wiring.Component):
    """Tells the driver of elements that are written: used index, then a notification if the driver wants one.

    The used index of a split ring is written when the elements below it are, and behind it (packed: behind the descriptors) what the
    driver wants to hear is read: avail.flags, used_event, or the driver event suppression structure. One read per queue is
    under way; what is written meanwhile is asked for by one more. [VIRTIO1.4 2.7.7, 2.7.10, 2.8.10]

    With EVENT_IDX a notification follows if one of the entries since the last question is the one that the driver named; an
    event structure's flag 2 without EVENT_IDX, and 3, count as ENABLE. [VIRTIO1.4 2.8.10]

    A read that fails is ``failed``. Answers for queues that are not enabled, or dead functions, are thrown away.

    Parameters
    ----------
    width : :class:`int`
        Data width in bits.
    functions : :class:`int`
        How many.
    queue_functions : tuple of :class:`int`
        Function of each queue.

    Members
    -------
    commands : ``In(stream.Signature(QueueCommand))``
        Taken between two events.
    written : one per function
        Writes that ended well, in their order.
    answers : ``In(stream.Signature(BurstData(width)))``, one per function
        Of the reads: one beat each; never stalled.
    usable : ``In(functions)``
        Two accesses may follow.
    enabled : ``In(queues)``
        Queues that are served.
    dead : ``In(functions)``
        The function is stopped or broken.
    accesses : ``Out(stream)``
        ``function``, ``access``, and the queue that asks.
    wants : ``Out(stream.Signature(Notification))``
        Notifications that the driver wants; always taken.
    failed : ``Out(functions)``
        Pulse.
    at_work : ``Out(functions)``
        The function whose event is at work.
    asking : ``Out(queues)``
        A read is under way.
    """

    def __init__(self, *, width, functions, queue_functions):
        self.width, self.functions, self.queue_functions = width, functions, tuple(queue_functions)
        queues = len(self.queue_functions)
        access = data.StructLayout({"function": range(max(functions, 2)), "queue": 6, "access": RingAccess(width)})
        super().__init__({
            "commands": In(stream.Signature(QueueCommand)),
            "written": In(stream.Signature(Written)).array(functions),
            "answers": In(stream.Signature(BurstData(width))).array(functions),
            "usable": In(functions),
            "enabled": In(queues),
            "dead": In(functions),
            "accesses": Out(stream.Signature(access)),
            "wants": Out(stream.Signature(Notification, always_ready=True)),
            "failed": Out(functions),
            "at_work": Out(functions),
            "asking": Out(queues),
        })

    def elaborate(self, platform):
        m = Module()
        queues, row_bits = len(self.queue_functions), (self.width // 8 - 1).bit_length()
        m.submodules.contexts = contexts = Memory(shape=Context, depth=queues, init=[])
        m.submodules.rings = rings = Memory(shape=Ring, depth=queues, init=[])
        read_context, write_context = contexts.read_port(), contexts.write_port()
        read_ring, write_ring = rings.read_port(), rings.write_port()

        # The dword of each answer: there is room for one of each queue.
        answers, wanted, granted = [], Signal(2 * self.functions), Signal(2 * self.functions)
        for n, port in enumerate(self.answers):
            most = sum(owner == n for owner in self.queue_functions)
            m.submodules[f"answers_{n}"] = queued = Queue(Answer, max(most, 2))
            answers.append(queued.o)
            cookie = Cookie(port.payload.cookie[: Cookie.as_shape().size])
            word = port.payload.data.word_select(cookie.lane[1:], 32)
            m.d.comb += [
                port.ready.eq(1),
                queued.i.valid.eq(port.valid),
                queued.i.payload.queue.eq(cookie.queue),
                queued.i.payload.word.eq(Mux(cookie.lane[0], word >> 16, word)),
                queued.i.payload.is_good.eq(port.payload.status == BurstStatus.OK),
                wanted[2 * n].eq(self.written[n].valid & self.usable[n]),
                wanted[2 * n + 1].eq(queued.o.valid & (self.usable[n] | self.dead[n])),
            ]

        # The event at work.
        function, is_answer = Signal(range(max(self.functions, 2))), Signal()
        written, waits, take, answer, forget = Signal(Written), Signal(), Signal(), Signal(Answer), Signal()
        with m.Switch(function):
            for n in range(self.functions):
                with m.Case(n):
                    m.d.comb += [
                        written.eq(self.written[n].payload),
                        waits.eq(self.written[n].valid),
                        self.written[n].ready.eq(take),
                        answer.eq(answers[n].payload),
                        answers[n].ready.eq(forget),
                    ]
        command, kept = self.commands.payload, Ring(write_ring.data)
        m.d.comb += [
            write_ring.en.eq(self.commands.valid & self.commands.ready),
            write_ring.addr.eq(command.queue),
            kept.packed.eq(command.rules.packed),
            kept.event_index.eq(command.rules.event_index),
            kept.size.eq(command.size),
            kept.device.eq(command.device_iova[2:]),
            kept.driver.eq(Cat(C(0, 1), command.driver_iova[1] & ~command.rules.packed, command.driver_iova[2:])),
        ]
        queue, context, ring, is_dead = Signal(6), Signal(Context), Signal(Ring), Signal()
        asking, again, is_asked = self.asking, Signal(queues), Signal()  # ``is_asked``: the queue's driver is, but for the newest answer
        access, event_iova = self.accesses.payload.access, Signal(64)
        m.d.comb += [
            is_dead.eq(self.dead.bit_select(function, 1) | ~self.enabled.bit_select(queue, 1)),
            read_context.addr.eq(Mux(is_answer, answer.queue, written.queue)),
            read_ring.addr.eq(read_context.addr),
            write_context.addr.eq(queue),
            write_context.data.eq(context),
            self.accesses.payload.function.eq(function),
            self.accesses.payload.queue.eq(queue),
            self.wants.payload.queue.eq(queue),
        ]
        event_offset = Signal(18)
        with m.If(~ring.packed & ring.event_index):
            m.d.comb += event_offset.eq(spec.AVAIL_RING + (ring.size << 1))
        m.d.sync += [event_iova.eq(ring.driver + event_offset), is_asked.eq(asking.bit_select(queue, 1))]

        # Whether the entry that the driver named is among those asked for: how far behind the last of them it is, in the turns of the ring.
        event = answer.word[:16]
        behind, turn = Signal(signed(20)), Signal(18)
        position = context.asked_position
        wanted_now = Signal()
        with m.If(ring.packed):
            with m.If(event[15] != position[15]):
                m.d.comb += turn.eq(ring.size)
            with m.Elif(behind < 0):
                m.d.comb += turn.eq(ring.size << 1)
        with m.If(ring.packed):
            flags = answer.word[16:18]
            m.d.comb += wanted_now.eq(flags != spec.EVENT_DISABLE)
            with m.If((flags == spec.EVENT_DESC) & ring.event_index):
                m.d.comb += wanted_now.eq(behind < context.asked_count)
        with m.Elif(ring.event_index):
            m.d.comb += wanted_now.eq(behind[:16] < context.asked_count)
        with m.Else():
            m.d.comb += wanted_now.eq(~event[spec.AVAIL_F_NO_INTERRUPT])

        with m.FSM() as fsm:
            with m.State("CHOOSE"):
                m.d.comb += self.commands.ready.eq(1)
                with m.If(self.commands.valid):
                    m.d.comb += [write_context.en.eq(1), write_context.addr.eq(command.queue), write_context.data.eq(0)]
                with m.Else():
                    round_robin(m, wanted, granted, "source")
                    m.d.sync += Cat(is_answer, function).eq(number(granted))
                    with m.If(granted.any()):
                        m.next = "LOOK"
            with m.State("LOOK"):
                m.d.sync += queue.eq(read_context.addr)
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.sync += [context.eq(read_context.data), ring.eq(read_ring.data)]
                m.next = "GATHER"
                with m.If(is_answer):
                    m.next = "MEASURE"
                    with m.If(is_dead | ~answer.is_good):
                        m.d.comb += self.failed.eq((~is_dead) << function)
                        m.next = "FORGET"
                with m.Elif(is_dead):
                    m.d.comb += take.eq(1)
                    m.next = "CHOOSE"

            # Elements are written: all that wait of one queue are told of at once.
            with m.State("GATHER"):
                with m.If(waits & (written.queue == queue)):
                    m.d.comb += take.eq(1)
                    m.d.sync += [context.position.eq(written.position), context.count.eq(count_up(context.count, written.count))]
                with m.Elif(is_dead):
                    m.next = "CHOOSE"
                with m.Elif(ring.packed):
                    m.next = "ASK"
                with m.Else():
                    m.next = "WRITE_INDEX"
            with m.State("WRITE_INDEX"):
                m.d.comb += [
                    self.accesses.valid.eq(1),
                    access.is_write.eq(1),
                    access.iova.eq(Cat(C(spec.USED_INDEX, 2), ring.device)),
                    access.length_bytes.eq(2),
                    access.index.eq(context.position),
                ]
                with m.If(self.accesses.ready):
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += [
                    access.iova.eq(event_iova),
                    access.length_bytes.eq(Mux(ring.packed, 4, 2)),
                    access.cookie.eq(Cat(queue, event_iova[1:row_bits])),
                ]
                with m.If(is_asked):
                    m.d.sync += again.bit_select(queue, 1).eq(1)
                    m.next = "STORE"
                with m.Else():
                    m.d.comb += self.accesses.valid.eq(1)
                    with m.If(self.accesses.ready):
                        m.d.sync += [
                            asking.bit_select(queue, 1).eq(1),
                            context.asked_position.eq(context.position),
                            context.asked_count.eq(context.count),
                            context.count.eq(0),
                        ]
                        m.next = "STORE"
            with m.State("STORE"):
                m.d.comb += write_context.en.eq(1)
                m.next = "CHOOSE"

            # The driver's wish came.
            with m.State("MEASURE"):
                m.d.sync += behind.eq(Mux(ring.packed, position[:15] - event[:15], position - event) - 1)
                m.next = "TURN"
            with m.State("TURN"):
                m.d.sync += behind.eq(behind + turn)
                m.next = "DECIDE"
            with m.State("DECIDE"):
                m.d.comb += self.wants.valid.eq(wanted_now)
                m.next = "FORGET"
            with m.State("FORGET"):
                m.d.comb += forget.eq(1)
                m.d.sync += [asking.bit_select(queue, 1).eq(0), again.bit_select(queue, 1).eq(0), is_asked.eq(0)]
                m.next = "CHOOSE"
                with m.If(again.bit_select(queue, 1) & ~is_dead):
                    m.next = "ASK"
        m.d.comb += self.at_work.eq(Mux(fsm.ongoing("CHOOSE"), 0, 1 << function))
        return m
