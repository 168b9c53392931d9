"""``tf.data`` pipelines shared out: all parts together are the batches of one process, each sample made once."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from hvdlm.adapters.keras_data import COUNTS, DATA  # noqa: E402
from hvdlm.adapters.keras_feeds import ShardedDataset, training_feed  # noqa: E402
from hvdlm.adapters.keras_job import Job  # noqa: E402
from hvdlm.adapters.keras_own_part import OwnPart  # noqa: E402
from hvdlm.adapters.keras_ways import pipeline_feed  # noqa: E402
from hvdlm.adapters.keras_whole_batches import WholeBatches  # noqa: E402
from hvdlm.adapters.single import SingleCollectives  # noqa: E402
from hvdlm.algorithms.ledger import Cursor  # noqa: E402
from hvdlm.errors import DataError  # noqa: E402
from hvdlm.options import Options  # noqa: E402
from hvdlm.world import World  # noqa: E402

SAMPLES, BATCH = 61, 8
Pipeline = Callable[[], Any]


@pytest.fixture(autouse=True)
def _no_global_seed() -> None:
    """One that another test has set would give each pipeline made in this process other seeds than the last one."""
    tf.random.set_seed(None)


def rows() -> Any:
    random = np.random.default_rng(0)
    x = random.integers(100, size=(SAMPLES, 3))
    return tf.data.Dataset.from_tensor_slices((x, np.arange(SAMPLES)))


def lines() -> Any:
    """A source that has to be read from its beginning, of samples that differ in length."""

    def words() -> Iterator[Any]:
        for number in range(SAMPLES):
            yield np.arange(number % 5, dtype=np.int32), number

    return tf.data.Dataset.from_generator(
        words, output_signature=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int64))
    )


def doubled(x: Any, y: Any) -> Any:
    return tf.cast(x, tf.float32) * 2, y


def padded(x: Any, y: Any) -> Any:
    return {"x": tf.pad(x, [[0, 4 - tf.shape(x)[0]]]), "name": tf.strings.as_string(y)}, y


PIPELINES: dict[str, Pipeline] = {
    "batch": lambda: rows().batch(BATCH),
    "drop_remainder": lambda: rows().shuffle(SAMPLES).map(doubled).batch(BATCH, drop_remainder=True),
    "shuffle_with_seed": lambda: rows().shuffle(20, seed=3).map(doubled).batch(BATCH).prefetch(2),
    "shuffle_behind_map": lambda: rows().map(doubled, num_parallel_calls=4).shuffle(20).shuffle(7, seed=1).batch(BATCH),
    "cached": lambda: rows().map(doubled).cache().shuffle(SAMPLES).batch(BATCH),
    "cached_before_map": lambda: rows().map(doubled).cache().map(lambda x, y: (x + 1, y)).shuffle(20).batch(BATCH),
    "lengths_cached_before_map": lambda: lines().map(lambda x, y: (x + 1, y)).cache().map(padded).batch(BATCH),
    "order_cached": lambda: rows().shuffle(SAMPLES).cache().map(doubled).batch(BATCH),
    "batches_cached_and_shuffled": lambda: rows().map(doubled).batch(BATCH).cache().shuffle(4),
    "repeat_before_batch": lambda: rows().shuffle(SAMPLES).map(doubled).repeat(2).batch(BATCH),
    "repeat_right_behind_shuffle": lambda: rows().map(doubled).shuffle(SAMPLES).repeat(2).batch(BATCH),
    "repeat_after_batch": lambda: rows().map(doubled).shuffle(SAMPLES).batch(BATCH).repeat(2),
    "take_and_skip": lambda: rows().skip(3).map(doubled).take(50).batch(BATCH).skip(1).take(5),
    "generator": lambda: lines().shuffle(20).map(padded).batch(BATCH),
    "generator_cached": lambda: lines().map(padded).cache().shuffle(20).batch(BATCH),
    "filter": lambda: rows().filter(lambda x, y: y % 3 > 0).shuffle(SAMPLES).map(doubled).batch(BATCH),
    "ragged": lambda: lines().map(lambda x, y: (tf.RaggedTensor.from_tensor(x[None]), y)).cache().batch(BATCH),
    "sparse": lambda: (
        lines().map(lambda x, y: (tf.sparse.from_dense(tf.pad(x, [[0, 4 - tf.shape(x)[0]]])), y)).batch(BATCH)
    ),
    "batch_of_one_map_behind": lambda: rows().batch(BATCH).map(doubled),
    "random_map": lambda: rows().map(lambda x, y: (x + tf.random.uniform([], 0, 9, tf.int64, seed=1), y)).batch(BATCH),
    "options": lambda: rows().map(doubled, num_parallel_calls=2).batch(BATCH).with_options(loose()),
}
AFTER = {"batch_of_one_map_behind"}
"""Cut after batches are made."""


def loose() -> Any:
    options = tf.data.Options()
    options.deterministic = False
    return options


def job(rank: int, size: int, **options: Any) -> Job:
    weights = options.pop("shares", ())
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    recorder: Any = mock.MagicMock()
    # Seeds are functions of the options, so that nothing has to be agreed on.
    collectives = SingleCollectives()
    return Job(options=Options(**options), world=world, collectives=collectives, recorder=recorder, weights=weights)


def batches(feed: Any) -> list[tuple[Any, list[int]]]:
    def dense(value: Any) -> Any:
        if isinstance(value, tf.SparseTensor):
            return tf.sparse.to_dense(value).numpy().tolist()
        return value.to_list() if isinstance(value, tf.RaggedTensor) else value.numpy().tolist()

    return [(tf.nest.map_structure(dense, e[DATA]), e[COUNTS].numpy().tolist()) for e in feed.dataset]


def samples(data: Any, count: int) -> list[str]:
    flat = data[0]["x"] if isinstance(data[0], dict) else data[0]
    return sorted(repr(sample) for sample in list(zip(flat, data[1], strict=True))[:count])


UNEQUAL = {"shares": (1.0, 0.0, 2.5)}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("cached", {"partition": "contiguous"}),
    ("cached", UNEQUAL),
    ("repeat_after_batch", UNEQUAL),
    ("batch_of_one_map_behind", UNEQUAL),
]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in PIPELINES), *OTHERS], ids=str)
def test_parts_are_the_batches_of_one_process(name: str, options: dict[str, Any]) -> None:
    size = 3
    own = [pipeline_feed(PIPELINES[name](), None, False, "x", job(rank, size, **options)) for rank in range(size)]
    alone = pipeline_feed(PIPELINES[name](), None, False, "x", job(0, 1))
    assert isinstance(own[0]._way, WholeBatches if name in AFTER else OwnPart)
    for _ in range(2):
        parts, whole = [batches(feed) for feed in own], batches(alone)
        assert [len(part) for part in parts] == [len(whole)] * size
        assert own[0].steps in (len(whole), None)
        for step, (data, counts) in enumerate(whole):
            here = [part[step] for part in parts]
            assert [total for _, (_, total) in here] == [counts[1]] * size
            found = [sample for d, (count, _) in here for sample in samples(d, count)]
            assert sorted(found) == samples(data, counts[1]), step
            for d, (count, _) in here:
                assert len(d[1]) == max(1, count)
            if "shares" in options:
                assert here[1][1][0] == 0


def calls_of(rank: int, size: int, pipeline: Callable[[Any], Any], passes: int = 1) -> list[list[int]]:
    """Samples that the person's function is called with, in each pass."""
    seen: list[int] = []

    def slow(x: Any, y: Any) -> Any:
        def look(number: Any) -> Any:
            seen.append(int(number))
            return number

        return x, tf.ensure_shape(tf.numpy_function(look, [y], tf.int64, stateful=False), [])

    feed = pipeline_feed(pipeline(rows().map(slow)), None, False, "x", job(rank, size))
    found = []
    for _ in range(passes):
        seen.clear()
        batches(feed)
        found.append(sorted(set(seen)))
    return found


