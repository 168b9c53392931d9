"""Jobs of resume_script.py that are killed and go on with other numbers of workers."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.multiprocess.workers import ROOT, run_workers

__all__ = ["NEVER", "STEPS", "Life", "check", "interrupted", "live"]

SCRIPT = ROOT / "tests" / "multiprocess" / "resume_script.py"
NEVER = -1
EPOCHS, SAMPLES, STEPS, EVERY = 3, 50, 27, 4
"""9 steps an epoch, saved every 4th."""
WEIGHTS = {1: [""], 2: ["", "1,3", "0,1"], 3: ["", "1,2,4", "0,1,1"], 4: ["", "5,0,1,1"]}


@dataclass(frozen=True)
class Life:
    """One start of the job."""

    workers: int
    rank: int = 0
    """Of the worker that is sent a signal."""
    step: int = NEVER
    """In which step of the whole training."""
    weights: str = ""
    signal: signal.Signals = signal.SIGKILL
    delay: float = 0.0
    """Seconds after that step began."""
    partition: str = "hash"
    loader_workers: int = 0
    """Processes of each worker that read ahead."""


def live(directory: Path, life: Life) -> bool:
    """Run a job from its checkpoint on; whether it trained to the end."""
    checkpoint = directory / "run.pt"
    balance = {"HVDLM_BALANCE": "static", "HVDLM_WEIGHTS": life.weights} if life.weights else {}
    arguments = (life.rank, life.step, int(life.signal), life.delay, life.loader_workers)
    done = run_workers(
        [str(SCRIPT), str(checkpoint), *map(str, arguments)],
        life.workers,
        controller="mpi" if life.workers > 1 else None,
        cwd=directory,
        timeout=110,
        env={"HVDLM_PARTITION": life.partition, **balance},
    )
    ended = (directory / "run.done").exists()
    # Nothing but the signal may end a life: as Python tells it of a child, or as a shell does, which mpirun follows.
    by_signal = {-int(life.signal), 128 + int(life.signal)}
    assert ended or done.returncode in by_signal, (done.returncode, done.stderr[-3000:])
    assert (done.returncode == 0) <= ended, done.stderr[-3000:]
    if life.step == NEVER:
        assert done.returncode == 0 and ended, done.stderr[-3000:]
    return ended


def interrupted(directory: Path, draw: random.Random, most: int, readers: int = 0) -> int:
    """Train once, interrupted at random at most so often, each life at another size; how often it was.

    With ``readers`` each worker has up to so many processes that read ahead.
    """
    interruptions = 0
    while interruptions < most:
        saved = torch.load(directory / "run.pt")["step"] if (directory / "run.pt").exists() else 0
        workers = draw.randint(1, 4)
        life = Life(
            workers,
            rank=draw.randrange(workers),
            step=min(saved + draw.randint(0, 9), STEPS - 1),
            weights=draw.choice(WEIGHTS[workers]),
            signal=draw.choice([signal.SIGKILL, signal.SIGTERM]),
            delay=draw.choice([0.0, draw.uniform(0.0, 0.05)]),
            partition=draw.choice(["hash", "contiguous", "random"]),
            loader_workers=draw.randint(0, readers) if readers else 0,
        )
        if live(directory, life):
            return interruptions
        interruptions += 1
    live(directory, Life(draw.randint(1, 4), loader_workers=readers))
    return interruptions


def check(directory: Path, alone: Path) -> None:
    """No gap and no repeat in any epoch, and the model of a training that was not interrupted."""
    state: dict[str, Any] = torch.load(directory / "run.pt")
    assert state["step"] == STEPS
    for ids in json.loads(state["seen"]):
        assert sorted(ids) == list(range(SAMPLES))
    expected, got = _parameters(torch.load(alone / "run.pt")), _parameters(state)
    assert float((got - expected).norm() / expected.norm()) < 1e-10


def _parameters(state: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state["model"].values()])
