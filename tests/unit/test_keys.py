"""Keys: chunks of one document have one home; what cannot be a key, or differs between ranks, is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.single import SingleCollectives
from hvdlm.errors import ConfigError, DataError, MismatchError
from hvdlm.keys import Keys, make_keys
from hvdlm.options import Options
from hvdlm.plan import Epoch, Partition

ROWS = [{"document": f"d{index // 4}", "text": "x"} for index in range(400)]


def keys_of(key: Any, dataset: Any = ROWS) -> Keys:
    keys = make_keys(key, dataset, "data", SingleCollectives(), True)
    assert keys is not None
    return keys


@pytest.mark.parametrize("key", ["document", lambda index: f"d{index // 4}"])
def test_chunks_of_a_document_stay_together(key: Any) -> None:
    """In batches that leave room, all chunks of a document are computed by one worker; else most are."""
    keys = keys_of(key)
    seen: dict[str, list[int]] = {}
    total = 0
    for rank in range(4):
        partition = Partition(strategy="hash", rank=rank, size=4, seed=0, keys=keys)
        epoch = Epoch(partition=partition, num_samples=400, batch_size=400, shuffle=True, drop_last=False, number=0)
        for share in epoch.shares():
            total += share.count
            for index in share.ids[: share.count].tolist():
                seen.setdefault(ROWS[index]["document"], []).append(rank)
    assert total == 400
    together = sum(len(set(ranks)) == 1 for ranks in seen.values())
    assert together > 75, "of 100 documents; the homes of 25 each are not quite even, so some spill"
    without = Partition(strategy="hash", rank=0, size=4, seed=0).keys
    assert without is None and make_keys("none", ROWS, "data", SingleCollectives(), True) is None


def test_each_key_is_asked_for_once() -> None:
    asked: list[int] = []
    keys = Keys(lambda index: asked.append(index) or index % 3, 10, "data")  # type: ignore[func-returns-value]
    assert keys(np.array([4, 1])).tolist() == [1, 1] and keys(np.array([1, 5, 4])).tolist() == [1, 2, 1]
    assert asked == [4, 1, 5] and sorted(keys.known().tolist()) == [1, 1, 2]


def test_a_column_is_read_by_rank_0_alone() -> None:
    class Rows:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __len__(self) -> int:
            return 400

        def __getitem__(self, index: int) -> dict[str, str]:
            assert self.rank == 0
            return ROWS[index]

    def work(collectives: ThreadCollectives) -> list[int]:
        keys = make_keys("document", Rows(collectives.rank), "data", collectives, collectives.rank == 0)
        assert keys is not None
        return keys(np.arange(400)).tolist()

    first, second = FakeJob(2).run(work)
    assert first == second == keys_of("document")(np.arange(400)).tolist()


@pytest.mark.parametrize(
    ("key", "dataset", "message"),
    [
        (lambda index: 1 // (index - 7), ROWS, r"key of sample 7 cannot be had: ZeroDivisionError"),
        (lambda index: [index], ROWS, r"\[0\], a list; allowed: int, str or bytes \(sample 0\)"),
        (lambda index: 0.5, ROWS, "a float; allowed: int, str or bytes"),
        ("doc", ROWS, r"sample 0 has no column 'doc'; it has: 'document', 'text'"),
        ("doc", ["a", "b"], "sample 0 is a str, which has no column 'doc'"),
    ],
)
def test_what_cannot_be_a_key(key: Any, dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        keys_of(key, dataset)(np.arange(len(dataset)))


def test_a_column_that_is_not_there_is_told_on_every_rank() -> None:
    def work(collectives: ThreadCollectives) -> str:
        with pytest.raises(DataError, match="no column 'doc'") as caught:
            make_keys("doc", ROWS, "data", collectives, collectives.rank == 0)
        return str(caught.value)

    told = FakeJob(3).run(work)
    assert len(told) == 3


def test_keys_that_differ_between_ranks_are_named() -> None:
    def work(collectives: ThreadCollectives) -> None:
        with pytest.raises(MismatchError, match=r"the keys of \d+ samples"):
            make_keys(lambda index: (collectives.rank, index)[1] + collectives.rank, ROWS, "data", collectives, False)

    FakeJob(2).run(work)


def test_a_key_needs_the_hash() -> None:
    with pytest.raises(ConfigError, match=r"key with partition=\"contiguous\""):
        Options(key="document", partition="contiguous")
    with pytest.raises(ConfigError, match=r"key is \[3\]; it takes text or a function"):
        Options(key=[3])  # type: ignore[arg-type]
    assert Options(key=len).to_dict()["key"] == "builtins.len"
