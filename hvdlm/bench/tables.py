"""What ``hvdlm bench`` shows: tables as text, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.bench.stats import Interval, median_interval
from hvdlm.errors import ConfigError

__all__ = ["allreduce_rows", "bus_bandwidth", "median_of", "plot", "ratios", "scaling_rows", "step_rows", "table"]


def ratios(times: Mapping[str, Sequence[float]], against: str) -> dict[str, Interval]:
    """Median of the ratios of neighbouring measurements, by arm."""
    return {
        name: median_interval([a / b for a, b in zip(values, times[against], strict=True)])
        for name, values in times.items()
    }


def median_of(values: Sequence[float]) -> float:
    """Their median."""
    return median_interval(values).median


def step_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Milliseconds of a step, and its ratio to one without communication."""
    found = ratios(result["steps"], "plain")
    rows = [["arm", "ms", "against plain"]]
    for name, ratio in found.items():
        rows.append([name, f"{median_of(result['steps'][name]) * 1e3:.1f}", str(ratio)])
    return rows


def bus_bandwidth(num_bytes: int, seconds: float, workers: int) -> float:
    """Bytes a second that a ring would have to send for it, were nothing compressed."""
    return 2 * (workers - 1) / workers * num_bytes / seconds


def allreduce_rows(result: Mapping[str, Any], link_mbit: float | None) -> list[list[str]]:
    """Bus bandwidth in MB/s by size; with a link's speed also the part of it that is reached."""
    sizes = sorted(result["sums"], key=int)
    rows = [["arm", *(_size(int(size)) for size in sizes)]]
    for name in result["sums"][sizes[0]]:
        cells = []
        for size in sizes:
            seconds = median_of(result["sums"][size][name])
            bandwidth = bus_bandwidth(int(size), seconds, result["workers"])
            share = f" ({bandwidth * 8e-6 / link_mbit:.0%})" if link_mbit else ""
            cells.append(f"{bandwidth * 1e-6:.1f}{share}")
        rows.append([name, *cells])
    return rows


def scaling_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Part of the ideal speed that is reached, by number of workers: a step alone over one with the others."""
    rows = [["workers", *(name for name in results[-1]["steps"] if name != "plain")]]
    for result in results:
        found = ratios(result["steps"], "plain")
        rows.append([str(result["workers"]), *(f"{1 / found[name].median:.1%}" for name in rows[0][1:])])
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(path: Path, title: str, kind: str, data: Any) -> None:
    """Write a PNG: bars of ratios for steps, curves for the others.

    Args:
        path: Where to.
        title: Above it.
        kind: ``step``, ``allreduce`` or ``scaling``.
        data: Interval by arm; or (x, y) points by arm.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib, which is not installed.", hint="pip install 'hvdlm[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    if kind == "step":
        middle = [ratio.median for ratio in data.values()]
        below = [ratio.median - ratio.low for ratio in data.values()]
        above = [ratio.high - ratio.median for ratio in data.values()]
        axes.barh(list(data), middle, xerr=[below, above], color="#4477aa")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("time of a step, against one without communication")
    else:
        for name, points in data.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.legend()
        if kind == "allreduce":
            axes.set(xscale="log", yscale="log", xlabel="bytes of gradients", ylabel="bus bandwidth, MB/s")
        else:
            axes.set(xlabel="workers", ylabel="part of the ideal speed", ylim=(0, 1.1))
    figure.savefig(path)


def _size(num_bytes: int) -> str:
    for unit, size in (("MB", 2**20), ("kB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}"
    return f"{num_bytes} B"
