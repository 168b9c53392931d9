"""Under Keras too, 2 and 3 workers train what one process trains: norm of the weights' difference over the weights'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = ROOT / "tests" / "multiprocess" / "keras_cases.py"
CASES = [
    line.removeprefix("def ").partition("(")[0]
    for before, line in zip(SCRIPT.read_text().splitlines(), SCRIPT.read_text().splitlines()[1:], strict=False)
    if before == "@case"
]

pytestmark = pytest.mark.timeout(1200)

# Everything is float32. Runs take 33 to 56 steps.
SGD, ADAM, COMPRESSED = 1e-5, 5e-5, 2e-3
LOSSY = {
    "fit_sgd_int8": 2e-3,
    "fit_sgd_bf16": 1e-2,
    "fit_sgd_powersgd": 1e-1,
    "fit_planned": COMPRESSED,
    "loop_planned_in_graph": COMPRESSED,
}
TOLERANCES = {
    "fit_adam_compressed": COMPRESSED,
    "fit_sgd_compressed_small_buckets": COMPRESSED,
    **LOSSY,
    "run_eagerly": COMPRESSED,
    "fit_adam": ADAM,
    "fit_adam_before_it_parts": ADAM,
    "accumulating_before_it_parts": ADAM,
    "fit_adamw_global_clipnorm": ADAM,
    "fit_endless_dataset": ADAM,
    "loop_prepared_dataset": ADAM,
    "loop_gone_on_with": ADAM,
    "loop_with_unused_layer": ADAM,
    "loop_on_torch": ADAM,
    "frozen_then_unfrozen": ADAM,
    "gradient_accumulation": ADAM,
    "pruned_adam": ADAM,
    "loop_adam_in_graph": ADAM,
    "own_train_step_and_two_optimizers": ADAM,
    "steps_per_execution": ADAM,
    "train_on_batch": ADAM,
    "early_stopping_restores": ADAM,
    "ignored_class_accumulated": ADAM,
    "layers_added_later_in_loop": ADAM,
    "mixed_float16": COMPRESSED,
}

# 2 workers run every case over MPI; 3 workers, over Gloo, those that a third worker can tell apart.
ON_THREE = [
    "fit_sgd",
    "fit_adam_compressed",
    "fit_sgd_int8",
    "loop_planned_in_graph",
    "fit_adam_before_it_parts",
    "small_tail",
    "pruned_adam",
    "gradient_accumulation",
    "loss_scale_with_inf_on_one_rank",
    "loop_sgd_eagerly",
    "loop_adam_in_graph",
    "loop_prepared_dataset",
    "fit_adamw_global_clipnorm",
    "fit_endless_dataset",
    "fit_prepared_dataset",
    "own_train_step_and_two_optimizers",
    "mean_with_sample_weight",
    "layers_added_later_in_loop",
    "train_on_batch",
    "batch_norm_over_all_workers",
    "mask_of_padding",
]
ON_TORCH = [
    "fit_sgd",
    "fit_adam",
    "fit_adamw_global_clipnorm",
    "fit_adam_compressed",
    "fit_auto",
    "small_tail",
    "gradient_accumulation",
    "loss_scale_with_inf_on_one_rank",
    "per_worker_batches",
    "early_stopping_restores",
    "batch_norm_over_all_workers",
    "mask_of_padding",
    "ignored_class_accumulated",
    "mean_with_sample_weight",
    "layers_added_later",
    "loop_on_torch",
    "balanced_fit",
    "weight_zero_with_nan",
]
"""Keras on its torch backend."""
ON_THREE_ON_TORCH = [
    "fit_sgd",
    "fit_adamw_global_clipnorm",
    "small_tail",
    "gradient_accumulation",
    "loss_scale_with_inf_on_one_rank",
    "mask_of_padding",
    "loop_on_torch",
]
ON_TENSORFLOW = [name for name in CASES if not name.endswith("_on_torch")]
JOBS = {
    ("tensorflow", 1): (None, ON_TENSORFLOW),
    ("tensorflow", 2): ("mpi", ON_TENSORFLOW),
    ("tensorflow", 3): ("gloo", ON_THREE),
    ("torch", 1): (None, ON_TORCH),
    ("torch", 2): ("gloo", ON_TORCH),
    ("torch", 3): ("gloo", ON_THREE_ON_TORCH),
}
RUNS = [(*job, name) for job, (_, names) in JOBS.items() for name in names if job[1] > 1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Backend and number of workers -> directory with what each rank ended with."""
    directories = {}
    for (backend, workers), (controller, names) in JOBS.items():
        directory = tmp_path_factory.mktemp(f"{backend}{workers}")
        program = [str(SCRIPT), str(directory), *names]
        env = {"OMPI_MCA_mpi_yield_when_idle": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend}
        job = run_workers(program, workers, controller=controller, cwd=directory, timeout=400, env=env)
        assert job.returncode == 0, job.stderr
        directories[backend, workers] = directory
    return directories


def load(directory: Path, name: str, rank: int) -> dict[str, Any]:
    error = directory / f"{name}.{rank}.err"
    assert not error.exists(), error.read_text()
    return dict(np.load(directory / f"{name}.{rank}.npz"))


@pytest.mark.parametrize(("backend", "workers", "name"), RUNS)
def test_same_as_one_process(results: dict[tuple[str, int], Path], backend: str, workers: int, name: str) -> None:
    alone, together = load(results[backend, 1], name, 0), load(results[backend, workers], name, 0)
    difference = np.linalg.norm(together["weights"] - alone["weights"]) / np.linalg.norm(alone["weights"])
    assert difference <= TOLERANCES.get(name, SGD)
    if name in LOSSY:
        return
    # Metrics are those of one process as well, at every epoch.
    for key, values in alone.items():
        if key.startswith("history/"):
            np.testing.assert_allclose(together[key], values, rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("backend", "workers", "name"), RUNS)
def test_ranks_are_identical(results: dict[tuple[str, int], Path], backend: str, workers: int, name: str) -> None:
    first = load(results[backend, workers], name, 0)
    for rank in range(1, workers):
        other = load(results[backend, workers], name, rank)
        assert first.keys() == other.keys()
        assert all(np.array_equal(value, other[key]) for key, value in first.items()), f"rank {rank}"


def test_overflow_skips_the_step_everywhere(results: dict[tuple[str, int], Path]) -> None:
    """One sample overflows in each of 7 epochs: 7 of 56 steps are skipped, on one worker and on several."""
    for job in JOBS:
        found = load(results[job], "loss_scale_with_inf_on_one_rank", 0)
        assert found["steps"] == 49
        assert np.isfinite(found["weights"]).all()


def test_a_loop_that_was_left_goes_on(results: dict[tuple[str, int], Path]) -> None:
    for workers in (1, 2):
        found = load(results["tensorflow", workers], "loop_gone_on_with", 0)
        assert np.linalg.norm(found["weights"] - found["straight"]) / np.linalg.norm(found["straight"]) <= 1e-6


def test_training_moves(results: dict[tuple[str, int], Path]) -> None:
    """The comparison is between models that learned something."""
    history = load(results["tensorflow", 1], "fit_adam", 0)["history/loss"]
    assert history[-1] < history[0] - 0.005
