"""Copies that are made while training goes on: of what nothing changes before the next step of an optimizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Copying"]


class Copying:
    """Copies made in a thread of its own, one after the other.

    Args:
        copies: (tensor, what copies it).
        version: A number of a tensor that another value follows each change of it.
    """

    def __init__(self, copies: Sequence[tuple[Any, Callable[[], None]]], version: Callable[[Any], int]) -> None:
        self._copies, self._version = copies, version
        self._before = [version(value) for value, _ in copies]
        self._good = False
        self._done = threading.Event()
        threading.Thread(target=self._run, name="hvdlm-copy", daemon=True).start()

    def _run(self) -> None:
        try:
            for _, copy in self._copies:
                copy()
            self._good = [self._version(value) for value, _ in self._copies] == self._before
        finally:
            self._copies = ()
            self._done.set()

    def wait(self) -> bool:
        """Wait until all is copied; False if something was changed meanwhile, so that the copy is of no moment."""
        self._done.wait()
        return self._good
