"""Hosts that train on their own: who shares one, and what a worker's gradient counts in the sum over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hvdlm.adapters.torch_hosts import Host
from hvdlm.algorithms.hosts import host_ranks
from hvdlm.errors import ConfigError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

COUNTS, TOTAL = [2, 3, 1], 6


class Wire:
    """What one worker of three hears, on two hosts of two and one."""

    def __init__(self, rank: int, counts: list[int], sets: bool = True, places: Any = ((0, 2), (1, 2), (0, 1))) -> None:
        self.rank, self.size = rank, 3
        self._counts, self._sets, self._places = counts, sets, places

    def allreduce(self, own: Any) -> Any:
        return np.array(self._places)

    def among(self, hosts: list[list[int]]) -> Wire:
        if not self._sets:
            raise ValueError("no process sets")
        (own,) = [ranks for ranks in hosts if self.rank in ranks]
        inside = Wire(own.index(self.rank), [self._counts[rank] for rank in own])
        inside.size = len(own)
        return inside

    def begin(self, array: Any, name: str) -> Callable[[], Any]:
        assert int(array[0]) == self._counts[self.rank]
        return lambda: np.array([sum(self._counts)])


def host_of(rank: int, counts: list[int], **options: Any) -> tuple[Host, Share]:
    host = Host(Wire(rank, counts), World(rank=rank, size=3, local_size=2), Options(**options))  # type: ignore[arg-type]
    ids = np.arange(max(1, counts[rank]))
    return host, host.part_of(Share(ids, counts[rank], TOTAL))


def test_a_gradient_counts_by_its_part_of_the_hosts_samples() -> None:
    assert [host_of(rank, COUNTS)[1].fraction for rank in range(3)] == [2 / 5, 3 / 5, 1.0]
    host, _ = host_of(1, COUNTS)
    assert host.share is not None and (host.share.count, host.share.total, host.idle) == (3, 5, False)


def test_a_sum_takes_the_step_of_the_whole_batch() -> None:
    factors = [host_of(rank, COUNTS, reduction="sum")[1].fraction for rank in range(3)]
    assert factors == [6 / 5, 6 / 5, 6.0]


def test_a_host_without_samples_steps_along_zeros() -> None:
    host, share = host_of(0, [0, 0, 6])
    assert host.idle and share.fraction == 0.0
    assert host.share is not None and host.share.count / host.share.total == 0.5, "statistics of what keeps it in step"


@pytest.mark.parametrize(
    "places", [[(1, 2), (0, 2)], [(0, 2), (0, 2), (1, 2), (1, 2)], [(0, 2)], [(0, 1), (1, 2)], [(0, 2), (1, 1)]]
)
def test_ranks_of_a_host_have_to_follow_each_other(places: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="do not follow each other"):
        host_ranks(places)


def test_what_is_said_where_there_are_no_hosts() -> None:
    world, options = World(rank=0, size=3), Options()
    with pytest.raises(ConfigError, match="do not follow each other") as error:
        Host(Wire(0, COUNTS, places=((0, 2), (0, 1), (1, 2))), world, options)  # type: ignore[arg-type]
    assert "--map-by slot" in str(error.value.hint)
    with pytest.raises(ConfigError, match="after Horovod was started") as told:
        Host(Wire(0, COUNTS, sets=False), world, options)  # type: ignore[arg-type]
    assert "--local-group host" in str(told.value.hint)
