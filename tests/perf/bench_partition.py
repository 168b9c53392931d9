"""What the data plan costs, against PyTorch's and Horovod's samplers.

    python tests/perf/bench_partition.py                          # tables (Markdown) on stdout
    python tests/perf/bench_partition.py --plot partition.png     # and the comparison as a picture (needs matplotlib)
    python tests/perf/bench_partition.py --check                  # exit 1 if a target is missed

Times are processor times of one core, the median where a thing is repeated. A sampler is measured in a process of its
own: time from nothing to the first index of an epoch (for hvdlm it includes making the homes, once a run), time for all
indices of one worker of eight, and the growth of the resident set at its highest.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.algorithms.blocks import BlockOrder
from hvdlm.algorithms.partition import _split, moved_fraction, place, skew
from hvdlm.algorithms.rendezvous import slot_homes
from hvdlm.plan import Epoch, Partition

SAMPLES = 10**9
BATCH = 4096
SAMPLERS = {"hvdlm": "hvdlm", "torch": "DistributedSampler", "horovod": "ElasticSampler"}
SIZES = (10**4, 10**5, 10**6, 10**7)
WORKERS = 8
FILE_WINDOWS = (4_000, 80_000, 160_000)
"""Rows that are mixed; those of the largest are not held at once."""


def median_seconds(call: Callable[[], object], repeats: int = 15) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that NumPy and Python allocated at once during a call."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def epoch_of(num_samples: int, num_workers: int, strategy: str = "hash", batch_size: int = BATCH) -> Epoch:
    partition = Partition(strategy=strategy, rank=0, size=num_workers, seed=0)
    shuffle = strategy != "contiguous"
    return Epoch(
        partition=partition, num_samples=num_samples, batch_size=batch_size, shuffle=shuffle, drop_last=False, number=0
    )


def rate(strategy: str, num_workers: int, batch_size: int, block: int) -> float:
    """Ids per second on one core: their order and their placement, the slot table being there already."""
    epoch = epoch_of(SAMPLES, num_workers, strategy, batch_size)
    weights, homes = epoch.partition.shares, epoch.partition.homes()
    positions = np.arange(123 * block, 124 * block)
    seconds = median_seconds(lambda: place(epoch.order(positions), batch_size, strategy, weights, homes, 0))
    return block / seconds


def rates() -> list[tuple[str, int, int, int, float]]:
    """(strategy, workers, batch size, block, ids per second on one core)."""
    cases = itertools.product(("hash", "random", "contiguous"), (8, 1024), (256, 4096), (1 << 16, 1 << 20))
    files = itertools.product(FILE_WINDOWS, (8, 1024), (256, 4096), (1 << 16,))
    return [
        *((*case, rate(*case)) for case in cases),
        *((f"files, windows of {window:,} rows", *case, file_rate(window, *case)) for window, *case in files),
    ]


def file_rate(window: int, num_workers: int, batch_size: int, block: int, repeats: int = 40) -> float:
    """The same for rows of files, in eight blocks a window: permuted by blocks and windows, placed by hash.

    The mean and not the median: a window is permuted when its first row is read, and costs nothing after.
    """
    homes, weights = slot_homes([1.0] * num_workers), [1.0] * num_workers
    order = BlockOrder(np.arange(0, 10**8 + 1, window // 8), key=3, batch_size=batch_size, lanes=16)
    first, behind = 123 * block, (123 + repeats) * block  # always further on: nothing is read twice
    begin = time.process_time()
    for start in range(first, behind, block):
        place(order(np.arange(start, start + block)), batch_size, "hash", weights, homes, 0)
    return (behind - first) / (time.process_time() - begin)


def make_plan(num_workers: int) -> None:
    """All that is needed before the first index, but for the slot table."""
    _split.cache_clear()
    epoch = epoch_of(SAMPLES, num_workers)
    epoch.order(np.zeros(1, dtype=np.int64))
    epoch.partition.counts(BATCH)


def curve() -> list[dict[str, float]]:
    """What a plan of 10^9 samples takes, by number of workers."""
    rows = []
    for num_workers in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        weights = [1.0] * num_workers
        homes = slot_homes(weights)
        rows.append(
            {
                "workers": num_workers,
                "plan_seconds": median_seconds(lambda: make_plan(num_workers)),  # noqa: B023
                "plan_bytes": peak_bytes(lambda: make_plan(num_workers)),  # noqa: B023
                "rate": rate("hash", num_workers, BATCH, 1 << 16),
                "homes_seconds": median_seconds(lambda: slot_homes(weights), 5),  # noqa: B023
                "homes_bytes": homes.nbytes,
                "homes_peak_bytes": peak_bytes(lambda: slot_homes(weights)),  # noqa: B023
                "skew": skew(np.bincount(homes, minlength=num_workers), weights),
                "moved": moved_fraction(homes, slot_homes([1.0] * (num_workers + 1))) * (num_workers + 1),
            }
        )
    return rows


def resident(field: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` (resident now) or ``VmHWM`` (the most since it was reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


class Sized:
    """A data set that is nothing but a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def indices_of(sampler: str, num_samples: int) -> Callable[[], Iterator[int]]:
    """Starts an epoch of one of eight workers."""
    if sampler == "hvdlm":
        return lambda: (index for share in epoch_of(num_samples, WORKERS).shares() for index in share.ids.tolist())
    if sampler == "torch":
        from torch.utils.data import DistributedSampler

        return lambda: iter(DistributedSampler(Sized(num_samples), WORKERS, 0))  # type: ignore[arg-type]
    from horovod.torch.elastic import sampler as module  # type: ignore[import-untyped,unused-ignore]

    # The sampler asks Horovod for these; one process stands for one of eight.
    module.size, module.rank = lambda: WORKERS, lambda: 0
    return lambda: iter(module.ElasticSampler(Sized(num_samples)))


