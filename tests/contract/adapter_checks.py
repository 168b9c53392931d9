"""One suite for all adapters, in one process each: ``python adapter_checks.py NAME`` prints what each check found.

A process for each, because Keras is on one backend in a process and hvdlm has one framework.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.contracts import Adapter
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

SAMPLES, BATCH, EPOCHS = 21, 4, 2


class Recorder:
    """Keeps what an adapter tells."""

    def __init__(self) -> None:
        self.shares: list[tuple[int, Share]] = []
        self.epochs: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.losses: list[Any] = []
        self.steps = 0

    def batch(self, share: Share, epoch: int, loader: str) -> None:
        self.shares.append((epoch, share))

    def loss(self, value: Any, share: Share | None) -> None:
        self.losses.append(value)

    def step(self) -> None:
        self.steps += 1

    def data(self, seconds: float) -> None:
        pass

    def reduced(self) -> None:
        pass

    def event(self, name: str, **facts: Any) -> None:
        pass

    def epoch(self, loader: str, number: int, num_samples: int, num_planned: int, steps: int) -> None:
        self.epochs.append((number, num_samples))

    def epoch_done(self, loader: str, number: int, skew: float | None = None) -> None:
        self.done.append(number)


class Case:
    """An adapter with a model of 3 inputs and a way to train it; gradients and data are the framework's own."""

    adapter: Adapter
    model: Any
    other: Any
    """A model of another shape."""
    objects: list[tuple[str, Any, Any]]
    tensor: Any
    """One number, as the framework has it."""
    train: Callable[[list[Any]], None]
    """Trains for the epochs with what ``attach`` gave."""
    change: Callable[[], None]
    """Changes a weight."""
    file = "model"


class TorchCase(Case):
    def __init__(self) -> None:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        from hvdlm.adapters.torch_adapter import TorchAdapter

        self.adapter, self.model, self.other = TorchAdapter(), torch.nn.Linear(3, 1), torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        loader = DataLoader(TensorDataset(torch.ones(SAMPLES, 3)), BATCH, shuffle=True)
        self.objects = [("m", "model", self.model), ("o", "optimizer", optimizer), ("l", "loader", loader)]
        self.tensor = torch.tensor(2.5)

        def train(given: list[Any]) -> None:
            model, optimizer, loader = given
            for _ in range(EPOCHS):
                for (x,) in loader:
                    optimizer.zero_grad()
                    model(x).mean().backward()
                    optimizer.step()

        def change() -> None:
            with torch.no_grad():
                self.model.bias += 1

        self.train, self.change = train, change


class KerasCase(Case):
    file = "model.keras"

    def __init__(self, package: str = "keras") -> None:
        import importlib

        from hvdlm.adapters import choose_adapter

        keras = importlib.import_module(package)
        self.adapter = choose_adapter(package)

        def make(width: int) -> Any:
            model = keras.Sequential([keras.layers.Input((width,)), keras.layers.Dense(1)])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        self.model, self.other = make(3), make(4)
        self.objects = [("m", "model", self.model), ("o", "optimizer", self.model.optimizer)]
        self.tensor = importlib.import_module("keras").ops.convert_to_tensor(2.5)

        def train(given: list[Any]) -> None:
            x = np.ones((SAMPLES, 3), "float32")
            given[0].fit(x, x[:, :1], batch_size=BATCH, epochs=EPOCHS, verbose=0)

        def change() -> None:
            bias = self.model.trainable_variables[-1]
            bias.assign(bias + 1)

        self.train, self.change = train, change


class FakeCase(Case):
    def __init__(self) -> None:
        from hvdlm.adapters.fake import FakeAdapter, FakeLoader, FakeModel

        self.adapter = FakeAdapter()
        self.model, self.other = FakeModel(w=np.zeros(3)), FakeModel(w=np.zeros(4))
        self.objects = [("m", "model", self.model), ("l", "loader", FakeLoader(SAMPLES, BATCH))]
        self.tensor = 2.5

        def train(given: list[Any]) -> None:
            for _ in range(EPOCHS):
                for _ in given[1]():
                    self.model.parameters["w"] = self.model.parameters["w"] - 0.1

        def change() -> None:
            self.model.parameters["w"] = self.model.parameters["w"] + 1

        self.train, self.change = train, change


