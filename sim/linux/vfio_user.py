"""A function of a compiled card as a vfio-user device: what QEMU's ``vfio-user-pci`` connects to."""

import errno
import json
import logging
import os
import select
import socket
import struct
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from pathlib import Path

__all__ = ["Server"]

_log = logging.getLogger(__name__)

# Little-endian throughout. [VFIOUSER]: the protocol's specification in QEMU's documentation
_HEADER = struct.Struct("<HHIII")  # message id, command, size with header, flags, errno
_IS_REPLY, _KIND, _NO_REPLY, _ERROR = 1, 15, 1 << 4, 1 << 5
_VERSION, _DMA_MAP, _DMA_UNMAP, _GET_INFO, _GET_REGION_INFO, _GET_IRQ_INFO, _SET_IRQS, _REGION_READ, _REGION_WRITE, _RESET = (
    1, 2, 3, 4, 5, 7, 8, 9, 10, 13)  # fmt: skip
_MAJOR, _MINOR = 0, 1
_MOST_FDS, _MOST_DATA, _MOST_MAPS, _PAGE = 16, 1 << 20, 65535, 4096
_MOST_BYTES = _MOST_DATA + 64  # of a message
_MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset in the file, address, size
_UNMAP = struct.Struct("<IIQQ")  # argsz, flags, address, size
_UNMAP_ALL = 2
_INFO = struct.Struct("<IIII")  # argsz, flags, regions, interrupt indexes; also argsz, flags, index, count of an interrupt index
_REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, capabilities, size, offset
_IRQ_SET = struct.Struct("<IIIII")  # argsz, flags, index, start, count
_ACCESS = struct.Struct("<QII")  # offset, region, count
_CAN_RESET, _IS_PCI = 1, 2
_READABLE, _WRITABLE = 1, 2
_REGIONS, _CONFIG, _CONFIG_BYTES = 9, 7, 4096
_IRQS, _MSIX, _HAS_EVENTFD, _KEEPS_SIZE = 5, 2, 1, 8
_NO_DATA, _BOOLS, _EVENTFDS, _TRIGGER = 1, 2, 4, 32
_COMMAND, _MEMORY_SPACE, _BARS, _BARS_END = 0x04, 2, 0x10, 0x28
_PCIE_CAP, _START_FLR = 0x10, 0x80  # the latter in the upper byte of Device Control [PCIe5 7.5.3.4]
_SEND_S = 5.0  # a client that takes no reply for so long is gone


class _Refusal(Exception):
    """The answer is this error number."""

    def __init__(self, number, why):
        super().__init__(why)
        self.number = number


