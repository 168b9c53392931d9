"""Sparse gradients of embeddings: rows travel merged, as they are, or as the whole gradient. Workers are threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdlm.adapters import keras_reducer
from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.keras_reducer import Reducer
from hvdlm.options import Options

SIZE, WIDTH = 3, 4


class ThreadWire:
    """Counts what travels, in bytes by kind."""

    sums_halves = False

    def __init__(self, collectives: ThreadCollectives) -> None:
        self._job, self.rank, self.size = collectives.job, collectives.rank, collectives.job.size
        self.sent: Counter[str] = Counter()

    def _exchange(self, kind: str, tensor: Any) -> list[Any]:
        array = tensor.numpy()
        self.sent[kind] += array.nbytes
        return list(self._job.exchange(self.rank, array))

    def timed(self, _: Any, work: Callable[[], Any]) -> Any:
        return work()

    def sum(self, tensor: Any, name: str) -> Any:
        return tf.constant(np.sum(self._exchange("dense" if "rows" not in name else "asked", tensor), axis=0))

    def gather(self, tensor: Any, name: str) -> Any:
        return tf.constant(np.concatenate(self._exchange("rows", tensor)))


def reduced(optimizer: Any, vocabulary: int, indices: list[list[int]], weights: list[float]) -> Any:
    """(gradients summed over workers, what rank 0 sent)."""
    values = [np.random.default_rng(rank).standard_normal((len(i), WIDTH)) for rank, i in enumerate(indices)]

    def work(collectives: ThreadCollectives) -> Any:
        rank = collectives.rank
        wire: Any = ThreadWire(collectives)
        weight = tf.Variable(weights[rank], dtype=tf.float64)
        own = tf.IndexedSlices(
            tf.constant(values[rank], tf.float32),
            tf.constant(indices[rank], tf.int32),
            tf.constant([vocabulary, WIDTH], tf.int32),
        )
        reducer = Reducer(optimizer, wire=wire, weight=weight, options=Options(), bucket_cap_bytes=2**20, name="0")
        (total,) = reducer.reduce([own], [tf.Variable(tf.zeros([vocabulary, WIDTH]))])
        return total, wire.sent

    expected = np.zeros((vocabulary, WIDTH))
    for rank, i in enumerate(indices):
        np.add.at(expected, i, weights[rank] * values[rank])
    results = FakeJob(SIZE).run(work)
    for total, _ in results:
        np.testing.assert_allclose(tf.convert_to_tensor(total).numpy(), expected, rtol=1e-5, atol=1e-6)
    return results[0]


INDICES = [[1, 1, 7, 1], [7, 2], [9, 9, 9, 9, 1]]
WEIGHTS = [0.25, 0.25, 0.5]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras_reducer, "_DENSE_BYTES", 100)


def test_rows_of_one_index_are_merged_before_they_travel() -> None:
    total, sent = reduced(keras.optimizers.SGD(0.1), 1000, INDICES, WEIGHTS)
    assert isinstance(total, tf.IndexedSlices)
    assert sent["dense"] == 0
    assert sent["rows"] == 2 * (WIDTH * 4 + 8)  # tokens 1 and 7
    assert total.indices.shape[0] == 2 + 2 + 2


def test_more_rows_than_the_vocabulary_travel_as_the_whole_gradient() -> None:
    many = [np.random.default_rng(rank).integers(12, size=40).tolist() for rank in range(SIZE)]
    total, sent = reduced(keras.optimizers.SGD(0.1), 12, many, WEIGHTS)
    assert sent["rows"] == 0
    assert sent["dense"] == 12 * WIDTH * 4
    assert total.indices.numpy().tolist() == list(range(12))


def test_rows_stay_apart_for_optimizers_that_square_them() -> None:
    total, sent = reduced(keras.optimizers.Adam(0.1), 1000, INDICES, WEIGHTS)
    assert sent["rows"] == 4 * (WIDTH * 4 + 8)
    assert sorted(total.indices.numpy().tolist()) == sorted(i for row in INDICES for i in row)


def test_rows_that_stay_apart_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras_reducer, "_MAX_GATHERED_BYTES", 5 * WIDTH * 4)
    _, sent = reduced(keras.optimizers.Adam(0.1), 8, [[i % 8 for i in row] for row in INDICES], WEIGHTS)
    assert (sent["rows"], sent["dense"]) == (0, 8 * WIDTH * 4)


def test_small_embeddings_travel_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras_reducer, "_DENSE_BYTES", 2**20)
    total, sent = reduced(keras.optimizers.SGD(0.1), 1000, INDICES, WEIGHTS)
    assert isinstance(total, tf.Tensor)
    assert (sent["rows"], sent["asked"], sent["dense"]) == (0, 0, 1000 * WIDTH * 4)


def test_a_filler_counts_nothing_even_if_it_is_not_a_number() -> None:
    reduced(keras.optimizers.SGD(0.1), 1000, INDICES, [0.5, 0.0, 0.5])
