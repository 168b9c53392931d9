"""Real jobs in a directory of their own; a test fails if a process of its job is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "LAUNCH_TEST_MARK"


@dataclass
class Result:
    """What a finished command left."""

    code: int
    out: str
    err: str
    ended: float
    """When it ended, seconds since the epoch."""


def marked_processes(mark: str) -> dict[int, str]:
    """Process id -> command line of every live process that inherited the mark."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() not in Path(f"/proc/{entry}/environ").read_bytes():
                    continue
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if state != "Z":
                found[int(entry)] = command
    return found


class Jobs:
    """Runs ``hvdlm run`` and other commands in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        ours = ("HVDLM_", "HOROVOD_", "OMPI_", "PMIX_", "PMI_", "OMP_NUM")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        bin_dir = str(Path(sys.executable).parent)
        self.environment |= {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([bin_dir, self.environment.get("PATH", "")]),
        }

    def script(self, text: str, name: str = "script.py") -> str:
        """Write a script and return its name."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start ``hvdlm run`` with these arguments."""
        return self.start_command(sys.executable, "-m", "hvdlm", "run", *arguments, **environment)

    def start_command(self, *argv: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            argv,
            cwd=self.directory,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], limit: float = 60) -> Result:
        """Wait for a command, killing it (and failing) after ``limit`` seconds."""
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate(timeout=20)
            pytest.fail(f"still running after {limit} s\n--- stdout\n{out}\n--- stderr\n{err}")
        return Result(process.returncode, out, err, time.time())

    def run(self, *arguments: str, limit: float = 60, **environment: str) -> Result:
        """``hvdlm run`` to its end."""
        return self.finish(self.start(*arguments, **environment), limit)

    def left(self) -> dict[int, str]:
        """Processes of this job that live."""
        return marked_processes(self.mark)

    def wait_until(self, condition: Callable[[], bool], limit: float = 30) -> float:
        """Wait for a condition; returns how long it took."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > limit:
                pytest.fail(f"not so after {limit} s; processes: {self.left()}")
            time.sleep(0.02)
        return time.monotonic() - start


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """A directory with nothing in it; afterwards no process of the test's may live."""
    made = Jobs(tmp_path)
    yield made
    deadline = time.monotonic() + 5
    while made.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = made.left()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left behind: {left}"
