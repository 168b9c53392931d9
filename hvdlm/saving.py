"""Writes what a script saves: on rank 0, atomically, while the other workers wait."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from hvdlm.contracts import Adapter
from hvdlm.errors import HvdlmError
from hvdlm.world import World

__all__ = ["save_on_main"]


def save_on_main(adapter: Adapter, world: World, value: Any, path: str) -> None:
    """Write an object on rank 0; every rank calls it.

    Args:
        adapter: Knows how the framework writes.
        world: Where this process stands.
        value: What the framework's own save takes.
        path: The file. A reader sees the old one or the new one, never half of one.

    Raises:
        HvdlmError: On the other ranks, if rank 0 could not write; there the error itself is raised.
    """
    error: BaseException | None = None
    if world.is_main:
        try:
            _save_atomically(adapter, value, path)
        except Exception as caught:  # the others must not wait for ever: they hear of it below
            error = caught
    (message,) = {adapter.collectives.broadcast(b"" if error is None else repr(error).encode())}
    if error is not None:
        raise error
    if message:
        raise HvdlmError(f"rank 0 could not save {path}: {message.decode()}", hint="check the path and the free space")


def _save_atomically(adapter: Adapter, value: Any, path: str) -> None:
    directory, name = os.path.split(os.path.abspath(path))
    # The same ending: frameworks choose the format by it.
    handle, partial = tempfile.mkstemp(dir=directory, prefix=".", suffix="-" + name)
    os.close(handle)
    try:
        adapter.save(value, partial)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
