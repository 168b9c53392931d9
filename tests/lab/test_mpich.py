"""Scripts started by ``mpiexec`` of MPICH, an MPI that this Horovod was not built with, on one host and on two."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import Lab, lab
from tests.multiprocess.workers import ROOT

MPICH = Path(sys.prefix) / "mpich"
pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.geteuid() != 0 or not (MPICH / "bin" / "mpiexec").exists(), reason="needs root and MPICH: make test-lab"
    ),
]
EXAMPLE = str(ROOT / "examples" / "gpt_torch" / "train_hvdlm.py")
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "64", "--block-size", "64", "--epochs", "1"]
SCRIPT = str(ROOT / "tests" / "multiprocess" / "mpi_script.py")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), second_network=True) as hosts:
        yield hosts


def run(hosts: Lab, directory: Path, count: int, *words: str) -> tuple[int, str]:
    environment = {"PYTHONPATH": str(ROOT), "HVDLM_RUN_DIR": str(directory / "run")}
    environment["MPI4PY_LIBMPI"] = str(MPICH / "lib" / "libmpi.so.12")
    mpiexec = [str(MPICH / "bin" / "mpiexec"), "-hosts", "h1,h2", "-iface", "eth0", "-ppn", str(-(-count // 2))]
    command = [*mpiexec, "-n", str(count), sys.executable, *words]
    done = hosts.run(hosts.hosts[0], command, timeout=200, cwd=directory, env=environment)
    assert hosts.processes() == []
    return done.returncode, done.stdout + done.stderr


def summary_of(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "summary.json").read_text())
    assert found["replicas_identical"] is True and (found["samples_missing"], found["samples_repeated"]) == (0, 0)
    return found


def test_the_example_on_two_hosts(two_hosts: Lab, tmp_path: Path) -> None:
    code, told = run(two_hosts, tmp_path, 4, EXAMPLE, *SMALL)
    assert code == 0, told[-3000:]
    assert summary_of(tmp_path / "run")["world_size"] == 4


@pytest.mark.parametrize("how", ["all", "half"])
def test_a_program_with_mpi4py(two_hosts: Lab, tmp_path: Path, how: str) -> None:
    code, told = run(two_hosts, tmp_path, 3, SCRIPT, how)
    assert code == 0, told[-3000:]
    assert summary_of(tmp_path / "run")["world_size"] == (3 if how == "all" else 2)
    assert f"world 2 of 3: rank {2 if how == 'all' else 1} of {3 if how == 'all' else 2}" in told


def test_one_that_fails_ends_all(two_hosts: Lab, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    lines = ["import torch, hvdlm", "hvdlm.init('torch')", "if hvdlm.rank(): raise ValueError('broken on one')"]
    script.write_text("\n".join([*lines, "hvdlm.barrier()"]))
    code, told = run(two_hosts, tmp_path, 2, str(script))
    assert code != 0 and "ValueError: broken on one" in told
