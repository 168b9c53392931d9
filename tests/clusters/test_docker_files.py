"""Dockerfiles, the compose file and the entry point: linted, checked, and the entry point run for real."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.multiprocess.workers import ROOT, which

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


def test_there_is_one_for_cpu_and_one_for_gpu() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    done = subprocess.run([which("hadolint"), str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_pinned_multi_stage_and_not_root(path: Path) -> None:
    text = path.read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    # Every base is one of a release at a date or version.
    assert re.search(r"^ARG (BASE|CUDA)=\S*\d{8}|^ARG CUDA=\d+\.\d+\.\d+", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000:1000"
    requirements = (DOCKER / f"requirements-{path.suffix[1:]}.txt").read_text()
    for line in requirements.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.+]+", line), line
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert name == "wheels/" or (ROOT / name).exists(), name


def test_compose() -> None:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    schema = json.loads((Path(__file__).parent / "compose.schema.json").read_text())
    jsonschema.validate(content, schema)
    services = content["services"]
    assert {name for each in services.values() for name in each.get("depends_on", {})} <= set(services)
    hosts = services["host1"]["command"][services["host1"]["command"].index("-H") + 1]
    assert {part.partition(":")[0] for part in hosts.split(",")} == {
        each["hostname"] for each in services.values() if "hostname" in each
    }
    assert not any("PRIVATE" in path.read_text(errors="replace") for path in DOCKER.iterdir()), "keys are generated"
    services["host1"]["comand"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


@pytest.mark.parametrize("name", ["entrypoint", "build"])
def test_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(DOCKER / name)], timeout=30, check=True)
    assert (DOCKER / name).stat().st_mode & 0o111


def entrypoint(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DOCKER / "entrypoint"), *words],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_entrypoint_runs_programs_and_makes_keys(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    words = ["a b", "$(x)", "it's", ""]
    done = entrypoint(tmp_path, "printf", "[%s]", *words)
    assert (done.returncode, done.stdout) == (0, "".join(f"[{word}]" for word in words))
    assert entrypoint(tmp_path, "keys").returncode == 0
    key = (tmp_path / ".ssh" / "id_ed25519").read_bytes()
    assert (tmp_path / ".ssh" / "authorized_keys").read_text().startswith("ssh-ed25519 ")
    assert entrypoint(tmp_path, "keys").returncode == 0
    assert (tmp_path / ".ssh" / "id_ed25519").read_bytes() == key, "made once"


def test_only_the_first_machine_of_a_batch_job_runs_it(tmp_path: Path) -> None:
    assert entrypoint(tmp_path, "batch-main", "2", "false", BATCH_TASK_INDEX="1").returncode == 0
