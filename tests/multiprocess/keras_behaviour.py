"""What callbacks do and which mistakes are told under Keras; each rank writes what it saw as JSON.

``python keras_behaviour.py DIRECTORY [NAME ...]`` runs cases; ``DIRECTORY raise`` and ``DIRECTORY kill``
fail on rank 1 inside ``fit``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvdlm
from tests.multiprocess.keras_cases import BATCH, LENGTH, VOCABULARY, classifier, compiled, text

OUT = Path(sys.argv[1])
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def fit(model: Any, *data: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    kwargs = {"epochs": 3, "verbose": 0, **kwargs}
    if not data or isinstance(data[0], np.ndarray):
        kwargs.setdefault("batch_size", BATCH)

    @hvdlm.distribute(**(options or {}))
    def train(model: Any) -> Any:
        return model.fit(*(data or text()), **kwargs)

    return train(model)


def flat(model: Any) -> list[float]:
    return np.concatenate([keras.ops.convert_to_numpy(v).ravel() for v in model.trainable_variables]).tolist()


class OwnCheckpoint(keras.callbacks.ModelCheckpoint):
    """A person's own kind of a callback that writes."""


@case
def writers() -> list[str]:
    rank = hvdlm.rank()
    callbacks = [
        keras.callbacks.ModelCheckpoint(OUT / f"checkpoint.{rank}.keras"),
        keras.callbacks.CSVLogger(OUT / f"log.{rank}.csv"),
        keras.callbacks.TensorBoard(OUT / f"board.{rank}", write_graph=False),
        OwnCheckpoint(OUT / f"own.{rank}.keras"),
    ]
    fit(compiled(keras.optimizers.Adam(1e-3, name="mine")), callbacks=callbacks, validation_split=0.2)
    # The files are there on every rank: fit returns together.
    kinds = (".keras", ".csv")
    return sorted(path.name for path in OUT.iterdir() if path.suffix in kinds or path.name.startswith("board."))


@case
def stop_of_one_rank() -> dict[str, int]:
    """What one rank decides alone stops all of them, at the end of that epoch."""

    class Stop(keras.callbacks.Callback):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.where, self.epoch = where, 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training |= self.where == "batch" and rank == 1 and self.epoch == 1 and batch == 3

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training |= self.where == "epoch" and rank == 1 and epoch == 1

    rank = hvdlm.rank()
    return {
        where: len(fit(compiled(keras.optimizers.SGD(0.1)), callbacks=[Stop(where)], epochs=5).epoch)
        for where in ("batch", "epoch")
    }


@case
def backup_and_restore() -> list[float]:
    """Interrupted in the third of four epochs, and run again: the same as without."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyError("power cut")

    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(str(OUT / "backup"))

    first, second, straight = (compiled(keras.optimizers.Adam(1e-2)) for _ in range(3))
    fit(straight, epochs=4)
    try:
        fit(first, epochs=4, callbacks=[backup(), Interrupt()])
        raise AssertionError("was not interrupted")
    except KeyError:
        pass
    history = fit(second, epochs=4, callbacks=[backup()])
    difference = np.abs(np.array(flat(second)) - np.array(flat(straight))).max()
    return [history.epoch[0], float(difference)]


@case
def learning_rates() -> list[float]:
    found = []
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 1000)
    for rate in (0.1, schedule):
        model = compiled(keras.optimizers.SGD(rate))
        rates: list[float] = []
        look = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs, m=model, r=rates: r.append(float(m.optimizer._get_current_learning_rate()))
        )
        fit(model, options={"batch": "per_worker", "lr_scale": "linear"}, epochs=1, callbacks=[look])
        found += rates
    return found


@case
def warm_up() -> list[list[float]]:
    """A gradient of 1 at every step: the weight tells each step's learning rate. Each of three optimizers."""
    found = []
    for optimizer in (
        keras.optimizers.SGD(0.1),
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 1.0)),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1.0),
    ):
        model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.compile(optimizer, loss=lambda y, p: p)
        seen: list[float] = []
        look = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, m=model, s=seen: s.append(float(m.trainable_variables[0][0, 0]))
        )
        options = {"batch": "per_worker", "lr_scale": "linear", "lr_warmup_steps": 4}
        fit(model, np.ones((12, 1)), np.ones((12, 1)), batch_size=1, epochs=1, callbacks=[look], options=options)
        found.append((-np.diff(seen)).tolist())
    return found


@case
def jit() -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hvdlm").addHandler(handler)
    fit(compiled(keras.optimizers.SGD(0.1), jit_compile=True), epochs=1)
    logging.getLogger("hvdlm").removeHandler(handler)
    return [record for record in records if "jit_compile" in record]


