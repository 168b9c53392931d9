"""Knows when an outermost ``backward()`` starts and ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BackwardWatch"]


class BackwardWatch:
    """Knows when an outermost ``backward()`` starts and ends.

    ``torch.autograd.backward`` is wrapped while this is installed. A callback queued on the autograd engine would not
    do: re-entrant checkpointing runs a backward inside the backward, whose own callbacks run when *it* ends.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.before: list[Callable[[Any], None]] = []
        self.after: list[Callable[[], None]] = []
        self._original: Callable[..., Any] | None = None
        self._installed: Callable[..., Any] | None = None

    def install(self) -> None:
        """Start watching."""
        if self._original is not None:
            return
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            outermost = self.depth == 0
            if outermost:
                for begin in self.before:
                    begin(tensors)
            self.depth += 1
            try:
                original(tensors, *args, **kwargs)
            finally:
                self.depth -= 1
            if outermost:
                for end in self.after:
                    end()

        self._original, self._installed = original, backward
        torch.autograd.backward = backward

    def remove(self) -> None:
        """Stop watching."""
        if self._original is not None and torch.autograd.backward is self._installed:
            torch.autograd.backward = self._original
        self._original = self._installed = None
        self.before.clear()
        self.after.clear()
