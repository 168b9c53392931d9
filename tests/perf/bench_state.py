"""What durable checkpoints cost a training: how long its steps stand still while one is taken, and while it is written.

``python tests/perf/bench_state.py [--megabytes 100] [--rounds 12]``. One process trains a perceptron with AdamW, whose
state has that size, on one thread, and writes a checkpoint every 20 steps. The stall is for how long training stands
still: for what is copied before the script goes on, and for the optimizer's wait for the rest. It is told as a part of
the time that the write takes, checksums and fsync included. So is what the steps around it last longer than twice the
median of the steps before, which is the same and the noise of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.adapters.torch_copying import Background
from hvdlm.bench.stats import median_interval

LIMIT = 0.05
EVERY = 20


waits: list[tuple[float, float]] = []
"""When the optimizer had waited for a copy, and for how long."""


def train_some(directory: Path, megabytes: int, rounds: int) -> tuple[list[float], list[dict[str, float]]]:
    """(when each step began, events of the state)."""
    # Parameters and two moments of each: of two square matrices.
    width = int((megabytes * 2**20 / 4 / 3 / 2) ** 0.5)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = torch.randn(32 * (EVERY * (rounds + 1) + EVERY // 2), width)
    began: list[float] = []
    wait = Background.wait

    def waiting(self: Background) -> None:
        start = time.perf_counter()
        wait(self)
        waits.append((time.time(), time.perf_counter() - start))

    Background.wait = waiting  # type: ignore[method-assign]

    @hvdlm.distribute(checkpoint_dir=str(directory / "checkpoints"), checkpoint_every=str(EVERY), checkpoint_keep=1)
    def train(model, optimizer, loader):
        for (x,) in loader:
            began.append(time.time())
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), x).backward()
            optimizer.step()

    train(model, optimizer, DataLoader(TensorDataset(data), 32))
    events = directory / "run" / "events.jsonl"
    return began, [json.loads(line) for line in events.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--directory", default=None, help="where to write, by default where temporary files are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        os.environ |= {"HVDLM_RUN_DIR": f"{directory}/run", "HVDLM_PROGRESS": "none"}
        began, events = train_some(Path(directory), args.megabytes, args.rounds)
    lasted = [later - earlier for earlier, later in itertools.pairwise(began)]
    commits = {int(event["step"]): event for event in events if event["event"] == "commit"}
    stalls, longer, slower, copies, waited, writes, usuals = [], [], [], [], [], [], []
    for event in events:
        step = int(event["step"])
        # The first takes fresh memory, and the last is the end's, in no step.
        if event["event"] != "checkpoint" or not EVERY < step <= len(lasted) - 2:
            continue
        usual = statistics.median(lasted[step - EVERY // 2 : step - 1])
        write, end = event["seconds"], event["time"]
        within = [lasted[i] for i in range(step + 1, len(lasted)) if began[i + 1] < end]
        usuals.append(usual * 1e3)
        copy = commits[step]["seconds"]
        wait = next(seconds for when, seconds in waits if when > began[step])
        copies.append(copy * 1e3)
        waited.append(wait * 1e3)
        writes.append(write * 1e3)
        stalls.append((copy + wait) / write)
        longer.append((lasted[step - 1] + lasted[step] - 2 * usual) / write)
        if within:
            slower.append((statistics.mean(within) - usual) / write)
    stall = median_interval(stalls)
    for name, interval in (
        ("a step, ms", median_interval(usuals)),
        ("copied before the script goes on, ms", median_interval(copies)),
        ("waited for by the optimizer, ms", median_interval(waited)),
        ("write, ms", median_interval(writes)),
        ("stall / write", stall),
        ("the steps around it longer / write", median_interval(longer)),
        *([("a step while it is written longer / write", median_interval(slower))] if slower else []),
    ):
        print(f"{name:<45} {interval}")
    print(f"limit {LIMIT}: {'kept' if stall.holds(LIMIT) else 'MISSED'}")
    sys.exit(0 if stall.holds(LIMIT) else 1)


if __name__ == "__main__":
    main()
