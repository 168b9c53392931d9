"""Streams, keys and masked targets: 2 and 3 workers train what one process trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.multiprocess.test_torch_equivalence import flat, load
from tests.multiprocess.workers import ROOT, run_workers

pytestmark = pytest.mark.timeout(600)  # the first test waits for all the jobs

SCRIPT = ROOT / "tests" / "multiprocess" / "torch_data_cases.py"
CASES = re.findall(r"^@case\ndef (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
JOBS = {"alone": (1, None), "mpi2": (2, "mpi"), "mpi3": (3, "mpi")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for job, (workers, controller) in JOBS.items():
        directory = tmp_path_factory.mktemp(job)
        done = run_workers([str(SCRIPT), str(directory)], workers, controller=controller, cwd=directory, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        directories[job] = directory
    return directories


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("job", ["mpi2", "mpi3"])
def test_same_as_one_process(results: dict[str, Path], job: str, name: str) -> None:
    alone, together = (flat(load(results[of], name, 0)) for of in ("alone", job))
    assert float((together - alone).norm() / alone.norm()) <= 1e-10
    for rank in range(1, JOBS[job][0]):
        assert (flat(load(results[job], name, rank)) == together).all()
