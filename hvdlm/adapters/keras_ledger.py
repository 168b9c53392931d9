"""The state of a dataset that a loop of one's own reads, as :class:`hvdlm.algorithms.ledger.Ledger`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_recipe import Recipe, read_back, steps_of
from hvdlm.algorithms.ledger import Cursor, Ledger, Source

__all__ = ["cursor_of", "state_of"]


def state_of(dataset: Any, job: Job, done: Cursor) -> dict[str, Any]:
    """What :meth:`hvdlm.adapters.keras_feeds.ShardedDataset.state_dict` gives.

    Args:
        dataset: The person's.
        job: What to do.
        done: What is trained on.
    """
    recipe = read_back(dataset) if isinstance(dataset, tf.data.Dataset) else ""
    return Ledger(
        source=_source(dataset, job),
        cursor=done,
        world_size=job.world.size,
        weights=tuple(job.weights),
        strategy=job.options.partition,
        batch_size=recipe.batch_size if isinstance(recipe, Recipe) else 0,
    ).to_json()


def cursor_of(state: object, dataset: Any, job: Job) -> Cursor:
    """Where a state says that the next batch stands.

    Raises:
        DataError: It is of another pipeline, seed, or newer version.
    """
    return Ledger.from_json(state, _source(dataset, job)).cursor


def _source(dataset: Any, job: Job) -> Source:
    if isinstance(dataset, tf.data.Dataset):
        names = [type(step).__name__.strip("_").removesuffix("Dataset") for step in steps_of(dataset)]
        kind, length = "tf.data.Dataset", int(dataset.cardinality())
    else:
        names, kind, length = [type(dataset).__name__], "keras.utils.PyDataset", dataset.num_batches or -1
    # What a pipeline does stands for its order; it has a length in batches, if any.
    return Source(
        dataset=kind,
        num_samples=max(0, length),
        seed=job.options.seed,
        shuffled="Shuffle" in names,
        sampler=" <- ".join(names),
    )
