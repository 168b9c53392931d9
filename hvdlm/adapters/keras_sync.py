"""How replicas stay one under Keras: their gradients are summed at each step, or they meet every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_local import LocalSync
from hvdlm.adapters.keras_optimizers import scale_learning_rate
from hvdlm.adapters.keras_prune import Pruner
from hvdlm.adapters.keras_reducer import Reducer, tensor_of
from hvdlm.adapters.keras_wire import KerasWire
from hvdlm.contracts import Collectives
from hvdlm.options import Options

__all__ = ["Synchroniser"]


class Synchroniser:
    """One part for each optimizer.

    Args:
        models: Gives the models of the script.
    """

    def __init__(self, models: Callable[[], Sequence[Any]]) -> None:
        self._models = models
        self._parts: list[Reducer | LocalSync] = []
        self._pruners: dict[int, Pruner] = {}
        self._given: Mapping[str, Any] = {}

    def of(self, optimizer: Any, job: Job, wire: KerasWire) -> Reducer | LocalSync:
        """The part of an optimizer; made when first asked for, with replicas equal."""
        for part in self._parts:
            if part.optimizer is optimizer:
                return part
        name, cap = str(len(self._parts)), (job.options.bucket_cap_mb or 32.0) * 2**20
        made: Reducer | LocalSync
        if job.options.sync == "local":
            first = not self._parts  # of several optimizers one averages what none of them trains
            statistics = self._untrained if first else list
            made = LocalSync(
                optimizer,
                job=job,
                wire=wire,
                statistics=statistics,
                bucket_cap_bytes=cap,
                name=name,
                synced=self._prune,
            )
            job.synchronise, job.synchronised = self.synchronise, lambda: self.synchronised
        else:
            made = Reducer(
                optimizer,
                wire=wire,
                weight=job.weight,
                options=job.options,
                bucket_cap_bytes=cap,
                name=name,
                within_host=job.on_processors,
                tell=job.recorder.event,
            )
        self._parts.append(made)
        with tf.init_scope():
            self._load(made)
            scale_learning_rate(optimizer, job.options, job.world)
        return made

    def _untrained(self) -> list[Any]:
        return [v for model in self._models() for v in model.non_trainable_variables]

    def prune(self, where: str, model: Any, options: Options) -> None:
        """Prune a model from now on, if that is asked for. It has all its variables."""
        if options.prune != "none" and id(model) not in self._pruners:
            self._pruners[id(model)] = Pruner([(where, model)], options)

    def _prune(self) -> None:
        for pruner in self._pruners.values():
            pruner.apply()  # the outer step may have moved what is pruned
            pruner.synced()

    def reduce(
        self, optimizer: Any, grads: list[Any], variables: list[Any] | None, job: Job, wire: KerasWire | None
    ) -> list[Any]:
        """What an outermost ``apply`` is to apply."""
        if wire is not None:
            part = self.of(optimizer, job, wire)
            if isinstance(part, Reducer):
                part.masks = {key: mask for pruner in self._pruners.values() for key, mask in pruner.masks.items()}
            grads = part.reduce(grads, variables)
        for pruner in self._pruners.values():
            grads = pruner.masked(grads, optimizer._trainable_variables if variables is None else variables)
        return grads

    def applied(self, optimizer: Any, variables: Sequence[Any] | None) -> None:
        """An outermost ``apply`` has ended."""
        trained = {id(tensor_of(v)) for v in (optimizer._trainable_variables if variables is None else variables)}
        for pruner in self._pruners.values():
            if trained & set(pruner.masks):
                pruner.applied(optimizer)
        for part in self._parts:
            if part.optimizer is optimizer and isinstance(part, LocalSync):
                part.applied(variables)

    @property
    def _locals(self) -> list[LocalSync]:
        return [part for part in self._parts if isinstance(part, LocalSync)]

    @property
    def synchronised(self) -> bool:
        """Whether replicas are equal now."""
        return all(part.synchronised for part in self._locals)

    def synchronise(self) -> None:
        """Make replicas equal. Every rank calls it between the same two steps."""
        for part in self._locals:
            part.synchronise()

    @property
    def slots(self) -> list[keras.Variable]:
        """The state of all optimizers."""
        return [v for part in self._parts for v in part.optimizer.variables]

    def state(self) -> dict[str, Any]:
        """What codecs and outer optimizers remember between two steps, or two synchronisations."""
        return {
            "reducers": [part.state() for part in self._parts if isinstance(part, Reducer)],
            "locals": [part.state() for part in self._locals],
            "pruners": [pruner.state() for pruner in self._pruners.values()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; what was not there before starts anew."""
        for pruner, kept in zip(self._pruners.values(), state.get("pruners", ()), strict=False):
            pruner.load_state(kept)
        self._given = state
        for part in self._parts:
            self._load(part)

    def _load(self, part: Reducer | LocalSync) -> None:
        alike = [one for one in self._parts if type(one) is type(part)]
        states = self._given.get("locals" if isinstance(part, LocalSync) else "reducers", ())
        number = alike.index(part)
        part.load_state(states[number] if number < len(states) else {})

    def pool(self, collectives: Collectives) -> None:
        """Share out among all workers what their codecs have not sent yet. Every rank calls it."""
        for part in self._parts:
            part.pool(collectives)
