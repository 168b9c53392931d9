"""Reads what runs have left in their directories, thinned to what a page can show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.secrets import masked

__all__ = ["Run", "read_run"]

MAX_POINTS = 400
"""Points of a curve that are kept."""


@dataclass(kw_only=True)
class Run:
    """One run directory."""

    name: str
    path: str
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``steps.jsonl``, thinned: scalars only."""
    metrics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """What ``hvdlm.log`` got: (step, value) by name, thinned."""
    events: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, list[float]] = field(default_factory=dict)
    """Mean seconds of a step on each rank by what they went into, and samples."""
    communication: float = 0.0


def read_run(path: Path, secrets: Sequence[str] = ()) -> Run:
    """What a run has left; what is missing stays empty.

    Args:
        path: The run directory.
        secrets: What is not to be shown, should one be in it.

    Raises:
        ConfigError: It is no run directory.
    """
    known = ("summary.json", "config.json", "steps.jsonl", "metrics.jsonl", "events.jsonl")
    if not path.is_dir() or not any((path / name).exists() for name in known):
        raise ConfigError(f"{str(path)!r} is no run directory: it has none of {', '.join(known)}.", hint=_nearest(path))
    run = Run(name=path.resolve().name, path=str(path))
    run.summary, run.config = (masked(_object(path / f"{name}.json"), secrets) for name in ("summary", "config"))
    # Recovery may have trained steps again, so the later line of a step holds.
    steps = {int(line["step"]): line for line in _lines(path / "steps.jsonl") if isinstance(line.get("step"), int)}
    ordered = [steps[number] for number in sorted(steps)]
    _sum_up_ranks(run, ordered)
    scalars = ("step", "time", "loss", "samples_per_second", "step_seconds", "communication")
    run.steps = [{name: line.get(name) for name in scalars} for line in _thinned(ordered)]
    series: dict[str, list[tuple[float, float]]] = {}
    for line in _lines(path / "metrics.jsonl"):
        for name, value in line.items():
            if name not in ("step", "time", "epoch") and isinstance(value, (int, float)):
                series.setdefault(name, []).append((float(line.get("step", 0)), float(value)))
    run.metrics = {name: _thinned(points) for name, points in series.items()}
    run.events = masked(list(_lines(path / "events.jsonl"))[-500:], secrets)
    return run


def _sum_up_ranks(run: Run, steps: list[dict[str, Any]]) -> None:
    """Means over the steps of the last world size."""
    if not steps:
        return
    size = len(steps[-1].get("data") or ())
    last = [line for line in steps if len(line.get("data") or ()) == size]
    for name in ("data", "compute", "waiting", "samples"):
        columns = list(zip(*(line[name] for line in last), strict=True))
        run.ranks[name] = [sum(column) / len(column) for column in columns]
    run.communication = sum(line["communication"] for line in last) / len(last)


def _thinned(items: list[Any]) -> list[Any]:
    """At most :data:`MAX_POINTS` of them, evenly spaced, the first and the last among them."""
    if len(items) <= MAX_POINTS:
        return items
    return [items[round(i * (len(items) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without a last line that a killed process left half."""
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except OSError:
        return
    with file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _nearest(path: Path) -> str:
    parent = path if path.is_dir() else path.parent
    runs = sorted(parent.glob("**/summary.json"), key=lambda p: p.stat().st_mtime) if parent.is_dir() else []
    return f"hvdlm report {runs[-1].parent}" if runs else "give a directory under hvdlm-runs/"
