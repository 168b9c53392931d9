"""One description of a job for every cluster; each field says which targets read it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.secrets import secret_values
from hvdlm.units import mebibytes, seconds

__all__ = ["TARGETS", "SubmitSpec", "check_targets", "field_targets"]

TARGETS = ("dask", "gcp", "kubernetes", "slurm", "spark")
_IN_IMAGES = ("gcp", "kubernetes")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,48}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _field(default: Any, help_text: str, *targets: str, metavar: str = "TEXT", flag: str | None = None) -> Any:
    metadata = {"help": help_text, "targets": targets or TARGETS, "metavar": metavar, "flag": flag}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class SubmitSpec:
    """A job for a cluster, checked.

    Attributes:
        command: The script or program and its arguments; those of the module if there is one.
        options: Options of hvdlm (``compression``, ...) as text, by name.

    Raises:
        ConfigError: A value is not allowed; says which and what is.
    """

    command: tuple[str, ...]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    module: str | None = _field(None, "Run a module as python -m does.", metavar="MODULE", flag="-m")
    name: str = _field("", "Name of the job: a-z, 0-9 and dashes [made from the script's].", metavar="NAME")
    num_proc: int = _field(1, "Workers.", metavar="N", flag="-np")
    workers_per_node: int = _field(1, "Workers on each node, pod or machine.", *_IN_IMAGES, "slurm", metavar="N")
    cpus_per_worker: int = _field(1, "Processor cores for each worker.", *_IN_IMAGES, "slurm", "spark", metavar="N")
    gpus_per_worker: int = _field(0, "GPUs for each worker.", *_IN_IMAGES, "slurm", metavar="N")
    memory_per_worker: str = _field("", "Memory for each worker: 4G, 512M.", *_IN_IMAGES, "slurm", metavar="SIZE")
    time_limit: str = _field("", "Longest run: 90m, 2:30:00, 1-00:00:00.", *_IN_IMAGES, "slurm", metavar="TIME")
    env: Mapping[str, str] = _field({}, "A variable for the workers; again for more.", metavar="NAME=VALUE")
    secrets: Mapping[str, str] = _field(
        {},
        "A secret for the workers, never written to the file: NAME=SECRET/KEY (kubernetes), NAME=projects/P/secrets/S/"
        "versions/V (gcp), NAME (from your environment: slurm, spark, dask).",
        metavar="NAME[=REF]",
        flag="--secret",
    )
    max_restarts: int = _field(3, "How often the job starts again after a preemption or its time limit.",
                               *_IN_IMAGES, "dask", "slurm", metavar="N")  # fmt: skip
    min_num_proc: int | None = _field(None, "Elastic: least workers.", *_IN_IMAGES, metavar="N", flag="--min-np")
    max_num_proc: int | None = _field(None, "Elastic: most workers.", *_IN_IMAGES, metavar="N", flag="--max-np")
    network_interfaces: str = _field("", "Interfaces the workers use.", *_IN_IMAGES, "slurm", metavar="NAME,...")
    run_dir: str = _field("", "Run directory of the job [hvdlm-runs/<name>-<job id>].", metavar="DIR")
    checkpoint_dir: str = _field("", "Where checkpoints are kept; the job resumes from there.", metavar="DIR|URL")
    workdir: str = _field("", "Working directory [here].", "slurm", "spark", "dask", metavar="DIR")
    image: str = _field("", "Container image with the script and hvdlm in it.", *_IN_IMAGES, metavar="IMAGE")
    queue: str = _field("", "Slurm partition; Kueue local queue.", "slurm", "kubernetes", metavar="NAME")
    service_account: str = _field("", "Account the job runs as.", *_IN_IMAGES, metavar="NAME")
    spot: bool = _field(False, "Use machines that may be taken away.", *_IN_IMAGES)
    volumes: Mapping[str, str] = _field(
        {}, "A volume: CLAIM=/path (kubernetes), gs://bucket=/path (gcp).", *_IN_IMAGES, metavar="SOURCE=PATH",
        flag="--volume",
    )  # fmt: skip
    account: str = _field("", "Account to charge.", "slurm", metavar="NAME")
    qos: str = _field("", "Quality of service.", "slurm", metavar="NAME")
    constraint: str = _field("", "Features nodes must have.", "slurm", metavar="LIST")
    array: str = _field("", "Job array: 0-9, 1,3,5, 0-99%4.", "slurm", metavar="INDICES")
    setup: tuple[str, ...] = _field((), "A line of shell before the job (module load ...).", "slurm", metavar="LINE")
    sbatch: tuple[str, ...] = _field((), "A further option of sbatch.", "slurm", metavar="--OPTION=VALUE")
    namespace: str = _field("default", "Namespace.", "kubernetes", metavar="NAME")
    node_selector: Mapping[str, str] = _field({}, "A label nodes must have.", "kubernetes", metavar="LABEL=VALUE")
    gpu_resource: str = _field("nvidia.com/gpu", "Name of the GPU resource.", "kubernetes", metavar="NAME")
    project: str = _field("", "Google Cloud project.", "gcp", metavar="ID")
    region: str = _field("", "Region.", "gcp", metavar="NAME")
    machine_type: str = _field("", "Machine type.", "gcp", metavar="TYPE")
    accelerator: str = _field("", "GPU type of the machine.", "gcp", metavar="TYPE")
    master: str = _field("", "Spark master: yarn, spark://host:7077, local[2].", "spark", metavar="URL")
    scheduler: str = _field("", "Address of the Dask scheduler: tcp://host:8786.", "dask", metavar="ADDRESS")

    def __post_init__(self) -> None:
        if not self.command and self.module is None:
            raise ConfigError("no script was given.", hint="hvdlm submit slurm -np 2 train.py")
        if not self.name:
            object.__setattr__(self, "name", default_name(self.module or script_word(self.command)))
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name: {self.name!r} is not allowed; it is 1 to 50 of a-z, 0-9 and dashes, no dash at either end.",
                hint=f"--name {default_name(self.name)}",
            )
        for name, least in (("num_proc", 1), ("workers_per_node", 1), ("cpus_per_worker", 1), ("gpus_per_worker", 0),
                            ("max_restarts", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} is not allowed; {least} or more is.")
        self._check_elastic()
        if self.num_proc % self.workers_per_node and self.num_proc > self.workers_per_node:
            raise ConfigError(
                f"{self.num_proc} workers do not fill nodes of {self.workers_per_node} workers.",
                hint=f"-np {self.num_proc // self.workers_per_node * self.workers_per_node}",
            )
        for name in ("memory_per_worker", "time_limit"):
            value = getattr(self, name)
            if value:
                (mebibytes if name == "memory_per_worker" else seconds)(name, value)
        for variable in (*self.env, *self.secrets):
            if not _VARIABLE.fullmatch(variable):
                raise ConfigError(f"{variable!r} is no name of a variable.", hint="--env NAME=VALUE, --secret NAME")
        for variable, value in self.env.items():
            if secret_values({variable: value}):
                raise ConfigError(
                    f"the value of {variable} looks like a secret, and would be in the file.",
                    hint=f"--secret {variable} (on Kubernetes and Google Cloud with a reference)",
                )
        both = sorted(self.env.keys() & self.secrets.keys())
        if both:
            raise ConfigError(f"{both[0]} is both a variable and a secret.", hint=f"leave out --env {both[0]}=...")
        self._check_text()

    def _check_elastic(self) -> None:
        least, most = self.min_num_proc, self.max_num_proc
        for name, value, bad in (
            ("--min-np", least, least is not None and not 1 <= least <= self.num_proc),
            ("--max-np", most, most is not None and most < self.num_proc),
        ):
            if bad:
                raise ConfigError(f"{name} {value} does not go with -np {self.num_proc}.", hint="min <= np <= max")

    def _check_text(self) -> None:
        """No value may end a line of what is rendered, nor hold what no file can hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lined = field.name not in ("command", "env")
            pairs = value.items() if isinstance(value, Mapping) else ()
            for text in (
                *(part for pair in pairs for part in pair),
                *(value if isinstance(value, tuple) else (value,)),
            ):
                if isinstance(text, str) and (("\n" in text and lined) or "\0" in text):
                    raise ConfigError(f"{field.name}: {text!r} has a line break or a NUL in it.", hint="one line each")

    @property
    def nodes(self) -> int:
        """Nodes, pods or machines."""
        return max(1, -(-self.num_proc // self.workers_per_node))

    @property
    def on_each(self) -> int:
        """Workers on each node."""
        return min(self.num_proc, self.workers_per_node)

    @property
    def elastic(self) -> bool:
        """Whether workers may come and go."""
        return self.min_num_proc is not None or self.max_num_proc is not None

    @property
    def memory_mib(self) -> int | None:
        """Memory of one worker, MiB."""
        return mebibytes("memory_per_worker", self.memory_per_worker) if self.memory_per_worker else None

    @property
    def time_limit_seconds(self) -> int | None:
        """Longest run, seconds."""
        return seconds("time_limit", self.time_limit) if self.time_limit else None


def script_word(command: tuple[str, ...]) -> str:
    """The word a job is named after: the script, also in ``python train.py``."""
    return next((word for word in command[:2] if word.endswith(".py")), command[0])


def default_name(script: str) -> str:
    """A name every cluster takes, made from a path.

    >>> default_name("my dir/Train_GPT.py")
    'train-gpt'
    """
    return re.sub(r"[^a-z0-9]+", "-", PurePosixPath(script).stem.lower())[:50].strip("-") or "job"


def field_targets(name: str) -> tuple[str, ...]:
    """The targets that read a field."""
    found: tuple[str, ...] = next(f for f in dataclasses.fields(SubmitSpec) if f.name == name).metadata["targets"]
    return found


def check_targets(given: Mapping[str, Any], target: str) -> None:
    """Refuse flags that the target does not read; a file may hold fields for several targets.

    Raises:
        ConfigError: A field is not for this target.
    """
    for name in given:
        targets = field_targets(name)
        if target not in targets:
            raise ConfigError(f"{name} is not for {target}, only for {', '.join(targets)}.", hint=f"leave {name} out")
