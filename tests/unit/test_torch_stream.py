"""Streams in a DataLoader: every sample once, in one order, whoever reads; no hang where they end apart."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.errors import DataError
from hvdlm.sources import Stream
from tests.unit.test_torch_resume import READERS, Worker


class Count(IterableDataset[torch.Tensor]):
    """The numbers from 0 on, shared out among loader workers."""

    def __init__(self, n: int = 45) -> None:
        self.n = n

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(torch.arange(first, self.n, step))


class Shuffled(IterableDataset[torch.Tensor]):
    """The same, in an order drawn from everybody's global random numbers, anew each epoch."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        ids = [int(i) for i in torch.randperm(45)]
        random.shuffle(ids)
        return iter(torch.tensor([ids[i] for i in np.random.permutation(45)]))


def sequence(batch: Any) -> list[int]:
    tensor = batch if isinstance(batch, torch.Tensor) else batch[0]
    return tensor.tolist()  # type: ignore[no-any-return]


def read(
    size: int, data: Callable[[int], DataLoader[Any]], state: str | None = None, steps: int = 1000, **options: Any
) -> tuple[list[list[int]], str]:
    """Global batches of the rest of an epoch, at most some steps of it, and the state then."""

    def work(collectives: ThreadCollectives) -> tuple[list[list[int]], str]:
        worker = Worker(collectives, data(collectives.rank), **options)
        if state is not None:
            worker.loader.load_state_dict(json.loads(state))
        found = []
        random.seed(collectives.rank)  # scripts need not seed Python's and NumPy's
        for batch in worker.loader:
            assert worker.share is not None
            found.append(sequence(batch)[: worker.share.count])
            worker.loader.trained()
            torch.rand(collectives.rank + 1)
            if len(found) == steps:
                break
        return found, json.dumps(worker.loader.state_dict())

    results = FakeJob(size).run(work)
    assert len({kept for _, kept in results}) == 1
    steps_of_all = zip(*(found for found, _ in results), strict=True)
    return [[i for part in parts for i in part] for parts in steps_of_all], results[0][1]


def ids(n: int, batch: int) -> list[list[int]]:
    return [list(range(start, min(start + batch, n))) for start in range(0, n, batch)]


@pytest.mark.parametrize("partition", ["hash", "contiguous"])
@pytest.mark.parametrize(("size", "weights"), [(1, ()), (2, ()), (3, (1, 2, 4)), (3, (0, 1, 1)), (4, ())])
@pytest.mark.parametrize("balance", ["static", "dynamic"])
def test_each_sample_once_in_the_streams_order(
    partition: str, size: int, weights: tuple[int, ...], balance: str
) -> None:
    found, state = read(
        size, lambda _: DataLoader(Count(), batch_size=7), partition=partition, weights=weights, balance=balance
    )
    assert found == ids(45, 7)
    assert json.loads(state)["cursor"] == {"epoch": 1, "batch": 0, "samples": 0}


def test_every_worker_gets_all_under_none() -> None:
    found, _ = read(2, lambda _: DataLoader(Count(10), batch_size=5), partition="none")
    assert found == [[0, 1, 2, 3, 4] * 2, [5, 6, 7, 8, 9] * 2]


def test_a_batch_per_worker() -> None:
    found, _ = read(3, lambda _: DataLoader(Count(20), batch_size=2, drop_last=True), batch="per_worker")
    assert found == ids(18, 6)


def test_loader_workers_read_as_in_one_process() -> None:
    multiprocessing.set_forkserver_preload(["torch.utils.data"])
    more: dict[str, Any] = {**READERS, "num_workers": 2}
    alone = [sequence(batch) for batch in DataLoader(Count(), batch_size=7, **more)]
    together, state = read(2, lambda _: DataLoader(Count(), batch_size=7, **more), steps=3)
    assert together == alone[:3] != ids(45, 7)[:3]
    rest, _ = read(3, lambda _: DataLoader(Count(), batch_size=7, **more), state)
    assert together + rest == alone
    with pytest.raises(DataError, match=r"another sampler(.|\n)*2 loader workers"):
        read(1, lambda _: DataLoader(Count(), batch_size=7), state)


