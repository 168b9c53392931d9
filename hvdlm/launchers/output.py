"""What the workers print, on one terminal: every line under the rank it is from, none cut by another."""

from __future__ import annotations

import os
import re
import select
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from hvdlm import wire
from hvdlm.launchers.base import JobSpec
from hvdlm.secrets import masked

__all__ = ["Output", "split_lines"]

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")
_COLOURS = (36, 33, 35, 32, 34, 31)
_MAX_PENDING_BYTES = 65536
_PIPE_BUF = 4096
"""A descriptor that is ready takes this many bytes without blocking."""

Source = tuple[int, bytes]


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    r"""Complete lines, each with its end, and the rest. A ``\r`` (progress bars redraw with it) ends a line too.

    >>> split_lines(b"a\r50%\rb\nc")
    ([b'a\r', b'50%\r', b'b\n'], b'c')
    """
    lines = _LINE.findall(data)
    return lines, data[sum(map(len, lines)) :]


class Output:
    """Merges the output of all workers into this process's stdout and stderr.

    Args:
        num_proc: Workers in the job; output of a job with one is passed on without prefix.
        colour: Whether prefixes may be coloured where the output is a terminal.
        timestamps: Whether each line starts with the time.
        directory: Where to write ``rank.N/stdout`` and ``rank.N/stderr`` as well.
        secrets: What messages of the launcher's own do not show; the workers' supervisors have masked their output.
        impatient: Asked while the output does not take more; if true, the data is dropped.
    """

    def __init__(
        self,
        num_proc: int,
        *,
        colour: bool = True,
        timestamps: bool = False,
        directory: str | None = None,
        secrets: Sequence[str] = (),
        impatient: Callable[[], bool] = lambda: False,
    ) -> None:
        self._num_proc, self._timestamps, self._impatient = num_proc, timestamps, impatient
        self._secrets = tuple(secrets)
        self._terminal = {fd: os.isatty(fd) for fd in (1, 2)}
        self._colour = colour
        self._pending: dict[Source, bytes] = {}
        self._shown_partial: Source | None = None
        self._redrawn = False
        self._continues: set[Source] = set()
        self._directory = None if directory is None else Path(directory)
        self._files: dict[Source, BinaryIO] = {}
        self._queue: list[tuple[int, bytearray]] = []
        self.broken = False
        """Whether nobody reads our output any more."""

    @classmethod
    def of(cls, spec: JobSpec, num_proc: int, impatient: Callable[[], bool]) -> Output:
        """That of a job."""
        return cls(
            num_proc,
            colour=not spec.environment.get("NO_COLOR") and spec.environment.get("TERM") != "dumb",
            timestamps=bool(spec.flags.get("prefix_output_with_timestamp")),
            directory=spec.flags.get("output_filename"),
            secrets=spec.secrets,
            impatient=impatient,
        )

    def feed(self, rank: int, kind: bytes, data: bytes) -> None:
        """Take a piece of a worker's output."""
        source = (rank, kind)
        if self._directory is not None:
            self._file(source).write(data)
        lines, rest = split_lines(self._pending.pop(source, b"") + data)
        # A bar may be "\r" + text: its text has no end yet, and the "\r" before it belongs to what is shown already.
        for line in lines:
            self._emit(source, line)
        if len(rest) > _MAX_PENDING_BYTES:
            self._emit(source, rest)
        elif rest:
            self._pending[source] = rest
        self._drain()

    def flush(self) -> None:
        """Show what has no end of line yet: a prompt, a bar."""
        pending, self._pending = self._pending, {}
        for source, rest in pending.items():
            self._emit(source, rest)
        self._drain()

    @property
    def has_pending(self) -> bool:
        """Whether :meth:`flush` would show something."""
        return bool(self._pending)

    def message(self, text: str) -> None:
        """A line of the launcher's own, on stderr."""
        shown = f"hvdlm: {masked(text, self._secrets)}\n"
        self._write(2, self._close_line(2) + shown.encode(errors="replace"))
        self._drain()

    def command(self, words: Sequence[str]) -> None:
        """A command that is run, as a person would type it; ``--verbose`` shows them."""
        self.message(shlex.join(masked(words, self._secrets)))  # before quoting, which may cut a secret in two

    def close(self) -> None:
        """Show what is left, end the last line and close the files."""
        self.flush()
        if self._shown_partial is not None:
            fd = self._fd(self._shown_partial)
            self._write(fd, b"\n")
            self._shown_partial = None
        self._drain()
        for file in self._files.values():
            file.close()

    def _emit(self, source: Source, line: bytes) -> None:
        fd = self._fd(source)
        text = line.rstrip(b"\r\n")
        end = line[len(text) :]
        own = self._shown_partial == source
        if not text and end == b"\r" and not own:
            return  # a bar's first return to the start of a line that is empty
        out = b"" if own else self._close_line(fd)
        if (text or end.endswith(b"\n")) and not (own and source in self._continues):
            out += self._prefix(source, fd)
        self._write(fd, out + text + end)
        if end.endswith(b"\n"):
            self._shown_partial, self._redrawn = None, False
            self._continues.discard(source)
        else:
            self._shown_partial, self._redrawn = source, self._redrawn or end == b"\r"
            if end == b"\r":
                self._continues.discard(source)
            else:
                self._continues.add(source)

    def _close_line(self, fd: int) -> bytes:
        """End the unfinished line another source has left; on a terminal a bar is wiped, as it is drawn again."""
        shown, redrawn = self._shown_partial, self._redrawn
        if shown is None:
            return b""
        other = self._fd(shown)
        self._shown_partial, self._redrawn = None, False
        self._continues.discard(shown)
        end = b"\r\x1b[K" if redrawn and self._terminal[other] else b"\n"
        if other == fd or (self._terminal[other] and self._terminal[fd]):
            return end
        self._write(other, b"\n")
        return b""

    def _prefix(self, source: Source, fd: int) -> bytes:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self._timestamps else ""
        rank = source[0]
        if self._num_proc == 1:
            return stamp.encode()
        if self._colour and self._terminal[fd]:
            return f"{stamp}\x1b[{_COLOURS[rank % len(_COLOURS)]}m[{rank}]\x1b[0m ".encode()
        return f"{stamp}[{rank}] ".encode()

    @staticmethod
    def _fd(source: Source) -> int:
        return 1 if source[1] == wire.STDOUT else 2

    def _file(self, source: Source) -> BinaryIO:
        if source not in self._files:
            assert self._directory is not None
            rank, kind = source
            folder = self._directory / f"rank.{rank:0{len(str(max(self._num_proc - 1, 1)))}d}"
            folder.mkdir(parents=True, exist_ok=True)
            name = "stdout" if kind == wire.STDOUT else "stderr"
            self._files[source] = open(folder / name, "wb", buffering=0)  # noqa: SIM115 - until close()
        return self._files[source]

    def _write(self, fd: int, data: bytes) -> None:
        if self._queue and self._queue[-1][0] == fd:
            self._queue[-1][1].extend(data)
        else:
            self._queue.append((fd, bytearray(data)))

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for fd, data in queue:
            view = memoryview(data)
            while view and not self.broken:
                hurry = self._impatient()
                if not select.select([], [fd], [], 0 if hurry else 0.25)[1]:
                    if hurry:
                        break
                    continue
                try:
                    view = view[os.write(fd, view[:_PIPE_BUF]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    self.broken = True
