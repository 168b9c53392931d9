"""One description for all targets: from flags, from YAML, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdlm.clusters.read_spec import FIELDS, make_spec
from hvdlm.clusters.spec import TARGETS, SubmitSpec
from hvdlm.errors import ConfigError
from hvdlm.units import clock, mebibytes, seconds

FULL = """
script: train.py
args: [--epochs, 3]
options: {compression: fp16, weights: [1, 2]}
num_proc: 4
workers-per-node: 2
env: {A: 1, B: x y}
secrets: {HF_TOKEN: hf/token}
time_limit: 90m
memory_per_worker: 2G
setup: [module load cuda]
"""


def made(tmp_path: Path, text: str, target: str = "slurm", words: tuple[str, ...] = (), **flags: Any) -> SubmitSpec:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return make_spec(target, str(path), flags, {}, words)


def test_a_file_has_all(tmp_path: Path) -> None:
    spec = made(tmp_path, FULL)
    assert spec.command == ("train.py", "--epochs", "3") and spec.name == "train"
    assert spec.options == {"compression": "fp16", "weights": "1,2"}
    assert (spec.nodes, spec.on_each) == (2, 2)
    assert spec.env == {"A": "1", "B": "x y"} and spec.secrets == {"HF_TOKEN": "hf/token"}
    assert (spec.time_limit_seconds, spec.memory_mib) == (5400, 2048)
    assert spec.setup == ("module load cuda",)


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    spec = made(tmp_path, FULL, words=("other.py", "-x"), num_proc="2", env=("B=z=1", "C="))
    assert spec.command == ("other.py", "-x") and spec.num_proc == 2
    assert spec.env == {"A": "1", "B": "z=1", "C": ""}


def test_flags_of_another_target_are_refused_but_files_may_hold_them(tmp_path: Path) -> None:
    assert made(tmp_path, "script: a.py\nimage: x\n").image == "x"
    with pytest.raises(ConfigError, match="image is not for slurm, only for gcp, kubernetes"):
        made(tmp_path, "script: a.py", image="x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "names and values are needed, not list"),
        ("num_prox: 2", "did you mean 'num_proc'"),
        ("{script: a.py, num_proc: two}", "num_proc cannot be 'two'"),
        ("{script: a.py, num_proc: 0}", "num_proc: 0 is not allowed"),
        ("{script: a.py, num_proc: 3, workers_per_node: 2}", "3 workers do not fill"),
        ("{script: a.py, env: {A-B: 1}}", "'A-B' is no name of a variable"),
        ("{script: a.py, env: {A: 1}, secrets: {A: x/y}}", "both a variable and a secret"),
        ("{script: a.py, env: {HF_TOKEN: hf_abcdefgh}}", "HINT: --secret HF_TOKEN"),
        ('{script: a.py, env: {DB: "pg://me:pa55word@db"}}', "the value of DB looks like a secret"),
        ("{script: a.py, time_limit: soon}", "'soon' is no time"),
        ("{script: a.py, memory_per_worker: much}", "'much' is no size"),
        ("{script: a.py, name: 'a b'}", "HINT: --name a-b"),
        ('{script: a.py, queue: "a\\nb"}', "line break"),
        ("{script: a.py, args: x}", "args is a list"),
        ("{script: a.py, options: {speed: 1}}", "options are names and values"),
        ("{script: a.py, options: {compression: zip}}", "compression"),
        ("{script: a.py, min_num_proc: 3}", "--min-np 3 does not go with -np 1"),
        ("{num_proc: 2}", "no script was given"),
        ("{script: [}", "is not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, text)
    assert said in str(caught.value)


def test_units() -> None:
    assert [mebibytes("m", text) for text in ("1G", "1.5GiB", "300M", "1T")] == [1024, 1536, 300, 2**20]
    assert [seconds("t", text) for text in ("45s", "2h", "1d", "0:30", "1-00:00:01")] == [45, 7200, 86400, 1800, 86401]
    assert clock(90061) == "1-01:01:01"


def test_every_field_is_a_flag_with_help() -> None:
    assert set(FIELDS) == set(SubmitSpec.__dataclass_fields__) - {"command", "options"}
    for field in FIELDS.values():
        assert field.metadata["help"] and set(field.metadata["targets"]) <= set(TARGETS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["moon", "a.py"], "no target 'moon'; the targets are: dask, gcp, kubernetes, slurm, spark."),
        (["slurm", "--spec", "missing.yaml"], "cannot be read"),
        (["slurm", "--imagine", "a.py"], "unknown flag '--imagine'"),
        (["slurm", "--dry-run"], "no script was given"),
        (["slurm", "-o", "/proc/nowhere/x", "--dry-run", "a.py"], "cannot be written"),
    ],
)
def test_bad_command_lines(tmp_path: Path, words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "hvdlm", "submit", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