@pytest.mark.parametrize("dataset", [Count, Shuffled])
def test_resumed_by_replay_at_another_size(dataset: Callable[[], IterableDataset[Any]]) -> None:
    two, three = (2, 3) if dataset is Count else (1, 1)  # threads of one process share its random numbers
    whole, end = read(1, lambda _: DataLoader(dataset(), batch_size=7))
    first, state = read(two, lambda _: DataLoader(dataset(), batch_size=7), steps=3)
    weights: dict[str, Any] = {"weights": (1, 5, 1), "balance": "static"} if three == 3 else {}
    rest, _ = read(three, lambda _: DataLoader(dataset(), batch_size=7), state, **weights)
    assert first + rest == whole and sorted(i for batch in whole for i in batch) == list(range(45))
    second, _ = read(two, lambda _: DataLoader(dataset(), batch_size=7), end)
    assert (second == whole) == (dataset is Count), "what is drawn at random is drawn anew in the next epoch"


def test_generators_in_a_stream() -> None:
    def made() -> Iterator[int]:
        yield from range(20)

    found, _ = read(2, lambda _: DataLoader(Stream(made), batch_size=6))  # type: ignore[arg-type]
    assert found == ids(20, 6)
    with pytest.raises(DataError, match=r"each of which would read all(.|\n)*num_workers=1"):
        read(1, lambda _: DataLoader(Stream(made), batch_size=6, num_workers=2))  # type: ignore[arg-type]


def test_left_early_and_begun_again() -> None:
    def work(collectives: ThreadCollectives) -> list[int]:
        worker = Worker(collectives, DataLoader(Count(9), batch_size=4))
        next(iter(worker.loader))
        return [len(batch) for batch in worker.loader]

    assert FakeJob(2).run(work) == [[2, 2, 1], [2, 2, 1]]


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ((Count(45), Count(30)), "batch 4 of the stream does not have as many samples on each rank"),
        ((Count(45), Count(28)), "batch 4 of the stream does not have as many"),
        ((Count(45), [torch.tensor(i) for i in range(45)][::-1]), "batch 0 of the stream begins otherwise"),
        ((Count(0), Count(0)), "the stream is empty"),
    ],
)
def test_streams_that_differ_end_in_an_error_on_every_rank(streams: tuple[Any, Any], message: str) -> None:
    def work(collectives: ThreadCollectives) -> str:
        stream = streams[collectives.rank]
        dataset = stream if isinstance(stream, Count) else Stream(stream)
        worker = Worker(collectives, DataLoader(dataset, batch_size=7))  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message) as caught:
            for _ in worker.loader:
                pass
        return str(caught.value)

    told = FakeJob(2).run(work)
    assert told[0] == told[1]


def test_a_stream_that_is_shorter_than_what_was_trained_on() -> None:
    _, state = read(2, lambda _: DataLoader(Count(45), batch_size=7), steps=5)
    with pytest.raises(DataError, match="35 were trained on"):
        read(2, lambda _: DataLoader(Count(20), batch_size=7), state)


def test_length_is_asked_of_the_dataset() -> None:
    def work(collectives: ThreadCollectives) -> int:
        data = Count(45)
        with pytest.raises(TypeError):
            len(Worker(collectives, DataLoader(data, batch_size=7)).loader)
        Sized = type("Sized", (Count,), {"__len__": lambda self: self.n})
        return len(Worker(collectives, DataLoader(Sized(45), batch_size=7)).loader)

    assert FakeJob(2).run(work) == [7, 7]


def test_what_a_stream_cannot_have_is_refused() -> None:
    with pytest.raises(DataError, match="cannot shuffle"):
        read(2, lambda _: DataLoader(Count(45), batch_size=7), partition="random")
    with pytest.raises(DataError, match="cut in order, not by key"):
        read(2, lambda _: DataLoader(Count(45), batch_size=7), key="document")
