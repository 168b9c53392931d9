"""Under Keras shares that change while pipelines read ahead: each sample of each pass once, on all workers together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.keras_data import COUNTS, DATA, ArrayFeed, BatchFeed, Feed
from hvdlm.adapters.keras_pipeline import DatasetFeed
from hvdlm.adapters.keras_shares import Shares
from hvdlm.adapters.keras_whole_batches import WholeBatches
from hvdlm.plan import Partition
from hvdlm.world import World

SAMPLES, BATCH, PASSES = 61, 8, 5
IDS = np.arange(SAMPLES)
Make = Callable[[Shares], Feed]


def arrays(shares: Shares) -> Feed:
    return ArrayFeed(
        IDS, IDS, None, None, batch_size=BATCH, shuffle=True, steps=None, shares=shares, per_worker=False, endless=False
    )


def endless_arrays(shares: Shares) -> Feed:
    return ArrayFeed(
        IDS, IDS, None, None, batch_size=BATCH, shuffle=True, steps=None, shares=shares, per_worker=False, endless=True
    )


def batches(shares: Shares) -> Feed:
    def read(number: int) -> Iterator[Any]:
        for start in range(0, SAMPLES, BATCH):
            yield IDS[start : start + BATCH], IDS[start : start + BATCH]

    return BatchFeed(read, next(read(0)), steps=8, shares=shares, endless=False)


def dataset(shares: Shares) -> Feed:
    data = tf.data.Dataset.from_tensor_slices((IDS, IDS)).batch(BATCH)
    return DatasetFeed(WholeBatches(data, shares, False), lambda ordered, number: ordered, endless=False)


def train(make: Make, balance: str = "dynamic") -> list[list[tuple[int, list[int]]]]:
    """By rank: pass and ids that count, of each step. Rank 1 takes five times as long a sample."""

    def work(collectives: ThreadCollectives) -> list[tuple[int, list[int]]]:
        rank, now, steps = collectives.rank, [0.0], []
        shares = Shares(
            Partition(strategy="hash", rank=rank, size=2, seed=0),
            world=World(rank=rank, size=2, local_rank=rank, local_size=2),
            collectives=collectives,
            dynamic=balance == "dynamic",
            clock=lambda: now[0],
        )
        feed = make(shares)
        read: Iterator[Any] | None = None
        for number in range(PASSES):
            feed.start(number)
            if read is None or make is not endless_arrays:
                read = iter(feed.dataset)
            for _ in range(8):
                element = next(read)
                count = int(element[COUNTS][0])
                assert int(element[COUNTS][1]) in (BATCH, SAMPLES % BATCH)
                shares.begin()
                now[0] += max(1, count) * (0.5 if rank else 0.1)
                time.sleep(0.002 * (1 - rank))  # the one reads ahead while the other agrees
                shares.end(count)
                steps.append((number, element[DATA][0].numpy()[:count].tolist()))
        return steps

    return FakeJob(2).run(work)


@pytest.mark.parametrize("make", [arrays, endless_arrays, batches, dataset])
def test_each_sample_once_while_shares_change(make: Make) -> None:
    ranks = train(make)
    for number in range(PASSES):
        seen = [i for steps in ranks for at, ids in steps if at == number for i in ids]
        assert sorted(seen) == IDS.tolist(), number
    for first, second in zip(*ranks, strict=True):
        assert len(first[1]) + len(second[1]) in (BATCH, SAMPLES % BATCH)
    first, last = ([len(steps[at][1]) for steps in ranks] for at in (0, -2))
    assert first == [4, 4] and last == [7, 1]  # 8 samples as 5 to 1


def test_without_it_shares_stay_and_nothing_is_exchanged() -> None:
    ranks = train(arrays, balance="none")
    assert all(len(ids) == 4 for steps in ranks for i, (_, ids) in enumerate(steps) if i % 8 < 7)


def test_what_was_planned_for_a_source_stays_when_another_is_read() -> None:
    shares = Shares(
        Partition(strategy="contiguous", rank=0, size=2, seed=0),
        world=World(rank=0, size=2, local_rank=0, local_size=2),
        collectives=_Five(),
        dynamic=True,
        clock=iter(range(1000)).__next__,
    )
    at, even = shares.follow(), [1.0, 1.0]
    assert at(0, 0).shares == even
    for _ in range(6):
        shares.begin()
        shares.end(1)
    assert at(0, 0).shares == even, "it was planned before all steps"
    assert at(0, 1).shares != even
    later = shares.follow()
    assert at(0, 0).shares == even != later(0, 0).shares


class _Five(ThreadCollectives):
    """Rank 1 takes five times as long as this one."""

    def __init__(self) -> None:
        pass

    def allreduce(self, array: Any, op: Any = "sum") -> Any:
        own = np.array(array)
        return own + np.array([0, 5 * own[0], 0, own[2]])

    def blocked(self) -> tuple[None, float]:
        return None, 0.0
