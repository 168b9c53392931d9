"""What one rank did in the first steps of a script, as the probe writes it down."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Step", "Trace", "load", "store"]


@dataclass
class Step:
    """One optimizer step."""

    lr: float
    norm: float
    """2-norm of the gradient that is applied."""
    sample: list[float]
    """Some of its elements, at fixed places."""
    digests: dict[str, str]
    """Of each parameter after the step."""
    values: list[float] = field(default_factory=list)
    """Some elements of the parameters after the step, at fixed places."""


@dataclass
class Trace:
    """One rank."""

    rank: int
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    backwards: int = 0
    attempts: int = 0
    """How often an optimizer was told to step, whether it came to that or not."""
    losses: list[float] = field(default_factory=list)
    """Of each backward."""
    batches: list[list[str]] = field(default_factory=list)
    """A digest of each row of each training batch that a model was called with."""
    start: list[float] = field(default_factory=list)
    """Some elements of the parameters before the first step."""
    steps: list[Step] = field(default_factory=list)
    initial: dict[str, str] = field(default_factory=dict)
    """Digests of parameters before hvdlm made them equal."""
    buffers: dict[str, str] = field(default_factory=dict)
    batch_norms: bool = False
    dropout: bool = False
    hooks: list[str] = field(default_factory=list)
    """What the script itself does to gradients before they are summed."""
    unknown: list[str] = field(default_factory=list)
    """Parameters that are trained and that hvdlm was not given."""
    handed: int = 0
    """Batches that hvdlm handed out."""
    unshared: int = 0
    """Batches in the data that the script reads without hvdlm; 0 if there is none."""
    parameters: int = 0
    """Elements that the optimizer trains."""
    state_bytes: int = 0
    """Of the optimizer's state."""
    times: list[float] = field(default_factory=list)
    """Seconds at the end of each step, of this process's clock."""
    saved: list[str] = field(default_factory=list)
    stuck: bool = False
    """Whether it was still waiting for the others when they had ended."""
    error: str = ""


def store(trace: Trace, directory: Path, *, wait: bool = True) -> None:
    """Write a rank's trace, and wait until those of the other ranks are there."""
    partial = directory / f".rank-{trace.rank}.json"
    partial.write_text(json.dumps(asdict(trace)), encoding="utf-8")
    os.replace(partial, directory / f"rank-{trace.rank}.json")
    until = time.monotonic() + 20
    while wait and len(list(directory.glob("rank-*.json"))) < trace.size and time.monotonic() < until:
        time.sleep(0.02)


def load(directory: Path) -> list[Trace]:
    """The traces of all ranks that wrote one, in rank order."""
    traces = []
    for path in directory.glob("rank-*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        value["steps"] = [Step(**step) for step in value["steps"]]
        traces.append(Trace(**value))
    return sorted(traces, key=lambda trace: trace.rank)
