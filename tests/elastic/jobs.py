"""Runs elastic jobs of real processes and looks at what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    code: int
    output: str
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    directory: Path

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Its events of one kind."""
        return [event for event in self.events if event["event"] == kind]


class Job:
    """An elastic job that runs; as a context manager, so that nothing of it stays.

    Args:
        directory: Where it runs, empty.
        script: Name of the script beside this file, or a path.
        flags: Of ``hvdlm run``.
        faults: See :mod:`tests.elastic.faults`.
        env: More environment.
        prefix: Words before the command, to run it on another host.
    """

    def __init__(
        self,
        directory: Path,
        script: str = "train_torch.py",
        flags: Sequence[str] = ("--min-np", "1", "-H", "localhost:2"),
        faults: Sequence[dict[str, Any]] = (),
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        (directory / "tmp").mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HVDLM_PROGRESS": "none",
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "FAULTS": json.dumps(list(faults)),
            "TMPDIR": str(directory / "tmp"),
            **(env or {}),
        }
        rest = [] if "--blacklist-cooldown-range" in flags else ["--blacklist-cooldown-range", "1", "2"]
        rest += ["--start-timeout", "120"]  # a loaded machine takes long to start processes
        command = [
            *prefix,
            sys.executable,
            "-m",
            "hvdlm",
            "run",
            "--run-dir",
            "run",
            *rest,
            *flags,
            str(SCRIPTS / script),
        ]
        with open(directory / "output", "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        left = [child for child in self._tree() if child.is_running()]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def events(self) -> list[dict[str, Any]]:
        """What has happened so far."""
        path = self.directory / "run" / "events.jsonl"
        if not path.exists():
            return []
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def until(self, found: Callable[[dict[str, Any]], bool], limit: float = 150) -> dict[str, Any]:
        """Wait for an event."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            for event in self.events():
                if found(event):
                    return event
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)
        raise AssertionError(f"it did not happen within {limit} s; {self.events()}\n{self.output()}")

    def generation(self, number: int, limit: float = 150) -> dict[str, Any]:
        """Wait for a generation."""
        return self.until(lambda e: e["event"] == "generation" and e["generation"] == number, limit)

    def committed(self, step: int, limit: float = 150) -> dict[str, Any]:
        """Wait for a commit at this step or later."""
        return self.until(lambda e: e["event"] == "commit" and e["step"] >= step, limit)

    def signal(self, worker: int, signum: int) -> None:
        """Send a worker's process a signal."""
        pids = [event["pids"] for event in self.events() if event["event"] == "generation"][-1]
        os.kill(pids[str(worker)], signum)

    def output(self) -> str:
        """What it has printed so far."""
        return (self.directory / "output").read_text(errors="replace")

    def end(self, limit: float = 150) -> Ended:
        """Wait for its end, and see that nothing is left of it."""
        tree = self._tree()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            raise AssertionError(f"the job did not end within {limit} s; {self.events()}\n{self.output()}") from None
        _, alive = psutil.wait_procs(tree, timeout=5)
        assert not alive, f"left behind: {[process.cmdline() for process in alive]}"
        summary = self.directory / "run" / "summary.json"
        content = json.loads(summary.read_text()) if summary.exists() else {}
        return Ended(code, self.output(), self.events(), content, self.directory)


def undisturbed(directory: Path, script: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The same training in one process that nothing disturbs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HVDLM_PROGRESS": "none", "PYTHONPATH": str(ROOT)}
    environment |= {"PAUSE": "0", "TF_CPP_MIN_LOG_LEVEL": "2", **(env or {})}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script)],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load(directory)


def load(directory: Path) -> dict[str, Any]:
    """What the script saved at its end: parameters as arrays, and numbers."""
    if (directory / "final.npz").exists():
        saved = dict(np.load(directory / "final.npz"))
        names = [name for name in saved if name.startswith("w")]
        return {"model": {name: saved.pop(name).astype(np.float64) for name in names}, **saved}
    import torch

    found = torch.load(directory / "final.pt")
    return {"model": {name: t.double().numpy() for name, t in found.pop("model").items()}, **found}
