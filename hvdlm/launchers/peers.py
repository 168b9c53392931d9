"""The launcher's connections to the supervisors of its workers."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hvdlm import wire
from hvdlm.launchers.failure import Record

__all__ = ["Channel", "LocalChannel", "Peers"]


class Channel(Protocol):
    """The connection with one supervisor."""

    host: str
    """Where it runs."""

    @property
    def is_open(self) -> bool:
        """Whether it can still be spoken to."""
        ...

    def send(self, message: bytes) -> bool:
        """Send a message; returns whether it may arrive. A supervisor that is gone is noticed otherwise."""
        ...

    def give_stdin(self) -> None:
        """Hand over what rank 0 reads, or tell that there is nothing."""
        ...

    def kill(self, program: int | None) -> None:
        """End a supervisor that does not answer, and its program.

        Args:
            program: Process id of the program, None if it is not known.
        """
        ...

    def lost(self) -> str | None:
        """Why it closed without a word; None for a supervisor that was killed."""
        ...

    def close(self) -> None:
        """Close it; the supervisor then ends its program."""
        ...


@dataclass
class _Peer:
    channel: Channel
    decoder: wire.Decoder = field(default_factory=wire.Decoder)
    worker: int = -1
    pid: int | None = None
    record: Record | None = None
    ordered: bool = False
    """Whether it was told to end its program while it was there."""


class Peers:
    """Accepts the supervisors, hears what they say and tells them what to do.

    Args:
        num_proc: How many will come; None if workers come and go.
        selector: Where the sockets are watched; the data of a key is what to call when it is ready.
        on_output: Called with (worker, kind, data) for each piece of output.
        on_ended: Called with (worker, record) for each worker that ended.
        on_trouble: Called with a worker that is going to fail.
    """

    def __init__(
        self,
        num_proc: int | None,
        selector: selectors.BaseSelector,
        on_output: Callable[[int, bytes, bytes], None],
        on_ended: Callable[[int, Record], None],
        on_trouble: Callable[[int], None],
    ) -> None:
        self._num_proc, self._selector = num_proc, selector
        self._on_output, self._on_ended, self._on_trouble = on_output, on_ended, on_trouble
        self._environment: bytes | None = None
        self._files = False
        self._peers: list[_Peer] = []
        self._order: bytes | None = None
        # A directory only we can enter, so that nobody else can pose as a worker. /tmp: the path has to be short.
        self._directory = tempfile.mkdtemp(prefix="hvdlm-", dir="/tmp")
        self.path = f"{self._directory}.%h/s"
        """Where supervisors find this process, or the agent of their host: see :func:`hvdlm.wire.socket_path`."""
        path = wire.socket_path(self.path)
        os.mkdir(os.path.dirname(path), 0o700)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(num_proc or 128)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def equip(self, environment: Mapping[str, str], files: Mapping[str, bytes]) -> None:
        """Send an environment to supervisors that come to this process's socket, and put files beside it."""
        self._environment = wire.encode_json(wire.ENVIRONMENT, dict(environment))
        self._files = bool(files)
        for name, content in files.items():
            with open(os.path.join(os.path.dirname(wire.socket_path(self.path)), name), "wb") as file:
                file.write(content)

    @property
    def all_here(self) -> bool:
        """Whether every worker has connected."""
        return self._num_proc is not None and len(self._peers) >= self._num_proc

    @property
    def num_here(self) -> int:
        """How many workers have connected."""
        return len(self._peers)

    @property
    def any_open(self) -> bool:
        """Whether a worker that connected is still there."""
        return any(peer.channel.is_open for peer in self._peers)

    def order(self, kind: bytes, worker: int | None = None) -> None:
        """Tell a worker to interrupt, terminate or kill its program.

        Args:
            kind: What to do.
            worker: Which; None for every one that runs and those still to come.
        """
        if worker is None:
            self._order = kind
        for peer in self._peers:
            if worker is None or peer.worker == worker:
                self._send(peer, kind)

    def kill_programs(self, worker: int | None = None) -> None:
        """Kill the programs themselves, for supervisors that no longer answer."""
        for peer in self._peers:
            if peer.record is None and (worker is None or peer.worker == worker):
                peer.channel.kill(peer.pid)

    def close(self) -> None:
        """Close all connections; a supervisor that still runs then ends its program."""
        for peer in self._peers:
            peer.channel.close()
        self._forget_listener()
        self._remove_directories()

    def adopt(self, channel: Channel) -> Callable[[bytes], None]:
        """Take a supervisor that has connected; returns what to call with its bytes, none when it is gone."""
        peer = _Peer(channel)
        self._peers.append(peer)
        if self.all_here:
            self._forget_listener()  # so that nothing is left behind even if this process is killed
        return lambda data: self._hear(peer, data)

    def _forget_listener(self) -> None:
        if self._listener.fileno() >= 0:
            if self._selector.get_map() is not None:
                self._selector.unregister(self._listener)
            self._listener.close()
            if not self._files:  # workers go on using them
                self._remove_directories()

    def _remove_directories(self) -> None:
        for directory in (self._directory, os.path.dirname(wire.socket_path(self.path))):
            shutil.rmtree(directory, ignore_errors=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        channel = LocalChannel(connection)
        if self._environment is not None:
            channel.send(self._environment)
        hear = self.adopt(channel)

        def read() -> None:
            try:
                data = connection.recv(262144)
            except OSError:
                data = b""
            if not data:
                self._selector.unregister(connection)
                connection.close()
            hear(data)

        self._selector.register(connection, selectors.EVENT_READ, read)

    def _hear(self, peer: _Peer, data: bytes) -> None:
        for kind, payload in peer.decoder.feed(data):
            if kind in (wire.STDOUT, wire.STDERR):
                self._on_output(peer.worker, kind, payload)
                continue
            value: dict[str, Any] = json.loads(payload)
            if kind == wire.HELLO:
                peer.worker = int(value["worker"])
                if peer.worker == 0:
                    peer.channel.give_stdin()
                if self._order is not None:
                    self._send(peer, self._order)
            elif kind == wire.STARTED:
                peer.pid = int(value["pid"])
            elif kind == wire.TROUBLE:
                self._on_trouble(peer.worker)
            elif kind == wire.ENDED:
                peer.record = Record(**value)
                self._on_ended(peer.worker, peer.record)
        if not data and peer.record is None:
            self._lost(peer)

    def _lost(self, peer: _Peer) -> None:
        """A supervisor was killed, or its host is lost: end its program, and count the worker as killed."""
        peer.channel.kill(peer.pid)
        why = peer.channel.lost()
        peer.record = Record(
            rank=peer.worker,
            host=peer.channel.host,
            code=128 + signal.SIGKILL if why is None else 255,
            signal=int(signal.SIGKILL) if why is None else None,
            seconds=0.0,
            time=time.time(),
            traceback=None,
            tail=why or "",
            secondary=False,
            asked=int(signal.SIGTERM) if peer.ordered else None,
            traceback_before_asked=False,
        )
        self._on_ended(peer.worker, peer.record)

    @staticmethod
    def _send(peer: _Peer, kind: bytes) -> None:
        if peer.record is None and peer.channel.is_open and peer.channel.send(wire.encode(kind)):
            peer.ordered = True


class LocalChannel:
    """A supervisor on this host."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.host = socket.gethostname()

    @property
    def is_open(self) -> bool:
        return self._connection.fileno() >= 0

    def send(self, message: bytes) -> bool:
        # A supervisor reads at once; the environment is the one message that is longer than the socket's buffer.
        flags = socket.MSG_DONTWAIT if len(message) <= wire.HEADER_BYTES else 0
        try:
            self._connection.sendall(message, flags)
        except OSError:
            return False
        return True

    def give_stdin(self) -> None:
        """Rank 0 may read what is piped in. A terminal stays with us: Ctrl-C is ours to pass on."""
        try:
            fds = [] if os.isatty(0) or not os.fstat(0) else [0]
        except OSError:  # closed
            fds = []
        with contextlib.suppress(OSError):
            socket.send_fds(self._connection, [wire.encode(wire.STDIN)], fds)

    def kill(self, program: int | None) -> None:
        if program is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(program, signal.SIGKILL)

    def lost(self) -> str | None:
        return None

    def close(self) -> None:
        self._connection.close()
