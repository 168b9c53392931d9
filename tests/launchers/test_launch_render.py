# ruff: noqa: E501 - commands and outputs stand on one line
"""Pure renderings: the exact commands, with paths and arguments that break careless quoting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvdlm.errors import ConfigError, LaunchError
from hvdlm.launchers import horovodrun, mpi
from hvdlm.launchers.base import JobSpec, get_launcher, supervisor_command
from hvdlm.launchers.flags import FLAGS, flags_to_arguments, flags_to_environment
from hvdlm.launchers.gloo import worker_environment
from hvdlm.launchers.hosts import Host, assign, is_local, parse_hostfile, parse_hosts, weights_of
from hvdlm.launchers.mpi_ports import ssh_wrapper
from hvdlm.launchers.ssh import Ssh

HOSTILE = ["a b", "it's", 'say "hi"', "$HOME", "`id`", "é ü 漢", "--flag", "-x", "a;b", "*", "\\", "new\nline", ""]
OPEN_MPI_5 = mpi.Mpi("/opt/my mpi/mpirun", "openmpi", 5)
OPEN_MPI_4 = mpi.Mpi("/usr/bin/mpirun", "openmpi", 4)
MPICH = mpi.Mpi("/usr/bin/mpirun", "mpich", 4)


def spec(hosts="localhost:2", num_proc=2, command=("/py", "train.py"), environment=None, remote=False, **flags):
    parsed = parse_hosts(hosts)
    return JobSpec(
        command=tuple(command),
        num_proc=num_proc,
        hosts=parsed,
        slots=assign(parsed, num_proc),
        remote=remote,
        environment=environment or {},
        run_dir=Path("/runs/my run"),
        flags=flags,
    )


def render(job, installation, *, root=False, num_cores=8, threads=1, **more):
    worker = ["WORKER", *HOSTILE]
    return mpi.render(job, installation, worker, root=root, num_cores=num_cores, threads=threads, **more)


def test_open_mpi_5():
    assert render(spec(), OPEN_MPI_5) == [
        "/opt/my mpi/mpirun", "-np", "2", "-H", "localhost:2", "--bind-to", "none", "--map-by", "slot", "WORKER", *HOSTILE,
    ]  # fmt: skip


def test_open_mpi_5_crowded_as_root():
    assert render(spec("localhost:4", 4), OPEN_MPI_5, root=True, num_cores=2)[:-14] == [
        "/opt/my mpi/mpirun", "--allow-run-as-root", "-np", "4", "-H", "localhost:4", "--bind-to", "none",
        "--map-by", "slot:OVERSUBSCRIBE", "--mca", "mpi_yield_when_idle", "1",
    ]  # fmt: skip


def test_open_mpi_4():
    assert render(spec("localhost:4", 4), OPEN_MPI_4, num_cores=2)[:-14] == [
        "/usr/bin/mpirun", "-np", "4", "-H", "localhost:4", "--bind-to", "none", "--map-by", "slot", "--oversubscribe",
        "--mca", "pml", "ob1", "--mca", "btl", "^openib", "--mca", "mpi_yield_when_idle", "1",
    ]  # fmt: skip


def test_mpich():
    job = spec("a:2,b:1", 3, remote=True, nics=["eth1", "lo"])
    assert render(job, MPICH, ssh_program="/tmp/x/ssh")[:11] == [
        "/usr/bin/mpirun", "-n", "3", "-hosts", "a:2,b:1", "-bind-to", "none", "-iface", "eth1", "-genvnone",
        "-bootstrap",
    ]  # fmt: skip


def test_intel_mpi():
    intel = mpi.Mpi("/i/mpirun", "mpich", 0, True)
    assert render(spec("a:2,b:2", 4), intel)[:-14] == ["/i/mpirun", "-n", "4", "-hosts", "a,b", "-ppn", "2", "-genvall"]
    with pytest.raises(ConfigError, match="same number of slots"):
        render(spec("a:2,b:1", 3), intel)


def test_flags_reach_mpirun():
    job = spec("a:1,b:1", remote=True, nics=["eth0", "eth1"], tcp_flag=True,
               binding_args="--rankfile 'my file'", mpi_args='--mca x "y z"', environment={"PATH": "secret"})  # fmt: skip
    assert render(job, OPEN_MPI_5, interface="10.0.0.0/24", ssh_program="/tmp/x/ssh")[:-14] == [
        "/opt/my mpi/mpirun", "-np", "2", "-H", "a:1,b:1", "--rankfile", "my file", "--mca", "pml", "ob1",
        "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", "10.0.0.0/24",
        "--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm", "3",
        "--prtemca", "plm_ssh_agent", "/tmp/x/ssh", "--prtemca", "oob_tcp_if_include", "10.0.0.0/24",
        "--mca", "x", "y z",
    ]  # fmt: skip


def test_two_hosts_of_one_worker_each_send_at_once():
    def is_set(hosts, num_proc, **flags):
        return "coll_tuned_allreduce_algorithm" in render(spec(hosts, num_proc, **flags), OPEN_MPI_5)

    assert is_set("a:1,b:1", 2)
    # Of more, recursive doubling sends more than the ring; on one host nobody waits for a wire.
    assert not is_set("a:2,b:1", 3) and not is_set("a:2,b:2", 4) and not is_set("localhost:2", 2)
    assert not is_set("a:1,b:1", 2, mpi_args="--mca coll_tuned_use_dynamic_rules 0"), "what a person sets holds"


def test_yields_when_threads_fill_the_cores():
    assert "mpi_yield_when_idle" not in render(spec(), OPEN_MPI_5, num_cores=8, threads=3)
    assert "mpi_yield_when_idle" in render(spec(), OPEN_MPI_5, num_cores=8, threads=4)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("installation", [OPEN_MPI_5, OPEN_MPI_4, MPICH])
def test_nothing_of_the_environment_is_on_the_command_line(installation, remote):
    environment = {"SECRET_TOKEN": "s3cret", "BASH_FUNC_x%%": "()", "MY_DATA": "/d"}
    line = " ".join(render(spec("a:1,b:1", environment=environment, remote=remote), installation))
    assert not any(text in line for text in ("s3cret", "SECRET_TOKEN", "MY_DATA", "BASH_FUNC"))


@pytest.mark.parametrize("host", ["h2", "a b; touch HACKED", "$(touch HACKED)"])
def test_what_mpirun_starts_in_place_of_ssh(tmp_path, host):
    """The words of the command are for the remote shell, the host never is; options of mpirun's are left out."""
    (tmp_path / "fake ssh").write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    (tmp_path / "fake ssh").chmod(0o700)
    ssh = [str(tmp_path / "fake ssh"), *Ssh(options=("User=a b",)).arguments()]
    (tmp_path / "wrapper").write_text(ssh_wrapper(ssh, "/tmp/hvdlm-x.%h", "10.0.0.0/24"))
    argv = ["sh", str(tmp_path / "wrapper"), "-x", host, "A=1;export A;prted --x 'y z'"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True, cwd=tmp_path)
    words = done.stdout.splitlines()
    assert words[:2] == ["-o", "User=a b"] and words[-3] == "--" and words[-2] == host
    preload = "export LD_PRELOAD=/tmp/hvdlm-x.$(hostname)/bind.so HVDLM_BIND_NETWORK=10.0.0.0/24; "
    assert words[-1] == preload + "A=1;export A;prted --x 'y z'"
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("option", ["StrictHostKeyChecking", "-oProxyCommand=x", "=x", ""])
def test_bad_ssh_option(option):
    with pytest.raises(ConfigError, match=r"(?s)--ssh-option .*HINT: --ssh-option StrictHostKeyChecking=yes"):
        Ssh(options=(option,))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs", ("openmpi", 5, False)),
        ("mpirun (Open MPI) 4.1.4\n", ("openmpi", 4, False)),
        ("mpirun.real (OpenRTE) 4.0.3\n", ("openmpi", 4, False)),
        ("HYDRA build details:\n    Version:                                 4.0.2\n", ("mpich", 4, False)),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", ("mpich", 0, True)),
        ("srun 23.02", None),
    ],
)
def test_version(text, found):
    assert mpi.parse_version(text) == found


