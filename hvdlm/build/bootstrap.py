"""From nothing to an environment in which everything runs; ``make setup`` runs this file with the system's Python.

Standard library only, and nothing of hvdlm is imported: it is what installs it. What is done is remembered step by
step, so that an interrupted set-up goes on where it was and a finished one is skipped.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["SetupError", "main", "problems", "setup", "tensorflow_attempts", "torch_attempts"]

ROOT = Path(__file__).resolve().parents[2]
TORCH = "2.13.0"
TENSORFLOW = "2.21.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_MINIMUM = (3, 10)
# What decides whether an installed Horovod still is the right one.
_BUILD_FILES = ("mends.py", "recipe.py", "toolchain.py", "sdist.py")


class SetupError(Exception):
    """Set-up cannot go on; the text says why and what to run."""


def problems(version: Sequence[int], which: Callable[[str], str | None], has_venv: bool, cxx: str | None) -> list[str]:
    """What this machine lacks, each with the command that installs it.

    Args:
        version: Python's version.
        which: Finds a program.
        has_venv: Whether Python can make a virtual environment with pip in it.
        cxx: ``CXX`` of the environment.
    """
    found = []
    running = ".".join(map(str, version[:2]))
    if tuple(version[:2]) < _MINIMUM:
        found.append(
            f"Python {running} is too old, 3.10 or later is needed: sudo apt-get install python3 python3-venv, "
            "or name another one: make PYTHON=/path/to/python3.11 ..."
        )
    elif not has_venv:
        found.append(f"Python cannot make virtual environments: sudo apt-get install python{running}-venv")
    if not any(which(name) for name in ([cxx.split()[0]] if cxx else ["c++", "g++", "clang++"])):
        found.append("there is no C++ compiler: sudo apt-get install g++")
    return found


def torch_attempts(index_url: str | None, machine: str) -> list[list[str]]:
    """Arguments of pip to try in turn. None of them installs CUDA unless an index was named.

    Args:
        index_url: ``TORCH_INDEX_URL`` of the environment: where the person wants torch from.
        machine: Kind of processor.
    """
    if index_url:
        return [[f"torch=={TORCH}", "--index-url", index_url]]
    if machine not in ("x86_64", "aarch64"):
        return [[f"torch=={TORCH}"]]
    # PyPI's torch for x86_64 comes with gigabytes of CUDA. The local version +cpu rules it out wherever it comes from:
    # first what pip is configured with (a mirror, a directory of wheels), then PyTorch's own index.
    cpu = f"torch=={TORCH}+cpu"
    return [[cpu], [cpu, "--extra-index-url", CPU_INDEX]]


def tensorflow_attempts(machine: str) -> list[list[str]]:
    """Arguments of pip to try in turn; ``tensorflow-cpu`` is half as large but not built for every machine."""
    plain = [f"tensorflow=={TENSORFLOW}"]
    return [[f"tensorflow-cpu=={TENSORFLOW}"], plain] if machine == "x86_64" else [plain]


def setup(venv: Path, environ: Mapping[str, str]) -> None:
    """Do what is still to be done.

    Args:
        venv: The virtual environment.
        environ: The environment: ``TORCH_INDEX_URL``, ``CXX`` and what pip reads.

    Raises:
        SetupError: A step failed.
    """
    has_venv = importlib.util.find_spec("ensurepip") is not None
    missing = problems(sys.version_info[:2], shutil.which, has_venv, environ.get("CXX"))
    if missing:
        raise SetupError("\n".join(missing))
    venv.mkdir(parents=True, exist_ok=True)
    lock = os.open(venv, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once would mix their files
        _steps(venv, environ)
    finally:
        os.close(lock)


def _steps(venv: Path, environ: Mapping[str, str]) -> None:
    python = venv / "bin" / "python"
    index_url = environ.get("TORCH_INDEX_URL") or None
    machine = platform.machine()
    torch = torch_attempts(index_url, machine)

    if not _runs([str(python), "-m", "pip", "--version"]):
        with _Step("virtual environment"):
            _run([sys.executable, "-m", "venv", "--clear", str(venv)])
    if not _installed(venv, f"{torch[0][0].replace('==', '-')}*"):
        with _Step(f"torch {TORCH}"):
            _first_that_works(python, torch)
    if not (_installed(venv, f"tensorflow-{TENSORFLOW}") or _installed(venv, f"tensorflow_cpu-{TENSORFLOW}")):
        with _Step(f"tensorflow {TENSORFLOW}"):
            _first_that_works(python, tensorflow_attempts(machine))
    if not _installed(venv, "tf_keras-*"):
        with _Step("tf_keras"):
            # Without what it requires: that is "tensorflow", which may be here as "tensorflow-cpu".
            _pip(python, ["--no-deps", f"tf_keras=={TENSORFLOW}"])
    metadata = _metadata_digest()
    if not _done(venv, "hvdlm", metadata):
        with _Step("hvdlm"):
            _pip(python, ["setuptools>=70.1", "wheel"])
            # Without isolation: with it pip would download setuptools once more.
            _pip(python, ["--no-build-isolation", "--editable", f"{ROOT}[dev]"])
        _mark(venv, "hvdlm", metadata)
    build = _build_digest(venv)
    if not (_done(venv, "horovod", build) and _installed(venv, "horovod-*+hvdlm*")):
        with _Step("Horovod"):
            _run([str(venv / "bin" / "hvdlm"), "build-horovod"])
        _mark(venv, "horovod", build)


def _metadata_digest() -> str:
    return _digest([ROOT / "setup.py", ROOT / "pyproject.toml"], str(ROOT))


def _build_digest(venv: Path) -> str:
    records = [*_records(venv, "torch-*"), *_records(venv, "tensorflow*")]
    frameworks = sorted(path.parent.name for path in records)
    return _digest([ROOT / "hvdlm" / "build" / name for name in _BUILD_FILES], " ".join(frameworks))


class _Step:
    """Says what is done and how long it took."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._start = time.monotonic()
        print(f"set-up: {self._name} ...", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            print(f"set-up: {self._name} done in {time.monotonic() - self._start:.0f} s", flush=True)


def _first_that_works(python: Path, attempts: Sequence[Sequence[str]]) -> None:
    for arguments in attempts[:-1]:
        quiet = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        if subprocess.run(quiet, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0:
            return
    _pip(python, attempts[-1])


def _pip(python: Path, arguments: Sequence[str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: Sequence[str]) -> None:
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        raise SetupError(f"failed with code {code}: {' '.join(command)}\nrun make again to go on from here")


def _runs(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _records(venv: Path, distribution: str) -> list[Path]:
    # pip writes RECORD last: without it an installation was interrupted.
    return list(venv.glob(f"lib/python3.*/site-packages/{distribution}.dist-info/RECORD"))


def _installed(venv: Path, distribution: str) -> bool:
    return bool(_records(venv, distribution))


def _digest(files: Sequence[Path], *more: str) -> str:
    result = hashlib.sha256("\0".join(more).encode())
    for file in files:
        result.update(file.read_bytes())
    return result.hexdigest()


def _done(venv: Path, step: str, value: str) -> bool:
    stamp = venv / f".{step}.stamp"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == value


def _mark(venv: Path, step: str, value: str) -> None:
    stamp = venv / f".{step}.stamp"
    fresh = stamp.with_suffix(".new")
    fresh.write_text(value, encoding="utf-8")
    os.replace(fresh, stamp)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the environment that demo and tests run in.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="directory of the virtual environment")
    try:
        setup(parser.parse_args(argv).venv.absolute(), os.environ)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; run make again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
