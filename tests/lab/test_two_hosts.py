"""Jobs on two hosts, reached by ssh, over Gloo and over Open MPI: training, what others can see and do, every end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hostile import attack, send
from tests.lab.hosts import OTHER_SUBNET, Lab, inside, lab
from tests.multiprocess.workers import ROOT

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]
CONTROLLERS = pytest.mark.parametrize("controller", ["gloo", "mpi"])
EXAMPLE = ROOT / "examples" / "gpt_torch" / "train_hvdlm.py"


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("lab"), second_network=True) as hosts:
        yield hosts


def run_command(controller: str, *words: str, slots: int = 2) -> list[str]:
    flags = ["-np", str(2 * slots), "-H", f"h1:{slots},h2:{slots}", f"--{controller}", "--network-interfaces", "eth0"]
    return [sys.executable, "-m", "hvdlm", "run", *flags, "--run-dir", "run", *words]


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MY_TOKEN": "tok-17a9c3e5", "MY_DATA": "dat-55d0b1f2"}
LARGE = {f"BIG_{number}": "x" * 50_000 for number in range(4)}


@CONTROLLERS
def test_the_example_trains(two_hosts: Lab, tmp_path: Path, controller: str) -> None:
    """Two hosts, two slots on each, from a directory whose name breaks careless quoting."""
    directory = tmp_path / 'it\'s $(touch HACKED) "ünï" ;'
    directory.mkdir()
    sizes = ["--epochs", "1", "--layers", "1", "--width", "32", "--heads", "2", "--block-size", "64"]
    command = run_command(controller, str(EXAMPLE), *sizes, "--batch-size", "64")
    done = two_hosts.run(two_hosts.hosts[0], command, timeout=240, cwd=directory, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((directory / "run" / "summary.json").read_text())
    assert summary["world_size"] == 4 and summary["replicas_identical"] is True
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0) and summary["samples_seen"] > 3000
    assert two_hosts.processes() == [], "nothing of the job is left on any host"
    assert "HACKED" not in {path.name for path in tmp_path.rglob("*")}
    assert (directory / "run" / "logs" / "rank-3.out.log").exists()


STEPS = """
import os, sys, time, torch, hvdlm
import horovod.torch as hvd
net = torch.nn.Linear(2, 2)
hvdlm.wrap(net, torch.optim.SGD(net.parameters(), lr=0.1))
deadline = time.time() + 100
for step in range(100000):
    ended = hvd.allreduce(torch.tensor([float(os.path.exists("stop"))]), op=hvd.Sum, name="s")
    if step == 3:
        large = sum(len(value) for name, value in os.environ.items() if name.startswith("BIG_"))
        print("UP", os.environ.get("MY_DATA"), large, flush=True)
    if ended.item() or time.time() > deadline:
        break
    time.sleep(0.02)
print("rank", hvd.rank(), "sum", hvd.allreduce(torch.ones(3), op=hvd.Sum, name="t").tolist(), flush=True)
"""


def start_steps(hosts: Lab, directory: Path, controller: str) -> subprocess.Popen[str]:
    (directory / "steps.py").write_text(STEPS)
    command = run_command(controller, "--pass-env", "MY_DATA,BIG_*", "steps.py")
    job = hosts.start(hosts.hosts[0], command, cwd=directory, env=ENVIRONMENT | LARGE)
    assert job.stdout is not None
    up = 0
    for line in job.stdout:
        up += "UP dat-55d0b1f2 200000" in line  # the variables that were named have reached both hosts
        if up == 4:
            return job
    raise AssertionError(job.communicate(timeout=30)[1])


@CONTROLLERS
def test_what_others_see_and_send(two_hosts: Lab, tmp_path: Path, controller: str) -> None:
    job = start_steps(two_hosts, tmp_path, controller)
    try:
        # On no host is a value of the person's environment on a command line.
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in two_hosts.processes()}
        assert len(lines) > 8 and not any(
            value.encode() in line
            for line in lines.values()
            for value in (ENVIRONMENT["MY_TOKEN"], ENVIRONMENT["MY_DATA"], "x" * 100)
        )
        # The secret has not been passed on at all: nobody named it.
        here = two_hosts.processes_of(two_hosts.hosts[1])
        assert not any(b"tok-17a9c3e5" in Path(f"/proc/{pid}/environ").read_bytes() for pid in here)
        # Horovod's own, and for Gloo the rendezvous; and where rank 0 watches for workers that hang.
        assert attack(two_hosts, tmp_path / "CREATED") >= (2 if controller == "gloo" else 6)
        assert job.poll() is None
        (tmp_path / "stop").touch()
        out, err = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, err[-3000:]
    assert out.count("sum [4.0, 4.0, 4.0]") == 4
    assert not (tmp_path / "CREATED").exists()
    assert "watchdog: refused from 10.77.0.2: no worker of this job" in out + err
    if controller == "gloo":
        assert "rendezvous: refused from 10.77.0.2: PUT without the job's secret" in err
        assert "99999999999" in err
    assert two_hosts.processes() == []


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    time.sleep(100)  # a child of the worker's
print("UP", flush=True)
rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
while True:
    time.sleep(0.05)
    if rank == 3 and os.path.exists("fail"):
        raise ValueError("boom on the other host")
"""


