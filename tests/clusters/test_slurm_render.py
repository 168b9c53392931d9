"""The batch script: its text, hostile words in it, and what it does when signals come."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hvdlm.clusters.slurm import read_state, render
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.errors import ConfigError
from hvdlm.launchers.base import JobSpec
from hvdlm.launchers.hosts import Host, assign
from hvdlm.launchers.slurm import expand_counts
from hvdlm.launchers.slurm import render as render_srun
from hvdlm.launchers.slurm_task import place
from tests.clusters.kept import assert_golden

HOSTILE = [
    "it's", 'a "quoted" word', "$(touch HACKED)", "`touch HACKED`", "; touch HACKED", "ünï code", "-n", "--",
    "a\nb", "back\\slash", "*", "~", "#", "!!", "",
]  # fmt: skip


def bash_n(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_golden() -> None:
    spec = SubmitSpec(
        command=("train.py", "--epochs", "3"),
        options={"compression": "fp16", "elastic": "false"},
        num_proc=4,
        workers_per_node=2,
        cpus_per_worker=8,
        gpus_per_worker=1,
        memory_per_worker="16G",
        time_limit="12h",
        env={"DATA": "/shared/my data"},
        secrets={"HF_TOKEN": ""},
        queue="gpu",
        account="nlp",
        array="0-3%2",
        checkpoint_dir="/scratch/ck",
        network_interfaces="ib0",
        setup=("module load cuda/12",),
        sbatch=("--exclusive",),
        workdir="/shared/project",
    )
    text = render(spec, python="/opt/venv/bin/python")
    bash_n(text)
    assert_golden("slurm.sbatch", text)


def run_script(directory: Path, text: str, **environment: str) -> subprocess.Popen[str]:
    path = directory / "job.sh"
    path.write_text(text)
    return subprocess.Popen(
        ["bash", str(path)],
        env={"PATH": f"{directory}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory,
    )  # fmt: skip


def fake(directory: Path, name: str, body: str) -> str:
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hostile_words_arrive_as_they_are(tmp_path: Path) -> None:
    """The script runs for real with a python that writes its arguments down."""
    python = fake(
        tmp_path, "it's python", f'printf "%s\\0" "$@" > {tmp_path}/words; printf "%s" "$EVIL" > {tmp_path}/evil'
    )
    directory = tmp_path / "dir with ' and $(touch HACKED) in it"
    directory.mkdir()
    evil = "$(touch HACKED)\n'\"\\"
    spec = SubmitSpec(command=("train.py", *HOSTILE), env={"EVIL": evil}, run_dir="run $(touch HACKED)")
    text = render(spec, python=python, workdir=str(directory))
    bash_n(text)
    job = run_script(tmp_path, text)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0, out
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words[words.index("--") + 1 :] == ["train.py", *HOSTILE]
    assert words[words.index("--run-dir") + 1] == "run $(touch HACKED)"
    assert (tmp_path / "evil").read_text() == evil
    assert not list(tmp_path.rglob("HACKED"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"workdir": "/a\\b"}, "backslash"),
        ({"workdir": "/both'\""}, "both kinds of quotes"),
        ({"array": "0-3; rm"}, "array"),
        ({"sbatch": ("--x y",)}, "sbatch"),
        ({"secrets": {"TOKEN": "k8s/key"}}, "--secret TOKEN"),
        ({"max_num_proc": 4}, "keeps its nodes"),
    ],
)
def test_what_slurm_cannot_express(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(SubmitSpec(command=("a.py",), **fields))  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_the_time_limit_puts_the_job_back_into_the_queue(tmp_path: Path) -> None:
    """USR1 to the batch script: the job is asked to end, gets its time, and is requeued."""
    body = f'echo "$@" >> {tmp_path}/calls; trap "sleep 0.5; echo saved >> {tmp_path}/calls; exit 143" TERM\n'
    python = fake(tmp_path, "python", body + "touch started; while :; do sleep 0.1; done")
    fake(tmp_path, "scontrol", f'echo "scontrol $*" >> {tmp_path}/calls; kill -KILL $PPID')
    text = render(SubmitSpec(command=("t.py",), checkpoint_dir="ck"), python=python, workdir=str(tmp_path))
    job = run_script(tmp_path, text)
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    first, *rest = (tmp_path / "calls").read_text().splitlines()
    assert "--checkpoint-dir ck --auto-resume" in first
    assert rest == ["saved", "scontrol requeue 7"], out
    again = run_script(tmp_path, text, SLURM_RESTART_COUNT="3")
    (tmp_path / "started").unlink()
    wait_for(tmp_path / "started")
    again.send_signal(signal.SIGUSR1)
    out, _ = again.communicate(timeout=30)
    assert again.returncode == 143 and "after 3 restarts" in out, "it is not put back for ever"


@pytest.mark.parametrize(("body", "code"), [("exit 5", 5), ("kill -SEGV $$", 139), ("exit 0", 0)])
def test_the_exit_code_is_that_of_the_job(tmp_path: Path, body: str, code: int) -> None:
    python = fake(tmp_path, "python", body)
    job = run_script(tmp_path, render(SubmitSpec(command=("t.py",)), python=python, workdir=str(tmp_path)))
    job.communicate(timeout=30)
    assert job.returncode == code


def test_states() -> None:
    assert read_state("JobState=PENDING Reason=Resources ExitCode=0:0").detail == "Resources"
    assert read_state("JobState=RUNNING Reason=None").phase == "running"
    assert read_state("JobState=COMPLETED ExitCode=0:0\nJobState=RUNNING ExitCode=0:0").phase == "running"
    assert read_state("JobState=COMPLETED ExitCode=0:0").phase == "succeeded"
    failed = read_state("JobState=COMPLETED ExitCode=0:0\nJobState=FAILED ExitCode=3:0")
    assert (failed.phase, failed.detail, failed.exit_code) == ("failed", "FAILED", 3)
    assert read_state("JobState=CANCELLED ExitCode=0:15").exit_code == 143
    assert read_state("").phase == "failed"


def test_places_of_tasks() -> None:
    assert expand_counts("2(x2),1") == (2, 2, 1)
    planned = assign([Host("a", 2), Host("b", 2), Host("c", 1)], 5)
    for slot, node in zip(planned, (0, 0, 1, 1, 2), strict=True):
        said = {"SLURM_PROCID": str(slot.rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(slot.local_rank)}
        assert place(said | {"SLURMD_NODENAME": slot.hostname}, (2, 2, 1)) == slot


def test_srun_command(tmp_path: Path) -> None:
    hosts = (Host("a", 2), Host("b", 2))
    spec = JobSpec(
        command=("x",), num_proc=4, hosts=hosts, slots=assign(hosts, 4), run_dir=tmp_path,
        environment={"SLURM_CPUS_PER_TASK": "3", "TOKEN": "secret"}, flags={"nics": ["ib0"]},
    )  # fmt: skip
    argv = render_srun(spec, ["supervisor"])
    assert {"--ntasks=4", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3"} <= set(argv)
    assert argv[argv.index("--tasks") + 1] == "2,2" and argv[argv.index("--nics") + 1] == "ib0"
    assert argv[-2:] == ["--", "supervisor"] and not any("secret" in word for word in argv)