def test_functions_run_for_own_samples_only() -> None:
    parts = [calls_of(rank, 2, lambda d: d.shuffle(SAMPLES).batch(BATCH))[0] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(SAMPLES))
    assert [len(part) for part in parts] == [31, 30]


def test_what_is_cached_is_not_made_again() -> None:
    first, second, third = calls_of(0, 2, lambda d: d.cache().shuffle(SAMPLES).batch(BATCH), passes=3)
    assert len(first) == 31
    # Only samples that did not fit in at home and are here for the first time.
    assert not set(first) & set(second)
    assert not (set(first) | set(second)) & set(third)
    assert len(third) < len(second) + 5 < 31


def test_hash_brings_samples_home() -> None:
    def parts(partition: str) -> list[set[int]]:
        feed = pipeline_feed(rows().shuffle(SAMPLES).batch(BATCH), None, False, "x", job(0, 2, partition=partition))
        return [{y for data, (count, _) in batches(feed) for y in data[1][:count]} for _ in range(4)]

    def returning(found: list[set[int]]) -> float:
        return float(np.mean([len(a & b) / len(a) for a, b in itertools.pairwise(found)]))

    assert returning(parts("hash")) > 0.65 > returning(parts("contiguous"))


def test_account_of_each_pass() -> None:
    feeds = [pipeline_feed(rows().shuffle(SAMPLES).batch(BATCH), None, False, "x", job(rank, 2)) for rank in range(2)]
    for number in range(2):
        ids: list[int] = []
        for feed in feeds:
            feed.start(number)
            planned = [p for _, counts in batches(feed) for p in feed.take(1, *counts)]
            ids += [i for p in planned if p.share.count for i in p.share.ids.tolist()]
            assert (planned[0].first, planned[-1].last, planned[-2].last) == (True, True, False)
            assert feed.describe() == (SAMPLES, SAMPLES)
        assert sorted(ids) == list(range(SAMPLES))


