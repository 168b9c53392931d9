"""Models of ``tf_keras`` (Keras 2) on two workers, against one process."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = str(ROOT / "tests" / "multiprocess" / "legacy_keras_script.py")
TOLERANCES = {"sgd": 1e-5, "adam": 5e-5, "dataset": 5e-5, "fp16": 2e-3}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for workers in (1, 2):
        directory = tmp_path_factory.mktemp(f"legacy{workers}")
        controller = "mpi" if workers > 1 else None
        job = run_workers([SCRIPT, str(directory)], workers, controller=controller, cwd=directory, timeout=250)
        assert job.returncode == 0, job.stderr[-3000:]
        found[workers] = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(workers)]
    return found


@pytest.mark.parametrize("name", TOLERANCES)
def test_two_workers_train_what_one_trains(results: dict[int, list[dict[str, Any]]], name: str) -> None:
    alone, together = results[1][0][name], results[2]
    one, two = np.array(alone["weights"]), np.array(together[0][name]["weights"])
    assert np.linalg.norm(two - one) / np.linalg.norm(one) <= TOLERANCES[name]
    assert together[1][name] == together[0][name]
    for key, values in alone["history"].items():
        np.testing.assert_allclose(together[0][name]["history"][key], values, rtol=1e-3, atol=1e-5, err_msg=key)
    assert alone["history"]["loss"][-1] < alone["history"]["loss"][0]


def test_what_is_missing_is_told(results: dict[int, list[dict[str, Any]]]) -> None:
    for found in results[2]:
        assert found["dynamic"].startswith("ConfigError: balance='dynamic' is not available for tf_keras")
        assert "HINT" in found["dynamic"]
