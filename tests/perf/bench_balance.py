"""What balance="dynamic" makes of two workers with 100 % and 40 % of a CPU each, against the ideal throughput.

    python tests/perf/bench_balance.py            # as root, with the cgroup (v1) cpu controller
    python tests/perf/bench_balance.py --check    # exit 1 if a limit is missed

Ideal is the sum of what both workers train at the same time without each other, each in batches of the part that its
quota makes it due; it is measured before and after every five steps of training, and a figure is the samples per second
of these steps over it. Training together: even shares; dynamic shares, from the 30th step on; dynamic shares, from the
30th step after the quotas were swapped. Figures are medians with their 95 % bootstrap intervals. Over Gloo, since MPI
waits by spinning, which uses up a quota; with a short period of the quotas, so that a worker is slow all the time and
not stopped for a part of it. On a machine whose two cores others use too, quotas are not what limits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hvdlm.bench.stats import median_interval  # noqa: E402

CPU = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
QUOTAS = (1.0, 0.4)
BATCH, SETTLE, MEASURE, GROUP = 192, 30, 20, 5
CYCLES = 1
"""Times that quotas are swapped and swapped back."""
ALONE_SECONDS = 2.0
LIMIT = 0.90


def group(rank: int) -> Path:
    return CPU / f"hvdlm-bench-{os.environ['BENCH_BALANCE_ID']}-{rank}"


def set_quota(rank: int, quota: float) -> None:
    (group(rank) / "cpu.cfs_quota_us").write_text(str(int(quota * PERIOD_US)))


def work(result: Path) -> None:
    """One worker. Rank 0 writes the figures and swaps the quotas."""
    import torch
    from torch.utils.data import DataLoader

    import hvdlm
    from hvdlm.api import _current

    rank = hvdlm.rank()
    (group(rank) / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = 256

    def make() -> torch.nn.Module:
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh())]
        # Each layer four times, so that a step computes for a while and sends little, as large batches do.
        return torch.nn.Sequential(*layers * 4)

    def compute(model: torch.nn.Module, x: torch.Tensor) -> None:
        model(x).square().mean().backward()

    def rows(n: int) -> torch.Tensor:
        return torch.randn(n, 64, width)

    class Repeated(torch.utils.data.Dataset[tuple[torch.Tensor]]):
        """As many samples as asked for, a few of them different."""

        def __init__(self, n: int) -> None:
            self.n, self.some = n, rows(64)

        def __len__(self) -> int:
            return self.n

        def __getitem__(self, index: int) -> tuple[torch.Tensor]:
            return (self.some[index % 64],)

    lonely = make()
    lonely_optimizer = torch.optim.SGD(lonely.parameters(), lr=1e-3)

    def alone(quotas: tuple[float, ...]) -> float:
        """Samples per second of both workers together, each on its own, in batches of the part that is its due."""
        part = round(BATCH * quotas[rank] / sum(quotas))
        own = iter(DataLoader(Repeated(part * 1_000), batch_size=part))
        hvdlm.barrier()
        count, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < ALONE_SECONDS:
            (x,) = next(own)
            lonely_optimizer.zero_grad()
            compute(lonely, x)
            lonely_optimizer.step()
            count += part
        speeds = _current().adapter.collectives.allgather(str(count / seconds).encode())
        hvdlm.barrier()
        return sum(map(float, speeds))

    def train(balance: str, parts: int) -> list[dict[str, Any]]:
        """Each part: 30 steps to settle, 20 measured, five at a time between measurements alone; then quotas swap."""

        @hvdlm.distribute(balance=balance)
        def run(model: Any, optimizer: Any, data: Any) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            quotas, speeds, start, waited, samples = QUOTAS, [0.0], 0.0, 0.0, 0
            blocked = _current().adapter.collectives.blocked
            for step, (x,) in enumerate(data):
                part, place = divmod(step, SETTLE + MEASURE)
                if place == 0 and step:
                    quotas = quotas[::-1]
                    if rank == 0:
                        for other, quota in enumerate(quotas):
                            set_quota(other, quota)
                optimizer.zero_grad()
                compute(model, x)
                optimizer.step()
                samples += _current().adapter._share.count
                measured, rest = divmod(place + 1 - SETTLE, GROUP)
                if measured < 0 or rest:
                    continue
                seconds = time.perf_counter() - start
                waits = _current().adapter.collectives.allgather(str((blocked()[1] - waited) / seconds).encode())
                speeds.append(alone(quotas))
                if measured:
                    found.append(
                        {
                            "part": part,
                            "speed": BATCH * GROUP / seconds,
                            "alone": (speeds[-2] + speeds[-1]) / 2,
                            "share": samples / BATCH / GROUP,
                            "waits": [float(wait) for wait in waits],
                        }
                    )
                data._pace.disturbed()
                start, waited, samples = time.perf_counter(), blocked()[1], 0
            return found

        for other, quota in enumerate(QUOTAS):
            if rank == 0:
                set_quota(other, quota)
        model = make()
        data = DataLoader(Repeated(BATCH * parts * (SETTLE + MEASURE)), batch_size=BATCH)
        return run(model, torch.optim.SGD(model.parameters(), lr=1e-3), data)  # type: ignore[no-any-return]

    figures = {"even": train("none", 1), "dynamic": train("dynamic", 2 * CYCLES)}
    if rank == 0:
        result.write_text(json.dumps(figures))


@contextlib.contextmanager
def groups() -> Iterator[None]:
    os.environ["BENCH_BALANCE_ID"] = str(os.getpid())
    try:
        for rank, quota in enumerate(QUOTAS):
            group(rank).mkdir()
            (group(rank) / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            set_quota(rank, quota)
            (group(rank) / "cpu.shares").write_text("20480")  # before other work of the machine
        yield
    finally:
        for rank in range(len(QUOTAS)):
            for _ in range(50):
                with contextlib.suppress(OSError):
                    group(rank).rmdir()
                    break
                time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    with tempfile.TemporaryDirectory() as directory, groups():
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", "hvdlm", "run", "-np", "2", "--gloo", "--run-dir", directory]
        command += [__file__, "--work", str(result)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HVDLM_PROGRESS": "none",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise SystemExit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        read = json.loads(result.read_text())
    rows = {
        "even": read["even"],
        "dynamic": [g for g in read["dynamic"] if g["part"] % 2 == 0],
        "dynamic, after quotas swapped": [g for g in read["dynamic"] if g["part"] % 2],
    }
    print("| shares | samples/s | both alone | of the ideal | rank 0 computes | ranks wait |")
    print("| --- | --- | --- | --- | --- | --- |")
    missed = []
    for name, groups_of_steps in rows.items():
        of_ideal = median_interval([g["speed"] / g["alone"] for g in groups_of_steps])
        speed, alone, share = (median(g[key] for g in groups_of_steps) for key in ("speed", "alone", "share"))
        waits = " and ".join(f"{median(g['waits'][rank] for g in groups_of_steps):.1%}" for rank in (0, 1))
        low, mid, high = (f"{value:.1%}" for value in (of_ideal.low, of_ideal.median, of_ideal.high))
        print(f"| {name} | {speed:.0f} | {alone:.0f} | {mid} [{low}, {high}] | {share:.1%} | {waits} |")
        if name != "even" and of_ideal.median < LIMIT:
            missed.append(f"{name}: {mid} of the ideal, limit {LIMIT:.0%}: MISSED")
    print("\n".join(missed))
    sys.exit(bool(args.check and missed))


if __name__ == "__main__":
    main()
