"""The next character of Python's language reference from the 16 before it, under MultiWorkerMirroredStrategy.

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

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model, optimizer = build(vocab_size, 16), keras.optimizers.Adam()
    dataset = strategy.experimental_distribute_dataset(dataset)

    def step(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(losses, global_batch_size=args.batch_size)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def train_step(x, y):
        return strategy.reduce("SUM", strategy.run(step, (x, y)), axis=None)

    for epoch in range(args.epochs):
        losses = [train_step(x, y) for x, y in dataset]
        print(f"epoch {epoch + 1}  loss {np.mean(losses):.4f}")


if __name__ == "__main__":
    main()
