"""Where the training of a Keras script stands: which call of ``fit``, which epoch, how much of its pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np

from hvdlm.algorithms.ledger import Cursor, Source, compare

__all__ = ["FITS", "Place"]

FITS = "fit"
"""What calls of ``fit`` are counted under, as epochs of a loader are: see :class:`hvdlm.contracts.Course`."""


@dataclass
class Place:
    """What is kept of it. Plain values only."""

    fits: int = 0
    """Calls of ``fit`` that came to their end."""
    epoch: int = 0
    """Keras's number of the next epoch of the one that runs."""
    within: bool = False
    """Whether that epoch has begun."""
    cursor: Cursor = field(default_factory=Cursor)
    """The pass over the data, and what is done of it."""
    passes: dict[str, int] = field(default_factory=dict)
    """Passes over the data that each model has begun, by the model's name."""
    stopped: bool = False
    """Whether a callback has ended the one that runs."""
    logs: list[dict[str, Any]] = field(default_factory=list)
    """What each epoch of the one that runs gave."""
    earlier: list[list[dict[str, Any]]] = field(default_factory=list)
    """The same of those that came to their end."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The numbers that the person's callbacks hold."""
    metrics: list[float] = field(default_factory=list)
    """The states of the metrics of a pass that has begun, over all workers."""
    datasets: dict[str, Cursor] = field(default_factory=dict)
    """Of loops of one's own: the position in each dataset."""
    source: dict[str, Any] = field(default_factory=dict)
    """The data of the one that runs: fields of a :class:`hvdlm.algorithms.ledger.Source`; empty if not known."""
    resumed: bool = False
    """Whether the next ``fit`` goes on in the middle; not kept."""

    def loaders(self) -> dict[str, Any]:
        """For the tree of a snapshot: positions by name, each with a cursor."""
        own = {name: {"cursor": vars(cursor)} for name, cursor in self.datasets.items()}
        if not self.fits and not self.epoch and self.cursor == Cursor():
            return own
        plain = {
            "epoch": self.epoch,
            "pass": vars(self.cursor),
            "passes": dict(self.passes),
            "stopped": self.stopped,
            "within": self.within,
            "logs": list(self.logs),
            "earlier": list(self.earlier),
            "callbacks": dict(self.callbacks),
            "metrics": list(self.metrics),
            "source": dict(self.source),
        }
        return {**own, FITS: {"cursor": {"epoch": self.fits}, **plain}}

    def load(self, loaders: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.datasets = {name: Cursor(**state["cursor"]) for name, state in loaders.items() if name != FITS}
        state = loaders.get(FITS)
        if state is None:
            return
        self.fits, self.epoch, self.cursor = state["cursor"]["epoch"], state["epoch"], Cursor(**state["pass"])
        self.passes, self.stopped, self.within = dict(state["passes"]), state["stopped"], state["within"]
        self.logs, self.earlier, self.callbacks = state["logs"], state["earlier"], state["callbacks"]
        self.metrics, self.source = state["metrics"], state.get("source", {})
        self.resumed = bool(self.epoch or self.cursor != Cursor() or self.logs)

    def reads(self, source: Source | None) -> None:
        """A ``fit`` begins, or goes on, over this data.

        Raises:
            DataError: It goes on, and the data is another.
        """
        if self.resumed and self.source and source is not None:
            compare(Source(**self.source), source)
        self.source = {} if source is None else asdict(source)

    def batch(self, epoch: int, samples: int, first: bool) -> None:
        """A batch of a pass was trained on."""
        done = Cursor(epoch) if first or epoch != self.cursor.epoch else self.cursor
        self.cursor = Cursor(epoch, done.batch + 1, done.samples + samples)

    def epoch_done(self, epoch: int, logs: Mapping[str, Any], stopped: bool, whole_pass: bool) -> None:
        """An epoch of ``fit`` came to its end."""
        self.epoch, self.stopped, self.within = epoch + 1, stopped, False
        self.logs = [*self.logs, {"epoch": epoch, **_numbers(logs)}]
        if whole_pass:
            self.cursor = Cursor(self.cursor.epoch + 1)

    def fit_done(self) -> None:
        """A call of ``fit`` came to its end."""
        self.fits += 1
        self.earlier = [*self.earlier, self.logs]
        self.logs, self.callbacks = [], {}
        self.epoch, self.stopped, self.within = 0, False, False

    def note_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Keep the numbers that callbacks hold: how long a metric has not improved, the best so far."""
        self.callbacks = {name: _numbers(_state_of(callback)) for name, callback in _named(callbacks)}

    def put_back_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Give callbacks back what they held."""
        for name, callback in _named(callbacks):
            for attribute, value in self.callbacks.get(name, {}).items():
                setattr(callback, attribute, value)


def history_of(logs: Sequence[Mapping[str, Any]]) -> Any:
    """What ``fit`` returns, from what its epochs gave."""
    history = keras.callbacks.History()
    history.on_train_begin()
    for log in logs:
        history.epoch.append(log["epoch"])
        for name, value in log.items():
            if name != "epoch":
                history.history.setdefault(name, []).append(value)
    return history


_PROGRESS = {"best", "best_epoch", "cooldown_counter", "epochs_since_last_save", "stopped_epoch", "wait"}
"""What Keras's own callbacks count with. Others of their numbers are settings, some of which they turn round."""


def _state_of(callback: Any) -> dict[str, Any]:
    is_keras = type(callback).__module__.partition(".")[0] == "keras"
    return {name: value for name, value in vars(callback).items() if not is_keras or name in _PROGRESS}


def _named(callbacks: Sequence[Any]) -> list[tuple[str, Any]]:
    counts: dict[str, int] = {}
    named = []
    for callback in callbacks:
        kind = type(callback).__name__
        counts[kind] = counts.get(kind, 0) + 1
        named.append((f"{kind} {counts[kind]}", callback))
    return named


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, np.generic) or (hasattr(value, "shape") and tuple(value.shape) == ()):
            value = np.asarray(value).item()
        if isinstance(value, (bool, int, float)):
            found[name] = value
    return found
