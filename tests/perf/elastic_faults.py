"""Plays random schedules of failures and changes against elastic jobs, and checks each job's end.

    python tests/perf/elastic_faults.py --seeds 200 --framework torch --results faults.jsonl
    python tests/perf/elastic_faults.py --seeds 10 --compression int8 --results faults.jsonl

A codec that rounds trains nearly the model of one process: its loss may be off by 1 %, and a parameter (there is a bias
near zero) by 30 %.

A schedule is a function of its seed (:mod:`tests.elastic.schedules`). Results are appended to a file, and seeds that
are in it already are not played again: an interrupted run goes on where it was. The command fails if a seed failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.elastic.check import complaint
from tests.elastic.jobs import undisturbed
from tests.elastic.schedules import play, schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200, help="how many schedules, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--framework", choices=("torch", "keras"), default="torch")
    parser.add_argument("--compression", default="none")
    parser.add_argument("--results", type=Path, default=Path("elastic_faults.jsonl"))
    args = parser.parse_args()
    script = f"train_{args.framework}.py"
    framework = args.framework if args.compression == "none" else f"{args.framework}, {args.compression}"
    played = _played(args.results, framework)
    with tempfile.TemporaryDirectory() as plain:
        wanted = undisturbed(Path(plain), script)
    for seed in range(args.first, args.first + args.seeds):
        if seed in played:
            continue
        result = _one(seed, script, wanted, args.compression)
        result["framework"] = framework
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        played[seed] = result
        print(
            f"seed {seed}: {result['complaint'] or 'good'} ({result['seconds']:.0f} s, {result['resets']} resets)",
            flush=True,
        )
    failed = [seed for seed, result in sorted(played.items()) if result["complaint"]]
    print(f"{len(played)} schedules, {len(failed)} failed{': ' + ', '.join(map(str, failed)) if failed else ''}")
    sys.exit(1 if failed else 0)


def _played(path: Path, framework: str) -> dict[int, dict[str, Any]]:
    if not path.exists():
        return {}
    results = [json.loads(line) for line in path.read_text().splitlines()]
    return {result["seed"]: result for result in results if result["framework"] == framework}


def _one(seed: int, script: str, wanted: dict[str, Any], compression: str) -> dict[str, Any]:
    start = time.monotonic()
    plan = schedule(seed)
    found, resets, starts = None, 0, 1
    with tempfile.TemporaryDirectory() as directory:
        try:
            ended = play(plan, Path(directory), script, more=["--compression", compression])
            lossy: dict[str, float] = {} if compression == "none" else {"parameters": 0.3, "loss": 0.01}
            found = complaint(ended, wanted, **lossy)
            resets = ended.summary.get("resets", 0)
            starts = len(ended.of("over"))
        except AssertionError as error:
            found = str(error)
    seconds = time.monotonic() - start
    return {
        "seed": seed, "plan": plan, "complaint": found, "resets": resets, "starts": starts, "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    main()
