"""One worker of a benchmark: measures all arms in turn; rank 0 writes what came out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["main", "measure"]

_WARM_UP = 6
"""Rounds that do not count: the planner looks after four."""


def measure(
    arms: Mapping[str, Callable[[], float | None]], rounds: int, barrier: Callable[[], object], warm_up: int
) -> dict[str, list[float]]:
    """Seconds of each arm in each round. The order changes, so that no arm always follows the same other one.

    Args:
        arms: What to do, by name; returns seconds that do not count, if there are some.
        rounds: How often.
        barrier: Lets workers start together.
        warm_up: Rounds before, which are left out.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            barrier()
            start = time.perf_counter()
            left_out = arms[name]() or 0.0
            if number >= warm_up:
                times[name].append(time.perf_counter() - start - left_out)
    return times


def main(argv: list[str]) -> None:
    """``worker.py SPEC``: a JSON file that :mod:`hvdlm.bench.launch` wrote."""
    from hvdlm.bench.torch_arms import Arms

    spec: dict[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    arms = Arms(spec["interface"], spec["batch"], **spec["options"])
    world, collectives = arms.world, arms.collectives

    def together() -> object:
        return collectives.allreduce(np.ones(1))

    def slowest(times: dict[str, list[float]]) -> dict[str, list[float]]:
        return {
            name: [float(t) for t in collectives.allreduce(np.array(values), "max")] for name, values in times.items()
        }

    result: dict[str, Any] = {"workers": world.size, "controller": arms.controller}
    if spec["kind"] == "allreduce":
        result["sums"] = {}
        for size in spec["sizes"]:
            made = {name: arms.sum(name, size) for name in spec["arms"]}
            result["sums"][str(size)] = slowest(measure(made, spec["rounds"], together, 2))
    else:
        made = {name: arms.step(name) for name in spec["arms"]}
        result["steps"] = slowest(measure(made, spec["rounds"], together, _WARM_UP))
        result["plans"] = {name: p.choice.reason for name, p in arms.planners.items() if p.choice is not None}
    if world.rank == 0:
        Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
    together()
    sys.stdout.flush()
    os._exit(0)  # Horovod's optimizer and DDP leave threads behind that need not end in order


if __name__ == "__main__":
    main(sys.argv[1:])
