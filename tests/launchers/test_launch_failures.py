"""A worker fails: the job ends within 5 s, with its exit code, and its traceback comes last."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

SECONDS_TO_END = 5

# The moment of the failure is written down first; that is when the 5 seconds start.
FAIL = """
import os, sys, time
how, when = sys.argv[1], sys.argv[2]
rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
def fail():
    with open("failed_at", "w") as file:
        file.write(repr(time.time()))
    if how == "raise":
        raise ValueError("boom from the script")
    if how == "exit":
        sys.exit(3)
    if how == "os_exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "abort":
        os.abort()
if when == "start":
    if rank == 1:
        fail()
    time.sleep(100)
import torch
import horovod.torch as hvd
if when == "before init" and rank == 1:
    fail()
hvd.init()
hvd.allreduce(torch.ones(4), name="first")
if when == "others compute":
    if rank == 1:
        fail()
    time.sleep(100)
if rank == 1:
    time.sleep(0.5)
    fail()
hvd.allreduce(torch.ones(4), name="never")
time.sleep(100)
"""
CODES = {"raise": 1, "exit": 3, "os_exit": 7, "kill": 137, "abort": 134}


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
@pytest.mark.parametrize("when", ["start", "before init", "others compute", "others wait"])
@pytest.mark.parametrize("how", list(CODES))
def test_failure_ends_the_job(jobs, how, when, controller):
    script = jobs.script(FAIL)
    result = jobs.run("-np", "2", controller, "--run-dir", "run", script, how, when)
    took = result.ended - float((jobs.directory / "failed_at").read_text())
    assert result.code == CODES[how], result.err
    assert took < SECONDS_TO_END, result.err
    assert "hvdlm: rank 1 on " in result.err
    report = result.err[result.err.rindex("hvdlm: rank 1 on ") :]
    if how == "raise":
        assert report.rstrip().endswith("ValueError: boom from the script")
        assert "Traceback (most recent call last):" in report and "in fail" in report
    elif how == "abort":
        assert "killed by SIGABRT" in report and "in fail" in report
        assert "Extension modules" not in report
    elif how == "kill":
        assert "killed by SIGKILL" in report
    else:
        assert f"exit code {CODES[how]}" in report
    assert not jobs.left()


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_cause_wins_over_consequence(jobs, controller):
    """The rank that caused the failure ends after the ones that only lost it."""
    script = jobs.script(
        """
import os, sys, time
rank = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
if rank != 1:
    class HorovodInternalError(RuntimeError): pass
    raise HorovodInternalError("Horovod has been shut down.")
