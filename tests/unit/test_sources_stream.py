"""Streams: every sample once, in order, at any number of workers, and on from anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.errors import ConfigError, DataError
from hvdlm.plan import Partition
from hvdlm.sources import Stream


def part(rank: int, size: int, strategy: str = "contiguous", weights: tuple[float, ...] = ()) -> Partition:
    return Partition(strategy=strategy, rank=rank, size=size, seed=0, weights=weights)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=4).filter(any),
    strategy=st.sampled_from(["contiguous", "random", "hash"]),
    cut=st.integers(0, 60),
)
def test_every_sample_once(length: int, batch_size: int, weights: list[float], strategy: str, cut: int) -> None:
    """Each global batch is the next slice, whoever computes what of it, also after a resume."""
    start = min(cut, length - 1)
    stream = Stream(lambda: (f"sample {number}" for number in range(length)))
    size = len(weights)
    workers = [
        list(stream.batches(part(rank, size, strategy, tuple(weights)), batch_size, start=start))
        for rank in range(size)
    ]
    steps = -(-(length - start) // batch_size)
    assert [len(worker) for worker in workers] == [steps] * size
    for step in range(steps):
        first, last = start + step * batch_size, min(start + (step + 1) * batch_size, length)
        ids: list[int] = []
        for worker in workers:
            share, samples = worker[step]
            assert share.total == last - first
            assert samples == [f"sample {number}" for number in share.ids.tolist()] and samples
            if not share.is_filler:
                ids += share.ids.tolist()
        assert sorted(ids) == list(range(first, last))


def test_resumed_with_another_world_and_batch_size() -> None:
    stream = Stream(range(100))
    seen = [
        n for rank in (0, 1) for _, samples in itertools.islice(stream.batches(part(rank, 2), 10), 3) for n in samples
    ]
    for rank in range(3):
        for share, samples in stream.batches(part(rank, 3), 7, start=30):
            seen += samples[: share.count]
    assert sorted(seen) == list(range(100))


def test_no_more_than_a_batch_is_read_ahead() -> None:
    taken = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    batches = Stream(endless).batches(part(1, 2), 8)
    assert next(batches)[1] == [4, 5, 6, 7]
    assert len(taken) == 8


def test_drop_last() -> None:
    assert [samples for _, samples in Stream(range(10)).batches(part(0, 1), 4, drop_last=True)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_none_means_everything_on_every_worker() -> None:
    shares = list(Stream(range(5)).batches(part(1, 3, "none"), 4))
    assert [samples for _, samples in shares] == [[0, 1, 2, 3], [4]]
    assert [share.total for share, _ in shares] == [12, 3]


def test_an_iterator_serves_one_epoch() -> None:
    stream = Stream(iter("abc"))
    assert [samples for _, samples in stream.batches(part(0, 1), 3)] == [["a", "b", "c"]]
    with pytest.raises(DataError, match="gone through only once"):
        next(stream.batches(part(0, 1), 3))
    again = Stream(list("abc"))
    assert [len(list(again.batches(part(0, 1), 3))) for _ in range(2)] == [1, 1]


def test_bad_streams() -> None:
    with pytest.raises(DataError, match="cannot be made of a int"):
        Stream(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the stream is empty"):
        next(Stream([]).batches(part(0, 1), 3))
    with pytest.raises(DataError, match="ended after 3 samples, and 5 of it were trained on"):
        next(Stream(range(3)).batches(part(0, 1), 3, start=5))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        next(Stream(range(3)).batches(part(0, 1), 0))
    with pytest.raises(ConfigError, match="start is -1"):
        next(Stream(range(3)).batches(part(0, 1), 1, start=-1))


def test_resumed_at_the_very_end_there_is_nothing_left() -> None:
    assert list(Stream(range(3)).batches(part(0, 1), 2, start=3)) == []
