"""What adapters ask and tell in a run that does not keep its state: nothing happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

__all__ = ["Counted", "Straight"]


class Counted(Protocol):
    """The account of a run."""

    steps: int
    batches: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Straight:
    """See :class:`hvdlm.contracts.Course`."""

    skipping = False

    def done(self, loader: str, epoch: int) -> bool:
        """See :class:`hvdlm.contracts.Course`."""
        return False

    def boundary(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""

    def backward(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""

    def grown(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""

    def evaluation(self, batches: Iterator[Any]) -> Iterator[Any]:
        """See :class:`hvdlm.contracts.Course`."""
        return batches
