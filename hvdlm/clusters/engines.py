"""Spark and Dask: a shell script for the driver program, which runs the person's script on the engine's workers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from hvdlm.clusters import on_engine
from hvdlm.clusters.follow import JobState, Stream
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.clusters.words import render_template
from hvdlm.errors import ConfigError

__all__ = ["LocalDriver", "render_dask", "render_spark"]

_SECONDS_TO_END = 20.0


def render_dask(spec: SubmitSpec, *, python: str = sys.executable, workdir: str | None = None) -> str:
    """The script that runs a job on a Dask cluster.

    Raises:
        ConfigError: The scheduler is missing, or the spec has what the engine cannot express.
    """
    if not spec.scheduler:
        raise ConfigError("dask needs the address of a scheduler.", hint="--scheduler tcp://host:8786")
    flags = ["--scheduler", spec.scheduler, "--max-restarts", str(spec.max_restarts)]
    return _render("dask", spec, [python, "-m", "hvdlm.clusters.on_engine", "dask", *flags], python, workdir)


def render_spark(spec: SubmitSpec, *, python: str = sys.executable, workdir: str | None = None) -> str:
    """The script that runs a job on Spark, with ``spark-submit`` in client mode.

    Raises:
        ConfigError: The master is missing, or the spec has what the engine cannot express.
    """
    if not spec.master:
        raise ConfigError("spark needs a master.", hint="--master yarn, spark://host:7077 or local[2]")
    cpus = str(spec.cpus_per_worker)
    settings = {
        "spark.cores.max": str(spec.num_proc * spec.cpus_per_worker),
        "spark.executor.cores": cpus,
        "spark.task.cpus": cpus,
        "spark.pyspark.python": python,
    }
    beside = Path(python).with_name("spark-submit")  # pyspark from PyPI has one
    submit = str(beside) if beside.exists() else "spark-submit"
    words = [submit, "--master", spec.master, "--deploy-mode", "client", "--name", spec.name]
    for name, value in settings.items():
        if not (spec.master.startswith("local[") and name != "spark.pyspark.python"):
            words += ["--conf", f"{name}={value}"]
    if spec.master == "yarn":
        words += ["--num-executors", str(spec.num_proc)]
    return _render("spark", spec, [*words, str(Path(on_engine.__file__)), "spark"], python, workdir)


def _render(target: str, spec: SubmitSpec, start: list[str], python: str, workdir: str | None) -> str:
    if any(spec.secrets.values()):
        raise ConfigError(
            f"on {target} a secret is the name of a variable in your environment.",
            hint=f"--secret {next(iter(spec.secrets))}",
        )
    workdir = os.path.abspath(spec.workdir or workdir or os.getcwd())
    # spark-submit finds Spark, the driver's Python and the workers' by these.
    of_spark = {"PYSPARK_PYTHON": python, "PYSPARK_DRIVER_PYTHON": python} if target == "spark" else {}
    options = dict(spec.options)
    if spec.checkpoint_dir:
        options = {"resume": "auto", **options, "checkpoint_dir": spec.checkpoint_dir}
    words = [*start, "-np", str(spec.num_proc), "--workdir", workdir]
    words += [word for pair in sorted(options.items()) for word in ("--option", "=".join(pair))]
    words += [word for name in sorted({*spec.env, *spec.secrets}) for word in ("--pass", name)]
    if spec.run_dir:
        words.append(f"--run-dir={spec.run_dir}")
    if spec.module is not None:
        words += ["--module", spec.module]
    return render_template(
        "engine.sh.j2",
        target=target,
        workdir=workdir,
        variables=sorted({**of_spark, **spec.env}.items()),
        secrets=sorted(spec.secrets),
        command=[*words, "--", *spec.command],
    )


class LocalDriver:
    """The driver program: a process of ours, which ends with us."""

    def __init__(self, spec: SubmitSpec) -> None:
        self._stream: Stream | None = None
        self._over = False

    def submit(self, path: Path) -> str:
        """Start the script; returns its process id."""
        self._stream = Stream(["bash", str(path)], errors=True)
        return str(self._stream.pid)

    def state(self, job: str) -> JobState:
        """Whether the process runs, or how it ended."""
        assert self._stream is not None
        code = self._stream.code()
        if code is None:
            return JobState("running")
        code = code if code >= 0 else 128 - code
        return JobState("failed" if code else "succeeded", detail=f"exit code {code}" if code else "", exit_code=code)

    def output(self, job: str) -> bytes:
        """What it has written since the last call."""
        assert self._stream is not None
        if self._over:
            return b""
        new, ended = self._stream.read()
        self._over = bool(ended)
        return new

    def cancel(self, job: str) -> None:
        """Ask it to end its workers and itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(job), signal.SIGINT)

    def close(self) -> None:
        """End it, if it has not."""
        if self._stream is not None:
            self._stream.close(grace=_SECONDS_TO_END)

    def commands(self, job: str) -> str:
        """What a person types to end it by hand."""
        return f"kill -INT -{job}"
