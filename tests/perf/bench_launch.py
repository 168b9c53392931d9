"""How long until the first line of the script runs: ``hvdlm run`` against ``mpirun`` and ``horovodrun``.

Run by hand: ``python tests/perf/bench_launch.py``. The commands take turns, so that a slow moment of the machine
hits all.
The time is from starting the command to the script's first line on the last of the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hvdlm.bench.stats import Interval, median_interval

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1.5
"""How much later than under ``mpirun`` the first line may run."""
SCRIPT = (
    "import time; now = time.time()\n"
    "import os, sys\n"
    "rank = os.environ.get('HOROVOD_RANK') or os.environ['OMPI_COMM_WORLD_RANK']\n"
    "with open(os.path.join(sys.argv[1], rank), 'w') as file: file.write(repr(now))\n"
)


def commands(script: str, np: int) -> dict[str, list[str]]:
    """Name -> command; the script's argument comes last."""
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    ours = [sys.executable, "-m", "hvdlm", "run", "-np", str(np)]
    return {
        "mpirun": ["mpirun", *root, "-np", str(np), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE",
                   sys.executable, script],
        "hvdlm run --mpi": [*ours, "--mpi", script],
        "hvdlm run --gloo": [*ours, "--gloo", script],
        "horovodrun --gloo": ["horovodrun", "-np", str(np), "--gloo", sys.executable, script],
    }  # fmt: skip


def time_to_first_line(command: list[str], np: int, directory: str) -> float:
    """Run a command once; seconds until the script's first line on its last worker."""
    out = tempfile.mkdtemp(dir=directory)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    start = time.time()
    subprocess.run(
        [*command, out], cwd=directory, env=environment, check=True, capture_output=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    times = [float(path.read_text()) for path in Path(out).iterdir()]
    assert len(times) == np, f"{len(times)} of {np} workers wrote their time"
    return max(times) - start


def measure(rounds: int, np: int) -> dict[str, list[float]]:
    """Seconds to the first line, per command, one value a round."""
    with tempfile.TemporaryDirectory() as directory:
        script = os.path.join(directory, "first_line.py")
        Path(script).write_text(SCRIPT)
        todo = commands(script, np)
        found: dict[str, list[float]] = {name: [] for name in todo}
        for _ in range(rounds):
            for name, command in todo.items():
                found[name].append(time_to_first_line(command, np, directory))
    return found


def compare(found: dict[str, list[float]]) -> dict[str, Interval]:
    """Difference to ``mpirun``, round by round."""
    base = found["mpirun"]
    return {
        name: median_interval([one - other for one, other in zip(values, base, strict=True)])
        for name, values in found.items()
        if name != "mpirun"
    }


def main() -> int:
    """Measure and print; exit 1 if ``hvdlm run`` over MPI is later than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-np", type=int, default=2, dest="np")
    parser.add_argument("--json", help="write the measurements to this file")
    args = parser.parse_args()
    found = measure(args.rounds, args.np)
    for name, values in found.items():
        print(f"{name:<18} seconds to the first line: {median_interval(values)}")
    differences = compare(found)
    for name, interval in differences.items():
        print(f"{name:<18} later than mpirun by:      {interval}")
    if args.json:
        Path(args.json).write_text(json.dumps(found))
    held = all(differences[f"hvdlm run {way}"].holds(LIMIT_SECONDS) for way in ("--mpi", "--gloo"))
    print(f"limit {LIMIT_SECONDS} s later than mpirun: {'held' if held else 'BROKEN'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
