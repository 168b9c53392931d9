"""Whole jobs are killed and go on with ``resume`` at other numbers of workers: the training is the undisturbed one."""

from __future__ import annotations

import collections
import glob
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.multiprocess.workers import ROOT, run_workers

HERE = ROOT / "tests" / "multiprocess"
SAMPLES, EPOCHS, STEPS = 50, 3, 27
LIMIT = 5e-5


def live(directory: Path, script: str, style: str, workers: int, controller: str, kill_at: int, **options: str) -> str:
    """One life of a job; what it printed to standard error."""
    env = {"HVDLM_RUN_DIR": str(directory / "run"), **{f"HVDLM_{k.upper()}": v for k, v in options.items()}}
    done = run_workers(
        [str(HERE / script), str(directory / "out"), style, str(kill_at)],
        workers,
        controller=controller if workers > 1 else None,
        cwd=directory,
        timeout=170,
        env=env,
    )
    assert (done.returncode == 0) == (kill_at < 0), done.stderr[-3000:]
    return done.stderr


def lives(directory: Path, script: str, style: str, plan: list[tuple[int, str, int]]) -> None:
    """Several lives of one training: (workers, controller, batch of this life in which rank 0 is killed)."""
    directory.mkdir()
    options = {"checkpoint_dir": str(directory / "checkpoints"), "checkpoint_every": "2", "resume": "auto"}
    for workers, controller, kill_at in plan:
        said = live(directory, script, style, workers, controller, kill_at, **options)
    assert len(plan) == 1 or "going on from step" in said


def results(directory: Path, suffix: str) -> list[Any]:
    found = sorted(glob.glob(f"{directory}/out.*.{suffix}"))
    return [torch.load(path) if suffix == "pt" else json.loads(Path(path).read_text()) for path in found]


def committed(directory: Path) -> dict[int, collections.Counter[int]]:
    """How often each sample of an epoch was trained on, by the last life that trained on its step."""
    steps: dict[int, list[tuple[float, int, list[int]]]] = {}
    for path in glob.glob(f"{directory}/out.ids.*"):
        born = Path(path).stat().st_mtime  # of its last line: lives follow one another
        for line in Path(path).read_text().splitlines():
            step, epoch, ids = json.loads(line)
            steps.setdefault(step, []).append((born, epoch, ids))
    counted: dict[int, collections.Counter[int]] = {}
    for seen in steps.values():
        latest = max(born for born, _, _ in seen)
        for born, epoch, ids in seen:
            if born > latest - 1.0:
                counted.setdefault(epoch, collections.Counter()).update(ids)
    return counted


@pytest.mark.timeout(600)  # up to three jobs, each some seconds on a machine that is not busy
@pytest.mark.parametrize(
    ("style", "plan"),
    [
        ("plain", [(2, "mpi", 13), (3, "mpi", 7), (1, "", -1)]),
        ("epochs", [(1, "", 16), (2, "gloo", -1)]),
    ],
)
def test_pytorch(tmp_path: Path, style: str, plan: list[tuple[int, str, int]]) -> None:
    lives(tmp_path / "undisturbed", "state_script.py", style, [(1, "", -1)])
    lives(tmp_path / "killed", "state_script.py", style, plan)
    (expected,) = results(tmp_path / "undisturbed", "pt")
    for got in results(tmp_path / "killed", "pt"):
        for name, value in expected["model"].items():
            assert float((got["model"][name] - value).norm() / value.norm()) < LIMIT, name
        assert got["best"]["epochs"] == expected["best"]["epochs"]
    summary = json.loads((tmp_path / "killed" / "run" / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["samples_seen"] == EPOCHS * SAMPLES
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True
    counted = committed(tmp_path / "killed")
    if style == "epochs":  # else the function's own numbers are those of its last life
        assert all(counted[epoch] == collections.Counter(range(SAMPLES)) for epoch in range(EPOCHS))
    else:
        assert sum(counted.values(), collections.Counter()) == collections.Counter(list(range(SAMPLES)) * EPOCHS)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("data", "plan"),
    [("arrays", [(2, "mpi", 13), (1, "", -1)])],
)
def test_keras(tmp_path: Path, data: str, plan: list[tuple[int, str, int]]) -> None:
    lives(tmp_path / "undisturbed", "state_keras_script.py", data, [(1, "", -1)])
    lives(tmp_path / "killed", "state_keras_script.py", data, plan)
    (expected,) = results(tmp_path / "undisturbed", "json")
    weights = np.array(expected["weights"])
    for got in results(tmp_path / "killed", "json"):
        assert np.linalg.norm(np.array(got["weights"]) - weights) / np.linalg.norm(weights) < LIMIT
        assert got["history"]["learning_rate"] == expected["history"]["learning_rate"]
        assert np.allclose(got["history"]["loss"], expected["history"]["loss"], rtol=1e-4)


def test_random_kills_leave_nothing_out(tmp_path: Path) -> None:
    """Lives of one process each, killed at random steps (a fixed seed): the training is the undisturbed one."""
    choose = random.Random(5)
    lives(tmp_path / "undisturbed", "state_script.py", "plain", [(1, "", -1)])
    plan = [(1, "", choose.randint(2, 9)) for _ in range(3)]
    lives(tmp_path / "killed", "state_script.py", "plain", [*plan, (1, "", -1)])
    (expected,), (got,) = results(tmp_path / "undisturbed", "pt"), results(tmp_path / "killed", "pt")
    assert all(torch.equal(got["model"][name], value) for name, value in expected["model"].items())
