"""Is what ``hvdlm estimate`` says what ``hvdlm bench step`` then measures? Two hosts in network namespaces. Needs root.

    python tests/perf/check_estimate.py                       # 1 Gbit and 100 Mbit
    python tests/perf/check_estimate.py --rate 100mbit --codec none --rounds 4

The model of the benchmark (a GPT of 6.8 million parameters, the same batch on each worker) is estimated from its
measured step without communication, the rate of the link, and nothing else. Use an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "perf")]

from bench_links import measure  # type: ignore[import-not-found] # noqa: E402

from hvdlm.algorithms.estimate import BYTES, Model, estimate, parse_link  # noqa: E402
from hvdlm.bench.tables import ratios, table  # noqa: E402

PARAMETERS = 6.8e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append")
    parser.add_argument("--codec", default="none,fp16,int8")
    parser.add_argument("--rounds", default="6")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are taken away again
    rows = [["link", "compression", "a step, measured", "estimated", "measured / estimated"]]
    for rate in args.rate or ["1gbit", "100mbit"]:
        found = measure(rate, "gloo", ["--codec", args.codec, "--rounds", args.rounds])
        plain = statistics.median(found["steps"]["plain"])
        for codec, ratio in ratios(found["steps"], "plain").items():
            if codec not in BYTES:
                continue
            model = Model(
                parameters=PARAMETERS,
                step_seconds=plain,
                link_bytes_per_second=parse_link(rate),
                bytes_per_element=BYTES[codec],
            )
            expected = estimate(model, 2, per_worker=True).step_seconds / plain
            rows.append([rate, codec, str(ratio), f"{expected:.2f}", f"{ratio.median / expected:.2f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
