"""Replicas that train on their own and become one again: against all workers played in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import local_script
from tests.multiprocess.workers import run_workers

pytestmark = pytest.mark.timeout(400)
SCRIPT = str(Path(local_script.__file__))
WITHOUT_ORACLE = ["infinity_on_one_rank", "drawn_by_hand"]
JOBS = {"mpi2": (2, "mpi"), "mpi3": (3, "mpi"), "gloo2": (2, "gloo")}
HOST_JOBS = {
    "gloo": ["-m", "hvdlm", "run", "--gloo", "-np", "3", "-H", "localhost:2,127.0.0.1:1"],
    "mpi": ["-m", "hvdlm", "run", "--mpi", "-np", "3"],
}


Ranks = dict[str, list[Any]]


def read(directory: Path, done: Any, names: list[str], workers: int) -> Ranks:
    found = {
        name: [
            json.loads(path.read_text()) if (path := directory / f"{name}.{rank}.json").exists() else {}
            for rank in range(workers)
        ]
        for name in names
    }
    errors = [rank["error"] for ranks in found.values() for rank in ranks if "error" in rank]
    assert not errors, errors[0]
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(scope="module", params=sorted(JOBS))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    workers, controller = JOBS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    done = run_workers([SCRIPT, str(directory)], workers, controller=controller, cwd=directory, timeout=150)
    return read(directory, done, [*local_script.CASES, *WITHOUT_ORACLE], workers)


@pytest.fixture(scope="module", params=sorted(HOST_JOBS))
def of_hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    directory = tmp_path_factory.mktemp(request.param)
    hosts = ["2,1"] if request.param == "gloo" else ["1,2", "--mpi"]
    command = [*HOST_JOBS[request.param], SCRIPT, str(directory), *hosts]
    done = run_workers(command, 3, controller=None, cwd=directory, timeout=150)
    return read(directory, done, [*local_script.OF_HOSTS, *WITHOUT_ORACLE], 3)


@pytest.mark.parametrize("name", sorted(local_script.CASES))
def test_as_all_workers_in_one_process(results: Ranks, name: str) -> None:
    for rank in results[name]:
        assert rank["moved"] > 0.1, "the comparison is between models that learned something"
        # Adam makes more of how a sum of gradients rounds than of how a mean of parameters does.
        assert rank["far"] < (1e-9 if name == "together_first" else 1e-12)


@pytest.mark.parametrize("name", [*sorted(local_script.CASES), *WITHOUT_ORACLE])
def test_replicas_end_alike(results: Ranks, name: str) -> None:
    assert len({rank["digest"] for rank in results[name]}) == 1
    assert results[name][0]["moved"] > 0.1


def test_hosts_train_on_their_own_as_in_one_process(of_hosts: Ranks) -> None:
    """Two hosts of one and two workers: sums inside, averages between them."""
    for name in local_script.OF_HOSTS:
        for rank in of_hosts[name]:
            assert rank["moved"] > 0.1, name
            assert rank["far"] < 1e-12, name
    for name in WITHOUT_ORACLE:
        assert len({rank["digest"] for rank in of_hosts[name]}) == 1, name