class Server:
    """Serves one function of a card to one client at a time, over the socket ``path``.

    Every message is answered, a bad one with an error: that of Linux's vfio where it has one. Where it cannot be known where the next
    message begins, the connection ends. When it ends, in whatever way, the function is reset, and what the client mapped is out of
    the card's reach; then the next client is served.

    DMA goes to the files that the client maps, never through messages: a range without a file is out of the card's reach. The client
    keeps the MSI-X table: what is sent is an eventfd, and an access to the table through its BAR reads ones and writes nothing. It keeps
    the BARs, too, and takes them for what they were after a function level reset: they are given back, as vfio does. Reads and writes
    of regions are answered as on a bus: all ones where the card refuses.

    Parameters
    ----------
    loop : :class:`.loop.Loop`
    bridge : :class:`.bridge.Bridge`
    path : path
        Of the socket; what lies there is replaced.
    function : :class:`int`
        Number of the function.

    Attributes
    ----------
    is_connected : :class:`bool`
    connections : :class:`int`
        Clients that connected so far.
    counts : :class:`collections.Counter`
        Messages by command number; "refused" ones; "interrupts" sent, "lost" ones that no eventfd was there for; "maps" at this moment.

    Raises
    ------
    :exc:`ValueError`
        When the card has no such function.
    """

    def __init__(self, loop, bridge, path, function):
        if function not in bridge.functions:
            raise ValueError(f"Function must be one of {sorted(bridge.functions)}, not {function!r}")
        self.loop, self.bridge, self.path, self.function = loop, bridge, Path(path), function
        self.info = bridge.functions[function]
        self.connections, self.counts, self._client = 0, Counter(), None
        self._maps, self._starts, self._eventfds, self._written = {}, [], {}, {}
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self.path))
            self._listener.listen(4)
            self._listener.setblocking(False)
            loop.add(self._listener, self._accept)
        except Exception:
            self._listener.close()
            raise
        bridge.on_interrupt[function] = self._interrupted

    @property
    def is_connected(self):
        return self._client is not None

    def close(self):
        """End the connection and the socket."""
        if self._client is not None:
            self._end("the server ends")
        if self._listener is not None:
            self.loop.remove(self._listener)
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)
            del self.bridge.on_interrupt[self.function]

    # -- connections --

    def _accept(self):
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.loop.remove(self._listener)  # the next one waits
        client.setblocking(False)
        self._client, self._is_greeted = client, False
        self._raw, self._size, self._fds, self._is_cut = bytearray(), None, [], False
        self.connections += 1
        self.loop.add(client, self._readable)
        _log.info("function %d: client %d", self.function, self.connections)

    def _end(self, why):
        _log.info("function %d: the connection ends: %s", self.function, why)
        self.loop.remove(self._client)
        self._client.close()
        self._client = None
        self._close_fds()
        for vector in list(self._eventfds):
            os.close(self._eventfds.pop(vector))
        self._written.clear()
        self.bridge.reset(self.function)  # first: then nothing is under way to memory that goes
        self.bridge.unmap_all(function=self.function)
        self._maps.clear()
        self._starts.clear()
        self.counts["maps"] = 0
        self.loop.add(self._listener, self._accept)

    def _close_fds(self):
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _readable(self):
        """Take what is there of one message: the header with its descriptors, then exactly its payload."""
        try:
            if self._size is None:
                missing = _HEADER.size - len(self._raw)
                raw, fds, flags, _ = socket.recv_fds(self._client, missing, 4 * _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
                self._fds += fds
                self._is_cut |= bool(flags & socket.MSG_CTRUNC) or len(self._fds) > _MOST_FDS
            else:
                raw = self._client.recv(min(self._size - len(self._raw), 1 << 16))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            return self._end(str(error))
        if not raw:
            return self._end("the client closed it" if not self._raw else "the client closed it within a message")
        self._raw += raw
        if self._size is None and len(self._raw) == _HEADER.size:
            self._size = _HEADER.unpack(self._raw)[2]
            if not _HEADER.size <= self._size <= _MOST_BYTES:
                self.counts["refused"] += 1
                self._reply(b"", errno.EINVAL)
                if self._client is not None:
                    self._end(f"a message of {self._size} bytes")
                return
        if self._size == len(self._raw):
            self._take()

    def _take(self):
        number, command, _, flags, _ = _HEADER.unpack_from(self._raw)
        payload = bytes(self._raw[_HEADER.size :])
        try:
            if flags & _KIND == _IS_REPLY:  # nothing was asked
                self.counts["refused"] += 1
                _log.warning("function %d: reply %d to no command", self.function, number)
                flags |= _NO_REPLY
            self.counts[command] += 1
            answer, error = self._answered(command, flags, payload), 0
        except _Refusal as refusal:
            self.counts["refused"] += 1
            _log.warning("function %d: command %d refused: %s", self.function, command, refusal)
            answer, error = b"", refusal.number
        self._close_fds()
        self._is_cut = False
        if not flags & _NO_REPLY:
            self._reply(answer, error)
        self._raw, self._size = bytearray(), None

    def _answered(self, command, flags, payload):
        if flags & _KIND == _IS_REPLY:
            return b""
        if flags & _KIND or flags & _ERROR:
            raise _Refusal(errno.EINVAL, f"flags {flags:#x}")
        if self._is_cut:
            raise _Refusal(errno.EINVAL, f"more than {_MOST_FDS} descriptors")
        if not self._is_greeted and command != _VERSION:
            raise _Refusal(errno.EINVAL, "no version was agreed")
        handler = _HANDLERS.get(command)
        if handler is None:
            raise _Refusal(errno.ENOTSUP, "not known")
        return handler(self, payload)

    def _reply(self, payload, error):
        number, command, _, _, _ = _HEADER.unpack_from(self._raw)
        flags = _IS_REPLY | (_ERROR if error else 0)
        raw = memoryview(_HEADER.pack(number, command, _HEADER.size + len(payload), flags, error) + payload)
        while raw:
            try:
                raw = raw[self._client.send(raw) :]
            except (BlockingIOError, InterruptedError):
                if not select.select([], [self._client], [], _SEND_S)[1]:
                    return self._end(f"it takes no reply for {_SEND_S} s")
            except OSError as problem:
                return self._end(str(problem))
        return None

    # -- commands --

    @staticmethod
    def _fields(form, payload, argsz=0, data=False):
        """Unpack ``payload``, which is as long as ``form``, or longer with ``data``; argsz (first) must have room for the answer."""
        if len(payload) < form.size or (len(payload) > form.size and not data):
            raise _Refusal(errno.EINVAL, f"{len(payload)} bytes instead of {form.size}")
        fields = form.unpack_from(payload)
        if fields[0] < argsz:
            raise _Refusal(errno.EINVAL, f"argsz {fields[0]} is less than {argsz}")
        return fields

    def _version(self, payload):
        if self._is_greeted:
            raise _Refusal(errno.EINVAL, "a version was agreed already")
        major, minor = self._fields(struct.Struct("<HH"), payload, data=True)
        if major != _MAJOR:
            raise _Refusal(errno.EINVAL, f"version {major}.{minor}")
        text = payload[4:]
        try:
            offered = json.loads(text.removesuffix(b"\0") or b"{}")
        except (ValueError, RecursionError) as error:
            raise _Refusal(errno.EINVAL, f"capabilities are no JSON: {error}") from error
        if not isinstance(offered, dict) or not isinstance(offered.get("capabilities", {}), dict):
            raise _Refusal(errno.EINVAL, "capabilities are no object")
        self._is_greeted = True
        ours = {"max_msg_fds": _MOST_FDS, "max_data_xfer_size": _MOST_DATA, "max_dma_maps": _MOST_MAPS, "pgsizes": _PAGE}
        return struct.pack("<HH", _MAJOR, min(minor, _MINOR)) + json.dumps({"capabilities": ours}).encode() + b"\0"

    def _dma_map(self, payload):
        _, flags, offset, address, size = self._fields(_MAP, payload, _MAP.size)
        if flags & ~(_READABLE | _WRITABLE) or not flags:
            raise _Refusal(errno.EINVAL, f"flags {flags:#x}")
        if not size or size > (1 << 64) - address or (address | size) % _PAGE or len(self._fds) > 1:
            raise _Refusal(errno.EINVAL, f"{size:#x} bytes from {address:#x} with {len(self._fds)} descriptors")
        if len(self._maps) >= _MOST_MAPS:
            raise _Refusal(errno.ENOSPC, f"{_MOST_MAPS} maps")
        if self._overlapping(address, size):
            raise _Refusal(errno.EEXIST, f"{size:#x} bytes from {address:#x} overlap a map")
        if self._fds:
            if offset >= 1 << 63 or offset % _PAGE:
                raise _Refusal(errno.EINVAL, f"offset {offset:#x}")
            try:
                self.bridge.map(address, size, self._fds[0], offset, function=self.function, readable=bool(flags & _READABLE),
                                writable=bool(flags & _WRITABLE))  # fmt: skip
            except ValueError as error:
                raise _Refusal(errno.EINVAL, str(error)) from error
            except OSError as error:
                raise _Refusal(error.errno or errno.EINVAL, str(error)) from error
        self._maps[address] = size
        insort(self._starts, address)
        self.counts["maps"] = len(self._maps)
        return b""

    def _dma_unmap(self, payload):
        _, flags, address, size = self._fields(_UNMAP, payload, _UNMAP.size)
        if flags == _UNMAP_ALL:
            if address or size:
                raise _Refusal(errno.EINVAL, "all, and a range")
            self.bridge.unmap_all(function=self.function)
            self._maps.clear()
            self._starts.clear()
        elif flags:
            raise _Refusal(errno.EINVAL, f"flags {flags:#x}")
        else:
            if not size or size > (1 << 64) - address:
                raise _Refusal(errno.EINVAL, f"{size:#x} bytes from {address:#x}")
            gone = self._overlapping(address, size)
            if any(at < address or at + self._maps[at] > address + size for at in gone):
                raise _Refusal(errno.EINVAL, f"{size:#x} bytes from {address:#x} are part of a map")
            for at in gone:
                self.bridge.unmap(at, self._maps.pop(at), function=self.function)
                del self._starts[bisect_left(self._starts, at)]
        self.counts["maps"] = len(self._maps)
        return payload

    def _overlapping(self, address, size):
        """Return where the maps begin that overlap."""
        first = bisect_right(self._starts, address) - 1
        if first < 0 or self._starts[first] + self._maps[self._starts[first]] <= address:
            first += 1
        return self._starts[first : bisect_left(self._starts, address + size)]

    def _get_info(self, payload):
        self._fields(_INFO, payload, _INFO.size)
        return _INFO.pack(_INFO.size, _CAN_RESET | _IS_PCI, _REGIONS, _IRQS)

    def _region_size(self, index):
        if index == _CONFIG:
            return _CONFIG_BYTES
        return self.info.bars[index].size if index in self.info.bars else 0

    def _region_info(self, payload):
        index = self._fields(_REGION_INFO, payload, _REGION_INFO.size)[2]
        if index >= _REGIONS:
            raise _Refusal(errno.EINVAL, f"region {index}")
        size = self._region_size(index)
        return _REGION_INFO.pack(_REGION_INFO.size, _READABLE | _WRITABLE if size else 0, index, 0, size, 0)

    def _vectors(self, index):
        return self.info.msix.count if index == _MSIX and self.info.msix is not None else 0

    def _irq_info(self, payload):
        index = self._fields(_INFO, payload, _INFO.size)[2]
        if index >= _IRQS:
            raise _Refusal(errno.EINVAL, f"interrupt index {index}")
        count = self._vectors(index)
        return _INFO.pack(_INFO.size, _HAS_EVENTFD | _KEEPS_SIZE if count else 0, index, count)

    def _set_irqs(self, payload):
        _, flags, index, start, count = self._fields(_IRQ_SET, payload, _IRQ_SET.size, data=True)
        data, fds = payload[_IRQ_SET.size :], self._fds
        if index >= _IRQS or start + count > self._vectors(index) or flags & ~7 != _TRIGGER:
            raise _Refusal(errno.EINVAL, f"interrupts {start} to {start + count} of index {index}, flags {flags:#x}")
        kind = flags & 7
        if kind != _EVENTFDS and fds:
            raise _Refusal(errno.EINVAL, f"{len(fds)} descriptors that nobody asked for")
        vectors = range(start, start + count)
        if kind == _NO_DATA and not count and not start:
            for vector in list(self._eventfds) if index == _MSIX else ():
                self._set_eventfd(vector, None)
        elif kind == _EVENTFDS and count and len(fds) in (0, count):  # none: these vectors have no eventfd any more
            if not all(_is_eventfd(fd) for fd in fds):
                raise _Refusal(errno.EINVAL, "no eventfd")
            self._fds = []
            for n, vector in enumerate(vectors):
                self._set_eventfd(vector, fds[n] if fds else None)
        elif kind == _NO_DATA and count:
            for vector in vectors:
                self._signal(vector)
        elif kind == _BOOLS and count and len(data) == count:
            for n, vector in enumerate(vectors):
                if data[n]:
                    self._signal(vector)
        else:
            raise _Refusal(errno.EINVAL, f"{count} interrupts, {len(fds)} descriptors, {len(data)} bytes, flags {flags:#x}")
        self._write_table()
        return b""

    def _region_read(self, payload):
        offset, region, count = self._access(payload)
        if region == _CONFIG:
            read = self.bridge.config_read
            return payload + b"".join(read(self.function, at, size).to_bytes(size, "little") for at, size in _pieces(offset, count))
        data = bytearray(b"\xff" * count)
        for at, size in self._beside_table(region, offset, count):
            data[at - offset : at - offset + size] = self.bridge.bar_read(self.function, region, at, size)
        return payload + bytes(data)

    def _region_write(self, payload):
        offset, region, count = self._access(payload, is_write=True)
        data = payload[_ACCESS.size :]
        if region == _CONFIG:
            pcie = self.info.capabilities.get(_PCIE_CAP, [0])[0]
            control = pcie + 9
            starts_reset = pcie and offset <= control < offset + count and data[control - offset] & _START_FLR
            places = range(_BARS, _BARS_END, 4) if starts_reset else ()
            bars = [self.bridge.config_read(self.function, at, 4) for at in places]
            for at, size in _pieces(offset, count):
                self.bridge.config_write(self.function, at, size, int.from_bytes(data[at - offset : at - offset + size], "little"))
            for at, bar in zip(places, bars):
                self.bridge.config_write(self.function, at, 4, bar)
            if starts_reset:
                self._written.clear()
            if offset < _COMMAND + 2 and offset + count > _COMMAND:
                self._write_table()
        else:
            for at, size in self._beside_table(region, offset, count):
                self.bridge.bar_write(self.function, region, at, data[at - offset : at - offset + size])
        return payload[: _ACCESS.size]

    def _access(self, payload, *, is_write=False):
        offset, region, count = self._fields(_ACCESS, payload, data=is_write)
        if region >= _REGIONS or not 0 < count <= _MOST_DATA or offset + count > self._region_size(region):
            raise _Refusal(errno.EINVAL, f"{count} bytes from {offset:#x} of region {region}")
        if is_write and len(payload) != _ACCESS.size + count:
            raise _Refusal(errno.EINVAL, f"{len(payload) - _ACCESS.size} bytes instead of {count}")
        return offset, region, count

    def _beside_table(self, bar, offset, count):
        """Yield (offset, size) of the pieces of an access to a BAR that lie in front of the MSI-X table and behind it."""
        low = high = offset
        if (msix := self.info.msix) is not None and bar == msix.table_bar:
            low, high = (min(max(at, offset), offset + count) for at in (msix.table_offset, msix.table_offset + 16 * msix.count))
        for start, end in ((offset, low), (high, offset + count)):
            if start < end:
                yield start, end - start

    def _reset(self, payload):
        if payload:
            raise _Refusal(errno.EINVAL, f"{len(payload)} bytes")
        self._written.clear()
        self.bridge.reset(self.function)
        return b""

    # -- interrupts --

    def _set_eventfd(self, vector, fd):
        if vector in self._eventfds:
            os.close(self._eventfds.pop(vector))
        if fd is not None:
            self._eventfds[vector] = fd

    def _write_table(self):
        """Have the card's MSI-X table so that vectors with an eventfd send our message and others none, once it can be written."""
        msix = self.info.msix
        if msix is None or not self.bridge.config_read(self.function, _COMMAND, 2) & _MEMORY_SPACE:
            return
        for vector in range(msix.count):
            is_wanted = vector in self._eventfds
            if self._written.get(vector, False) != is_wanted:
                entry = struct.pack("<QII", self.bridge.messages[0] + (self.function << 8), vector, not is_wanted)
                self.bridge.bar_write(self.function, msix.table_bar, msix.table_offset + 16 * vector, entry)
                self._written[vector] = is_wanted

    def _interrupted(self, function, vector, address, data):
        if vector is not None:
            self._signal(vector)

    def _signal(self, vector):
        fd = self._eventfds.get(vector)
        if fd is None:
            self.counts["lost"] += 1
        elif select.select([], [fd], [], 0)[1]:  # its counter is not full; a client may have left it blocking
            os.write(fd, struct.pack("<Q", 1))
            self.counts["interrupts"] += 1


_HANDLERS = {
    _VERSION: Server._version, _DMA_MAP: Server._dma_map, _DMA_UNMAP: Server._dma_unmap, _GET_INFO: Server._get_info,
    _GET_REGION_INFO: Server._region_info, _GET_IRQ_INFO: Server._irq_info, _SET_IRQS: Server._set_irqs, _REGION_READ: Server._region_read,
    _REGION_WRITE: Server._region_write, _RESET: Server._reset,
}  # fmt: skip


def _is_eventfd(fd):
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def _pieces(offset, count):
    """Yield (offset, size) of the aligned pieces of 1, 2 or 4 bytes that an access to configuration space consists of."""
    end = offset + count
    while offset < end:
        size = 4 if not offset % 4 and end - offset >= 4 else 2 if not offset % 2 and end - offset >= 2 else 1
        yield offset, size
        offset += size
