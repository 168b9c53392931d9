"""The data plan: the same order at any number of workers, every sample once, empty shares filled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.plan import Epoch, Partition, Share, shares_of_batches


def epochs(
    size: int, strategy: str, n: int, batch: int, *, weights: tuple[float, ...] = (), **kwargs: bool
) -> list[Epoch]:
    return [
        Epoch(
            partition=Partition(strategy=strategy, rank=rank, size=size, seed=5, weights=weights),
            num_samples=n,
            batch_size=batch,
            shuffle=kwargs.get("shuffle", True),
            drop_last=kwargs.get("drop_last", False),
            number=3,
        )
        for rank in range(size)
    ]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 5),
    n=st.integers(1, 300),
    batch=st.integers(1, 40),
    strategy=st.sampled_from(["hash", "random", "contiguous"]),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_workers_together_read_what_one_reads(
    size: int, n: int, batch: int, strategy: str, shuffle: bool, drop_last: bool
) -> None:
    (alone,) = epochs(1, strategy, n, batch, shuffle=shuffle, drop_last=drop_last)
    together = epochs(size, strategy, n, batch, shuffle=shuffle, drop_last=drop_last)
    batches = list(alone.shares())
    shares = [list(epoch.shares()) for epoch in together]
    assert {len(s) for s in shares} == {len(batches)} == {len(alone)}
    seen = []
    for t, whole in enumerate(batches):
        parts = [s[t] for s in shares]
        assert all(part.total == whole.count for part in parts)
        assert sum(part.count for part in parts) == whole.count
        assert all(len(part.ids) >= 1 for part in parts)
        ids = np.concatenate([part.ids[: part.count] for part in parts])
        assert sorted(ids) == sorted(whole.ids)
        seen += list(whole.ids)
    assert len(seen) == len(set(seen)) == alone.num_planned == (n // batch * batch if drop_last else n)


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.0, 1.0), (2.0, 0.0)])
def test_weights_decide_shares(weights: tuple[float, ...]) -> None:
    for epoch, weight in zip(epochs(2, "hash", 400, 40, weights=weights), weights, strict=True):
        for share in epoch.shares():
            assert share.count == round(40 * weight / sum(weights))
            assert share.is_filler == (weight == 0)


def test_starting_later_gives_the_rest() -> None:
    epoch = epochs(2, "hash", 1000, 7)[1]
    whole = list(epoch.shares())
    for start in (1, 50, len(whole) - 1, len(whole)):
        rest = list(epoch.shares(start))
        assert [s.ids.tolist() for s in rest] == [s.ids.tolist() for s in whole[start:]]


def test_blocks_do_not_show() -> None:
    epoch = epochs(3, "hash", 200_000, 48)[2]
    shares = list(epoch.shares())
    assert len(shares) == len(epoch)
    assert all(share.count == 16 for share in shares[:-1])


def test_epochs_differ_and_seeds_differ() -> None:
    def order(seed: int, number: int) -> list[int]:
        partition = Partition(strategy="hash", rank=0, size=1, seed=seed)
        epoch = Epoch(partition=partition, num_samples=50, batch_size=50, shuffle=True, drop_last=False, number=number)
        return next(epoch.shares()).ids.tolist()

    orders = [tuple(order(seed, number)) for seed in (0, 1) for number in (0, 1)]
    assert len(set(orders)) == 4


def test_none_gives_everyone_everything_with_equal_weight() -> None:
    for epoch in epochs(2, "none", 10, 4):
        shares = list(epoch.shares())
        assert [share.count for share in shares] == [4, 4, 2]
        assert all(share.total == 2 * share.count for share in shares)


def test_batches_of_a_sampler() -> None:
    batches = [[3, 1, 4], [], [1], [5, 9, 2, 6]]
    cuts = [Partition(strategy="contiguous", rank=rank, size=2, seed=0) for rank in (0, 1)]
    per_rank = [list(shares_of_batches(lambda _, cut=cut: cut, batches)) for cut in cuts]
    assert [s.ids.tolist() for s in per_rank[0]] == [[3, 1], [1], [5, 9]]
    assert [s.ids.tolist() for s in per_rank[1]] == [[4], [1], [2, 6]]
    assert [s.count for s in per_rank[1]] == [1, 0, 2]


def test_share_knows_a_filler() -> None:
    assert Share(np.array([1]), 0, 3).is_filler
    assert not Share(np.array([1]), 1, 3).is_filler


def test_weights_that_change_leave_the_global_order() -> None:
    """Cut otherwise from batch 3 and from batch 7 on, on all ranks alike, and known only shortly before."""
    whole = [s.ids.tolist() for s in epochs(1, "hash", 200, 12)[0].shares()]
    shares = []
    for epoch in epochs(3, "hash", 200, 12):
        plans = {0: epoch.partition, 3: epoch.partition.weighted((0, 1, 5)), 7: epoch.partition.weighted((3, 1, 0))}
        given, known = [], [0]

        def at(batch: int, plans: dict[int, Partition] = plans, known: list[int] = known) -> Partition:
            return plans[max(first for first in known if first <= batch)]

        for share in epoch.shares(partition_at=at):
            given.append(share)
            if len(given) in plans:
                known.append(len(given))
        shares.append(given)
    for t, batch in enumerate(whole):
        parts = [given[t].ids[: given[t].count].tolist() for given in shares]
        assert sorted(i for part in parts for i in part) == sorted(batch)
        if len(batch) == 12:
            assert [len(part) for part in parts] == ([4, 4, 4] if t < 3 else [0, 2, 10] if t < 7 else [9, 3, 0])


@pytest.mark.parametrize("drop_last", [False, True])
def test_going_on_with_another_batch_size(drop_last: bool) -> None:
    order = [i for s in epochs(1, "hash", 100, 7)[0].shares() for i in s.ids.tolist()]
    (epoch,) = epochs(1, "hash", 100, 9, drop_last=drop_last)
    rest = dataclasses.replace(epoch, batches_done=5, samples_done=35)
    got = [s.ids.tolist() for s in rest.shares()]
    assert [i for part in got for i in part] == order[35 : 35 + 63 if drop_last else 100]
    assert len(rest) == 5 + len(got) and rest.num_planned == 35 + sum(map(len, got))
