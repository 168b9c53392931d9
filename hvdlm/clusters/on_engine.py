"""The driver program of ``hvdlm submit spark`` and ``dask``: runs a person's script on the engine's workers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``spark|dask -np N --workdir DIR [...] -- SCRIPT [ARGUMENT ...]``."""
    # spark-submit runs this file by its path.
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.append(root)
    from hvdlm.clusters.functions import run_script
    from hvdlm.environment import COMMAND_LINE, RUN_DIR
    from hvdlm.errors import HvdlmError

    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    options = dict(pair.split("=", 1) for pair in args.option)
    here = dict(os.environ)
    env = {name: here[name] for name in args.passed} | {COMMAND_LINE: json.dumps(options)}
    env[RUN_DIR] = os.path.abspath(args.run_dir or f"hvdlm-runs/{args.engine}-{os.getpid()}")
    call: dict[str, Any] = {"args": (args.command, args.module, args.workdir), "num_proc": args.num_proc, "env": env}
    try:
        if args.engine == "dask":
            import distributed

            import hvdlm.dask

            with distributed.Client(args.scheduler, timeout=30) as client:
                hvdlm.dask.run(client, run_script, **call, max_restarts=args.max_restarts)
        else:
            import pyspark.sql

            import hvdlm.spark

            session = pyspark.sql.SparkSession.builder.getOrCreate()
            try:
                hvdlm.spark.run(run_script, **call)
            finally:
                session.stop()
    except HvdlmError as error:
        sys.stdout.flush()
        sys.exit(f"hvdlm: {error}")
    except OSError as error:
        sys.exit(f"hvdlm: {args.engine} cannot be reached: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hvdlm-on-engine", description="Run a script on the workers of an engine.")
    parser.add_argument("engine", choices=["dask", "spark"])
    parser.add_argument("--scheduler", default="")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("-np", dest="num_proc", type=int, required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--pass", dest="passed", action="append", default=[])
    parser.add_argument("--run-dir")
    parser.add_argument("--module")
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.command = words[end + 1 :]
    return args


if __name__ == "__main__":
    main()