def test_resumed_pass_makes_what_is_left() -> None:
    made: list[int] = []

    def look(number: Any) -> Any:
        made.append(int(number))
        return number

    def pipeline() -> Any:
        function = lambda x, y: (x, tf.ensure_shape(tf.numpy_function(look, [y], tf.int64, stateful=False), []))  # noqa: E731
        return rows().map(function).shuffle(SAMPLES, seed=2).batch(BATCH)

    whole = batches(pipeline_feed(pipeline(), None, False, "x", job(1, 2)))
    feed = pipeline_feed(pipeline(), None, False, "x", job(1, 2))
    feed.resume(Cursor(0, 3, 24), None)
    feed.start(0)
    made.clear()
    rest = batches(feed)
    assert rest == whole[3:]
    assert len(set(made)) == sum(counts[0] for _, counts in rest)
    planned = [p for _, counts in rest for p in feed.take(1, *counts)]
    assert [len(p.share.ids) for p in planned] == [counts[0] for _, counts in rest]
    assert (planned[0].first, planned[-1].last) == (True, True)


SHUFFLED = {
    "unseeded": lambda: rows().map(doubled).shuffle(SAMPLES).batch(BATCH),
    "seeded": lambda: rows().shuffle(30, seed=4).map(doubled).shuffle(9).batch(BATCH).prefetch(2),
    "cached": lambda: rows().map(doubled, num_parallel_calls=2).cache().shuffle(SAMPLES).batch(BATCH).prefetch(1),
    "whole_batches": lambda: rows().shuffle(SAMPLES).batch(BATCH).map(doubled),
    "generator": lambda: lines().shuffle(SAMPLES).map(padded).batch(BATCH),
    "in_order": lambda: rows().map(doubled).batch(BATCH),
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*((name, (2, 1)) for name in SHUFFLED), ("seeded", (1, 2)), ("cached", (1, 1)), ("whole_batches", (1, 2))],
    ids=str,
)
def test_loop_goes_on_at_another_number_of_workers(name: str, sizes: tuple[int, int]) -> None:
    def dataset(rank: int, size: int) -> ShardedDataset:
        return ShardedDataset(SHUFFLED[name](), "x", job(rank, size))

    def labels(data: Any) -> list[int]:
        return data[1].numpy().tolist()  # type: ignore[no-any-return]

    first, second = sizes
    before = [dataset(rank, first) for rank in range(first)]
    states = []
    for own in before:
        for _ in range(2):
            list(own)
        loop = iter(own)
        for _ in range(3):
            next(loop)
        states.append(own.state_dict())
        loop.close()  # type: ignore[attr-defined]
    assert all(state == states[0] for state in states)
    assert states[0]["cursor"] == {"epoch": 2, "batch": 3, "samples": 3 * BATCH}
    state = json.loads(json.dumps(states[0]))
    after = [dataset(rank, second) for rank in range(second)]
    for own in after:
        own.load_state_dict(state)
    straight = dataset(0, 1)
    for _ in range(2):
        list(straight)
    for skipped in (3, 0):  # the rest of this pass, and the next one
        expected = [sorted(labels(data)) for data in straight][skipped:]
        parts = [[labels(data) for data in own] for own in after]
        assert [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == expected


def test_parts_of_one_size_have_a_static_shape() -> None:
    x = np.arange(48)

    def feed(samples: int, rank: int, done: Cursor | None = None) -> Any:
        result = training_feed({"x": x[:samples], "y": x[:samples], "batch_size": 8}, "x", job(rank, 3))
        if done is not None:
            result.resume(done, None)
        return result

    for made, static in (
        (feed(48, 0), 3),
        (feed(48, 2), 2),
        (feed(47, 0), None),
        (feed(48, 0, Cursor(0, 2, 16)), 3),
        (feed(48, 0, Cursor(0, 2, 10)), None),  # it was left with another batch size
    ):
        assert made.dataset.element_spec[DATA][0].shape == [static]
        made.start(0)
        lengths = [len(data[0]) for data, _ in batches(made)]
        assert set(lengths[:-1]) == {static or lengths[0]}


def test_state_of_another_pipeline_is_refused() -> None:
    state = ShardedDataset(rows().shuffle(SAMPLES).batch(BATCH), "x", job(0, 1)).state_dict()
    other = ShardedDataset(rows().batch(BATCH), "x", job(0, 1))
    with pytest.raises(DataError, match=r"(?s)shuffled was True and is False.*HINT"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match=r"(?s)seed was 0 and is 5.*HINT: give the seed of the state"):
        ShardedDataset(rows().shuffle(SAMPLES).batch(BATCH), "x", job(0, 1, seed=5)).load_state_dict(state)


def test_class_weights_follow_the_rows() -> None:
    def labelled() -> Any:
        return rows().map(lambda x, y: (x, y % 2)).batch(BATCH)

    feed = pipeline_feed(labelled(), {0: 1.0, 1: 3.0}, False, "x", job(1, 2))
    for (_, y, weight), _ in batches(feed):
        assert weight == [3.0 if label else 1.0 for label in y]


COSTS = {
    "map_of_batches": (lambda: rows().batch(BATCH).map(doubled), "a map works on whole batches: put .map"),
    "batched_by_window": (lambda: rows().padded_batch(BATCH), "batches come from PaddedBatch"),
    "generator": (lambda: lines().map(padded).batch(BATCH), "reads all of its source"),
    "random": (PIPELINES["random_map"], "reads all of its source (Map, with a function that draws random"),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, part = COSTS[name]
    for rank in range(2):
        with caplog.at_level(logging.WARNING, "hvdlm"):
            pipeline_feed(pipeline(), None, False, "x", job(rank, 2))
    assert len(caplog.messages) == 1
    assert part in caplog.messages[0]


def test_nothing_to_tell_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hvdlm"):
        pipeline_feed(PIPELINES["cached"](), None, False, "x", job(0, 2))
    assert not caplog.messages


def test_order_left_to_chance_is_refused() -> None:
    def interleaved() -> Any:
        return rows().interleave(
            lambda x, y: tf.data.Dataset.from_tensors((x, y)), num_parallel_calls=2, deterministic=False
        )

    with pytest.raises(DataError, match=r"(?s)deterministic=False.*HINT: leave"):
        pipeline_feed(interleaved().batch(BATCH), None, False, "x", job(0, 2))
    pipeline_feed(interleaved().batch(BATCH), None, False, "x", job(0, 1))
