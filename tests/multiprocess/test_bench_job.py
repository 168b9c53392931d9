"""``hvdlm bench`` on real workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.workers import ROOT

pytestmark = pytest.mark.timeout(300)


def bench(directory: Path, *words: str) -> Any:
    command = [sys.executable, "-m", "hvdlm", "bench", *words, "--json"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(directory)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_step_under_codecs_horovod_and_ddp(tmp_path: Path) -> None:
    words = ["--gloo", "--rounds", "2", "--codec", "int8,auto", "--compare", "horovod,ddp", "--sync-every", "50"]
    found = bench(tmp_path, "step", *words)
    assert (found["workers"], found["controller"]) == (2, "Gloo")
    assert list(found["steps"]) == ["plain", "int8", "auto", "local", "local-int8", "horovod", "horovod-fp16", "ddp"]
    assert all(len(times) == 2 and min(times) > 0 for times in found["steps"].values())
    assert found["plans"]["int8"].startswith("compression=int8, buckets of ")
    assert found["plans"]["auto"].startswith("on one host codecs take longer than they save: compression=none")
    assert list(tmp_path.glob(".hvdlm-bench-*")) == [], "nothing is left"


def test_sums_by_size(tmp_path: Path) -> None:
    found = bench(tmp_path, "allreduce", "--mpi", "--rounds", "3", "--codec", "none,fp16", "--max-mb", "1")
    assert found["controller"] == "MPI"
    assert list(found["sums"]) == ["4096", "32768", "262144", "1048576"]
    assert all(len(times) == 3 for arms in found["sums"].values() for times in arms.values())
