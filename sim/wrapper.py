"""Verilog around a unit for a harness in C++: a port for each field of each stream, inputs from registers."""

from amaranth.hdl import Shape
from amaranth.lib import data

__all__ = ["wrapper_ports"]


def wrapper_ports(unit, levels):
    """Return the ports of a wrapper of ``unit`` (declarations), and the lines of its body; it is never reset.

    ``levels``: what the inputs that are no streams are, by name: a number, or None for a port that is held like those of streams; others
    are 0.
    """
    ports, registers, joined = ["input clk"], [], [".clk(clk)", ".rst(1'b0)"]

    def held(name, width):
        ports.append(f"input [{width - 1}:0] {name}")
        registers.append((name, width))
        return f"{name}_held"

    for path, member, _ in unit.signature.flatten(unit):
        stream, kind, name = "_".join(map(str, path[:-1])), path[-1], "__".join(map(str, path))
        is_input, width = member.flow.name == "In", Shape.cast(member.shape).width
        if kind not in ("valid", "ready", "payload"):
            port, level = "_".join(map(str, path)), levels.get(name, 0)
            if is_input:
                value = held(port, width) if level is None else f"{width}'d{level}"
                joined.append(f".\\{name} ({value})")
            else:
                ports.append(f"output [{width - 1}:0] {port}")
                joined.append(f".{name}({port})")
        elif kind != "payload":
            if not is_input:
                ports.append(f"output {stream}_{kind}")
            joined.append(f".{name}({held(f'{stream}_{kind}', 1) if is_input else f'{stream}_{kind}'})")
        elif width:
            fields = _fields(stream, member.shape)
            if not is_input:
                ports += [f"output [{bits - 1}:0] {field}" for field, bits in fields]
            joined.append(f".{name}({{{', '.join([held(*one) if is_input else one[0] for one in fields][::-1])}}})")
    lines = [f"reg [{width - 1}:0] {name}_held = 0;\n  always @(posedge clk) {name}_held <= {name};" for name, width in registers]
    return ports, [*lines, f"top top ({', '.join(joined)});"]


def _fields(stream, shape):
    """Return (port, width) of each field of a payload; of one that has none, its own."""
    if isinstance(shape, int):
        return [(f"{stream}_payload", shape)]
    return [(f"{stream}_{field}", Shape.cast(place.shape).width) for field, place in data.Layout.cast(shape)]
