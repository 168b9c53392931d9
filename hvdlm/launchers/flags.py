"""The flags of horovodrun 0.28.1: their names, what they set, and how they are checked.

Most set a variable that Horovod's native library reads; the others are read by the launchers. A configuration file of
horovodrun's sets the same values from its sections.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hvdlm.errors import ConfigError
from hvdlm.units import mebibytes

__all__ = ["FLAGS", "SECTIONS", "Flag", "check_flag", "flags_of_sections", "flags_to_arguments", "flags_to_environment"]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag."""

    dest: str
    names: tuple[str, ...]
    kind: Literal["int", "float", "size", "str", "switch"] = "str"
    help: str = ""
    off: tuple[str, ...] = ()
    """Names that set a switch to false."""
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] = ()
    count: int = 1
    """How many values it takes."""
    variable: str | None = None
    """Variable of Horovod's that it sets."""
    needs: str | None = None
    """Destination of the flag without which it sets nothing."""
    own: bool = False
    """Whether horovodrun does not know it."""
    section: tuple[str, str] | None = None
    """(section, key) in a configuration file of horovodrun's."""


def _knob(dest: str, kind: Any, variable: str, section: tuple[str, str], help: str, **more: Any) -> Flag:
    name = dest.replace("_", "-")
    off = (f"--no-{name}",) if kind == "switch" else ()
    more = {"minimum": 0, "off": off} | more
    return Flag(dest=dest, names=(f"--{name}",), kind=kind, variable=variable, section=section, help=help, **more)


_AUTO: dict[str, Any] = {"needs": "autotune"}

