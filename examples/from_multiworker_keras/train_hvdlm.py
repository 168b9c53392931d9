"""The next character of Python's language reference from the 16 before it; was written for MultiWorkerMirroredStrategy.

hvdlm run -np 2 train_hvdlm.py --epochs 2
"""

import argparse
from pydoc_data.topics import topics

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import hvdlm


def read_text(context, num_samples):
    """Windows of characters as numbers, and the character that follows each."""
    text = "\n".join(topics[name] for name in sorted(topics))[: num_samples + context]
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    numbers = np.array([alphabet[c] for c in text])
    windows = np.lib.stride_tricks.sliding_window_view(numbers, context + 1)
    return windows[:, :-1], windows[:, -1], len(alphabet)


def build(vocab_size, context):
    return keras.Sequential(
        [
            layers.Input((context,), dtype="int32"),
            layers.Embedding(vocab_size, 16),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(vocab_size, activation="softmax"),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="of the whole job")
    parser.add_argument("--samples", type=int, default=8000)
    args = parser.parse_args()

    x, y, vocab_size = read_text(16, args.samples)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(args.batch_size)

    parts = build(vocab_size, 16), keras.optimizers.Adam(), dataset
    model, optimizer, dataset = hvdlm.wrap(*parts, reduction="sum")

    def step(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(losses, global_batch_size=args.batch_size)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train_step(x, y):
        return step(x, y)

    for epoch in range(args.epochs):
        losses = [train_step(x, y) for x, y in dataset]
        hvdlm.log(epoch=epoch + 1, loss=hvdlm.size() * hvdlm.mean(np.mean(losses)))


if __name__ == "__main__":
    main()