def measure(sampler: str, num_samples: int) -> dict[str, float]:
    """One row of the comparison; runs in a process of its own."""
    start_epoch = indices_of(sampler, num_samples)
    next(indices_of(sampler, 100)())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    indices = start_epoch()
    next(indices)
    first = time.process_time() - start
    count = 1 + sum(1 for _ in indices)
    whole = time.process_time() - start
    peak = max(0, resident("VmHWM") - before)
    return {"num_samples": num_samples, "first": first, "whole": whole, "peak": peak, "count": count}


def comparison() -> dict[str, list[dict[str, float]]]:
    """Rows by sampler."""
    table: dict[str, list[dict[str, float]]] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    for num_samples in SIZES:
        for sampler in SAMPLERS:
            command = [sys.executable, __file__, "--one", sampler, str(num_samples)]
            output = subprocess.check_output(command, env=environment, text=True, timeout=300)
            row = json.loads(output.splitlines()[-1])
            assert abs(row["count"] - num_samples / WORKERS) <= 0.01 * num_samples, row
            table.setdefault(sampler, []).append(row)
    return table


def plot(table: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (("first", 1e3, "time to the first index (ms)"), ("whole", 1e3, "an epoch of one of 8 workers (ms)"))
    for axis, (field, scale, title) in zip(axes, (*panels, ("peak", 1e-6, "memory (MB)")), strict=True):
        for (sampler, label), marker in zip(SAMPLERS.items(), "os^", strict=True):
            rows = table[sampler]
            # A resident set grows in pages; zero has no place on a logarithmic axis.
            values = [max(row[field], 4096 if field == "peak" else 0) * scale for row in rows]
            axis.loglog([row["num_samples"] for row in rows], values, marker=marker, label=label)
        axis.set(title=title, xlabel="samples in the data set")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def show(report: dict[str, Any]) -> None:
    print("| strategy | workers | global batch | block | million ids/s/core |\n| --- | --- | --- | --- | --- |")
    for strategy, num_workers, batch_size, block, speed in report["rates"]:
        print(f"| {strategy} | {num_workers} | {batch_size} | {block} | {speed / 1e6:.1f} |")
    columns = (
        "workers | plan (ms) | plan (kB) | M ids/s/core | homes (ms) | homes (kB) | making (MB) | skew | moved / least"
    )
    print(f"\n| {columns} |\n|{' --- |' * 9}")
    for row in report["curve"]:
        print(
            f"| {row['workers']} | {row['plan_seconds'] * 1e3:.2f} | {row['plan_bytes'] / 1e3:.1f} "
            f"| {row['rate'] / 1e6:.1f} | {row['homes_seconds'] * 1e3:.0f} | {row['homes_bytes'] / 1e3:.0f} "
            f"| {row['homes_peak_bytes'] / 1e6:.1f} | {row['skew']:.4f} | {row['moved']:.3f} |"
        )
    print("\n| samples | sampler | first index (ms) | epoch of one of 8 workers (ms) | memory (MB) |")
    print("| --- | --- | --- | --- | --- |")
    for position, num_samples in enumerate(SIZES):
        for sampler, label in SAMPLERS.items():
            row = report["comparison"][sampler][position]
            print(
                f"| {num_samples} | {label} | {row['first'] * 1e3:.2f} | {row['whole'] * 1e3:.1f} "
                f"| {row['peak'] / 1e6:.1f} |"
            )


def missed(report: dict[str, Any]) -> list[str]:
    """The targets that these figures do not reach."""
    slow = [f"{row}: under 5 million ids/s/core" for row in report["rates"] if row[-1] < 5e6]
    slow += [f"{row}: under 5 million ids/s/core" for row in report["curve"] if row["rate"] < 5e6]
    late = [f"{row}: 10 ms or more" for row in report["curve"] if row["plan_seconds"] >= 0.01]
    large = [f"{row}: 1 MB or more" for row in report["curve"] if row["plan_bytes"] + row["homes_bytes"] >= 1e6]
    return slow + late + large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="where to save the picture")
    parser.add_argument("--json", type=Path, help="where to save all figures")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--one", nargs=2, metavar=("SAMPLER", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    report: dict[str, Any] = {"rates": rates(), "curve": curve(), "comparison": comparison()}
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report["comparison"], arguments.plot)
    if arguments.check and missed(report):
        sys.exit("missed: " + "; ".join(missed(report)))


if __name__ == "__main__":
    main()
