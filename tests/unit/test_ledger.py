"""Ledger: a position survives JSON and other worlds, and refuses what it does not belong to."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm.algorithms.ledger import VERSION, Cursor, Ledger, Source
from hvdlm.errors import DataError
from hvdlm.plan import Epoch, Partition

SOURCE = Source(dataset="Lines", num_samples=100, content="ab", seed=3, shuffled=True)
LEDGER = Ledger(source=SOURCE, cursor=Cursor(1, 5, 40), world_size=2, weights=(1.0, 3.0), strategy="hash", batch_size=8)


def test_it_is_plain_json() -> None:
    text = json.dumps(LEDGER.to_json(), allow_nan=False)
    assert Ledger.from_json(json.loads(text), SOURCE) == LEDGER


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": VERSION + 1}, rf"version {VERSION + 1}; this hvdlm reads up to {VERSION}.\nHINT: pip install"),
        ({"cursor": {"epoch": 1}}, None),
        ({"cursor": {"epoch": -1, "batch": 0, "samples": 0}}, "damaged"),
        ({"cursor": {"epoch": 0, "batch": 0, "samples": 101}}, "101 of 100 are done"),
        ({"cursor": {"epoch": 0, "batch": 0, "samples": 1.5}}, "damaged"),
        ({"cursor": None}, "damaged"),
        ({"weights": ["x"]}, "damaged"),
        ({"source": {}}, "damaged"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], told: str | None) -> None:
    value = {**LEDGER.to_json(), **change}
    if told is None:  # what a newer cursor adds may be missing
        assert Ledger.from_json(value, SOURCE).cursor == Cursor(1)
        return
    with pytest.raises(DataError, match=told):
        Ledger.from_json(value, SOURCE)


@pytest.mark.parametrize("value", [None, [], {}, {"cursor": 1}, "x" * 500])
def test_what_is_no_state_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="a dict with a version") as caught:
        Ledger.from_json(value, SOURCE)
    assert "state_dict" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_samples": 99}, "another length: num_samples was 100 and is 99"),
        ({"dataset": "Words"}, "another kind of dataset"),
        ({"content": "cd"}, "its content differs"),
        ({"seed": 4}, "--seed 3"),
        ({"shuffled": False}, "shuffle=True"),
        ({"sampler": "Mine"}, "another sampler"),
    ],
)
def test_another_dataset_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        Ledger.from_json(LEDGER.to_json(), dataclasses.replace(SOURCE, **change))


LIFE = st.tuples(
    st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0, 7.0]), min_size=1, max_size=4).filter(any),  # the workers
    st.integers(1, 17),  # samples a global batch
    st.integers(0, 12),  # steps that are saved; what follows is lost with the job
)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 120),
    lives=st.lists(LIFE, min_size=1, max_size=6),
    strategy=st.sampled_from(["hash", "random", "contiguous"]),
)
def test_interrupted_anywhere_and_gone_on_anywhere(n: int, lives: list[Any], strategy: str) -> None:
    """Any number of interruptions, each followed by another world: what was saved is the dataset, in the same order."""
    source = Source(dataset="D", num_samples=n, seed=9, shuffled=True)
    state = None
    committed: list[int] = []
    epoch_order = Epoch(
        partition=Partition(strategy=strategy, rank=0, size=1, seed=9),
        num_samples=n,
        batch_size=n,
        shuffle=True,
        drop_last=False,
        number=0,
    )
    order = next(epoch_order.shares()).ids.tolist()
    for weights, batch, saved in [*lives, ([1.0], 5, n)]:
        start = Cursor() if state is None else Ledger.from_json(json.loads(state), source).cursor
        epochs = [
            Epoch(
                partition=Partition(strategy=strategy, rank=rank, size=len(weights), seed=9, weights=weights),
                num_samples=n,
                batch_size=batch,
                shuffle=True,
                drop_last=False,
                number=0,
                batches_done=start.batch,
                samples_done=start.samples,
            )
            for rank in range(len(weights))
        ]
        cursor = start
        for shares in itertools.islice(zip(*(epoch.shares() for epoch in epochs), strict=True), saved):
            ids = [i for share in shares for i in share.ids[: share.count].tolist()]
            assert sorted(ids) == sorted(order[cursor.samples : cursor.samples + batch])
            committed += ids
            cursor = Cursor(0, cursor.batch + 1, cursor.samples + shares[0].total)
        ledger = Ledger(
            source=source,
            cursor=cursor,
            world_size=len(weights),
            weights=tuple(weights),
            strategy=strategy,
            batch_size=batch,
        )
        state = json.dumps(ledger.to_json())
    assert sorted(committed) == list(range(n))
