"""From the traces of one worker and of several to the causes of what differs between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.verify.compare import Comparison, compare
from hvdlm.verify.trace import Trace

__all__ = ["Finding", "diagnose"]

_CLOSE = {"none": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
"""Relative difference of gradients that sums in another order, and rounding, explain; what other codecs drop is their
own affair."""
_FAR = 0.05
"""Part of the way of the parameters that rounding explains."""


@dataclass(frozen=True)
class Finding:
    """A cause, what shows it, and what to do."""

    cause: str
    evidence: str
    suggestion: str


def diagnose(one: Trace, several: Sequence[Trace], *, uneven: bool = False) -> list[Finding]:
    """The causes found, the most certain first; empty if nothing differs.

    Args:
        one: The run on one worker.
        several: All ranks of the run on several.
        uneven: Whether the workers had uneven shares, and nothing was found with even ones.
    """
    found = [
        *_steps_on_some_ranks(several),
        *_failed(one, several),
        *_files(several),
        *_same_batches(several),
        *_not_shared(one, several),
        *_learning_rate(one, several),
        *_parameters(several),
        *_buffers(several),
    ]
    causes = {finding.cause for finding in found}
    if not causes & {"data", "optimizer step", "failed"}:
        found += _gradients(one, several, uneven)
    stuck = [trace.rank for trace in several if trace.stuck]
    if stuck and not found:
        found.append(
            Finding(
                "failed",
                f"rank {stuck[0]} waits in a collective that the others do not come to",
                "hvdlm run tells where each rank is: --watchdog-seconds 10",
            )
        )
    return found


def _failed(one: Trace, several: Sequence[Trace]) -> list[Finding]:
    for trace in (one, *several):
        if trace.error:
            where = "one worker" if trace.size == 1 else f"rank {trace.rank} of {trace.size}"
            cause = "data" if "same batches" in trace.error else "failed"
            return [Finding(cause, f"on {where}: {trace.error.splitlines()[0]}", "see the message")]
    if not one.steps and not one.backwards:
        return [Finding("failed", "no training step was seen", "give the script arguments with which it trains")]
    return []


def _steps_on_some_ranks(several: Sequence[Trace]) -> list[Finding]:
    counts = [trace.attempts for trace in several]
    # The last step may be cut off on a rank that was ended a moment earlier.
    unequal = max(counts) - min(counts) > 1 and not any(trace.error for trace in several)
    # Where a step is what sums gradients, ranks that make it wait, or fail, without those that never do.
    never = max(counts) > 0 and any(
        not t.attempts and (t.backwards > 1 if not t.error else t.backwards and "Horovod" in t.error) for t in several
    )
    if not unequal and not never:
        return []
    told = ", ".join(f"rank {trace.rank}: {count}" for trace, count in zip(several, counts, strict=True))
    return [
        Finding(
            "optimizer step",
            f"the optimizer made unequal numbers of steps ({told})",
            "let every rank call optimizer.step(): remove the condition on the rank",
        )
    ]


def _files(several: Sequence[Trace]) -> list[Finding]:
    writers = [trace.rank for trace in several if trace.saved]
    if len(writers) < 2:
        return []
    return [
        Finding(
            "checkpoint",
            f"ranks {', '.join(map(str, writers))} all write {several[writers[0]].saved[0]}",
            "hvdlm.save(state, path) writes on rank 0, and lets the others wait",
        )
    ]


def _same_batches(several: Sequence[Trace]) -> list[Finding]:
    if len(several) < 2 or several[0].options.get("partition") == "none":
        return []
    batches = min(len(trace.batches) for trace in several)
    # In a script that draws by hand the first batch may be the same: streams are separated when training begins.
    later = range(1 if batches > 1 else 0, batches)
    same = [i for i in later if all(trace.batches[i] == several[0].batches[i] != [] for trace in several)]
    if not same or len(same) < len(later):
        return []
    return [
        Finding(
            "data",
            f"every rank computes the same batches (all {len(same)} compared)",
            "give the DataLoader to hvdlm.wrap; or share the data out: data = hvdlm.shard(data, dim)",
        )
    ]


def _not_shared(one: Trace, several: Sequence[Trace]) -> list[Finding]:
    """A loader that hvdlm was not given is as long on every worker as on one."""
    if len(several) < 2 or several[0].options.get("partition") == "none" or not one.unshared:
        return []
    if any(trace.handed or trace.unshared != one.unshared for trace in several):
        return []
    return [
        Finding(
            "data",
            f"every rank reads all {one.unshared} batches of the data by itself: {len(several)} times the samples",
            "give the loader (under Keras the model or the data set) to hvdlm.wrap too: it is then shared out",
        )
    ]


def _learning_rate(one: Trace, several: Sequence[Trace]) -> list[Finding]:
    size, options = len(several), several[0].options
    factor = {"linear": float(size), "sqrt": math.sqrt(size)}.get(str(options.get("lr_scale")), 1.0)
    for number, (a, b) in enumerate(zip(one.steps, several[0].steps, strict=False), 1):
        if a.lr and not math.isclose(b.lr, a.lr * factor, rel_tol=1e-6):
            return [
                Finding(
                    "learning rate",
                    f"step {number} uses {b.lr:g} on {size} workers and {a.lr:g} on one: {b.lr / a.lr:g} times, where "
                    f"{factor:g} was asked for",
                    "let hvdlm scale it (lr_scale), or multiply the rate that the script sets in each step; with "
                    'batch="global" it needs no scaling at all',
                )
            ]
    return []


def _parameters(several: Sequence[Trace]) -> list[Finding]:
    if several[0].options.get("sync") == "local":
        return []  # each worker trains on its own for a while: that is what was asked for
    found = []
    unknown = [name for trace in several for name in trace.unknown]
    steps = min(len(trace.steps) for trace in several)
    for number in range(steps):
        columns = [trace.steps[number].digests for trace in several]
        differing = [name for name in columns[0] if len({column.get(name) for column in columns}) > 1]
        if differing:
            first = f"parameter {differing[0]} of the optimizer differs between ranks after step {number + 1}"
            names = {key for trace in several for key in trace.initial}
            seeded = [n for n in names if len({trace.initial.get(n) for trace in several}) > 1]
            if unknown:
                found.append(
                    Finding(
                        "parameter", f"{first}, and hvdlm was not given it", "pass all models and optimizers to wrap"
                    )
                )
            elif seeded:
                found.append(Finding("seed", f"{first}; ranks built different models", "seed alike on every rank"))
            else:
                found.append(Finding("parameter", first, "change parameters on every rank alike, after hvdlm.wrap too"))
            return found
    names = {key for trace in several for key in trace.initial}
    seeded = sorted(n for n in names if len({trace.initial.get(n) for trace in several}) > 1)
    if seeded:
        found.append(
            Finding(
                "seed",
                f"ranks built different models ({seeded[0]} differs before hvdlm makes them equal)",
                "seed alike on every rank before the model is built: torch.manual_seed(seed), not seed + rank",
            )
        )
    return found


def _buffers(several: Sequence[Trace]) -> list[Finding]:
    names = {name for trace in several for name in trace.buffers}
    differing = sorted(n for n in names if len({trace.buffers.get(n) for trace in several}) > 1)
    if not differing:
        return []
    norms = [n for n in differing if "BatchNorm" in n and ("running_" in n or "moving_" in n)]
    if norms:
        return [
            Finding("batch norm", f"{norms[0]} differs between ranks", 'batch_norm="sync" uses the whole global batch')
        ]
    return [
        Finding(
            "buffer", f"buffer {differing[0]} differs between ranks", "compute it from what all ranks hold (hvdlm.mean)"
        )
    ]


def _gradients(one: Trace, several: Sequence[Trace], uneven: bool) -> list[Finding]:
    """Compares gradients, which at the first step are of equal parameters, where they are of the same samples."""
    compared = compare(one, several)
    close = _CLOSE.get(str(several[0].options.get("compression", "none")))
    if not compared or close is None:
        return []
    a, b = one.steps[0], several[0].steps[0]
    dot = sum(x * y for x, y in zip(a.sample, b.sample, strict=True))
    square, other = sum(x * x for x in a.sample), sum(y * y for y in b.sample)
    ratio = b.norm / a.norm
    alike = dot / math.sqrt(square * other) if square and other else 0.0
    if abs(ratio - 1) <= close and alike > 1 - close:
        return _way(compared, several)
    if uneven:
        return [
            Finding(
                "loss",
                f"gradients of the same samples differ (cosine {alike:.4f}), and with equal shares they do not",
                "divide the loss by the samples that this worker has, not by a fixed number",
            )
        ]
    if several[0].hooks:
        return [
            Finding(
                "clipping",
                f"the gradient is {ratio:.3g} times that of one worker, and {several[0].hooks[0]} changes gradients "
                "before they are summed",
                "clip when gradients are global: in PyTorch after backward(), in Keras by the optimizer (clipnorm)",
            )
        ]
    if alike > 0.99 and abs(ratio - 1) > 0.05:
        return [
            Finding(
                "loss",
                f"the gradient points the same way and is {ratio:.3g} times that of one worker",
                'a loss that is a mean needs reduction="mean", a loss that is a sum reduction="sum"',
            )
        ]
    if one.dropout:
        return [Finding("dropout", "gradients differ, and the model has dropout", "expected: verify with dropout off")]
    if one.batch_norms:
        return [Finding("batch norm", "gradients differ, and the model has BatchNorm", 'set batch_norm="sync"')]
    return [
        Finding("gradient", f"gradients of the same samples differ (cosine {alike:.4f})", "look at what uses the rank")
    ]


def _way(compared: Sequence[Comparison], several: Sequence[Trace]) -> list[Finding]:
    """The first gradient is right: do the parameters go where those of one worker go?"""
    last = compared[-1]
    exact = several[0].options.get("compression", "none") == "none" and several[0].options.get("prune") != "magnitude"
    if not exact or last.parameters is None or last.parameters <= _FAR:
        return []
    return [
        Finding(
            "parameter",
            f"after step {last.step} the parameters are {last.parameters:.1%} of their way apart from those of one "
            "worker, though the first gradient is the same",
            "look for what depends on the number of workers between two steps: rates, decay, averages",
        )
    ]
