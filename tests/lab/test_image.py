"""The CPU image, really built (buildah, on a base of debootstrap) and really run as two containers on two hosts.

Takes minutes and needs a Debian mirror: ``make test-image``, not ``make test-lab``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import SUBNET, Host, Lab, inside, lab
from tests.multiprocess.workers import ROOT

pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "debootstrap"))),
        reason="needs root, buildah and debootstrap",
    ),
]
GPT = "/opt/hvdlm/examples/gpt_torch/train_hvdlm.py"
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "64", "--block-size", "64", "--epochs", "1"]


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, directory: Path) -> None:
        self.words = ["buildah", "--storage-driver", "vfs", "--root", str(directory / "store")]
        self.words += ["--runroot", str(directory / "run")]

    def __call__(self, *words: str, timeout: float = 900, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [*self.words, *words], capture_output=True, text=True, timeout=timeout, check=False, env=env
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """With the image ``hvdlm:cpu`` in it, built by ``docker/build``."""
    directory = tmp_path_factory.mktemp("image")
    made = Buildah(directory)
    try:
        tree = directory / "base"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(tree)], timeout=900, check=True)
        subprocess.run(["tar", "-C", str(tree), "-cf", str(directory / "base.tar"), "."], timeout=300, check=True)
        shutil.rmtree(tree)
        base = made("from", "scratch")
        made("add", base, str(directory / "base.tar"), "/")
        made("commit", "--rm", base, "localhost/hvdlm-base:1")
        builder = [
            *made.words,
            "build",
            "--format",
            "docker",
            "--isolation",
            "chroot",
            "--pull-never",
            "--layers=false",
        ]
        subprocess.run(
            [str(ROOT / "docker" / "build"), "hvdlm:cpu", "--build-arg", "BASE=localhost/hvdlm-base:1"],
            env={**os.environ, "BUILDER": shlex.join(builder), "PIP": f"{sys.executable} -m pip"},
            timeout=1500, check=True,
        )  # fmt: skip
        yield made
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab")) as hosts:
        yield hosts


@contextlib.contextmanager
def containers(buildah: Buildah, hosts: Lab, keys: Path) -> Iterator[list[list[str]]]:
    """For each host the words that run a command in a container of its own there, as the image's user."""
    keys.mkdir()
    os.chown(keys, 1000, 1000)
    keys.chmod(0o700)
    made = []
    try:
        words = []
        for host in hosts.hosts:
            name = buildah("from", "--pull-never", "localhost/hvdlm:cpu")
            made.append(name)
            root = Path(buildah("mount", name))
            names = [f"{SUBNET}.{number} {other.name}" for number, other in enumerate(hosts.hosts, 1)]
            (root / "etc" / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
            flags = ["run", "--isolation", "chroot", "--no-hosts", "--volume", f"{keys}:/home/hvdlm/.ssh"]
            words.append([*inside(host.namespace, host.name), *buildah.words, *flags, name, "--", "hvdlm-entrypoint"])
        yield words
    finally:
        for name in made:
            buildah("rm", name)


def told_by(words: list[str], *command: str, timeout: float = 300) -> str:
    done = subprocess.run([*words, *command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout + done.stderr


def serving(host: Host) -> bool:
    probe = ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/2222"]
    return (
        subprocess.run([*inside(host.namespace, host.name), *probe], capture_output=True, check=False).returncode == 0
    )


def test_the_demo_in_two_containers(buildah: Buildah, two_hosts: Lab, tmp_path: Path) -> None:
    with containers(buildah, two_hosts, tmp_path / "keys") as (first, second):
        assert told_by(first, "id", "-u").strip() == "1000", "not root"
        told_by(first, "keys")
        environment = {**os.environ, "TRY_OUT": "a variable with 'quotes'"}
        with open(tmp_path / "worker.log", "wb") as log:
            worker = subprocess.Popen([*second, "worker"], stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 60
            while not serving(two_hosts.hosts[1]):
                assert time.monotonic() < deadline and worker.poll() is None, (tmp_path / "worker.log").read_text()
                time.sleep(0.2)
            told_by(second, "health")
            flags = ["-np", "2", "-H", "h1:1,h2:1", "--gloo", "--network-interfaces", "eth0", "--run-dir", "/tmp/run"]
            told = told_by(first, "hvdlm", "run", *flags, GPT, *SMALL)
            assert "torch on 2 workers" in told and "0 missing, 0 repeated" in told
            assert "identical bit for bit" in told
            summary = json.loads(told_by(first, "cat", "/tmp/run/summary.json"))
            assert summary["world_size"] == 2 and summary["replicas_identical"] is True
            one = told_by(first, "hvdlm", "run", "-np", "2", "--mpi", "--run-dir", "/tmp/one", GPT, *SMALL)
            assert "identical bit for bit" in one
        finally:
            for pid in two_hosts.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 15)
            worker.wait(30)
