"""The launcher is interrupted, terminated or killed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

WAIT = """
import os, signal, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "collective":
    import torch
    import horovod.torch as hvd
    hvd.init()
    open(f"up-{hvd.rank()}", "w").close()
    if hvd.rank() == 0:
        hvd.allreduce(torch.ones(4), name="never")
else:
    rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
    open(f"up-{rank}", "w").close()
time.sleep(100)
"""


def start(jobs, controller, kind):
    process = jobs.start("-np", "2", controller, "--run-dir", "run", jobs.script(WAIT), kind)
    jobs.wait_until(lambda: all((jobs.directory / f"up-{rank}").exists() for rank in (0, 1)))
    time.sleep(0.3)
    return process


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
@pytest.mark.parametrize("kind", ["plain", "stubborn", "collective"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_job(jobs, controller, kind, signum, code):
    process = start(jobs, controller, kind)
    sent = time.time()
    process.send_signal(signum)
    result = jobs.finish(process, 20)
    assert result.code == code, result.err
    assert result.ended - sent < 5
    assert not jobs.left()


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_second_interrupt_kills_at_once(jobs, controller):
    process = start(jobs, controller, "stubborn")
    sent = time.time()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    result = jobs.finish(process, 20)
    assert result.code == 130
    assert result.ended - sent < 2.5
    assert not jobs.left()


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
@pytest.mark.parametrize("kind", ["plain", "stubborn", "collective"])
def test_killed_launcher_leaves_no_process(jobs, controller, kind):
    process = start(jobs, controller, kind)
    process.kill()
    process.wait(5)
    assert jobs.wait_until(lambda: not jobs.left(), limit=10) < 10


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_interrupt_while_starting(jobs, controller):
    script = jobs.script(WAIT)
    for delay in (0.2, 0.3, 0.4, 0.5):
        process = jobs.start("-np", "2", controller, "--run-dir", "run", script, "plain")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        result = jobs.finish(process, 10)
        assert result.code in (130, 1, -2), result.err  # 1, -2: not yet past the interpreter's own start
        assert not jobs.left()


def test_ctrl_c_on_a_terminal(jobs):
    """The terminal sends SIGINT to the foreground group: only the launcher may see it."""
    script = jobs.script(
        "import os, time\n"
        "print('up' + os.environ['HOROVOD_RANK'], flush=True)\n"
        "try:\n    time.sleep(100)\nexcept KeyboardInterrupt:\n    print('saved' + os.environ['HOROVOD_RANK'])\n"
    )
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(jobs.directory)
        argv = [sys.executable, "-m", "hvdlm", "run", "-np", "2", "--gloo", "--run-dir", "run", script]
        os.execve(sys.executable, argv, jobs.environment)
    seen = b""
    sent = None
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
        if sent is None and b"up0" in seen and b"up1" in seen:
            time.sleep(0.2)
            os.write(master, b"\x03")
            sent = time.time()
    _, status = os.waitpid(pid, 0)
    os.close(master)
    assert sent is not None
    assert os.waitstatus_to_exitcode(status) == 130
    assert time.time() - sent < 5
    assert seen.count(b"saved") == 2
    assert b"\x1b[36m[0]\x1b[0m up0" in seen


def test_reader_of_the_output_goes_away(jobs):
    script = jobs.script("import time\nwhile True:\n    print('x' * 100)\n    time.sleep(0.01)\n")
    process = jobs.start("-np", "2", "--gloo", "--run-dir", "run", script)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    assert process.wait(15) == 141
    process.stderr.close()
    process.stderr = None
    assert not jobs.left()


def test_interrupt_while_nobody_reads(jobs):
    """``hvdlm run ... | less``, paused: Ctrl-C still ends the job."""
    script = jobs.script("open('up', 'w').close()\nwhile True:\n    print('x' * 1000)\n")
    process = jobs.start("-np", "2", "--gloo", "--run-dir", "run", script)
    jobs.wait_until((jobs.directory / "up").exists)
    time.sleep(1)
    sent = time.time()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert time.time() - sent < 5
    process.communicate(timeout=5)


STUBBORN_FAMILY = """
import os, signal, time
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
child = os.fork()
if child:
    print(os.getpid(), child, flush=True)
time.sleep(100)
"""


def test_mpirun_kills_the_supervisor(jobs):
    """mpirun, when it ends, kills the group of what it has started. The program's own children end all the same."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from hvdlm.worker import main; main()"
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        code,
        "--",
        sys.executable,
        str(jobs.directory / jobs.script(STUBBORN_FAMILY)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, "OMPI_COMM_WORLD_RANK": "0"}
    ) as process:
        assert process.stdout is not None
        family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(family) == 2
        os.killpg(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
