"""Whose turn it is, one bit for each who may want it."""

from amaranth import Cat, Mux, Signal


def round_robin(m, wanted, granted, name, taken=1):
    """Set the bit of ``granted`` next behind the one that was granted last, among those ``wanted``; it was granted if it is ``taken``."""
    behind = Signal(len(wanted), name=f"{name}_behind")  # those behind the one granted last
    later = Signal(len(wanted), name=f"{name}_later")
    pool = Signal(len(wanted), name=f"{name}_pool")
    m.d.comb += [later.eq(wanted & behind), pool.eq(Mux(later.any(), later, wanted)), granted.eq(pool & -pool)]
    with m.If(granted.any() & taken):
        m.d.sync += behind.eq(~(granted | (granted - 1)))


def number(bits):
    """Return the position of the only bit of ``bits`` that is 1; 0 if none is."""
    return Cat(Cat(bit for n, bit in enumerate(bits) if n >> place & 1).any() for place in range(max((len(bits) - 1).bit_length(), 1)))
