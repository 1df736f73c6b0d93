"""Verilator's C++ of a circuit with one clock, changed so that a cycle evaluates only what can differ from the cycle before.

Verilator writes one long list of statements that runs in every cycle, though most of a circuit is at rest in most cycles. Here
the list is cut into groups. A group runs only when a variable that it reads has changed since it last ran: it is a function of
what it reads, so that running it again would change nothing. Results are those of Verilator's list, bit for bit.
"""

import heapq
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

__all__ = ["Refused", "lighten", "statements"]

_GROUP = 3000  # characters of C++, names counted as one, in a group
_FILES = 8
_NAME = re.compile(r"vlSelfRef\.(\w+)|(?<![\w.:])([A-Za-z_]\w*)")
_KIND = r"(?:CData|SData|IData|QData|VlWide<\d+>)"
_DECLARATION = re.compile(rf"^\s*({_KIND}|VlUnpacked<.*>)(?:/\*[\d:]+\*/)? (\w+);$")
_PORT = re.compile(r"^\s*VL_(IN|OUT)(8|16|64|W|)\(&?(\w+),\d+,\d+(?:,(\d+))?\);$")
_KEYWORDS = {"IData", "QData", "CData", "SData", "VlWide", "if", "else"}
# Functions that write, and the place of what they write among their arguments.
_WRITERS = {"VL_ZERO_W": 1, "VL_ADD_W": 1, "VL_SUB_W": 1, "VL_ASSIGN_W": 1, "VL_SHIFTR_WWI": 3, "VL_SHIFTL_WWI": 3}
_PURE = re.compile(r"VL_(COUNTONES_[IQ]|EXTENDS_[IQ]{2}|(GT|GTE|LT|LTE)S_I[IQ]{2}|REDXOR_\d+|SHIFT[LR]S?_[IQ]{3})$")


class Refused(Exception):
    """The C++ is none that is understood for certain; nothing was changed."""


def statements(text):
    """Return the outermost statements of C++ ``text``, in order; :exc:`Refused` when the last has no end."""
    braces = parentheses = start = 0
    found = []
    for m in re.finditer(r"[;{}()]", text):
        parentheses += (m[0] == "(") - (m[0] == ")")
        braces += (m[0] == "{") - (m[0] == "}")
        ends = (m[0] == ";" and not parentheses) if m[0] != "}" else not re.match(r"\s*else\b", text[m.end() : m.end() + 40])
        if ends and not braces:
            found.append(text[start : m.end()].strip("\n"))
            start = m.end()
    if text[start:].strip():
        raise Refused(f"A statement must have an end, not {text[start : start + 80]!r}")
    return found


def lighten(folder, prefix="Vcard"):
    """Change the C++ that Verilator left in ``folder`` and its list of files; return the number of groups.

    Raises
    ------
    :exc:`Refused`
        When the circuit has more than one clock, paths from inputs to outputs, loops, or C++ of another form.
    """
    source = _Source(Path(folder), prefix)
    groups = _schedule(source)
    _Writer(source, groups).write()
    return len(groups)


class _Statement:
    """One statement: ``accesses`` has (variable, "read"), (variable, "write") or (variable, "full", element or None) in their order."""

    def __init__(self, text, renamed):
        self.text = text = _NAME.sub(lambda m: renamed.get(m[2], m[0]), text)
        self.accesses, self.targets = [], []
        depth = start = 0
        for m in re.finditer(r"[;{}]", text):
            piece = text[start : m.start()].strip()
            start = m.end()
            if m[0] == "{" and re.match(r"(else\s+)?if\s*\(|else$", piece):
                self._read(piece)
            elif m[0] == ";" and piece:
                self._assignment(piece, depth == 0)
            elif piece:
                raise Refused(f"A block must be that of an if, not {piece[:80]!r}")
            depth += (m[0] == "{") - (m[0] == "}")
        self.reads = {name for name, kind, *_ in self.accesses if kind == "read"}
        self.writes = {name for name, kind, *_ in self.accesses if kind != "read"}

    def _assignment(self, piece, always):
        call = re.match(r"(\w+)\((.*)\)$", piece, re.DOTALL)
        if call and call[1] in _WRITERS:
            arguments, at = call[2].split(","), _WRITERS[call[1]]
            left, right, is_whole = arguments[at].strip(), ",".join(arguments[:at] + arguments[at + 1 :]), True
        else:
            equal = re.search(r"\s= ", re.sub(r"\s", " ", piece))
            if not equal:
                raise Refused(f"A statement must be an assignment, not {piece[:80]!r}")
            left, right, is_whole = piece[: equal.start()].strip(), piece[equal.end() :], False
        target = re.fullmatch(r"(?:vlSelfRef\.)?(\w+)\s*((?:\[.*\])?)", left, re.DOTALL)
        if not target or (is_whole and target[2]):
            raise Refused(f"What is assigned must be a variable or an element, not {left[:80]!r}")
        self._read(target[2])
        self._read(right)
        element = re.fullmatch(r"\[(\d+)U\]", target[2])
        if always and (element or not target[2]):
            self.accesses.append((target[1], "full", int(element[1]) if element else None))
        else:
            self.accesses.append((target[1], "write"))
        self.targets.append((target[1], piece))

    def _read(self, text):
        for m in _NAME.finditer(text):
            name = m[1] or m[2]
            if name.startswith("VL_"):
                if not _PURE.match(name):
                    raise Refused(f"A function must be known not to write, not {name!r}")
            elif name not in _KEYWORDS and "__ConstPool__" not in name:
                self.accesses.append((name, "read"))


