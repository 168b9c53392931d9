"""Training runs under Keras that must come out the same on any number of workers, each as a person would write it.

``python keras_cases.py DIRECTORY [NAME ...]`` runs them, alone or under a launcher, and each rank writes one file a
case. Many cases share a process because starting one costs more than training it.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import hvdlm
from hvdlm.api import _current

VOCABULARY, LENGTH, CLASSES, SAMPLES, BATCH = 37, 6, 4, 61, 8
CASES: dict[str, Callable[[], dict[str, Any]]] = {}
Result = dict[str, Any]
HALVES = {"compression": "fp16", "bucket_cap_mb": 32.0}
"""Asked for with a size of buckets halves travel as such; else only where that pays."""


def case(function: Callable[[], Result]) -> Callable[[], Result]:
    CASES[function.__name__] = function
    return function


def text(samples: int = SAMPLES) -> tuple[Any, Any]:
    random = np.random.default_rng(7)
    ids = random.integers(VOCABULARY, size=(samples, LENGTH))
    return ids, (ids.sum(1) + random.integers(2, size=samples)) % CLASSES


def seed() -> None:
    # Rank-dependent on purpose: workers must start from rank 0's weights.
    keras.utils.set_random_seed(3 + hvdlm.rank())


def classifier(cls: type = keras.Sequential, built: bool = True) -> Any:
    seed()
    stack = [
        layers.Embedding(VOCABULARY, 8),
        layers.Flatten(),
        layers.Dense(16, activation="tanh"),
        layers.Dense(CLASSES, activation="softmax"),
    ]
    return cls([layers.Input((LENGTH,), dtype="int32"), *stack] if built else stack)


def compiled(optimizer: Any, model: Any = None, **kwargs: Any) -> Any:
    model = model or classifier()
    kwargs.setdefault("metrics", ["accuracy"])
    model.compile(optimizer, "sparse_categorical_crossentropy", **kwargs)
    return model


def weights(*models: Any, **more: Any) -> Result:
    return {"weights": np.concatenate([v.numpy().ravel() for m in models for v in m.trainable_variables]), **more}


def run(model: Any, *data: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Result:
    """``fit`` for 7 epochs of 8 global batches, the last of 5 samples: 56 steps."""
    kwargs = {"epochs": 7, "verbose": 0, **kwargs}
    if not data or not isinstance(data[0], (tf.data.Dataset, keras.utils.PyDataset)):
        kwargs.setdefault("batch_size", BATCH)

    @hvdlm.distribute(**(options or {}))
    def train(model: Any) -> Any:
        return model.fit(*(data or text()), **kwargs)

    history = train(model).history
    return weights(model, **{f"history/{name}": np.array(values) for name, values in history.items()})


@case
def fit_sgd() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1, momentum=0.9)))


@case
def fit_adam() -> Result:
    return run(compiled(keras.optimizers.Adam(1e-3)), validation_split=0.2)


@case
def fit_adamw_global_clipnorm() -> Result:
    return run(compiled(keras.optimizers.AdamW(1e-3, global_clipnorm=0.05)), options={"partition": "contiguous"})


@case
def fit_adam_compressed() -> Result:
    return run(compiled(keras.optimizers.Adam(1e-3)), options=HALVES)


@case
def fit_sgd_compressed_small_buckets() -> Result:
    options = {"compression": "fp16", "bucket_cap_mb": 0.002}
    return run(compiled(keras.optimizers.SGD(0.1, clipnorm=0.1)), options=options)


@case
def fit_sgd_int8() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1)), options={"compression": "int8"})


@case
def fit_sgd_bf16() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1)), options={**HALVES, "compression": "bf16"})


@case
def fit_sgd_powersgd() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1)), options={"compression": "powersgd", "powersgd_rank": 1})


@case
def fit_sgd_topk_whole() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1)), options={"compression": "topk", "topk_ratio": 1.0})


@case
def fit_compressed_later() -> Result:
    later = {"compression": "topk", "topk_ratio": 0.01, "compression_warmup_steps": 1000}
    return run(compiled(keras.optimizers.SGD(0.1)), options=later)


@case
def fit_auto() -> Result:
    """On one host nothing is coded."""
    return run(compiled(keras.optimizers.SGD(0.1)), options={"compression": "auto"})


@contextlib.contextmanager
def between_hosts() -> Iterator[None]:
    """A link over which a codec pays until it is known that a step computes for longer than a sum takes."""
    from hvdlm.adapters import keras_job, keras_planner
    from hvdlm.algorithms.comm_model import Link

    chosen: list[str] = []
    decide = keras_planner.PlannedBuckets._decide

    def told(self: Any, compute: float) -> None:
        decide(self, compute)
        chosen.append(self.choice)

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (keras_job.Job, "on_processors", False),
            (keras_planner, "measure_link", lambda *_: Link(1e-6, 4e7)),
            (keras_planner, "_codec_costs", lambda _, codecs, __: dict.fromkeys(codecs, 0.0)),
            (keras_planner.PlannedBuckets, "_decide", told),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield
    assert len(chosen) == (2 if hvdlm.size() > 1 else 0) and "none" not in chosen[:1] and chosen[1:] in ([], ["none"])


@case
def fit_planned() -> Result:
    with between_hosts():
        return run(compiled(keras.optimizers.SGD(0.1)), options={"compression": "auto"})


@case
def loop_planned_in_graph() -> Result:
    dataset = tf.data.Dataset.from_tensor_slices(text(57)).batch(BATCH)
    with between_hosts():
        return loop(keras.optimizers.SGD(0.1), dataset, graph=True, compression="auto")


TOGETHER = {"sync": "local", "sync_warmup_steps": 1000}
"""To part later than the run ends."""


@case
def fit_adam_before_it_parts() -> Result:
    return run(compiled(keras.optimizers.Adam(1e-3)), options=TOGETHER)


@case
def accumulating_before_it_parts() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)), options=TOGETHER)


@case
def loop_in_graph_before_it_parts() -> Result:
    dataset = tf.data.Dataset.from_tensor_slices(text(57)).batch(BATCH)
    return loop(keras.optimizers.SGD(0.1), dataset, graph=True, **TOGETHER)


PRUNED = {"prune": "magnitude", "prune_begin": 4, "prune_end": 40, "prune_every": 9, "prune_sparsity": 0.8}


def pruned(optimizer: Any, model: Any = None, expected: float = 0.8, **options: Any) -> Result:
    model = model or classifier()
    found = run(compiled(optimizer, model), options={**PRUNED, **options})
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, layers.Dense)]
    zeros = sum(int((v.numpy() == 0).sum()) for v in kernels) / sum(v.numpy().size for v in kernels)
    assert abs(zeros - expected) < 0.02, zeros
    return found


@case
def pruned_adam() -> Result:
    return pruned(keras.optimizers.Adam(1e-3))


@case
def pruned_layer_by_layer_accumulated() -> Result:
    options = {"prune_scope": "layer", "prune_begin": 2, "prune_end": 20, "prune_every": 4, "bucket_cap_mb": 0.001}
    return pruned(keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2), **options)


@case
def pruned_two_of_four() -> Result:
    return pruned(keras.optimizers.SGD(0.1), expected=0.5, prune_pattern="2:4")


@case
def small_tail() -> Result:
    """The last batch has one sample: two of three workers have none."""
    metrics = [
        "accuracy",
        keras.metrics.SparseTopKCategoricalAccuracy(2),
        keras.metrics.SparseCategoricalCrossentropy(),
    ]
    return run(compiled(keras.optimizers.SGD(0.1), metrics=metrics), *text(57))


@case
def unbuilt_with_sample_weight() -> Result:
    model = compiled(keras.optimizers.SGD(0.1), classifier(built=False))
    return run(model, sample_weight=np.linspace(0.5, 1.5, SAMPLES), options={"partition": "random"})


@case
def class_weight_and_steps_per_epoch() -> Result:
    model = compiled(keras.optimizers.SGD(0.1))
    return run(model, class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.5}, steps_per_epoch=5, epochs=11)


@case
def steps_per_execution() -> Result:
    return run(compiled(keras.optimizers.Adam(1e-3), steps_per_execution=3))


@case
def run_eagerly() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1), run_eagerly=True), options=HALVES, epochs=3)


@case
def gradient_accumulation() -> Result:
    return run(compiled(keras.optimizers.Adam(1e-3, gradient_accumulation_steps=3)))


@case
def loss_scale_with_inf_on_one_rank() -> Result:
    """One sample's gradient overflows: every rank skips that step."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=5)
    sample_weight = np.ones(SAMPLES, "float32")
    sample_weight[17] = 1e36
    result = run(compiled(optimizer, metrics=[]), sample_weight=sample_weight)
    return {**result, "steps": int(optimizer.iterations), "scale": float(optimizer.dynamic_scale)}


