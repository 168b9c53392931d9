from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from hvdlm.build import horovod, recipe, sdist
from hvdlm.build.cache import WheelCache
from hvdlm.build.compile import build_jobs, compile_wheel, failing_lines, progress_of
from hvdlm.build.mends import MENDS
from hvdlm.build.prove import prove
from hvdlm.build.recipe import Recipe, horovod_variables
from hvdlm.build.toolchain import Mpi, arch_flags, check_tools, compiler_version, find_mpi, system_mpicxx
from hvdlm.environment import cache_dir
from hvdlm.errors import BuildError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
WHEEL_MPI = Mpi(kind="wheel", vendor="Open MPI", version="5.0.11", mpicxx="/venv/bin/mpicxx")
SYSTEM_MPI = Mpi(
    kind="system", vendor="Open MPI", version="4.1.4", mpicxx="/usr/bin/mpicxx", lib_dirs=("/opt/mpi/lib",)
)
RECIPE = Recipe(
    frameworks={"torch": "2.13.0+cpu", "tensorflow": "2.21.0"},
    mpi=WHEEL_MPI,
    gpu=None,
    compiler="g++ 12",
    arch_flags=("-mf16c", "-mavx"),
    python="3.11 cpython-311",
    machine="linux-x86_64",
)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hvdlm", "build-horovod", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"frameworks": {"torch": "2.13.1+cpu", "tensorflow": "2.21.0"}},
        {"frameworks": {"torch": "2.13.0+cpu", "tensorflow": "2.22.0"}},
        {"frameworks": {"torch": "2.13.0+cpu"}},
        {"mpi": None},
        {"mpi": dataclasses.replace(WHEEL_MPI, version="5.0.12")},
        {"mpi": dataclasses.replace(WHEEL_MPI, kind="system")},
        {"mpi": SYSTEM_MPI},
        {"mpi": dataclasses.replace(WHEEL_MPI, vendor="MPICH")},
        {"gpu": "nccl"},
        {"compiler": "g++ 13"},
        {"arch_flags": ("-mf16c",)},
        {"arch_flags": ()},
        {"variables": {"CXXFLAGS": "-O0"}},
        {"python": "3.12 cpython-312"},
        {"machine": "linux-aarch64"},
    ],
    ids=str,
)
def test_key_changes_with_each_dependency(change: dict[str, Any]) -> None:
    assert dataclasses.replace(RECIPE, **change).key() != RECIPE.key()


def test_key_changes_with_source_mends_label_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {RECIPE.key()}
    for name, value in (("SHA256", "0" * 64), ("LABEL", "hvdlm999"), ("_BUILD_FLAGS", {"CMAKE_GENERATOR": "other"})):
        with monkeypatch.context() as patch:
            patch.setattr(recipe, name, value)
            keys.add(RECIPE.key())
    with monkeypatch.context() as patch:
        edit = dataclasses.replace(MENDS[0].edits[0], replace="set(CMAKE_CXX_STANDARD 20)")
        patch.setattr("hvdlm.build.mends.MENDS", (dataclasses.replace(MENDS[0], edits=(edit,)), *MENDS[1:]))
        keys.add(RECIPE.key())
    assert len(keys) == 5
    assert RECIPE.key() in keys


def test_key_does_not_depend_on_where_the_environment_is() -> None:
    """What makes a cached wheel of use in the next environment."""
    moved = dataclasses.replace(RECIPE, mpi=dataclasses.replace(WHEEL_MPI, mpicxx="/elsewhere/bin/mpicxx"))
    assert moved.key() == RECIPE.key()
    assert all(path.startswith("$ORIGIN/") for path in RECIPE.rpath)
    assert "/opt/mpi/lib" in dataclasses.replace(RECIPE, mpi=SYSTEM_MPI).rpath


def test_variables_of_the_person_that_count() -> None:
    environ = {"CXX": "clang++", "LDFLAGS": "", "HOROVOD_NCCL_HOME": "/nccl", "HOROVOD_LOG_LEVEL": "debug", "PATH": "x"}
    assert horovod_variables(environ, None) == {"CXX": "clang++"}
    assert horovod_variables(environ, "nccl") == {"CXX": "clang++", "HOROVOD_NCCL_HOME": "/nccl"}


