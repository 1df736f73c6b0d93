"""The mappings of a virtio-iommu: intervals in block RAM, found, put in and taken out one after the other."""

from functools import cache

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..stream.round_robin import number


class OrderKind(enum.Enum, shape=1):
    """What an order is."""

    INSERT = 0
    REMOVE = 1


@cache
def Order(key_bits, page_bits):
    """Put in the interval ``first`` to ``last``, which begins at physical ``page``; or take out all intervals inside ``first`` to ``last``.

    ``cuts_first``, ``cuts_last``: of a removal, not all of the page at that end belongs to it.
    """
    return data.StructLayout({
        "kind": OrderKind, "first": key_bits, "last": key_bits, "cuts_first": 1, "cuts_last": 1, "page": page_bits, "readable": 1,
        "writable": 1,
    })  # fmt: skip


class Outcome(enum.Enum, shape=2):
    """How an order ended; only with ``DONE`` has anything changed."""

    DONE = 0
    OVERLAPS = 1  # there is an interval already
    SPLITS = 2  # an interval reaches over an end
    FULL = 3


@cache
def Interval(key_bits, page_bits):
    """An interval that was looked for; without ``hit`` there is none."""
    return data.StructLayout({"hit": 1, "first": key_bits, "last": key_bits, "page": page_bits, "readable": 1, "writable": 1})


