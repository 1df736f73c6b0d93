"""A card as a TOML file: each key is a parameter of a configuration class, by its own name."""

import inspect
import json
import re
import tomllib
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from .config import EndpointConfig, HostAtsConfig, IommuConfig, VirtioIommuConfig
from .phy.tunnel import Tunnel
from .phy.ultrascale import UltraScalePhy
from .verilog import RawCard, Series7Card, TunnelCard, UltraScaleCard
from .virtio.console import ConsoleDevice
from .virtio.net import NetDevice
from .virtio.rng import RngDevice

__all__ = ["CARDS", "BadCard", "CardFile", "example", "read", "written"]

CARDS = {  # by link: the card, and whose parameters its options are
    "raw": (RawCard, None), "series7": (Series7Card, None), "tunnel": (TunnelCard, Tunnel), "ultrascale": (UltraScaleCard, UltraScalePhy),
}  # fmt: skip
KINDS = {
    "iommu": {"riscv": IommuConfig, "virtio": VirtioIommuConfig},
    "devices": {"console": ConsoleDevice, "net": NetDevice, "rng": RngDevice},
}  # fmt: skip
NONE = "none"  # for what can be None
_TAKEN = {"config", "width", "functions"}  # parameters of an adapter that follow from the card
_OWN = {VirtioIommuConfig: {"endpoints"}}  # what the card sets, whatever a file says
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEXADECIMAL = re.compile(r".*(_id|_mask|_features|_number|_capability)|start|end")


class BadCard(ValueError):
    """What a file asks for cannot be made; its text is one sentence."""


@dataclass(frozen=True)
class CardFile:
    """What a file asks for.

    ``name``: of the Verilog module. ``link``: one of ``CARDS``. ``options``: of its card, beside ``config``.
    """

    name: str = "card"
    link: str = "raw"
    config: EndpointConfig = field(default_factory=EndpointConfig)
    options: dict = field(default_factory=dict)

    def checked(self, make):
        """Return ``make(card)`` of the component; :exc:`BadCard` when its parts do not go together."""
        given = {**dict(_leaves(self.config, "")), **{f"options.{key}": value for key, value in self.options.items()}}
        return _checked(lambda: make(CARDS[self.link][0](self.config, **self.options)), "", given)


def _leaves(thing, place):
    """Yield ``(key, value)`` of each parameter of a dataclass that is not its default, those inside of it too."""
    for item in fields(thing):
        value = getattr(thing, item.name)
        parts = [(f"{item.name}[{n}]", one) for n, one in enumerate(value)] if isinstance(value, tuple) else [(item.name, value)]
        for name, inner in parts:
            if is_dataclass(inner):
                yield from _leaves(inner, _at(place, name))
        if value != item.default:
            yield _at(place, item.name), value


def _checked(make, place, given):
    """Return what ``make`` returns; a :exc:`ValueError` becomes :exc:`BadCard`, with the one of the keys ``given`` that it complains of."""
    try:
        return make()
    except ValueError as error:
        keys = [key for key, value in given.items() if str(error).endswith(f"not {value!r}")]
        raise BadCard(f"{_at(place, keys[0]) if len(keys) == 1 else place or 'the card'}: {error}.") from None


def read(text):
    """Return the :class:`CardFile` that the TOML ``text`` asks for; :exc:`BadCard` when it is none, or has unknown keys or wrong values."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadCard(f"The file must be TOML: {error}.") from None
    name, link, options = table.pop("name", "card"), table.pop("link", "raw"), table.pop("options", {})
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise BadCard(f"name must be a name of letters, digits and _ that no digit begins, not {name!r}.")
    if link not in list(CARDS):
        raise BadCard(f"link must be one of {', '.join(CARDS)}, not {link!r}.")
    known = _options(link)
    options = {key: _option(key, value, known, link) for key, value in _table(options, "options").items()}
    return CardFile(name, link, _made(EndpointConfig, table, ""), options)


def _options(link):
    """Return the options of a link's card, with their defaults."""
    adapter = CARDS[link][1]
    return {} if adapter is None else {
        name: parameter.default for name, parameter in inspect.signature(adapter).parameters.items() if name not in _TAKEN
    }  # fmt: skip


def _option(key, value, known, link):
    if key not in known:
        raise BadCard(f"options.{key} must be an option of the link {link!r}, which has {', '.join(known) or 'none'}.")
    hint = tuple[str, ...] if isinstance(known[key], tuple) else type(known[key])
    return _value(value, hint, f"options.{key}")


def _made(kind, table, place):
    """Return an object of the dataclass ``kind`` with the parameters of ``table``."""
    hints, own = get_type_hints(kind), _OWN.get(kind, set())
    names = [item.name for item in fields(kind) if item.name not in own]
    for key in _table(table, place):
        if key not in names:
            raise BadCard(f"{_at(place, key)} must be a parameter of {kind.__name__}, which has {', '.join(names)}.")
    for item in fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in table:
            raise BadCard(f"{_at(place, item.name)} must be there.")
    given = {key: _value(value, hints[key], _at(place, key), KINDS.get(key)) for key, value in table.items()}
    return _checked(lambda: kind(**given), place, given)


