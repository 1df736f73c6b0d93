"""Byte order: said at every conversion, so that the models do the same on a machine of the other order."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from ringwall.models import memory
from ringwall.models.memory import GuestMemory

MODELS = Path(inspect.getfile(memory)).parent
STRUCT = {"pack", "unpack", "pack_into", "unpack_from", "iter_unpack", "calcsize", "Struct"}
ORDERS = {"little", "big", "order"}  # the last is a name that holds one of them
ONE_BYTE = {"uint8", "int8", "bool_"}  # numpy types whose order is no question


def faults_of(source):
    """Return every place of a module where the order of bytes is the machine's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, arguments = node.func.attr, [*node.args, *(keyword.value for keyword in node.keywords)]
            said = {str(getattr(part, "value", "")) or getattr(part, "id", "") for argument in arguments for part in ast.walk(argument)}
            if name in ("from_bytes", "to_bytes") and not said & ORDERS:
                found.append(f"line {node.lineno}: {name} without an order")
            elif name in STRUCT and getattr(node.func.value, "id", "") == "struct" and not any(text[:1] in "<>" for text in said if text):
                found.append(f"line {node.lineno}: struct.{name} in the machine's order")
            elif name == "cast":
                found.append(f"line {node.lineno}: a cast of memory")
        elif isinstance(node, ast.Attribute):
            if node.attr == "byteorder":
                found.append(f"line {node.lineno}: the machine's order is asked for")
            elif getattr(node.value, "id", "") == "np" and re.fullmatch(r"u?int\d+|float\d+", node.attr) and node.attr not in ONE_BYTE:
                found.append(f"line {node.lineno}: numpy's {node.attr} has the machine's order")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [f"line {node.lineno}: {name} is of the machine's order" for name in names if name in ("array", "ctypes")]
    return found


def test_every_conversion_names_its_order():
    """MODEL-ORDER-1 (R53): nothing in models/ converts between bytes and numbers in the order of the machine that runs it."""
    modules = sorted(MODELS.rglob("*.py"))
    assert len(modules) > 15
    assert {str(path): faults for path in modules if (faults := faults_of(path.read_text()))} == {}


@pytest.mark.parametrize("line", [
    "int.from_bytes(data)", "value.to_bytes(4)", "struct.pack('I', 1)", "struct.Struct('=IH')", "struct.unpack_from('@Q', b, 0)",
    "data.cast('I')", "sys.byteorder", "np.zeros(4, np.uint32)", "np.frombuffer(d, np.int64)", "from array import array", "import ctypes",
])  # fmt: skip
def test_the_machines_order_is_found(line):
    """MODEL-ORDER-2 (R53): each way to use the machine's order is found."""
    assert len(faults_of(line)) == 1


def test_numbers_in_memory_have_one_helper_each():
    """MODEL-ORDER-3 (R07): one accessor per size and order, in one place; no model has another, and none is without an order."""
    accessors = {name for name in vars(GuestMemory) if re.match(r"(load|store)_", name)}
    wanted = {f"{verb}_{size}" for verb in ("load", "store") for size in ("ub", "uw_le", "uw_be", "l_le", "l_be", "q_le", "q_be")}
    assert accessors == wanted
    others = [f"{path.name}: {node.name}" for path in MODELS.rglob("*.py") if path.name != "memory.py"
              for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.FunctionDef)
              and re.fullmatch(r"(load|store|ld|st|swab)_?(u?[bwlq]|le|be|\d+)(_\w+)?", node.name)]  # fmt: skip
    assert others == []
    guest, value = GuestMemory(), 0x8182_8384_8586_8788
    for size, letter in ((2, "uw"), (4, "l"), (8, "q")):
        number = value & (1 << 8 * size) - 1
        for order, name in (("little", "le"), ("big", "be")):
            getattr(guest, f"store_{letter}_{name}")(0x1000, number)
            assert guest.read(0x1000, size) == number.to_bytes(size, order)
            assert getattr(guest, f"load_{letter}_{name}")(0x1000) == number
