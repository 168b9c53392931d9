"""What a training step costs under each codec over slow links: two hosts in network namespaces. Needs root.

    python tests/perf/bench_links.py                             # loopback, 1 Gbit and 100 Mbit, over Gloo
    python tests/perf/bench_links.py --rate 10mbit --codec powersgd,topk,auto --sync-every 0 --rounds 6
    python tests/perf/bench_links.py --rate lo --controller mpi

``local`` is sync="local" with 50 steps between two synchronisations, a fiftieth of one added to each step;
``local-int8`` the same, and what workers have moved travels as int8.
Each figure is the median ratio of a step to one without communication, from ``hvdlm bench step``, with its 95 %
bootstrap interval. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from hvdlm.bench.tables import ratios, table  # noqa: E402
from tests.lab.hosts import lab  # noqa: E402

TITLES = {"lo": "loopback", "1gbit": "1 Gbit", "100mbit": "100 Mbit", "10mbit": "10 Mbit"}


def measure(rate: str, controller: str, words: list[str]) -> Any:
    """One job on two hosts; the parsed output of ``hvdlm bench step --json``."""
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        hosts = ["-H", "h1:1,h2:1", "--network-interfaces", "eth0"]
        count, limit = (1, None) if rate == "lo" else (2, rate)
        command = [sys.executable, "-m", "hvdlm", "bench", "step", f"--{controller}", "--json", *words]
        with lab(directory, count, limit) as hosts_up:
            done = hosts_up.run(
                hosts_up.hosts[0],
                [*command, *(hosts if count > 1 else [])],
                timeout=1500,
                cwd=directory,
                env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise SystemExit(f"{rate}, {controller} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append", choices=list(TITLES))
    parser.add_argument("--controller", action="append", choices=["gloo", "mpi"])
    parser.add_argument("--codec", default="none,fp16,bf16,int8,powersgd,topk,auto")
    parser.add_argument("--compare", default="")
    parser.add_argument("--sync-every", type=int, default=50, help="of local synchronisation; 0 leaves it out")
    parser.add_argument("--rounds", default="12")
    parser.add_argument("--json", type=Path, help="also append what was measured, a line each")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are taken away again
    words = [
        "--codec",
        args.codec,
        *(["--sync-every", str(args.sync_every)] if args.sync_every else []),
        "--rounds",
        args.rounds,
        *(["--compare", args.compare] if args.compare else []),
    ]
    columns: dict[str, dict[str, str]] = {}
    for controller in args.controller or ["gloo"]:
        for rate in args.rate or ["lo", "1gbit", "100mbit"]:
            found = measure(rate, controller, words)
            title = f"{TITLES[rate]}, {found['controller']}"
            columns[title] = {name: str(ratio) for name, ratio in ratios(found["steps"], "plain").items()}
            print(f"{title}: {found['plans'].get('auto', '')}", flush=True)
            if args.json:
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"rate": rate, **found}) + "\n")
    names = list(next(iter(columns.values())))
    print(table([["step, against a plain one", *columns], *([n, *(c[n] for c in columns.values())] for n in names)]))


if __name__ == "__main__":
    main()