class _Source:
    """What Verilator wrote: ``statements`` of a cycle in order, ``types`` of all variables."""

    def __init__(self, folder, prefix):
        self.folder, self.prefix, self.types, self.inputs, self.ports = folder, prefix, {}, set(), set()
        self.root = f"{prefix}___024root"
        self.header = folder / f"{self.root}.h"
        for line in self.header.read_text().splitlines():
            if m := _DECLARATION.match(line):
                self.types[m[2]] = m[1]
            elif m := _PORT.match(line):
                self.types[m[3]] = {"8": "CData", "16": "SData", "": "IData", "64": "QData", "W": f"VlWide<{m[4]}>"}[m[2]]
                (self.inputs if m[1] == "IN" else self.ports).add(m[3])
        self.ports |= self.inputs
        self.members = set(self.types)
        self.texts = {path: path.read_text() for path in sorted(folder.glob(f"{self.root}__*.cpp")) if "Slow" not in path.name}
        head = rf"^(?:VL_\w+ )?void {self.root}___(\w+)\({self.root}\* vlSelf\) \{{\n(.*?)^\}}\n"
        self.function = partial(re.compile(head, re.DOTALL | re.MULTILINE).sub)
        bodies = {}
        for text in self.texts.values():
            self.function(lambda m: bodies.setdefault(m[1], m[2]) and "", text)
        call = rf"\s*{self.root}___(nba_sequent__TOP__\d+)\(vlSelf\);"
        only = rf"\s*if \(\(1ULL & vlSelfRef\.__VnbaTriggered\[0U\]\)\) \{{(?:{call})+\s*\}}\s*"
        main = bodies.get("eval_nba", "").partition("// Body\n")[2]
        self.order = re.findall(call, main)
        others = {name for name in bodies if re.match(r"(act|ico|nba)_", name)} - set(self.order)
        if not re.fullmatch(only, main) or others or len(set(self.order)) != len(self.order):
            raise Refused(f"A circuit must have one clock and neither paths through it nor loops, not {sorted(others)}")
        self.used_outside = set(re.findall(r"vlSelfRef\.(\w+)", "".join(body for name, body in bodies.items() if name.startswith("eval_"))))
        self.statements = []
        for n, name in enumerate(self.order):
            top, _, main = bodies[name].partition("// Body\n")
            local, renamed = statements(top.partition("// Locals\n")[2]), {}
            for text in local:
                if m := _DECLARATION.match(text):
                    renamed[m[2]] = f"local{n}_{m[2]}"
                    self.types[renamed[m[2]]] = m[1]
            self.statements += [_Statement(text, renamed) for text in local + statements(main) if not _DECLARATION.match(text)]
        unknown = {name for one in self.statements for name in one.reads | one.writes} - set(self.types)
        if unknown:
            raise Refused(f"A variable must be declared, not {sorted(unknown)[:3]}")

    def words(self, name):
        m = re.match(r"VlWide<(\d+)>", self.types[name])
        return int(m[1]) if m else 1


def _edges(all_statements):
    """Return, for each statement, the later ones that must stay behind it."""
    edges, written, read = [set() for _ in all_statements], {}, defaultdict(list)
    for n, one in enumerate(all_statements):
        for name in one.reads | one.writes:
            if name in written:
                edges[written[name]].add(n)
        for name in one.reads:
            read[name].append(n)
        for name in one.writes:
            for reader in read.pop(name, ()):
                edges[reader].add(n)
            written[name] = n
    return [after - {n} for n, after in enumerate(edges)]


