"""What a session of an elastic job has to know and tell. Implemented in :mod:`hvdlm.elastic`."""

from __future__ import annotations

from typing import Any, Protocol

from hvdlm.state.steward import Steward

__all__ = ["Part"]


class Part(Protocol):
    """This worker's part in an elastic job."""

    def lost(self) -> bool:
        """Whether a worker of this session was lost."""
        ...

    def boundary(self, steward: Steward, made: bool) -> None:
        """All workers are between the same two steps; ``made`` tells whether a commit was just made."""
        ...

    def restored(self, samples: int) -> None:
        """The state of a commit was restored, before which this many samples had been handed out."""
        ...

    def figures(self) -> dict[str, Any]:
        """What changes of the workers have cost so far, for the summary."""
        ...
