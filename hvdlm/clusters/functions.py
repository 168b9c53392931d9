"""A train function on the workers of another engine (Spark, Dask): what travels, and what runs there."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Rows", "Work", "call", "run_script", "with_rows"]


@dataclass(frozen=True)
class Rows:
    """Stands for a collection that was written as Parquet files: workers open the files instead."""

    pattern: str
    """A glob or URL of the files."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of a train function; the same on every worker."""

    function: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables for the workers. Not shown: it may hold secrets."""


def call(work: Work) -> Any:
    """Call the function in this process, a worker that Horovod's variables are set for; returns what it returns."""
    os.environ.update(work.environment)

    def opened(value: Any) -> Any:
        if not isinstance(value, Rows):
            return value
        from hvdlm.sources import open_files

        return open_files(value.pattern)

    args = [opened(value) for value in work.args]
    return work.function(*args, **{name: opened(value) for name, value in work.kwargs.items()})


def with_rows(values: Sequence[Any], write: Callable[[Any, int], Rows | None]) -> list[Any]:
    """The values, each collection among them replaced by its files.

    Args:
        values: Arguments of a train function.
        write: Called with each and its place; writes a collection, and returns None for anything else.
    """
    written = [write(value, number) for number, value in enumerate(values)]
    return [value if rows is None else rows for value, rows in zip(values, written, strict=True)]


def run_script(words: Sequence[str], module: str | None, directory: str | None) -> None:
    """Run a script (or module) as ``python`` would, in this process.

    Args:
        words: The script and its arguments; those of the module if there is one.
        module: The module, None for a script.
        directory: The working directory, None to stay in this one.
    """
    if directory is not None:
        os.chdir(directory)
    if module is not None:
        sys.argv = [module, *words]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = list(words)
    sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
    runpy.run_path(words[0], run_name="__main__")
