"""The vhost-user end of PCI over virtio: a function of the card as a device of user-mode Linux.

The guest's kernel connects to a socket per function, hands its memory over as file descriptors, and sends configuration and BAR
accesses as messages on virtqueue 0; interrupts go back on virtqueue 1. Whatever the other side sends or leaves behind, the server
lives, and serves the next connection.
"""

import array
import os
import socket
import struct
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

from ...models.memory import AccessFault

__all__ = ["MSI_WINDOW", "Server"]

MSI_WINDOW = 0xA_0000, 0x1000  # where user-mode Linux wants its messages: an address below its memory

_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
_HEADER, _LONGEST, _MOST_FDS = 12, 4096, 8
_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _RESET_OWNER, _SET_MEM_TABLE = 1, 2, 3, 4, 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE, _GET_VRING_BASE, _SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR = range(8, 15)
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES, _GET_QUEUE_NUM, _SET_VRING_ENABLE, _SET_BACKEND_REQ_FD = 15, 16, 17, 18, 21
_FEATURES = 1 << 32 | 1 << 30  # VERSION_1, and that protocol features exist
_REPLY_ACK, _BACKEND_REQ = 1 << 3, 1 << 5
_NO_FD = 1 << 8  # in a message that may carry a descriptor
_QUEUES, _LONGEST_RING = 2, 1024
_NEXT, _WRITE, _INDIRECT = 1, 2, 4  # of a descriptor
_NO_INTERRUPT = 1  # of the available ring
_MSG = struct.Struct("<BBHIQ")  # op, bar, reserved, size, address
_CFG_READ, _CFG_WRITE, _MMIO_READ, _MMIO_WRITE, _MMIO_MEMSET, _, _MSI = range(1, 8)
_LONGEST_ACCESS = 0x1_0000
_MOST_PENDING = 4096


class _Gone(Exception):
    """The connection is over; its text says why."""


class _Refused(Exception):
    """A message is not accepted; the connection goes on."""


class _Broken(Exception):
    """A ring cannot be walked: it stands still until it is set up anew."""


class _Ring:
    """A virtqueue in guest memory, from the device's side. [VIRTIO1.4 2.7]"""

    def __init__(self, memory):
        self.memory, self.size, self.desc, self.avail, self.used = memory, 0, None, None, None
        self.seen, self.kick, self.call, self.is_enabled, self.is_broken = 0, None, None, False, False

    @property
    def runs(self):
        return self.is_enabled and not self.is_broken and bool(self.size) and self.desc is not None

    def _u16(self, address):
        return int.from_bytes(self.memory.read(address, 2), "little")

    def pop(self):
        """Return (head, bytes of the readable part, [(address, size)] of the writable part) of the next chain, None without one."""
        there = self._u16(self.avail + 2)
        if there == self.seen:
            return None
        if (there - self.seen) % 0x1_0000 > self.size:
            raise _Broken(f"the available index jumped from {self.seen} to {there} in a ring of {self.size}")
        at = head = self._u16(self.avail + 4 + 2 * (self.seen % self.size))
        self.seen = (self.seen + 1) % 0x1_0000
        readable, writable, total = bytearray(), [], 0
        for _ in range(self.size):
            if at >= self.size:
                raise _Broken(f"a chain leads to descriptor {at} in a ring of {self.size}")
            address, length, flags, following = struct.unpack("<QIHH", self.memory.read(self.desc + 16 * at, 16))
            total += length
            if flags & _INDIRECT or total > 2 * _LONGEST_ACCESS:
                raise _Broken(f"descriptor {at} is indirect, or its chain longer than {2 * _LONGEST_ACCESS} bytes")
            if flags & _WRITE:
                writable.append((address, length))
            elif writable:
                raise _Broken(f"descriptor {at} can be read behind one that can be written")
            else:
                readable += self.memory.read(address, length)
            if not flags & _NEXT:
                return head, bytes(readable), writable
            at = following
        raise _Broken("a chain is a loop")

    def push(self, head, written):
        """Give a chain back; its content is there before the index says so."""
        index = self._u16(self.used + 2)
        self.memory.write(self.used + 4 + 8 * (index % self.size), struct.pack("<II", head, written))
        self.memory.write(self.used + 2, struct.pack("<H", (index + 1) % 0x1_0000))

    def signal(self):
        if self.call is not None and not self._u16(self.avail) & _NO_INTERRUPT:
            with suppress(OSError):  # full of calls that were not looked at, or nobody is there any more
                os.write(self.call, b"\1\0\0\0\0\0\0\0")


