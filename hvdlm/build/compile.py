"""Running Horovod's ``setup.py``: progress from its output, and from a failure the lines that matter."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from hvdlm.errors import BuildError

__all__ = ["build_jobs", "compile_wheel", "default_jobs", "failing_lines", "progress_of"]

_STEP = re.compile(r"^\[(\d+)/(\d+)\]\s*(.*)")
_PERCENT = re.compile(r"^\[\s*(\d+)%\]\s*(.*)")
_ERROR = re.compile(
    r"(:\d+: (fatal )?error:|: fatal error:|^(fatal )?error:|CMake Error|undefined reference|multiple definition|"
    r"cannot find -l|No space left on device|Killed signal|out of memory|^\w*(Error|Exception):)"
)
# A wrapper's way of saying that what it ran failed: never the cause.
_ECHO = re.compile(r"subcommand failed|build stopped|CalledProcessError|returned non-zero|^error: command ")
_GIGABYTES_A_JOB = 1.6


def build_jobs(cores: int, available_bytes: int) -> int:
    """Compilers to run at the same time: one a core, as far as memory goes (TensorFlow's headers need 1.5 GB)."""
    return max(1, min(cores, int(available_bytes / (_GIGABYTES_A_JOB * 2**30))))


def progress_of(line: str) -> tuple[float, str] | None:
    """Fraction done and what is being made, from a line of Ninja's or make's output; None if it says neither."""
    step = _STEP.match(line)
    if step and int(step[2]):
        return int(step[1]) / int(step[2]), _subject(step[3])
    percent = _PERCENT.match(line)
    return (int(percent[1]) / 100, _subject(percent[2])) if percent else None


def _subject(text: str) -> str:
    return text.rpartition(" ")[2].rpartition("/")[2].strip().removesuffix(".o")


def failing_lines(output: str, limit: int = 3) -> list[str]:
    """The first lines of a failed build that say why, each with the source line the compiler shows below it."""
    lines = output.splitlines()
    found: list[str] = []
    for index, line in enumerate(lines):
        if len(found) >= 2 * limit:
            break
        if _ERROR.search(line) and not _ECHO.search(line):
            following = lines[index + 1].rstrip() if index + 1 < len(lines) else ""
            more = following if re.match(r"\s+\d+ \|", following) or line.startswith("CMake Error") else ""
            found += [line.strip(), *([more] if more.strip() else [])]
    if found:
        return found
    return [line.strip() for line in lines if line.strip()][-limit:] or ["(it printed nothing)"]


def compile_wheel(
    source: Path, environment: Mapping[str, str], log: Path, on_progress: Callable[[float, str], None]
) -> Path:
    """Build a wheel in an unpacked and mended source tree.

    Args:
        source: Root of the tree.
        environment: The environment to build in.
        log: Where the whole output goes.
        on_progress: Called with the fraction done and the file being compiled.

    Raises:
        BuildError: The build failed; carries the lines that say why.
    """
    # -q keeps setup.py from handing VERBOSE=1 to Ninja, which would take it for a target.
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command,
            cwd=source,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                progress = progress_of(line)
                if progress is not None:
                    on_progress(*progress)
            code = process.wait()
        finally:
            _end(process)
    wheels = list((source / "dist").glob("horovod-*.whl"))
    if code != 0 or len(wheels) != 1:
        output = log.read_text(encoding="utf-8", errors="replace")
        raise BuildError("building Horovod failed:\n  " + "\n  ".join(failing_lines(output)), hint=_advice(output, log))
    return wheels[0]


def _advice(output: str, log: Path) -> str:
    whole = f"the whole output is in {log}"
    if re.search(r"Killed signal|out of memory|virtual memory exhausted", output):
        return f"memory ran out: end other programs, or use one core: taskset -c 0 hvdlm build-horovod; {whole}"
    if "No space left on device" in output:
        return f"the disk is full: build elsewhere with HVDLM_CACHE_DIR=/path/with/2GB hvdlm build-horovod; {whole}"
    return whole


def _end(process: subprocess.Popen[str]) -> None:
    """End a build and every compiler it started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def default_jobs() -> int:
    """:func:`build_jobs` of this machine now."""
    return build_jobs(len(os.sched_getaffinity(0)), psutil.virtual_memory().available)
