"""Kubernetes: an ``MPIJob`` (kubeflow.org/v2beta1) as YAML, and the kubectl commands that submit and follow it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hvdlm.clusters.follow import JobState, Stream, Tool
from hvdlm.clusters.spec import SubmitSpec
from hvdlm.clusters.words import run_words, script_words
from hvdlm.errors import ConfigError

__all__ = ["KubernetesCluster", "read_state", "render"]

_ENTRYPOINT = "/usr/local/bin/hvdlm-entrypoint"
_USER = 1000
"""Of the images in docker/; their ssh keys are mounted where this user looks for them."""
_SSH_MOUNT = "/home/hvdlm/.ssh"
_HOSTS = "/etc/mpi/hostfile"
_DISCOVERY = "/etc/mpi/discover_hosts.sh"
_SECRET = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)/([-._a-zA-Z0-9]+)")
_LAUNCHER_RESOURCES = {"cpu": "1", "memory": "1Gi"}
_SPOT_SECONDS = 25
"""A spot node of GKE ends its pods within this time of the notice."""


def render(spec: SubmitSpec) -> str:
    """The manifest of a job.

    Args:
        spec: The job.

    Raises:
        ConfigError: The spec lacks the image, or has what an MPIJob cannot express.
    """
    if not spec.image:
        raise ConfigError("kubernetes runs an image, and none was given.", hint="--image REGISTRY/NAME:TAG")
    discovery = ("--host-discovery-script", _DISCOVERY) if spec.elastic else ("--hostfile", _HOSTS)
    run_dir = ("--run-dir", spec.run_dir) if spec.run_dir else ()
    command = ["hvdlm", *run_words(spec, *discovery), *run_dir, *script_words(spec)]
    labels = {"app.kubernetes.io/managed-by": "hvdlm"}
    if spec.queue:
        labels["kueue.x-k8s.io/queue-name"] = spec.queue
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": spec.max_restarts}
    if spec.time_limit_seconds:
        policy["activeDeadlineSeconds"] = spec.time_limit_seconds
    pods = -(-(spec.max_num_proc or spec.num_proc) // spec.workers_per_node)
    job = {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"generateName": f"{spec.name}-", "namespace": spec.namespace, "labels": labels},
        "spec": {
            "slotsPerWorker": spec.workers_per_node,
            "mpiImplementation": "OpenMPI",
            "sshAuthMountPath": _SSH_MOUNT,
            # An elastic job starts with the workers there are.
            "launcherCreationPolicy": "AtStartup" if spec.elastic else "WaitForWorkersReady",
            "runPolicy": policy,
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "OnFailure",
                    "template": _pod(spec, "launcher", [_ENTRYPOINT, *command], dict(_LAUNCHER_RESOURCES)),
                },
                "Worker": {
                    "replicas": pods,
                    "restartPolicy": "OnFailure",
                    "template": _pod(spec, "worker", [_ENTRYPOINT, "worker"], _resources(spec)),
                },
            },
        },
    }
    text: str = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=120)
    return "# Written by: hvdlm submit kubernetes\n" + text


def _resources(spec: SubmitSpec) -> dict[str, str]:
    """Of a worker pod; limits and requests alike, so that it is the last to be evicted."""
    found = {"cpu": str(spec.cpus_per_worker * spec.workers_per_node)}
    if spec.memory_mib:
        found["memory"] = f"{spec.memory_mib * spec.workers_per_node}Mi"
    if spec.gpus_per_worker:
        found[spec.gpu_resource] = str(spec.gpus_per_worker * spec.workers_per_node)
    return found


def _pod(spec: SubmitSpec, name: str, command: list[str], resources: dict[str, str]) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]  # MPI and loaders of data need more than the usual 64 MB
    for number, (claim, path) in enumerate(spec.volumes.items()):
        if not path.startswith("/") or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", claim):
            raise ConfigError(f"volume {claim}={path} is not allowed; CLAIM=/path is.", hint="--volume my-claim=/data")
        volumes.append({"name": f"data-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"data-{number}", "mountPath": path})
    container = {
        "name": name,
        "image": spec.image,
        # Always as words, never a line of shell.
        "command": command[:1],
        "args": [_literal(word) for word in command[1:]],
        "env": _environment(spec),
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {
            "runAsUser": _USER,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    else:
        pod["automountServiceAccountToken"] = False
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.spot and name == "worker":
        # The launcher stays: it brings the job back after its workers were taken away.
        pod["nodeSelector"] = {**spec.node_selector, "cloud.google.com/gke-spot": "true"}
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
        pod["terminationGracePeriodSeconds"] = _SPOT_SECONDS
    return {"metadata": {"labels": {"app.kubernetes.io/managed-by": "hvdlm"}}, "spec": pod}


def _environment(spec: SubmitSpec) -> list[dict[str, Any]]:
    values = {"OMP_NUM_THREADS": str(spec.cpus_per_worker), **spec.env}
    found: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in sorted(values.items())]
    for name, reference in sorted(spec.secrets.items()):
        match = _SECRET.fullmatch(reference)
        if match is None:
            raise ConfigError(
                f"secret {name}: {reference!r} names no key of a Secret; SECRET/KEY does.",
                hint=f"kubectl create secret generic mine --from-literal=key=...; --secret {name}=mine/key",
            )
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": match[1], "key": match[3]}}})
    return found


def _literal(text: str) -> str:
    """A text in which Kubernetes replaces nothing: it knows ``$(NAME)``, and ``$$`` for the sign itself."""
    return text.replace("$", "$$")


def read_state(shown: str) -> JobState:
    """The state of a job from ``kubectl get mpijob NAME -o json``."""
    conditions = (json.loads(shown).get("status") or {}).get("conditions") or []
    said = {entry["type"]: entry for entry in conditions if entry.get("status") == "True"}
    if "Succeeded" in said:
        return JobState("succeeded")
    if "Failed" in said:
        return JobState("failed", detail=str(said["Failed"].get("message") or "Failed"), exit_code=1)
    for name, phase in (("Suspended", "waiting"), ("Restarting", "waiting"), ("Running", "running")):
        if name in said:
            return JobState(phase, detail="" if phase == "running" else name.lower())
    return JobState("waiting", detail="pods are being made")


class KubernetesCluster:
    """Submits to the cluster of kubectl's current context."""

    def __init__(self, spec: SubmitSpec) -> None:
        self._tool = Tool("kubernetes", spec.name)
        self._kubectl = ("kubectl", f"--namespace={spec.namespace}")
        self._stream: Stream | None = None

    def submit(self, path: Path) -> str:
        """Create the MPIJob; returns its name."""
        self._tool.require("kubectl", "https://kubernetes.io/docs/tasks/tools, or look at it with --dry-run")
        return self._tool.ask(
            *self._kubectl, "create", f"--filename={path}", "--output=jsonpath={.metadata.name}"
        ).strip()

    def state(self, job: str) -> JobState:
        """What the operator says about the job."""
        state = read_state(self._tool.ask(*self._kubectl, "get", "mpijob", job, "--output=json"))
        if state.phase == "running" and self._stream is None:
            self._stream = Stream([*self._kubectl, "logs", "--follow", f"job/{job}-launcher"])
        return state

    def output(self, job: str) -> bytes:
        """What the launcher has written since the last call."""
        if self._stream is None:
            return b""
        new, ended = self._stream.read()
        if ended:
            # The launcher's pod is over: another one may follow, or the connection was cut.
            self._stream = Stream([*self._kubectl, "logs", "--follow", f"--since-time={ended}", f"job/{job}-launcher"])
        return new

    def cancel(self, job: str) -> None:
        """Delete the job, and with it its pods."""
        self._tool.ask(*self._kubectl, "delete", "mpijob", job, "--wait=false")

    def close(self) -> None:
        """End what follows the log."""
        if self._stream is not None:
            self._stream.close()

    def commands(self, job: str) -> str:
        """What a person types to follow and end it by hand."""
        kubectl = " ".join(self._kubectl)
        return f"{kubectl} logs -f job/{job}-launcher; {kubectl} delete mpijob {job}"
