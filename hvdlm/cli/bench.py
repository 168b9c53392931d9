"""``hvdlm bench``: what communication costs here, measured in one job against Horovod alone and DDP."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hvdlm.bench import tables
from hvdlm.bench.launch import run_bench
from hvdlm.errors import ConfigError
from hvdlm.options import choices

__all__ = ["bench"]

_PEERS = {"horovod": ["horovod", "horovod-fp16"], "ddp": ["ddp"]}
_CODECS = "none,fp16,bf16,int8,powersgd"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure communication between workers: sums of gradients, training steps, and how they scale.

    All that is compared runs in one job, in turn; figures are medians with 95 % bootstrap intervals.
    """


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    settings = [
        click.option("--codec", default=_CODECS, show_default=True, help="Values of compression, with commas between."),
        click.option("--compare", default="", help="Peers beside hvdlm: horovod, ddp, or both with a comma."),
        click.option("-H", "--hosts", help="Hosts, as in hvdlm run: h1:1,h2:1."),
        click.option("--network-interfaces", help="As in hvdlm run."),
        click.option("--mpi", "controller", flag_value="mpi", help="Over MPI."),
        click.option("--gloo", "controller", flag_value="gloo", help="Over Gloo."),
        click.option("--rounds", default=30, show_default=True, type=click.IntRange(1), help="Measurements of each."),
        click.option("--bucket-cap-mb", type=float, help="As in hvdlm run; by default measured."),
        click.option("--json", "as_json", is_flag=True, help="Everything measured, as JSON."),
        click.option("--plot", type=click.Path(path_type=Path), help="Also write a PNG (needs matplotlib)."),
    ]
    for setting in reversed(settings):
        function = setting(function)
    return function


def _step_flags(function: Callable[..., None]) -> Callable[..., None]:
    batch = click.option(
        "--batch", default=4, show_default=True, type=click.IntRange(1), help="Sequences a worker and step."
    )
    text = 'Also sync="local", so many steps between synchronisations (as is, and int8), each step charged its part.'
    return batch(click.option("--sync-every", type=click.IntRange(1), help=text)(function))


def _np(default: str) -> Callable[..., Any]:
    return functools.partial(click.option, "-np", "--np", "num_proc", default=default, show_default=True)()


def _measure(kind: str, num_proc: int, params: dict[str, Any], **more: Any) -> Any:
    codecs = [name for name in params["codec"].split(",") if name]
    allowed = choices("compression") or ()
    for name in codecs:
        if name not in allowed:
            raise ConfigError(f"codec {name!r}; allowed: {', '.join(allowed)}.")
    peers: list[str] = []
    for name in filter(None, params["compare"].split(",")):
        if name not in _PEERS:
            raise ConfigError(f"compare {name!r}; allowed: {', '.join(_PEERS)}.")
        peers += _PEERS[name]
    flags = []
    if params["hosts"]:
        flags += ["-H", params["hosts"]]
    if params["network_interfaces"]:
        flags += ["--network-interfaces", params["network_interfaces"]]
    if params["controller"]:
        flags.append(f"--{params['controller']}")
    options = {"bucket_cap_mb": params["bucket_cap_mb"]} if params["bucket_cap_mb"] else {}
    if params.get("sync_every"):
        options["sync_every"] = params["sync_every"]
        codecs += ["local", "local-int8"]
    spec = {
        "kind": kind,
        "arms": [*(["plain"] if kind == "step" else []), *codecs, *peers],
        "rounds": params["rounds"],
        "interface": params["network_interfaces"],
        "options": options,
        "batch": params.get("batch", 4),
        **more,
    }
    return run_bench(spec, num_proc, flags)


def _number(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 2:
        raise ConfigError(f"np is {text!r}; allowed: numbers of workers, 2 or more.")
    return found


def _show(params: dict[str, Any], result: Any, rows: list[list[str]], title: str) -> None:
    if params["as_json"]:
        click.echo(json.dumps(result))
        return
    click.echo(f"{title}\n")
    click.echo(tables.table(rows))


@bench.command()
@_np("2")
@_shared
@click.option("--link-mbit", type=float, help="Speed of the link: shows the part of it that is reached.")
@click.option("--max-mb", default=64.0, show_default=True, help="Largest gradient.")
def allreduce(num_proc: str, link_mbit: float | None, max_mb: float, **params: Any) -> None:
    """Sum one gradient over workers, by size: bus bandwidth in MB/s, as though nothing were compressed."""
    (workers,) = _number(num_proc)[:1]
    sizes = [size for size in (2**12, 2**15, 2**18, 2**20, 2**22, 2**24, 2**26) if size <= max_mb * 2**20]
    if not sizes:
        raise ConfigError(f"max-mb is {max_mb}; allowed: 0.004 or more.")
    result = _measure("allreduce", workers, params, sizes=sizes)
    title = f"Sum of a gradient, {workers} workers over {result['controller']}: MB/s"
    _show(params, result, tables.allreduce_rows(result, link_mbit), title)
    if params["plot"]:
        points = {
            name: [
                (size, tables.bus_bandwidth(size, tables.median_of(result["sums"][str(size)][name]), workers) / 1e6)
                for size in sizes
            ]
            for name in result["sums"][str(sizes[0])]
        }
        tables.plot(params["plot"], title, "allreduce", points)


@bench.command()
@_np("2")
@_shared
@_step_flags
def step(num_proc: str, **params: Any) -> None:
    """Train a GPT of 6.8 million parameters: a step against the same without communication."""
    (workers,) = _number(num_proc)[:1]
    result = _measure("step", workers, params)
    title = f"A training step, {workers} workers over {result['controller']}, {params['rounds']} rounds"
    _show(params, result, tables.step_rows(result), title)
    if not params["as_json"]:
        for name, reason in result["plans"].items():
            click.echo(f"\n{name}: {reason}")
    if params["plot"]:
        tables.plot(params["plot"], title, "step", tables.ratios(result["steps"], "plain"))


@bench.command()
@_np("2,4")
@_shared
@_step_flags
def scaling(num_proc: str, **params: Any) -> None:
    """The same step over several numbers of workers: the part of the ideal speed that is reached."""
    results = [_measure("step", workers, params) for workers in _number(num_proc)]
    title = f"Scaling over {results[0]['controller']}, the same work for each worker"
    rows = tables.scaling_rows(results)
    _show(params, results, rows, title)
    if params["plot"]:
        points = {
            name: [(r["workers"], 1 / tables.ratios(r["steps"], "plain")[name].median) for r in results]
            for name in rows[0][1:]
        }
        tables.plot(params["plot"], title, "scaling", points)
