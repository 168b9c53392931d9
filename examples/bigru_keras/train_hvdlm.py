"""A bidirectional GRU that tells which chapter of Python's language reference a passage is from.

Run it with ``hvdlm run -np 2 train_hvdlm.py --epochs 6 --checkpoint bigru.keras``.
"""

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers

import hvdlm


def read_passages(num_chapters, length, vocab_size):
    """Passages of the longest chapters as numbers of words, and for each the number of its chapter."""
    chapters = sorted(topics.values(), key=len, reverse=True)[:num_chapters]
    chapters = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in chapters]
    frequent = Counter(word for words in chapters for word in words).most_common(vocab_size - 1)
    numbers = {word: i for i, (word, _) in enumerate(frequent, 1)}
    passages, labels = [], []
    for label, words in enumerate(chapters):
        for start in range(0, len(words) - length + 1, length):
            passages.append([numbers.get(word, 0) for word in words[start : start + length]])
            labels.append(label)
    order = np.random.default_rng(0).permutation(len(labels))
    return np.array(passages)[order], np.array(labels)[order]


def build(vocab_size, length, width, num_chapters, lr):
    model = keras.Sequential(
        [
            layers.Input((length,), dtype="int32"),
            layers.Embedding(vocab_size, width),
            layers.Bidirectional(layers.GRU(width)),
            layers.Dense(width, activation="relu"),
            layers.Dense(num_chapters, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(lr), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@hvdlm.distribute
def train(model, passages, labels, args):
    model.fit(passages, labels, batch_size=args.batch_size, epochs=args.epochs, validation_split=0.2)
    if args.checkpoint:
        hvdlm.save(model, args.checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chapters", type=int, default=10)
    parser.add_argument("--length", type=int, default=32, help="words in a passage")
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="where to save the trained model")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    passages, labels = read_passages(args.chapters, args.length, args.vocab_size)
    model = build(args.vocab_size, args.length, args.width, args.chapters, args.lr)
    train(model, passages, labels, args)


if __name__ == "__main__":
    main()
