"""Jobs on a real Slurm with two nodes: trained to the end, preempted and resumed, arrays, cancelled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hvdlm.clusters.slurm import render
from hvdlm.clusters.spec import SubmitSpec
from tests.lab.slurm import Slurm, installed, slurm
from tests.multiprocess.workers import ROOT

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or not installed(), reason="needs root, slurm-wlm and munge"),
]
GPT = str(ROOT / "examples" / "gpt_torch" / "train_hvdlm.py")
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "64", "--block-size", "64", "--epochs", "1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def start(cluster: Slurm, directory: Path, *words: str) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "hvdlm", "submit", "slurm", *words],
        cwd=directory,
        env={**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return process.returncode, out + err


def wait_for(condition: Callable[[], bool], cluster: Slurm, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, cluster.ask("scontrol", "show", "job")
        time.sleep(0.1)


def test_the_gpt_example_on_two_nodes(cluster: Slurm, tmp_path: Path) -> None:
    directory = tmp_path / "it's a dir, ünï 50%"
    flags = ["-np", "4", "--workers-per-node", "2", "--compression", "fp16"]
    code, told = finish(start(cluster, directory, *flags, GPT, *SMALL))
    assert code == 0, told
    (path,) = directory.glob("hvdlm-runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["world_size"] == 4 and summary["replicas_identical"] is True
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert "identical bit for bit" in told, "the log was shown while the job ran"
    nodes = cluster.ask("scontrol", "--oneliner", "show", "job")
    assert "NodeList=n[1-2]" in nodes and "NumNodes=2" in nodes
    wait_for(lambda: cluster.steps() == [], cluster, 10)


def test_every_rendered_file_is_accepted(cluster: Slurm, tmp_path: Path) -> None:
    directory = tmp_path / 'a "b" $(touch HACKED) ; \'c'[:24]
    for number, fields in enumerate(
        [
            {"array": "0-3%2", "time_limit": "1h", "memory_per_worker": "100M", "queue": "main"},
            {"workdir": str(directory), "command": ("a b.py", "$(touch HACKED)")},
            {"workdir": "/it's", "max_restarts": 0, "sbatch": ("--exclusive", "--nice=10")},
        ]
    ):
        path = tmp_path / f"{number}.sbatch"
        path.write_text(render(SubmitSpec(**{"command": ("a.py",), "num_proc": 2, **fields})))  # type: ignore[arg-type]
        cluster.ask("sbatch", "--test-only", str(path))
    assert not list(tmp_path.rglob("HACKED"))


@pytest.mark.parametrize("kind", ["pmi2", "none"])
def test_a_script_started_by_srun(cluster: Slurm, tmp_path: Path, kind: str) -> None:
    """``python train.py`` as it is, over what Slurm's PMI plug-in offers; without one, the error says what to do."""
    command = ["srun", f"--mpi={kind}", "-N2", "-n2", sys.executable, GPT, *SMALL, "--batch-size", "64"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT), "HVDLM_RUN_DIR": str(tmp_path / "run")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if kind == "none":
        assert done.returncode != 0 and "HINT: srun --mpi=pmi2" in done.stderr, done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["replicas_identical"] is True
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    wait_for(lambda: cluster.steps() == [], cluster, 10)


RESUMING = """
    import os, pathlib, time, torch, hvdlm
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.arange(40.0)[:, None], 2, shuffle=True)
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

    @hvdlm.distribute(checkpoint_every="1")
    def train(net, optimizer, loader):
        for step, x in enumerate(loader):
            optimizer.zero_grad()
            net(x).mean().backward()
            optimizer.step()
            if first and step == 8:
                pathlib.Path("halfway").touch()
                time.sleep(120)

    train(net, torch.optim.SGD(net.parameters(), lr=1e-4), loader)
"""


