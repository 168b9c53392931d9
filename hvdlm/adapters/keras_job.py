"""What the parts of the Keras adapter share while a job runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from hvdlm.adapters.keras_metrics import pooled_states
from hvdlm.adapters.keras_place import Place
from hvdlm.adapters.keras_reading import Reading
from hvdlm.adapters.keras_shares import Shares
from hvdlm.contracts import Collectives, Course, Recorder
from hvdlm.options import Options
from hvdlm.plan import Partition
from hvdlm.planning import why_not_halves
from hvdlm.state.course import Straight
from hvdlm.world import World

__all__ = ["Job"]

_log = logging.getLogger("hvdlm")


@dataclass(kw_only=True)
class Job:
    """One run on this worker."""

    options: Options
    world: World
    collectives: Collectives
    recorder: Recorder
    weights: tuple[float, ...] = ()
    """Relative speed of each worker; equal if empty."""
    course: Course = field(default_factory=Straight)
    """Told of the boundaries between steps; says what was completed before the run went on."""
    place: Place = field(default_factory=Place)
    """Where the training stands."""
    training: Any = None
    """The model whose ``fit`` runs."""
    calls: int = 0
    """Calls of ``fit`` that the script has made, those passed on its way to where the run goes on included."""
    synchronise: Callable[[], None] = lambda: None
    """Makes replicas equal where they train on their own; every rank calls it between the same two steps."""
    synchronised: Callable[[], bool] = lambda: True
    """Whether they are equal now."""
    shares: Shares = field(init=False)
    """How training batches are cut."""
    reading: Reading = field(default_factory=Reading)
    """How long ``fit`` waits for its batches."""
    weight: tf.Variable = field(init=False)
    """What this worker's gradient counts in the sum over workers, float64."""
    seen: tf.Variable = field(init=False)
    """int64 [steps, samples that counted here, samples in the job], so far."""

    def __post_init__(self) -> None:
        sums_halves = getattr(self.collectives, "sums_halves", True)
        instead = why_not_halves(self.options.compression, self.on_processors, sums_halves)
        if instead and not self.options.bucket_cap_mb:  # with a size everything is done as it says
            reason = f"{instead}compression=none"
            self.recorder.event("plan", codec="none", reason=reason)
            if self.world.is_main:
                _log.warning("%s", reason)
            self.options = replace(self.options, compression="none", compression_warmup_steps=0)
        self._mean = self.options.reduction == "mean"
        partition = Partition(
            strategy=self.options.partition,
            rank=self.world.rank,
            size=self.world.size,
            seed=self.options.seed,
            weights=self.weights,
        )
        dynamic = self.options.balance == "dynamic"
        self.shares = Shares(partition, world=self.world, collectives=self.collectives, dynamic=dynamic)
        self._before_epoch = 0
        self._alone = 1.0 / self.world.size if self._mean else 1.0
        # Whoever trains alone wants to know its part of the batch, whatever the loss is.
        self._mean |= self.options.sync == "local"
        with tf.init_scope():
            self.weight = tf.Variable(self._alone, dtype=tf.float64, trainable=False, name="hvdlm_weight")
            self.seen = tf.Variable([0, 0, 0], dtype=tf.int64, trainable=False, name="hvdlm_seen")

    @property
    def on_processors(self) -> bool:
        """Whether all workers are on one host, and compute on its processors."""
        return self.world.within_host and not tf.config.list_physical_devices("GPU")

    @property
    def partition(self) -> Partition:
        """How a training batch is cut that nobody has planned yet."""
        return self.shares.now

    def counts(self, counts: Any) -> None:
        """The next gradient is of a batch with int64 [samples that count here, samples in the job]. Also in graphs."""
        counts = tf.convert_to_tensor(counts, tf.int64)
        count, total = tf.cast(counts[0], tf.float64), tf.cast(counts[1], tf.float64)
        self.weight.assign(count / total if self._mean else tf.cast(count > 0, tf.float64))
        self.seen.assign_add(tf.concat([tf.ones([1], tf.int64), counts], 0))

    def uncounted(self) -> None:
        """The next gradients are of batches that the script made itself: every worker counts the same."""
        self.weight.assign(self._alone)

    def pool(self) -> None:
        """Sum the metrics of a pass that has begun; every rank calls it."""
        if self.training is not None:
            self.place.metrics = pooled_states(self.training, self.collectives)

    def start_epoch(self) -> None:
        """An epoch of ``fit`` begins."""
        self._before_epoch = int(self.seen.numpy()[1])

    def epoch_samples(self) -> int:
        """Samples that counted here since the epoch began."""
        return int(self.seen.numpy()[1]) - self._before_epoch
