"""Callbacks, mistakes, saved models and failures under Keras, with real workers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = str(ROOT / "tests" / "multiprocess" / "keras_behaviour.py")
ENV = {"OMPI_MCA_mpi_yield_when_idle": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

pytestmark = pytest.mark.timeout(900)

LOAD = """
import sys
sys.modules["hvdlm"] = None  # importing it fails
import keras
model = keras.saving.load_model(sys.argv[1])
optimizer = model.optimizer
print(type(optimizer).__module__, type(optimizer).__name__, optimizer.name, int(optimizer.iterations))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory, and what each of two ranks saw."""
    directory = tmp_path_factory.mktemp("behaviour")
    job = run_workers([SCRIPT, str(directory)], 2, controller="mpi", cwd=directory, timeout=400, env=ENV)
    assert job.returncode == 0, job.stderr
    return directory, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def seen(ran: tuple[Path, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return ran[1]


def test_only_rank_0_writes(seen: list[dict[str, Any]]) -> None:
    assert [found["writers"] for found in seen] == [["board.0", "checkpoint.0.keras", "log.0.csv", "own.0.keras"]] * 2


def test_saved_model_loads_without_hvdlm(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    program = [sys.executable, "-c", LOAD, str(ran[0] / "checkpoint.0.keras")]
    loaded = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=ran[0], check=True)
    module, name, given, iterations = loaded.stdout.split()
    # 48 samples in batches of 8, 3 epochs.
    assert module.startswith("keras.") and (name, given, int(iterations)) == ("Adam", "mine", 18)
    assert (ran[0] / "saved.keras").exists() and (ran[0] / "saved.weights.h5").exists()


def test_one_rank_stops_all(seen: list[dict[str, Any]]) -> None:
    assert [found["stop_of_one_rank"] for found in seen] == [{"batch": 2, "epoch": 2}] * 2


def test_backup_and_restore(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        first_epoch, difference = found["backup_and_restore"]
        assert first_epoch == 2
        assert difference <= 1e-6


def test_learning_rate_scales(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["learning_rates"] == pytest.approx([0.2, 0.2])
    assert seen[1] and seen[1]["learning_rates"] == seen[0]["learning_rates"]


def test_learning_rate_warms_up(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        for rates in found["warm_up"]:  # of the second to the sixth step
            assert rates == pytest.approx([0.125, 0.15, 0.175, 0.2, 0.2], rel=1e-4)


def test_jit_is_turned_off_and_said(seen: list[dict[str, Any]]) -> None:
    assert len(seen[0]["jit"]) == 1
    assert "turned off" in seen[0]["jit"][0]
    assert seen[1]["jit"] == []


def test_mean(seen: list[dict[str, Any]]) -> None:
    assert [found["mean_and_save"] for found in seen] == [[0.5, 1.0]] * 2


def test_callbacks_on_torch(tmp_path: Path) -> None:
    cases = ["writers", "stop_of_one_rank", "backup_and_restore", "learning_rates"]
    env = {**ENV, "KERAS_BACKEND": "torch"}
    job = run_workers([SCRIPT, str(tmp_path), *cases], 2, controller="mpi", cwd=tmp_path, timeout=200, env=env)
    assert job.returncode == 0, job.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["writers"] == ["board.0", "checkpoint.0.keras", "log.0.csv", "own.0.keras"]
        assert found["stop_of_one_rank"] == {"batch": 2, "epoch": 2}
        assert found["backup_and_restore"] == [2, pytest.approx(0, abs=1e-6)]
        assert found["learning_rates"] == pytest.approx([0.2, 0.2])


MISTAKES = {
    "shared optimizer": ("RecognitionError", "share one optimizer", "HINT: compile each model with"),
    "later in loop": ("RecognitionError", "later/kernel", "HINT: call model.build", "hvdlm.wrap(model) again"),
    "torch beside": ("RecognitionError", "SGD of torch beside", "HINT: give hvdlm the objects of one framework"),
    "torch loader": ("DataError", "DataLoader of torch", "HINT: pass arrays"),
    "torch and tf": ("DataError", "tensors of torch and of TensorFlow", "HINT: pass NumPy arrays"),
    "compiled twice": ("nothing raised",),
    "not compiled": ("ValueError", "compile()"),
    "different models": ("MismatchError", "(6, 4)", "(6, 5)", "last/kernel"),
    "loop over an unbuilt model": ("RecognitionError", "HINT: call model.build(input_shape)"),
    "strategy": ("RecognitionError", "MirroredStrategy", "HINT: make and compile the model outside"),
    "endless": ("DataError", "HINT: pass steps_per_epoch"),
    "sharded by hand": ("DataError", "is sharded by rank already", "HINT: leave .shard(...) out"),
    "empty dataset": ("DataError", "the dataset is empty", "HINT"),
    "two rows": ("DataError", "1 samples, fewer than the 2 workers", "HINT"),
    "generator": ("DataError", "HINT: pass steps_per_epoch"),
    "one sample": ("DataError", "fewer than the 2 workers", "HINT"),
    "nothing": ("RecognitionError", "HINT: pass them"),
    "no_sync": ("ConfigError", "HINT: set gradient_accumulation_steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_on_every_rank(seen: list[dict[str, Any]], name: str) -> None:
    for found in seen:
        kind, *parts = MISTAKES[name]
        assert found["mistakes"][name].startswith(kind), found["mistakes"][name]
        assert all(part in found["mistakes"][name] for part in parts), found["mistakes"][name]


ENDS = {"raise": (1, "ZeroDivisionError: on purpose"), "kill": (137, "was killed by SIGKILL (the kernel")}


@pytest.mark.parametrize(
    ("how", "controller", "backend"),
    [
        ("raise", "--mpi", "tensorflow"),
        ("raise", "--gloo", "tensorflow"),
        ("kill", "--mpi", "tensorflow"),
        ("kill", "--gloo", "tensorflow"),
        ("raise", "--gloo", "torch"),
    ],
)
def test_rank_that_fails_in_fit_ends_the_job(tmp_path: Path, how: str, controller: str, backend: str) -> None:
    program = ["-m", "hvdlm", "run", "-np", "2", controller, SCRIPT, str(tmp_path), how]
    env = {**ENV, "KERAS_BACKEND": backend}
    job = run_workers(program, 1, controller=None, cwd=tmp_path, timeout=120, env=env)
    ended = time.time()
    code, last = ENDS[how]
    assert job.returncode == code
    assert ended - (tmp_path / "failed").stat().st_mtime <= 5
    # One that is killed leaves no traceback: that it was is said instead, and the end of what it had written.
    assert last in (job.stderr.rstrip().splitlines()[-1] if how == "raise" else job.stderr)
    # The other rank's fit did not return as if it had trained.
    assert not list(tmp_path.glob("returned.*"))
