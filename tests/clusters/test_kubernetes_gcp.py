"""Manifests for Kubernetes and Google Cloud: text, schema, hostile words; submitted through stand-ins of the tools.

kubectl and gcloud are local scripts here that write down what they are asked: nothing ran on the real services.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hvdlm.clusters import gcp, kubernetes
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.errors import ConfigError
from tests.clusters.kept import assert_golden

SCHEMA = json.loads((Path(__file__).parent / "mpijob.schema.json").read_text())
HOSTILE = ["it's", '"q"', "$(HOME)", "$$", "- a: b", "{x}", "ünï", "--", "-n", "a\nb", "yes", "1e3", ""]
K8S: dict[str, Any] = {
    "command": ("/app/train.py", "--epochs", "3"),
    "options": {"compression": "fp16"},
    "num_proc": 4,
    "workers_per_node": 2,
    "cpus_per_worker": 8,
    "gpus_per_worker": 1,
    "memory_per_worker": "16G",
    "time_limit": "12h",
    "image": "registry.example/hvdlm:1",
    "env": {"DATA": "/data/my texts"},
    "secrets": {"HF_TOKEN": "hugging-face/token"},
    "volumes": {"corpus": "/data"},
    "checkpoint_dir": "/data/checkpoints",
}
ELASTIC = {**K8S, "min_num_proc": 2, "max_num_proc": 8, "spot": True, "queue": "team-a", "namespace": "nlp"}
GCP: dict[str, Any] = {
    **{name: value for name, value in K8S.items() if name not in ("secrets", "volumes", "checkpoint_dir")},
    "image": "europe-west4-docker.pkg.dev/my-project/training/hvdlm:1",
    "secrets": {"HF_TOKEN": "projects/my-project/secrets/hf/versions/latest"},
    "volumes": {"gs://my-corpus/texts": "/mnt/disks/data"},
    "checkpoint_dir": "gs://my-corpus/checkpoints",
    "project": "my-project",
    "region": "europe-west4",
    "machine_type": "g2-standard-24",
    "accelerator": "nvidia-l4",
    "service_account": "trainer@my-project.iam.gserviceaccount.com",
    "spot": True,
}


@pytest.mark.parametrize(("name", "fields"), [("mpijob.yaml", K8S), ("mpijob-elastic.yaml", ELASTIC)])
def test_mpijob(name: str, fields: dict[str, Any]) -> None:
    text = kubernetes.render(SubmitSpec(**fields))
    jsonschema.validate(yaml.safe_load(text), SCHEMA)
    assert_golden(name, text)


@pytest.mark.parametrize("fields", [K8S, ELASTIC])
def test_the_schema_finds_what_is_misspelt(fields: dict[str, Any]) -> None:
    job = yaml.safe_load(kubernetes.render(SubmitSpec(**fields)))
    job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["envs"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def expanded(text: str) -> str:
    """What Kubernetes makes of a word: $$ is $, and there must be no $(NAME) that it would replace."""
    rest = text.replace("$$", "")
    assert "$" not in rest, text
    return text.replace("$$", "$")


def test_hostile_words_in_a_mpijob() -> None:
    spec = SubmitSpec(command=("/app/it's.py", *HOSTILE), env={"EVIL": "$(PATH) 'x'"}, image="i")
    job = yaml.safe_load(kubernetes.render(spec))
    jsonschema.validate(job, SCHEMA)
    container = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    words = [expanded(word) for word in container["args"]]
    assert words[words.index("--") + 1 :] == ["/app/it's.py", *HOSTILE]
    assert {"name": "EVIL", "value": "$$(PATH) 'x'"} in container["env"]


def test_no_secret_is_in_a_file() -> None:
    for job in (yaml.safe_load(kubernetes.render(SubmitSpec(**K8S))),):
        for replica in job["spec"]["mpiReplicaSpecs"].values():
            (container,) = replica["template"]["spec"]["containers"]
            (entry,) = [entry for entry in container["env"] if entry["name"] == "HF_TOKEN"]
            assert entry["valueFrom"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}


@pytest.mark.parametrize(
    ("module", "fields", "said"),
    [
        (kubernetes, {"image": ""}, "--image"),
        (kubernetes, {"secrets": {"A": "plain"}}, "kubectl create secret"),
        (kubernetes, {"volumes": {"c": "relative"}}, "CLAIM=/path"),
        (gcp, {"image": ""}, "docker.pkg.dev"),
        (gcp, {"region": ""}, "--region"),
        (gcp, {"max_num_proc": 8}, "hvdlm submit kubernetes"),
        (gcp, {"secrets": {"A": "a/b"}}, "versions/latest"),
        (gcp, {"volumes": {"bucket": "/x"}}, "gs://bucket"),
        (gcp, {"accelerator": ""}, "--accelerator"),
    ],
)
def test_what_is_refused(module: Any, fields: dict[str, Any], said: str) -> None:
    base = K8S if module is kubernetes else GCP
    with pytest.raises(ConfigError) as caught:
        module.render(SubmitSpec(**{**base, **fields}))
    assert said in str(caught.value)


def test_batch_job() -> None:
    text = gcp.render(SubmitSpec(**GCP))
    assert_golden("batch.json", text)
    job = json.loads(text)
    (group,) = job["taskGroups"]
    assert group["taskCount"] == group["parallelism"] == 2 and group["permissiveSsh"] is True
    (instances,) = job["allocationPolicy"]["instances"]
    assert instances["policy"]["provisioningModel"] == "SPOT"
    assert group["taskSpec"]["lifecyclePolicies"][0]["actionCondition"] == {"exitCodes": [50001]}


def test_batch_job_on_one_machine_needs_no_ssh() -> None:
    job = json.loads(gcp.render(SubmitSpec(**{**GCP, "num_proc": 2, "command": ("/a.py", *HOSTILE)})))
    (group,) = job["taskGroups"]
    (runnable,) = group["taskSpec"]["runnables"]
    words = runnable["container"]["commands"]
    assert words[words.index("--") + 1 :] == ["/a.py", *HOSTILE]
    assert "permissiveSsh" not in group and "network" not in runnable["container"]["options"]


def test_states() -> None:
    def mpijob(**conditions: str) -> str:
        return json.dumps({"status": {"conditions": [{"type": t, "status": s} for t, s in conditions.items()]}})

    assert kubernetes.read_state("{}").phase == "waiting"
    assert kubernetes.read_state(mpijob(Created="True", Running="True")).phase == "running"
    assert kubernetes.read_state(mpijob(Running="False", Restarting="True")).phase == "waiting"
    assert kubernetes.read_state(mpijob(Running="False", Succeeded="True")).phase == "succeeded"
    assert kubernetes.read_state(mpijob(Failed="True")).exit_code == 1
    assert gcp.read_state('{"status": {"state": "QUEUED"}}').detail == "queued"
    failed = gcp.read_state('{"status": {"state": "FAILED", "statusEvents": [{"description": "task 0 exited 7"}]}}')
    assert (failed.phase, failed.detail) == ("failed", "task 0 exited 7")


KUBECTL = """#!/bin/bash
printf '%s\\n' "$*" >> "$FAKE/calls"
case "$*" in
*create*) echo -n train-abc12 ;;
*logs*since-time*) sleep 60 ;;
*logs*) echo "epoch 1  loss 2.5"; touch "$FAKE/shown"; sleep 60 ;;
*get*) if [ -e "$FAKE/done" ]; then echo '{"status":{"conditions":[{"type":"'$(cat "$FAKE/done")'","status":"True"}]}}'
       else echo '{"status":{"conditions":[{"type":"Running","status":"True"}]}}'; fi ;;
