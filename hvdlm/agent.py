"""What runs on another host of a job: starts supervisors there, and carries their messages to the launcher and back.

The launcher starts one agent per host through ssh and talks to it over ssh's own stdin and stdout, so that all that is
said is authenticated and encrypted, no port is opened, and the environment is on nobody's command line. Supervisors on
the host reach the agent through a socket in a directory only its user can enter. When ssh's connection closes, or
nothing is heard for long, the agent ends every worker of its host, and itself. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from typing import Any

from hvdlm import wire
from hvdlm.network import interfaces
from hvdlm.processes import adopt_orphans, children

__all__ = ["Agent", "main"]

_PULSE_SECONDS = 2.0
_FULL_BYTES = 4 * 2**20
"""With this much unsent, supervisors have to wait (a slow network must not fill the memory)."""
_SECONDS_TO_END = wire.SECONDS_TO_TERMINATE + 1.5
_SECONDS_TO_CONNECT = 2.0
"""From the end of a supervisor that never connected until it counts as failed."""


class Agent:
    """Runs until its launcher is gone or says that all is done.

    Args:
        source: Descriptor to read the launcher from.
        sink: Descriptor to write to it.
    """

    def __init__(self, source: int = 0, sink: int = 1) -> None:
        self._source, self._sink = source, sink
        self._selector = selectors.DefaultSelector()
        self._out = bytearray()
        self._channels: dict[int, socket.socket] = {}
        self._next_channel = 0
        self._paused = False
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, float] = {}
        self._connected: set[int] = set()  # process ids
        self._listener: socket.socket | None = None
        self._socket = ""
        self._environment: bytes | None = None
        self._ending: float | None = None
        self._heard = time.monotonic()
        self._next_pulse = 0.0

    def run(self) -> None:
        """Serve the launcher to the end of the job."""
        adopt_orphans()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: self._end())
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda: os.read(wake_read, 4096))
        os.set_blocking(self._sink, False)
        self._out += wire.AGENT_GREETING
        decoder = wire.Decoder()
        self._selector.register(self._source, selectors.EVENT_READ, lambda: self._hear(decoder))
        ready = {"host": socket.gethostname(), "python": platform.python_version(), "interfaces": interfaces()}
        self._say(wire.encode_json(wire.READY, ready))
        try:
            while not (self._ending is not None and self._is_over()):
                for key, _ in self._selector.select(0.1 if self._ending is not None else 0.5):
                    key.data()
                self._tick()
        finally:
            self._kill_all()
            if self._listener is not None:
                shutil.rmtree(os.path.dirname(self._listener.getsockname()), ignore_errors=True)

    def _hear(self, decoder: wire.Decoder) -> None:
        data = os.read(self._source, 262144)
        self._heard = time.monotonic()
        for kind, payload in decoder.feed(data):
            if kind == wire.CHANNEL:
                channel, piece = wire.decode_channel(payload)
                self._forward(channel, piece)
            elif kind == wire.LISTEN:
                self._prepare(json.loads(payload))
            elif kind == wire.START:
                self._start(json.loads(payload))
            elif kind == wire.PROBE:
                self._probe(json.loads(payload))
        if not data:
            self._selector.unregister(self._source)
            self._end()

    def _prepare(self, told: dict[str, Any]) -> None:
        if self._listener is None:
            self._listen(told["socket"])
        assert self._listener is not None
        directory = os.path.dirname(self._listener.getsockname())
        for name, content in told["files"].items():
            with open(os.path.join(directory, os.path.basename(name)), "wb") as file:
                file.write(base64.b64decode(content))
        if told["environment"] is not None:
            joined = {**os.environ, **told["environment"]}  # this host's own HOME, TMPDIR, ... stay
            self._environment = wire.encode_json(wire.ENVIRONMENT, joined)

    def _listen(self, template: str) -> None:
        path = wire.socket_path(template)
        try:
            os.mkdir(os.path.dirname(path), 0o700)
        except FileExistsError:  # two hosts of one name that share /tmp; or somebody else's, which is not to be trusted
            path = os.path.join(tempfile.mkdtemp(prefix="hvdlm-", dir="/tmp"), "s")
        self._socket = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid() or self._ending is not None:
            connection.close()
            return
        self._connected.add(pid)
        channel, self._next_channel = self._next_channel, self._next_channel + 1
        self._channels[channel] = connection
        if self._environment is not None:
            connection.sendall(self._environment)
        if not self._paused:
            self._watch(channel)

    def _watch(self, channel: int) -> None:
        self._selector.register(self._channels[channel], selectors.EVENT_READ, lambda: self._read(channel))

    def _read(self, channel: int) -> None:
        connection = self._channels[channel]
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        self._say(wire.encode_channel(channel, data))
        if not data:
            self._selector.unregister(connection)
            connection.close()
            del self._channels[channel]

    def _forward(self, channel: int, data: bytes) -> None:
        connection = self._channels.get(channel)
        if connection is None:
            return
        if not data:  # it does not answer: end it for good, its program dies with it
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        with contextlib.suppress(OSError):
            connection.send(data, socket.MSG_DONTWAIT)

    def _start(self, job: dict[str, Any]) -> None:
        worker = int(job["worker"])
        directory = job["directory"]
        if not os.path.isdir(directory):
            self._failed(worker, f"the directory {directory!r} does not exist on {socket.gethostname()}")
            return
        try:
            # Its output, before its program runs, can only be an error: to ssh's stderr, which the launcher reads.
            self._workers[worker] = subprocess.Popen(
                [self._socket if word == job["socket"] else word for word in job["command"]],
                cwd=directory,
                env={**os.environ, **job["environment"]},  # this host's own HOME, TMPDIR, ... stay
                stdin=subprocess.DEVNULL,
                stdout=2,
                stderr=2,
                start_new_session=True,
            )
        except OSError as error:
            self._failed(worker, f"cannot run {job['command'][0]!r} on {socket.gethostname()}: {error.strerror}")

    def _probe(self, request: dict[str, Any]) -> None:
        from hvdlm.probe import answer

        self._say(wire.encode_json(wire.ANSWER, {"probe": request["probe"], "found": answer(request)}))

    def _failed(self, worker: int, text: str) -> None:
        self._say(wire.encode_json(wire.FAILED, {"worker": worker, "text": text}))

    def _tick(self) -> None:
        now = time.monotonic()
        for worker, process in list(self._workers.items()):
            if process.poll() is not None:
                ended = self._ended.setdefault(worker, now)
                if process.pid not in self._connected and now - ended < _SECONDS_TO_CONNECT:
                    continue  # its connection may be waiting to be accepted
                del self._workers[worker], self._ended[worker]
                if process.pid not in self._connected:
                    self._failed(worker, f"its supervisor ended with code {process.returncode}")
        if now >= self._next_pulse:
            self._next_pulse = now + _PULSE_SECONDS
            self._say(wire.encode(wire.PULSE))
        if self._ending is None and now - self._heard > wire.SECONDS_OF_SILENCE:
            self._end()
        if self._paused and len(self._out) < _FULL_BYTES // 2:
            self._paused = False
            for channel in self._channels:
                self._watch(channel)
        elif not self._paused and len(self._out) > _FULL_BYTES and self._ending is None:
            self._paused = True
            for connection in self._channels.values():
                self._selector.unregister(connection)

    def _say(self, message: bytes) -> None:
        if self._ending is None:
            self._out += message
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self._sink, self._out[:65536])]
        except BlockingIOError:
            if self._sink not in self._selector.get_map():
                self._selector.register(self._sink, selectors.EVENT_WRITE, self._flush)
            return
        except OSError:  # ssh is gone
            self._out.clear()
            self._end()
        if self._sink in self._selector.get_map():
            self._selector.unregister(self._sink)

    def _end(self) -> None:
        """Have every supervisor end its program: that is what they do when their connection closes."""
        if self._ending is None:
            self._ending = time.monotonic()
            self._out.clear()
            for connection in self._channels.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            if self._paused:
                self._paused = False
                for channel in self._channels:
                    self._watch(channel)

    def _is_over(self) -> bool:
        assert self._ending is not None
        return not (self._channels or self._workers) or time.monotonic() - self._ending > _SECONDS_TO_END

    def _kill_all(self) -> None:
        for channel in list(self._channels):
            self._forward(channel, b"")
        for process in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 1
        while (left := children()) and time.monotonic() < deadline:
            for pid in left:  # orphans came to us
                with contextlib.suppress(ProcessLookupError, ChildProcessError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def main() -> None:
    """Serve the launcher at the other end of stdin and stdout."""
    Agent().run()


if __name__ == "__main__":
    main()
