"""Thirty injected stragglers: is the right rank named with the right cause, and is what rebalancing would give given?

    python tests/perf/stragglers.py                     # as root: cgroup v1, network namespaces, tc
    python tests/perf/stragglers.py --seconds 330       # as many as fit; the same command goes on where it was

Ten ranks with a CPU quota, ten with a slow loader, ten with a slow link (a token bucket on one host's link).
What the job said first is compared: rank, cause, and the gain of rebalancing. For quotas and loaders the same job then
trains in turn with the weights that were measured and with even shares; what is gained is compared with what was said.
Results are appended to ``results/stragglers.jsonl``. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.lab.hosts import Host, lab  # noqa: E402

CPU = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
BATCH, STEPS, EVERY, TURN = 48, 41, 10, 14
RESULTS = Path(__file__).with_name("results") / "stragglers.jsonl"
WITHIN = 0.25
CAUSES = {"quota": "compute", "loader": "data", "link": "communication"}

Case = dict[str, Any]
CASES: list[Case] = [
    *({"kind": "quota", "size": 2, "rank": r, "amount": q} for q in (0.7, 0.5, 0.4, 0.3, 0.25) for r in (0, 1)),
    # How many times as long as computing it, a sample takes to be read.
    *({"kind": "loader", "size": 2, "rank": r, "amount": a} for a in (0.4, 1.0, 3.0) for r in (0, 1)),
    *({"kind": "loader", "size": 3, "rank": r, "amount": 1.0} for r in (0, 2)),
    *({"kind": "loader", "size": 4, "rank": r, "amount": 2.0} for r in (1, 3)),
    # Megabits per second.
    *({"kind": "link", "size": 2, "rank": r, "amount": a} for a in (5, 10) for r in (0, 1)),
    *({"kind": "link", "size": 3, "rank": r, "amount": a} for a in (5, 10) for r in (0, 1, 2)),
]


def name_of(case: Case) -> str:
    return f"{case['kind']}-{case['amount']}-rank{case['rank']}of{case['size']}"


def work(case: Case, run: Path) -> None:
    """One worker: trains with even shares, then in turn with shares by speed and even ones."""
    import torch

    import hvdlm

    torch.set_num_threads(1)
    rank, kind = hvdlm.rank(), case["kind"]
    slow = rank == case["rank"]
    # Before other work of the machine: a rank that gets less than its quota anyway is not slowed by it.
    with contextlib.suppress(PermissionError):
        os.nice(-15)
    if kind == "quota":
        (group(rank) / "cpu.shares").write_text("20480")
        (group(rank) / "cgroup.procs").write_text(str(os.getpid()))
    seconds = 0.004 if kind == "loader" else 0.0004

    class Data(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def __len__(self) -> int:
            return BATCH * self.steps

        def __getitem__(self, index: int) -> torch.Tensor:
            if kind == "loader" and slow:
                time.sleep(seconds * case["amount"])
            return torch.full((64,), index / 1000)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 512 if kind == "link" else 256)
            self.register_buffer("burden", torch.randn(256, 256) / 16, persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if kind != "quota":
                time.sleep(len(x) * seconds)  # no core has to be shared
            else:
                with torch.no_grad():
                    for _ in range(len(x)):
                        y = self.burden
                        for _ in range(8):
                            y = torch.tanh(y @ self.burden)
            return self.layer(x)  # type: ignore[no-any-return]

    def train(steps: int, **options: str) -> list[float]:
        """Seconds of each step but the first ones."""

        @hvdlm.distribute(timings_every=EVERY, **options)
        def run(net: Any, optimizer: Any, loader: Any) -> list[float]:
            ends = []
            for x in loader:
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
                ends.append(time.perf_counter())
            return [end - begin for begin, end in itertools.pairwise(ends)][3:]

        net = Net()
        loader = torch.utils.data.DataLoader(Data(steps), batch_size=BATCH)
        return run(net, torch.optim.SGD(net.parameters(), lr=1e-4), loader)  # type: ignore[no-any-return]

    train(STEPS)
    if kind == "link":
        return
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    ranks = range(case["size"])
    own = [statistics.median(line["data"][r] + line["compute"][r] for line in lines) for r in ranks]
    speeds = [statistics.median(line["samples"][r] for line in lines) / own[r] for r in ranks]
    weights = ",".join(f"{speed / max(speeds):.4f}" for speed in speeds)
    balanced, even = [], []
    for _ in range(2):
        balanced += train(TURN, balance="static", weights=weights)
        even += train(TURN)
    if rank == 0:
        took = {"even": statistics.median(even), "balanced": statistics.median(balanced), "weights": weights}
        (run / "took.json").write_text(json.dumps(took))


def group(rank: int) -> Path:
    return CPU / f"hvdlm-stragglers-{os.environ['STRAGGLERS_ID']}-{rank}"


@contextlib.contextmanager
def quotas(case: Case) -> Iterator[None]:
    """A cgroup for each rank; that of the straggler gets a part of a core."""
    if case["kind"] != "quota":
        yield
        return
    os.environ["STRAGGLERS_ID"] = str(os.getpid())
    try:
        for rank in range(case["size"]):
            group(rank).mkdir()
            (group(rank) / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            # No quota for the others: one of a whole core would stop them, since Horovod's thread works beside Python.
            quota = int(case["amount"] * PERIOD_US) if rank == case["rank"] else -1
            (group(rank) / "cpu.cfs_quota_us").write_text(str(quota))
        yield
    finally:
        for rank in range(case["size"]):
            for _ in range(50):
                with contextlib.suppress(OSError):
                    group(rank).rmdir()
                    break
                time.sleep(0.1)
        del os.environ["STRAGGLERS_ID"]


def limit(host: Host, mbit: float, both: bool) -> None:
    """Limit what a host sends, and what it gets: of two hosts the links cannot be told apart if both are limited."""
    bucket = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "50ms"]
    outer = f"{host.namespace.removesuffix(host.name)}v{host.name}"
    ways = [["-n", host.namespace, "qdisc", "add", "dev", "eth0"], ["qdisc", "add", "dev", outer]]
    for where in ways[: 1 + both]:
        subprocess.run(["tc", *where, *bucket], check=True, timeout=30)


def run(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(straggler events; seconds of a step with even shares and with shares by speed, empty for links)."""
    with tempfile.TemporaryDirectory() as made, quotas(case):
        directory = Path(made)
        command = [sys.executable, "-m", "hvdlm", "run", "-np", str(case["size"]), "--gloo"]
        command += ["--run-dir", str(directory / "run")]
        program = [__file__, "--work", json.dumps([case, str(directory / "run")])]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HVDLM_PROGRESS": "none"}
        environment = {**os.environ, **settings}
        if case["kind"] == "link":
            hosts = ",".join(f"h{i + 1}:1" for i in range(case["size"]))
            command += ["-H", hosts, "--network-interfaces", "eth0"]
            with lab(directory, case["size"]) as up:
                limit(up.hosts[case["rank"]], case["amount"], case["size"] > 2)
                done = up.run(up.hosts[0], [*command, *program], timeout=150, cwd=directory, env=settings)
        else:
            done = subprocess.run(
                [*command, *program], cwd=directory, env=environment, capture_output=True, text=True, timeout=150,
                check=False,
            )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name_of(case)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        events = [json.loads(line) for line in (directory / "run" / "events.jsonl").read_text().splitlines()]
        took = directory / "run" / "took.json"
        return (
            [event for event in events if event["event"] == "straggler"],
            json.loads(took.read_text()) if took.exists() else {},
        )


