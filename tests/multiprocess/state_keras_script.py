"""An unchanged Keras script, run by test_state.py: killed at some step, started again with --resume.

``state_keras_script.py OUT DATA KILL_AT``: DATA is ``arrays``, ``tfdata``, ``py`` (PyDataset), ``stream``
(steps_per_epoch), ``loop`` (a loop of its own) or ``two`` (two calls of fit); KILL_AT the batch, counted in this
life, in which rank 0 kills itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvdlm

out, kind, kill_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
EPOCHS, SAMPLES, BATCH = 3, 50, 6
keras.utils.set_random_seed(1)
x = np.random.default_rng(2).normal(size=(SAMPLES, 4)).astype("float32")
y = (x**2).sum(1, keepdims=True)
batches = 0


class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        count()


def count() -> None:
    global batches
    if batches == kill_at and hvdlm.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    batches += 1


class Rows(keras.utils.PyDataset):
    def __len__(self) -> int:
        return (SAMPLES + BATCH - 1) // BATCH

    def __getitem__(self, index: int) -> Any:
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return x[rows], y[rows]


def pipeline() -> Any:
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES).batch(BATCH)


def train(model: Any, data: Any = None) -> dict[str, Any]:
    callbacks = [Kill(), keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0)]
    if kind in ("arrays", "two"):
        history = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)
        if kind == "two":
            model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[Kill()])
        return dict(history.history)
    if kind == "stream":
        history = model.fit(pipeline().repeat(), epochs=EPOCHS, steps_per_epoch=7, verbose=0, callbacks=callbacks)
        return dict(history.history)
    if kind == "loop":
        for _ in range(EPOCHS):
            for xs, ys in data:
                count()
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(xs, training=True) - ys) ** 2)
                model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return {}
    history = model.fit(Rows() if kind == "py" else pipeline(), epochs=EPOCHS, verbose=0, callbacks=callbacks)
    return dict(history.history)


model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
model.compile(keras.optimizers.AdamW(1e-2), "mse")
arguments = [pipeline()] if kind == "loop" else []
history = hvdlm.distribute(train)(model, *arguments)
result = {"history": {k: [float(n) for n in v] for k, v in history.items()}, "batches": batches}
result["weights"] = np.concatenate([w.reshape(-1) for w in model.get_weights()]).tolist()
Path(f"{out}.{os.getpid()}.json").write_text(json.dumps(result))