FLAGS: tuple[Flag, ...] = (
    Flag(dest="num_proc", names=("-np", "--num-proc"), kind="int", minimum=1, help="Number of workers."),
    Flag(dest="disable_cache", names=("--disable-cache",), kind="switch", help="Repeat horovodrun's checks each time."),
    Flag(dest="start_timeout", names=("--start-timeout",), kind="int", minimum=1, help="Seconds for workers to start."),
    Flag(dest="nics", names=("--network-interfaces", "--network-interface"), help="Interfaces to use, by comma."),
    Flag(dest="output_filename", names=("--output-filename",), help="Directory for rank.N/stdout and rank.N/stderr."),
    Flag(dest="verbose", names=("--verbose",), kind="switch", help="Show the commands that are run."),
    Flag(dest="ssh_port", names=("-p", "--ssh-port"), kind="int", minimum=1, maximum=65535, help="Port of sshd."),
    Flag(dest="ssh_identity_file", names=("-i", "--ssh-identity-file"), help="Private key for ssh."),
    _knob("fusion_threshold_mb", "int", "HOROVOD_FUSION_THRESHOLD", ("params", "fusion_threshold_mb"),
          "Horovod's fusion buffer in MB; 0 fuses nothing."),
    _knob("cycle_time_ms", "float", "HOROVOD_CYCLE_TIME", ("params", "cycle_time_ms"), "Milliseconds of a cycle."),
    _knob("cache_capacity", "int", "HOROVOD_CACHE_CAPACITY", ("params", "cache_capacity"), "Tensor names cached."),
    _knob("hierarchical_allreduce", "switch", "HOROVOD_HIERARCHICAL_ALLREDUCE", ("params", "hierarchical_allreduce"),
          "Reduce within hosts first."),
    _knob("hierarchical_allgather", "switch", "HOROVOD_HIERARCHICAL_ALLGATHER", ("params", "hierarchical_allgather"),
          "Gather within hosts first."),
    _knob("torus_allreduce", "switch", "HOROVOD_TORUS_ALLREDUCE", ("params", "torus_allreduce"),
          "Reduce over a torus (NCCL)."),
    _knob("autotune", "switch", "HOROVOD_AUTOTUNE", ("autotune", "enabled"), "Let Horovod tune itself."),
    _knob("autotune_log_file", "str", "HOROVOD_AUTOTUNE_LOG", ("autotune", "log_file"), "Log of the trials.", **_AUTO),
    _knob("autotune_warmup_samples", "int", "HOROVOD_AUTOTUNE_WARMUP_SAMPLES", ("autotune", "warmup_samples"),
          "Samples left out at first.", **_AUTO),
    _knob("autotune_steps_per_sample", "int", "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE", ("autotune", "steps_per_sample"),
          "Steps in a sample.", **_AUTO),
    _knob("autotune_bayes_opt_max_samples", "int", "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES",
          ("autotune", "bayes_opt_max_samples"), "Most samples.", **_AUTO),
    _knob("autotune_gaussian_process_noise", "float", "HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE",
          ("autotune", "gaussian_process_noise"), "Regularisation, 0 to 1.", maximum=1, **_AUTO),
    Flag(dest="min_num_proc", names=("--min-np", "--min-num-proc"), kind="int", minimum=1,
         help="Elastic: fewest workers to go on with."),
    Flag(dest="max_num_proc", names=("--max-np", "--max-num-proc"), kind="int", minimum=1, help="Elastic: at most."),
    Flag(dest="slots", names=("--slots-per-host",), kind="int", minimum=1, help="Elastic: workers per host."),
    Flag(dest="elastic_timeout", names=("--elastic-timeout",), kind="int", minimum=1,
         help="Elastic: seconds to wait below the minimum [600]."),
    Flag(dest="reset_limit", names=("--reset-limit",), kind="int", minimum=0, help="Elastic: most resets."),
    Flag(dest="cooldown_range", names=("--blacklist-cooldown-range",), kind="int", count=2, minimum=1,
         help="Elastic: seconds (least, most) that a slot rests after a failure [5 300]."),
    _knob("timeline_filename", "str", "HOROVOD_TIMELINE", ("timeline", "filename"), "JSON file for the timeline."),
    _knob("timeline_mark_cycles", "switch", "HOROVOD_TIMELINE_MARK_CYCLES", ("timeline", "mark_cycles"),
          "Mark cycles in it.", needs="timeline_filename"),
    Flag(dest="no_stall_check", names=("--no-stall-check",), off=("--stall-check",), kind="switch",
         variable="HOROVOD_STALL_CHECK_DISABLE", help="Do not warn of stalled workers."),
    _knob("stall_check_warning_time_seconds", "int", "HOROVOD_STALL_CHECK_TIME_SECONDS",
          ("stall_check", "warning_time_seconds"), "Seconds until the warning."),
    _knob("stall_check_shutdown_time_seconds", "int", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
          ("stall_check", "shutdown_time_seconds"), "Seconds until a stalled job is shut down; 0 is never."),
    _knob("mpi_threads_disable", "switch", "HOROVOD_MPI_THREADS_DISABLE", ("library_options", "mpi_threads_disable"),
          "Use MPI without threads."),
    Flag(dest="mpi_args", names=("--mpi-args",), help='More arguments for mpirun, as in --mpi-args="--map-by node".'),
    Flag(dest="tcp_flag", names=("--tcp",), kind="switch", help="Use TCP only."),
    Flag(dest="binding_args", names=("--binding-args",), help="Arguments for mpirun in place of no binding."),
    _knob("num_nccl_streams", "int", "HOROVOD_NUM_NCCL_STREAMS", ("library_options", "num_nccl_streams"),
          "Streams of NCCL."),
    _knob("thread_affinity", "int", "HOROVOD_THREAD_AFFINITY", ("library_options", "thread_affinity"),
          "Core of Horovod's thread."),
    _knob("gloo_timeout_seconds", "int", "HOROVOD_GLOO_TIMEOUT_SECONDS", ("library_options", "gloo_timeout_seconds"),
          "Seconds until a Gloo operation fails."),
    _knob("log_level", "str", "HOROVOD_LOG_LEVEL", ("logging", "level"), "Horovod's log level.",
          allowed=("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "FATAL")),
    Flag(dest="log_with_timestamp", names=("--log-with-timestamp", "--no-log-hide-timestamp"), kind="switch",
         off=("--log-without-timestamp", "--log-hide-timestamp"), section=("logging", "with_timestamp"),
         help="Whether Horovod's log lines start with the time."),
    Flag(dest="prefix_output_with_timestamp", names=("-prefix-timestamp", "--prefix-output-with-timestamp"),
         kind="switch", help="Start each line of output with the time."),
    Flag(dest="hosts", names=("-H", "--hosts"), help="Hosts and slots: host1:2,host2:4."),
    Flag(dest="hostfile", names=("-hostfile", "--hostfile"), help="File with lines: host slots=N."),
    Flag(dest="host_discovery_script", names=("--host-discovery-script",),
         help="Elastic: program that prints the hosts there are."),
    Flag(dest="host_discovery", names=("--host-discovery",), own=True, allowed=("SLURM", "KUBERNETES", "GCLOUD"),
         help="Elastic: where hosts are found; by default by what is there."),
    Flag(dest="gcloud_group", names=("--gcloud-group",), own=True,
         help="Elastic: managed instance group whose machines are the hosts."),
    Flag(dest="hang_timeout", names=("--hang-timeout",), own=True, kind="int", minimum=2,
         help="Elastic: seconds without a sign of life until a worker is killed [20]."),
    Flag(dest="max_memory", names=("--max-memory",), own=True, kind="size",
         help="Memory a worker may use (4G, 512M): one that uses more is ended, and the job."),
    Flag(dest="nice", names=("--nice",), own=True, kind="int", minimum=0, maximum=19,
         help="Run the workers at a lower priority, on every host."),
    Flag(dest="use_gloo", names=("--gloo",), kind="switch", help="Communicate over Gloo."),
    Flag(dest="use_mpi", names=("--mpi",), kind="switch", help="Communicate over MPI."),
    Flag(dest="use_jsrun", names=("--jsrun",), kind="switch", help="Start with jsrun (LSF)."),
)  # fmt: skip

_BY_DEST = {flag.dest: flag for flag in FLAGS}
SECTIONS = ("controller", *dict.fromkeys(flag.section[0] for flag in FLAGS if flag.section))
"""Keys of horovodrun's configuration file."""


def check_flag(flag: Flag, value: Any, given: str) -> Any:
    """A flag's value from its text.

    Args:
        flag: The flag.
        value: What was given: text, or a value from a configuration file.
        given: How it was given, for the message.

    Raises:
        ConfigError: It is not allowed.
    """
    if flag.kind == "switch":
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{given}: {value!r} is not true or false.")
    if flag.count > 1:
        values = tuple(check_flag(_single(flag), part, given) for part in value)
        if list(values) != sorted(values):
            raise ConfigError(f"{given}: {' '.join(map(str, value))} is not in ascending order.")
        return values
    if flag.kind == "str":
        text = str(value)
        if flag.allowed and text.upper() not in flag.allowed:
            raise ConfigError(f"{given} {value!r}: allowed are {', '.join(flag.allowed)}.")
        if not text:
            raise ConfigError(f"{given}: the value is empty.")
        return text.upper() if flag.allowed else text
    if flag.kind == "size":
        return mebibytes(given, str(value))
    noun = "an integer" if flag.kind == "int" else "a number"
    limits = f" of at least {flag.minimum:g}" if flag.minimum is not None else ""
    limits += f" and at most {flag.maximum:g}" if flag.maximum is not None else ""
    try:
        number = int(str(value)) if flag.kind == "int" else float(str(value))
    except ValueError:
        number = None
    below = number is not None and flag.minimum is not None and not number >= flag.minimum
    above = number is not None and flag.maximum is not None and number > flag.maximum
    if number is None or below or above:
        raise ConfigError(f"{given} {value}: allowed is {noun}{limits}.", hint=f"for example: {given} {_example(flag)}")
    return number


def _single(flag: Flag) -> Flag:
    return Flag(dest=flag.dest, names=flag.names, kind=flag.kind, minimum=flag.minimum)


def _example(flag: Flag) -> str:
    return "2" if flag.dest == "num_proc" else f"{max(flag.minimum or 0, 1):g}"


def flags_to_environment(flags: Mapping[str, Any]) -> dict[str, str]:
    """The variables that tell Horovod's library what the flags say."""
    found = {}
    for dest, value in flags.items():
        flag = _BY_DEST[dest]
        if flag.variable and not (flag.needs and not flags.get(flag.needs)):
            scaled = value * 1024 * 1024 if dest == "fusion_threshold_mb" else value
            found[flag.variable] = str(int(scaled)) if flag.kind == "switch" else str(scaled)
    if flags.get("tcp_flag"):
        found["NCCL_IB_DISABLE"] = "1"
    if "log_with_timestamp" in flags:
        found["HOROVOD_LOG_HIDE_TIME"] = "0" if flags["log_with_timestamp"] else "1"
    return found


def flags_to_arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags as arguments of horovodrun."""
    arguments: list[str] = []
    for dest, value in flags.items():
        flag = _BY_DEST[dest]
        if flag.own:
            continue
        name = flag.names[-1] if flag.dest != "nics" else "--network-interfaces"
        if flag.kind == "switch":
            chosen = flag.names[:1] if value else flag.off[:1]
            arguments += chosen
        elif flag.count > 1:
            arguments += [name, *map(str, value)]
        elif isinstance(value, (list, tuple)):
            arguments.append(f"{name}={','.join(value)}")
        else:
            # Joined: a value may start with a dash (--mpi-args="-x NAME").
            arguments.append(f"{name}={value}")
    return arguments


def flags_of_sections(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The flags a configuration file of horovodrun's sets.

    Args:
        content: The file's entries whose keys are among :data:`SECTIONS`.
        where: The file, for messages.

    Raises:
        ConfigError: An unknown key, or a value that is not allowed.
    """
    flags: dict[str, Any] = {}
    known = {flag.section: flag for flag in FLAGS if flag.section}
    for section, entries in content.items():
        if section == "controller":
            if str(entries).lower() not in ("gloo", "mpi"):
                raise ConfigError(f"{where}: controller is {entries!r}; allowed: gloo, mpi.")
            flags[f"use_{str(entries).lower()}"] = True
            continue
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{where}: section {section!r} must hold names and values, not {entries!r}.")
        for key, value in entries.items():
            if (section, key) == ("stall_check", "enabled"):
                flags["no_stall_check"] = not check_flag(_BY_DEST["no_stall_check"], value, f"{where}: {section}.{key}")
                continue
            flag = known.get((section, key))
            if flag is None:
                names = _keys(section)
                close = difflib.get_close_matches(str(key), names, n=1)
                raise ConfigError(
                    f"{where}: section {section!r} has no {key!r}; it has: {', '.join(names)}.",
                    hint=f"did you mean {close[0]!r}?" if close else None,
                )
            flags[flag.dest] = check_flag(flag, value, f"{where}: {section}.{key}")
    return flags


def _keys(section: str) -> Sequence[str]:
    found = [flag.section[1] for flag in FLAGS if flag.section and flag.section[0] == section]
    return sorted([*found, "enabled"] if section == "stall_check" else found)
