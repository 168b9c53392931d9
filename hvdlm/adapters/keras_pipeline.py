"""``tf.data`` pipelines: read in the same order on all workers, and cut into each worker's part."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import dataset_ops, shuffle_op

from hvdlm.adapters.keras_data import COUNTS, DATA
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_passes import Planned, claiming
from hvdlm.adapters.keras_recipe import steps_of
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.ledger import Cursor
from hvdlm.errors import DataError
from hvdlm.plan import Share

__all__ = ["DatasetFeed", "Way", "same_order"]


def same_order(
    dataset: tf.data.Dataset, name: str, job: Job, number: Callable[[], int] | None = None
) -> tf.data.Dataset:
    """The dataset, shuffling with the same seeds on every worker: those of rank 0, or of the job where it has none.

    Args:
        dataset: The person's.
        name: For messages.
        job: Who agrees on seeds.
        number: Which pass an iterator reads, asked when it begins: for runs that keep their state the order of a pass
            has to be a function of its number. None for the order that TensorFlow draws from one pass to the next.

    Raises:
        DataError: It shuffles without a seed, and its pipeline cannot be made anew with one.
    """
    own = [_seeds(step) for step in steps_of(dataset) if isinstance(step, shuffle_op._ShuffleDataset)]
    received = job.collectives.broadcast(json.dumps(own).encode())
    seeds = [tuple(pair) for pair in json.loads(received)] if received else own
    for i, pair in enumerate(seeds):
        if pair == (0, 0):  # what TensorFlow takes for "choose one"
            seed = derive_seed("shuffle", job.options.seed, i)
            seeds[i] = (seed & 0x7FFFFFFF, seed >> 33)
    changed = np.array([int(seeds != own or (bool(seeds) and number is not None))])
    if not job.collectives.allreduce(changed, "max")[0]:
        return dataset
    try:
        return _with_seeds(dataset, seeds) if number is None else _by_pass(dataset, seeds, number)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise DataError(
            f"{name}: its pipeline shuffles without a seed, and it cannot be made anew with one: {error}",
            hint="give it one: dataset.shuffle(buffer_size, seed=0)",
        ) from error


def _by_pass(dataset: tf.data.Dataset, seeds: list[tuple[int, ...]], number: Callable[[], int]) -> tf.data.Dataset:
    """The same pipeline, made anew by each iterator with the seeds of its pass."""

    def graph() -> bytes:
        keyed = [[derive_seed("pass", *pair, number(), i) & 0x7FFFFFFF for i in (0, 1)] for pair in seeds]
        return _graph_with_seeds(dataset, [tuple(pair) for pair in keyed])

    graph()  # what cannot be made anew is found out here

    def read(_: Any) -> tf.data.Dataset:
        variant = tf.raw_ops.DatasetFromGraph(graph_def=tf.numpy_function(graph, [], tf.string))
        return dataset_ops._VariantDataset(variant, dataset.element_spec)

    return claiming(tf.data.Dataset.range(1).flat_map(read), dataset)


def _with_seeds(dataset: tf.data.Dataset, seeds: list[tuple[int, ...]]) -> tf.data.Dataset:
    """The same pipeline with other seeds."""
    variant = tf.raw_ops.DatasetFromGraph(graph_def=_graph_with_seeds(dataset, seeds))
    return dataset_ops._VariantDataset(variant, dataset.element_spec)


def _graph_with_seeds(dataset: tf.data.Dataset, seeds: list[tuple[int, ...]]) -> bytes:
    """The serialised graph of a pipeline, with other seeds; they are listed from the last shuffle back."""
    text = tf.raw_ops.DatasetToGraphV2(input_dataset=dataset._variant_tensor, strip_device_assignment=True)
    graph = tf.compat.v1.GraphDef.FromString(text.numpy())
    shuffles = [node for node in graph.node if node.op.startswith("ShuffleDataset")]
    if len(shuffles) != len(seeds):
        raise ValueError(f"{len(seeds)} shuffles, but {len(shuffles)} in its graph")
    for number, (node, pair) in enumerate(zip(shuffles, reversed(seeds), strict=True)):
        for i, seed in enumerate(pair):
            constant = graph.node.add(name=f"hvdlm_seed_{number}_{i}", op="Const")
            constant.attr["dtype"].type = tf.int64.as_datatype_enum
            constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(seed, tf.int64))
            node.input[2 + i] = constant.name
        # The later versions take their seeds from a resource, which a graph does not carry.
        node.op = "ShuffleDataset"
        del node.input[4:]
    serialised: bytes = graph.SerializeToString()
    return serialised


def _seeds(step: Any) -> tuple[int, ...]:
    return tuple(int(tf.get_static_value(getattr(step, part))) for part in ("_seed", "_seed2"))


_EVERYTHING = 1 << 62
"""More batches than there are."""


class Way(Protocol):
    """How this worker's part of each global batch comes out of a pipeline."""

    @property
    def described(self) -> tuple[int, int]:
        """(samples in the data, samples that a pass trains on); zeros if not known."""
        ...

    def ordered(self) -> tf.data.Dataset:
        """Global batches, or what stands for them: what has to come in the same order on all workers."""
        ...

    def plan(self, batches: tf.data.Dataset, note: Callable[[int, Share], None]) -> tf.data.Dataset:
        """What :meth:`make` needs of each batch. Costs next to nothing; notes each batch's number in its pass."""
        ...

    def make(self, planned: tf.data.Dataset) -> tf.data.Dataset:
        """Elements of a feed."""
        ...


