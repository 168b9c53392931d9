"""Every codec over real collectives: training converges, replicas stay equal, the ends of the scale pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdlm.algorithms.codecs import CODECS
from tests.multiprocess import codec_script
from tests.multiprocess.workers import run_workers

pytestmark = pytest.mark.timeout(600)

JOBS = {"gloo3": (3, "gloo", []), "mpi2": (2, "mpi", ["--sizes"])}
DISTANCE = {"none": 1e-3, "fp16": 5e-3, "bf16": 2e-2, "int8": 1e-2, "powersgd": 5e-2, "topk": 5e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for job, (workers, controller, flags) in JOBS.items():
        directory = tmp_path_factory.mktemp(job)
        result = directory / "result.json"
        script = str(Path(codec_script.__file__))
        done = run_workers([script, str(result), *flags], workers, controller=controller, cwd=directory, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        found[job] = json.loads(result.read_text())
    return found


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("job", JOBS)
def test_training_converges_and_replicas_are_equal(results: dict[str, Any], job: str, codec: str) -> None:
    found = results[job][codec]
    assert found["distance"] < DISTANCE[codec]
    assert found["same"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("job", JOBS)
def test_extremes_pass(results: dict[str, Any], job: str, codec: str) -> None:
    found = results[job][codec]
    assert found["torch.float32"] and found["torch.float64"]
    if "--sizes" in JOBS[job][2]:
        assert found["tiny"] and found["large"]


@pytest.mark.parametrize("job", JOBS)
def test_the_first_gradients_may_travel_as_they_are(results: dict[str, Any], job: str) -> None:
    found, workers = results[job]["warm-up"], JOBS[job][0]
    assert found["sent"][:2] == [1.0, 1.0]
    assert all(0.1 <= part <= 0.1 * workers for part in found["sent"][2:4])
    assert (found["sent"][4], found["left"]) == (1.0, 1)
    assert found["lost"] < 1e-5


@pytest.mark.parametrize("job", JOBS)
def test_who_waits_for_others_leaves_its_processor_to_them(results: dict[str, Any], job: str) -> None:
    """Horovod as released asks without a pause, which takes all of the second."""
    assert results[job]["waits"] < 0.3


@pytest.mark.parametrize("job", JOBS)
def test_a_process_forked_after_a_collective_starts(results: dict[str, Any], job: str) -> None:
    """The background thread of Horovod as released takes a thread state for each tensor, and its lock is forked too."""
    assert results[job]["forks"] == {"stuck": 0, "native": 1}
