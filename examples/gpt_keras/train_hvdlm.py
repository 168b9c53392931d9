"""A small GPT, trained character by character on the language reference that ships with Python.

Run it with ``hvdlm run -np 2 train_hvdlm.py``; ``--help`` lists the settings.
"""

import argparse
from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers, ops

import hvdlm


class Embeddings(layers.Layer):
    """Characters and their positions."""

    def __init__(self, vocab_size, block_size, width, **kwargs):
        super().__init__(**kwargs)
        self.tokens, self.positions = layers.Embedding(vocab_size, width), layers.Embedding(block_size, width)

    def build(self, shape):
        self.tokens.build(shape)
        self.positions.build(shape[1:])

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(x.shape[1]))


def build(vocab_size, block_size, num_layers, width, heads, dropout):
    inputs = layers.Input((block_size,), dtype="int32")
    x = Embeddings(vocab_size, block_size, width)(inputs)
    for _ in range(num_layers):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads, dropout=dropout)
        x = x + layers.Dropout(dropout)(attention(normal, normal, use_causal_mask=True))
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(dropout)(layers.Dense(width)(hidden))
    return keras.Model(inputs, layers.Dense(vocab_size)(layers.LayerNormalization()(x)))


def blocks(tokens, block_size):
    """Consecutive blocks of a text: characters, and for each the one that follows it."""
    count = (len(tokens) - 1) // block_size
    inputs, targets = tokens[: count * block_size], tokens[1 : count * block_size + 1]
    return inputs.reshape(count, block_size), targets.reshape(count, block_size)


@hvdlm.distribute
def train(model, train_data, valid_data, args):
    model.fit(*train_data, batch_size=args.batch_size, epochs=args.epochs, validation_data=valid_data)
    if args.checkpoint:
        hvdlm.save(model, args.checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--documents", type=int, help="read this many documents only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="where to save the trained weights (.weights.h5)")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)

    # Every tenth document is for validation.
    documents = [text for _, text in sorted(topics.items())][: args.documents]
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(documents))))}

    def encode(texts):
        return np.array([alphabet[c] for c in "\n".join(texts)], dtype=np.int32)

    valid_data = blocks(encode(documents[::10]), args.block_size)
    train_data = blocks(encode(text for i, text in enumerate(documents) if i % 10), args.block_size)

    model = build(len(alphabet), args.block_size, args.layers, args.width, args.heads, args.dropout)
    steps = args.epochs * -(-len(train_data[0]) // args.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=args.lr, warmup_steps=min(50, steps // 10))
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    train(model, train_data, valid_data, args)


if __name__ == "__main__":
    main()
