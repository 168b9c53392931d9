# ruff: noqa: E501 - commands and outputs stand on one line
"""Jobs that go well: output, environment, logs, programs of every kind, other launchers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = 'int(os.environ.get("HOROVOD_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)'
ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("controller", ["--gloo", "--mpi"])


@BOTH
def test_arguments_arrive_whole(jobs, controller):
    hostile = ["a b", "it's", '"', "$HOME", "`id`", "é 漢", "--flag", "-np", ";", "*", "\\", "new\nline", ""]
    script = jobs.script("import sys\nprint(ascii(sys.argv[1:]))\n", "my dir/it's a é script.py")
    result = jobs.run("-np", "2", controller, "--run-dir", "my run 'dir'", script, *hostile)
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == [f"[{rank}] {hostile!a}" for rank in (0, 1)]


@BOTH
def test_hostile_working_directory(jobs, controller, tmp_path):
    jobs.directory = tmp_path / "-odd $HOME 'dir' é"
    jobs.directory.mkdir()
    script = jobs.script("import os\nprint(ascii(os.getcwd()))\n", "-dash.py")
    # Modules the working directory shadows must not reach our own processes.
    for name in ("json", "signal", "socket", "selectors", "hvdlm"):
        jobs.script("raise SystemExit('shadowed')\n", f"{name}.py")
    # As the installed command does it: -m would put the working directory first for the launcher itself.
    text = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from hvdlm.cli import main; main()"
    command = [sys.executable, "-I", "-c", text, "run", "-np", "2", controller, "--", script]
    result = jobs.finish(jobs.start_command(*command))
    assert result.code == 0, result.err
    assert result.out.count(ascii(str(jobs.directory))) == 2
    (run_dir,) = (jobs.directory / "hvdlm-runs").iterdir()
    assert run_dir.name.endswith("-dash")


@BOTH
def test_collectives_work(jobs, controller):
    script = jobs.script(
        "import os\nimport torch\nimport horovod.torch as hvd\nhvd.init()\n"
        "print(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size(),"
        # Not torch.get_num_threads(): it is no more than the physical cores, whatever was asked for.
        " hvd.allreduce(torch.ones(1) * hvd.rank(), op=hvd.Sum).item(), os.environ['OMP_NUM_THREADS'])\n"
    )
    result = jobs.run("-np", "3", controller, "--run-dir", "run", script, OMP_NUM_THREADS="2")
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == [f"[{rank}] {rank} 3 {rank} 3 0 1 3.0 2" for rank in range(3)]
    assert "OMP_NUM_THREADS" not in result.err


def test_two_names_of_this_host_are_two_hosts(jobs):
    script = jobs.script(
        "import horovod.torch as hvd\nhvd.init()\n"
        "print(hvd.rank(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size())\n"
    )
    result = jobs.run("-np", "2", "--gloo", "-H", "localhost:1,127.0.0.1:1", "--run-dir", "run", script)
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == ["[0] 0 0 1 0 2", "[1] 1 0 1 1 2"]


@BOTH
def test_as_many_workers_as_asked_for_not_as_slots(jobs, controller):
    script = jobs.script("print('here')\n")
    result = jobs.run("-np", "2", controller, "-H", "localhost:4", "--run-dir", "run", script)
    assert result.code == 0 and result.out.count("here") == 2


@BOTH
def test_more_workers_than_cores(jobs, controller):
    count = len(os.sched_getaffinity(0)) + 1
    script = jobs.script("import os\nprint(os.environ['OMP_NUM_THREADS'])\n")
    result = jobs.run("-np", str(count), controller, "--run-dir", "run", script)
    assert result.code == 0, result.err
    assert result.out.count("] 1\n") == count
    assert f"{count} workers share {count - 1} cores" in result.err
    assert "OMP_NUM_THREADS=1" in result.err


@BOTH
def test_environment_of_workers(jobs, controller):
    (jobs.directory / "c.yaml").write_text("seed: 7\n")
    script = jobs.script(
        "import json\nfrom hvdlm.environment import read_environment\ne = read_environment()\n"
        "print(json.dumps([dict(e.command_line), dict(e.config_file), e.run_dir, e.progress, e.rank, e.size, dict(e.options)]))\n"
    )
    flags = ["--compression", "fp16", "--bucket-cap-mb", "2", "--config-file", "c.yaml", "--cycle-time-ms", "3"]
    result = jobs.run("-np", "2", controller, "--run-dir", "run", *flags, script, HVDLM_REDUCTION="sum")
    assert result.code == 0, result.err
    found = sorted(json.loads(line[4:]) for line in result.out.splitlines())
    for rank, (command_line, config_file, run_dir, progress, seen, size, options) in enumerate(
        sorted(found, key=lambda row: row[4])
    ):
        assert command_line == {"compression": "fp16", "bucket_cap_mb": 2.0}
        assert config_file == {"seed": 7} and options == {"reduction": "sum"}
        assert run_dir == str(jobs.directory / "run") and progress == "lines"
        assert (seen, size) == (rank, 2)


def test_flags_of_horovod_reach_the_workers(jobs):
    script = jobs.script("import os\nprint(os.environ['HOROVOD_CYCLE_TIME'], os.environ['HOROVOD_FUSION_THRESHOLD'])\n")
    (jobs.directory / "c.yaml").write_text("params: {fusion_threshold_mb: 1, cycle_time_ms: 9}\n")
    result = jobs.run(
        "-np", "1", "--gloo", "--run-dir", "run", "--config-file", "c.yaml", "--cycle-time-ms", "3", script
    )
    assert result.out == "3.0 1048576\n"


@BOTH
def test_controller_is_used(jobs, controller):
    script = jobs.script("import os\nprint(os.environ['HOROVOD_CONTROLLER'], 'OMPI_COMM_WORLD_RANK' in os.environ)\n")
    result = jobs.run("-np", "1", controller, "--run-dir", "run", script, HOROVOD_CONTROLLER="other")
    assert result.out == ("gloo False\n" if controller == "--gloo" else "mpi True\n")


def test_mpi_is_chosen_where_it_is_built(jobs):
    from hvdlm.launchers.engine import find_engine

    script = jobs.script("import os\nprint(os.environ['HOROVOD_CONTROLLER'])\n")
    result = jobs.run("-np", "1", "--run-dir", "run", script)
    assert result.out == ("mpi\n" if find_engine().mpi else "gloo\n")


def test_nested_in_another_job(jobs):
    """A job that starts a job: the inner one has ranks of its own."""
    jobs.script(f"import os\nprint('inner', {RANK})\n", "inner.py")
    script = jobs.script(
        "import subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-m', 'hvdlm', 'run', '-np', '2', sys.argv[1], '--run-dir', 'in', 'inner.py'],"
        " capture_output=True, text=True, timeout=50)\nprint(done.stdout, done.stderr, done.returncode)\n"
    )
    for outer, inner in (("--mpi", "--mpi"), ("--gloo", "--mpi"), ("--mpi", "--gloo")):
        result = jobs.run("-np", "1", outer, "--run-dir", "out", script, inner)
        assert "inner 0" in result.out and "inner 1" in result.out, result.out + result.err


@BOTH
@pytest.mark.parametrize(
    "program",
    [
        ["-m", "package.module", "--flag", "-np"],
        ["--", "./prog", "--flag", "-np"],
        ["python", "script.py", "--flag", "-np"],
        ["package", "--flag", "-np"],
    ],
)
def test_programs(jobs, controller, program):
    show = "import sys\nprint('ran', sys.argv[1:])\n"
    jobs.script("", "package/__init__.py")
    jobs.script(show, "package/module.py")
    jobs.script(show, "package/__main__.py")
    jobs.script(show)
    path = jobs.directory / "prog"
    path.write_text("#!/bin/sh\nprintf \"ran ['%s', '%s']\\n\" \"$@\"\n")
    path.chmod(0o755)
    result = jobs.run("-np", "2", controller, "--run-dir", "run", *program)
    assert result.code == 0, result.err
    assert result.out.count("ran ['--flag', '-np']") == 2


@BOTH
def test_logs_and_their_permissions(jobs, controller):
    script = jobs.script(f"import os, sys\nprint('out', {RANK})\nprint('err', {RANK}, file=sys.stderr)\n")
    result = jobs.run("-np", "2", controller, "--run-dir", "run", "--output-filename", "files", script)
    assert result.code == 0, result.err
    logs = jobs.directory / "run" / "logs"
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    for rank in (0, 1):
        for name, folder_name in (("out", "stdout"), ("err", "stderr")):
            log = logs / f"rank-{rank}.{name}.log"
            assert log.read_text() == f"{name} {rank}\n"
            assert stat.S_IMODE(log.stat().st_mode) == 0o600
            assert (jobs.directory / "files" / f"rank.{rank}" / folder_name).read_text() == f"{name} {rank}\n"


@BOTH
def test_redraws_and_prompts_come_through_at_once(jobs, controller):
    script = jobs.script(
        "import sys, time\n"
        "for i in range(3):\n    print(f'\\r{i}0%', end='', file=sys.stderr)\n    time.sleep(0.3)\n"
        "print('', file=sys.stderr)\ntime.sleep(100)\n"
    )
    process = jobs.start("-np", "1", controller, "--run-dir", "run", script)
    assert process.stderr is not None
    fd = process.stderr.fileno()
    start, seen, times = time.monotonic(), b"", {}
    while b"\n" not in seen and time.monotonic() - start < 20:
        seen += os.read(fd, 4096)
        for text in (b"00%", b"10%", b"20%"):
            if text in seen:
                times.setdefault(text, time.monotonic())
    assert seen.endswith(b"00%\r10%\r20%\n")
    assert times[b"20%"] - times[b"00%"] > 0.3, "they came together"
    process.terminate()
    assert jobs.finish(process, 20).code == 143


@BOTH
def test_lines_of_ranks_do_not_mix(jobs, controller):
    script = jobs.script(
        f"import os, sys\nfor i in range(300):\n    sys.stdout.write('x' * 5000 + str({RANK}))\n    sys.stdout.write('\\n')\n"
    )
    result = jobs.run("-np", "2", controller, "--run-dir", "run", script)
    lines = result.out.splitlines()
    assert sorted(set(lines)) == [f"[{rank}] " + "x" * 5000 + str(rank) for rank in (0, 1)]
    assert len(lines) == 600


def test_timestamps(jobs):
    import re

    script = jobs.script("print('hello')\n")
    result = jobs.run("-np", "1", "--gloo", "--prefix-output-with-timestamp", "--run-dir", "run", script)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d hello\n", result.out)


@BOTH
def test_rank_0_reads_what_is_piped_in(jobs, controller):
    script = jobs.script("import sys\nprint(repr(sys.stdin.read()))\n")
    argv = [sys.executable, "-m", "hvdlm", "run", "-np", "2", controller, "--run-dir", "run", script]
    done = subprocess.run(
        argv,
        cwd=jobs.directory,
        env=jobs.environment,
        input="data\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert sorted(done.stdout.splitlines()) == ["[0] 'data\\n'", "[1] ''"], done.stderr


@BOTH
def test_no_value_of_the_environment_on_a_command_line(jobs, controller):
    secret = "tok-5f1d0e-secret"
    script = jobs.script("import os, time\nopen(f'up-{os.getpid()}', 'w').close()\ntime.sleep(100)\n")
    process = jobs.start("-np", "2", controller, "--run-dir", "run", script, SECRET_TOKEN=secret)
    jobs.wait_until(lambda: len(list(jobs.directory.glob("up-*"))) == 2)
    lines = list(jobs.left().values())
    everything = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                everything.append(Path(f"/proc/{entry}/cmdline").read_bytes())
            except OSError:
                continue
    process.terminate()
    result = jobs.finish(process, 20)
    assert len(lines) >= 5, "launcher, two supervisors and two programs at least"
    assert not any(secret.encode() in line for line in everything)
    assert secret not in result.out + result.err
    for path in (jobs.directory / "run").rglob("*"):
        assert not path.is_file() or secret not in path.read_text()


@BOTH
def test_only_loopback_is_listened_on(jobs, controller):
    """The rendezvous of a job on one host is not offered to the network."""
    script = jobs.script("import os, time\nopen(f'up-{os.getpid()}', 'w').close()\ntime.sleep(100)\n")
    process = jobs.start("-np", "2", controller, "--run-dir", "run", script)
    jobs.wait_until(lambda: len(list(jobs.directory.glob("up-*"))) == 2)
    import psutil

    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
    process.terminate()
    jobs.finish(process, 20)
    assert listening == (["127.0.0.1"] if controller == "--gloo" else [])


def test_debug_launcher_runs_in_place(jobs):
    script = jobs.script(
        "import os, sys\nbreakpoint()\nprint(__name__, sys.argv, os.getpid(), os.environ['HVDLM_RUN_DIR'])\nsys.exit(4)\n"
    )
    argv = [sys.executable, "-m", "hvdlm", "run", "--launcher", "debug", "--run-dir", "run", script, "--x", "1"]
    process = subprocess.Popen(
        argv, cwd=jobs.directory, env=jobs.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate("p 6 * 7\nc\n", timeout=30)
    assert "42" in out
    assert f"__main__ ['script.py', '--x', '1'] {process.pid} {jobs.directory / 'run'}" in out
    assert process.returncode == 4


def test_debug_launcher_runs_a_module(jobs):
    jobs.script("import sys\nprint(__name__, sys.argv[1:])\n", "thing.py")
    result = jobs.run("--launcher", "debug", "--run-dir", "run", "-m", "thing", "a")
    assert result.out == "__main__ ['a']\n", result.err


def test_check_build_is_horovodruns(jobs):
    result = jobs.run("--check-build")
    assert "Available Controllers" in result.out and "[X] Gloo" in result.out


def test_version(jobs):
    import horovod

    assert horovod.__version__.split("+")[0] in jobs.run("--version").out


def test_a_script_of_horovods_own_elastic_api_runs_under_horovodrun(jobs):
    hosts = jobs.directory / "hosts.sh"
    hosts.write_text("#!/bin/sh\necho localhost:2\n")
    hosts.chmod(0o755)
    script = jobs.script(
        "import horovod.torch as hvd\nhvd.init()\nimport os\nprint('elastic', hvd.rank(), hvd.size(), os.environ['HOROVOD_ELASTIC'])\n"
    )
    flags = [
        "--launcher",
        "horovodrun",
        "-np",
        "2",
        "--min-np",
        "1",
        "--max-np",
        "2",
        "--host-discovery-script",
        "./hosts.sh",
    ]
    result = jobs.run(*flags, "--network-interfaces", "lo", script, limit=90)
    assert result.code == 0, result.err
    assert "elastic 0 2 1" in result.out and "elastic 1 2 1" in result.out


SCRIPT = (
    "from hvdlm.environment import read_environment\ne = read_environment()\n"
    "import torch\nimport horovod.torch as hvd\nhvd.init()\n"
    "assert (e.rank, e.size) == (hvd.rank(), hvd.size()), e\n"
    "print('sum', hvd.allreduce(torch.ones(1), op=hvd.Sum).item(), e.launcher)\n"
)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["mpirun", "-np", "2", "--bind-to", "none", sys.executable], "sum 2.0 mpirun"),
        (["horovodrun", "-np", "2", "--gloo", sys.executable], "sum 2.0 horovodrun"),
        ([sys.executable], "sum 1.0 None"),
    ],
)
def test_the_same_script_without_us(jobs, argv, expected):
    script = jobs.script(SCRIPT)
    if argv[0] == "mpirun" and os.geteuid() == 0:
        argv = [argv[0], "--allow-run-as-root", *argv[1:]]
    result = jobs.finish(jobs.start_command(*argv, script), 90)
    assert result.code == 0, result.err
    assert result.out.count(expected) == (1 if "None" in expected else 2), result.out


@pytest.mark.parametrize("argv", [["mpirun", "-np", "2"], []])
def test_supervisor_without_our_launcher(jobs, argv):
    """Without a launcher's socket, output and exit code take the ordinary way."""
    script = jobs.script(f"import os, sys, time\nprint('rank', {RANK})\ntime.sleep(1)\nsys.exit(5 if {RANK} else 0)\n")
    if argv and os.geteuid() == 0:
        argv = [*argv, "--allow-run-as-root"]
    supervisor = [sys.executable, "-m", "hvdlm.worker", "--", sys.executable, script]
    result = jobs.finish(jobs.start_command(*argv, *supervisor), 60)
    if argv:
        assert result.code == 5
        assert {"[0] rank 0", "[1] rank 1"} <= set(result.out.splitlines())
    else:
        assert (result.code, result.out) == (0, "rank 0\n")


def test_supervisor_whose_launcher_is_gone(jobs):
    """Nothing would end its program: it does not start it."""
    supervisor = [sys.executable, "-m", "hvdlm.worker", "--socket", "/no/such", "--", "touch", "started"]
    result = jobs.finish(jobs.start_command(*supervisor), 60)
    assert result.code == 1 and "no launcher or agent" in result.err and "/no/such" in result.err
    assert not (jobs.directory / "started").exists()