CASES: dict[str, Callable[[], Case]] = {
    "torch": TorchCase,
    "keras": KerasCase,
    "keras_torch": KerasCase,
    "tf_keras": lambda: KerasCase("tf_keras"),
    "fake": FakeCase,
}


def attached(case: Case) -> tuple[list[Any], Recorder]:
    recorder = Recorder()
    world = case.adapter.start(False)
    return case.adapter.attach(case.objects, Options(), world, recorder), recorder


def recognises(case: Case) -> None:
    for _, kind, value in case.objects:
        assert case.adapter.recognise(value) == kind
    for value in (3, "text", None, np.zeros(3), {"a": 1}):
        assert case.adapter.recognise(value) is None


def starts_alone(case: Case) -> None:
    assert case.adapter.start(False) == World.single()
    assert case.adapter.collectives.allgather(b"mine") == [b"mine"]
    assert case.adapter.collectives.allreduce(np.array([2.0]))[0] == 2.0


def signature_tells_shapes(case: Case) -> None:
    own = case.adapter.signature([("m", "model", case.model)])
    assert own == case.adapter.signature([("m", "model", case.model)])
    assert all(line.startswith("m.") for line in own)
    assert own != case.adapter.signature([("m", "model", case.other)])


def objects_stay_themselves(case: Case) -> None:
    given, _ = attached(case)
    assert len(given) == len(case.objects)
    for (_, kind, old), new in zip(case.objects, given, strict=True):
        assert kind == "loader" or new is old


def training_is_told(case: Case) -> None:
    given, recorder = attached(case)
    case.train(given)
    steps = -(-SAMPLES // BATCH)
    assert len(recorder.shares) == EPOCHS * steps
    for number in range(EPOCHS):
        ids = np.concatenate([share.ids for epoch, share in recorder.shares if epoch == number])
        assert sorted(ids.tolist()) == list(range(SAMPLES))
        totals = [share.total for epoch, share in recorder.shares if epoch == number]
        assert totals == [BATCH] * (steps - 1) + [SAMPLES % BATCH]
    assert recorder.epochs == [(number, SAMPLES) for number in range(EPOCHS)]
    assert recorder.done == list(range(EPOCHS))
    if case.adapter.name != "fake":  # it has neither optimizer nor losses
        assert recorder.steps == len(recorder.losses) == EPOCHS * steps
        assert np.isfinite([case.adapter.number(value) for value in recorder.losses]).all()


def digest_sees_a_change(case: Case) -> None:
    attached(case)
    before, prints = case.adapter.digest(), case.adapter.fingerprints()
    assert before == case.adapter.digest() and prints == case.adapter.fingerprints()
    case.change()
    assert before != case.adapter.digest()
    different = [a.name for a, b in zip(prints, case.adapter.fingerprints(), strict=True) if a != b]
    assert len(different) == 1


def numbers(case: Case) -> None:
    assert case.adapter.number(case.tensor) == case.adapter.number(2.5) == 2.5
    assert case.adapter.like(4.0, 1.0) == 4.0
    like = case.adapter.like(4.0, case.tensor)
    assert type(like) is type(case.tensor) and case.adapter.number(like) == 4.0


def saves(case: Case) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, case.file)
        value = case.model if hasattr(case.model, "fit") else {"a": 1}
        case.adapter.save(value, path)
        assert os.path.getsize(path) > 0


def options_are_free_alone(case: Case) -> None:
    with case.adapter.no_sync():
        pass
    assert case.adapter.eval_samples() is None
    case.adapter.randomise(1, 0)


def detaches(case: Case) -> None:
    given, recorder = attached(case)
    case.adapter.detach()
    case.adapter.detach()
    if case.adapter.name == "keras":
        case.train(given)  # as if hvdlm had never been there
        assert not recorder.shares


CHECKS = (
    recognises,
    starts_alone,
    signature_tells_shapes,
    objects_stay_themselves,
    training_is_told,
    digest_sees_a_change,
    numbers,
    saves,
    options_are_free_alone,
    detaches,
)


def main() -> None:
    found = {}
    for check in CHECKS:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                check(CASES[sys.argv[1]]())
            found[check.__name__] = "ok"
        except Exception:
            found[check.__name__] = traceback.format_exc()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