class Server:
    """Serves one function of the card at a Unix socket, one connection at a time.

    A connection begins and ends with the function as after a reset, and its memory is mapped while it lasts. A message or a ring that
    breaks the rules is noted and refused, ends the connection where it cannot be told what follows, and never the server.

    Parameters
    ----------
    loop : :class:`.loop.Loop`
    bridge : :class:`.bridge.Bridge`
        Its window of messages becomes `MSI_WINDOW`.
    path
        Of the socket; must not exist.
    function : :class:`int` or None
        Function number; None for a slot with nothing in it, whose reads are all ones.
    log : callable
        Called with one line of text for everything that is worth one.
    keeps : :class:`bool`
        The end of a connection leaves the function and its memory as they are, as a warm reboot of a machine does, until
        :meth:`forget`.

    Attributes
    ----------
    counts : :class:`collections.Counter`
        connections, messages, refused, commands, interrupts, lost (interrupts that the guest left no room for).
    is_connected : :class:`bool`

    Raises
    ------
    :exc:`ValueError`
        When the card has no such function.
    """

    def __init__(self, loop, bridge, path, function, *, log=None, keeps=False):
        if function is not None and function not in bridge.functions:
            raise ValueError(f"Function must be one of {', '.join(map(str, bridge.functions))}, not {function!r}")
        self.keeps = keeps
        self.loop, self.bridge, self.path, self.function = loop, bridge, Path(path), function
        self.counts, self._log, self._connection = Counter(), log, None
        bridge.messages = MSI_WINDOW
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(4)
        loop.add(self._listener, self._accept)
        if function is not None:
            bridge.on_interrupt[function] = self._interrupted

    @property
    def is_connected(self):
        return self._connection is not None

    def note(self, text):
        if self._log is not None:
            self._log(f"function {self.function}: {text}")

    def _accept(self):
        try:
            link, _ = self._listener.accept()
        except OSError as error:
            self.note(f"a connection did not come about: {error}")
            return
        if self._connection is not None:
            self.note("a second connection was refused")
            link.close()
            return
        self.counts["connections"] += 1
        self.note("connected")
        self._connection = _Connection(self, link)

    def disconnect(self, reason="the server ends"):
        """End the connection, if there is one: reset the function, give back memory and descriptors."""
        if self._connection is not None:
            self.note(f"disconnected: {reason}")
            self._connection.close()
            self._connection = None
            if not self.keeps:
                self._reset()
                self.forget()

    def _reset(self):
        if self.function is not None:
            self.bridge.reset(self.function)  # before its memory goes

    def forget(self):
        """Take the memory of the connection that ended away from the function, which stays as it is."""
        if self._connection is None:
            self.bridge.unmap_all(owner=self)

    def _interrupted(self, function, vector, address, data):
        if self._connection is not None:
            self._connection.interrupt(address, data)

    def close(self):
        """End the connection and the socket."""
        if self._listener.fileno() >= 0:
            self.disconnect()
            if self.keeps:
                self._reset()
                self.forget()
            self.loop.remove(self._listener)
            self._listener.close()
            self.bridge.on_interrupt.pop(self.function, None)
            self.path.unlink(missing_ok=True)


