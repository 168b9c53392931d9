"""Chooses the feed for what a script hands to ``fit``, and stands in for datasets that loops of one's own read."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import xxhash
from keras.src import tree
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays

from hvdlm.adapters.keras_data import COUNTS, DATA, ArrayFeed, BatchFeed, Feed
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_ledger import cursor_of, state_of
from hvdlm.adapters.keras_ways import pipeline_feed, refuse_few, warn_of_batches
from hvdlm.adapters.timed import timed
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.ledger import Cursor
from hvdlm.algorithms.permutation import KeyedPermutation
from hvdlm.errors import DataError

__all__ = ["ShardedDataset", "cut_by_hand", "original_of", "own_part", "training_feed"]

_log = logging.getLogger("hvdlm")


class ShardedDataset:
    """Stands in for a person's ``tf.data.Dataset`` or ``PyDataset`` and forwards what it does not change.

    Iterated, it yields this worker's part of each global batch. ``fit`` of a distributed model takes it like the
    original; ``evaluate``, ``predict`` and ``validation_data`` read the original whole.

    Args:
        dataset: The person's dataset.
        name: Where it was found, for messages.
        job: What to do.
    """

    def __init__(self, dataset: Any, name: str, job: Job) -> None:
        self._dataset, self._name, self._job = dataset, name, job
        self._feed: Feed | None = None
        self._done: Cursor | None = None
        self._copies = job.world.size if job.options.partition == "none" else 1
        self._number = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_dataset"], name)

    @property
    def __class__(self) -> type:
        # isinstance(dataset, tf.data.Dataset) in the person's code goes on being true.
        return type(self._dataset)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a sharded dataset cannot be changed")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def like(self, dataset: Any) -> ShardedDataset:
        """The same for a data set that the script has made anew, which goes on counting the passes over the data."""
        other = ShardedDataset(dataset, self._name, self._job)
        other._number, other._done = self._number, self._done
        return other

    def state_dict(self) -> dict[str, Any]:
        """What a loop has trained on so far: to be saved together with the model, as JSON; equal on every rank.

        The batch that was handed out last counts: ask between a step and the next batch.
        """
        return state_of(self._dataset, self._job, self._done or Cursor(self._number))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken: the next loop reads the rest of its pass. Every rank loads it, at any number.

        Raises:
            DataError: The state is of another pipeline, seed, or newer version.
        """
        self._done = cursor_of(state, self._dataset, self._job)
        self._number, self._feed = self._done.epoch, None
        self._job.place.datasets[self._name] = self._done

    def __iter__(self) -> Iterator[Any]:
        if tf.inside_function():
            raise DataError(
                f"{self._name} is iterated inside a tf.function, where each worker's part cannot be told apart.",
                hint="loop over the dataset outside, and put the step into the tf.function",
            )
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        job = self._job
        if self._feed is None:
            given = {"x": self._dataset, "shuffle": True}
            self._feed = training_feed(given, self._name, job, passes_done=self._number if self._done else 0)
        feed, number = self._feed, self._number
        self._number += 1
        if job.course.done(self._name, number):
            return
        places = job.place.datasets
        if self._name in places and places[self._name].epoch == number and places[self._name].batch:
            feed.resume(places[self._name], None)
        places.setdefault(self._name, Cursor(number))
        feed.start(number)
        job.recorder.epoch(self._name, number, *feed.describe(), feed.steps or 0)
        try:
            for element in timed(iter(feed.dataset), job.recorder.data):
                counts = element[COUNTS].numpy()
                job.counts(counts)
                job.shares.begin()
                for planned in feed.take(1, int(counts[0]), int(counts[1])):
                    job.recorder.batch(planned.share, number, self._name)
                    done = places[self._name]
                    done = done if done.epoch == number else Cursor(number)
                    done = Cursor(number, done.batch + 1, done.samples + planned.share.total // self._copies)
                self._done = done
                yield element[DATA]
                job.shares.end(int(counts[0]))
                places[self._name] = done
                job.course.boundary()
                if job.synchronised():
                    job.recorder.reduced()
            job.synchronise()
        finally:
            job.uncounted()
        if feed.describe()[0]:
            job.recorder.epoch_done(self._name, number)
        self._done = places[self._name] = Cursor(number + 1)
        if isinstance(self._dataset, keras.utils.PyDataset):
            self._dataset.on_epoch_end()


def original_of(value: Any) -> Any:
    """The person's dataset behind a stand-in, also inside a tuple; other values as they are."""
    if type(value) is ShardedDataset:
        return value._dataset
    if type(value) is tuple:
        return tuple(original_of(item) for item in value)
    return value


def cut_by_hand(batch: Any, job: Job) -> tuple[Any, tuple[int, int]]:
    """This worker's part of a batch that the script made itself, and (samples that count here, samples in the job).

    Where all workers hold the same batch, it is the global one; where they do not, each holds its own part of it.
    """
    arrays = [np.asarray(v) for v in tree.flatten(batch) if v is not None]
    samples = len(arrays[0])
    hasher = xxhash.xxh3_128()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).view(np.uint8).data)
    payloads = job.collectives.allgather(hasher.digest() + samples.to_bytes(8, "little"))
    if len(set(payloads)) > 1 or job.options.partition == "none":
        return batch, (samples, sum(int.from_bytes(payload[16:], "little") for payload in payloads))
    (share,) = job.partition.cut(np.arange(samples, dtype=np.int64), samples)
    cut = tree.map_structure(lambda v: None if v is None else np.asarray(v)[share.ids], batch)
    return cut, (share.count, share.total)