def play(case: Case) -> dict[str, Any]:
    """What was named, and what rebalancing was said to gain and gained."""
    events, took = run(case)
    found: dict[str, Any] = {"case": name_of(case), **case, "named": None, "said": None, "gained": None, **took}
    if events:
        first = events[0]
        found |= {"named": [first["rank"], first["cause"]], "said": first["gain_balanced"], "cost": first["cost"]}
    found["right"] = found["named"] == [case["rank"], CAUSES[case["kind"]]]
    if found["said"] is not None and took:
        found["gained"] = took["even"] / took["balanced"] - 1
        found["close"] = abs(found["said"] - found["gained"]) <= WITHIN * found["gained"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        case, run_dir = json.loads(args.work)
        work(case, Path(run_dir))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # groups and namespaces are taken away again
    played = {}
    if args.results.exists():
        played = {line["case"]: line for line in map(json.loads, args.results.read_text().splitlines())}
    until = time.monotonic() + args.seconds
    for case in CASES:
        name = name_of(case)
        if name in played or not name.startswith(args.only) or time.monotonic() > until:
            continue
        played[name] = play(case)
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(played[name]) + "\n")
        print(json.dumps(played[name]), flush=True)
    print("| | cases | rank and cause right | gain within 25 % |\n| --- | --- | --- | --- |")
    for kind in CAUSES:
        rows = [row for row in played.values() if row["kind"] == kind]
        gains = [row["close"] for row in rows if row["gained"] is not None]
        print(f"| {kind} | {len(rows)} | {sum(row['right'] for row in rows)} | {sum(gains)} of {len(gains)} |")
    wrong = [name for name, row in played.items() if not row["right"]]
    print(f"{len(played)} of {len(CASES)} played, {len(wrong)} wrong {wrong or ''}")
    sys.exit(len(wrong) > 3)


if __name__ == "__main__":
    main()