class _Connection:
    """What one front end set up."""

    def __init__(self, server, link):
        self.server, self.link, self.bridge = server, link, server.bridge
        link.setblocking(False)
        self.rings = [_Ring(server.bridge.card) for _ in range(_QUEUES)]
        self.regions, self.protocol, self.request_fd = [], 0, None
        self.pending = deque()
        self._raw, self._fds = bytearray(), []
        server.loop.add(link, self._readable)

    def close(self):
        self.server.loop.remove(self.link)
        self.link.close()
        for ring in self.rings:
            ring.is_enabled = False
            self._set_fd(ring, "kick", None)
            self._set_fd(ring, "call", None)
        for fd in [*self._fds, self.request_fd]:
            if fd is not None:
                os.close(fd)

    # -- messages --

    def _readable(self):
        try:
            self._receive()
        except _Gone as error:
            self.server.disconnect(str(error))
        except OSError as error:
            self.server.disconnect(f"the socket failed: {error}")

    def _receive(self):
        """Take what is there of one message: first the header, with its descriptors, then the payload."""
        raw = self._raw
        wanted = _HEADER if len(raw) < _HEADER else _HEADER + int.from_bytes(raw[8:12], "little")
        try:
            data, ancillary, flags, _ = self.link.recvmsg(wanted - len(raw), socket.CMSG_SPACE(4 * _MOST_FDS), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > _MOST_FDS:
            raise _Gone("a message carries too many descriptors")
        if not data:
            raise _Gone("the other end closed" if not raw else f"the other end closed within a message, after {len(raw)} bytes")
        raw += data
        if len(raw) < _HEADER:
            return
        request, flags, size = struct.unpack_from("<III", raw)
        if flags & 3 != _VERSION or flags & _REPLY or size > _LONGEST:
            raise _Gone(f"the header of a message is wrong: request {request}, flags {flags:#x}, {size} bytes")
        if len(raw) == _HEADER + size:
            payload, fds = bytes(raw[_HEADER:]), self._fds
            self._raw, self._fds = bytearray(), []
            try:
                self._handle(request, flags, payload, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _handle(self, request, flags, payload, fds):
        """Do one message; descriptors that it keeps are taken out of ``fds``."""
        self.server.counts["messages"] += 1
        status, reply = 0, None
        try:
            method = self._METHODS.get(request)
            if method is None:
                raise _Refused("is not known here")
            reply = method(self, payload, fds)
        except (_Refused, struct.error) as error:
            if request in self._ANSWERED:
                raise _Gone(f"message {request} {error}") from None
            self.server.counts["refused"] += 1
            self.server.note(f"message {request} {error}")
            status = 1
        if reply is None and flags & _NEED_REPLY and self.protocol & _REPLY_ACK:
            reply = struct.pack("<Q", status)
        if reply is not None:
            message = struct.pack("<III", request, _VERSION | _REPLY, len(reply)) + reply
            try:
                sent = self.link.send(message, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            if sent != len(message):
                raise _Gone("the other end does not read its answers")

    @staticmethod
    def _u64(payload):
        return struct.unpack("<Q", payload)[0]

    def _ring(self, index):
        if index >= _QUEUES:
            raise _Refused(f"is about ring {index}, of {_QUEUES}")
        return self.rings[index]

    def _get_features(self, payload, fds):
        return struct.pack("<Q", _FEATURES)

    def _set_features(self, payload, fds):
        if self._u64(payload) & ~_FEATURES:
            raise _Refused(f"sets features that were not offered: {self._u64(payload):#x}")

    def _nothing(self, payload, fds):
        return None

    def _get_protocol_features(self, payload, fds):
        return struct.pack("<Q", _REPLY_ACK | _BACKEND_REQ)

    def _set_protocol_features(self, payload, fds):
        value = self._u64(payload)
        if value & ~(_REPLY_ACK | _BACKEND_REQ):
            raise _Refused(f"sets protocol features that were not offered: {value:#x}")
        self.protocol = value

    def _get_queue_num(self, payload, fds):
        return struct.pack("<Q", _QUEUES)

    def _set_mem_table(self, payload, fds):
        count, _ = struct.unpack_from("<II", payload)
        if count > _MOST_FDS or len(payload) < 8 + 32 * count or len(fds) != count:
            raise _Refused(f"has {len(payload)} bytes and {len(fds)} descriptors for {count} regions")
        for ring in self.rings:
            ring.desc = None
        self.bridge.unmap_all(owner=self.server)
        regions = [struct.unpack_from("<QQQQ", payload, 8 + 32 * n) for n in range(count)]
        try:
            for (address, size, _, offset), fd in zip(regions, fds):
                self.bridge.map(address, size, fd, offset, owner=self.server)
        except (ValueError, OSError) as error:
            self.bridge.unmap_all(owner=self.server)
            self.regions = []
            raise _Refused(f"cannot be mapped: {error}") from None
        self.regions = regions

    def _guest_address(self, address, size, align):
        """Return the guest's physical address of a structure that the front end knows by its own address."""
        for guest, length, own, _ in self.regions:
            if own <= address and address + size <= own + length and not (guest + address - own) % align:
                return guest + address - own
        raise _Refused(f"points to {size} bytes at {address:#x}, which are in no region or not aligned")

    def _set_vring_num(self, payload, fds):
        index, size = struct.unpack("<II", payload)
        if size not in [1 << n for n in range(11)]:
            raise _Refused(f"gives a ring {size} descriptors; a power of two up to {_LONGEST_RING} is wanted")
        ring = self._ring(index)
        ring.size, ring.desc = size, None

    def _set_vring_addr(self, payload, fds):
        index, flags, desc, used, avail, _ = struct.unpack("<IIQQQQ", payload)
        ring = self._ring(index)
        if not ring.size or flags:
            raise _Refused(f"comes before the size of ring {index}, or has flags {flags:#x}")
        structures = (desc, 16 * ring.size, 16), (avail, 6 + 2 * ring.size, 2), (used, 6 + 8 * ring.size, 4)
        ring.desc, ring.avail, ring.used = [self._guest_address(*one) for one in structures]
        ring.is_broken = False

    def _set_vring_base(self, payload, fds):
        index, base = struct.unpack("<II", payload)
        self._ring(index).seen = base & 0xFFFF
        self._ring(index).is_broken = False

    def _get_vring_base(self, payload, fds):
        index, _ = struct.unpack("<II", payload)
        ring = self._ring(index)
        self._set_fd(ring, "kick", None)
        ring.is_enabled = False
        return struct.pack("<II", index, ring.seen)

    def _set_vring_enable(self, payload, fds):
        index, value = struct.unpack("<II", payload)
        self._ring(index).is_enabled = bool(value)
        self._kicked(index)  # a kick before may have been for nothing

    def _take_fd(self, payload, fds):
        """Return (ring index, descriptor or None) of a message that may carry one."""
        value = self._u64(payload)
        index = value & 0xFF
        self._ring(index)
        if bool(value & _NO_FD) == bool(fds) or len(fds) > 1:
            raise _Refused(f"has {len(fds)} descriptors, and says otherwise")
        return index, fds.pop() if fds else None

    def _set_fd(self, ring, name, fd):
        old = getattr(ring, name)
        if old is not None:
            if name == "kick":
                with suppress(KeyError):  # one that ended is forgotten already
                    self.server.loop.remove(old)
            os.close(old)
        setattr(ring, name, fd)
        if fd is not None:
            os.set_blocking(fd, False)

    def _set_vring_kick(self, payload, fds):
        index, fd = self._take_fd(payload, fds)
        ring = self.rings[index]
        self._set_fd(ring, "kick", fd)
        if fd is not None:
            try:
                self.server.loop.add(fd, lambda: self._drain(index))
            except OSError as error:
                ring.kick = None
                os.close(fd)
                raise _Refused(f"has a descriptor that cannot be waited for: {error}") from None

    def _set_vring_call(self, payload, fds):
        index, fd = self._take_fd(payload, fds)
        self._set_fd(self.rings[index], "call", fd)

    def _set_vring_err(self, payload, fds):
        _, fd = self._take_fd(payload, fds)
        if fd is not None:
            os.close(fd)  # what is wrong is in our log

    def _set_request_fd(self, payload, fds):
        if len(fds) != 1:
            raise _Refused(f"has {len(fds)} descriptors; 1 is wanted")
        if self.request_fd is not None:
            os.close(self.request_fd)
        self.request_fd = fds.pop()

    _METHODS = {
        _GET_FEATURES: _get_features, _SET_FEATURES: _set_features, _SET_OWNER: _nothing, _RESET_OWNER: _nothing,
        _SET_MEM_TABLE: _set_mem_table, _SET_VRING_NUM: _set_vring_num, _SET_VRING_ADDR: _set_vring_addr,
        _SET_VRING_BASE: _set_vring_base, _GET_VRING_BASE: _get_vring_base, _SET_VRING_KICK: _set_vring_kick,
        _SET_VRING_CALL: _set_vring_call, _SET_VRING_ERR: _set_vring_err, _GET_PROTOCOL_FEATURES: _get_protocol_features,
        _SET_PROTOCOL_FEATURES: _set_protocol_features, _GET_QUEUE_NUM: _get_queue_num, _SET_VRING_ENABLE: _set_vring_enable,
        _SET_BACKEND_REQ_FD: _set_request_fd,
    }  # fmt: skip
    _ANSWERED = _GET_FEATURES, _GET_VRING_BASE, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM, 24  # 24: GET_CONFIG

    # -- rings --

    def _drain(self, index):
        """A kick came."""
        ring = self.rings[index]
        try:
            is_over = not os.read(ring.kick, 8)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self.server.note(f"the kick descriptor of ring {index} ended")
            self.server.loop.remove(ring.kick)
            return
        self._kicked(index)

    def _kicked(self, index):
        ring = self.rings[index]
        if not ring.runs:
            return
        try:
            if index:
                self._deliver()
            else:
                self._commands(ring)
        except (_Broken, AccessFault) as error:
            self._break(index, error)

    def _break(self, index, error):
        self.rings[index].is_broken = True
        self.server.note(f"ring {index} stands still: {error}")

    def _commands(self, ring):
        """Do what is in ring 0, at most one ring full at once."""
        for _ in range(ring.size):
            found = ring.pop()
            if found is None:
                return
            head, readable, writable = found
            answer = self._command(readable, sum(size for _, size in writable))
            left = answer
            for address, size in writable:
                if left:
                    self.bridge.card.write(address, left[:size])
                    left = left[size:]
            ring.push(head, len(answer))
            ring.signal()
        self.server.loop.soon(lambda: self._kicked(0))

    def _command(self, readable, room):
        """Do one configuration or BAR access and return its answer; all that is wrong with it is noted."""
        self.server.counts["commands"] += 1
        if len(readable) < _MSG.size:
            self.server.note(f"a command has {len(readable)} bytes; {_MSG.size} are the least")
            return b""
        op, bar, _, size, address = _MSG.unpack_from(readable)
        data, bridge, function = readable[_MSG.size :], self.bridge, self.server.function
        is_config = op in (_CFG_READ, _CFG_WRITE)
        if size > (8 if is_config else _LONGEST_ACCESS) or (is_config and size not in (1, 2, 4, 8)):
            self.server.note(f"command {op} asks for {size} bytes")
        elif op in (_CFG_READ, _MMIO_READ) and size > room:
            self.server.note(f"command {op} asks for {size} bytes and has room for {room}")
        elif (op in (_CFG_WRITE, _MMIO_WRITE) and size > len(data)) or (op == _MMIO_MEMSET and not data):
            self.server.note(f"command {op} of {size} bytes brings {len(data)}")
        elif function is None:
            return b"\xff" * size if op in (_CFG_READ, _MMIO_READ) else b""
        elif op == _CFG_READ:
            return bridge.config_read(function, address, size).to_bytes(size, "little")
        elif op == _CFG_WRITE:
            bridge.config_write(function, address, size, int.from_bytes(data[:size], "little"))
        elif op == _MMIO_READ:
            return bridge.bar_read(function, bar, address, size)
        elif op == _MMIO_WRITE:
            bridge.bar_write(function, bar, address, data[:size])
        elif op == _MMIO_MEMSET:
            bridge.bar_write(function, bar, address, data[:1] * size)
        else:
            self.server.note(f"command {op} is not known")
        return b""

    def interrupt(self, address, data):
        """Send a message of the card on to the guest, once there is room for it."""
        self.server.counts["interrupts"] += 1
        if len(self.pending) == _MOST_PENDING:
            self.pending.popleft()
            self.server.counts["lost"] += 1
        self.pending.append(_MSG.pack(_MSI, 0, 0, 4, address) + struct.pack("<I", data))
        self._kicked(1)

    def _deliver(self):
        ring = self.rings[1]
        while self.pending:
            found = ring.pop()
            if found is None:
                return
            head, _, writable = found
            message = self.pending.popleft()
            if not writable or writable[0][1] < len(message):
                ring.push(head, 0)
                raise _Broken(f"a buffer of {writable[0][1] if writable else 0} bytes for interrupts; {len(message)} are the least")
            self.bridge.card.write(writable[0][0], message)
            ring.push(head, len(message))
            ring.signal()
