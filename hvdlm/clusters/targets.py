"""The targets of ``hvdlm submit``: how each is rendered, and what submits it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hvdlm.clusters.follow import Cluster
from hvdlm.clusters.spec import SubmitSpec

__all__ = ["Target", "get_target"]


@dataclass(frozen=True)
class Target:
    """One kind of cluster."""

    module: str
    cluster: str
    """Name of the class in the module that submits."""
    suffix: str
    """Of the rendered file."""
    renderer: str = "render"
    """Name of the function in the module that renders."""

    def render(self, spec: SubmitSpec) -> str:
        """The text of the job."""
        text: str = getattr(importlib.import_module(self.module), self.renderer)(spec)
        return text

    def open(self, spec: SubmitSpec) -> Cluster:
        """What submits it and follows it."""
        module: Any = importlib.import_module(self.module)
        cluster: Cluster = getattr(module, self.cluster)(spec)
        return cluster


_TARGETS = {
    "dask": Target("hvdlm.clusters.engines", "LocalDriver", ".sh", "render_dask"),
    "gcp": Target("hvdlm.clusters.gcp", "GcpCluster", ".json"),
    "kubernetes": Target("hvdlm.clusters.kubernetes", "KubernetesCluster", ".yaml"),
    "slurm": Target("hvdlm.clusters.slurm", "SlurmCluster", ".sbatch"),
    "spark": Target("hvdlm.clusters.engines", "LocalDriver", ".sh", "render_spark"),
}


def get_target(name: str) -> Target:
    """The target of a name among :data:`hvdlm.clusters.spec.TARGETS`."""
    return _TARGETS[name]
