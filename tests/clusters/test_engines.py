"""``hvdlm submit spark|dask``: the script's text, hostile words, and a script of a person's run on both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdlm.clusters.engines import render_dask, render_spark
from hvdlm.clusters.on_engine import _parse
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.errors import ConfigError
from tests.clusters.kept import assert_golden
from tests.clusters.test_slurm_render import HOSTILE, bash_n, fake
from tests.clusters.trained import WORDS, check_summary
from tests.multiprocess.workers import ROOT

BOTH = [(render_dask, {"scheduler": "tcp://10.0.0.1:8786"}), (render_spark, {"master": "spark://head:7077"})]


@pytest.mark.parametrize(("render", "fields"), BOTH)
def test_golden(render: Callable[..., str], fields: dict[str, str]) -> None:
    spec = SubmitSpec(
        command=("train.py", "--epochs", "3"),
        options={"compression": "fp16"},
        num_proc=4,
        env={"DATA": "/shared/my data"},
        secrets={"HF_TOKEN": ""},
        checkpoint_dir="/shared/ck",
        **fields,  # type: ignore[arg-type]
    )
    text = render(spec, python="/opt/venv/bin/python", workdir="/shared/project").replace(str(ROOT), "/opt")
    bash_n(text)
    assert_golden(f"{render.__name__.removeprefix('render_')}.sh", text)


@pytest.mark.parametrize(("render", "fields"), BOTH)
def test_hostile_words_arrive_as_they_are(tmp_path: Path, render: Callable[..., str], fields: dict[str, str]) -> None:
    for name in ("python", "spark-submit"):
        fake(tmp_path, name, f'printf "%s\\0" "$@" > {tmp_path}/words; printf "%s" "$EVIL" > {tmp_path}/evil')
    directory = tmp_path / "dir with ' and $(touch HACKED)"
    directory.mkdir()
    spec = SubmitSpec(
        command=("train.py", *HOSTILE), env={"EVIL": "$(touch HACKED)\n'"}, secrets={"TOKEN": ""}, **fields
    )  # type: ignore[arg-type]
    script = tmp_path / "job.sh"
    script.write_text(render(spec, python=str(tmp_path / "bin" / "python"), workdir=str(directory)))
    environment = {"PATH": os.environ["PATH"], "TOKEN": "hunter2"}
    subprocess.run(["bash", str(script)], env=environment, timeout=30, check=True)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    given = _parse(words[words.index("dask" if "scheduler" in fields else "spark") :])
    assert given.command == ["train.py", *HOSTILE] and given.workdir == str(directory)
    assert (tmp_path / "evil").read_text() == "$(touch HACKED)\n'"
    assert not list(tmp_path.rglob("HACKED")) and "hunter2" not in script.read_text() + "".join(words)
    missing = subprocess.run(
        ["bash", str(script)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30, check=False
    )
    assert missing.returncode != 0 and "TOKEN" in missing.stderr, "a secret that is not set is said at once"


def test_what_is_refused() -> None:
    for render, hint in ((render_dask, "--scheduler"), (render_spark, "--master")):
        with pytest.raises(ConfigError, match=hint):
            render(SubmitSpec(command=("a.py",)))


def submit(tmp_path: Path, *words: str) -> str:
    script = str(ROOT / "examples" / "gpt_torch" / "train_hvdlm.py")
    command = [sys.executable, "-m", "hvdlm", "submit", *words, "-np", "2", "--run-dir", "run", script, *WORDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert check_summary(tmp_path / "run", 2)["options"]["compression"] == "fp16"
    return done.stdout + done.stderr


@pytest.mark.lab
@pytest.mark.timeout(300)
def test_a_script_on_dask(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(tmp_path / "at.json")]
    program = [sys.executable, "-m", "distributed.cli.dask_scheduler", *arguments]
    assert distributed
    processes = [subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(tmp_path / "at.json")]
    worker += ["--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    processes.append(
        subprocess.Popen(
            [*worker, "--local-directory", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    )
    try:
        with distributed.Client(scheduler_file=str(tmp_path / "at.json"), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        told = submit(tmp_path, "dask", "--scheduler", address, "--compression", "fp16")
        assert "identical bit for bit" in told
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


@pytest.mark.lab
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_a_script_on_spark_with_executors_of_their_own(tmp_path: Path) -> None:
    """``local-cluster``: a master, two workers and their executors, all processes."""
    pytest.importorskip("pyspark")
    submit(tmp_path, "spark", "--master", "local-cluster[2,1,1024]", "--compression", "fp16")
