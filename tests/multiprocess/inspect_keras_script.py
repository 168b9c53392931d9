"""A worker that lingers and then a flipped bit, on one rank, in a Keras fit: see test_inspection.py."""

import time

import keras
import numpy as np

import hvdlm

keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1)])
model.compile(optimizer="adam", loss="mse")
hvdlm.wrap(model, fingerprint_every=4, watchdog_seconds=1.0)


class Mistake(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if hvdlm.rank() != 1:
            return
        if batch == 2:
            time.sleep(5)
        if batch == 9:
            kernel = self.model.layers[1].kernel
            value = np.array(kernel)
            value.view(np.int32)[3, 0] ^= 1
            kernel.assign(value)


rng = np.random.default_rng(0)
model.fit(rng.normal(size=(200, 4)), rng.normal(size=(200, 1)), batch_size=8, epochs=2, callbacks=[Mistake()])