@case
def frozen_then_unfrozen() -> Result:
    model = classifier()
    model.layers[0].trainable = False
    compiled(keras.optimizers.SGD(0.1), model)

    @hvdlm.distribute
    def train(model: Any) -> None:
        model.fit(*text(), batch_size=BATCH, epochs=2, verbose=0)
        model.layers[0].trainable = True
        compiled(keras.optimizers.Adam(1e-3), model)
        model.fit(*text(), batch_size=BATCH, epochs=3, verbose=0)

    train(model)
    return weights(model)


class OwnStep(keras.Model):
    """Two networks, two optimizers and a train_step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = classifier(), classifier()

    def compile(self, first: Any, second: Any) -> None:
        super().compile()
        self.first_optimizer, self.second_optimizer = first, second

    def call(self, x: Any) -> Any:
        return self.first(x)

    def train_step(self, data: Any) -> Any:
        x, y = data
        for model, optimizer in ((self.first, self.first_optimizer), (self.second, self.second_optimizer)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x)))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return {"second_loss": loss}


@case
def own_train_step_and_two_optimizers() -> Result:
    model = OwnStep()
    model.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(1e-3))
    result = run(model)
    result.pop("history/second_loss")  # of the last step: an average over workers, not a metric
    return result


def loop(
    optimizer: Any, dataset: Any, graph: bool, model: Any = None, training: bool = False, **options: Any
) -> Result:
    model = model or classifier()
    losses = keras.losses.SparseCategoricalCrossentropy()

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = losses(y, model(x, training=training))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @hvdlm.distribute(**options)
    def train(model: Any, dataset: Any, optimizer: Any) -> None:
        one_step = tf.function(step) if graph else step
        for _ in range(7):
            for x, y in dataset:
                one_step(x, y)

    train(model, dataset, optimizer)
    return weights(model)


@case
def loop_adam_in_graph() -> Result:
    dataset = tf.data.Dataset.from_tensor_slices(text()).shuffle(SAMPLES, seed=5).shuffle(SAMPLES).batch(BATCH)
    return loop(keras.optimizers.Adam(1e-3), dataset, graph=True)


@case
def loop_with_unused_layer() -> Result:
    """A layer that the loss does not depend on has no gradient, on any worker."""
    inputs = layers.Input((LENGTH,), dtype="int32")
    used = classifier()(inputs)
    unused = layers.Dense(3)(layers.Rescaling(0.1)(inputs))
    both = keras.Model(inputs, [used, unused])
    dataset = tf.data.Dataset.from_tensor_slices(text(57)).batch(BATCH)
    losses, optimizer = keras.losses.SparseCategoricalCrossentropy(), keras.optimizers.AdamW(1e-3)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = losses(y, both(x)[0])
        optimizer.apply(tape.gradient(loss, both.trainable_variables), both.trainable_variables)

    @hvdlm.distribute
    def train(both: Any, dataset: Any, optimizer: Any) -> None:
        for _ in range(7):
            for x, y in dataset:
                step(x, y)

    train(both, dataset, optimizer)
    return weights(both)


@case
def loop_sgd_eagerly() -> Result:
    dataset = tf.data.Dataset.from_tensor_slices(text(57)).batch(BATCH)
    return loop(keras.optimizers.SGD(0.1), dataset, graph=False)


@case
def fit_endless_dataset() -> Result:
    # Small batches: where a pass has fewer than are read ahead, what is read to build the model may begin another.
    whole = tf.data.Dataset.from_tensor_slices(text())
    dataset = whole.shuffle(SAMPLES).repeat().map(lambda x, y: (x, y)).batch(BATCH // 2)
    return run(compiled(keras.optimizers.AdamW(1e-3)), dataset, steps_per_epoch=16)


def prepared() -> Any:
    """Samples that functions make, kept in memory and shuffled: each worker makes its own, of uneven batches."""
    x, y = text(57)
    seed()  # the shuffle draws its own from what is left of TensorFlow's, which the case before has used

    def made(row: Any, label: Any) -> Any:
        return tf.cast(row, tf.int32) % VOCABULARY, label

    return tf.data.Dataset.from_tensor_slices((x, y)).map(made, 2).cache().shuffle(SAMPLES).batch(BATCH).prefetch(1)


@case
def fit_prepared_dataset() -> Result:
    model = compiled(keras.optimizers.SGD(0.1))
    return run(model, prepared(), class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.5}, validation_data=text(20))


@case
def loop_prepared_dataset() -> Result:
    return loop(keras.optimizers.Adam(1e-3), prepared(), graph=True)


@case
def loop_gone_on_with() -> Result:
    """A loop that is left in its third pass and gone on with by objects made anew, and one that is not left."""
    kept: dict[str, Any] = {}
    losses = keras.losses.SparseCategoricalCrossentropy()

    def part(leaves: bool) -> Any:
        model, optimizer = classifier(), keras.optimizers.Adam(1e-3)
        optimizer.build(model.trainable_variables)
        variables = [*model.variables, *optimizer.variables]

        @tf.function
        def step(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                loss = losses(y, model(x))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        @hvdlm.distribute
        def train(model: Any, dataset: Any, optimizer: Any) -> None:
            if kept:
                for v, value in zip(variables, kept["variables"], strict=True):
                    v.assign(value)
                dataset.load_state_dict(kept["dataset"])
            for epoch in range(kept["dataset"]["cursor"]["epoch"] if kept else 0, 7):
                for number, (x, y) in enumerate(dataset):
                    step(x, y)
                    if leaves and (epoch, number) == (2, 4):
                        kept.update(variables=[v.numpy() for v in variables], dataset=dataset.state_dict())
                        return

        train(model, prepared(), optimizer)
        return model

    straight = weights(part(leaves=False))["weights"]
    part(leaves=True)
    return weights(part(leaves=False), straight=straight)


@case
def loop_on_torch() -> Result:
    """The loop of Keras's guide for its torch backend: gradients are those of torch, applied by Keras."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    x, y = text(57)
    loader = DataLoader(TensorDataset(torch.as_tensor(x), torch.as_tensor(y)), BATCH, shuffle=True)
    model, losses = classifier(), keras.losses.SparseCategoricalCrossentropy()
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=0.1)
    optimizer.build(model.trainable_variables)

    @hvdlm.distribute
    def train(model: Any, optimizer: Any, loader: Any) -> None:
        for _ in range(7):
            for inputs, targets in loader:
                for v in model.trainable_variables:
                    v.value.grad = None
                losses(targets, model(inputs)).backward()
                gradients = [v.value.grad for v in model.trainable_variables]
                with torch.no_grad():
                    optimizer.apply(gradients, model.trainable_variables)

    train(model, optimizer, loader)
    return {"weights": np.concatenate([keras.ops.convert_to_numpy(v).ravel() for v in model.trainable_variables])}


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return (SAMPLES + BATCH - 1) // BATCH

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = text()
        return x[index * BATCH : (index + 1) * BATCH], y[index * BATCH : (index + 1) * BATCH]