def by_preemption(cluster: Slurm, job: str) -> None:
    """A job of a partition with a higher priority takes both nodes."""
    cluster.ask("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def by_time_limit(cluster: Slurm, job: str) -> None:
    """What --signal=B:USR1@60 makes Slurm do a minute before the end; waiting for it would take one."""
    cluster.ask("scancel", "--batch", "--signal=USR1", job)


@pytest.mark.parametrize("end", [by_preemption, by_time_limit])
def test_put_back_into_the_queue_it_goes_on(cluster: Slurm, tmp_path: Path, end: Callable[[Slurm, str], None]) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(RESUMING))
    words = ["-np", "2", "--queue", "main", "--time-limit", "30m", "--checkpoint-dir", "checkpoints", str(script)]
    job = start(cluster, tmp_path, *words)
    wait_for((tmp_path / "halfway").exists, cluster)
    (number,) = cluster.ask("squeue", "-h", "-o", "%A", "-p", "main").split()
    end(cluster, number)
    wait_for(lambda: "Restarts=1" in cluster.ask("scontrol", "show", "job", number), cluster)
    wait_for(lambda: "JobState=PENDING" in cluster.ask("scontrol", "show", "job", number), cluster)
    # Slurm waits two minutes before it starts a requeued job again, for the first start to be over everywhere. It can
    # be told not to, once that is so.
    wait_for(lambda: cluster.steps() == [] and "comp" not in cluster.ask("sinfo", "-h", "-o", "%t"), cluster)
    time.sleep(1)
    cluster.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    code, told = finish(job)
    assert code == 0, told
    assert f"job {number} is waiting" in told
    (run_dir,) = tmp_path.glob("hvdlm-runs/*")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True
    # The second start went on from a checkpoint of the first: it did not train the epoch's 20 steps anew.
    assert "resume" in told.lower() or "going on" in told.lower(), told
    wait_for(lambda: cluster.steps() == [], cluster, 10)


def test_an_array_is_as_many_jobs(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os; key = os.environ['SECRET_KEY']; print('task', os.environ['SLURM_ARRAY_TASK_ID'], key, key[::-1])"
    )
    os.environ["SECRET_KEY"] = "hunter2"
    try:
        job = start(cluster, tmp_path, "--array", "0-2", "--secret", "SECRET_KEY", "a.py")
    finally:
        del os.environ["SECRET_KEY"]
    code, told = finish(job)
    assert code == 0, told
    for index in range(3):
        assert f"task {index} *** 2retnuh" in told
    assert len(list(tmp_path.glob("hvdlm-runs/a-*-[012]"))) == 3
    assert "hunter2" not in (tmp_path / "a.sbatch").read_text() + told


def test_a_worker_that_fails_fails_the_job(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import hvdlm\nhvdlm.init('torch')\nif hvdlm.rank() == 1: raise ValueError('broken')\nhvdlm.barrier()"
    )
    (tmp_path / "a.py").write_text("import torch\n" + (tmp_path / "a.py").read_text())
    code, told = finish(start(cluster, tmp_path, "-np", "2", "a.py"))
    assert code != 0 and "ValueError: broken" in told and "failed (FAILED)" in told
    wait_for(lambda: cluster.steps() == [], cluster, 10)


def test_a_launcher_that_is_killed_takes_the_workers_with_it(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('up-' + os.environ['HOROVOD_RANK']).touch()\ntime.sleep(600)"
    )
    job = start(cluster, tmp_path, "-np", "2", "a.py")
    wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, cluster)
    launchers = []
    for pid in cluster.steps():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            launchers += [process] if process.cmdline()[1:4] == ["-m", "hvdlm", "run"] else []
    assert len(launchers) == 1
    launchers[0].kill()
    wait_for(lambda: cluster.steps() == [], cluster, 10)
    code, told = finish(job, 60)
    assert code != 0 and "failed" in told


def test_ctrl_c_cancels(cluster: Slurm, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import time, pathlib\npathlib.Path('up').touch()\ntime.sleep(600)")
    job = start(cluster, tmp_path, "-np", "2", "a.py")
    wait_for((tmp_path / "up").exists, cluster)
    job.send_signal(signal.SIGINT)
    code, told = finish(job, 60)
    assert code == 128 + signal.SIGINT and "was cancelled" in told
    assert "CANCELLED" in cluster.ask("scontrol", "show", "job").rpartition("JobId")[2]
    wait_for(lambda: cluster.steps() == [], cluster, 10)