def test_environment_of_a_build() -> None:
    environ = RECIPE.environment({"PATH": "/usr/bin", "HOROVOD_WITH_MXNET": "1", "HOROVOD_GPU": "CUDA"}, jobs=3)
    assert environ["HOROVOD_WITH_MPI"] == environ["HOROVOD_WITH_PYTORCH"] == environ["HOROVOD_WITHOUT_MXNET"] == "1"
    assert "HOROVOD_WITH_MXNET" not in environ and "HOROVOD_GPU" not in environ
    assert environ["PATH"].split(":")[0] == "/venv/bin"
    assert environ["MAKEFLAGS"] == "-j3"
    without = dataclasses.replace(RECIPE, mpi=None, frameworks={"tensorflow": "2.21.0"}).environment({}, jobs=1)
    assert without["HOROVOD_WITHOUT_MPI"] == without["HOROVOD_WITHOUT_PYTORCH"] == "1"
    assert "HOROVOD_GPU_OPERATIONS" not in without
    assert dataclasses.replace(RECIPE, gpu="nccl").environment({}, jobs=1)["HOROVOD_GPU_OPERATIONS"] == "NCCL"


def test_record_says_what_it_was_built_with() -> None:
    record = json.loads(json.dumps(RECIPE.record()))
    assert record["version"].startswith("0.28.1+hvdlm")
    assert record["frameworks"] == {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"}
    assert {"cxx17", "no-xla", "gloo-avx"} <= set(record["mends"])
    assert record["mpi"] == {"kind": "wheel", "vendor": "Open MPI", "version": "5.0.11"}
    assert record["mpirun"] is None
    assert dataclasses.replace(RECIPE, mpi=SYSTEM_MPI).record()["mpirun"] == "/usr/bin/mpirun"
    assert "no-cuda-probe" in record["mends"]
    assert "no-cuda-probe" not in dataclasses.replace(RECIPE, gpu="nccl").record()["mends"]
    assert "gloo-avx" not in dataclasses.replace(RECIPE, arch_flags=("-mavx",)).record()["mends"]


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "horovod-0.28.1+hvdlm4-cp311-cp311-linux_x86_64.whl"
    path.write_bytes(os.urandom(100_000))
    return path


def test_cache_gives_back_what_was_stored(wheel: Path, tmp_path: Path) -> None:
    cache = WheelCache(tmp_path / "cache")
    assert cache.find("key") is None
    stored = cache.store("key", wheel, {"a": 1})
    assert cache.find("key") == stored
    assert stored.read_bytes() == wheel.read_bytes()
    wheel.write_bytes(b"another")
    assert cache.store("key", wheel, {}).read_bytes() == b"another"
    assert [path.name for path in (tmp_path / "cache" / "wheels").iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "entry", "gone"])
def test_damaged_entry_is_detected_and_removed(wheel: Path, tmp_path: Path, damage: str) -> None:
    cache = WheelCache(tmp_path / "cache")
    stored = cache.store("key", wheel, {})
    content = stored.read_bytes()
    if damage == "truncate":
        stored.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        stored.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif damage == "entry":
        (stored.parent / "entry.json").write_text('{"wheel": "hor')
    else:
        stored.unlink()
    assert cache.find("key") is None
    assert not stored.parent.exists()


