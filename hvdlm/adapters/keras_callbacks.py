"""Callbacks that every distributed ``fit`` gets, and what becomes of the person's own.

Callbacks that only write (checkpoints, logs, progress) act on rank 0. Those that decide (early stopping, learning
rates) act on every rank, on the same numbers, so that all decide alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src import tree

from hvdlm.adapters.keras_metrics import put_back_states
from hvdlm.adapters.keras_state import broadcast_variables, model_variables

if TYPE_CHECKING:  # these two need TensorFlow, and Keras may run on torch
    from hvdlm.adapters.keras_data import Feed
    from hvdlm.adapters.keras_job import Job

__all__ = ["Closing", "Opening", "arrange", "share_numbers"]

_LOADER = "fit"


def _writers() -> tuple[type, ...]:
    names = ("ModelCheckpoint", "CSVLogger", "TensorBoard", "ProgbarLogger", "RemoteMonitor", "BackupAndRestore")
    return tuple(cls for cls in (getattr(keras.callbacks, name, None) for name in names) if cls is not None)


def arrange(given: dict[str, Any], *, opening: Any, closing: Closing, job: Any) -> None:
    """Put hvdlm's callbacks around the person's in the arguments of a ``fit``, and keep the writers to rank 0."""
    own = given.get("callbacks")
    if isinstance(own, keras.callbacks.CallbackList):
        own = own.callbacks
    callbacks = [c for c in tree.flatten(own or []) if c is not None]
    closing.restores = any(isinstance(c, keras.callbacks.BackupAndRestore) for c in callbacks)
    if not job.world.is_main:
        callbacks = [c for c in callbacks if not isinstance(c, _writers())]
        given["verbose"] = 0
    elif given.get("verbose") == "auto":
        given["verbose"] = 2  # a line an epoch: hvdlm shows the progress within one
    closing.others = callbacks
    given["callbacks"] = [opening, *callbacks, closing]


class Opening(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Comes before the person's callbacks: keeps the account, and makes their numbers equal on all ranks.

    Args:
        job: What the parts share.
        feed: What this ``fit`` reads.
        offset: Added to Keras's number of an epoch to get the number of the pass over the data.
        passes: Told the number of each pass that begins.
        model: The model.
    """

    def __init__(self, job: Job, feed: Feed, *, offset: int, passes: Callable[[int], None], model: Any) -> None:
        super().__init__()
        self._job, self._feed, self._offset, self._passes = job, feed, offset, passes
        self._cycle = getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
        self._copies = job.world.size if job.options.partition == "none" else 1
        self._seen = job.seen.numpy()
        self._steps = 0
        self._is_rest = False
        self._complete: list[tuple[Any, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start a pass over the data."""
        number = max(0, epoch + self._offset)
        self._feed.start(number)
        self._passes(number)
        self._seen = self._job.seen.numpy()
        self._job.start_epoch()
        self._is_rest = self._job.place.resumed and self._job.place.within
        if self._is_rest and self._job.world.is_main:
            put_back_states(self.model, self._job.place.metrics)
        if not self._feed.describe()[0]:
            self._job.recorder.epoch(_LOADER, number, 0, 0, self.params.get("steps") or 0)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Measure the step, or steps, that follow."""
        self._job.shares.begin()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Tell the recorder what the last steps were made from."""
        recorder = self._job.recorder
        now = self._job.seen.numpy()
        steps, count, total = (now - self._seen).tolist()
        self._job.shares.end(count)
        if self._job.options.timings_every:
            recorder.data(self._job.reading.new())
        self._seen = now
        for planned in self._feed.take(steps, count, total):
            samples = self._feed.describe()
            begins = planned.first and not self._job.place.resumed
            self._job.place.resumed = False
            self._job.place.batch(planned.epoch, planned.share.total // self._copies, begins)
            if planned.first and samples[0]:
                recorder.epoch(_LOADER, planned.epoch, *samples, self._feed.steps or 0)
            recorder.batch(planned.share, planned.epoch, _LOADER)
            if logs and "loss" in logs:
                recorder.loss(logs["loss"], planned.share)
            if self._job.synchronised():
                recorder.reduced()
            self._steps += 1
            if self._steps % self._cycle == 0:
                recorder.step()
            if planned.last:
                self._job.synchronise()
            if planned.last and samples[0]:
                recorder.epoch_done(_LOADER, planned.epoch)
        if self._is_rest and self._job.place.cursor.batch == self._feed.steps:
            variables = [*model_variables(self.model), *self.model.optimizer.variables]
            self._complete = [(v, np.array(keras.ops.convert_to_numpy(v))) for v in variables]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Give every rank the numbers of rank 0: the last bits of equal models may differ between processors."""
        # Keras tries a whole pass. Where only the rest of one is read its next step finds no data, but what depends on
        # none happens: steps are counted, weights decay.
        for variable, value in self._complete:
            variable.assign(value)
        self._complete = []
        self._job.synchronise()
        share_numbers(logs, self._job)


def share_numbers(logs: Any, job: Any) -> None:
    """Put the numbers of rank 0 into the logs of every rank."""
    if job.world.size == 1 or logs is None:
        return
    own = {k: float(np.asarray(v)) for k, v in logs.items() if np.asarray(v).size == 1}
    payload = json.dumps(own).encode() if job.world.is_main else b""
    logs.update(json.loads(job.collectives.broadcast(payload)))


class Closing(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Comes after the person's callbacks: all ranks restore alike and stop together.

    Args:
        job: What the parts share.
        model: The model.
        feed: What this ``fit`` reads; None where no place is kept.
        steps: ``steps_per_epoch``.
    """

    def __init__(self, job: Any, model: Any, feed: Feed | None = None, steps: int | None = None) -> None:
        super().__init__()
        self._job, self._model, self._feed = job, model, feed
        self._cuts_passes = steps is None or (feed is not None and steps == feed.steps)
        self._cycle = getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
        self._stops = False
        self.restores = False
        self.others: list[Any] = []
        """The person's callbacks."""

    def on_train_begin(self, logs: Any = None) -> None:
        """What BackupAndRestore read on rank 0, everywhere; and what callbacks held where the run goes on."""
        self._stops = False
        if self._feed is not None:
            self._job.place.put_back_callbacks(self.others)
        if not self.restores or self._job.world.size == 1:
            return
        model, collectives = self._model, self._job.collectives
        epoch = collectives.broadcast(json.dumps(model._initial_epoch).encode())
        model._initial_epoch = json.loads(epoch)
        broadcast_variables([*model_variables(model), *model.optimizer.variables], collectives)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """A rank that stops alone would leave the others waiting: it goes on to the end of the epoch."""
        if self._job.world.size > 1 and self._model.stop_training:
            self._stops, self._model.stop_training = True, False
        feed = self._feed
        # The end of a pass waits for the end of the epoch: evaluation and callbacks belong to it.
        if feed is not None and feed.steps and self._cuts_passes:
            done = self._job.place.cursor.batch
            if done < feed.steps and done % self._cycle == 0:
                self._job.place.within = True
                self._job.place.note_callbacks(self.others)
                self._job.course.boundary()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop everywhere if one rank wants to; the epoch is complete."""
        if self._job.world.size > 1:
            wants = self._stops or bool(self._model.stop_training)
            self._model.stop_training = bool(self._job.collectives.allreduce(np.array([int(wants)]), "max")[0])
        if self._feed is not None:
            place = self._job.place
            place.epoch_done(epoch, logs or {}, bool(self._model.stop_training), self._cuts_passes)
            place.note_callbacks(self.others)
            self._job.course.boundary()
