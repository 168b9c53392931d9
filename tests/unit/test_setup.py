from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from hvdlm.build import bootstrap
from hvdlm.build.mends import HOROVOD, LABEL

ROOT = Path(__file__).resolve().parents[2]


def set_up(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "hvdlm" / "build" / "bootstrap.py"), "--venv", str(venv)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_cuda_is_never_installed_unasked(machine: str) -> None:
    attempts = bootstrap.torch_attempts(None, machine)
    assert all(attempt[0] == f"torch=={bootstrap.TORCH}+cpu" for attempt in attempts)
    # The first asks nothing of the network that pip is not configured for.
    assert attempts[0][1:] == []
    assert attempts[-1][1:] == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


def test_index_of_the_person_is_the_only_one_asked() -> None:
    attempts = bootstrap.torch_attempts("https://example.org/whl/cu130", "x86_64")
    assert attempts == [[f"torch=={bootstrap.TORCH}", "--index-url", "https://example.org/whl/cu130"]]


def test_tensorflow_is_a_cpu_build() -> None:
    assert bootstrap.tensorflow_attempts("x86_64")[0] == [f"tensorflow-cpu=={bootstrap.TENSORFLOW}"]
    assert bootstrap.tensorflow_attempts("aarch64") == [[f"tensorflow=={bootstrap.TENSORFLOW}"]]


@pytest.mark.parametrize(
    ("version", "missing", "has_venv", "cxx", "expected"),
    [
        ((3, 11), (), True, None, []),
        ((3, 9), (), True, None, ["Python 3.9 is too old, 3.10 or later is needed: sudo apt-get install python3"]),
        ((3, 11), (), False, None, ["cannot make virtual environments: sudo apt-get install python3.11-venv"]),
        ((3, 11), ("c++", "g++", "clang++"), True, None, ["no C++ compiler: sudo apt-get install g++"]),
        ((3, 11), ("g++", "c++"), True, None, []),
        ((3, 11), ("my-c++",), True, "my-c++ -m64", ["no C++ compiler"]),
        ((3, 8), ("c++", "g++", "clang++"), True, None, ["too old", "no C++ compiler"]),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(
    version: tuple[int, int], missing: tuple[str, ...], has_venv: bool, cxx: str | None, expected: list[str]
) -> None:
    found = bootstrap.problems(version, lambda name: None if name in missing else f"/bin/{name}", has_venv, cxx)
    assert len(found) == len(expected)
    for text, words in zip(found, expected, strict=True):
        assert words in text


def test_missing_compiler_stops_before_anything_is_made(tmp_path: Path) -> None:
    done = set_up(tmp_path / "venv", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "sudo apt-get install g++" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_missing_python_is_named() -> None:
    done = subprocess.run(
        ["make", "setup", "PYTHON="], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert "sudo apt-get install python3 python3-venv" in done.stderr


def test_interrupted_installation_does_not_count(tmp_path: Path) -> None:
    info = tmp_path / "lib" / "python3.11" / "site-packages" / "torch-2.13.0+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("")
    assert not bootstrap._installed(tmp_path, "torch-2.13.0+cpu*")
    (info / "RECORD").write_text("")
    assert bootstrap._installed(tmp_path, "torch-2.13.0+cpu*")


def test_a_step_is_done_only_for_what_it_was_done_for(tmp_path: Path) -> None:
    assert not bootstrap._done(tmp_path, "hvdlm", "a")
    bootstrap._mark(tmp_path, "hvdlm", "a")
    assert bootstrap._done(tmp_path, "hvdlm", "a")
    assert not bootstrap._done(tmp_path, "hvdlm", "b")


def test_finished_set_up_takes_no_time() -> None:
    venv = Path(sys.prefix)
    metadata, build = bootstrap._metadata_digest(), bootstrap._build_digest(venv)
    if not (bootstrap._done(venv, "hvdlm", metadata) and bootstrap._done(venv, "horovod", build)):
        pytest.skip("this environment is not one that make setup has finished for this source")
    start = time.monotonic()
    done = set_up(Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert time.monotonic() - start < 10


def test_only_a_mended_horovod_is_accepted() -> None:
    requirements = importlib.metadata.requires("hvdlm") or []
    horovod = [text for text in requirements if text.startswith("horovod")]
    extras = {"torch", "tensorflow", "all"}
    assert extras <= set(importlib.metadata.metadata("hvdlm").get_all("Provides-Extra") or ())
    assert len(horovod) >= len(extras)
    for text in horovod:
        assert text.startswith(f"horovod=={HOROVOD}+{LABEL};")
        assert "extra ==" in text, "hvdlm itself must be installable first: it builds Horovod"


def test_pip_points_to_the_build(tmp_path: Path) -> None:
    """Where pip would take a plain Horovod, its message says what to run."""
    requirement = next(text for text in importlib.metadata.requires("hvdlm") or [] if text.startswith("horovod"))
    # A package with only this requirement: those of hvdlm itself may not be downloadable where the tests run.
    wheel = tmp_path / "needy-1.0-py3-none-any.whl"
    extra = requirement.rpartition('extra == "')[2].strip('"')
    with zipfile.ZipFile(wheel, "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: needy\nVersion: 1.0\nProvides-Extra: {extra}\n"
        archive.writestr("needy-1.0.dist-info/METADATA", f"{metadata}Requires-Dist: {requirement}\n")
        archive.writestr("needy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("needy-1.0.dist-info/RECORD", "")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--ignore-installed"]
    done = subprocess.run(
        [*command, f"{wheel}[{extra}]"],
        env={name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "then run: hvdlm build-horovod" in done.stderr