def test_detect_missing_and_strange(tmp_path):
    with pytest.raises(LaunchError, match=r"(?s)mpirun is not installed.*HINT: .*--gloo"):
        mpi.detect(None)
    fake = tmp_path / "mpirun"
    fake.write_text("#!/bin/sh\necho 'strange MPI 1.0'\n")
    fake.chmod(0o755)
    with pytest.raises(LaunchError, match=r"strange MPI 1\.0"):
        mpi.detect(str(fake))


def test_supervisor_command_carries_hostile_arguments(tmp_path):
    """Through a real supervisor and back."""
    show = "import sys; print(ascii(sys.argv[1:]))"
    job = spec(command=(sys.executable, "-c", show, *HOSTILE))
    argv = supervisor_command(job, str(tmp_path / "a socket"))
    at = argv.index("--socket")
    del argv[at : at + 2]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout == ascii(HOSTILE) + "\n"


def test_horovodrun_arguments():
    job = spec("a:1,b:1", min_num_proc=1, cooldown_range=(60, 300), nics=["eth0", "lo"], mpi_args="-x A", autotune=False,
               no_stall_check=True, hostfile="h", command=("-my prog", "--flag", "a b"))  # fmt: skip
    assert horovodrun.render(job) == [
        sys.executable, "-m", "horovod.runner.launch", "--min-num-proc=1", "--blacklist-cooldown-range", "60", "300",
        "--network-interfaces=eth0,lo", "--mpi-args=-x A", "--no-autotune", "--no-stall-check", "--hosts=a:1,b:1",
        "--num-proc=2", "./-my prog", "--flag", "a b",
    ]  # fmt: skip


