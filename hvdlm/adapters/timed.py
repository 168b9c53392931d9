"""Iterators that tell how long they were waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["timed"]

T = TypeVar("T")


def timed(items: Iterator[T], tell: Callable[[float], None]) -> Iterator[T]:
    """The items, telling for each how many seconds it took to come."""
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        tell(time.perf_counter() - start)
        yield item
