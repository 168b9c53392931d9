"""A small Keras training whose end depends on every sample and step: Adam with clipping and a schedule.

``STYLE`` is ``fit`` (on arrays) or ``loop`` (a loop of one's own over a ``tf.data`` pipeline that shuffles).
"""

from __future__ import annotations

import os
import time

import keras
import numpy as np
import tensorflow as tf

import hvdlm
from tests.elastic import faults

SAMPLES, BATCH, EPOCHS = 188, 8, 3
PAUSE = float(os.environ.get("PAUSE", "0.02"))
STYLE = os.environ.get("STYLE", "fit")
steps = 0

faults.at("start")


def begin_step():
    """Counts steps for the faults."""
    global steps
    steps += 1
    faults.at("step", steps)


def end_step():
    """Makes steps long enough to be disturbed."""
    time.sleep(0.7 if os.path.exists("slow") else PAUSE)


class Pause(keras.callbacks.Callback):
    """Both, in ``fit``."""

    def on_train_batch_begin(self, batch, logs=None):
        """See :func:`begin_step`."""
        begin_step()

    def on_train_batch_end(self, batch, logs=None):
        """See :func:`end_step`."""
        end_step()


@hvdlm.distribute(commit_every=os.environ.get("COMMIT", "7"))
def train(model, data, x, y):
    if STYLE == "fit":
        history = model.fit(
            x, y, batch_size=BATCH, epochs=EPOCHS, validation_data=(x, y), verbose=0, callbacks=[Pause()]
        )
        losses = history.history["val_loss"]
        assert history.epoch == list(range(EPOCHS)) and len(losses) == EPOCHS, history.epoch
    else:
        losses = []
        for _ in range(EPOCHS):
            for xs, ys in data:
                begin_step()
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(xs, training=True) - ys) ** 2)
                model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
                end_step()
        losses.append(float(tf.reduce_mean((model(x) - y) ** 2)))
    if hvdlm.is_main():
        weights = {f"w{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
        np.savez("final.npz", best=min(losses), lr=[float(model.optimizer.learning_rate)], **weights)


def main() -> None:
    faults.install()
    keras.utils.set_random_seed(3)
    draw = np.random.default_rng(4)
    x = draw.standard_normal((SAMPLES, 8), dtype=np.float32)
    y = x @ draw.standard_normal((8, 1), dtype=np.float32)
    model = keras.Sequential(
        [keras.layers.Input((8,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    )
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 15, 0.9, staircase=True)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss="mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES).batch(BATCH)
    train(model, data, x, y)


main()
