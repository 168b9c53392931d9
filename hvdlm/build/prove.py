"""The proof that an installed Horovod works: two real processes, a sum whose value is known, a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CONTROLLERS", "Proof", "prove"]

CONTROLLERS = ("gloo", "mpi")
_SIZE = 2
_TIMEOUT = 120.0
_MARK = "HVDLM-PROOF"
# Of a job this one may have been started in.
_INHERITED = re.compile(r"HOROVOD_|HVDLM_|OMPI_|PMIX_|PMI_|PRTE_|SLURM_")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came of one two-process allreduce."""

    framework: str
    controller: str
    ok: bool
    seconds: float
    detail: str


def prove(framework: str, controller: str, environ: Mapping[str, str], timeout: float = _TIMEOUT) -> Proof:
    """Start two processes, have them sum a tensor, and check the sum in each.

    Args:
        framework: ``torch`` or ``tensorflow``.
        controller: ``gloo`` or ``mpi``.
        environ: The environment to run in.
        timeout: Seconds after which it has failed.
    """
    start = time.monotonic()
    environment = {name: value for name, value in environ.items() if not _INHERITED.match(name)}
    # Two processes that each take every core make the proof slower, not better.
    environment |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    mark = f"{_MARK}-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "hvdlm.build.prove_worker", controller, framework, mark]
    # Found in a checkout too that is not installed.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_root(), environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
            detail = _judge(output, mark, process.returncode)
        except subprocess.TimeoutExpired as expired:
            shown = expired.output or b""
            text = shown.decode(errors="replace") if isinstance(shown, bytes) else shown
            detail = f"not done after {timeout:g} s{_last(text)}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - start
    return Proof(
        framework=framework,
        controller=controller,
        ok=not detail,
        seconds=round(seconds, 1),
        detail=detail or f"2 processes agreed in {seconds:.1f} s",
    )


def _judge(output: str, mark: str, code: int | None) -> str:
    """What is wrong; empty if both processes reported the right sums."""
    ranks = {}
    # Not by lines: two processes may write into one.
    for text in output.split(mark)[1:]:
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
        except ValueError:
            continue
        ranks[value["rank"]] = value
    wrong = [f"rank {rank}: {value['wrong']}" for rank, value in sorted(ranks.items()) if value["wrong"]]
    if wrong:
        return "; ".join(wrong)
    if sorted(ranks) == list(range(_SIZE)):
        return "" if code == 0 else f"right sums, but exit code {code}{_last(output)}"
    return f"{len(ranks)} of {_SIZE} processes reported, exit code {code}{_last(output)}"


def _last(output: str) -> str:
    """The last line that says something of an error, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.lstrip().startswith("---")]
    errors = [line for line in lines if re.search(r"\w*Error\b|error:|undefined symbol|Segmentation|signal", line)]
    chosen = errors or lines
    return f": {chosen[-1][:300]}" if chosen else ""


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
