"""The next character of Python's language reference from the 16 before it, under tf.distribute.MirroredStrategy.

python train_plain.py --epochs 2
"""

import argparse
from pydoc_data.topics import topics

import keras
import numpy as np
import tensorflow as tf
from keras import layers


def read_text(context, num_samples):
    """Windows of characters as numbers, and the character that follows each."""
    text = "\n".join(topics[name] for name in sorted(topics))[: num_samples + context]
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    numbers = np.array([alphabet[c] for c in text])
    windows = np.lib.stride_tricks.sliding_window_view(numbers, context + 1)
    return windows[:, :-1], windows[:, -1], len(alphabet)


def build(vocab_size, context):
    model = keras.Sequential(
        [
            layers.Input((context,), dtype="int32"),
            layers.Embedding(vocab_size, 16),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(vocab_size, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="of the whole job")
    parser.add_argument("--samples", type=int, default=8000)
    args = parser.parse_args()

    x, y, vocab_size = read_text(16, args.samples)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(args.batch_size)

    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model = build(vocab_size, 16)
    model.fit(dataset, epochs=args.epochs, verbose=2)


if __name__ == "__main__":
    main()
