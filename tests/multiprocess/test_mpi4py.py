"""Programs that use MPI themselves through mpi4py: they own MPI_COMM_WORLD, and may hand over a part of it."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdlm import joining
from hvdlm.adapters import engine
from hvdlm.adapters.fake import FakeJob
from hvdlm.environment import Environment, read_environment
from hvdlm.errors import ConfigError, EngineError
from hvdlm.launchers.engine import Engine
from tests.multiprocess.workers import ROOT, run_workers

pytest.importorskip("mpi4py")
SCRIPT = str(ROOT / "tests" / "multiprocess" / "mpi_script.py")


def check(run: Path, workers: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == workers and summary["samples_seen"] == 41
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True


@pytest.mark.parametrize("how", ["all", "half", "ranks"])
def test_open_mpi(tmp_path: Path, how: str) -> None:
    environment = {"HVDLM_RUN_DIR": str(tmp_path / "run")}
    job = run_workers([SCRIPT, how], 3, controller="mpi", cwd=tmp_path, timeout=90, env=environment)
    assert job.returncode == 0, job.stderr[-4000:]
    said = sorted(line for line in job.stdout.splitlines() if line.startswith("world"))
    if how == "all":
        assert said == [f"world {rank} of 3: rank {rank} of 3" for rank in range(3)]
        check(tmp_path / "run", 3)
    elif how == "half":
        assert said == ["world 0 of 3: rank 0 of 2", "world 1 of 3: rank 0 of 1", "world 2 of 3: rank 1 of 2"]
        check(tmp_path / "run", 2)
        check(tmp_path / "run" / "from-rank-1", 1)
    else:
        assert said == ["world 1 of 3: rank 0 of 2", "world 2 of 3: rank 1 of 2"]
        check(tmp_path / "run" / "from-rank-1", 2)


class FakeComm:
    """What hvdlm asks of a communicator."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def bcast(self, value: int) -> int:
        return value


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """mpi4py over an Open MPI that sees two processes, and a Horovod that was built with it."""
    fake = types.SimpleNamespace(Intracomm=FakeComm, COMM_NULL=FakeComm(0, 0), COMM_WORLD=FakeComm(0, 2))
    fake.Get_library_version = lambda: "Open MPI v5.0.11, package: x"
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake)
    monkeypatch.setattr(joining, "_place", None)
    monkeypatch.setattr(engine, "_communicator", None)
    monkeypatch.setattr(joining, "find_engine", lambda: Engine(Path("x"), True, "openmpi"))
    yield fake


LAUNCHED = Environment(launcher="mpirun", rank=0, size=2)


def test_a_communicator_holds_to_the_end(mpi: types.SimpleNamespace) -> None:
    comm = FakeComm(1, 2)
    joined = joining.join(LAUNCHED, comm)
    assert (joined.rank, joined.size, engine._communicator) == (1, 2, comm)
    assert joining.join(LAUNCHED).rank == 1
    with pytest.raises(ConfigError, match="given before"):
        joining.join(LAUNCHED, comm)


def test_what_is_no_communicator(mpi: types.SimpleNamespace) -> None:
    for wrong in ("all", mpi.COMM_NULL, object(), [0, 0], [1]):
        with pytest.raises(ConfigError, match="comm is"):
            joining.join(LAUNCHED, wrong)
    with pytest.raises(ConfigError, match="elastic"):
        joining.join(Environment(launcher="horovodrun", size=2, control="a:1:0:k"), FakeComm(0, 2))
    mpi.COMM_WORLD = FakeComm(0, 1)
    with pytest.raises(EngineError, match=r"mpirun started 2 processes, but mpi4py sees 1: .*\(Open MPI v5.0.11\)"):
        joining.join(LAUNCHED, FakeComm(0, 1))
    with pytest.raises(EngineError, match="a list of ranks needs"):
        joining.join(Environment(launcher="horovodrun", rank=0, size=2), [0, 1])


def test_who_has_the_connection_of_the_launcher() -> None:
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "7"}
    assert read_environment(hydra).pmi == 7
    assert read_environment({**hydra, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}).pmi is None
    assert read_environment({**hydra, "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}).pmi is None, "it has met the others"


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that may each use four cores, from a launcher that said nothing of threads."""
    made: list[int] = []
    threads = types.SimpleNamespace(get_num_threads=lambda: 4, set_num_threads=made.append)
    monkeypatch.setitem(sys.modules, "torch", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert FakeJob(2).run(lambda collectives: joining.share_threads(collectives, "a")) == [2, 2]
    assert made == [2, 2]
    made.clear()
    alone = FakeJob(2).run(lambda collectives: joining.share_threads(collectives, str(collectives.rank)))
    assert alone == [None, None] and not made
    bound = [joining.part_of_cores([0, 1, 2, 3], [[0, 1, 2, 3], [0, 1, 2, 3], [4]]), joining.part_of_cores([4], [[4]])]
    assert bound == [2, 1]
    mpirun = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    assert read_environment(mpirun).shares_threads
    assert not read_environment({**mpirun, "OMP_NUM_THREADS": "3"}).shares_threads, "the person said how many"
    assert not read_environment({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}).shares_threads
