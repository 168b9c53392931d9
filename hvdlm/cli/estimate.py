"""``hvdlm estimate``: memory, traffic and efficiency before there is a cluster."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from hvdlm.algorithms.estimate import BYTES, Model, estimate, parse_count, parse_link
from hvdlm.cli.verify import how_to_run, imported_by, traced
from hvdlm.errors import ConfigError

__all__ = ["estimate_command"]

_WIDTHS = (7, 8, 9, 9, 9, 9, 7, 10)


@click.command(
    "estimate",
    help="Memory, bytes and expected efficiency of SCRIPT (a short run measures it) or of a model of --params.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--params", metavar="COUNT", help="Trainable parameters, as in 124M; instead of a script.")
@click.option("--step-seconds", type=float, help="Of a step of the global batch on one worker; with --params.")
@click.option("--link", default="1Gbit", show_default=True, help="Speed of each worker's link, in bits per second.")
@click.option("--latency-us", type=float, default=50.0, show_default=True, help="Of a message, in microseconds.")
@click.option("--workers", default="2,4,8,16", show_default=True, help="Numbers of workers, by comma.")
@click.option("--compression", type=click.Choice(sorted(BYTES)), default="none", show_default=True)
@click.option("--per-worker", is_flag=True, help="The batch is each worker's: the global batch grows.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGS]...]")
def estimate_command(
    params: str | None,
    step_seconds: float | None,
    link: str,
    latency_us: float,
    workers: str,
    compression: str,
    per_worker: bool,
    as_json: bool,
    words: tuple[str, ...],
) -> None:
    if bool(params) == bool(words):
        raise ConfigError("give either a script or --params.", hint="hvdlm estimate --params 124M --step-seconds 0.5")
    try:
        speed = parse_link(link)
        counts = [int(part) for part in workers.split(",")]
        measured = _measured(words) if words else None
        if measured is None and not step_seconds:
            raise ValueError("--params needs --step-seconds: what a step takes on one worker")
        model = Model(
            parameters=measured[0] if measured else parse_count(str(params)),
            state_per_parameter=measured[1] if measured else 8.0,
            step_seconds=measured[2] if measured else float(step_seconds or 0),
            link_bytes_per_second=speed,
            latency_seconds=latency_us * 1e-6,
            bytes_per_element=BYTES[compression],
        )
        rows = [estimate(model, count, per_worker=per_worker) for count in counts]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{error}.", hint="hvdlm estimate --help") from None
    if as_json:
        click.echo(json.dumps({"model": asdict(model), "estimates": [asdict(row) for row in rows]}, indent=2))
        return
    click.echo(
        f"{model.parameters:,.0f} parameters, {model.step_seconds * 1e3:,.1f} ms a step on one worker, {link}, "
        f"compression={compression}"
    )
    titles = ("workers", "memory", "sent/step", "compute", "transfer", "exposed", "speedup", "efficiency")
    click.echo("  ".join(f"{title:>{width}}" for title, width in zip(titles, _WIDTHS, strict=True)))
    for row in rows:
        milliseconds = [f"{1e3 * v:,.0f} ms" for v in (row.compute_seconds, row.transfer_seconds, row.exposed_seconds)]
        cells = [str(row.workers), _size(row.memory_bytes), _size(row.sent_bytes), *milliseconds]
        cells += [f"{row.speedup:.2f}x", f"{row.efficiency:.0%}"]
        click.echo("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)))
    click.echo("Memory is without activations. The model behind it is stated in hvdlm/algorithms/estimate.py.")


def _measured(words: tuple[str, ...]) -> tuple[float, float, float]:
    """(parameters, bytes of optimizer state for each, seconds of a step) of a script on one worker.

    Raises:
        ConfigError: No step could be timed.
    """
    if not os.path.isfile(words[0]):
        raise ConfigError(f"there is no script {words[0]!r}.", hint="hvdlm estimate train.py")
    if imported_by(words[0]) & {"keras", "tensorflow"} and "torch" not in imported_by(words[0]):
        raise ConfigError(
            f"{words[0]} is a Keras script: its compiled steps cannot be timed one by one from outside.",
            hint="hvdlm estimate --params 1.3M --step-seconds 0.2 (model.count_params(), and what fit shows)",
        )
    with tempfile.TemporaryDirectory(prefix="hvdlm-estimate-") as scratch:
        (trace,) = traced(1, 15, how_to_run(words[0]), words, Path(scratch))
    gaps = [b - a for a, b in zip(trace.times, trace.times[1:], strict=False)][2:]
    if not gaps or not trace.parameters:
        raise ConfigError(
            f"{words[0]} made too few steps to be timed{': ' + trace.error if trace.error else ''}.",
            hint="give it arguments with which it trains for 15 steps",
        )
    return float(trace.parameters), trace.state_bytes / trace.parameters, statistics.median(gaps)


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