@case
def fit_py_dataset() -> Result:
    return run(compiled(keras.optimizers.SGD(0.1)), Batches(workers=1))


@case
def fit_generator() -> Result:
    def batches() -> Iterator[Any]:
        while True:
            for index in range(len(Batches())):
                yield Batches()[index]

    return run(compiled(keras.optimizers.SGD(0.1)), batches(), steps_per_epoch=8, batch_size=None)


@case
def train_on_batch() -> Result:
    model = compiled(keras.optimizers.Adam(1e-3))

    @hvdlm.distribute
    def train(model: Any) -> None:
        for _ in range(7):
            for index in range(len(Batches())):
                model.train_on_batch(*Batches()[index])

    train(model)
    return weights(model)


@case
def per_worker_batches() -> Result:
    """24 samples a step on any number of workers."""
    options = {"batch": "per_worker"}
    return run(compiled(keras.optimizers.SGD(0.1)), options=options, batch_size=24 // hvdlm.size())


@case
def big_embedding_of_sgd() -> Result:
    """Rows of a large embedding travel as rows."""
    seed()
    inputs = layers.Input((LENGTH,), dtype="int32")
    hidden = layers.Flatten()(layers.Embedding(70_000, 16)(inputs))
    model = compiled(keras.optimizers.SGD(0.1), keras.Model(inputs, layers.Dense(CLASSES, "softmax")(hidden)))
    result = run(model, epochs=3)
    return {**result, "weights": result["weights"][: VOCABULARY * 16]}


@case
def unequal_shares() -> Result:
    options = {"balance": "static", "weights": (1, 3)} if hvdlm.size() == 2 else {}
    dataset = tf.data.Dataset.from_tensor_slices(text()).batch(BATCH)
    first = run(compiled(keras.optimizers.SGD(0.1)), options=options, epochs=2)
    second = run(compiled(keras.optimizers.SGD(0.1)), dataset, options=options, epochs=2)
    return {"weights": np.concatenate([first["weights"], second["weights"]])}


@case
def sharded_evaluation() -> Result:
    x, y = text()
    metrics = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    model = compiled(keras.optimizers.SGD(0.1), metrics=metrics)

    @hvdlm.distribute(eval="sharded")
    def train(model: Any) -> Any:
        history = model.fit(x, y, batch_size=BATCH, epochs=3, validation_split=0.3, verbose=0).history
        return [history["val_loss"], history["val_accuracy"]], model.evaluate(x, y, batch_size=16, verbose=0)

    validation, evaluation = train(model)
    return weights(model, **{"history/validation": np.array(validation), "history/evaluation": np.array(evaluation)})


@case
def early_stopping_restores() -> Result:
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    model = compiled(keras.optimizers.Adam(0.05), weighted_metrics=[])
    return run(model, validation_split=0.25, callbacks=[stop], epochs=30)


def normalised() -> Any:
    seed()
    inputs = layers.Input((LENGTH,), dtype="int32")
    hidden = layers.Embedding(VOCABULARY, 8)(inputs)
    norm = layers.BatchNormalization()
    hidden = layers.Flatten()(norm(layers.Dense(8, activation="tanh")(norm(hidden))))  # the same layer twice
    hidden = layers.BatchNormalization(momentum=0.8)(layers.Dense(16, activation="relu")(hidden))
    return keras.Model(inputs, layers.Dense(CLASSES, activation="softmax")(hidden))


@case
def batch_norm_over_all_workers() -> Result:
    """Statistics of global batches, the last of one sample; moving statistics too are those of one process."""
    model = compiled(keras.optimizers.SGD(0.1), normalised())
    result = run(model, *text(57), validation_split=0.2)
    moving = np.concatenate([v.numpy().ravel() for v in model.non_trainable_variables if "moving" in v.path])
    return {**result, "weights": np.concatenate([result["weights"], moving])}


@case
def batch_norm_accumulated_in_loop() -> Result:
    """In a loop in a graph, with gradients accumulated."""
    dataset = tf.data.Dataset.from_tensor_slices(text()).batch(BATCH)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    return loop(optimizer, dataset, graph=True, model=normalised(), training=True)


def tagger(mask_zero: bool) -> Any:
    seed()
    inputs = layers.Input((LENGTH,), dtype="int32")
    hidden = layers.Embedding(VOCABULARY, 8, mask_zero=mask_zero)(inputs)
    return keras.Model(
        inputs, layers.Dense(CLASSES, activation="softmax")(layers.GRU(8, return_sequences=True)(hidden))
    )


def tagged() -> tuple[Any, Any]:
    """Sequences of very different lengths, padded with 0, and a class for each token."""
    ids = np.random.default_rng(5).integers(1, VOCABULARY, size=(SAMPLES, LENGTH))
    lengths = np.random.default_rng(6).choice([1, 1, 2, LENGTH], size=SAMPLES)
    ids[np.arange(LENGTH) >= lengths[:, None]] = 0
    return ids, ids % CLASSES


@case
def mask_of_padding() -> Result:
    """A mean over the tokens that no mask leaves out; one of the last batch's three workers has none."""
    x, y = tagged()
    return run(compiled(keras.optimizers.SGD(0.5), tagger(True)), x[:58], y[:58])


@case
def ignored_class_accumulated() -> Result:
    x, y = tagged()
    y = np.where(x == 0, -1, y)
    y[50:52] = -1
    model = tagger(False)
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    model.compile(keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2), loss)
    return run(model, x, y)


