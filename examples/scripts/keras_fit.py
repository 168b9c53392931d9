"""Keras: a small GRU language model with compile and fit."""

from pydoc_data.topics import topics

import keras
import numpy as np

keras.utils.set_random_seed(3)
text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")[:40000]
data = np.frombuffer(text, np.uint8)
starts = np.arange(0, len(data) - 25, 40)
x, y = np.stack([data[i : i + 24] for i in starts]), np.array([data[i + 24] for i in starts])

model = keras.Sequential(
    [keras.Input((24,)), keras.layers.Embedding(256, 24), keras.layers.GRU(32), keras.layers.Dense(256)]
)
model.compile(optimizer=keras.optimizers.Adam(5e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(
    x[:800],
    y[:800],
    batch_size=32,
    epochs=2,
    validation_data=(x[800:], y[800:]),
    callbacks=[keras.callbacks.ModelCheckpoint("gru.keras")],
)
print(f"final loss {model.evaluate(x[800:], y[800:], verbose=0):.4f}")
model.save("final.keras")
