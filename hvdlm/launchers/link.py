"""The launcher's connection to the agent on one other host."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdlm import wire
from hvdlm.errors import LaunchError
from hvdlm.launchers.peers import Peers
from hvdlm.launchers.ssh import Ssh, agent_command, explain_ssh
from hvdlm.processes import die_with_parent

__all__ = ["HostLink"]

_MAX_BANNER_BYTES = 2**20
_MAX_SAID_BYTES = 8192
PULSE_SECONDS = 5.0
"""How often the agents hear from us."""


class HostLink:
    """One other host: the agent there, the workers started through it, and their messages.

    Nothing of the job is sent before the agent has said that it is one.

    Args:
        host: Name of the host.
        ssh: How it is reached.
        selector: Where its pipes are watched; the data of a key is what to call when it is ready.
        peers: Hears the supervisors of the host.
        on_ready: Called when the agent has answered.
        on_failed: Called with (worker, reason) for each worker that could not be started.
        on_lost: Called with the reason when the connection ends before :meth:`finish`.
        command: What starts the agent; through ssh if None.
    """

    def __init__(
        self,
        host: str,
        ssh: Ssh,
        selector: selectors.BaseSelector,
        peers: Peers,
        on_ready: Callable[[HostLink], None],
        on_failed: Callable[[int, str], None],
        on_lost: Callable[[HostLink, LaunchError], None],
        command: list[str] | None = None,
    ) -> None:
        self.host, self._selector, self._peers = host, selector, peers
        self._on_ready, self._on_failed, self._on_lost = on_ready, on_failed, on_lost
        self.facts: Mapping[str, Any] = {}
        """What the agent said of its host: ``host`` (its own name), ``python``, ``interfaces``."""
        self.command = command or agent_command(host, ssh)
        self.on_answer: Callable[[str, Any], None] = lambda *_: None
        """Called with (probe, what was found)."""
        self._started = time.monotonic()
        self._greeted = self._finished = False
        self._before, self._said = b"", b""
        self._decoder = wire.Decoder()
        self._out = bytearray()
        self._hears: dict[int, Callable[[bytes], None]] = {}
        self._channels: dict[int, _RemoteChannel] = {}
        self._next_pulse = self._started + PULSE_SECONDS
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # noqa: PLW1509
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self._stdin = self.process.stdin.fileno()
        os.set_blocking(self._stdin, False)
        selector.register(self.process.stdout, selectors.EVENT_READ, self._read)
        selector.register(self.process.stderr, selectors.EVENT_READ, self._read_stderr)

    @property
    def is_ready(self) -> bool:
        """Whether the agent has answered."""
        return bool(self.facts)

    @property
    def is_open(self) -> bool:
        """Whether the agent can still be spoken to."""
        return not self._finished and self.process.returncode is None

    @property
    def is_over(self) -> bool:
        """Whether nothing can come from the agent any more."""
        return self.process.stdout is None or self.process.stdout.closed

    def listen(
        self, socket: str, environment: Mapping[str, str] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Have the agent listen for supervisors; again, to change what they are sent.

        Args:
            socket: Where; see :func:`hvdlm.wire.socket_path`.
            environment: What it sends them, None for those that have it already.
            files: Small files to be put beside the socket: name -> content.
        """
        value = {
            "socket": socket,
            "environment": None if environment is None else dict(environment),
            "files": {name: base64.b64encode(content).decode() for name, content in (files or {}).items()},
        }
        self._send(wire.encode_json(wire.LISTEN, value))

    def start_worker(self, worker: int, command: Sequence[str], environment: Mapping[str, str], directory: str) -> None:
        """Start a supervisor there.

        Args:
            worker: Its number.
            command: Its command.
            environment: What is added to that host's own environment.
            directory: Where it runs.
        """
        value = {"worker": worker, "command": list(command), "environment": dict(environment)}
        value |= {"directory": directory, "socket": self._peers.path}
        self._send(wire.encode_json(wire.START, value))

    def probe(self, probe: str, **arguments: Any) -> None:
        """Have the agent look at something; see :attr:`on_answer`."""
        self._send(wire.encode_json(wire.PROBE, {"probe": probe, **arguments}))

    def send_channel(self, channel: int, data: bytes) -> bool:
        """Send bytes to one supervisor, none to have it killed; returns whether they may arrive."""
        self._send(wire.encode_channel(channel, data))
        return self.is_open

    def pulse(self) -> None:
        """Give a sign of life when it is time; call it now and then."""
        now = time.monotonic()
        if now >= self._next_pulse and self._greeted and self.is_open:
            self._next_pulse = now + PULSE_SECONDS
            self._send(wire.encode(wire.PULSE))

    def error(self) -> LaunchError:
        """Why the host does not answer."""
        said = (self._said + b"\n" + self._before[-_MAX_SAID_BYTES:]).decode(errors="replace")
        return explain_ssh(self.host, said, self.process.poll(), time.monotonic() - self._started)

    def finish(self) -> None:
        """Let go: the agent ends what still runs there, and itself."""
        self._finished = True
        self._close_stdin()

    def kill(self) -> None:
        """End ssh at once; the agent notices and ends its workers."""
        self._finished = True
        self._kill()

    def _hang_up(self, why: str) -> None:
        self._before += f"\n{why}".encode()
        self._kill()

    def _kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with what it started: a ProxyCommand

    def close(self) -> None:
        """Kill ssh and close its pipes."""
        self.kill()
        self.process.wait()
        self._close_stdin()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            if not pipe.closed:
                self._selector.unregister(pipe)
                pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 262144)
        if not data:
            self._end(self.process.stdout)
            return
        if not self._greeted:
            self._before += data
            start = self._before.find(wire.AGENT_GREETING)
            if start < 0:
                if len(self._before) > _MAX_BANNER_BYTES:
                    self._hang_up("(it went on, and no agent answered)")
                return
            self._greeted = True
            data, self._before = self._before[start + len(wire.AGENT_GREETING) :], b""
        try:
            for kind, payload in self._decoder.feed(data):
                self._take(kind, payload)
        except (ValueError, KeyError, TypeError):
            self._hang_up("(what answered is no agent of this version of hvdlm)")

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == wire.CHANNEL:
            number, data = wire.decode_channel(payload)
            if number not in self._hears:
                self._channels[number] = _RemoteChannel(self, number)
                self._hears[number] = self._peers.adopt(self._channels[number])
            if not data:
                self._channels[number].is_open = False
            self._hears[number](data)
        elif kind == wire.READY:
            self.facts = dict(json.loads(payload))
            self._on_ready(self)
        elif kind == wire.FAILED:
            value = json.loads(payload)
            said = self._said.decode(errors="replace").strip()
            self._on_failed(int(value["worker"]), "\n".join(filter(None, (str(value["text"]), said))))
        elif kind == wire.ANSWER:
            value = json.loads(payload)
            self.on_answer(str(value["probe"]), value["found"])

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        data = os.read(self.process.stderr.fileno(), 65536)
        self._said = (self._said + data)[-_MAX_SAID_BYTES:]
        if not data:
            self._selector.unregister(self.process.stderr)
            self.process.stderr.close()

    def _end(self, stdout: Any) -> None:
        """The connection is gone, and with it, soon, what ran there."""
        self._selector.unregister(stdout)
        stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        if self.process.stderr is not None and not self.process.stderr.closed:
            os.set_blocking(self.process.stderr.fileno(), False)
            with contextlib.suppress(BlockingIOError):
                self._read_stderr()
        asked = self._finished
        self.finish()
        for number, channel in self._channels.items():
            if channel.is_open:
                channel.is_open = False
                self._hears[number](b"")
        if not asked:
            self._on_lost(self, self.error())

    def _send(self, message: bytes) -> None:
        if self.is_open:
            self._out += message
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self._stdin, self._out[:65536])]
        except BlockingIOError:
            if self._stdin not in self._selector.get_map():
                self._selector.register(self._stdin, selectors.EVENT_WRITE, self._flush)
            return
        except OSError:  # noticed where its output is read
            self._out.clear()
        if self._stdin in self._selector.get_map():
            self._selector.unregister(self._stdin)

    def _close_stdin(self) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            if self._stdin in self._selector.get_map():
                self._selector.unregister(self._stdin)
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class _RemoteChannel:
    """A supervisor on another host."""

    def __init__(self, link: HostLink, number: int) -> None:
        self._link, self._number = link, number
        self.host = link.host
        self.is_open = True

    def send(self, message: bytes) -> bool:
        return self._link.send_channel(self._number, message)

    def give_stdin(self) -> None:
        self.send(wire.encode(wire.STDIN))  # without: what is piped into this process is not carried to other hosts

    def kill(self, program: int | None) -> None:
        self._link.send_channel(self._number, b"")

    def lost(self) -> str | None:
        return None if self._link.is_open else f"The connection to the host is lost. {self._link.error().message}"

    def close(self) -> None:
        self.is_open = False
