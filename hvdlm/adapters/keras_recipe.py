"""How a ``tf.data`` pipeline was put together, read back from the dataset: what orders samples, what makes them.

Which samples a global batch holds depends on the steps that order (shuffle, repeat, take, skip, batch) and never on
what functions make of a sample. So the steps that order can be replayed on sample numbers, and all else be done for one
worker's samples only. What cannot be replayed exactly stays in the source, which every worker reads whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops import (
    batch_op,
    cache_op,
    dataset_ops,
    from_tensor_slices_op,
    interleave_op,
    map_op,
    prefetch_op,
    repeat_op,
    shard_op,
    shuffle_op,
    skip_op,
    take_op,
)
from tensorflow.python.data.util import structure
from tensorflow.python.framework import op_def_registry
from tensorflow.python.ops import gen_dataset_ops

from hvdlm.errors import DataError

__all__ = ["Recipe", "read_back", "refuse_unordered", "shards_of", "steps_of"]

_BATCH = (batch_op._BatchDataset, batch_op._ParallelBatchDataset)
_MAP = (map_op._MapDataset, map_op._ParallelMapDataset)
_COUNT = (repeat_op._RepeatDataset, take_op._TakeDataset, skip_op._SkipDataset)
_SILENT = (prefetch_op._PrefetchDataset, dataset_ops._OptionsDataset)
_KNOWN = (*_BATCH, *_MAP, *_COUNT, *_SILENT, shuffle_op._ShuffleDataset, cache_op.CacheDataset)

_HARMLESS = {
    *("If", "While", "PartitionedCall", "StatefulPartitionedCall", "Assert"),
    *("LookupTableFindV2", "LookupTableSizeV2", "ReadVariableOp", "ResourceGather", "ResourceGatherNd"),
}
"""Operations that TensorFlow calls stateful and that give the same for a sample whenever they are asked."""


@dataclass(frozen=True)
class Recipe:
    """A pipeline in parts.

    Args:
        source: What every worker reads whole; its elements are the samples.
        before: Steps from the source to the batch, first to last.
        batch: What makes batches.
        after: Steps behind it.
    """

    source: Any
    before: tuple[Any, ...]
    batch: Any
    after: tuple[Any, ...]

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return int(tf.get_static_value(self.batch._batch_size))

    @property
    def drop_remainder(self) -> bool:
        """Whether a short batch is left out."""
        return bool(tf.get_static_value(self.batch._drop_remainder))

    @property
    def tensors(self) -> list[tf.Tensor] | None:
        """The tensors whose rows are the samples, where the source is ``from_tensor_slices`` of dense ones."""
        if not isinstance(self.source, from_tensor_slices_op._TensorSliceDataset):
            return None
        tensors: list[tf.Tensor] = self.source._tensors
        return None if any(t.dtype == tf.variant for t in tensors) else tensors

    @property
    def num_samples(self) -> int | None:
        """Samples of the source, if it is known how many."""
        return None if self.tensors is None else int(self.tensors[0].shape[0])

    @property
    def source_name(self) -> str:
        """The source as in the person's code, about."""
        if isinstance(self.source, _MAP):
            return "Map, with a function that draws random numbers or runs Python code"
        return type(self.source).__name__.strip("_").removesuffix("Dataset").removesuffix("DatasetV2")

    @property
    def functions(self) -> list[Any]:
        """What samples are put through, each from a flat list of tensors to a flat list of tensors."""
        return [step._map_func.function for step in self.before if isinstance(step, _MAP)]

    @property
    def cached_after(self) -> int:
        """After how many of these the results are kept in memory; 0 if they are not."""
        kept = functions = 0
        for step in self.before:
            functions += isinstance(step, _MAP)
            kept = functions if isinstance(step, cache_op.CacheDataset) else kept
        caches_batches = any(isinstance(step, cache_op.CacheDataset) for step in self.after)
        return functions if caches_batches else kept

    @property
    def is_permutation(self) -> bool:
        """Whether each pass reads each sample once, but for a short batch that is left out."""
        return not any(isinstance(step, _COUNT) for step in (*self.before, *self.after))

    @property
    def sample_spec(self) -> Any:
        """The type of what becomes part of a batch."""
        return self.batch._input_dataset.element_spec

    def replayed(self, samples: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
        """Batches of other samples, as many as those of the source, in the order of the pipeline."""
        is_shuffled = left_out = False
        for step in (*self.before, self.batch, *self.after):
            if isinstance(step, (*_MAP, *_SILENT)):
                left_out = True
                continue
            if is_shuffled and left_out and isinstance(step, repeat_op._RepeatDataset):
                # TensorFlow fuses a repeat with a shuffle right before it, and the order is then another one.
                samples = samples.prefetch(1)
            is_shuffled, left_out = isinstance(step, shuffle_op._ShuffleDataset), False
            if isinstance(step, _BATCH):
                samples = samples.batch(batch_size, drop_remainder=self.drop_remainder)
            elif isinstance(step, shuffle_op._ShuffleDataset):
                samples = _Shuffled(samples, step)
            elif isinstance(step, cache_op.CacheDataset):
                samples = samples.cache()
            elif isinstance(step, repeat_op._RepeatDataset):
                samples = samples.repeat(step._count)
            elif isinstance(step, take_op._TakeDataset):
                samples = samples.take(step._count)
            elif isinstance(step, skip_op._SkipDataset):
                samples = samples.skip(step._count)
        return samples


class _Shuffled(shuffle_op._ShuffleDataset):  # type: ignore[misc]  # TensorFlow has no types
    """The same shuffle of another dataset, with the seeds that the person's got when it was made."""

    def __init__(self, dataset: Any, like: Any) -> None:
        self._input_dataset, self._name = dataset, None
        self._buffer_size, self._seed, self._seed2 = like._buffer_size, like._seed, like._seed2
        self._reshuffle_each_iteration = like._reshuffle_each_iteration
        variant = gen_dataset_ops.shuffle_dataset_v3(
            dataset._variant_tensor,
            buffer_size=self._buffer_size,
            seed=self._seed,
            seed2=self._seed2,
            seed_generator=gen_dataset_ops.dummy_seed_generator(),
            reshuffle_each_iteration=self._reshuffle_each_iteration,
            **self._common_args,
        )
        super(shuffle_op._ShuffleDataset, self).__init__(dataset, variant)


def steps_of(dataset: Any) -> Iterator[Any]:
    """The steps of a pipeline, from the last one back."""
    yield dataset
    for earlier in dataset._inputs():
        yield from steps_of(earlier)


def read_back(dataset: Any) -> Recipe | str:
    """The parts of a pipeline, or why its batches can be cut only after they are made."""
    after: list[Any] = []
    step = dataset
    while not isinstance(step, _BATCH):
        if isinstance(step, _MAP):
            return "a map works on whole batches: put .map(...) before .batch(...)"
        if not isinstance(step, _KNOWN):
            name = type(step).__name__.strip("_").removesuffix("Dataset")
            return f"batches come from {name}, and not from .batch(...)"
        if _is_file(step):
            return "batches are cached in a file"
        after.insert(0, step)
        step = step._input_dataset
    batch = step
    before: list[Any] = []
    if any(tf.get_static_value(part) is None for part in (batch._batch_size, batch._drop_remainder)):
        return "the size of its batches is not known"
    step = batch._input_dataset
    while isinstance(step, _KNOWN) and not isinstance(step, _BATCH):
        if _is_file(step) or (isinstance(step, _MAP) and _depends_on_order(step._map_func.function)):
            break
        before.insert(0, step)
        step = step._input_dataset
    if not _can_be_kept(step.element_spec):
        return f"its samples are {step.element_spec}"
    return Recipe(step, tuple(before), batch, tuple(after))


def _can_be_kept(spec: Any) -> bool:
    return all(part.dtype != tf.variant for part in structure.get_flat_tensor_specs(spec))


def _is_file(step: Any) -> bool:
    return isinstance(step, cache_op.CacheDataset) and tf.get_static_value(step._filename) != b""


def _depends_on_order(function: Any) -> bool:
    """Whether what a function gives may depend on the calls before: random numbers, Python code, counters."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    kinds = {node.op for node in nodes} - _HARMLESS
    known = {kind: op_def_registry.get(kind) for kind in kinds}  # None: a function, whose nodes are among these
    return any(definition is not None and definition.is_stateful for definition in known.values())


def shards_of(dataset: Any) -> list[tuple[int, int]]:
    """(number of shards, index) of each ``shard`` in a pipeline."""
    shards = [step for step in steps_of(dataset) if isinstance(step, shard_op._ShardDataset)]
    return [(int(tf.get_static_value(s._num_shards)), int(tf.get_static_value(s._index))) for s in shards]


def refuse_unordered(dataset: Any, name: str) -> None:
    """Refuse a pipeline whose order is left to chance: it would be another on each worker.

    Raises:
        DataError: A step is not deterministic.
    """
    for step in steps_of(dataset):
        if _is_left_to_chance(step):
            raise DataError(
                f"{name}: {type(step).__name__.strip('_').removesuffix('Dataset')} has deterministic=False, so that "
                "every worker would read another order: samples would be missed and others repeated.",
                hint="leave deterministic=False out",
            )


def _is_left_to_chance(step: Any) -> bool:
    if not isinstance(step, interleave_op._ParallelInterleaveDataset):
        return getattr(step, "_deterministic", None) == "false"
    # This one does not tell; the last node of its graph does.
    text = tf.raw_ops.DatasetToGraphV2(input_dataset=step._variant_tensor, strip_device_assignment=True)
    nodes = [node for node in tf.compat.v1.GraphDef.FromString(text.numpy()).node if "Interleave" in node.op]
    return bool(nodes) and nodes[-1].attr["deterministic"].s == b"false"