def test_horovodrun_understands_every_flag():
    """Our table against horovodrun's own parser: names, types and destinations."""
    values = {"int": 3, "float": 0.5, "str": "DEBUG", "switch": True}
    skip = {"use_mpi", "use_jsrun", "hosts", "hostfile", "prefix_output_with_timestamp"}  # exclude each other
    flags = {}
    for flag in FLAGS:
        if flag.dest not in skip and not flag.own:
            value = (3, 4) if flag.count == 2 else ["lo"] if flag.dest == "nics" else values[flag.kind]
            flags[flag.dest] = value
    text = (
        "import sys, json\nfrom horovod.runner.launch import parse_args\n"
        "a = vars(parse_args())\nprint(json.dumps({k: list(v) if isinstance(v, set) else v for k, v in a.items()}))"
    )
    argv = [sys.executable, "-c", text, *flags_to_arguments(flags), "prog"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    import json

    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout)
    for dest, value in flags.items():
        assert parsed[dest] == (list(value) if isinstance(value, tuple) else value), dest
    assert parsed["command"] == ["prog"]


def test_we_know_every_flag_of_horovodrun():
    text = (
        "import argparse\nfrom horovod.runner import launch\n"
        "def show(self):\n    print(*(name for a in self._actions for name in a.option_strings))\n    raise SystemExit\n"
        "argparse.ArgumentParser.parse_args = show\nlaunch.parse_args()\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    from hvdlm.cli.run import run

    ours = {name for param in run.params for name in (*param.opts, *param.secondary_opts)} | {"-h", "--help"}
    assert set(done.stdout.split()) - ours == set()


def test_environment_of_flags_is_horovodruns():
    flags = {
        "fusion_threshold_mb": 32, "cycle_time_ms": 0.5, "cache_capacity": 7, "hierarchical_allreduce": False,
        "autotune": True, "autotune_log_file": "f", "autotune_gaussian_process_noise": 0.3, "timeline_filename": "t.json",
        "timeline_mark_cycles": True, "no_stall_check": True, "stall_check_warning_time_seconds": 9, "tcp_flag": True,
        "mpi_threads_disable": False, "num_nccl_streams": 2, "thread_affinity": 1, "gloo_timeout_seconds": 44,
        "log_level": "DEBUG", "log_with_timestamp": False, "torus_allreduce": True, "hierarchical_allgather": True,
    }  # fmt: skip
    text = (
        "import sys, json\nfrom horovod.runner.launch import parse_args\n"
        "from horovod.runner.common.util.config_parser import set_env_from_args\n"
        "env = {}\nset_env_from_args(env, parse_args())\nprint(json.dumps(env))"
    )
    argv = [sys.executable, "-c", text, "-np", "2", *flags_to_arguments(flags), "prog"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    import json

    assert flags_to_environment(flags) == json.loads(done.stdout)


def test_autotune_values_need_autotune():
    assert flags_to_environment({"autotune_log_file": "f", "timeline_mark_cycles": True}) == {}


def test_gloo_environment_replaces_an_outer_jobs():
    slot = assign(parse_hosts("localhost:1,127.0.0.1:1"), 2)[1]
    outer = {"HOROVOD_RANK": "7", "OMPI_COMM_WORLD_RANK": "7", "PMIX_RANK": "7", "KEEP": "yes"}
    found = worker_environment(outer, slot, {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "h:1/s"}, ["lo"])
    assert "OMPI_COMM_WORLD_RANK" not in found and "PMIX_RANK" not in found and found["KEEP"] == "yes"
    ranks = [
        found[f"HOROVOD_{name}"] for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    ]
    assert ranks == ["1", "2", "0", "1", "1", "2"]


def test_assignment_is_horovods():
    """Where both say something: Horovod starts every slot there is, we start as many as asked for."""
    text = (
        "from horovod.runner.common.util.hosts import *\n"
        "print([tuple(vars(s).values()) for s in get_host_assignments(parse_hosts('a:2,b:3,c:1'), 5, 5)])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    order = ("hostname", "rank", "local_rank", "cross_rank", "size", "local_size", "cross_size")
    ours = [tuple(getattr(slot, name) for name in order) for slot in assign(parse_hosts("a:2,b:3,c:1"), 5)]
    assert str(ours) == done.stdout.strip()


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":2", "a:0", "a:-1", "a:x", "a b:1", "-o:1", "a:1,", "a:1;b:1", "a:1,a:2"]
)
def test_bad_hosts(text):
    with pytest.raises(ConfigError, match="HINT: "):
        parse_hosts(text)


def test_hostfile(tmp_path):
    path = tmp_path / "my hosts"
    path.write_text("# two\nworker-0 slots=2\n\nworker-1   slots = 4 # big\n10.0.0.1\n")
    assert parse_hostfile(str(path)) == (Host("worker-0", 2), Host("worker-1", 4), Host("10.0.0.1", 1))
    assert weights_of(parse_hostfile(str(path)), assign(parse_hostfile(str(path)), 3)) == ()
    path.write_text("fast slots=2 weight=2.5\nother\nslow slots=1 weight = .5\n")
    hosts = parse_hostfile(str(path))
    assert weights_of(hosts, assign(hosts, 4)) == (2.5, 2.5, 1.0, 0.5)
    wrong = ("a slots=1 weight=-1\n", "a slots=1 weight=nan\n", "a slots=2 weight=0\n", "a slots=1 weight=\n")
    for bad in ("worker-0 slot=2\n", "# none\n", "a slots=0\n", "a slots=1\na slots=1\n", *wrong):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="HINT: "):
            parse_hostfile(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        parse_hostfile(str(tmp_path / "none"))


def test_local_names():
    assert is_local("localhost") and is_local("127.0.0.1") and is_local("127.0.0.2")
    assert not is_local("no-such-host.invalid")


def test_unknown_launcher_lists_those_there_are():
    with pytest.raises(
        ConfigError, match=r"(?s)'glo'.*debug, elastic, gloo, horovodrun, mpi, slurm.*HINT: --launcher gloo"
    ):
        get_launcher("glo")


def test_spec_does_not_show_the_environment():
    assert "s3cret" not in repr(spec(environment={"TOKEN": "s3cret"}))


def test_a_server_of_mpirun_that_fails_is_started_again_once():
    failures = [LaunchError("code 213: The PMIx server's listener thread failed to start. We cannot continue.")]

    def start():
        if failures:
            raise failures.pop()
        return 0

    assert mpi.start_again_once(start) == 0
    failures += [LaunchError("The PMIx server's listener thread failed to start.")] * 2
    with pytest.raises(LaunchError, match="listener"):
        mpi.start_again_once(start)
    failures[:] = [LaunchError("something else"), LaunchError("never reached")]
    with pytest.raises(LaunchError, match="never reached"):
        mpi.start_again_once(start)
    assert len(failures) == 1, "only that failure is tried again"