def test_killed_while_storing_leaves_no_entry(wheel: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import os, shutil, signal
        from pathlib import Path
        from hvdlm.build.cache import WheelCache

        def half(source, target):
            Path(target).write_bytes(Path(source).read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.copyfile = half
        WheelCache(Path({str(tmp_path / "cache")!r})).store("key", Path({str(wheel)!r}), {{}})
    """)
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert WheelCache(tmp_path / "cache").find("key") is None
    assert not (tmp_path / "cache" / "wheels" / "key").exists()


SLOW_SETUP = """
import subprocess, sys, time
print("[1/9] Building CXX object a.cc.o", flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "MARK"])
time.sleep(300)
"""


def fake_sdist(directory: Path, setup: str) -> Path:
    """An archive laid out as Horovod's, whose setup.py is ours."""
    tree = directory / "tree" / "horovod-0.28.1"
    (tree / "horovod").mkdir(parents=True)
    (tree / "setup.py").write_text(setup)
    archive = directory / "horovod-0.28.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, arcname=tree.name)
    return archive


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_build_leaves_no_wheel(tmp_path: Path, signum: int) -> None:
    archive, cache = fake_sdist(tmp_path, SLOW_SETUP.replace("MARK", str(tmp_path))), tmp_path / "cache"
    code = textwrap.dedent(f"""
        from pathlib import Path
        from hvdlm.build import horovod
        from hvdlm.cli import main

        horovod.fetch_sdist = lambda cache: Path({str(archive)!r})
        horovod.apply_mends = lambda source, mends: None
        main(["build-horovod", "--force"])
    """)
    build = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"HVDLM_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert build.stdout is not None
    with build, build.stdout:
        assert any("11%  a.cc" in line for line in build.stdout), "the build did not start"
        build.send_signal(signum)
        build.wait(timeout=20)
    assert build.returncode != 0
    assert not list(cache.glob("wheels/*"))
    if signum == signal.SIGKILL:
        for pid in processes_with(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        # What it left is cleared away by the next build.
        assert len(list((cache / "building").iterdir())) == 1
        horovod._sweep(cache / "building")
    end = time.monotonic() + 5
    while processes_with(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_with(str(tmp_path)) == [], "the compilers outlived the build"
    assert list((cache / "building").iterdir()) == []


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes() or _works_in(entry, text):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _works_in(entry: Path, text: str) -> bool:
    return os.readlink(entry / "cwd").startswith(text)


def test_unwritable_cache_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    with horovod.usable_cache(tmp_path / "file" / "cache", horovod.Reporter(warn=warnings.append)) as directory:
        assert directory.is_dir()
        (directory / "x").write_text("")
    assert not directory.exists()
    assert len(warnings) == 1 and "without a cache" in warnings[0]


def test_cache_directory(tmp_path: Path) -> None:
    assert cache_dir({"HVDLM_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": "/x"}) == tmp_path
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/hvdlm")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == cache_dir({}) == Path.home() / ".cache" / "hvdlm"


# --- the source ------------------------------------------------------------------------------------------------------


def test_archive_that_is_not_the_released_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(directory: Path) -> Path:
        path = directory / "horovod-0.28.1.tar.gz"
        path.write_bytes(b"not it")
        return path

    monkeypatch.setattr(sdist, "_download", download)
    with pytest.raises(BuildError, match="not the released archive"):
        sdist.fetch_sdist(tmp_path)
    assert list((tmp_path / "sdist").iterdir()) == []


def test_truncated_archive_in_the_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sdist.fetch_sdist(cache_dir())
    kept = tmp_path / "sdist" / real.name
    kept.parent.mkdir()
    kept.write_bytes(real.read_bytes()[:1000])
    monkeypatch.setattr(sdist, "_download", lambda directory: Path(shutil.copy(real, directory)))
    assert sdist.fetch_sdist(tmp_path) == kept
    assert sdist.file_sha256(kept) == sdist.SHA256


# --- tools -----------------------------------------------------------------------------------------------------------


def test_missing_compiler_is_named_with_what_installs_it(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no C\+\+ compiler") as caught:
        compiler_version({"PATH": str(tmp_path)})
    assert caught.value.hint == "sudo apt-get install g++"
    with pytest.raises(BuildError, match="no-such-compiler is not on PATH"):
        compiler_version({"PATH": "/usr/bin", "CXX": "no-such-compiler -m64"})


def test_missing_python_headers_are_named_with_what_installs_them(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="headers are missing") as caught:
        check_tools(os.environ, include=str(tmp_path))
    assert caught.value.hint is not None
    assert f"python3.{sys.version_info.minor}-dev" in caught.value.hint


def test_processor_flags() -> None:
    assert arch_flags(frozenset({"fpu", "avx", "f16c", "fma"})) == ("-mf16c", "-mavx", "-mfma")
    assert arch_flags(frozenset({"fpu", "sse2"})) == ()


def fake_mpi(directory: Path, version: str = "4.1.4") -> Path:
    directory.mkdir(parents=True)
    script = directory / "mpicxx"
    script.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f'  --showme:version) echo "mpicxx: Open MPI {version} (Language: C++)";;\n'
        "  --showme:libdirs) echo /usr/lib/x86_64-linux-gnu /opt/own/lib;;\n  *) exit 1;;\nesac\n"
    )
    script.chmod(0o755)
    return script


def test_system_mpi_is_preferred(tmp_path: Path) -> None:
    script = fake_mpi(tmp_path / "bin")
    mpi = find_mpi("auto", f"{sys.prefix}/bin:{tmp_path / 'bin'}")
    assert mpi == Mpi(kind="system", vendor="Open MPI", version="4.1.4", mpicxx=str(script), lib_dirs=("/opt/own/lib",))


def test_mpi_of_another_environment_is_not_the_systems(tmp_path: Path) -> None:
    fake_mpi(tmp_path / "venv" / "bin")
    assert system_mpicxx(str(tmp_path / "venv" / "bin"), Path(sys.prefix)) is not None
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    assert system_mpicxx(str(tmp_path / "venv" / "bin"), Path(sys.prefix)) is None


def test_mpi_by_path(tmp_path: Path) -> None:
    script = fake_mpi(tmp_path / "mpi" / "bin", "5.0.2")
    for path in (tmp_path / "mpi", script):
        mpi = find_mpi(str(path), "")
        assert mpi is not None and mpi.version == "5.0.2"
    assert find_mpi("none", os.environ["PATH"]) is None
    with pytest.raises(ConfigError, match=r"--mpi /no/such/mpi: .* cannot be run; allowed: auto, none"):
        find_mpi("/no/such/mpi", "")


def test_jobs_follow_cores_and_memory() -> None:
    assert build_jobs(8, 64 * 2**30) == 8
    assert build_jobs(8, 4 * 2**30) == 2
    assert build_jobs(2, 2**28) == 1


# --- output ----------------------------------------------------------------------------------------------------------


def test_progress_of_a_line() -> None:
    assert progress_of("[12/48] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/mpi_ops.cc.o") == (
        0.25,
        "mpi_ops.cc",
    )
    assert progress_of("[ 40%] Building CXX object x/adapter.cc.o\n") == (0.4, "adapter.cc")
    assert progress_of("-- Looking for a CUDA compiler") is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "[1/9] Building CXX object a.o\nFAILED: a.o\n/usr/bin/c++ -O3 -c a.cc\nIn file included from b.h:1:\n"
            "/src/a.cc:10:5: error: 'foo' was not declared in this scope\n   10 |     foo();\n      |     ^~~\n"
            "ninja: build stopped: subcommand failed.\nTraceback (most recent call last):\n  File x\n"
            "subprocess.CalledProcessError: Command '['cmake']' returned non-zero exit status 1.\n",
            ["/src/a.cc:10:5: error: 'foo' was not declared in this scope", "   10 |     foo();"],
        ),
        (
            "/src/a.cc:1:10: fatal error: torch/extension.h: No such file or directory\n    1 | #include <torch>\n",
            ["/src/a.cc:1:10: fatal error: torch/extension.h: No such file or directory", "    1 | #include <torch>"],
        ),
        (
            "-- Found\nCMake Error at cmake/FindMPI.cmake:10 (message):\n  Could NOT find MPI\n",
            ["CMake Error at cmake/FindMPI.cmake:10 (message):", "  Could NOT find MPI"],
        ),
        ("x\n/usr/bin/ld: cannot find -lmpi: No such file\n", ["/usr/bin/ld: cannot find -lmpi: No such file"]),
        (
            "c++: fatal error: Killed signal terminated program cc1plus\n",
            ["c++: fatal error: Killed signal terminated program cc1plus"],
        ),
        ("Traceback (most recent call last):\n  File a\nKeyError: 'x'\n", ["KeyError: 'x'"]),
        ("", ["(it printed nothing)"]),
    ],
)
def test_failing_lines(output: str, expected: list[str]) -> None:
    assert failing_lines(output) == expected