def _value(value, hint, place, kinds=None):
    """Return ``value`` of the file as one of the type ``hint``; tables say by ``kind`` which of ``kinds`` they are."""
    if isinstance(hint, UnionType):  # all of them with None
        if value == NONE:
            return None
        return _value(value, get_args(hint)[0], place, kinds)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        is_long = inner[-1] is Ellipsis
        if not isinstance(value, list) or (not is_long and len(value) != len(inner)):
            raise BadCard(f"{place} must be an array{'' if is_long else f' of {len(inner)} values'}, not {value!r}.")
        hints = [inner[0]] * len(value) if is_long else inner
        return tuple(_value(item, one, f"{place}[{n}]", kinds) for n, (item, one) in enumerate(zip(value, hints)))
    if kinds is not None:
        table = dict(_table(value, place))
        kind = table.pop("kind", None)
        if kind not in list(kinds):
            raise BadCard(f"{_at(place, 'kind')} must be one of {', '.join(kinds)}, not {kind!r}.")
        return _made(kinds[kind], table, place)
    if is_dataclass(hint):
        return _made(hint, value, place)
    if hint is bytes:
        if isinstance(value, str) and value.isascii():
            return value.encode("ascii")
        if isinstance(value, list) and all(type(byte) is int and byte in range(256) for byte in value):
            return bytes(value)
        raise BadCard(f"{place} must be a string of ASCII characters or an array of bytes, not {value!r}.")
    if type(value) is not hint:
        words = {int: "a whole number", bool: "true or false", str: "a string"}
        raise BadCard(f"{place} must be {words[hint]}, not {value!r}.")
    return value


def _table(value, place):
    if not isinstance(value, dict):
        raise BadCard(f"{place} must be a table, not {value!r}.")
    return value


def _at(place, key):
    return f"{place}.{key}" if place else key


# -- and back --


def written(config):
    """Return the TOML of ``config``, with every parameter but those that are nothing by default; ``read`` makes the same of it."""
    plain, tables = [], []
    for item in fields(config):
        value, kinds = getattr(config, item.name), KINDS.get(item.name)
        if is_dataclass(value):
            tables += [f"[{item.name}]", *_lines(value, kinds), ""]
        elif isinstance(value, tuple) and value:
            for one in value:
                tables += [f"[[{item.name}]]", *_lines(one, kinds), ""]
        elif value != item.default or value not in (None, ()):
            plain.append(f"{item.name} = {_text(value, item.name)}")
    return "\n".join([*plain, "", *tables])


def _lines(thing, kinds=None):
    """Return the lines of the table of the dataclass ``thing``."""
    kind = [f'kind = "{name}"' for name, one in (kinds or {}).items() if one is type(thing)]
    own = _OWN.get(type(thing), set())
    return [*kind, *(f"{item.name} = {_text(getattr(thing, item.name), item.name)}" for item in fields(thing) if item.name not in own)]


def _text(value, name):
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return hex(value) if _HEXADECIMAL.fullmatch(name) else str(value)
    if isinstance(value, bytes):
        return json.dumps(value.decode("ascii")) if value.isalnum() else str(list(value))
    if is_dataclass(value):
        return f"{{ {', '.join(_lines(value))} }}"
    return f"[{', '.join(_text(item, name) for item in value)}]"


def example():
    """Return the file of the default card, and behind ``#`` what else there can be, each with its defaults."""
    lines = [
        "# A card for python -m ringwall.rtl.verilog. Each key is a parameter of a class of rtl/config.py, or of a device of rtl/virtio or",
        '# rtl/viommu, where its meaning stands; what is left out is as shown here. iommu = "none" takes it away, disks = [] all disks.',
        'name = "card"  # of the Verilog module and of the files',
        f'link = "raw"  # one of {", ".join(CARDS)}', "", written(EndpointConfig()),
    ]  # fmt: skip
    others = [(f"[[devices]]  # {kind.__name__}", _lines(kind(), KINDS["devices"])) for kind in KINDS["devices"].values()]
    others += [("[iommu]  # VirtioIommuConfig, in place of the other", _lines(VirtioIommuConfig(), KINDS["iommu"])),
               ('[host_ats]  # with iommu = "none"', _lines(HostAtsConfig()))]  # fmt: skip
    others += [(f'[options]  # with link = "{link}"', [f"{key} = {_text(value, key)}" for key, value in _options(link).items()])
               for link in CARDS if _options(link)]  # fmt: skip
    for head, body in others:
        lines += [f"# {line}" for line in (head, *body)] + [""]
    return "\n".join(lines)
