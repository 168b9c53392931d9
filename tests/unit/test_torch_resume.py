"""The state of a sharded loader: interrupted at random and gone on with at another size, every sample counts once."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.torch_loader import ShardedLoader
from hvdlm.algorithms.permutation import KeyedPermutation
from hvdlm.errors import DataError, MismatchError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.sources import open_files
from hvdlm.world import World

# Workers of a DataLoader are never forked from this process, in which the job's other workers are running threads: a
# lock that one of them holds at that moment would stay locked in the child for ever.
multiprocessing.set_forkserver_preload(["torch.utils.data"])  # or each worker would import it anew
READERS = {"num_workers": 1, "multiprocessing_context": "forkserver"}


class Silent:
    """A recorder that notes the epochs it is told of."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, int]] = []

    def data(self, *_: Any) -> None: ...

    def batch(self, *_: Any) -> None: ...

    def epoch(self, loader: str, number: int, num_samples: int, num_planned: int, steps: int) -> None:
        self.epochs.append((num_planned, steps))

    def epoch_done(self, *_: Any) -> None: ...


class Worker:
    """One worker's loader over samples that are their own ids."""

    def __init__(self, collectives: ThreadCollectives, data: DataLoader[Any], **options: Any) -> None:
        self.share: Share | None = None
        self.recorder = Silent()
        size, rank = collectives.job.size, collectives.rank
        self.loader = ShardedLoader(
            data,
            name="data",
            options=Options(**options),
            world=World(rank=rank, size=size, local_rank=rank, local_size=size),
            collectives=collectives,
            recorder=self.recorder,
            evaluating=lambda: False,
            announce=self._announce,
            evaluated=lambda _: None,
            weights=options.get("weights", ()),
        )

    def _announce(self, share: Share) -> None:
        self.share = share

    def ids(self, batch: list[torch.Tensor]) -> list[int]:
        assert self.share is not None
        return batch[0][: self.share.count].tolist()  # type: ignore[no-any-return]


def dataset(n: int = 61) -> TensorDataset:
    return TensorDataset(torch.arange(n))


def run(workers: int, data: Any, state: str | None, steps: int, saved: int, **options: Any) -> tuple[str, list[Any]]:
    """A job of some steps, of which the first ``saved`` are in the state it leaves: (state, [(epoch, ids)])."""

    def work(collectives: ThreadCollectives) -> tuple[str, list[tuple[int, list[int]]]]:
        worker = Worker(collectives, data(), **options)
        if state is not None:
            worker.loader.load_state_dict(json.loads(state))
        left, done, kept = steps, [], json.dumps(worker.loader.state_dict())
        while left > 0:
            for batch in worker.loader:
                epoch = worker.loader._handed_out.epoch
                ids = worker.ids(batch)
                worker.loader.trained()
                left -= 1
                if steps - left <= saved:
                    done.append((epoch, ids))
                    kept = json.dumps(worker.loader.state_dict())
                if left == 0:
                    break
        return kept, done

    results = FakeJob(workers).run(work)
    states = {kept for kept, _ in results}
    assert len(states) == 1, "the state is the same on every rank"
    steps_of_all = zip(*(done for _, done in results), strict=True)
    merged = [(parts[0][0], sorted(i for _, ids in parts for i in ids)) for parts in steps_of_all]
    return states.pop(), merged


WORLDS = [(1, ()), (2, ()), (2, (1, 3)), (3, (1, 2, 4)), (3, (0, 1, 1)), (4, ()), (4, (5, 0, 1, 1))]


@pytest.mark.parametrize("seed", range(50))
def test_random_interruptions(seed: int) -> None:
    draw = random.Random(seed)
    more: dict[str, Any] = {**READERS, "prefetch_factor": 3} if seed % 25 == 0 else {}
    batch = draw.choice(["global", "per_worker"])
    _, alone = run(1, lambda: DataLoader(dataset(), batch_size=7, shuffle=True), None, 27, 27)
    state, done, lives = None, [], 0
    while sum(len(ids) for _, ids in done) < 61 * 3:
        workers, weights = draw.choice(WORLDS)
        saved = draw.randint(0, 6)
        options = {"batch": batch, "partition": draw.choice(["hash", "contiguous"])}
        if weights:
            options |= {"weights": weights, "balance": draw.choice(["static", "dynamic"])}
        state, ids = run(
            workers,
            lambda: DataLoader(dataset(), batch_size=7, shuffle=True, **more),
            state,
            saved + draw.randint(0, 4),
            saved,
            **options,
        )
        done += ids
        lives += 1
    for epoch in range(3):
        seen = [i for number, ids in done if number == epoch for i in ids]
        assert sorted(seen) == list(range(61)), f"epoch {epoch} after {lives} lives"
    if batch == "global":
        assert done[: len(alone)] == alone[: len(done)], "the same global batches in the same order"


def test_read_ahead_is_not_trained_on() -> None:
    def work(collectives: ThreadCollectives) -> None:
        data = DataLoader[Any](dataset(), batch_size=4, shuffle=True, prefetch_factor=4, **READERS)
        worker = Worker(collectives, data)
        batches = iter(worker.loader)
        for step in range(3):
            next(batches)
            assert worker.loader.state_dict()["cursor"]["batch"] == step, "handed out, not trained on yet"
            worker.loader.trained()
            assert worker.loader.state_dict()["cursor"] == {"epoch": 0, "batch": step + 1, "samples": 4 * (step + 1)}
        assert worker.loader._feeds["train"][0].planned > 3

    FakeJob(2).run(work)


