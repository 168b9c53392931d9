"""Losses, gradients and parameters of one worker against those of several, where both took the same samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.verify.trace import Trace

__all__ = ["Comparison", "compare", "relative_difference"]


@dataclass(frozen=True)
class Comparison:
    """One optimizer step whose samples, and those of all steps before it, were the same."""

    step: int
    loss_one: float | None
    """Loss on one worker; None if the script computes none that is a number."""
    loss_several: float | None
    """Loss over the global batch on several."""
    gradient: float
    """2-norm of the difference of the gradients, relative to that of one worker."""
    parameters: float | None
    """2-norm of the difference of the parameters, relative to how far they have moved from the start."""


def compare(one: Trace, several: Sequence[Trace]) -> list[Comparison]:
    """The steps that can be compared: from the first on, until samples differ."""
    steps = min(len(trace.steps) for trace in (one, *several))
    batches = min(len(trace.batches) for trace in (one, *several))
    if not steps or not batches:
        return []
    each = max(1, len(one.batches) // len(one.steps))  # with accumulation a step takes several
    found = []
    for number in range(steps):
        own = range(number * each, (number + 1) * each)
        if own.stop > batches or not all(_same_samples(one, several, i) for i in own):
            break
        a, b = one.steps[number], several[0].steps[number]
        if len(a.sample) != len(b.sample) or len(a.values) != len(b.values) or not a.norm:
            break
        moved = _norm(_minus(a.values, one.start)) if len(one.start) == len(a.values) else 0.0
        found.append(
            Comparison(
                step=number + 1,
                loss_one=one.losses[own.start] if own.start < len(one.losses) else None,
                loss_several=_global_loss(several, own.start),
                gradient=relative_difference(a.sample, b.sample),
                parameters=_norm(_minus(a.values, b.values)) / moved if moved else None,
            )
        )
    return found


def relative_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """2-norm of the difference of two vectors relative to the first.

    >>> relative_difference([3.0, 4.0], [3.0, 4.5])
    0.1
    """
    return _norm(_minus(one, other)) / (_norm(one) or 1.0)


def _same_samples(one: Trace, several: Sequence[Trace], i: int) -> bool:
    return bool(one.batches[i]) and Counter(one.batches[i]) == Counter(
        row for trace in several for row in trace.batches[i]
    )


def _global_loss(several: Sequence[Trace], i: int) -> float | None:
    if any(i >= len(trace.losses) for trace in several):
        return None
    losses = [trace.losses[i] for trace in several]
    if several[0].options.get("reduction") == "sum":
        return sum(losses)
    rows = [len(trace.batches[i]) for trace in several]
    return sum(n * loss for n, loss in zip(rows, losses, strict=True)) / sum(rows)


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values))