@case
def mean_and_save() -> list[float]:
    model = compiled(keras.optimizers.SGD(0.1))
    fit(model, epochs=1)
    hvdlm.save(model, OUT / "saved.keras")
    hvdlm.save(model, OUT / "saved.weights.h5")
    mean = hvdlm.mean(tf.constant(float(hvdlm.rank())))
    return [float(mean), float(hvdlm.mean(float(hvdlm.rank()), weight=float(hvdlm.rank())))]


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@case
def mistakes() -> dict[str, str]:
    x, y = text()

    def other_model() -> Any:
        inputs = keras.layers.Input((LENGTH,))
        outputs = keras.layers.Dense(4 + hvdlm.rank(), activation="softmax", name="last")(inputs)
        return compiled(keras.optimizers.SGD(0.1), keras.Model(inputs, outputs))

    def loop_over_unbuilt() -> None:
        model, optimizer = classifier(built=False), keras.optimizers.SGD(0.1)

        @hvdlm.distribute
        def train(model: Any, optimizer: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        train(model, optimizer)

    def under_a_strategy() -> None:
        with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
            model = compiled("sgd", metrics=[])
        fit(model)

    def endless() -> Any:
        return fit(compiled("sgd"), tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(8))

    def sharded_by_hand() -> Any:
        own = tf.data.Dataset.from_tensor_slices((x, y)).shard(hvdlm.size(), hvdlm.rank())
        return fit(compiled("sgd"), own.batch(8))

    def no_sync() -> None:
        @hvdlm.distribute
        def train(model: Any) -> None:
            with hvdlm.no_sync():
                pass

        train(classifier())

    def shared_optimizer() -> None:
        optimizer = keras.optimizers.SGD(0.1)
        first, second = compiled(optimizer), classifier()
        second.compile(optimizer, "sparse_categorical_crossentropy")

        @hvdlm.distribute
        def train(first: Any, second: Any) -> None:
            first.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
            second.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)

        train(first, second)

    def later_in_loop() -> None:
        model = classifier()

        @hvdlm.distribute
        def train(model: Any) -> None:
            model.add(keras.layers.Dense(4, name="later"))
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            gradients = tape.gradient(loss, model.trainable_variables)
            keras.optimizers.SGD(0.1).apply(gradients, model.trainable_variables)

        train(model)

    def torch_beside() -> None:
        import torch

        hvdlm.distribute(lambda model, optimizer: None)(
            classifier(), torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
        )

    def torch_loader() -> Any:
        from torch.utils.data import DataLoader

        return fit(compiled("sgd"), DataLoader([1, 2, 3, 4]))

    def torch_and_tf() -> Any:
        import torch

        return fit(compiled("sgd"), torch.from_numpy(x), tf.constant(y), batch_size=BATCH)

    def compiled_twice() -> Any:
        return fit(compiled("sgd", compiled(keras.optimizers.Adam(0.1))), epochs=1)

    return {
        "shared optimizer": error_of(shared_optimizer),
        "later in loop": error_of(later_in_loop),
        "torch beside": error_of(torch_beside),
        "torch loader": error_of(torch_loader),
        "torch and tf": error_of(torch_and_tf),
        "compiled twice": error_of(compiled_twice),
        "not compiled": error_of(lambda: fit(classifier())),
        "different models": error_of(lambda: fit(other_model(), np.zeros((16, LENGTH)), np.zeros(16))),
        "loop over an unbuilt model": error_of(loop_over_unbuilt),
        "strategy": error_of(under_a_strategy),
        "endless": error_of(endless),
        "sharded by hand": error_of(sharded_by_hand),
        "empty dataset": error_of(
            lambda: fit(compiled("sgd"), tf.data.Dataset.from_tensor_slices((x[:0], y[:0])).batch(8))
        ),
        "two rows": error_of(lambda: fit(compiled("sgd"), tf.data.Dataset.from_tensor_slices((x[:1], y[:1])).batch(8))),
        "generator": error_of(lambda: fit(compiled("sgd"), ((x, y) for _ in range(3)))),
        "one sample": error_of(lambda: fit(compiled("sgd"), x[:1], y[:1])),
        "nothing": error_of(lambda: hvdlm.distribute(lambda number: None)(3)),
        "no_sync": error_of(no_sync),
    }


def fail(how: str) -> None:
    """Rank 1 raises (or is killed) in the middle of an epoch, while rank 0 waits for its gradients."""

    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if hvdlm.rank() == 1 and batch == 3:
                (OUT / "failed").write_text("")
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("on purpose")

    fit(compiled(keras.optimizers.SGD(0.1)), callbacks=[Fail()], epochs=2000)
    (OUT / f"returned.{hvdlm.rank()}").write_text("")


def main() -> None:
    assert VOCABULARY
    if sys.argv[2:] in (["raise"], ["kill"]):
        return fail(sys.argv[2])
    results = {}
    for name in sys.argv[2:] or CASES:
        try:
            results[name] = CASES[name]()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (OUT / f"{hvdlm.rank()}.json").write_text(json.dumps(results))
    return None


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
