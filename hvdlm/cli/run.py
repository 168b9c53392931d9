"""``hvdlm run``: the command line of a job."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from hvdlm import environment as names_of
from hvdlm.cli.elastic_plan import check_elastic, is_elastic
from hvdlm.cli.run_params import RunCommand, make_params
from hvdlm.environment import read_environment
from hvdlm.errors import ConfigError, EngineError
from hvdlm.launchers.base import JobSpec, cores, get_launcher
from hvdlm.launchers.config_file import read_config_file
from hvdlm.launchers.engine import find_engine
from hvdlm.launchers.flags import FLAGS, check_flag, flags_to_environment
from hvdlm.launchers.hosts import Host, assign, is_local, parse_hostfile, parse_hosts, weights_of
from hvdlm.launchers.passing import check_patterns, held_back
from hvdlm.launchers.program import autowrapped, resolve_program
from hvdlm.launchers.run_dir import make_run_dir
from hvdlm.options import Options, choices, coerce, names, resolve
from hvdlm.secrets import masked, secret_arguments

__all__ = ["run"]

_EXCLUSIVE = (
    *itertools.combinations(("use_gloo", "use_mpi", "use_jsrun"), 2),
    *itertools.combinations(("hosts", "hostfile", "host_discovery_script"), 2),
)


def _run(**params: Any) -> None:
    words = params.pop("words")
    if params["check_build"]:
        from hvdlm.launchers.horovodrun import execute

        find_engine()
        execute([sys.executable, "-m", "horovod.runner.launch", "--check-build"], os.environ)
    options, flags = _command_line(params)
    pass_env = check_patterns(params["pass_env"])
    file_options, file_flags = read_config_file(params["config_file"]) if params["config_file"] else ({}, {})
    if flags.keys() & {"use_gloo", "use_mpi", "use_jsrun"}:
        file_flags = {dest: value for dest, value in file_flags.items() if dest not in ("use_gloo", "use_mpi")}
    flags = file_flags | flags
    environment = read_environment()
    _check_together(dict(environment.options) | file_options | options)
    if params["print_config"]:
        hide = (*secret_arguments(sys.argv), *environment.secrets)
        _print_config(environment.options, file_options, options, flags, lambda text: str(masked(text, hide)))
        return
    base = dict(os.environ)
    given = dict(environment.options) | file_options | options
    launcher, hosts, num_proc = _plan(flags, params["launcher"], base, given)
    if launcher == "elastic":
        options["elastic"] = True
    command = resolve_program(words, params["module"], base.get("PATH"))
    if params["autowrap"]:
        command = autowrapped(command)
    if launcher != "debug":
        launcher = _choose(launcher, flags)
    remote = not all(is_local(host.name) for host in hosts)
    static = launcher in ("gloo", "mpi", "slurm", "debug")
    slots = assign(hosts, num_proc) if static else ()
    run_dir = make_run_dir(params["run_dir"], params["module"] or _script(words))
    workers = base | flags_to_environment(flags) | _for_workers(options, file_options, str(run_dir), base)
    if weights := weights_of(hosts, slots):
        workers[names_of.HOST_WEIGHTS] = json.dumps(weights)
    if static and launcher != "debug":
        _share_cores(workers, max(slot.local_size for slot in slots), num_proc)
    elif launcher == "elastic":
        here = sum(host.slots for host in hosts if is_local(host.name))
        _share_cores(workers, max(1, min(num_proc, here)), num_proc)
    spec = JobSpec(
        command=command,
        num_proc=num_proc,
        hosts=hosts,
        slots=slots,
        remote=remote,
        environment=workers,
        run_dir=run_dir,
        flags=flags,
        ssh_options=params["ssh_options"],
        pass_env=pass_env,
        out_of_reach=launcher == "slurm" and remote,
        verbose=bool(flags.get("verbose")),
    )
    if remote and launcher in ("gloo", "mpi", "elastic") and (held := held_back(workers, pass_env)):
        shown = ", ".join(held[:6]) + (f" and {len(held) - 6} more" if len(held) > 6 else "")
        click.echo(f"hvdlm: not passed to other hosts: {shown}; --pass-env NAME,... passes what is needed.", err=True)
    if launcher == "horovodrun":
        # Found by reading it: the environment goes on the command line of each worker.
        click.echo(
            "hvdlm: horovodrun starts this job; it shows the environment to everyone on the machines (ps).",
            err=True,
        )
    sys.stdout.flush()
    sys.exit(get_launcher(launcher).submit(spec))


def _script(words: Sequence[str]) -> str:
    """The word a run is named after: the script, also in ``python train.py``."""
    return next((word for word in words[:2] if word.endswith(".py")), words[0])


def _command_line(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the flags of horovodrun that were given, checked."""
    options = {name: coerce(name, params[name]) for name in names() if params[name] is not None}
    flags: dict[str, Any] = {}
    for flag in FLAGS:
        value = params[flag.dest]
        if value is None or value == ():
            continue
        if flag.dest == "nics":
            value = [name for part in value for name in str(part).split(",") if name]
            if not value:
                raise ConfigError("--network-interfaces names no interface.", hint="--network-interfaces lo")
            flags[flag.dest] = value
        else:
            flags[flag.dest] = check_flag(flag, value, flag.names[0])
    for one, other in _EXCLUSIVE:
        if flags.get(one) and flags.get(other):
            shown = [next(flag.names[-1] for flag in FLAGS if flag.dest == dest) for dest in (one, other)]
            raise ConfigError(
                f"{shown[0]} and {shown[1]} exclude each other.", hint=f"leave {shown[0]} or {shown[1]} out"
            )
    return options, flags


