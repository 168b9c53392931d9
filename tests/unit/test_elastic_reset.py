"""One worker, in this process, whose job is reset again and again: by losses, planned changes, and told to leave."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.elastic import Elastic
from hvdlm.environment import Environment
from hvdlm.errors import PeerLost, WorkersChanged
from hvdlm.member import Assignment
from hvdlm.wire import LEFT_CODE

SAMPLES, BATCH, EPOCHS = 50, 6, 3


class Driver:
    """Stands in for :class:`hvdlm.member.Member`: what is to happen, by the boundary at which it does."""

    broken = keeps = planned = False
    leaving: str | None = None
    num_leavers = 0

    def __init__(self, plan: dict[int, str]) -> None:
        self._plan = plan
        self._boundaries = self._generation = 0
        self.said: list[tuple[str, dict[str, Any]]] = []

    def on_break(self, act: Callable[[], None]) -> None:
        pass

    def tell(self, kind: str, **fields: Any) -> None:
        self.said.append((kind, fields))

    def leave(self) -> None:
        self.tell("left")

    def join(self, held: list[int], cause: str) -> Assignment:
        self.tell("ready", held=held, cause=cause)
        if self.leaving is not None:
            raise SystemExit(LEFT_CODE)  # as the driver tells it, once the others are ready
        self._generation += 1
        costs = {"lost_steps": 0, "samples_retrained": 0, "recovery_seconds": 0.0, "resets": self._generation - 1}
        last = [fields["costs"] for kind, fields in self.said if kind == "going"][-1:]
        costs |= {**last[0], "resets": self._generation - 1} if last else {}
        return Assignment(self._generation, 0, 1, {}, None, costs)

    def place(self, environment: Environment, assignment: Assignment) -> Environment:
        return environment.placed(0, 1)

    def boundary(self, commit: Callable[[], object]) -> None:
        self._boundaries += 1
        what = self._plan.get(self._boundaries)
        if what is None:
            return
        self.planned = what != "lost"
        if what == "lost":
            raise PeerLost("a peer")
        commit()
        if what == "leaves":
            self.leaving, self.num_leavers = "SIGTERM", 1
        raise WorkersChanged("a change")


def torch_run() -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    def made() -> tuple[Any, ...]:
        torch.manual_seed(3)
        data = torch.randn(SAMPLES, 4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        loader = DataLoader(TensorDataset(data, (data**2).sum(1, keepdim=True)), BATCH, shuffle=True)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.8), loader

    def train(model: Any, optimizer: Any, scheduler: Any, loader: Any) -> Any:
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
                scheduler.step()
        return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])

    return train, made


def keras_run() -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    def made() -> tuple[Any, ...]:
        keras.utils.set_random_seed(3)
        x = np.random.default_rng(2).normal(size=(SAMPLES, 4)).astype("float32")
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        model.compile(keras.optimizers.AdamW(1e-2), "mse")
        return model, x, (x**2).sum(1, keepdims=True)

    def train(model: Any, x: Any, y: Any) -> Any:
        history = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
        assert history.epoch == list(range(EPOCHS))
        return np.concatenate([np.asarray(w).reshape(-1) for w in model.get_weights()])

    return train, made


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Driver, dict[str, Any]]]:
    """Train while a plan happens: what the function returned, the driver, and the summary."""

    def played(run: Any, plan: dict[int, str], **options: Any) -> tuple[Any, Driver, dict[str, Any]]:
        driver = Driver(plan)
        member: Any = driver
        elastic = Elastic(member)
        monkeypatch.setattr("hvdlm.api.elastic_of", lambda environment: elastic)
        monkeypatch.setenv("HVDLM_PROGRESS", "none")
        monkeypatch.setenv("HVDLM_RUN_DIR", str(tmp_path / "run"))
        train, made = run
        result = hvdlm.distribute(train, elastic=True, commit_every="4", **options)(*made())
        return result, driver, json.loads((tmp_path / "run" / "summary.json").read_text())

    return played


def random_plan(seed: int) -> dict[int, str]:
    """Losses and planned changes, some of them right after another."""
    draw = random.Random(seed)
    return {draw.randint(1, 30): draw.choice(["lost", "planned"]) for _ in range(draw.randint(2, 9))}


@pytest.mark.parametrize(
    ("framework", "plan"),
    [
        *[(torch_run, random_plan(seed)) for seed in range(2)],
        (keras_run, {3: "lost", 9: "planned", 13: "lost", 14: "lost", 25: "planned"}),
    ],
)
def test_resets_change_nothing(play: Any, framework: Any, plan: dict[int, str]) -> None:
    run = framework()
    plain, _, _ = play(run, {})
    disturbed, driver, summary = play(run, plan)
    assert np.array_equal(plain, disturbed)
    steps = EPOCHS * -(-SAMPLES // BATCH)
    assert (summary["steps"], summary["samples_seen"]) == (steps, EPOCHS * SAMPLES)
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["resets"] == len(plan)
    causes = [fields["cause"] for kind, fields in driver.said if kind == "ready"]
    assert causes == ["start", *(plan[boundary] for boundary in sorted(plan))]
    assert driver.said[-1][0] == "finished"


def test_the_last_one_to_leave_writes_the_state_and_another_goes_on(play: Any, tmp_path: Path) -> None:
    run = torch_run()
    plain, _, _ = play(run, {})
    store = {"checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_every": "1000"}
    with pytest.raises(SystemExit) as left:
        play(run, {10: "leaves"}, **store)
    assert left.value.code == LEFT_CODE
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000000010"]
    resumed, _, summary = play(run, {}, **store, resume="yes")
    assert np.array_equal(plain, resumed)
    assert summary["samples_seen"] == EPOCHS * SAMPLES
