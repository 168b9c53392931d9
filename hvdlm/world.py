"""The topology of a job: one frozen value, made once and passed in."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

__all__ = ["World"]


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among the workers of the job.

    >>> World.single().size
    1
    """

    rank: int = 0
    """Index of this worker, 0 <= rank < size."""
    size: int = 1
    """Number of workers."""
    local_rank: int = 0
    """Index of this worker on its host."""
    local_size: int = 1
    """Number of workers on this host."""
    cross_rank: int = 0
    """Index of this host among the hosts that have a worker with this local rank."""
    cross_size: int = 1
    """Number of hosts that have a worker with this local rank."""
    host: str = field(default_factory=socket.gethostname)
    """Name of this host."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)
        assert 0 <= self.local_rank < self.local_size, (self.local_rank, self.local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that speaks for the job (rank 0)."""
        return self.rank == 0

    @property
    def within_host(self) -> bool:
        """Whether all workers are on one host."""
        return self.local_size == self.size

    @classmethod
    def single(cls) -> World:
        """The world of a script that was not launched: one process."""
        return cls()
