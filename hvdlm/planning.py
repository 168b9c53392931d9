"""Measures the link between workers. Every worker ends with the same figures, so all choose alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.comm_model import ORDER, Link
from hvdlm.contracts import Collectives
from hvdlm.options import Options

__all__ = [
    "FIRST_LOOK",
    "LOOK_EVERY",
    "agree_on",
    "allowed_codecs",
    "beyond_none",
    "drifted",
    "measure_link",
    "median",
    "why_not_halves",
]

FIRST_LOOK = 4
"""Steps after which the time of computing is known well enough to choose again."""
LOOK_EVERY = 100
"""Steps between two looks at how long they wait."""
_DRIFT = 1.5
"""The link is measured anew when steps wait this many times as long, or as short, as before."""

_TRIALS = 4
_SMALL_REPEATS = 5
_SIZES = (2**18, 2**21, 2**23)
"""Float32 elements of growing probes: 1, 8 and 32 MB."""
_ENOUGH_SECONDS = 0.03
"""A probe that took this long says enough; a slow link is not kept busy with larger ones."""


def agree_on(collectives: Collectives, *values: float) -> list[float]:
    """The largest of each value over workers: what the slowest has measured."""
    return [float(value) for value in collectives.allreduce(np.array(values, dtype=np.float64), "max")]


def why_not_halves(compression: str, within_host: bool, sums_halves: bool) -> str:
    """Why half floats that are asked for would take longer than float32, the beginning of a sentence; empty if not.

    Args:
        compression: What is asked for.
        within_host: Whether all workers are on one host, and compute on its processors.
        sums_halves: Whether the allreduce adds half floats as fast as it moves them: over Gloo it does not.
    """
    if compression not in ("fp16", "bf16") or not within_host or sums_halves:
        return ""
    return f"{compression} takes longer to code than it saves over Gloo on one host: "


def allowed_codecs(options: Options, within_host: bool, sums_halves: bool) -> tuple[list[str], str]:
    """The codecs that a plan may take, and why they are fewer than were asked for, the beginning of a sentence.

    Args:
        options: What is asked for.
        within_host: Whether all workers are on one host, and compute on its processors.
        sums_halves: As for :func:`why_not_halves`.
    """
    instead = why_not_halves(options.compression, within_host, sums_halves)
    if options.compression == "auto" and within_host:
        instead = "on one host codecs take longer than they save: "
    if instead or (options.compression == "auto" and options.exact):
        return ["none"], instead
    return list(ORDER) if options.compression == "auto" else [options.compression], ""


def beyond_none(
    codecs: Sequence[str], trial: Callable[[str], Callable[[], object]], num_elements: int
) -> dict[str, float]:
    """Seconds that each codec takes for an element, beyond those of ``none``: the quickest of a few steps.

    Args:
        codecs: Names.
        trial: Makes a step under a codec, in which nothing travels.
        num_elements: Of a step.
    """
    found = {}
    for codec in {"none": None, **dict.fromkeys(codecs)}:
        step, times = trial(codec), []
        for _ in range(_TRIALS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        found[codec] = min(times) / num_elements
    return {codec: max(0.0, found[codec] - found["none"]) for codec in codecs}


def drifted(wait: float, usual: float | None, compute: float) -> bool:
    """Whether steps wait for something else than they used to.

    Args:
        wait: Seconds of a step.
        usual: The same, some time ago; None if that is not known.
        compute: Seconds a step computes: a wait of a hundredth of that is not worth looking at.
    """
    if usual is None or abs(wait - usual) <= 0.01 * compute:
        return False
    return not 1 / _DRIFT < wait / max(usual, 1e-9) < _DRIFT


def median(values: Sequence[float]) -> float:
    """The middle one, or the one above; 0 of none."""
    return float(sorted(values)[len(values) // 2]) if len(values) else 0.0


def measure_link(collectives: Collectives, workers: int, within_host: bool = False) -> Link:
    """Latency of a small sum, bandwidth of a large one, and its processors. Takes 20 ms, or a second at 10 Mbit.

    Args:
        collectives: Between all workers.
        workers: How many there are.
        within_host: Whether all of them are on one host.
    """
    small = np.ones(2, dtype=np.float32)
    times = [_timed(collectives, small)[0] for _ in range(_SMALL_REPEATS)]
    (latency,) = agree_on(collectives, float(np.min(times)))
    bandwidth = busy = 0.0
    for elements in _SIZES:
        probe = np.zeros(elements, dtype=np.float32)
        once, cpu = _timed(collectives, probe)
        seconds, busy = agree_on(collectives, once, cpu / once)
        if seconds < _ENOUGH_SECONDS:  # another's work may have come between
            again, cpu = min((once, cpu), _timed(collectives, probe))
            seconds, busy = agree_on(collectives, again, cpu / again)
        travelled = 2 * (workers - 1) / workers * probe.nbytes
        bandwidth = travelled / max(seconds - latency, seconds / 2)
        if seconds > _ENOUGH_SECONDS:
            break
    return Link(latency, bandwidth, within_host, busy)


def _timed(collectives: Collectives, probe: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Seconds, and seconds of processors that this process took meanwhile, in all of its threads."""
    start, cpu = time.perf_counter(), time.process_time()
    collectives.allreduce(probe)
    cpu = time.process_time() - cpu
    return time.perf_counter() - start, cpu