def test_failed_compilation_shows_the_line_not_the_log(tmp_path: Path) -> None:
    (tmp_path / "bad.cc").write_text("int main() { return nonsense; }\n")
    (tmp_path / "setup.py").write_text(
        "import subprocess, sys\nfor i in range(10000): print('noise', i)\nsys.stdout.flush()\n"
        "sys.exit(subprocess.call(['c++', '-c', 'bad.cc']))\n"
    )
    log = tmp_path / "logs" / "build.log"
    with pytest.raises(BuildError) as caught:
        compile_wheel(tmp_path, os.environ, log, lambda fraction, what: None)
    message = str(caught.value)
    assert "bad.cc:1:21: error:" in message and "nonsense" in message
    assert len(message.splitlines()) < 6
    assert str(log) in message
    assert "noise 9999" in log.read_text()


def test_out_of_memory_has_its_own_hint(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text(
        "print('c++: fatal error: Killed signal terminated program'); raise SystemExit(1)"
    )
    with pytest.raises(BuildError, match="taskset -c 0 hvdlm build-horovod"):
        compile_wheel(tmp_path, os.environ, tmp_path / "log", lambda fraction, what: None)


# --- the proof -------------------------------------------------------------------------------------------------------

FAKE_TORCH = """
import numpy, os
Sum = 1
init = shutdown = lambda: None
rank = lambda: int(os.environ["HOROVOD_RANK"])
size = lambda: 2
gloo_enabled = lambda: True
class _Sum:
    numpy = lambda self: numpy.zeros(1003)
def allreduce(tensor, op, name):
    {body}
"""


def fake_horovod(directory: Path, body: str) -> dict[str, str]:
    """An environment in which ``horovod.torch`` is ours and the rest of Horovod the installed one."""
    import importlib.util

    spec = importlib.util.find_spec("horovod")
    assert spec is not None and spec.origin
    (directory / "horovod").mkdir()
    (directory / "horovod" / "__init__.py").write_text(f"__path__.append({str(Path(spec.origin).parent)!r})\n")
    (directory / "horovod" / "torch.py").write_text(FAKE_TORCH.format(body=body))
    return os.environ | {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return _Sum()", "rank 0: a wrong sum of float16; rank 1: a wrong sum of float16"),
        ("raise RuntimeError('built for another torch')", "built for another torch"),
        ("os.abort()", "0 of 2 processes reported"),
        ("import time; time.sleep(300)", "not done after 8 s"),
    ],
    ids=["wrong", "raises", "aborts", "hangs"],
)
def test_broken_horovod_is_not_proved(tmp_path: Path, body: str, expected: str) -> None:
    timeout = 8 if "sleep" in body else 60
    result = prove("torch", "gloo", fake_horovod(tmp_path, body), timeout=timeout)
    assert not result.ok
    assert expected in result.detail


@pytest.mark.timeout(240)
def test_installed_horovod_is_proved() -> None:
    result = prove("torch", "gloo", os.environ, timeout=120)
    assert result.ok, result.detail


# --- the command -----------------------------------------------------------------------------------------------------


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    done = cli("--dry-run", "--json", HVDLM_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["cache"] == str(tmp_path / "cache")
    assert set(shown["record"]) == set(RECIPE.record())
    assert not (tmp_path / "cache").exists()
    done = cli("--dry-run", HVDLM_CACHE_DIR=str(tmp_path / "cache"))
    assert "gloo-interface" in done.stdout and "would be" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--frameworks", "jax"], 2, "--frameworks has 'jax'; allowed: torch, tensorflow."),
        (["--frameworks", ""], 2, "--frameworks is empty"),
        (["--mpi", "/no/such"], 2, "--mpi /no/such"),
        (["--gpu", "rocm"], 2, "'rocm' is not 'nccl'"),
    ],
    ids=str,
)
def test_bad_input(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = cli(*arguments, HVDLM_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_missing_compiler_from_the_command_line(tmp_path: Path) -> None:
    done = cli(PATH=str(tmp_path), HVDLM_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "HINT: sudo apt-get install g++" in done.stderr
