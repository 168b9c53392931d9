"""What a step's communication costs under each codec, and which one to take.

A model of few numbers: a collective of b bytes takes its latency and b over the link's bandwidth; buckets travel while
backward makes the next one, so that what a step waits for is the last bucket, or what is left of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "CAPS_BYTES",
    "ORDER",
    "Choice",
    "Link",
    "Load",
    "candidates",
    "choose",
    "sent_bytes",
    "step_overhead",
    "why_part",
]

CAPS_BYTES = tuple(int(mb * 2**20) for mb in (1, 2, 4, 8, 32))
"""Bucket sizes to choose among. Few, so that two runs on one cluster choose alike."""
ORDER = ("none", "fp16", "bf16", "int8", "powersgd", "topk")
"""From what changes gradients least to what changes them most."""
STAGES = {"none": 1, "fp16": 2, "bf16": 2, "int8": 2, "powersgd": 2, "topk": 1}
"""Collectives of a bucket, one after the other."""
OVERLAP = 0.6
"""Part of a backward that communication hides behind: it begins with the first full bucket, and slows it down."""
LEAST_IDLE = 0.25
"""Part of it that is left even to who looks for messages from another host without a pause: that yields."""
PARTING = 0.25
"""Workers train on their own only if a step would else take longer by more than this: it is another training."""
WORTH = 0.05
"""A codec that changes gradients more is taken only if a step gets faster by more than this."""


@dataclass(frozen=True)
class Link:
    """What lies between workers, as the slowest of them sees it."""

    latency: float
    """Seconds of a collective of a few bytes."""
    bandwidth: float
    """Bytes a second that a worker sends in a collective."""
    within_host: bool = False
    """Whether all workers are on one host: processors move every byte, and nobody waits for a wire."""
    busy: float = 0.0
    """Part of a processor's time that a worker takes while a collective runs: to copy, to add up, to look for more."""

    def __str__(self) -> str:
        """As in reports."""
        return f"{self.latency * 1e3:.2f} ms, {self.bandwidth * 8e-6:,.0f} Mbit/s, {self.busy:.1f} processors"


@dataclass(frozen=True)
class Load:
    """What a step has to send."""

    num_elements: int
    """Of all gradients."""
    thin_elements: int
    """What PowerSGD would send instead."""
    topk_ratio: float
    workers: int
    compute: float
    """Seconds of forward, backward and optimizer."""
    backward: float
    """Seconds of backward, which communication can hide behind."""
    itemsize: int = 4
    processors: float = 1.0
    """On which a worker computes; infinity where accelerators do. Communication takes one of them while it copies."""


@dataclass(frozen=True)
class Choice:
    """What to do, and what it should cost."""

    codec: str
    cap_bytes: int
    overhead: float
    """Seconds a step takes longer than without communication, as the model has it."""
    reason: str


def sent_bytes(codec: str, load: Load) -> float:
    """Bytes that a worker sends at each step.

    >>> sent_bytes("fp16", Load(1000, 50, 0.01, 2, 0.0, 0.0))
    2000.0
    """
    n, others = load.num_elements, load.workers - 1
    both_ways = 2 * others / load.workers
    if codec == "topk":
        return others * load.topk_ratio * n * (load.itemsize + 4)
    if codec == "powersgd":
        return both_ways * load.thin_elements * load.itemsize
    each = {"none": load.itemsize, "fp16": 2, "bf16": 2, "int8": 1 + load.itemsize / 256}[codec]
    return both_ways * n * each


def step_overhead(codec: str, load: Load, link: Link, cost: float, cap_bytes: float) -> float:
    """Seconds that a step waits for communication.

    Args:
        codec: A name in :data:`ORDER`.
        load: What there is to send.
        link: Over what.
        cost: Seconds of encoding and decoding at each step.
        cap_bytes: Largest bucket, before encoding.
    """
    buckets = max(1, -(-load.num_elements * load.itemsize // int(cap_bytes)))
    travelling = buckets * STAGES[codec] * link.latency + sent_bytes(codec, load) / link.bandwidth
    # What a fast link moves, a processor copies and adds up; only waiting for a slow one costs nothing.
    idle = 1 - 1 / load.processors if link.within_host else max(LEAST_IDLE, 1 - link.busy / load.processors)
    hidden = OVERLAP * idle * load.backward * (buckets - 1) / buckets
    return cost + max(travelling / buckets, travelling - hidden, (1 - idle) * travelling)


def choose(
    codecs: Sequence[str],
    load: Load,
    link: Link,
    costs: Mapping[str, float],
    caps: Sequence[int] = CAPS_BYTES,
) -> Choice:
    """The codec and bucket size to take: of those within :data:`WORTH` of the fastest step, the most faithful codec.

    Args:
        codecs: Allowed ones.
        load: What there is to send.
        link: Over what.
        costs: Seconds of encoding and decoding at each step, by codec.
        caps: Bucket sizes to choose among, in bytes.
    """
    best = {}
    for codec in sorted(codecs, key=ORDER.index):
        # Of sizes that cost the same the largest: fewer collectives for what else there is to do.
        found = [(step_overhead(codec, load, link, costs.get(codec, 0.0), cap), -cap) for cap in caps]
        best[codec] = min(found)
    fastest = min(overhead for overhead, _ in best.values())
    limit = (load.compute + fastest) * (1 + WORTH) - load.compute
    codec = next(name for name, (overhead, _) in best.items() if overhead <= limit)
    told = ", ".join(f"{name} {overhead * 1e3:,.0f}" for name, (overhead, _) in best.items())
    overhead, cap = best[codec][0], -best[codec][1]
    reason = (
        f"compression={codec}, buckets of {cap / 2**20:g} MB: {load.num_elements * load.itemsize / 2**20:.1f} MB of "
        f"gradients over {link}, {load.compute * 1e3:,.0f} ms of computing; ms added to a step: {told}"
    )
    return Choice(codec, cap, overhead, reason)


def candidates(
    codecs: Sequence[str], load: Load, link: Link, costs: Mapping[str, float], cap_bytes: int
) -> tuple[str, ...]:
    """The codecs that :func:`choose` may take, however long a step computes: each waits less than all before it."""
    found: list[str] = []
    least = float("inf")
    for codec in sorted(codecs, key=ORDER.index):
        overhead = step_overhead(codec, load, link, costs.get(codec, 0.0), cap_bytes)
        if overhead < least:
            found, least = [*found, codec], overhead
    return tuple(found)


def why_part(choice: Choice, load: Load, link: Link, sync_every: int) -> str | None:
    """Why workers should train on their own between synchronisations; None if they should not.

    Args:
        choice: The best way for gradients to travel at every step.
        load: What there is to send.
        link: Over what.
        sync_every: Steps between two synchronisations, which send everything uncoded.
    """
    meeting = step_overhead("none", load, link, 0.0, max(CAPS_BYTES)) / sync_every
    if load.compute + choice.overhead <= (load.compute + meeting) * (1 + PARTING):
        return None
    return (
        f"sync=local, every {sync_every} steps: {choice.codec} at every step would add {choice.overhead * 1e3:,.0f} ms "
        f"to {load.compute * 1e3:,.0f} ms of computing, this adds {meeting * 1e3:,.1f} ms, over {link}"
    )