class DatasetFeed:
    """A ``tf.data.Dataset`` as a feed.

    Args:
        way: How this worker's part comes out of it.
        order: Makes the order of a dataset the same on all workers; also given what tells the number of the pass that
            an iterator reads.
        finish: Maps the data of an element, row by row; None if there is nothing to do.
        endless: Whether one iterator reads pass after pass (``steps_per_epoch``).
        passes_done: Passes that were read by the run that this one goes on with, if the order of a pass is what
            TensorFlow draws after those before.
    """

    def __init__(
        self,
        way: Way,
        order: Callable[[tf.data.Dataset, Callable[[], int]], tf.data.Dataset],
        *,
        finish: Callable[..., Any] | None = None,
        endless: bool,
        passes_done: int = 0,
    ) -> None:
        self._behind = passes_done
        self._way, self._finish, self._endless = way, finish, endless
        self._number = self._at = self._first = 0
        self._resumed: int | None = None
        self._noted: collections.deque[Share] = collections.deque()
        batches = order(way.ordered(), lambda: self._number if self._resumed is None else self._resumed)
        self._planned = way.plan(batches, self._note)
        self.dataset = claiming(self._made(self._planned), self._planned)
        if int(self._planned.cardinality()) == tf.data.UNKNOWN_CARDINALITY:
            self.dataset = claiming(self.dataset, batches)
        cardinality = int(self.dataset.cardinality())
        self.steps = cardinality if cardinality >= 0 else None

    def _made(self, planned: tf.data.Dataset) -> tf.data.Dataset:
        dataset, finish = self._way.make(planned), self._finish
        if finish is not None:
            dataset = dataset.map(lambda e: {DATA: finish(*e[DATA]), COUNTS: e[COUNTS]})
        options = tf.data.Options()
        options.deterministic = True
        return dataset.with_options(options).prefetch(2)

    def _note(self, number: int, share: Share) -> None:
        if number == 0:  # a new iterator
            self._noted = collections.deque()
        if number >= self._first:
            self._noted.append(share)

    def resume(self, done: Cursor, stream: tuple[int, int] | None) -> None:
        """See :class:`Feed`. The order of batches that are done is gone through again, and they are dropped."""
        batches, self._resumed = done.batch, done.epoch
        if stream is not None:
            epochs, steps = stream
            passes, batches = divmod(epochs * steps, self.steps) if self.steps else (0, epochs * steps)
            self._resumed = passes * (self.steps or 0) // steps  # the epoch in which this pass was begun
        to_drop = tf.Variable(batches, dtype=tf.int64, trainable=False)

        def is_left(i: Any, _: Any) -> Any:
            return i >= to_drop

        kept = self._planned.enumerate().filter(is_left).map(lambda _, part: part)
        self._to_drop, self._first, self._number = to_drop, batches, done.epoch
        self.dataset = claiming(self._made(kept), self.dataset)

    def example(self) -> Any:
        """See :class:`Feed`."""
        return next(iter(self.dataset))[DATA]

    def start(self, number: int) -> None:
        """See :class:`Feed`."""
        if self._behind:
            self._go_through_passes(number)
        if self._number != number and self._resumed is not None:
            self._first, self._resumed = 0, None
            self._to_drop.assign(0)  # the passes that follow are whole
        self._number, self._at = number, self._first

    def _go_through_passes(self, number: int) -> None:
        if self._resumed is None:
            self.resume(Cursor(number), None)
        # Each dataset draws the orders of its passes by itself, so that it has to be this very one that is read. What
        # is dropped is dropped before it is made.
        first, self._first = self._first, _EVERYTHING
        self._to_drop.assign(_EVERYTHING)
        for _ in range(self._behind):
            for _ in self.dataset:
                pass
        self._first, self._behind = first, 0
        self._to_drop.assign(first)

    def take(self, steps: int, count: int, total: int) -> list[Planned]:
        """See :class:`Feed`."""
        # One entry a step, as for other feeds; the samples are known for all of them together.
        own, all_of_them = _spread(count, steps), _spread(total, steps)
        none = np.empty(0, dtype=np.int64)
        result = []
        for c, t in zip(own, all_of_them, strict=True):
            share = self._noted.popleft() if self._noted else Share(none, c, t)
            last = self.steps is not None and self._at == self.steps - 1
            result.append(Planned(share, self._number, self._at == self._first, last))
            self._at += 1
        return result

    def describe(self) -> tuple[int, int]:
        """See :class:`Feed`."""
        return (0, 0) if self._endless else self._way.described


def _spread(number: int, parts: int) -> list[int]:
    return [number // parts + (i < number % parts) for i in range(parts)]
