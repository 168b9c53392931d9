"""The collectives of a job of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.contracts import Op

__all__ = ["SingleCollectives"]


class SingleCollectives:
    """Collectives among one worker: nothing moves. See :class:`hvdlm.contracts.Collectives`."""

    on_wait: Callable[[str, float, float], None] | None = None

    def allreduce(self, array: npt.NDArray[Any], op: Op = "sum") -> npt.NDArray[Any]:
        """A copy of the argument."""
        return np.array(array)

    def blocked(self) -> tuple[tuple[str, float] | None, float]:
        """See :class:`hvdlm.contracts.Collectives`."""
        return None, 0.0

    def end_timeline(self) -> None:
        """See :class:`hvdlm.contracts.Collectives`."""

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """A copy of the argument."""
        return payload

    def allgather(self, payload: bytes) -> list[bytes]:
        """A copy of the argument."""
        return [payload]
