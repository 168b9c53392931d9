"""Every test is checked for what it leaves behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

# Set by frameworks when they are first imported, or by pytest itself.
_TOLERATED = ("PYTEST_", "COV_", "KMP_", "TF2_", "TF_", "TORCH", "TPU_", "GRPC_", "OMPI_MCA_", "PMIX_", "PRTE_")
_GRACE_SECONDS = 3.0


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_TOLERATED)}


def _processes() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            # A zombie uses nothing and goes when it is waited for.
            if process.status() != psutil.STATUS_ZOMBIE and not _lasts(process):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def _lasts(process: psutil.Process) -> bool:
    """Whether it is one of multiprocessing's own, which live as long as we do: its tracker, its fork server."""
    command = " ".join(process.cmdline())
    # What the fork server forks has its command line too, but not us for a parent.
    return "resource_tracker" in command or ("forkserver" in command and process.ppid() == os.getpid())


def _threads() -> set[threading.Thread]:
    # Threads of C++ that ran some Python stand there as dummies; nobody here has started them.
    return {
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith(("pytest_timeout", "tqdm")) and not isinstance(thread, threading._DummyThread)
    }


def _files() -> set[str]:
    return {
        name for name in os.listdir(".") if name not in (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")
    }


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves behind environment variables, processes, threads, files or another directory."""
    directory, environment = os.getcwd(), _environment()
    processes, threads, files = _processes(), _threads(), _files()
    yield
    left = []
    if os.getcwd() != directory:
        left.append(f"the working directory {os.getcwd()}")
        os.chdir(directory)
    changed = {name for name, _ in environment.items() ^ _environment().items()}
    if changed:
        left.append(f"environment variables {sorted(changed)}")
    made = _files() - files
    if made:
        left.append(f"files in {directory}: {sorted(made)}")
    end = time.monotonic() + _GRACE_SECONDS
    while (_processes() - processes or _threads() - threads) and time.monotonic() < end:
        time.sleep(0.02)
    for pid in _processes() - processes:
        left.append(f"process {pid}: {_command(pid)}")
    left += [f"thread {thread.name}" for thread in _threads() - threads]
    if left:
        pytest.fail("left behind: " + "; ".join(left))


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[:200]
    except psutil.NoSuchProcess:
        return "(ended meanwhile)"