def _inseparable(all_statements, edges):
    """Return the node of each statement: all that write one variable are one node, and so are nodes that wait for each other."""
    node, first = list(range(len(edges))), {}

    def find(n):
        while node[n] != n:
            node[n] = n = node[node[n]]
        return n

    for n, one in enumerate(all_statements):
        for name in sorted(one.writes):
            node[find(n)] = find(first.setdefault(name, n))
    after = defaultdict(set)
    for n, behind in enumerate(edges):
        after[find(n)] |= {find(k) for k in behind} - {find(n)}
    # Tarjan's strongly connected components, without recursion
    number, low, stack, waiting, component = {}, {}, [], set(), {}
    for root in sorted({find(n) for n in range(len(edges))}):
        path = []
        if root not in number:
            path.append((root, iter(sorted(after[root]))))
            number[root] = low[root] = len(number)
            stack.append(root)
            waiting.add(root)
        while path:
            here, left = path[-1]
            for other in left:
                if other not in number:
                    number[other] = low[other] = len(number)
                    stack.append(other)
                    waiting.add(other)
                    path.append((other, iter(sorted(after[other]))))
                    break
                if other in waiting:
                    low[here] = min(low[here], number[other])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[here])
                if low[here] == number[here]:
                    while here not in component:
                        member = stack.pop()
                        waiting.discard(member)
                        component[member] = here
    return [component[find(n)] for n in range(len(edges))]


def _place(source, members):
    """Return the instance that most variables of ``members`` belong to: what is one instance rests together."""
    if any(one.reads & source.inputs for one in members):
        return ("inputs",)
    for names in ([name for one in members for name in sorted(one.writes)], [name for one in members for name in sorted(one.reads)]):
        places = Counter(tuple(name.split("__DOT__")[2:-1]) for name in names if "__DOT__" in name)
        if places:
            return max(places, key=lambda place: (places[place], place))
    return ()


def _schedule(source):
    """Return groups (lists of places in ``source.statements``) in an order that keeps what each statement reads."""
    edges = _edges(source.statements)
    node = _inseparable(source.statements, edges)
    members, after, before = defaultdict(list), defaultdict(set), Counter()
    for n, one in enumerate(node):
        members[one].append(n)
    for n, behind in enumerate(edges):
        after[node[n]] |= {node[k] for k in behind} - {node[n]}
    for behind in after.values():
        before.update(behind)
    place = {one: _place(source, [source.statements[n] for n in inside]) for one, inside in members.items()}
    size = {one: sum(len(re.sub(r"\s+|\w{12,}", "", source.statements[n].text)) for n in inside) for one, inside in members.items()}
    ready = defaultdict(list)
    for one in sorted(members):
        if not before[one]:
            heapq.heappush(ready[place[one]], one)
    groups, here, used = [], None, 0
    while any(ready.values()):
        if here is None or not ready[here] or used > _GROUP:
            if here is None or not ready[here]:
                here = max((one for one in ready if ready[one]), key=lambda one: (sum(size[n] for n in ready[one]), one))
            groups.append([])
            used = 0
        one = heapq.heappop(ready[here])
        used += size[one]
        groups[-1] += members[one]
        for other in sorted(after[one]):
            before[other] -= 1
            if not before[other]:
                heapq.heappush(ready[place[other]], other)
    return [sorted(group) for group in groups]


