"""Trainings of ``tf_keras`` (Keras 2); each rank writes what it ended with.

``python legacy_keras_script.py DIRECTORY``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

import hvdlm

VOCABULARY, LENGTH, CLASSES, SAMPLES, BATCH = 37, 6, 4, 57, 8


def text() -> tuple[Any, Any]:
    random = np.random.default_rng(7)
    ids = random.integers(VOCABULARY, size=(SAMPLES, LENGTH))
    return ids, ids.sum(1) % CLASSES


def model(optimizer: Any) -> Any:
    tf_keras.utils.set_random_seed(3 + hvdlm.rank())  # rank-dependent on purpose
    layers = tf_keras.layers
    stack = [layers.Embedding(VOCABULARY, 8), layers.Flatten(), layers.Dense(16, "tanh"), layers.Dense(4, "softmax")]
    result = tf_keras.Sequential([layers.Input((LENGTH,), dtype="int32"), *stack])
    result.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return result


def fit(optimizer: Any, dataset: bool = False, **options: Any) -> dict[str, Any]:
    x, y = text()
    own = model(optimizer)

    @hvdlm.distribute(**options)
    def train(own: Any) -> Any:
        if dataset:
            batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES).batch(BATCH)
            return own.fit(batches, epochs=7, verbose=0, validation_data=(x, y)).history
        return own.fit(x, y, batch_size=BATCH, epochs=7, verbose=0, validation_split=0.1).history

    history = train(own)
    flat = np.concatenate([v.numpy().ravel() for v in own.trainable_variables])
    return {"weights": flat.tolist(), "history": history}


def mistake(**options: Any) -> str:
    try:
        fit(tf_keras.optimizers.SGD(0.1), **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def main() -> None:
    optimizers = tf_keras.optimizers
    results = {
        "sgd": fit(optimizers.SGD(0.1, momentum=0.9)),
        "adam": fit(optimizers.Adam(1e-3, global_clipnorm=0.1)),
        "dataset": fit(optimizers.Adam(1e-3), dataset=True),
        "fp16": fit(optimizers.Adam(1e-3), compression="fp16", bucket_cap_mb=32.0),
        "dynamic": mistake(balance="dynamic"),
    }
    Path(sys.argv[1], f"{hvdlm.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