@pytest.mark.parametrize("controller", ["gloo", "mpi", "elastic"])
@pytest.mark.parametrize("how", ["failure", "interrupt", "two interrupts", "killed launcher"])
def test_nothing_is_left(two_hosts: Lab, tmp_path: Path, controller: str, how: str) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    command = run_command(controller, "stubborn.py")
    if controller == "elastic":
        if how == "failure":
            pytest.skip("another worker takes its place: see tests/elastic")
        command[command.index("--elastic")] = "--min-np=4"
    job = two_hosts.start(two_hosts.hosts[0], command, cwd=tmp_path, env=ENVIRONMENT)
    assert job.stdout is not None
    for _ in range(4):
        line = job.stdout.readline()
        assert "UP" in line, job.communicate(timeout=30)[1]
    launcher = job.pid  # `ip netns exec`, unshare and sh have all become it
    started = time.monotonic()
    if how == "failure":
        (tmp_path / "fail").touch()
    elif how == "killed launcher":
        os.kill(launcher, signal.SIGKILL)
    else:
        os.kill(launcher, signal.SIGINT)
        if how == "two interrupts":
            time.sleep(0.3)
            os.kill(launcher, signal.SIGINT)
    while left := two_hosts.processes():
        assert time.monotonic() - started < 10, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.1)
    out, err = job.communicate(timeout=10)
    expected = {"failure": 1, "interrupt": 130, "two interrupts": 130, "killed launcher": -9}[how]
    assert job.returncode == expected, err
    if how == "failure":
        assert err.rstrip().endswith("ValueError: boom on the other host") and "rank 3 on h2" in err
    assert "UP" not in out


HOG = """
import os, time
rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
print("NICE", os.nice(0), flush=True)
held = []
while True:
    if rank == 3:
        held.append(b"x" * (8 << 20))
    time.sleep(0.02)
"""


@CONTROLLERS
def test_memory_and_priority_on_other_hosts(two_hosts: Lab, tmp_path: Path, controller: str) -> None:
    (tmp_path / "hog.py").write_text(HOG)
    command = run_command(controller, "--max-memory", "200M", "--nice", "5", "hog.py")
    done = two_hosts.run(two_hosts.hosts[0], command, timeout=60, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 134, done.stderr
    assert "hvdlm: rank 3 on h2 used 2" in done.stderr and "more than the 200 MiB of --max-memory" in done.stderr
    assert done.stdout.count(f"NICE {os.nice(0) + 5}") == 4
    assert two_hosts.processes() == []


def test_a_host_that_is_cut_off(two_hosts: Lab, tmp_path: Path) -> None:
    """ssh's keep-alive notices; the job ends with the host named."""
    job = start_steps(two_hosts, tmp_path, "gloo")
    other = two_hosts.hosts[1]
    cut = time.monotonic()
    subprocess.run(["ip", "-n", other.namespace, "link", "set", "eth0", "down"], check=True, timeout=10)
    try:
        _, err = job.communicate(timeout=60)
        assert time.monotonic() - cut < 40
        assert job.returncode != 0 and "on h2" in err and "connection to the host is lost" in err, err[-3000:]
    finally:
        subprocess.run(["ip", "-n", other.namespace, "link", "set", "eth0", "up"], check=True, timeout=10)
    # When it is back, its kernel learns that nobody is there any more.
    deadline = time.monotonic() + 90
    while two_hosts.processes():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ssh_that_asks_or_hangs(two_hosts: Lab, tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("raise SystemExit(3)")
    command = run_command("gloo", "--ssh-option", "PubkeyAuthentication=no", "s.py")
    done = two_hosts.run(two_hosts.hosts[0], command, timeout=60, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 2 and "host h2: ssh ended with code 255" in done.stderr
    assert "Permission denied" in done.stderr and "HINT: log in without a password first: ssh-copy-id h2" in done.stderr
    # A port where somebody listens and says nothing.
    silent = subprocess.Popen(
        [*inside(two_hosts.hosts[1].namespace, "h2"), sys.executable, "-c",
         "import socket, time\ns = socket.create_server(('', 2222))\ntime.sleep(60)"],
    )  # fmt: skip
    try:
        time.sleep(0.5)
        started = time.monotonic()
        command = run_command("gloo", "-p", "2222", "--start-timeout", "4", "s.py")
        done = two_hosts.run(two_hosts.hosts[0], command, timeout=60, cwd=tmp_path, env=ENVIRONMENT)
        assert done.returncode == 2 and "host h2: no answer over ssh within 4 s" in done.stderr, done.stderr
        assert time.monotonic() - started < 15
    finally:
        silent.kill()
        silent.wait()
    assert two_hosts.processes() == []


def test_the_lab_has_two_networks(two_hosts: Lab) -> None:
    """Otherwise a closed port there would prove nothing."""
    first, second = two_hosts.hosts
    server = subprocess.Popen(
        [*inside(second.namespace, "h2"), sys.executable, "-c",
         "import socket\ns = socket.create_server(('', 3333))\ns.accept()\ns.accept()"],
    )  # fmt: skip
    try:
        time.sleep(0.7)
        assert send(first, second.address, 3333, [b"x"]) != ["ConnectionRefusedError"]
        assert send(first, f"{OTHER_SUBNET}.2", 3333, [b"x"]) != ["ConnectionRefusedError"]
    finally:
        server.kill()
        server.wait()


def test_doctor_compares_the_hosts(two_hosts: Lab, tmp_path: Path) -> None:
    doctor = [sys.executable, "-m", "hvdlm", "doctor", "--network-interfaces", "eth0", "--json", "-H"]
    done = two_hosts.run(two_hosts.hosts[0], [*doctor, "h1,h2"], timeout=90, cwd=tmp_path, env=ENVIRONMENT)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"], done.stdout + done.stderr
    assert {(pair["source"], pair["target"]) for pair in found["pairs"]} >= {("h1", "h2")}
    odd = two_hosts.run(two_hosts.hosts[0], [*doctor, "h1,h2,h9"], timeout=90, cwd=tmp_path, env=ENVIRONMENT)
    assert odd.returncode == 1 and "h9" in str([check["odd"] for check in json.loads(odd.stdout)["checks"]])
    assert two_hosts.processes() == []
