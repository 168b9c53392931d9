"""Chooses how a ``tf.data`` pipeline is shared out, and says what it costs where samples cannot be told apart early."""

from __future__ import annotations

import json
import logging
from typing import Any

import tensorflow as tf
from keras.src.trainers.data_adapters.tf_dataset_adapter import make_class_weight_map_fn

from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_own_part import OwnPart
from hvdlm.adapters.keras_pipeline import DatasetFeed, Way, same_order
from hvdlm.adapters.keras_recipe import Recipe, read_back, refuse_unordered, shards_of
from hvdlm.adapters.keras_whole_batches import WholeBatches
from hvdlm.errors import DataError
from hvdlm.state.course import Straight

__all__ = ["pipeline_feed", "refuse_few", "warn_of_batches"]

_log = logging.getLogger("hvdlm")


def pipeline_feed(
    x: tf.data.Dataset, class_weight: Any, endless: bool, name: str, job: Job, passes_done: int = 0
) -> DatasetFeed:
    """The feed for a ``tf.data.Dataset``.

    Args:
        x: The person's.
        class_weight: As for ``fit``.
        endless: Whether one iterator reads pass after pass (``steps_per_epoch``).
        name: For messages.
        job: What to do.
        passes_done: Passes that were read by the run that this one goes on with.

    Raises:
        DataError: It cannot be shared out rightly; says why.
    """
    if not endless and int(x.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise DataError(f"{name}: the dataset is endless.", hint="pass steps_per_epoch to fit")
    if int(x.cardinality()) == 0:
        raise DataError(f"{name}: the dataset is empty.", hint="check what it reads, and its filters and takes")
    if len(set(job.collectives.allgather(json.dumps(shards_of(x)).encode()))) > 1:
        raise DataError(
            f"{name}: its pipeline is sharded by rank already, so that batches would be cut of shards.",
            hint="leave .shard(...) out: hvdlm shares the data out",
        )
    keeps = not isinstance(job.course, Straight)
    return DatasetFeed(
        _way(x, name, job, by_number=passes_done > 0),
        lambda ordered, number: same_order(ordered, name, job, number if keeps else None),
        finish=None if class_weight is None else make_class_weight_map_fn(class_weight),
        endless=endless,
        passes_done=0 if keeps else passes_done,
    )


def _way(x: tf.data.Dataset, name: str, job: Job, by_number: bool) -> Way:
    """Each worker makes its own samples where that is exact, else all of them.

    Args:
        x: The person's dataset.
        name: For messages.
        job: What to do.
        by_number: Whether one process too should have an order apart from the samples, to go through it alone.
    """
    per_worker = job.options.batch == "per_worker" and job.options.partition != "none"
    if (job.world.size == 1 and not by_number) or job.options.partition == "none":
        return WholeBatches(x, job.shares, per_worker)
    recipe = "shares follow the speed of workers" if job.shares.dynamic else read_back(x)
    if isinstance(recipe, Recipe):
        refuse_unordered(recipe.source, name)
        if recipe.tensors is None and job.world.is_main and job.world.size > 1:
            _log.warning(
                "%s: every worker reads all of its source (%s); what comes behind it is done by sample, where it is "
                "trained on",
                name,
                recipe.source_name,
            )
        refuse_few(recipe.num_samples, name, job.world.size)
        return OwnPart(recipe, job.partition, recipe.batch_size * (job.world.size if per_worker else 1))
    refuse_unordered(x, name)
    warn_of_batches(name, job, f"the tf.data pipeline ({recipe})")
    return WholeBatches(x, job.shares, per_worker)


def refuse_few(num_samples: int | None, name: str, size: int) -> None:
    """Refuse data of which some worker would never get any.

    Raises:
        DataError: There are fewer samples than workers.
    """
    if num_samples is not None and num_samples < size:
        raise DataError(
            f"{name}: fit was given {num_samples} samples, fewer than the {size} workers.",
            hint=f"run with at most {max(1, num_samples)} workers",
        )


def warn_of_batches(name: str, job: Job, source: str) -> None:
    """Say that every worker makes whole batches of ``source``."""
    if job.world.size > 1 and job.world.is_main and job.options.partition != "none":
        _log.warning(
            "%s: batches of %s are cut by position after they are made: every worker reads and prepares all of them "
            "(its work on input is not shared, the training is). Arrays given to fit are shared out by sample",
            name,
            source,
        )