*delete*) echo Failed > "$FAKE/done" ;;
esac
"""
GCLOUD = """#!/bin/bash
printf '%s\\n' "$*" >> "$FAKE/calls"
case "$*" in
*"jobs submit"*) echo '{"uid": "u-1"}' ;;
*"logging read"*) touch "$FAKE/shown"
    echo '[{"insertId": "1", "timestamp": "2026-01-01T00:00:00Z", "textPayload": "epoch 1  loss 2.5"}]' ;;
*describe*) if [ -e "$FAKE/done" ]; then echo '{"status":{"state":"'$(cat "$FAKE/done" | tr a-z A-Z)'"}}'
       else echo '{"status":{"state":"RUNNING"}}'; fi ;;
*cancel*) echo CANCELLED > "$FAKE/done" ;;
esac
"""
TOOLS = {
    "kubernetes": ("kubectl", KUBECTL, ["--image", "i"]),
    "gcp": ("gcloud", GCLOUD, ["--image", "i", "--region", "r", "--project", "p"]),
}


def start(tmp_path: Path, target: str) -> subprocess.Popen[str]:
    tool, script, flags = TOOLS[target]
    path = tmp_path / "bin" / tool
    path.parent.mkdir()
    path.write_text(script)
    path.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-m", "hvdlm", "submit", target, *flags, "/app/train.py"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}", "FAKE": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("target", sorted(TOOLS))
def test_submitted_followed_and_ended(tmp_path: Path, target: str) -> None:
    job = start(tmp_path, target)
    wait_for(tmp_path / "shown")
    time.sleep(1.5)  # one more look: what was shown is not shown again
    (tmp_path / "done").write_text("Succeeded")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert out.count("epoch 1  loss 2.5") == 1
    calls = (tmp_path / "calls").read_text()
    assert ("create --filename=" if target == "kubernetes" else "batch jobs submit train-") in calls


@pytest.mark.parametrize("target", sorted(TOOLS))
def test_ctrl_c_ends_the_job(tmp_path: Path, target: str) -> None:
    job = start(tmp_path, target)
    wait_for(tmp_path / "shown")
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130 and "was cancelled" in err
    assert ("delete mpijob train-abc12" if target == "kubernetes" else "batch jobs cancel train-") in (
        tmp_path / "calls"
    ).read_text()


@pytest.mark.parametrize("target", sorted(TOOLS))
def test_a_tool_that_is_not_there(tmp_path: Path, target: str) -> None:
    tool, _, flags = TOOLS[target]
    done = subprocess.run(
        [sys.executable, "-m", "hvdlm", "submit", target, *flags, "a.py"],
        cwd=tmp_path, env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"{tool} is not installed here" in done.stderr