def test_an_epochs_end_is_the_next_ones_start() -> None:
    def work(collectives: ThreadCollectives) -> None:
        worker = Worker(collectives, DataLoader(dataset(9), batch_size=4))
        for batch in worker.loader:
            worker.ids(batch)
        assert worker.loader.state_dict()["cursor"] == {"epoch": 1, "batch": 0, "samples": 0}

    FakeJob(2).run(work)


def test_streams_and_progress_go_on() -> None:
    """Random streams are those of the step, not of the steps since the start; progress is told what is left."""

    def draws(state: dict[str, Any] | None, size: int) -> Any:
        def work(collectives: ThreadCollectives) -> Any:
            worker = Worker(collectives, DataLoader(dataset(16), batch_size=4))
            if state is not None:
                worker.loader.load_state_dict(state)
            found = []
            for _ in worker.loader:
                found.append(torch.rand(1).item())
                worker.loader.trained()
                if state is None and len(found) == 2:
                    kept = worker.loader.state_dict()
            return found, worker.recorder.epochs, None if state else kept

        return FakeJob(size).run(work)[0]

    whole, told, state = draws(None, 1)
    assert told == [(16, 4)] and len(set(whole)) == 4
    rest, told, _ = draws(state, 1)
    assert rest == whole[2:] and told == [(8, 2)]


@pytest.mark.parametrize("generator", [True, False])
def test_samplers_are_replayed(generator: bool) -> None:
    def data() -> DataLoader[Any]:
        own = torch.Generator().manual_seed(5) if generator else None
        return DataLoader(dataset(), batch_size=7, sampler=WeightedRandomSampler([1.0] * 61, 50, generator=own))

    torch.manual_seed(1)
    _, whole = run(1, data, None, 24, 24)
    torch.manual_seed(2)
    state, first = run(2, data, None, 13, 11)  # in the second epoch
    torch.manual_seed(3)
    _, rest = run(3, data, state, 13, 13)
    assert first + rest == whole


def test_a_sampler_that_draws_otherwise_is_named() -> None:
    def data(seed: int) -> DataLoader[Any]:
        own = torch.Generator().manual_seed(seed)
        return DataLoader(dataset(), batch_size=7, sampler=WeightedRandomSampler([1.0] * 61, 50, generator=own))

    state, _ = run(2, lambda: data(1), None, 3, 3)
    with pytest.raises(DataError, match="draws otherwise"):
        run(2, lambda: data(2), state, 3, 3)


def test_another_dataset_is_refused() -> None:
    state, _ = run(2, lambda: DataLoader(dataset(), batch_size=7), None, 3, 3)
    with pytest.raises(DataError, match="another length"):
        run(2, lambda: DataLoader(dataset(60), batch_size=7), state, 3, 3)
    with pytest.raises(DataError, match="its content differs"):
        run(2, lambda: DataLoader(TensorDataset(torch.arange(61) + 1), batch_size=7), state, 3, 3)
    with pytest.raises(DataError, match="shuffle=False"):
        run(2, lambda: DataLoader(dataset(), batch_size=7, shuffle=True), state, 3, 3)


@pytest.mark.parametrize("subset", [False, True])
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subset: bool) -> None:
    """As many rows in both: only what the data sets call themselves tells them apart."""
    monkeypatch.setenv("HVDLM_CACHE_DIR", str(tmp_path / "cache"))
    for name, row in (("one", "a"), ("other", "bb")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.txt").write_text(f"{row}\n" * 61)

    def data(name: str) -> DataLoader[Any]:
        rows: Any = open_files(tmp_path / name / "rows.txt")
        return DataLoader(Subset(rows, range(61)) if subset else rows, batch_size=7, collate_fn=len)

    states = FakeJob(2).run(lambda c: Worker(c, data("one")).loader.state_dict())
    FakeJob(3).run(lambda c: Worker(c, data("one")).loader.load_state_dict(states[0]))
    with pytest.raises(DataError, match="its content differs"):
        FakeJob(2).run(lambda c: Worker(c, data("other")).loader.load_state_dict(states[0]))


def test_an_order_by_blocks_needs_its_batch_size() -> None:
    class Blocks(TensorDataset):
        def block_order(self, key: int, *, batch_size: int) -> KeyedPermutation:
            return KeyedPermutation(len(self), key + batch_size)

    def data(batch_size: int) -> DataLoader[Any]:
        return DataLoader(Blocks(torch.arange(61)), batch_size=batch_size, shuffle=True)

    state, _ = run(2, lambda: data(7), None, 3, 3)
    run(3, lambda: data(7), state, 3, 3)
    with pytest.raises(DataError, match="batch_size=7"):
        run(3, lambda: data(8), state, 3, 3)


def test_a_state_that_one_rank_did_not_load_is_named() -> None:
    state, _ = run(2, lambda: DataLoader(dataset(), batch_size=7), None, 3, 3)

    def work(collectives: ThreadCollectives) -> None:
        worker = Worker(collectives, DataLoader(dataset(), batch_size=7))
        if collectives.rank == 0:
            worker.loader.load_state_dict(json.loads(state))
        with pytest.raises(MismatchError, match=r"rank 0: .*batch=3.*rank 1: .*batch=0"):
            next(iter(worker.loader))

    FakeJob(2).run(work)


def test_a_dataset_whose_length_changes_is_named() -> None:
    def work(collectives: ThreadCollectives) -> None:
        rows = list(range(12))
        worker = Worker(collectives, DataLoader(rows, batch_size=4))  # type: ignore[arg-type, var-annotated]
        assert sum(1 for _ in worker.loader) == 3
        rows.pop()
        with pytest.raises(DataError, match="had 12 samples when hvdlm got it and has 11 now"):
            next(iter(worker.loader))

    FakeJob(2).run(work)
