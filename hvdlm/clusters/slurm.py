"""Slurm: a batch script, rendered as text, and the few commands that submit, follow and cancel it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hvdlm.clusters.follow import JobState, Tool
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.clusters.words import render_template, run_words, script_words
from hvdlm.errors import ConfigError
from hvdlm.units import clock

__all__ = ["SlurmCluster", "read_state", "render"]

_SECONDS_OF_NOTICE = 60
"""How long before its time limit a job is told: finish the step, write a checkpoint, leave."""
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "PYTHONPATH", "SHELL", "TMPDIR", "USER",
              "VIRTUAL_ENV")  # fmt: skip
"""What a job gets of the environment it is submitted from, with the secrets that are named; nothing else."""


def render(spec: SubmitSpec, *, python: str = sys.executable, workdir: str | None = None) -> str:
    """The batch script of a job.

    Args:
        spec: The job.
        python: The Python on the nodes, by a path they share.
        workdir: Where the job runs if the spec does not say; the current directory if None.

    Raises:
        ConfigError: The spec has what Slurm cannot express.
    """
    if spec.elastic:
        raise ConfigError("a Slurm job keeps its nodes: --min-np and --max-np are not for it.", hint="leave them out")
    if any(spec.secrets.values()):
        raise ConfigError(
            "on Slurm a secret is the name of a variable in your environment.",
            hint=f"--secret {next(iter(spec.secrets))}",
        )
    workdir = os.path.abspath(spec.workdir or workdir or os.getcwd())
    log = f"{_pattern(workdir)}/{spec.name}-{'%A_%a' if spec.array else '%j'}.log"
    given: list[tuple[str, str | None]] = [
        ("job-name", spec.name),
        ("nodes", str(spec.nodes)),
        ("ntasks", str(spec.num_proc)),
        ("ntasks-per-node", str(spec.on_each)),
        ("cpus-per-task", str(spec.cpus_per_worker)),
        ("mem", f"{spec.memory_mib * spec.on_each}M" if spec.memory_mib else ""),
        ("gpus-per-node", str(spec.gpus_per_worker * spec.on_each) if spec.gpus_per_worker else ""),
        ("time", clock(spec.time_limit_seconds) if spec.time_limit_seconds else ""),
        ("partition", spec.queue),
        ("account", spec.account),
        ("qos", spec.qos),
        ("constraint", spec.constraint),
        ("array", _array(spec.array)),
        ("output", log),
        ("open-mode", "append"),
        ("export", ",".join([*_PASSED_ON, *sorted(spec.secrets)])),
        ("requeue" if spec.max_restarts else "no-requeue", None),
        ("signal", f"B:USR1@{_SECONDS_OF_NOTICE}" if spec.max_restarts else ""),
    ]
    return render_template(
        "slurm.sh.j2",
        directives=[(name, value) for name, value in given if value != ""],
        extra=[_option(text) for text in spec.sbatch],
        name=spec.name,
        workdir=workdir,
        variables=sorted({"OMP_NUM_THREADS": str(spec.cpus_per_worker), **spec.env}.items()),
        setup=spec.setup,
        run_dir=spec.run_dir,
        array=spec.array,
        command=[python, "-m", "hvdlm", *run_words(spec, "--launcher", "slurm")],
        script=script_words(spec),
        max_restarts=spec.max_restarts,
    )


def _pattern(path: str) -> str:
    """A path in which Slurm shall replace nothing."""
    if "\\" in path:
        raise ConfigError(f"{path!r}: Slurm takes a backslash in a path for an escape.", hint="--workdir DIR")
    return path.replace("%", "%%")


def _array(text: str) -> str:
    if text and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", text):
        raise ConfigError(f"array: {text!r} is not allowed; 0-9, 1,3,5 and 0-99%4 are.", hint="--array 0-9")
    return text


def _option(text: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=\S+)?", text):
        raise ConfigError(f"sbatch: {text!r} is no option; it is --name or --name=value.", hint="--sbatch=--exclusive")
    return text


# What Slurm calls the states of a job, by what they mean to the person who waits.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


def read_state(shown: str) -> JobState:
    """The state of a job, of all tasks of an array together, from ``scontrol --oneliner show job ID``."""
    states = re.findall(r"\bJobState=(\S+)", shown)
    codes = [
        int(code) or (128 + int(signum) if int(signum) else 0)
        for code, signum in re.findall(r"\bExitCode=(\d+):(\d+)", shown)
    ]
    if any(state in _RUNNING for state in states):
        return JobState("running")
    if any(state in _WAITING for state in states):
        reason = re.search(r"\bReason=(\S+)", shown)
        return JobState("waiting", detail=reason[1] if reason else "")
    worst = next((state for state in states if state != "COMPLETED"), None)
    if worst is None and states:
        return JobState("succeeded")
    return JobState("failed", detail=worst or "Slurm no longer knows it", exit_code=max(codes, default=0) or 1)


class SlurmCluster:
    """Submits to the Slurm of this machine."""

    def __init__(self, spec: SubmitSpec) -> None:
        self._tool = Tool("slurm", spec.name)
        self._logs: list[Path] = []
        self._shown: dict[Path, int] = {}

    def submit(self, path: Path) -> str:
        """Hand a batch script over; returns the job's number."""
        for name in ("sbatch", "scontrol", "scancel"):
            self._tool.require(name, "run this where Slurm's commands are, or look at it with --dry-run")
        return self._tool.ask("sbatch", "--parsable", str(path)).strip().partition(";")[0]

    def state(self, job: str) -> JobState:
        """What Slurm says about the job."""
        shown = self._tool.ask("scontrol", "--oneliner", "show", "job", job)
        # A path may have blanks in it: it ends where the next key begins.
        for found in re.findall(r"\bStdOut=(.*?)(?: [A-Z][A-Za-z/:]*=|$)", shown, re.MULTILINE):
            path = Path(found.replace("%%", "%"))  # it fills in the numbers but leaves this as it was written
            if path not in self._logs:
                self._logs.append(path)
        return read_state(shown)

    def output(self, job: str) -> bytes:
        """What the job has written since the last call; of an array all tasks, one after another."""
        new = b""
        for path in self._logs:
            try:
                with open(path, "rb") as file:
                    file.seek(self._shown.get(path, 0))
                    text = file.read()
            except OSError:
                continue
            self._shown[path] = self._shown.get(path, 0) + len(text)
            new += text
        return new

    def cancel(self, job: str) -> None:
        """End the job."""
        self._tool.ask("scancel", job)

    def close(self) -> None:
        """Nothing is open between two calls."""

    def commands(self, job: str) -> str:
        """What a person types to follow and end it by hand."""
        return f"squeue -j {job}; scancel {job}"