class Intervals(wiring.Component):
    """Keeps disjoint intervals of keys, each the beginning of a range of physical pages.

    The leaves of a binary tree are the intervals. An inner node stands for an aligned block of keys whose halves both have intervals that
    begin there, and holds the first key of the upper half; so the tree is as high as a key has bits at most, and never needs balancing.
    Leaves also are a list in ascending order. Lookups go before orders, and between any two intervals that a removal takes out; neither
    waits for more than one of the other.

    Latency: with h nodes from the root down, a lookup 3 h + 10 cycles at most, an insertion 3 h + 19, a removal 3 h + 12 and 7 for each
    interval. Throughput: one at a time.

    Parameters
    ----------
    intervals : :class:`int`
        As many fit, whatever they are: at least 2.
    key_bits : :class:`int`
        Width of a key: at least 2, and enough for the number of an interval and one bit more.
    page_bits : :class:`int`
        Width of a physical page number.

    Members
    -------
    find, found : ``In(stream.Signature(key_bits))``, ``Out(stream.Signature(Interval(key_bits, page_bits)))``
        A key; the interval in which it is, as it is when this is taken.
    orders, outcomes : ``In(stream.Signature(Order(key_bits, page_bits)))``, ``Out(stream.Signature(Outcome))``
        Changes, with ``first`` not above ``last``; their ends.
    count : ``Out(range(intervals + 1))``
        How many there are.

    Raises
    ------
    :exc:`ValueError`
        If a number is out of range.
    """

    def __init__(self, *, intervals=4096, key_bits=39, page_bits=44):
        if not isinstance(intervals, int) or intervals < 2:
            raise ValueError(f"Intervals must be at least 2, not {intervals!r}")
        if not isinstance(key_bits, int) or key_bits < max(2, (intervals - 1).bit_length() + 1):
            raise ValueError(f"Bits of a key must be more than those of an interval's number, not {key_bits!r}")
        if not isinstance(page_bits, int) or page_bits < 1:
            raise ValueError(f"Bits of a physical page number must be at least 1, not {page_bits!r}")
        self.intervals, self.key_bits, self.page_bits = intervals, key_bits, page_bits
        super().__init__({
            "find": In(stream.Signature(key_bits)),
            "found": Out(stream.Signature(Interval(key_bits, page_bits))),
            "orders": In(stream.Signature(Order(key_bits, page_bits))),
            "outcomes": Out(stream.Signature(Outcome)),
            "count": Out(range(intervals + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        index_bits = (self.intervals - 1).bit_length()
        Child = data.StructLayout({"is_leaf": 1, "index": index_bits})
        Parent = data.StructLayout({"is_root": 1, "is_right": 1, "index": index_bits})  # is_root: there is none
        Other = data.StructLayout({"exists": 1, "index": index_bits})
        Span = data.StructLayout({"first": self.key_bits, "last": self.key_bits, "page": self.page_bits, "readable": 1, "writable": 1})
        Leaf = data.StructLayout({"span": Span, "before": Other, "behind": Other, "parent": Parent})
        Node = data.StructLayout({"middle": self.key_bits, "left": Child, "right": Child, "parent": Parent})

        # Each member of leaves and nodes is a memory: written alone, read as a row.
        leaf_at, node_at = Signal(index_bits), Signal(index_bits)
        leaf_row, node_row = Signal(Leaf), Signal(Node)  # a cycle later
        leaf, node = Signal(Leaf), Signal(Node)  # as kept
        writes = {}
        for kind, layout, at, row in (("leaf", Leaf, leaf_at, leaf_row), ("node", Node, node_at, node_row)):
            for name, field in layout:
                m.submodules[f"{kind}_{name}"] = memory = Memory(shape=field.shape, depth=self.intervals, init=[])
                read, writes[kind, name] = memory.read_port(), memory.write_port()
                m.d.comb += [read.addr.eq(at), row[name].eq(read.data)]

        def put(kind, name, at, value):
            port = writes[kind, name]
            m.d.comb += [port.en.eq(1), port.addr.eq(at), port.data.eq(value)]

        def put_child(parent, child):
            with m.If(parent.is_root):
                m.d.sync += root.eq(child)
            with m.Elif(parent.is_right):
                put("node", "right", parent.index, child)
            with m.Else():
                put("node", "left", parent.index, child)

        def put_parent(child, parent):
            with m.If(child.is_leaf):
                put("leaf", "parent", child.index, parent)
            with m.Else():
                put("node", "parent", child.index, parent)

        def signal(layout, name, **members):
            result = Signal(layout, name=name)
            m.d.comb += [result[member].eq(value) for member, value in members.items()]
            return result

        # Rows that were never used, and lists of those that were: of leaves by ``behind``, of nodes by the low bits of ``middle``.
        root = Signal(Child)
        fresh_leaf, fresh_node = Signal(range(self.intervals + 1)), Signal(range(self.intervals + 1))
        free_leaf, free_node, next_leaf, next_node = Signal(Other), Signal(Other), Signal(Other), Signal(Other)
        is_empty = self.count == 0

        order, outcome = Signal(Order(self.key_bits, self.page_bits)), Signal(Outcome)
        sought, finding, removing = Signal(self.key_bits), Signal(), Signal()
        found_last = Signal()  # what waits beside lookups goes first now
        # The last interval that begins up to ``sought``, and the first one behind it.
        low, low_span, high, high_first = Signal(Other), Signal(Span), Signal(Other), Signal(self.key_bits)

        # Nodes on the way down, by the size of their blocks.
        m.submodules.way = way = Memory(shape=index_bits, depth=self.key_bits, init=[])
        step, back = way.write_port(), way.read_port()
        on_way, came_by, noting = Signal(self.key_bits), Signal(index_bits), Signal()
        size = Signal(self.key_bits)
        m.d.comb += [size.eq(node.middle & -node.middle), step.en.eq(noting), step.addr.eq(number(size)), step.data.eq(came_by)]
        m.d.sync += noting.eq(0)
        with m.If(noting):
            m.d.sync += on_way.eq(on_way | size)

        def descend(key, otherwise):
            m.d.sync += [sought.eq(key), on_way.eq(0), low.exists.eq(0), high.exists.eq(0), node_at.eq(root.index), leaf_at.eq(root.index)]
            with m.If(is_empty):
                m.next = otherwise
            with m.Elif(root.is_leaf):
                m.next = "ASK_LEAF"
            with m.Else():
                m.next = "ASK_NODE"

        def look_up():
            m.d.comb += self.find.ready.eq(1)
            m.d.sync += [finding.eq(1), found_last.eq(1)]
            descend(self.find.payload, "ANSWER")

        def end(how):
            m.d.sync += outcome.eq(how)
            m.next = "END"

        # Of an insertion: the block in which its key and that of its nearest neighbour part becomes a node.
        apart_low, apart_high, apart, middle, top, above, nearest = (
            Signal(self.key_bits, name=name) for name in ("apart_low", "apart_high", "apart", "middle", "top", "above", "nearest"))
        is_right, parent, displaced = Signal(), Signal(Parent), Signal(Child)
        new_leaf = signal(Child, "new_leaf", is_leaf=1, index=Mux(free_leaf.exists, free_leaf.index, fresh_leaf))
        new_node = signal(Child, "new_node", index=Mux(free_node.exists, free_node.index, fresh_node))
        # Of a removal: the first leaf, the next one, the latest one that was taken out.
        covers, cuts, has_high = Signal(), Signal(), Signal()
        start, cursor, latest = Signal(index_bits), Signal(index_bits), Signal(index_bits)

        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.find.valid & ~(self.orders.valid & found_last)):
                    look_up()
                with m.Elif(self.orders.valid):
                    m.d.comb += self.orders.ready.eq(1)
                    m.d.sync += [order.eq(self.orders.payload), found_last.eq(0)]
                    descend(self.orders.p.first, "JUDGE")

            with m.State("ASK_NODE"):
                m.next = "READ_NODE"
            with m.State("READ_NODE"):
                m.d.sync += node.eq(node_row)
                m.next = "STEP"
            with m.State("STEP"):
                child = Signal(Child)
                m.d.comb += child.eq(Mux(sought < node.middle, node.left, node.right))
                m.d.sync += [noting.eq(1), came_by.eq(node_at), node_at.eq(child.index), leaf_at.eq(child.index)]
                m.next = "ASK_NODE"
                with m.If(child.is_leaf):
                    m.next = "ASK_LEAF"
            with m.State("ASK_LEAF"):
                m.next = "READ_LEAF"
            with m.State("READ_LEAF"):
                m.d.sync += leaf.eq(leaf_row)
                m.next = "COMPARE"
            with m.State("COMPARE"):  # the leaf at which the way ends, then its neighbour on the other side
                other, enough = Signal(Other), Signal()
                m.d.comb += enough.eq(low.exists | high.exists)
                with m.If(leaf.span.first <= sought):
                    m.d.comb += other.eq(leaf.behind)
                    m.d.sync += [low.exists.eq(1), low.index.eq(leaf_at), low_span.eq(leaf.span)]
                    with m.If(finding):
                        m.d.comb += enough.eq(1)
                with m.Else():
                    m.d.comb += other.eq(leaf.before)
                    m.d.sync += [high.exists.eq(1), high.index.eq(leaf_at), high_first.eq(leaf.span.first)]
                m.d.sync += leaf_at.eq(other.index)
                with m.If(~enough & other.exists):
                    m.next = "ASK_LEAF"
                with m.Elif(finding):
                    m.next = "ANSWER"
                with m.Else():
                    m.next = "JUDGE"
            with m.State("ANSWER"):
                m.d.comb += self.found.valid.eq(1)
                with m.If(self.found.ready):
                    m.d.sync += [finding.eq(0), leaf_at.eq(cursor)]
                    m.next = "IDLE"
                    with m.If(removing):
                        m.next = "ASK_NEXT"

            with m.State("JUDGE"):
                m.d.sync += [
                    covers.eq(low.exists & (low_span.last >= order.first)),
                    cuts.eq(order.cuts_first | (low_span.first != order.first)),
                    has_high.eq(high.exists & (high_first <= order.last)),
                    apart_low.eq(order.first ^ low_span.first), apart_high.eq(order.first ^ high_first), node_at.eq(free_node.index),
                ]  # fmt: skip
                m.next = "JUDGE_INSERTION"
                with m.If(order.kind == OrderKind.REMOVE):
                    m.next = "JUDGE_REMOVAL"

            with m.State("JUDGE_INSERTION"):
                is_low = low.exists & (~high.exists | (apart_low < apart_high))
                m.d.sync += [
                    apart.eq(Mux(is_low, apart_low, apart_high)), middle.eq(Mux(is_low, order.first, high_first)), is_right.eq(is_low),
                    leaf_at.eq(free_leaf.index),
                ]  # fmt: skip
                with m.If(covers | has_high):
                    end(Outcome.OVERLAPS)
                with m.Elif(self.count == self.intervals):
                    end(Outcome.FULL)
                with m.Else():
                    m.next = "FIND_TOP"
            with m.State("FIND_TOP"):
                m.d.sync += [top.eq(_highest(apart)), next_node.eq(node_row.middle)]
                m.next = "FIND_BLOCK"
            with m.State("FIND_BLOCK"):
                below = (top - 1)[: self.key_bits]
                m.d.sync += [middle.eq(middle & ~below), above.eq(on_way & ~(top | below)), next_leaf.eq(leaf_row.behind)]
                m.next = "FIND_PARENT"
            with m.State("FIND_PARENT"):
                m.d.sync += [nearest.eq(above & -above), parent.is_root.eq(above == 0)]
                m.next = "ASK_WAY"
            with m.State("ASK_WAY"):
                m.d.comb += back.addr.eq(number(nearest))
                m.next = "READ_WAY"
            with m.State("READ_WAY"):
                m.d.sync += [parent.index.eq(back.data), parent.is_right.eq((order.first & nearest).any()), node_at.eq(back.data)]
                m.next = "ASK_PARENT"
            with m.State("ASK_PARENT"):
                m.next = "READ_PARENT"
            with m.State("READ_PARENT"):
                m.d.sync += displaced.eq(Mux(parent.is_root, root, Mux(parent.is_right, node_row.right, node_row.left)))
                m.next = "PUT"
            with m.State("PUT"):
                put("leaf", "span", new_leaf.index, signal(Span, "new_span", **{name: order[name] for name, _ in Span}))
                put("leaf", "before", new_leaf.index, low)
                put("leaf", "behind", new_leaf.index, high)
                put("leaf", "parent", new_leaf.index, signal(Parent, "block", is_root=is_empty, is_right=is_right, index=new_node.index))
                put("node", "middle", new_node.index, middle)
                put("node", "left", new_node.index, Mux(is_right, displaced, new_leaf))
                put("node", "right", new_node.index, Mux(is_right, new_leaf, displaced))
                put("node", "parent", new_node.index, parent)
                m.next = "PUT_AROUND"
            with m.State("PUT_AROUND"):
                with m.If(low.exists):
                    put("leaf", "behind", low.index, signal(Other, "mine", exists=1, index=new_leaf.index))
                with m.If(high.exists):
                    put("leaf", "before", high.index, signal(Other, "mine_too", exists=1, index=new_leaf.index))
                m.d.sync += self.count.eq(self.count + 1)
                with m.If(free_leaf.exists):
                    m.d.sync += free_leaf.eq(next_leaf)
                with m.Else():
                    m.d.sync += fresh_leaf.eq(fresh_leaf + 1)
                with m.If(is_empty):
                    m.d.sync += root.eq(new_leaf)
                with m.Else():
                    put_child(parent, new_node)
                    put_parent(displaced, signal(Parent, "other_half", is_right=~is_right, index=new_node.index))
                    with m.If(free_node.exists):
                        m.d.sync += free_node.eq(next_node)
                    with m.Else():
                        m.d.sync += fresh_node.eq(fresh_node + 1)
                end(Outcome.DONE)

            with m.State("JUDGE_REMOVAL"):
                m.d.sync += [start.eq(Mux(covers, low.index, high.index)), leaf_at.eq(Mux(covers, low.index, high.index))]
                with m.If(covers & cuts):
                    end(Outcome.SPLITS)
                with m.Elif(covers | has_high):
                    m.next = "ASK_CHECKED"
                with m.Else():
                    end(Outcome.DONE)
            with m.State("ASK_CHECKED"):
                m.next = "READ_CHECKED"
            with m.State("READ_CHECKED"):
                m.d.sync += [leaf.eq(leaf_row), leaf_at.eq(leaf_row.behind.index)]
                m.next = "CHECK"
            with m.State("CHECK"):  # in which the row behind is asked for already
                m.next = "READ_CHECKED"
                with m.If((leaf.span.first > order.last) | ~leaf.behind.exists):
                    m.d.sync += [removing.eq(1), leaf_at.eq(start)]
                    m.next = "ASK_NEXT"
                with m.If((leaf.span.first <= order.last) & (leaf.span.last + order.cuts_last > order.last)):
                    m.d.sync += removing.eq(0)
                    end(Outcome.SPLITS)
            with m.State("ASK_NEXT"):
                m.next = "READ_NEXT"
            with m.State("READ_NEXT"):
                m.d.sync += [leaf.eq(leaf_row), node_at.eq(leaf_row.parent.index), found_last.eq(0)]
                m.next = "JUDGE_NEXT"
            with m.State("JUDGE_NEXT"):
                m.next = "READ_AROUND"
                with m.If(leaf.span.first > order.last):
                    m.next = "FREE"
            with m.State("READ_AROUND"):
                m.d.sync += node.eq(node_row)
                m.next = "TAKE_OUT"
            with m.State("TAKE_OUT"):
                sibling = Signal(Child)
                m.d.comb += sibling.eq(Mux(leaf.parent.is_right, node.left, node.right))
                with m.If(~leaf.parent.is_root):
                    put_child(node.parent, sibling)
                    put_parent(sibling, node.parent)
                    put("node", "middle", leaf.parent.index, free_node)
                    m.d.sync += [free_node.exists.eq(1), free_node.index.eq(leaf.parent.index)]
                with m.If(leaf.before.exists):
                    put("leaf", "behind", leaf.before.index, leaf.behind)
                with m.If(leaf.behind.exists):
                    put("leaf", "before", leaf.behind.index, leaf.before)
                m.d.sync += [
                    self.count.eq(self.count - 1), latest.eq(leaf_at), leaf_at.eq(leaf.behind.index), cursor.eq(leaf.behind.index),
                ]  # fmt: skip
                with m.If(~leaf.behind.exists):
                    m.next = "FREE"
                with m.Elif(self.find.valid & ~found_last):
                    m.next = "LET_FIND"
                with m.Else():
                    m.next = "ASK_NEXT"
            with m.State("LET_FIND"):
                look_up()
            with m.State("FREE"):
                put("leaf", "behind", latest, free_leaf)
                m.d.sync += [free_leaf.exists.eq(1), free_leaf.index.eq(start), removing.eq(0)]
                with m.If(is_empty):
                    m.d.sync += [free_leaf.eq(0), free_node.eq(0), fresh_leaf.eq(0), fresh_node.eq(0)]
                end(Outcome.DONE)

            with m.State("END"):
                m.d.comb += self.outcomes.valid.eq(1)
                with m.If(self.outcomes.ready):
                    m.next = "IDLE"

        m.d.comb += [
            self.outcomes.payload.eq(outcome), self.found.p.hit.eq(low.exists & (low_span.last >= sought)),
            *(self.found.p[name].eq(low_span[name]) for name, _ in Span),
        ]  # fmt: skip
        return m


def _highest(value):
    """Return ``value`` with its highest 1 alone."""
    turned = Cat(*reversed(value))
    return Cat(*reversed((turned & -turned)[: len(value)]))