time.sleep(0.8)
raise KeyError("the cause")
"""
    )
    result = jobs.run("-np", "3", controller, "--run-dir", "run", script)
    assert result.code == 1
    assert result.err.rstrip().endswith("KeyError: 'the cause'")
    assert "rank 1 on" in result.err


def test_only_consequences(jobs):
    script = jobs.script(
        "import os, time\n"
        "class HorovodInternalError(RuntimeError): pass\n"
        "if os.environ['HOROVOD_RANK'] == '0': raise HorovodInternalError('x')\n"
    )
    result = jobs.run("-np", "2", "--gloo", "--run-dir", "run", script)
    assert result.code == 1
    assert "not the cause" in result.err


def test_chained_exceptions_are_shown_whole(jobs):
    script = jobs.script("try:\n    {}['a']\nexcept KeyError as e:\n    raise RuntimeError('outer') from e\n")
    result = jobs.run("-np", "1", "--gloo", "--run-dir", "run", script)
    report = result.err[result.err.rindex("The traceback of rank 0") :]
    assert "KeyError: 'a'" in report and report.rstrip().endswith("RuntimeError: outer")


def test_what_the_program_started_is_ended(jobs):
    """Children that left the process group do not outlive the job, nor keep it from ending."""
    script = jobs.script("import subprocess\nsubprocess.Popen(['setsid', 'sleep', '100'])\nprint('done')\n")
    start = time.monotonic()
    result = jobs.run("-np", "2", "--gloo", "--run-dir", "run", script)
    assert result.code == 0, result.err
    assert time.monotonic() - start < 10
    assert not jobs.left()


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_killed_supervisor(jobs, controller):
    process, program = started(jobs, controller)
    killed_at = time.time()

    os.kill(parent_of(program), 9)
    result = jobs.finish(process, 20)
    assert result.code == 137
    assert result.ended - killed_at < SECONDS_TO_END
    assert not jobs.left()


def test_killed_starter_of_a_supervisor(jobs):
    """What mpirun has started waits for the supervisor: a job that loses it ends too, and leaves nothing."""
    process, program = started(jobs, "--mpi")
    starter = parent_of(parent_of(program))
    assert is_supervisor(jobs.left()[starter])
    killed_at = time.time()
    os.kill(starter, 9)
    result = jobs.finish(process, 20)
    assert result.code == 143
    assert result.ended - killed_at < SECONDS_TO_END
    assert not jobs.left()


def started(jobs, controller):
    """(the launcher, process id of one of the two programs), when both run."""
    script = jobs.script("import time\nprint('up')\ntime.sleep(100)\n")
    process = jobs.start("-np", "2", controller, "--run-dir", "run", script)
    jobs.wait_until(lambda: sum("script.py" in c and "hvdlm.worker" not in c for c in workers(jobs).values()) == 2)
    program = next(pid for pid, c in workers(jobs).items() if "script.py" in c)
    return process, program


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_supervisor(command):
    return "hvdlm.worker import main" in command and "mpirun" not in command and "prterun" not in command


def workers(jobs):
    return {pid: command for pid, command in jobs.left().items() if "hvdlm" not in command and "prte" not in command}


def test_program_that_cannot_run(jobs):
    path = jobs.directory / "prog"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    result = jobs.run("-np", "1", "--gloo", "--run-dir", "run", "./prog")
    assert result.code == 127
    assert "cannot run './prog'" in result.err


def test_worker_killed_by_the_start_timeout(jobs, tmp_path):
    fake = tmp_path / "mpirun"
    fake.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'mpirun (Open MPI) 5.0.1'; exit; }\necho stuck\nsleep 100\n"
    )
    fake.chmod(0o755)
    (tmp_path / "python").symlink_to("/bin/false")
    script = jobs.script("print('hello')\n")
    text = (
        "import hvdlm.launchers.mpi as mpi, sys\n"
        f"mpi.find_mpirun = lambda path: {str(fake)!r}\n"
        "from hvdlm.cli import main\n"
        f"main(['run', '-np', '2', '--mpi', '--start-timeout', '1', '--run-dir', 'run', {script!r}])\n"
    )

    result = jobs.finish(jobs.start_command(sys.executable, "-c", text), 20)
    assert result.code == 2
    assert "2 of 2 workers did not start within 1 s" in result.err and "stuck" in result.err and "HINT: " in result.err


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_failed_worker_that_does_not_end(jobs, controller):
    """It has its traceback out, and waits for a thread for ever."""
    script = jobs.script(
        "import os, threading, time\n"
        "from hvdlm.processes import report_uncaught_exceptions\n"
        "report_uncaught_exceptions()\n"
        "if int(os.environ.get('HOROVOD_RANK') or os.environ['OMPI_COMM_WORLD_RANK']) == 1:\n"
        "    threading.Thread(target=time.sleep, args=(100,)).start()\n"
        "    with open('failed_at', 'w') as file: file.write(repr(time.time()))\n"
        "    raise ValueError('boom')\n"
        "time.sleep(100)\n"
    )
    result = jobs.run("-np", "2", controller, "--run-dir", "run", script)
    assert result.ended - float((jobs.directory / "failed_at").read_text()) < SECONDS_TO_END
    assert result.code == 1
    assert result.err.rstrip().endswith("ValueError: boom")


def test_reporting_exceptions_without_a_supervisor(jobs):

    text = "from hvdlm.processes import report_uncaught_exceptions as r\nr()\n1 / 0\n"
    result = jobs.finish(jobs.start_command(sys.executable, "-c", text), 20)
    assert result.code == 1 and result.err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_killed_mpirun(jobs):
    script = jobs.script("import time\ntime.sleep(100)\n")
    process = jobs.start("-np", "2", "--mpi", "--run-dir", "run", script)
    jobs.wait_until(lambda: sum("script.py" in c and "hvdlm" not in c for c in jobs.left().values()) == 2)
    mpirun = next(pid for pid, c in jobs.left().items() if c.split()[0].endswith(("mpirun", "prterun")))
    killed_at = time.time()
    os.kill(mpirun, 9)
    result = jobs.finish(process, 20)
    assert result.code == 137, result.err
    assert "mpirun was killed by SIGKILL" in result.err
    assert result.ended - killed_at < SECONDS_TO_END


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_exit_code_of_a_worker_that_ends_slowly(jobs, controller):
    """The others lose it and end before it does."""
    script = jobs.script(
        "import os, sys, time\n"
        "if int(os.environ.get('HOROVOD_RANK') or os.environ['OMPI_COMM_WORLD_RANK']) == 0:\n"
        "    time.sleep(0.3)\n    sys.exit('HorovodInternalError: Horovod has been shut down')\n"
        "time.sleep(2.5)\nos._exit(3)\n"
    )
    result = jobs.run("-np", "2", controller, "--run-dir", "run", script)
    assert result.code == 3, result.err


def test_native_abort_after_losing_a_peer_is_no_cause(jobs):
    script = jobs.script(
        "import os, sys, time\n"
        "if os.environ['HOROVOD_RANK'] == '0':\n"
        "    sys.stderr.write('what():  [/x/gloo/transport/tcp/pair.cc:598] Connection closed by peer\\n')\n"
        "    os.abort()\n"
        "time.sleep(1)\nraise KeyError('the cause')\n"
    )
    result = jobs.run("-np", "2", "--gloo", "--run-dir", "run", script)
    assert result.code == 1 and result.err.rstrip().endswith("KeyError: 'the cause'")