def _check_together(given: dict[str, Any]) -> None:
    """Refuse options that no argument in the code could make right."""
    given = {name: coerce(name, value) for name, value in given.items()}
    try:
        Options(**given)
    except ConfigError:
        for name in names():
            for value in choices(name) or () if name not in given else ():
                alternative = given | {name: value}
                with contextlib.suppress(ConfigError):
                    Options(**alternative)
                    return
        raise


def _plan(
    flags: Mapping[str, Any], launcher: str | None, base: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[str, tuple[Host, ...], int]:
    """(launcher, hosts, workers); the launcher is "auto" if nothing decides it."""
    if launcher not in (None, "auto"):
        get_launcher(str(launcher))
    wanted = {"use_gloo": "gloo", "use_mpi": "mpi", "use_jsrun": "horovodrun"}
    chosen = next((name for dest, name in wanted.items() if flags.get(dest)), None)
    if launcher not in (None, "auto"):
        if chosen not in (None, launcher):
            raise ConfigError(f"--launcher {launcher} and --{chosen} exclude each other.", hint=f"leave --{chosen} out")
        chosen = launcher
    hosts = parse_hosts(flags["hosts"]) if "hosts" in flags else ()
    hosts = parse_hostfile(flags["hostfile"]) if "hostfile" in flags else hosts
    if chosen == "slurm" and not hosts:
        from hvdlm.launchers.slurm import allocated_hosts

        hosts = allocated_hosts(base)
    num_proc = flags.get("num_proc")
    if chosen == "elastic" or (is_elastic(flags, options) and chosen in (None, "gloo", "mpi", "horovodrun")):
        num_proc = check_elastic(flags, options, hosts, base)
        return "horovodrun" if chosen == "horovodrun" else "elastic", hosts, num_proc
    if num_proc is None and chosen == "debug":
        num_proc = 1
    if num_proc is None and hosts:
        num_proc = sum(host.slots for host in hosts)
    if num_proc is None:
        if "LSB_JOBID" in base:
            return "horovodrun", hosts, 0
        raise ConfigError("the number of workers was not given.", hint="hvdlm run -np 2 train.py")
    return chosen or "auto", hosts or (Host("localhost", num_proc),), num_proc


def _choose(launcher: str, flags: Mapping[str, Any]) -> str:
    engine = find_engine()
    if launcher == "mpi" and not engine.mpi:
        raise EngineError(
            "this Horovod was built without MPI.", hint="run with --gloo, or: hvdlm build-horovod --force"
        )
    if launcher != "auto":
        return launcher
    if not engine.mpi:
        return "gloo"
    from hvdlm.launchers.mpi import find_mpirun

    if find_mpirun(None) is None:
        click.echo("hvdlm: Horovod was built with MPI, but mpirun is not installed: running over Gloo.", err=True)
        return "gloo"
    return "mpi"


def _for_workers(
    options: Mapping[str, Any], file_options: Mapping[str, Any], run_dir: str, base: Mapping[str, str]
) -> dict[str, str]:
    """What ``hvdlm`` in a worker reads from its environment."""
    bar = os.isatty(2) and base.get("TERM") != "dumb"
    return {
        names_of.COMMAND_LINE: json.dumps(options),
        names_of.CONFIG_FILE: json.dumps(file_options),
        names_of.RUN_DIR: run_dir,
        names_of.PROGRESS: base.get(names_of.PROGRESS) or ("bar" if bar else "lines"),
        "PYTHONUNBUFFERED": base.get("PYTHONUNBUFFERED") or "1",
        # TensorFlow's notes about itself would come from each worker; warnings and errors stay.
        "TF_CPP_MIN_LOG_LEVEL": base.get("TF_CPP_MIN_LOG_LEVEL") or "1",
        # A worker that segfaults then says where in the script.
        "PYTHONFAULTHANDLER": base.get("PYTHONFAULTHANDLER") or "1",
    }


def _share_cores(workers: dict[str, str], per_host: int, num_proc: int) -> None:
    count = cores()
    if per_host > count:
        click.echo(f"hvdlm: {per_host} workers share {count} cores: expect them to wait for each other.", err=True)
    if "OMP_NUM_THREADS" not in workers:
        threads = max(1, count // per_host)
        workers["OMP_NUM_THREADS"] = str(threads)
        if num_proc > 1:
            click.echo(
                f"hvdlm: OMP_NUM_THREADS={threads} for each of {num_proc} workers ({count} cores here); "
                "set it yourself for another number.",
                err=True,
            )


def _print_config(
    environment: Mapping[str, str],
    file_options: Mapping[str, Any],
    options: Mapping[str, Any],
    flags: Mapping[str, Any],
    shown: Callable[[str], str],
) -> None:
    note = None
    try:
        resolved = resolve(environment=environment, config_file=file_options, command_line=options)
        rows = resolved.table()
    except ConfigError as error:  # only what the code may still mend gets here
        note = error.message
        layers = (("environment", environment), ("config file", file_options), ("command line", options))
        values = {name: (str(Options().to_dict()[name]), "default") for name in names()}
        for origin, layer in layers:
            values |= {name: (str(coerce(name, value)), origin) for name, value in layer.items()}
        rows = [(name, *values[name]) for name in names()]
    rows = [(name, shown(value), origin) for name, value, origin in rows]
    width, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, value, origin in rows:
        click.echo(f"{name:<{width}}  {value:<{middle}}  {origin}")
    for dest, value in flags.items():
        click.echo(f"{dest:<{width}}  {shown(str(value)):<{middle}}  flag of horovodrun")
    click.echo(
        "Values left at their default or from the environment may be set by the script: distribute(...), wrap(...)."
    )
    if note:
        click.echo(f"Note: as it stands, {shown(note)}")


run = RunCommand(
    "run",
    params=make_params(),
    callback=_run,
    help="Run SCRIPT on many workers. Takes horovodrun's flags, and one flag for each option of hvdlm.",
    options_metavar="[FLAGS]",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "allow_interspersed_args": False,
        "max_content_width": 110,
    },
)
