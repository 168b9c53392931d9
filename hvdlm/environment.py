"""The one place where hvdlm reads the environment."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hvdlm.errors import ConfigError
from hvdlm.gce import METADATA_HOST, is_gce
from hvdlm.network import chosen_address
from hvdlm.options import names
from hvdlm.secrets import secret_values

__all__ = [
    "BIND_NETWORK",
    "COMMAND_LINE",
    "CONFIG_FILE",
    "CONTROL",
    "HANDED_OVER",
    "HOST_WEIGHTS",
    "PREFIX",
    "PROGRESS",
    "RUN_DIR",
    "Environment",
    "alone",
    "cache_dir",
    "quieten_libraries",
    "read_environment",
]

PREFIX = "HVDLM_"
COMMAND_LINE = "HVDLM_COMMAND_LINE"
"""JSON object of the options given as flags of ``hvdlm run``."""
CONFIG_FILE = "HVDLM_CONFIG_VALUES"
"""JSON object of the options read from ``--config-file``."""
HOST_WEIGHTS = "HVDLM_HOST_WEIGHTS"
"""JSON list of the weights that the host file gives to each rank."""
RUN_DIR = "HVDLM_RUN_DIR"
"""Where this run writes its summary and logs."""
PROGRESS = "HVDLM_PROGRESS"
"""``bar`` (the launcher's terminal can redraw), ``lines`` or ``none``."""
BIND_NETWORK = "HVDLM_BIND_NETWORK"
"""The network in which MPI listens, for ``bind_chosen.c``."""
CONTROL = "HVDLM_CONTROL"
"""Where the driver of an elastic job listens, who this worker is to it, and the job's key."""
HANDED_OVER = "HVDLM_HANDED_OVER"
"""Descriptor of the commits that this process took over from the one whose place it takes."""
_RESERVED = {
    *(BIND_NETWORK, CONTROL, HANDED_OVER, COMMAND_LINE, CONFIG_FILE, HOST_WEIGHTS, RUN_DIR, PROGRESS),
    "HVDLM_CACHE_DIR",
}

# (launcher, variable with the rank, variable with the size); first match wins. horovodrun over MPI sets none of its
# own, so the MPI entries serve it too. Slurm is last: `srun mpirun` and `srun` with PMI set the others as well.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
)
_QUIET = {"TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What keeps libraries from showing progress and recording experiments."""
_TOLD_TO_OTHERS = {"OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"}
"""What else libraries with launchers of their own look at."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment says to hvdlm."""

    options: Mapping[str, str] = field(default_factory=dict)
    """``HVDLM_<OPTION>`` values by option name."""
    command_line: Mapping[str, Any] = field(default_factory=dict)
    config_file: Mapping[str, Any] = field(default_factory=dict)
    host_weights: tuple[float, ...] = ()
    """Of each rank, from the host file."""
    run_dir: str | None = None
    progress: str | None = None
    keras_backend: str = "tensorflow"
    timeline: str | None = None
    """Where Horovod writes its timeline (``HOROVOD_TIMELINE``)."""
    tensorflow_logs: bool = False
    """Whether the person wants to see what TensorFlow says about itself (``TF_CPP_MIN_LOG_LEVEL=0``)."""
    launcher: str | None = None
    """Which launcher started this process, None when none did."""
    rank: int = 0
    size: int = 1
    control: str | None = field(default=None, repr=False)
    """The line to the driver of an elastic job, None in any other. Not shown: it holds the job's key."""

    handed_over: int | None = None
    pmi: int | None = None
    """Descriptor of the launcher's connection, where mpiexec of MPICH or ``srun --mpi=pmi2`` started this process."""
    nics: tuple[str, ...] = ()
    """Network interfaces that the person chose for Gloo."""
    network: str = ""
    """The network that the launcher chose for MPI, as in ``10.0.0.0/24``."""
    shares_threads: bool = False
    """Whether nobody has said yet how many threads a worker has."""
    group: str = ""
    """Name of the group of processes that trains, where not all of the launcher's do."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Values that are not to be shown."""
    metadata_host: str | None = None
    """The metadata server of Google Cloud, None on other machines."""

    @property
    def address(self) -> str | None:
        """Where this process may listen for others, None for every interface; see ``hvdlm.network.chosen_address``."""
        return chosen_address(self.nics, self.network)

    def placed(self, rank: int, size: int) -> Environment:
        """The same for a worker of another place."""
        return replace(self, rank=rank, size=size)


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Read ``HVDLM_*`` and the launcher's rank and size.

    Args:
        environ: The environment to read; the process's own if None.

    Raises:
        ConfigError: An ``HVDLM_*`` variable that is no option, or one that does not parse.
    """
    environ = os.environ if environ is None else environ
    options: dict[str, str] = {}
    known = names()
    for variable, value in environ.items():
        if variable.startswith(PREFIX) and variable not in _RESERVED:
            name = variable[len(PREFIX) :].lower()
            if name not in known:
                raise ConfigError(
                    f"environment variable {variable} is no option of hvdlm; the options are: {', '.join(known)}.",
                    hint=f"unset {variable}",
                )
            options[name] = value
    launcher, rank, size = _launcher(environ)
    return Environment(
        options=options,
        command_line=_json(environ, COMMAND_LINE),
        config_file=_json(environ, CONFIG_FILE),
        host_weights=tuple(json.loads(environ.get(HOST_WEIGHTS) or "[]")),
        run_dir=environ.get(RUN_DIR),
        progress=environ.get(PROGRESS),
        keras_backend=environ.get("KERAS_BACKEND") or "tensorflow",
        timeline=environ.get("HOROVOD_TIMELINE") or None,
        tensorflow_logs=environ.get("TF_CPP_MIN_LOG_LEVEL") == "0",
        launcher=launcher,
        rank=rank,
        size=size,
        control=environ.get(CONTROL),
        pmi=_pmi(environ, launcher),
        nics=tuple(filter(None, environ.get("HOROVOD_GLOO_IFACE", "").split(","))),
        network=environ.get(BIND_NETWORK, ""),
        shares_threads=launcher in ("mpirun", "srun") and not environ.get("OMP_NUM_THREADS"),
        secrets=secret_values(environ),
        metadata_host=environ.get("GCE_METADATA_HOST") or (METADATA_HOST if is_gce() else None),
        handed_over=int(environ[HANDED_OVER]) if environ.get(HANDED_OVER) else None,
    )


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where what takes long to make is kept between checkouts and environments (the built Horovod).

    Args:
        environ: The environment to read; the process's own if None.
    """
    environ = os.environ if environ is None else environ
    if environ.get("HVDLM_CACHE_DIR"):
        return Path(environ["HVDLM_CACHE_DIR"]).expanduser().absolute()
    # The XDG standard tells to ignore relative paths.
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "hvdlm"


def _launcher(environ: Mapping[str, str]) -> tuple[str | None, int, int]:
    for launcher, rank, size in _LAUNCHERS:
        # In a batch script (not a step) Slurm sets SLURM_NTASKS too: only SLURM_STEP_ID marks a process of srun's.
        if launcher == "srun" and "SLURM_STEP_ID" not in environ:
            continue
        if rank in environ and size in environ:
            return launcher, int(environ[rank]), int(environ[size])
    return None, 0, 1


def _pmi(environ: Mapping[str, str], launcher: str | None) -> int | None:
    handle = environ.get("PMI_FD", "")
    ours = launcher == "mpirun" and "OMPI_COMM_WORLD_RANK" not in environ
    return int(handle) if ours and handle.isdecimal() else None


def _json(environ: Mapping[str, str], variable: str) -> dict[str, Any]:
    text = environ.get(variable)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{variable} is not JSON: {error}.", hint=f"unset {variable}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{variable} must be a JSON object, not {type(value).__name__}.", hint=f"unset {variable}")
    return value


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, the environment does not tell that this process was launched with others."""
    told = {name for _, *variables in _LAUNCHERS for name in variables} | _TOLD_TO_OTHERS
    hidden = {name: os.environ.pop(name) for name in told if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def quieten_libraries() -> Callable[[], None]:
    """Have libraries that are imported from now on show no progress and record no experiment; returns the undo."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)

    def undo() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return undo
