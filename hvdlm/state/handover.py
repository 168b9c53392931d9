"""Hands commits from a process to the one that takes its place (``exec``), through memory that has no name."""

from __future__ import annotations

import json
import os
import struct

import numpy as np

from hvdlm.state.history import History, header_of, with_header

__all__ = ["hand_over", "take_over"]

_LENGTH = struct.Struct("!Q")


def hand_over(history: History) -> int | None:
    """Write the commits of a history; returns a descriptor that is open in the next program, None for no commits."""
    if not history.numbers:
        return None
    handle = os.memfd_create("hvdlm-commits", 0)
    with open(handle, "wb", closefd=False) as file:
        for commit in history.commits:
            header = json.dumps([history.position, header_of(commit)]).encode()
            file.write(_LENGTH.pack(len(header)))
            file.write(header)
            file.write(commit.data.data)
    return handle


def take_over(handle: int, history: History) -> None:
    """Hold the commits that the process before has handed over."""
    with open(handle, "rb") as file:
        file.seek(0)
        while start := file.read(_LENGTH.size):
            position, header = json.loads(file.read(_LENGTH.unpack(start)[0]))
            data = np.empty(header[-1], dtype=np.uint8)
            file.readinto(data.data)
            history.add(with_header(header, data))
            history.position = position
