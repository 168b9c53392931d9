"""What a job would need and reach, from the size of the model, the time of a step and the link: a stated model.

A ring allreduce of P bytes among N workers sends 2 (N - 1) / N P bytes from each (Patarasuk & Yuan 2009), in 2 (N - 1)
rounds that each pay the latency. Gradients travel while backward goes on: what is sent within the part of a step that
backward takes costs nothing, but the last bucket can only start when backward has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BYTES", "Estimate", "Model", "estimate", "parse_count", "parse_link"]

BYTES = {"none": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0}
"""Bytes that an element of a gradient takes on its way, by ``compression``."""
_BACKWARD = 0.6
"""Part of a step that backward takes, of which gradients can travel along."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained, and on what."""

    parameters: float
    """Trainable elements."""
    state_per_parameter: float = 8.0
    """Bytes of optimizer state: 8 for Adam in float32, 4 for SGD with momentum, 0 without."""
    step_seconds: float
    """Of a whole global batch on one worker, without communication."""
    fixed_seconds: float = 0.0
    """Part of it that does not shrink with the batch: the optimizer's step."""
    link_bytes_per_second: float
    latency_seconds: float = 50e-6
    bucket_bytes: float = 32 * 2**20
    bytes_per_element: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """For one number of workers. Bytes and seconds are of one worker and one step."""

    workers: int
    memory_bytes: float
    """Parameters, gradients, buckets and optimizer state; activations come on top."""
    sent_bytes: float
    compute_seconds: float
    transfer_seconds: float
    exposed_seconds: float
    """Of the transfer, what a step has to wait for."""
    step_seconds: float
    speedup: float
    """Against one worker, with the same global batch."""

    @property
    def efficiency(self) -> float:
        """Speedup for each worker."""
        return self.speedup / self.workers


def estimate(model: Model, workers: int, *, per_worker: bool = False) -> Estimate:
    """What ``workers`` would need and reach.

    Args:
        model: What is trained.
        workers: At least 1.
        per_worker: Whether the batch of ``model.step_seconds`` is each worker's; then the global batch grows.

    Raises:
        ValueError: A number is not positive.
    """
    if workers < 1 or min(model.parameters, model.step_seconds, model.link_bytes_per_second) <= 0:
        raise ValueError("workers, parameters, step_seconds and link_bytes_per_second must be positive")
    gradient = 4.0 * model.parameters
    wire = model.bytes_per_element * model.parameters
    buffers = gradient + (wire if model.bytes_per_element < 4 else 0.0) if workers > 1 else 0.0
    memory = gradient + gradient + buffers + model.state_per_parameter * model.parameters
    scaled = model.step_seconds - model.fixed_seconds
    compute = model.fixed_seconds + (scaled if per_worker else scaled / workers)
    ring = 2.0 * (workers - 1) / workers
    sent = ring * wire
    buckets = max(1.0, gradient / model.bucket_bytes)
    rounds = 2.0 * (workers - 1) * model.latency_seconds * buckets
    transfer = sent / model.link_bytes_per_second + rounds
    last = transfer / buckets
    exposed = max(last, transfer - _BACKWARD * compute) if workers > 1 else 0.0
    step = compute + exposed
    work = workers if per_worker else 1
    return Estimate(
        workers=workers,
        memory_bytes=memory,
        sent_bytes=sent,
        compute_seconds=compute,
        transfer_seconds=transfer,
        exposed_seconds=exposed,
        step_seconds=step,
        speedup=model.step_seconds * work / step,
    )


def parse_count(text: str) -> float:
    """A number with a unit.

    >>> parse_count("124M"), parse_count("1.5b"), parse_count("4096")
    (124000000.0, 1500000000.0, 4096.0)

    Raises:
        ValueError: It is none, or not positive.
    """
    number = text.strip().lower().rstrip("kmgbt")
    unit = text.strip().lower()[len(number) :]
    value = float(number) * _UNITS[unit] if unit in _UNITS else float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is no count such as 124M")
    return value


def parse_link(text: str) -> float:
    """Bytes per second of a link given in bits per second.

    >>> parse_link("1Gbit"), parse_link("100mbit")
    (125000000.0, 12500000.0)

    Raises:
        ValueError: It is none, or not positive.
    """
    lowered = text.strip().lower()
    for ending in ("bit/s", "bps", "bit"):
        lowered = lowered.removesuffix(ending)
    return parse_count(lowered) / 8
