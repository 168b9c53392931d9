"""``hvdlm verify``: is the distributed run the one that one process would have made?"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import click

from hvdlm.environment import read_environment
from hvdlm.errors import ConfigError
from hvdlm.launchers.program import check_syntax
from hvdlm.verify.compare import Comparison, compare
from hvdlm.verify.diagnose import Finding, diagnose
from hvdlm.verify.trace import Trace, load

__all__ = ["how_to_run", "imported_by", "traced", "verify"]

_SECONDS = 300


@click.command(
    "verify",
    help="Run the first steps of SCRIPT on one worker and on several, and name what differs and why.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-np", "num_proc", type=int, default=2, show_default=True, help="Workers to compare with one.")
@click.option("--steps", type=int, default=5, show_default=True, help="Steps to compare.")
@click.option("--uneven/--no-uneven", default=True, help="Whether to compare uneven shares too. [default: uneven]")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARGS]...")
def verify(num_proc: int, steps: int, uneven: bool, as_json: bool, words: tuple[str, ...]) -> None:
    if not words or not words[0].endswith(".py") or not os.path.isfile(words[0]):
        given = repr(words[0]) if words else "nothing"
        raise ConfigError(f"verify needs a Python script, not {given}.", hint="hvdlm verify train.py")
    if num_proc < 2 or steps < 1:
        raise ConfigError(f"-np {num_proc} --steps {steps}: at least 2 workers and 1 step.", hint="-np 2 --steps 5")
    check_syntax(words[0])
    how = how_to_run(words[0])
    with tempfile.TemporaryDirectory(prefix="hvdlm-verify-") as scratch:
        one = traced(1, steps, how, words, Path(scratch))[0]
        several = traced(num_proc, steps, how, words, Path(scratch))
        found, arms = diagnose(one, several), {"even": compare(one, several)}
        # What is wrong with even shares is wrong with uneven ones.
        if uneven and not found:
            several = traced(num_proc, steps, how, words, Path(scratch), uneven=True)
            arms["uneven"] = compare(one, several)
            found = [
                replace(f, evidence=f"with shares of 1 to 3: {f.evidence}") for f in diagnose(one, several, uneven=True)
            ]
    if as_json:
        verdict = {"ok": not found, "workers": num_proc, "steps": steps, "findings": [asdict(f) for f in found]}
        verdict["compared"] = {name: [asdict(row) for row in rows] for name, rows in arms.items()}
        click.echo(json.dumps(verdict, indent=2))
    else:
        _show(words[0], num_proc, min(len(trace.steps) for trace in several), arms, found)
    sys.exit(1 if found else 0)


def _show(script: str, workers: int, steps: int, arms: dict[str, list[Comparison]], found: list[Finding]) -> None:
    click.echo(f"{script}: {steps} steps on {workers} workers against one process")
    for name, rows in arms.items():
        if rows:
            last = rows[-1]
            losses = [f"{v:.4f}" for v in (last.loss_one, last.loss_several) if v is not None]
            told = [f"loss {' and '.join(losses)}"] * (len(losses) == 2)
            told += [f"gradients at most {max(row.gradient for row in rows):.1e} apart"]
            told += [f"parameters {last.parameters:.1e} of their way"] * (last.parameters is not None)
            click.echo(f"  {name} shares, {len(rows)} steps of the same samples: {', '.join(told)}")
    for finding in found:
        click.echo(f"  {finding.cause}: {finding.evidence}\n    HINT: {finding.suggestion}")
    if not found:
        same = "same samples, same gradients, same parameters: " * any(arms.values())
        click.echo(f"  {same}nothing differs that should not")


def imported_by(script: str) -> set[str]:
    """The packages that a script imports by itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(Path(script).read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def how_to_run(script: str) -> str:
    """Whether a script distributes itself (``plain``) or has to be recognised (``autowrap``).

    Raises:
        ConfigError: It uses Keras on another backend than TensorFlow.
    """
    imported = imported_by(script)
    backend = read_environment().keras_backend
    if "keras" in imported and backend != "tensorflow":
        raise ConfigError(
            f"{script} is a Keras script, and KERAS_BACKEND is {backend}: steps are compared on tensorflow only.",
            hint=f"KERAS_BACKEND=tensorflow hvdlm verify {script}",
        )
    return "plain" if "hvdlm" in imported else "autowrap"


def traced(
    workers: int, steps: int, how: str, words: tuple[str, ...], scratch: Path, *, uneven: bool = False
) -> list[Trace]:
    """The traces of a run on this many workers.

    Args:
        workers: How many.
        steps: Optimizer steps.
        how: See :func:`how_to_run`.
        words: The script and its arguments.
        scratch: Where a directory is made for the run.
        uneven: Whether every other worker gets three times the share of the one before it.

    Raises:
        ConfigError: It left none: the script did not get as far as its first step.
    """
    directory = scratch / f"np{workers}{'-uneven' * uneven}"
    directory.mkdir()
    command = [sys.executable, "-m", "hvdlm", "run", "-np", str(workers), "--run-dir", str(directory / "run")]
    if uneven:
        command += ["--balance", "static", "--weights", ",".join("13"[rank % 2] for rank in range(workers))]
    command += ["-m", "hvdlm.verify.probe", str(directory), str(steps), how, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{words[0]} made no {steps} steps on {workers} workers within {_SECONDS} s.",
            hint="--steps 1, or arguments with which it trains a smaller model",
        ) from None
    traces = load(directory)
    if len(traces) < workers:
        raise ConfigError(
            f"{words[0]} failed on {workers} worker(s) before its traces were written: {done.stderr[-600:].strip()}",
            hint=f"hvdlm run -np {workers} {words[0]}",
        )
    return traces
