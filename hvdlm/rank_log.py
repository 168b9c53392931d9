"""What one worker prints, in two files that only the person can read. Standard library only."""

from __future__ import annotations

import os
from typing import BinaryIO

from hvdlm import wire

__all__ = ["RankLog"]


class RankLog:
    """``rank-N.out.log`` and ``rank-N.err.log``.

    Args:
        directory: Where they are written.
        rank: The worker's rank.
    """

    def __init__(self, directory: str, rank: int) -> None:
        self._files: dict[bytes, BinaryIO] = {}
        for kind, name in ((wire.STDOUT, "out"), (wire.STDERR, "err")):
            path = os.path.join(directory, f"rank-{rank}.{name}.log")
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            self._files[kind] = open(fd, "wb", buffering=0)  # noqa: SIM115 - until close()

    def feed(self, kind: bytes, data: bytes) -> None:
        """Write a piece of output of one kind, :data:`hvdlm.wire.STDOUT` or :data:`hvdlm.wire.STDERR`."""
        self._files[kind].write(data)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
