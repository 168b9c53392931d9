"""What scripts that were hardly edited need: a run begun and ended for them, a share of a tensor, downloads once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from hvdlm import api
from hvdlm.autowrap.scope import Scope
from hvdlm.recognise import part_of
from hvdlm.session import Session

__all__ = ["begin", "end", "main_first", "shard"]


def begin(framework: str) -> Session:
    """Start a run for what recognises a script's objects by itself; :func:`end` closes it."""
    api.init(framework)
    return api._current()


def end() -> None:
    """Close the run, if there is one."""
    api._finish_at_exit(failing=False)


def shard(tensor: Any, dim: int = 0) -> Any:
    """This worker's part of a tensor or array that the script makes its batches from: equal parts, in rank order.

    Args:
        tensor: Equal on all workers; its length along ``dim`` is a multiple of the number of workers.
        dim: The dimension that is cut: that of the independent streams.

    Returns:
        A view of the part.

    Raises:
        DataError: The dimension does not exist or cannot be cut into equal parts.

    Example:
        >>> data = hvdlm.shard(data, dim=1)  # doctest: +SKIP
    """
    session = api._current()
    if Scope.active is not None:
        Scope.active.has_data = True
    session.data_is_shared = True
    return part_of(tensor, dim, session.world)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body on rank 0 first, then on the others: for downloads and caches."""
    main = api.is_main()
    if not main:
        api.barrier()
    try:
        yield
    finally:
        if main:
            api.barrier()