def own_part(x: Any, y: Any, sample_weight: Any, job: Job) -> tuple[Any, Any, Any, int] | None:
    """This worker's part of arrays to evaluate, and its length; None where they have to be read whole."""
    data = (x, y, sample_weight)
    if job.options.eval != "sharded" or job.world.size == 1 or not can_convert_arrays(data):
        return None
    samples = len(tree.flatten(x)[0])
    if samples < job.world.size:
        return None
    rows = np.array_split(np.arange(samples), job.world.size)[job.world.rank]
    part = tree.map_structure(lambda v: None if v is None else v[rows[0] : rows[-1] + 1], data)
    return (*part, len(rows))


def training_feed(given: dict[str, Any], name: str, job: Job, passes_done: int = 0) -> Feed:
    """The feed for the arguments of a ``fit``; ``passes_done`` were read by the run that this one goes on with.

    Raises:
        DataError: The data cannot be shared out rightly; says why.
    """
    x = original_of(given["x"])
    steps_per_epoch, class_weight = given.get("steps_per_epoch"), given.get("class_weight")
    per_worker = job.options.batch == "per_worker" and job.options.partition != "none"
    endless = steps_per_epoch is not None
    if isinstance(x, tf.data.Dataset):
        return pipeline_feed(x, class_weight, endless, name, job, passes_done)
    if isinstance(x, keras.utils.PyDataset):
        warn_of_batches(name, job, type(x).__name__)
        return _py_dataset_feed(x, bool(given.get("shuffle", True)), endless, name, job)
    _refuse_torch((x, given.get("y"), given.get("sample_weight")), name)
    if not can_convert_arrays((x, given.get("y"), given.get("sample_weight"))):
        if not isinstance(x, Iterable) or isinstance(x, (list, dict, str)):
            raise DataError(
                f"{name}: fit was given a {type(x).__name__}, which hvdlm cannot share out.",
                hint="pass arrays, a tf.data.Dataset, a keras.utils.PyDataset or a generator",
            )
        return _generator_feed(x, steps_per_epoch, name, job)
    feed = ArrayFeed(
        x,
        given.get("y"),
        given.get("sample_weight"),
        class_weight,
        batch_size=given.get("batch_size"),
        shuffle=bool(given.get("shuffle", True)) or job.options.partition == "random",
        steps=steps_per_epoch,
        shares=job.shares,
        per_worker=per_worker,
        endless=endless,
    )
    _check_size(feed, name, job)
    return feed


def _refuse_torch(data: Any, name: str) -> None:
    leaves = [value for value in tree.flatten(data) if value is not None]
    kinds = {type(value).__module__.split(".")[0]: type(value).__name__ for value in leaves}
    if "torch" in kinds and kinds["torch"] == "DataLoader":
        raise DataError(
            f"{name}: fit was given a DataLoader of torch, which cannot be shared out under TensorFlow.",
            hint="pass arrays or a tf.data.Dataset, or set KERAS_BACKEND=torch",
        )
    if "torch" in kinds and "tensorflow" in kinds:
        raise DataError(
            f"{name}: fit was given tensors of torch and of TensorFlow.",
            hint="pass NumPy arrays (tensor.numpy()), or tensors of one framework",
        )


def _check_size(feed: ArrayFeed, name: str, job: Job) -> None:
    size = job.world.size
    refuse_few(feed.num_samples, name, size)
    if feed.batch_size < size and job.world.is_main:
        _log.warning(
            "%s: a global batch of %d cannot keep %d workers busy; raise batch_size or set batch='per_worker'",
            name,
            feed.batch_size,
            size,
        )


def _py_dataset_feed(data: Any, shuffle: bool, endless: bool, name: str, job: Job) -> Feed:
    steps = data.num_batches
    if steps is None and not endless:
        raise DataError(f"{name}: {type(data).__name__} has no length.", hint="pass steps_per_epoch to fit")
    if steps == 0:
        raise DataError(f"{name}: {type(data).__name__} has no batches.", hint="check what it reads")

    def read(number: int) -> Iterator[Any]:
        data.on_epoch_begin()
        indices: Iterable[int] = itertools.count() if steps is None else range(steps)
        if shuffle and steps is not None:
            # The order of the batches, as Keras shuffles them; the same on all workers.
            key = derive_seed("batches", job.options.seed, number)
            indices = KeyedPermutation(steps, key)(np.arange(steps, dtype=np.int64)).tolist()
        for i in indices:
            yield data[i]
        if endless:
            data.on_epoch_end()  # else Keras's epoch, or the loop, does it

    return BatchFeed(read, data[0], steps=steps, shares=job.shares, endless=endless)


def _generator_feed(data: Iterable[Any], steps_per_epoch: int | None, name: str, job: Job) -> Feed:
    batches = iter(data)
    try:
        first = next(batches)
    except StopIteration:
        raise DataError(
            f"{name}: the generator given to fit is empty.", hint="make a new generator for each fit"
        ) from None
    everything = itertools.chain([first], batches)
    if steps_per_epoch is None and job.world.size > 1:
        raise DataError(
            f"{name}: the length of a generator is not known before it ends, and workers have to stop together.",
            hint="pass steps_per_epoch to fit, or a keras.utils.PyDataset with a __len__",
        )
    return BatchFeed(lambda number: everything, first, steps=None, shares=job.shares, endless=False)
