"""A Keras training that goes on knows the data that it was begun with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hvdlm.adapters.keras_data import ArrayFeed
from hvdlm.adapters.keras_place import Place
from hvdlm.adapters.keras_shares import Shares
from hvdlm.adapters.single import SingleCollectives
from hvdlm.algorithms.ledger import Source
from hvdlm.errors import DataError
from hvdlm.plan import Partition
from hvdlm.world import World


def source(x: Any, size: int = 1, shuffle: bool = True, seed: int = 0) -> Source:
    shares = Shares(
        Partition(strategy="hash", rank=0, size=size, seed=seed),
        world=World(rank=0, size=size, local_rank=0, local_size=size),
        collectives=SingleCollectives(),
        dynamic=False,
    )
    feed = ArrayFeed(
        x, None, None, None, batch_size=8, shuffle=shuffle, steps=None, shares=shares, per_worker=False, endless=False
    )
    return feed.source()


def test_other_data_is_refused_where_a_fit_goes_on() -> None:
    rows = np.arange(40.0).reshape(20, 2)
    first = Place()
    first.reads(source(rows))
    first.batch(0, 8, first=True)
    kept = json.loads(json.dumps(first.loaders()))

    def goes_on(now: Source | None) -> None:
        place = Place()
        place.load(kept)
        assert place.resumed
        place.reads(now)

    goes_on(source(rows.copy(), size=3))
    goes_on(None)  # of a generator nothing is known
    for other, told in (
        (source(rows[:19]), "another length: num_samples was 20 and is 19"),
        (source(rows + 1), "its content differs"),
        (source(rows, shuffle=False), "another order"),
        (source(rows, seed=1), "another seed"),
    ):
        with pytest.raises(DataError, match=told):
            goes_on(other)
    Place().reads(source(rows + 1))  # a fit that begins may read anything
