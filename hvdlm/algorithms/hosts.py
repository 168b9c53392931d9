"""Which workers share a host, from what each knows of its own place."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["host_ranks"]


def host_ranks(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The ranks of each host.

    >>> host_ranks([(0, 2), (1, 2), (0, 1)])
    [[0, 1], [2]]

    Args:
        places: (rank among the workers of its host, their number), by rank.

    Raises:
        ValueError: The ranks of a host do not follow each other, so that nobody can tell whose they are.
    """
    hosts: list[list[int]] = []
    for rank, (local_rank, local_size) in enumerate(places):
        if local_rank == 0:
            hosts.append([])
        if not hosts or len(hosts[-1]) != local_rank or places[hosts[-1][0] if hosts[-1] else rank][1] != local_size:
            raise ValueError(f"the ranks of the host of rank {rank} do not follow each other")
        hosts[-1].append(rank)
    for ranks in hosts:
        if len(ranks) != places[ranks[0]][1]:
            raise ValueError(f"the ranks of the host of rank {ranks[0]} do not follow each other")
    return hosts
