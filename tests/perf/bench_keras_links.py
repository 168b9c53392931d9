"""What a step of Keras's ``fit`` costs under each codec over slow links: two hosts in network namespaces. Needs root.

    python tests/perf/bench_keras_links.py                                  # 1 Gbit and 100 Mbit, over Gloo
    python tests/perf/bench_keras_links.py --rate 10mbit --steps 20 --codec none,int8,powersgd,auto

The transformer of ``bench_keras.py``. Each figure is the median step of a job of its own, without the first steps, in
which ``auto`` looks; jobs alternate. The last column is the median over rounds of the ratio to the fastest codec of the
round. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from hvdlm.bench.tables import table  # noqa: E402
from tests.lab.hosts import lab  # noqa: E402
from tests.perf.bench_keras import BATCH, build, clock, data  # noqa: E402

WARM_UP = 10


def worker(codec: str, steps: int, out: str) -> None:
    """One worker of one job."""
    import keras

    import hvdlm

    times: list[float] = []
    x, y = data(WARM_UP + steps)

    @hvdlm.distribute(compression=codec)
    def train(model: Any) -> bool:
        model.fit(x, y, batch_size=BATCH, shuffle=False, epochs=1, verbose=0, callbacks=[clock(keras, times)])
        return hvdlm.is_main()

    if train(build(keras)):
        Path(out).write_text(json.dumps(float(np.median(times[WARM_UP:]))))


def run(rate: str, controller: str, codec: str, steps: int) -> tuple[float, str]:
    """Seconds of a step in a job on two hosts, and what the plan said."""
    with tempfile.TemporaryDirectory() as made, lab(Path(made), 2, rate) as hosts:
        out = Path(made) / "out.json"
        launch = [sys.executable, "-m", "hvdlm", "run", f"--{controller}", "-np", "2", "-H", "h1:1,h2:1"]
        program = [sys.executable, __file__, "--worker", codec, "--steps", str(steps), "--out", str(out)]
        done = hosts.run(
            hosts.hosts[0],
            [*launch, "--network-interfaces", "eth0", *program],
            timeout=900,
            cwd=Path(made),
            env={
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HVDLM_PROGRESS": "none",
                "TF_CPP_MIN_LOG_LEVEL": "2",
            },
        )
        if done.returncode:
            raise SystemExit(f"{rate}, {codec} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        said = [line for line in (done.stdout + done.stderr).splitlines() if "compression=" in line]
        return json.loads(out.read_text()), said[-1] if said else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append", choices=["1gbit", "100mbit", "10mbit"])
    parser.add_argument("--controller", default="gloo", choices=["gloo", "mpi"])
    parser.add_argument("--codec", default="none,fp16,bf16,int8,powersgd,auto")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.steps, args.out)
        return
    codecs = args.codec.split(",")
    for rate in args.rate or ["1gbit", "100mbit"]:
        seconds: dict[str, list[float]] = {codec: [] for codec in codecs}
        for turn in range(args.rounds):
            for codec in codecs[:: 1 if turn % 2 == 0 else -1]:
                found, said = run(rate, args.controller, codec, args.steps)
                seconds[codec].append(found)
                if codec == "auto":
                    print(said, flush=True)
        best = np.min([seconds[codec] for codec in codecs if codec != "auto"], axis=0)
        rows = [
            [codec, f"{1000 * np.median(own):.0f}", f"{np.median(np.array(own) / best):.2f}"]
            for codec, own in seconds.items()
        ]
        print(table([["codec", f"ms a step, {rate}, {args.controller}", "against the best"], *rows]), flush=True)


if __name__ == "__main__":
    main()
