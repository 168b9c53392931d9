"""Interrupts real trainings at random 50 times, and checks each that ends.

    python tests/perf/soak_resume.py                       # some minutes
    python tests/perf/soak_resume.py --interruptions 200 --seed 7 --readers 2

A worker is sent SIGKILL or SIGTERM at a random moment, and the job goes on with another number of workers (1 to 4),
weights and partition, from what was saved last; with ``--readers`` also with processes that read ahead. A training that
reaches its end must have trained on each sample of each epoch once, and have the model of a training that was never
interrupted, to 1e-10.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.multiprocess.interruptions import Life, check, interrupted, live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", type=int, default=0, help="most processes that read ahead for a worker")
    args = parser.parse_args()
    draw, start = random.Random(args.seed), time.monotonic()
    count = trainings = 0
    with tempfile.TemporaryDirectory() as directory:
        alone = Path(directory) / "alone"
        alone.mkdir()
        live(alone, Life(1))
        while count < args.interruptions:
            own = Path(directory) / str(trainings)
            own.mkdir()
            count += interrupted(own, draw, most=min(10, args.interruptions - count), readers=args.readers)
            check(own, alone)
            trainings += 1
            print(f"{trainings} trainings, {count} interruptions, {time.monotonic() - start:.0f} s", flush=True)
    print("no gap, no repeat, and in each the model of a training that was not interrupted")


if __name__ == "__main__":
    main()
