"""Runs one program as a worker: passes on what it prints, ends it when told, and says how it ended."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections import deque
from typing import Any

from hvdlm import wire
from hvdlm.memory import MemoryWatch, yield_memory_first
from hvdlm.noise import without_noise
from hvdlm.processes import adopt_orphans, children, die_with_parent
from hvdlm.rank_log import RankLog
from hvdlm.secrets import Masker, secret_arguments, secret_values

__all__ = ["Supervisor"]

_TAIL_BYTES = 65536
_SECONDS_TO_DRAIN = 0.5
"""How long a program's own children may hold its output open after it has ended."""
_SECONDS_TO_SAY_WHERE = 0.5
"""From SIGABRT, at which Python shows where it is, to SIGKILL."""
_SECONDS_TO_HOLD = 1.0
"""How long the start of what may be a secret waits for the rest."""


class Supervisor:
    """Runs one program.

    Args:
        command: The program and its arguments.
        rank: This worker's rank.
        size: Workers in the job.
        log_dir: Where ``rank-N.out.log`` and ``rank-N.err.log`` are written, None for no logs.
        launcher: The connected socket of the launcher, None to write to stdout and stderr.
        stdin: The program's standard input; None for our own.
        environment: The program's environment; None for our own.
    """

    def __init__(
        self,
        command: list[str],
        rank: int,
        size: int,
        log_dir: str | None,
        launcher: socket.socket | None,
        stdin: int | None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.command, self.rank, self.size, self.launcher, self.stdin = command, rank, size, launcher, stdin
        self.environment = environment
        self.tail: deque[bytes] = deque()
        self.tail_size = 0
        self.shows_noise = False
        self.asked: int | None = None  # the first signal somebody asked us to send
        self.traceback_before_asked = False
        self.troubled = False
        self.deadlines: list[tuple[float, int]] = []
        self.log = None if log_dir is None else RankLog(log_dir, rank)
        secrets = (*secret_arguments(command), *secret_values(os.environ if environment is None else environment))
        self.maskers = {kind: Masker(secrets) for kind in (wire.STDOUT, wire.STDERR)}
        self.at_line_start = {wire.STDOUT: True, wire.STDERR: True}
        self.child: subprocess.Popen[bytes] | None = None
        self.memory = MemoryWatch(None)
        """Ends the program when it uses too much."""
        self.nice = 0
        """By how much the program's priority is lower than ours."""

    def run(self) -> int:
        """Run the program to its end; returns its exit code, 128 + signal number if a signal ended it."""
        adopt_orphans()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda number, _: self.ask(number))
        signal.signal(signal.SIGUSR1, lambda *_: self.trouble())  # see report_uncaught_exceptions
        signal.signal(signal.SIGCHLD, lambda *_: None)
        started = time.time()
        try:
            # close_fds=False: MPICH hands its PMI connection down as an open descriptor. Ours are all close-on-exec.
            self.child = child = subprocess.Popen(
                self.command,
                stdin=self.stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                close_fds=False,
                env=self.environment,
                preexec_fn=self.prepare_child,  # noqa: PLW1509 - there are no other threads here
            )
        except OSError as error:
            text = f"cannot run {self.command[0]!r}: {error.strerror}\n"
            self.output(wire.STDERR, text.encode())
            return self.ended(127 if isinstance(error, FileNotFoundError) else 126, started)
        finally:
            if self.stdin is not None and self.stdin >= 0:
                os.close(self.stdin)
        assert child.stdout is not None and child.stderr is not None
        self.send_json(wire.STARTED, {"pid": child.pid})
        selector = selectors.DefaultSelector()
        selector.register(child.stdout, selectors.EVENT_READ, wire.STDOUT)
        selector.register(child.stderr, selectors.EVENT_READ, wire.STDERR)
        selector.register(wake_read, selectors.EVENT_READ, "wake")
        if self.launcher is not None:
            selector.register(self.launcher, selectors.EVENT_READ, "launcher")
        decoder, open_pipes, drain_until = wire.Decoder(), 2, None
        while True:
            now = time.monotonic()
            for entry in [entry for entry in self.deadlines if entry[0] <= now]:
                self.deadlines.remove(entry)
                self.signal_group(entry[1])
            if child.poll() is not None:
                drain_until = drain_until or now + _SECONDS_TO_DRAIN
                if open_pipes == 0 or now >= drain_until:
                    break
            waits = [deadline - now for deadline, _ in self.deadlines] + ([drain_until - now] if drain_until else [])
            holding = any(masker.holds for masker in self.maskers.values())
            waits += [_SECONDS_TO_HOLD] if holding else []
            waits += [] if self.memory.seconds is None else [self.memory.seconds]
            ready = selector.select(max(0.0, min(waits)) if waits else None)
            if holding and not ready:
                self.release()
            if self.memory.is_passed(child.pid):
                self.end_for_memory(child.pid)
            for key, _ in ready:
                if key.data == "wake":
                    os.read(wake_read, 4096)
                elif key.data == "launcher":
                    self.listen(selector, decoder)
                else:
                    data = os.read(key.fd, 65536)
                    if data:
                        self.output(key.data, data)
                    else:
                        selector.unregister(key.fileobj)
                        open_pipes -= 1
        self.kill_descendants()
        self.release()
        code = child.returncode
        return self.ended(code if code >= 0 else 128 - code, started, -code if code < 0 else None)

    def listen(self, selector: selectors.BaseSelector, decoder: wire.Decoder) -> None:
        """Act on what the launcher sent; end the program if the launcher is gone."""
        assert self.launcher is not None
        try:
            data = self.launcher.recv(4096)
        except OSError:
            data = b""
        for kind, _ in decoder.feed(data):
            if kind == wire.KILL:
                self.ask(signal.SIGKILL)
            else:
                self.ask(signal.SIGINT if kind == wire.INTERRUPT else signal.SIGTERM)
        if not data:
            selector.unregister(self.launcher)
            self.launcher = None
            self.ask(signal.SIGTERM)

    def ask(self, signum: int) -> None:
        """Pass a signal on to the program, and see that it ends soon."""
        if self.asked is None:
            self.asked = signum
            self.traceback_before_asked = wire.last_traceback(b"".join(self.tail)) is not None
        now = time.monotonic()
        if signum == signal.SIGINT:
            self.deadlines.append((now + wire.SECONDS_TO_INTERRUPT, signal.SIGTERM))
            now += wire.SECONDS_TO_INTERRUPT
        if signum != signal.SIGKILL:
            self.deadlines.append((now + wire.SECONDS_TO_TERMINATE, signal.SIGKILL))
        self.signal_group(signum)

    def end_for_memory(self, pid: int) -> None:
        """Have the program say where it is, and end it."""
        used, limit = self.memory.found_mib, self.memory.limit_mib
        text = f"hvdlm: rank {self.rank} uses {used:,} MiB of memory, and may use {limit:,}: it is ended here:\n"
        self.output(wire.STDERR, text.encode())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
        self.deadlines.append((time.monotonic() + _SECONDS_TO_SAY_WHERE, signal.SIGKILL))

    def signal_group(self, signum: int) -> None:
        """Send the program's process group a signal."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signum)

    def kill_descendants(self) -> None:
        """Kill what the program left behind: its group, and children of any group (we are their subreaper)."""
        self.signal_group(signal.SIGKILL)
        for _ in range(20):
            pids = children()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, ChildProcessError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

    def output(self, kind: bytes, data: bytes) -> None:
        """Log a piece of output and pass it on, without secrets."""
        self.show(kind, self.maskers[kind].feed(data))

    def release(self) -> None:
        """Show what may have been the start of a secret."""
        for kind, masker in self.maskers.items():
            self.show(kind, masker.flush())

    def show(self, kind: bytes, data: bytes) -> None:
        """Log and pass on what has no secret in it."""
        if not data:
            return
        if self.log is not None:
            self.log.feed(kind, data)
        if kind == wire.STDERR:
            data = data if self.shows_noise else without_noise(data)
            if b"Horovod" in data and wire.is_secondary(data.decode(errors="replace")):
                self.trouble()
            self.tail.append(data)
            self.tail_size += len(data)
            while self.tail_size - len(self.tail[0]) >= _TAIL_BYTES:
                self.tail_size -= len(self.tail.popleft())
        if self.launcher is not None:
            self.send(wire.encode(kind, data))
            return
        fd = 1 if kind == wire.STDOUT else 2
        prefix = f"[{self.rank}] ".encode() if self.size > 1 else b""
        for line in data.splitlines(keepends=True):
            text = prefix + line if self.at_line_start[kind] else line
            self.at_line_start[kind] = line.endswith((b"\n", b"\r"))
            try:
                os.write(fd, text)
            except OSError:
                return

    def trouble(self) -> None:
        """Tell that the program is going to fail: it may take its time to end, or wait for a thread for ever."""
        if not self.troubled:
            self.troubled = True
            self.send_json(wire.TROUBLE, {})

    def ended(self, code: int, started: float, signum: int | None = None) -> int:
        """Tell how the program ended."""
        tail = b"".join(self.tail)
        traceback = wire.last_traceback(tail)
        end = tail[-4096:].decode(errors="replace")
        # An abort in native code says why before its traceback.
        said = traceback if traceback is not None and not traceback.startswith("Fatal") else end
        self.send_json(
            wire.ENDED,
            {
                "rank": self.rank,
                "host": socket.gethostname(),
                "code": code,
                "signal": signum,
                "seconds": time.time() - started,
                "time": time.time(),
                "traceback": traceback,
                "tail": end,
                "secondary": self.memory.found_mib is None and wire.is_secondary(said),
                "memory_mib": self.memory.found_mib,
                "max_memory_mib": self.memory.limit_mib,
                "asked": self.asked,
                "traceback_before_asked": self.traceback_before_asked,
            },
        )
        if self.log is not None:
            self.log.close()
        return code

    def send_json(self, kind: bytes, value: dict[str, Any]) -> None:
        """Send a control message if there is a launcher to hear it."""
        if self.launcher is not None:
            self.send(wire.encode_json(kind, value))

    def send(self, message: bytes) -> None:
        """Send; a launcher that is gone is noticed when the socket is read."""
        assert self.launcher is not None
        with contextlib.suppress(OSError):
            self.launcher.sendall(message)

    def prepare_child(self) -> None:
        """What the program's process does before it becomes the program."""
        os.setpgid(0, 0)
        die_with_parent()
        os.nice(self.nice)
        if self.memory.limit_mib is not None:
            yield_memory_first()