class _Writer:
    """Groups as C++ functions. ``quiet_now`` has one bit per group that is to run in this cycle, ``quiet_next`` in the next."""

    def __init__(self, source, groups):
        self.source, self.groups, self.words = source, [[source.statements[n] for n in group] for group in groups], len(groups) // 64 + 1
        self.users, self.readers, self.kept = defaultdict(set), defaultdict(set), []
        for k, group in enumerate(self.groups):
            self.kept.append(self._needs(k, group))
            for one in group:
                for name in one.reads | one.writes:
                    self.users[name].add(k)

    def _needs(self, k, group):
        """Note which variables from outside the group it reads; return all whose value from before it keeps or reads."""
        full, elements, kept = set(), defaultdict(set), set()
        for name, kind, *element in (access for one in group for access in one.accesses):
            is_array = self.source.types[name].startswith("VlUnpacked")
            if name in full:
                continue
            if kind == "read":
                self.readers[name].add(k)
                kept.add(name)
            elif kind == "full" and not is_array:
                elements[name] |= set(range(self.source.words(name))) if element[0] is None else {element[0]}
                if len(elements[name]) == self.source.words(name):
                    full.add(name)
            else:
                kept.add(name)
        return kept | (elements.keys() - full)

    def _group(self, k):
        """Return the function of group ``k``."""
        source, group = self.source, self.groups[k]
        names = sorted({name for one in group for name in one.reads | one.writes})
        stays = {name for name in names if self.users[name] == {k} and name not in self.kept[k] | source.ports | source.used_outside}
        body, before, after = "\n".join(one.text for one in group), [f"{source.types[name]} {name};" for name in sorted(stays)], []
        marks = defaultdict(list)
        for n, name in enumerate(sorted({name for one in group for name in one.writes} - stays)):
            if not self.readers[name]:
                continue
            if source.types[name].startswith("VlUnpacked"):
                before.append(f"uint64_t changed{n} = 0;")
                for piece in {piece for one in group for target, piece in one.targets if target == name}:
                    body = body.replace(f"{piece};", f"changed{n} = ~0ULL; {piece};")
            else:
                words = source.words(name)
                differ = [f"old{n} ^ vlSelfRef.{name}"] if words == 1 and not source.types[name].startswith("VlWide") else [
                    f"old{n}[{word}] ^ vlSelfRef.{name}[{word}]" for word in range(words)]  # fmt: skip
                before.append(f"const auto old{n} = vlSelfRef.{name};")
                after.append(f"const uint64_t changed{n} = -uint64_t((({') | ('.join(differ)})) != 0);")
            bits = Counter()
            for reader in self.readers[name]:
                bits["quiet_now" if reader > k else "quiet_next", reader // 64] |= 1 << reader % 64
            for place, mask in bits.items():
                marks[place].append(f"({mask:#x}ULL & changed{n})")
        after += [f"vlSelfRef.{array}[{word}] |= {' | '.join(terms)};" for (array, word), terms in sorted(marks.items())]

        def place(m):
            name = m[1] or m[2]
            return name if name in stays or name not in source.types else f"vlSelfRef.{name}"

        return "\n".join([f"void quiet_{k}({source.root}& vlSelfRef) {{", *before, _NAME.sub(place, body), *after, "}\n"])

    def write(self):
        source, count = self.source, len(self.groups)
        functions = [self._group(k) for k in range(count)]
        include, root = f'#include "{source.prefix}__pch.h"\n', source.root
        pool = "".join(sorted({m for text in source.texts.values() for m in re.findall(r"^extern const .*;\n", text, re.MULTILINE)}))
        files, share = [""], sum(map(len, functions)) / _FILES
        for function in functions:
            if len(files[-1]) > share:
                files.append("")
            files[-1] += function
        always = Counter()  # what reads an input runs in each cycle
        for k in {k for name in source.inputs for k in self.readers[name]}:
            always[k // 64] |= 1 << k % 64
        main = [f"void quiet_{k}({root}& vlSelfRef);" for k in range(count)] + [f"void quiet({root}& vlSelfRef) {{"]
        for word in range(self.words):
            main += [f"if (vlSelfRef.quiet_now[{word}]) {{"]
            for k in range(64 * word, min(64 * word + 64, count)):
                main += [f"if (vlSelfRef.quiet_now[{word}] & {1 << k % 64:#x}ULL) quiet_{k}(vlSelfRef);"]
            main += ["}"]
        for word in range(self.words):
            main += [f"vlSelfRef.quiet_now[{word}] = vlSelfRef.quiet_next[{word}] | {always[word]:#x}ULL;"]
            main += [f"vlSelfRef.quiet_next[{word}] = 0;"]
        files = [pool + text for text in files] + ["\n".join(main) + "\n}\n"]
        for n, text in enumerate(files):
            (source.folder / f"{root}__quiet{n}.cpp").write_text(include + text)
        ones = ", ".join(["~0ULL"] * self.words)
        fields = [f"uint64_t quiet_now[{self.words}] = {{{ones}}};", f"uint64_t quiet_next[{self.words}] = {{}};"]
        used = {name for one in source.statements for name in one.reads | one.writes}
        fields += [f"{source.types[name]} {name};" for name in sorted(used - source.members) if len(self.users[name]) > 1 or any(
            name in self.kept[k] for k in self.users[name])]  # fmt: skip
        at = "    // CONSTRUCTORS\n"
        source.header.write_text(source.header.read_text().replace(at, "\n".join(fields) + "\n" + at, 1))
        calls = rf"(?:\s*{root}___nba_sequent__TOP__\d+\(vlSelf\);)+"
        for path, text in source.texts.items():
            text = source.function(lambda m: "" if m[1] in source.order else re.sub(calls, "quiet(vlSelfRef);", m[0]), text)
            path.write_text(text.replace(include, f"{include}void quiet({root}& vlSelfRef);\n", 1))
        listed = source.folder / f"{source.prefix}_classes.mk"
        listed.write_text(listed.read_text() + "".join(f"VM_CLASSES_FAST += {root}__quiet{n}\n" for n in range(len(files))))
