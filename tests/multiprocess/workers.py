"""Starts real workers under a plain launcher, with a time limit, and ends all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ROOT", "run_workers"]

ROOT = Path(__file__).resolve().parents[2]


def run_workers(
    program: Sequence[str],
    workers: int,
    *,
    controller: str | None,
    cwd: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python *program`` on ``workers`` processes.

    Args:
        program: A script and its arguments.
        workers: Number of processes.
        controller: ``mpi`` (mpirun), ``gloo`` (horovodrun) or None (no launcher).
        cwd: Working directory; run directories are made there.
        timeout: Seconds after which the whole job is killed and the test fails.
        env: Additional environment.
    """
    command = [sys.executable, *program]
    if controller == "mpi":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command = [which("mpirun"), *root, "--oversubscribe", "--bind-to", "none", "-np", str(workers), *command]
    elif controller == "gloo":
        command = [which("horovodrun"), "--gloo", "-np", str(workers), *command]
    environment = {
        **os.environ,
        # One thread a worker: two cores are shared by up to three of them.
        "OMP_NUM_THREADS": "1",
        "HVDLM_PROGRESS": "none",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **(env or {}),
    }
    job = _run(command, cwd, environment, timeout)
    if job.returncode == 213 and "listener thread failed to start" in job.stderr:
        job = _run(command, cwd, environment, timeout)  # mpirun's own server: see hvdlm.launchers.mpi
    return job


def _run(
    command: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    job = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # TERM first, so that the launcher ends its workers: they may be in sessions of their own.
        os.killpg(job.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        raise AssertionError(f"still running after {timeout} s: {command}\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, job.returncode, out, err)


def which(name: str) -> str:
    """A launcher of this interpreter's environment, else of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is not installed"
    return found
