"""TLP headers: the fields of :class:`.layouts.Header` to and from dwords.

A dword is the 32-bit number as the specification draws it: byte 0 in bits 31:24. [PCIe5 2.2]
"""

from amaranth import Cat, Const, Mux, Signal

from ..spec import pcie
from .layouts import Header


def is_completion(header):
    """Whether ``header`` is a completion, with data or not. [PCIe5 2.2.9]"""
    return header.type[1:] == pcie.TYPE_COMPLETION >> 1


def is_config(header):
    """Whether ``header`` is a configuration request of either type. [PCIe5 2.2.7]"""
    return header.type[1:] == pcie.TYPE_CONFIG_0 >> 1


def is_message(header):
    """Whether ``header`` is a message. [PCIe5 2.2.8]"""
    return header.type[3:] == pcie.TYPE_MESSAGE >> 3


def decode(m, name, dwords):
    """Return a Signal of :class:`Header` that is driven, combinationally in ``m``, from the 4 ``dwords`` (the last counts with 4DW)."""
    header = Signal(Header, name=name)
    first, second, third, fourth = dwords
    wide = first[29 + pcie.FMT_4DW]
    completion, config = is_completion(header), is_config(header)
    has_length = header.fmt[pcie.FMT_DATA] | ~completion
    m.d.comb += [
        header.fmt.eq(first[29:32]),
        header.type.eq(first[24:29]),
        header.tc.eq(first[20:23]),
        header.id_based_ordering.eq(first[18]),
        header.digest.eq(first[15]),
        header.poisoned.eq(first[14]),
        header.relaxed_ordering.eq(first[13]),
        header.no_snoop.eq(first[12]),
        header.at.eq(first[10:12]),
        header.length_dw.eq(Mux(has_length, Cat(first[:10], first[:10] == 0), 0)),
        header.tag.eq(Cat(Mux(completion, third[8:16], second[8:16]), first[19], first[23])),
        header.requester_id.eq(Mux(completion, third[16:32], second[16:32])),
    ]
    with m.If(completion):
        m.d.comb += [
            header.completer_id.eq(second[16:32]),
            header.status.eq(second[13:16]),
            header.byte_count_modified.eq(second[12]),
            header.byte_count.eq(Cat(second[:12], second[:12] == 0)),
            header.lower_address.eq(third[:7]),
        ]
    with m.Elif(is_message(header)):
        m.d.comb += [header.message_code.eq(second[:8]), header.address.eq(Cat(fourth, third))]
    with m.Elif(config):
        m.d.comb += [
            header.first_be.eq(second[:4]),
            header.last_be.eq(second[4:8]),
            header.completer_id.eq(third[16:32]),
            header.address.eq(Cat(Const(0, 2), third[2:12])),
        ]
    with m.Else():
        m.d.comb += [
            header.first_be.eq(second[:4]),
            header.last_be.eq(second[4:8]),
            header.address.eq(Mux(wide, Cat(Const(0, 2), fourth[2:], third), Cat(Const(0, 2), third[2:]))),
        ]
    return header


def encode(m, name, header):
    """Return 4 Signals driven, combinationally in ``m``, with the dwords of ``header``; the fourth counts with 4DW."""
    first, second, third, fourth = (Signal(32, name=f"{name}_{n}") for n in range(4))
    m.d.comb += first.eq(Cat(
        header.length_dw[:10], header.at, header.no_snoop, header.relaxed_ordering, header.poisoned, header.digest, Const(0, 2),
        header.id_based_ordering, header.tag[8], header.tc, header.tag[9], header.type, header.fmt))
    low_tag = header.tag[:8]
    with m.If(is_completion(header)):
        m.d.comb += [
            second.eq(Cat(header.byte_count[:12], header.byte_count_modified, header.status, header.completer_id)),
            third.eq(Cat(header.lower_address, Const(0, 1), low_tag, header.requester_id)),
        ]
    with m.Elif(is_message(header)):
        m.d.comb += second.eq(Cat(header.message_code, low_tag, header.requester_id))
        m.d.comb += [third.eq(header.address[32:]), fourth.eq(header.address[:32])]
    with m.Else():
        m.d.comb += second.eq(Cat(header.first_be, header.last_be, low_tag, header.requester_id))
        with m.If(is_config(header)):
            m.d.comb += third.eq(Cat(header.address[:12], Const(0, 4), header.completer_id))
        with m.Elif(header.fmt[pcie.FMT_4DW]):
            m.d.comb += [third.eq(header.address[32:]), fourth.eq(header.address[:32])]
        with m.Else():
            m.d.comb += third.eq(header.address[:32])
    return [first, second, third, fourth]
