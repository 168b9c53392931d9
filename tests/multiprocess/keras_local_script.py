"""Local synchronisation under Keras, each case against an oracle that plays all workers in one process.

``python keras_local_script.py DIRECTORY`` under a launcher: every rank writes ``CASE.RANK.json``, as
:mod:`tests.multiprocess.local_script` does for PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import hvdlm
from hvdlm.algorithms.outer import mean_move, nesterov
from hvdlm.algorithms.partition import split_shares
from hvdlm.errors import ConfigError
from tests.multiprocess.answers import write_answer

SAMPLES, BATCH, EPOCHS, EVERY = 45, 7, 3, 4
NESTEROV = {"outer_optimizer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9}
keras.config.set_floatx("float64")


def sgd() -> Any:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def adam() -> Any:
    return keras.optimizers.Adam(0.01)


def model_of(norm: bool = False) -> Any:
    keras.utils.set_random_seed(3)
    middle = [layers.BatchNormalization(momentum=0.8)] if norm else []
    return keras.Sequential([layers.Input((5,)), layers.Dense(9), *middle, layers.Activation("tanh"), layers.Dense(3)])


def data_of(samples: int) -> tuple[Any, Any]:
    x = np.random.default_rng(7).standard_normal((samples, 5))
    return x, np.tanh(x[:, :3]) + 0.1


def trained(
    make: Callable[[], Any], *, norm: bool = False, samples: int = SAMPLES, by_hand: bool = False, **options: Any
) -> Any:
    """The script of a person."""
    x, y = data_of(samples)

    @hvdlm.distribute(partition="contiguous", sync="local", sync_every=EVERY, **options)
    def train(model: Any) -> None:
        model.compile(make(), "mse")
        for _ in range(EPOCHS if by_hand else 0):
            for at in range(0, samples, BATCH):
                model.train_on_batch(x[at : at + BATCH], y[at : at + BATCH])
        if not by_hand:
            # Validation sees replicas that are equal.
            model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, validation_data=(x, y))

    model = model_of(norm)
    train(model)
    return model


def played(
    make: Callable[[], Any], *, norm: bool = False, samples: int = SAMPLES, by_hand: bool = False, **options: Any
) -> Any:
    """The same, with all workers played here."""
    size, shared = hvdlm.size(), model_of(norm)
    workers, optimizers = [model_of(norm) for _ in range(size)], [make() for _ in range(size)]
    for worker, optimizer in zip(workers, optimizers, strict=True):
        optimizer.build(worker.trainable_variables)
    velocity = [np.zeros(v.shape) for v in shared.trainable_variables]
    counts, steps, (x, y) = [0] * size, 0, data_of(samples)
    left = options.get("sync_warmup_steps", 0)
    outer = {"lr": options.get("outer_lr", 0.7), "momentum": options.get("outer_momentum", 0.9)}

    def synchronise() -> None:
        nonlocal counts, steps
        for i, v in enumerate(shared.trainable_variables):
            start = v.numpy()
            moved = mean_move(start, [worker.trainable_variables[i].numpy() for worker in workers], counts)
            if options.get("outer_optimizer") == "nesterov":
                new, velocity[i] = nesterov(start, moved, velocity[i], **outer)
            else:
                new = start + moved
            for model in (shared, *workers):
                model.trainable_variables[i].assign(new)
        for i, v in enumerate(shared.non_trainable_variables):
            if v.dtype.startswith("float"):
                start = v.numpy()
                new = start + mean_move(start, [w.non_trainable_variables[i].numpy() for w in workers], counts)
                for model in (shared, *workers):
                    model.non_trainable_variables[i].assign(new)
        if options.get("local_moments") == "average":
            for slots in zip(*([v for v in o.variables if len(v.shape)] for o in optimizers), strict=True):
                mean = mean_move(np.zeros(slots[0].shape), [slot.numpy() for slot in slots], counts)
                for slot in slots:
                    slot.assign(mean)
        counts, steps = [0] * size, 0

    for _ in range(EPOCHS):
        for at in range(0, samples, BATCH):
            xs, ys = x[at : at + BATCH], y[at : at + BATCH]
            ends = np.cumsum([0, *split_shares(len(xs), [1.0] * size)])
            found = []
            for i, worker in enumerate(workers):
                part = slice(int(ends[i]), int(ends[i + 1]))
                count = part.stop - part.start
                with tf.GradientTape() as tape:
                    part = part if count else slice(0, 1)
                    loss = tf.reduce_mean(tf.square(worker(xs[part], training=True) - ys[part]))
                    loss = loss * (1.0 if count else 0.0)
                found.append(tape.gradient(loss, [v.value for v in worker.trainable_variables]))
                counts[i] += count
            if left:
                parts = np.diff(ends) / len(xs)
                together = [sum(w * g for w, g in zip(parts, gs, strict=True)) for gs in zip(*found, strict=True)]
                found = [together] * size
            for worker, optimizer, gradients in zip(workers, optimizers, found, strict=True):
                optimizer.apply(gradients, worker.trainable_variables)
            if left:
                left, counts = left - 1, [0] * size
                for own, v in zip(shared.trainable_variables, workers[0].trainable_variables, strict=True):
                    own.assign(v)
                continue
            steps += 1
            if steps == EVERY:
                synchronise()
        if not by_hand and steps:
            synchronise()
    if steps:
        synchronise()
    return shared


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "averaging": (sgd, {}),
    "nesterov": (adam, NESTEROV),
    "moments_averaged": (adam, {"local_moments": "average"}),
    "fillers": (sgd, {"samples": 43}),  # the last batch has one sample
    "batch_norm": (sgd, {"norm": True, "samples": 42}),
    "by_hand": (adam, {"by_hand": True}),
    "small_buckets": (sgd, {"bucket_cap_mb": 0.001}),
    "together_first": (adam, {**NESTEROV, "sync_warmup_steps": 9}),  # into the second epoch
    "together_first_by_hand": (sgd, {"sync_warmup_steps": 6, "by_hand": True, "samples": 43}),
}


def flat(model: Any) -> Any:
    return np.concatenate([v.numpy().ravel() for v in model.variables if v.dtype.startswith("float")])


def found(name: str, run: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    model, oracle = run()
    own, start = flat(model), flat(model_of(CASES.get(name, (sgd, {}))[1].get("norm", False)))
    return {
        "digest": own.tobytes().hex(),
        "moved": float(np.linalg.norm(own - start)),
        "far": 0.0 if oracle is None else float(np.linalg.norm(own - flat(oracle)) / np.linalg.norm(own)),
    }


def refused() -> Any:
    """Moving averages would be each worker's own while all train together."""
    try:
        trained(sgd, norm=True, sync_warmup_steps=3)
    except ConfigError as error:
        assert "moving averages" in str(error)
        return model_of()
    raise AssertionError("a model with moving averages was taken")


def main() -> None:
    directory = Path(sys.argv[1])
    runs: dict[str, Callable[[], tuple[Any, Any]]] = {
        name: lambda make=make, options=options: (trained(make, **options), played(make, **options))
        for name, (make, options) in CASES.items()
    }
    runs["coded"] = lambda: (trained(sgd, compression="int8"), None)
    runs["refused"] = lambda: (refused(), None)
    for name, run in runs.items():
        write_answer(directory, name, lambda name=name, run=run: found(name, run))


if __name__ == "__main__":
    hvdlm.init()
    main()
