"""Train functions on the executors of a Spark application, through ``horovod.spark.run``.

``hvdlm.spark.run(train, args=(model, frame), num_proc=4)`` calls ``train`` in four processes, each in a Spark task.
Spark DataFrames among the arguments are written once as Parquet files, which ``train`` gets as a data set of
:mod:`hvdlm.sources`.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdlm.clusters.functions import Rows, Work, call, with_rows
from hvdlm.errors import ConfigError, DataError, EngineError, WorkerFailed
from hvdlm.launchers.passing import passed_on

__all__ = ["run"]

_OF_SPARK = ("SPARK_*", "PYSPARK_*", "HADOOP_*", "YARN_*", "JAVA_HOME", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR")
"""What Spark's tasks need besides."""


def run(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_proc: int | None = None,
    env: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    network_interfaces: Sequence[str] = (),
    start_timeout: float = 600.0,
    verbose: bool = False,
) -> list[Any]:
    """Call a train function on Spark executors, as one job over Gloo.

    Args:
        function: The train function, decorated with :func:`hvdlm.distribute` or calling :func:`hvdlm.wrap`.
        args: Its arguments. Spark DataFrames become data sets of their rows.
        kwargs: Its keyword arguments.
        num_proc: Workers; ``spark.default.parallelism`` if None. Spark has to have as many free task slots.
        env: Variables for the workers, besides those of this process that :mod:`hvdlm.launchers.passing` lets through.
        data_dir: Where DataFrames are written: a directory that driver and executors share, or a URL both know.
        network_interfaces: The interfaces the workers use; Horovod looks for common ones if empty.
        start_timeout: Seconds for Spark to start all tasks.
        verbose: Whether Horovod tells what it does.

    Returns:
        What the function returned on each worker, in the order of ranks.

    Raises:
        ConfigError: No Spark session is active, too few task slots, or a DataFrame and no ``data_dir``.
        EngineError: pyspark or Horovod is not installed.
        WorkerFailed: A worker raised or died; Spark's log has its traceback.

    Example:
        >>> hvdlm.spark.run(train, args=(model, frame), num_proc=4, data_dir="/shared/rows")  # doctest: +SKIP
    """
    horovod_run = _horovod_run()
    num_proc = _check(num_proc)
    given = [*args, *(kwargs or {}).values()]
    values = with_rows(given, lambda value, number: _write_frame(value, data_dir, number))
    environment = dict(env or {})
    work = Work(
        function=function,
        args=tuple(values[: len(args)]),
        kwargs=dict(zip(kwargs or {}, values[len(args) :], strict=True)),
        # Horovod's tasks are asked for HOROVOD_*; hvdlm's own are set when the call begins.
        environment={"HVDLM_PROGRESS": "lines", **environment},
    )
    # Horovod takes the given environment for the whole one of its tasks. It is not encrypted on its way.
    whole = {**passed_on(os.environ, _OF_SPARK), **environment}
    try:
        results: list[Any] = horovod_run(
            call,
            args=(work,),
            num_proc=num_proc,
            env=whole,
            use_gloo=True,
            start_timeout=int(start_timeout),
            nics=set(network_interfaces) or None,
            verbose=2 if verbose else 0,
        )
    except (RuntimeError, OSError) as error:
        raise WorkerFailed(
            f"the job on Spark failed: {error}", 1, hint="the traceback is above, or in the executors' logs"
        ) from error
    return results


def _horovod_run() -> Callable[..., Any]:
    try:
        import pyspark  # noqa: F401
    except ImportError:
        raise EngineError("pyspark is not installed.", hint="pip install pyspark pyarrow") from None
    try:
        from horovod.spark.runner import run as horovod_run
    except ImportError as error:
        raise EngineError(
            f"Horovod cannot be used with Spark: {error}", hint="hvdlm build-horovod; hvdlm doctor"
        ) from None
    function: Callable[..., Any] = horovod_run
    return function


def _check(num_proc: int | None) -> int:
    import pyspark

    context = pyspark.SparkContext._active_spark_context
    if context is None:
        raise ConfigError("no Spark session is active.", hint="spark = pyspark.sql.SparkSession.builder.getOrCreate()")
    count = context.defaultParallelism if num_proc is None else num_proc
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"num_proc is {count!r}; 1 or more is allowed.")
    master = str(context.master)
    slots = context.defaultParallelism
    # Elsewhere executors may still be on their way: Spark starts tasks when they come, or start_timeout ends it.
    if master.startswith("local") and count > slots:
        raise ConfigError(
            f"{count} workers were asked for, and Spark's {master} runs {slots} tasks at a time.",
            hint=f"num_proc={slots}, or master local[{count}]",
        )
    return count


def _write_frame(value: Any, data_dir: str | None, number: int) -> Rows | None:
    """Write a Spark DataFrame, one file for each partition; None for any other value."""
    if not (type(value).__module__.startswith("pyspark.") and type(value).__name__ == "DataFrame"):
        return None
    if data_dir is None:
        raise ConfigError(
            f"argument {number} is a Spark DataFrame; where its rows are to be written was not given.",
            hint='hvdlm.spark.run(..., data_dir="/shared/rows"), a directory or URL that all executors reach',
        )
    base = str(data_dir) if "://" in str(data_dir) else os.path.abspath(data_dir)
    directory = posixpath.join(base, f"{number}-{uuid.uuid4().hex[:8]}")
    if value.isEmpty():
        raise DataError(f"argument {number}, a Spark DataFrame, has no rows.")
    # A local path is one of the file system that all share, whatever Spark's default is.
    value.write.parquet(directory if "://" in directory else f"file://{directory}")
    return Rows(posixpath.join(directory, "part-*.parquet"))