@case
def mean_with_sample_weight() -> Result:
    model = classifier()
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")
    model.compile(keras.optimizers.SGD(0.1), loss)
    return run(model, sample_weight=np.linspace(0.1, 5.0, SAMPLES) ** 2)


@case
def mixed_float16() -> Result:
    """Weights are float32, what is computed float16: Keras puts a LossScaleOptimizer around the optimizer."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(keras.optimizers.Adam(1e-3))
        result = run(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    return {"weights": result["weights"], "scale": float(model.optimizer.dynamic_scale)}


@case
def layers_added_later() -> Result:
    """A head is put on after the first steps: new variables, a new optimizer, compiled a second time."""
    model = classifier()

    @hvdlm.distribute
    def train(model: Any) -> None:
        compiled(keras.optimizers.SGD(0.1), model).fit(*text(), batch_size=BATCH, epochs=2, verbose=0)
        keras.utils.set_random_seed(50 + hvdlm.rank())
        model.add(layers.Dense(CLASSES, activation="softmax"))
        compiled(keras.optimizers.SGD(0.1), model).fit(*text(), batch_size=BATCH, epochs=3, verbose=0)

    train(model)
    return weights(model)


@case
def layers_added_later_in_loop() -> Result:
    """The same in a loop of one's own: the model is given to hvdlm again."""
    x, y = text(48)
    losses = keras.losses.SparseCategoricalCrossentropy()
    model = classifier()

    @hvdlm.distribute
    def train(model: Any) -> None:
        for grown in (False, True):
            if grown:
                keras.utils.set_random_seed(50 + hvdlm.rank())
                model.add(layers.Dense(CLASSES, activation="softmax"))
            optimizer = keras.optimizers.Adam(1e-3)
            hvdlm.wrap(model, optimizer)
            for start in range(0, 48, 12):
                part = slice(start + 12 * hvdlm.rank() // hvdlm.size(), start + 12 * (hvdlm.rank() + 1) // hvdlm.size())
                with tf.GradientTape() as tape:
                    loss = losses(y[part], model(x[part]))
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    train(model)
    return weights(model)


class Poison(layers.Layer):  # type: ignore[misc]
    """Gives NaN on rank 1."""

    def call(self, x: Any) -> Any:
        return x * (np.nan if hvdlm.rank() else 1.0)


@case
def weight_zero_with_nan() -> Result:
    """Rank 1 computes fillers only, all of them NaN: neither weights nor metrics take notice."""
    seed()
    stack = [layers.Embedding(VOCABULARY, 8), Poison(), layers.Flatten(), layers.BatchNormalization(momentum=0.8)]
    model = keras.Sequential(
        [layers.Input((LENGTH,), dtype="int32"), *stack, layers.Dense(CLASSES, activation="softmax")]
    )
    options = {"balance": "static", "weights": (1, 0)} if hvdlm.size() == 2 else {}
    return run(compiled(keras.optimizers.SGD(0.1), model), options=options)


class Slow(layers.Layer):  # type: ignore[misc]
    """Takes some time for each sample, on rank 1 five times as long."""

    def call(self, ids: Any) -> Any:
        def wait(ids: Any) -> Any:
            time.sleep(len(ids) * (0.005 if hvdlm.rank() else 0.001))
            return ids

        if keras.backend.backend() == "torch":
            return wait(ids)
        return tf.ensure_shape(tf.numpy_function(wait, [ids], ids.dtype), ids.shape)

    def compute_output_spec(self, ids: Any) -> Any:
        return keras.KerasTensor(ids.shape, ids.dtype)  # not the same one: Keras would leave this layer out


def slow_one() -> Any:
    seed()
    stack = [layers.Embedding(VOCABULARY, 8), layers.Flatten(), layers.Dense(CLASSES, activation="softmax")]
    return keras.Sequential([layers.Input((LENGTH,), dtype="int32"), Slow(), *stack])


def followed(samples: int, total: int) -> None:
    """Rank 1 has come to compute less than its even part."""
    if hvdlm.size() > 1:
        assert (samples < 0.4 * total) == (hvdlm.rank() == 1), (samples, total)


def run_balanced(*data: Any, steps_per_execution: int = 1, **kwargs: Any) -> Result:
    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 6:
                adapter = _current().adapter
                job = adapter if keras.backend.backend() == "torch" else adapter._job
                followed(job.epoch_samples(), SAMPLES)

    model = compiled(keras.optimizers.SGD(0.1), slow_one(), steps_per_execution=steps_per_execution)
    return run(model, *data, options={"balance": "dynamic"}, callbacks=[Watch()], **kwargs)


@case
def balanced_fit() -> Result:
    return run_balanced()


@case
def balanced_fit_of_a_dataset() -> Result:
    return run_balanced(tf.data.Dataset.from_tensor_slices(text()).shuffle(SAMPLES, seed=1).batch(BATCH))


@case
def balanced_fit_of_a_generator() -> Result:
    def batches() -> Iterator[Any]:
        while True:
            for index in range(len(Batches())):
                yield Batches()[index]

    return run_balanced(batches(), steps_per_epoch=8, batch_size=None, steps_per_execution=2)


@case
def balanced_loop() -> Result:
    model, optimizer, losses = slow_one(), keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = losses(y, model(x))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    @hvdlm.distribute(balance="dynamic")
    def train(model: Any, dataset: Any, optimizer: Any) -> None:
        for _ in range(7):
            samples = 0
            for x, y in dataset:
                step(x, y)
                samples += len(x)
        followed(samples, SAMPLES)

    train(model, Batches(workers=1), optimizer)
    return weights(model)


def main(directory: Path, names: list[str]) -> None:
    for name in names or CASES:
        try:
            result = CASES[name]()
            np.savez(directory / f"{name}.{_rank()}.npz", **result)
        except Exception:  # the other cases still run, if the ranks fail alike
            (directory / f"{name}.{_rank()}.err").write_text(traceback.format_exc())


def _rank() -> int:
    return hvdlm.rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
