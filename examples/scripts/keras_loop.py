"""Keras: a training loop of one's own over tf.data, with a gradient tape."""

from pydoc_data.topics import topics

import keras
import numpy as np
import tensorflow as tf

keras.utils.set_random_seed(3)
text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")[:40000]
data = np.frombuffer(text, np.uint8)
starts = np.arange(0, len(data) - 25, 40)
x, y = np.stack([data[i : i + 24] for i in starts]), np.array([data[i + 24] for i in starts])

model = keras.Sequential(
    [keras.Input((24,)), keras.layers.Embedding(256, 24), keras.layers.GRU(32), keras.layers.Dense(256)]
)
optimizer = keras.optimizers.Adam(5e-3)
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
train = tf.data.Dataset.from_tensor_slices((x[:800], y[:800])).batch(32)
valid = tf.data.Dataset.from_tensor_slices((x[800:], y[800:])).batch(50)


@tf.function
def step(inputs, targets):
    with tf.GradientTape() as tape:
        loss = loss_fn(targets, model(inputs, training=True))
    optimizer.apply_gradients(
        zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
    )
    return loss


for epoch in range(2):
    for inputs, targets in train:
        loss = step(inputs, targets)
    total = 0.0
    for inputs, targets in valid:
        total += float(loss_fn(targets, model(inputs))) * len(targets)
    print(f"epoch {epoch}: validation {total / (len(x) - 800):.4f}")
print(f"final loss {total / (len(x) - 800):.4f}")
