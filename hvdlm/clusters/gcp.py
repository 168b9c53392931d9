"""Google Cloud: a Batch job as JSON, and the gcloud commands that submit, follow and cancel it.

One task runs on each machine. With several machines every task serves ssh in its container, and the first starts the
workers of all; barriers keep the others up until it has ended. Untested against the real service.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from hvdlm.clusters.follow import JobState, Tool
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.clusters.words import run_words, script_words
from hvdlm.errors import ConfigError

__all__ = ["GcpCluster", "read_state", "render"]

_ENTRYPOINT = "/usr/local/bin/hvdlm-entrypoint"
_PREEMPTED = 50001
"""What Batch gives a task as its exit code when its spot machine is taken away."""
_SECRET = re.compile(r"projects/[^/]+/secrets/[^/]+/versions/[^/]+")


def render(spec: SubmitSpec) -> str:
    """The job as ``gcloud batch jobs submit --config`` reads it.

    Args:
        spec: The job.

    Raises:
        ConfigError: The spec lacks what Batch needs, or has what it cannot express.
    """
    if not spec.image:
        raise ConfigError(
            "gcp runs an image, and none was given.", hint="--image REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG"
        )
    if not spec.region:
        raise ConfigError("gcp needs a region.", hint="--region europe-west4")
    if spec.elastic:
        raise ConfigError(
            "a Batch job keeps its number of machines: --min-np and --max-np are not for it.",
            hint="leave them out; on GKE: hvdlm submit kubernetes --min-np 2 --spot",
        )
    task: dict[str, Any] = {
        "runnables": _runnables(spec),
        "computeResource": _compute(spec),
        "maxRetryCount": spec.max_restarts,
        "environment": _environment(spec),
        "volumes": [{"gcs": {"remotePath": bucket}, "mountPath": path} for bucket, path in _volumes(spec)],
    }
    if spec.max_restarts:
        task["lifecyclePolicies"] = [{"action": "RETRY_TASK", "actionCondition": {"exitCodes": [_PREEMPTED]}}]
    if spec.time_limit_seconds:
        task["maxRunDuration"] = f"{spec.time_limit_seconds}s"
    policy: dict[str, Any] = {"provisioningModel": "SPOT" if spec.spot else "STANDARD"}
    if spec.machine_type:
        policy["machineType"] = spec.machine_type
    instances: dict[str, Any] = {"policy": policy}
    if spec.accelerator:
        policy["accelerators"] = [{"type": spec.accelerator, "count": max(1, spec.gpus_per_worker) * spec.on_each}]
        instances["installGpuDrivers"] = True
    elif spec.gpus_per_worker:
        raise ConfigError("--gpus-per-worker needs to know which on gcp.", hint="--accelerator nvidia-l4")
    allocation: dict[str, Any] = {
        "instances": [instances],
        "location": {"allowedLocations": [f"regions/{spec.region}"]},
        "labels": {"managed-by": "hvdlm"},
    }
    if spec.service_account:
        allocation["serviceAccount"] = {"email": spec.service_account}
    group: dict[str, Any] = {
        "taskSpec": task,
        "taskCount": spec.nodes,
        "parallelism": spec.nodes,
        "taskCountPerNode": 1,
    }
    if spec.nodes > 1:
        group |= {"requireHostsFile": True, "permissiveSsh": True}
    job = {
        "taskGroups": [group],
        "allocationPolicy": allocation,
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
        "labels": {"managed-by": "hvdlm"},
    }
    return json.dumps(job, indent=2, ensure_ascii=False) + "\n"


def _runnables(spec: SubmitSpec) -> list[dict[str, Any]]:
    hosts = ("--hostfile", "/tmp/hvdlm-hosts", "--ssh-port", "2222") if spec.nodes > 1 else ()
    run_dir = ("--run-dir", spec.run_dir) if spec.run_dir else ()
    command = ["hvdlm", *run_words(spec, *hosts), *run_dir, *script_words(spec)]
    if spec.nodes == 1:
        return [_container(spec, command)]
    return [
        _container(spec, ["worker"]) | {"background": True, "ignoreExitStatus": True},
        {"barrier": {"name": "all-serve-ssh"}},
        _container(spec, ["batch-main", str(spec.on_each), *command]),
        {"barrier": {"name": "all-have-ended"}},
    ]


def _container(spec: SubmitSpec, words: list[str]) -> dict[str, Any]:
    volumes = [f"{path}:{path}:rw" for _, path in _volumes(spec)]
    options = "--shm-size=8g"
    if spec.nodes > 1:
        # The keys that permissiveSsh makes belong to root of the machine; the entry point copies them.
        volumes.append("/root/.ssh:/run/batch-ssh:ro")
        volumes.append("/etc/cloudbatch-taskgroup-hosts:/run/batch-hosts:ro")
        options += " --network=host"
    if spec.accelerator:
        options += " --gpus all"
    container: dict[str, Any] = {
        "imageUri": spec.image, "entrypoint": _ENTRYPOINT, "commands": words, "options": options,
    }  # fmt: skip
    if volumes:
        container["volumes"] = volumes
    return {"container": container}


def _compute(spec: SubmitSpec) -> dict[str, int]:
    found = {"cpuMilli": 1000 * spec.cpus_per_worker * spec.on_each}
    if spec.memory_mib:
        found["memoryMib"] = spec.memory_mib * spec.on_each
    return found


def _environment(spec: SubmitSpec) -> dict[str, Any]:
    found: dict[str, Any] = {
        "variables": {"OMP_NUM_THREADS": str(spec.cpus_per_worker), **dict(sorted(spec.env.items()))}
    }
    for name, reference in sorted(spec.secrets.items()):
        if not _SECRET.fullmatch(reference):
            raise ConfigError(
                f"secret {name}: {reference!r} is no version of a secret in Secret Manager.",
                hint=f"--secret {name}=projects/PROJECT/secrets/NAME/versions/latest",
            )
        found.setdefault("secretVariables", {})[name] = reference
    return found


def _volumes(spec: SubmitSpec) -> list[tuple[str, str]]:
    found = []
    for source, path in spec.volumes.items():
        if not re.fullmatch(r"gs://[a-z0-9][-a-z0-9_.]+(/[^:]*)?", source) or not re.fullmatch(r"/[^:]+", path):
            raise ConfigError(f"volume {source}={path} is not allowed; gs://bucket/folder=/path is.",
                              hint="--volume gs://my-bucket=/mnt/disks/data")  # fmt: skip
        found.append((source.removeprefix("gs://"), path))
    return found


_PHASES = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELLED": "failed", "RUNNING": "running"}


def read_state(shown: str) -> JobState:
    """The state of a job from ``gcloud batch jobs describe NAME --format=json``."""
    status = json.loads(shown).get("status") or {}
    state = str(status.get("state") or "STATE_UNSPECIFIED")
    phase = _PHASES.get(state, "waiting")
    if phase == "failed":
        events = [str(event.get("description") or "") for event in status.get("statusEvents") or []]
        return JobState("failed", detail=(events or [""])[-1] or state, exit_code=1)
    return JobState(phase, detail=state.lower() if phase == "waiting" else "")


class GcpCluster:
    """Submits to Batch with gcloud."""

    def __init__(self, spec: SubmitSpec) -> None:
        self._tool = Tool("gcp", spec.name)
        self._job = f"{spec.name}-{time.strftime('%y%m%d%H%M%S')}-{os.getpid() % 1000:03}"
        self._project = (f"--project={spec.project}",) if spec.project else ()
        self._location = (*self._project, f"--location={spec.region}")
        self._uid = ""
        self._shown: set[str] = set()
        self._since = ""
        self._next_look = 0.0

    def submit(self, path: Path) -> str:
        """Create the job; returns its name."""
        self._tool.require("gcloud", "https://cloud.google.com/sdk/docs/install, or look at it with --dry-run")
        shown = self._tool.ask("gcloud", "batch", "jobs", "submit", self._job, *self._location, f"--config={path}",
                               "--format=json", timeout=180)  # fmt: skip
        self._uid = str((json.loads(shown) if shown.strip() else {}).get("uid") or "")
        return self._job

    def state(self, job: str) -> JobState:
        """What Batch says about the job."""
        return read_state(self._tool.ask("gcloud", "batch", "jobs", "describe", job, *self._location, "--format=json"))

    def output(self, job: str) -> bytes:
        """What Cloud Logging has got since the last call; asked for every few seconds."""
        if not self._uid or time.monotonic() < self._next_look:
            return b""
        self._next_look = time.monotonic() + 3.0
        query = f'labels.job_uid="{self._uid}" AND logName:"batch_task_logs"'
        if self._since:
            query += f' AND timestamp>="{self._since}"'
        shown = self._tool.ask(
            "gcloud", "logging", "read", query, *self._project, "--order=asc", "--limit=5000", "--format=json"
        )
        new = b""
        for entry in json.loads(shown or "[]"):
            # Several entries may have one time: it is asked for again, and what was shown is left out.
            if entry["insertId"] not in self._shown:
                self._shown.add(entry["insertId"])
                self._since = entry["timestamp"]
                new += str(entry.get("textPayload", "")).encode() + b"\n"
        return new

    def cancel(self, job: str) -> None:
        """End the job; it stays listed."""
        self._tool.ask("gcloud", "batch", "jobs", "cancel", job, *self._location, "--quiet", timeout=180)

    def close(self) -> None:
        """Nothing is open between two calls."""

    def commands(self, job: str) -> str:
        """What a person types to follow and end it by hand."""
        where = " ".join(self._location)
        return f"gcloud batch jobs describe {job} {where}; gcloud batch jobs cancel {job} {where}"
