"""Starts the workers of a benchmark with ``hvdlm run`` and reads what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.errors import EngineError

__all__ = ["run_bench"]


def run_bench(spec: Mapping[str, Any], num_proc: int, flags: Sequence[str], directory: Path | None = None) -> Any:
    """Run one job.

    Args:
        spec: What to measure: see :mod:`hvdlm.bench.worker`.
        num_proc: Workers.
        flags: Further flags of ``hvdlm run``.
        directory: Where all hosts see the same files; by default the current directory.

    Raises:
        EngineError: The job failed; the end of its output is in the message.
    """
    with tempfile.TemporaryDirectory(prefix=".hvdlm-bench-", dir=directory or Path.cwd()) as made:
        path, result = Path(made) / "spec.json", Path(made) / "result.json"
        path.write_text(json.dumps({**spec, "result": str(result)}), encoding="utf-8")
        worker = str(Path(__file__).with_name("worker.py"))
        own = ["--run-dir", str(Path(made) / "run"), "-np", str(num_proc)]
        command = [sys.executable, "-m", "hvdlm", "run", *own, *flags, worker, str(path)]
        quiet = {"HVDLM_PROGRESS": "none", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **quiet}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            raise EngineError(
                f"the benchmark's job failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}",
                hint="hvdlm doctor; then hvdlm run -np 2 with a script of your own",
            )
        return json.loads(result.read_text(encoding="utf-8"))
