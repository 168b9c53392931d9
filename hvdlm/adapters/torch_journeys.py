"""How the gradients of a flat bucket travel where Horovod's allreduce cannot carry them: in compressed form.

A journey has stages: each waits for a collective, computes, and starts the next one. While backward goes on
:meth:`Journey.advance` takes the stages whose collective has arrived; :meth:`Journey.finish` waits for the rest. All
buffers are made once and used at every step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch

from hvdlm.adapters.torch_blocks import Blocks, Payload
from hvdlm.algorithms.codecs import CODECS

__all__ = ["CodedWire", "Exchange", "Journey", "TopK"]


class CodedWire(Protocol):
    """The collectives that journeys need. Results land in buffers that exist."""

    rank: int
    size: int

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin summing ``tensor`` in place over ranks; returns a handle."""
        ...

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        """Begin to send the k-th of ``size`` equal parts to rank k; those of all ranks land in ``out``."""
        ...

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        """Begin to send ``tensor`` to all ranks; those of all ranks, equally long, land in ``out``."""
        ...

    def arrived(self, handle: Any) -> bool:
        """Whether waiting would return at once."""
        ...

    def wait(self, handle: Any) -> None:
        """Wait until the result is in place."""
        ...


class Journey(ABC):
    """Stages of a bucket's sum.

    Args:
        wire: Collectives.
        name: Of the collectives; equal on all ranks.
    """

    residual: torch.Tensor | None = None
    """What this worker has not sent yet, laid out as the bucket; None for a codec without feedback."""

    def __init__(self, wire: CodedWire, name: str) -> None:
        self._wire, self._name = wire, name
        self._handle: Any = None
        self._next: Callable[[], None] | None = None

    def _await(self, handle: Any, then: Callable[[], None]) -> None:
        self._handle, self._next = handle, then

    @abstractmethod
    def start(self, flat: torch.Tensor, flags: torch.Tensor) -> None:
        """Encode and send. ``flat`` is overwritten by the sum, ``flags`` (uint8) by what any worker has set."""

    def advance(self) -> None:
        """Take the stages whose collective has arrived, without waiting."""
        while self._next is not None and self._wire.arrived(self._handle):
            self._take()

    def hop(self) -> bool:
        """Wait for one stage; whether another has begun."""
        if self._next is not None:
            self._take()
        return self._next is not None

    def finish(self) -> None:
        """Wait for all stages."""
        while self.hop():
            pass

    def _take(self) -> None:
        then, self._next = self._next, None
        self._wire.wait(self._handle)
        assert then is not None
        then()

    def extra_residual(self) -> torch.Tensor | None:
        """Residuals that lie elsewhere: laid out as the bucket, moved out by this call."""
        return None


class Exchange(Journey):
    """Block codecs: alltoall, a local sum in full precision, allgather. See :mod:`hvdlm.algorithms.codecs`."""

    def __init__(
        self,
        wire: CodedWire,
        name: str,
        *,
        codec: str,
        length: int,
        num_flags: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(wire, name)
        size = wire.size
        self._chunk = length // size
        self._blocks = Blocks(CODECS[codec], self._chunk, num_flags, dtype, device)
        payload = self._blocks.payload_bytes
        self._sent, self._received = (torch.zeros(size, payload, dtype=torch.uint8, device=device) for _ in "io")
        self._to = [Payload(row, self._blocks) for row in self._sent]
        self._from = [Payload(row, self._blocks) for row in self._received]
        self._sum = torch.zeros(self._chunk, dtype=dtype, device=device)
        self._kept: torch.Tensor | None = None
        if CODECS[codec].feedback:
            self.residual = torch.zeros(length, dtype=dtype, device=device)
            self._kept = torch.zeros_like(self._sum)

    @staticmethod
    def multiple(codec: str, size: int) -> int:
        """What the length of a bucket must be a multiple of."""
        return CODECS[codec].block * size

    def start(self, flat: torch.Tensor, flags: torch.Tensor) -> None:
        """See :meth:`Journey.start`."""
        self._flat, self._flags = flat, flags
        residuals = [None] * len(self._to) if self.residual is None else torch.split(self.residual, self._chunk)
        for values, payload, residual in zip(torch.split(flat, self._chunk), self._to, residuals, strict=True):
            self._blocks.encode(values, payload, residual)
            payload.flags.copy_(flags)  # everybody hears from everybody: no collective of their own
        self._await(self._wire.exchange(self._sent, self._received, f"{self._name}.out"), self._add)

    def _add(self) -> None:
        first, *others = self._from
        if self._kept is None:
            self._blocks.decode(first, self._sum)
        else:
            self._sum.copy_(self._kept)
            self._blocks.add(first, self._sum)
        for payload in others:
            self._blocks.add(payload, self._sum)
        for payload in self._from:
            self._flags |= payload.flags
        own = self._to[0]
        self._blocks.encode(self._sum, own, self._kept)
        self._await(self._wire.collect(own.data, self._received, f"{self._name}.back"), self._read)

    def _read(self) -> None:
        for payload, values in zip(self._from, torch.split(self._flat, self._chunk), strict=True):
            self._blocks.decode(payload, values)

    def extra_residual(self) -> torch.Tensor | None:
        """See :meth:`Journey.extra_residual`: what encoding the sum of this worker's chunk has dropped."""
        if self._kept is None or self.residual is None:
            return None
        extra = torch.zeros_like(self.residual)
        torch.split(extra, self._chunk)[self._wire.rank].copy_(self._kept)
        self._kept.zero_()
        return extra


class TopK(Journey):
    """Each worker's largest values with their places, to everybody."""

    def __init__(
        self,
        wire: CodedWire,
        name: str,
        *,
        ratio: float,
        length: int,
        num_flags: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(wire, name)
        self._count = max(1, math.ceil(ratio * length))
        self._num_flags = num_flags
        size = -(-(self._count * (dtype.itemsize + 4) + num_flags) // 8) * 8
        self._sent = torch.zeros(size, dtype=torch.uint8, device=device)
        self._received = torch.zeros(wire.size, size, dtype=torch.uint8, device=device)
        self._dtype = dtype
        self.residual = torch.zeros(length, dtype=dtype, device=device)

    def _parts(self, payload: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = self._count * self._dtype.itemsize
        places = values + self._count * 4
        flags = payload[places : places + self._num_flags]
        return payload[:values].view(self._dtype), payload[values:places].view(torch.int32), flags

    def start(self, flat: torch.Tensor, flags: torch.Tensor) -> None:
        """See :meth:`Journey.start`."""
        self._flat, self._flags = flat, flags
        assert self.residual is not None
        at = _largest(flat, self._count)
        values, places, own_flags = self._parts(self._sent)
        torch.index_select(flat, 0, at, out=values)
        places.copy_(at)
        own_flags.copy_(flags)
        self.residual.copy_(flat)
        self.residual.index_fill_(0, at, 0.0)
        if not bool(torch.isfinite(values).all()):
            self.residual.nan_to_num_(0.0, 0.0, 0.0)
        self._await(self._wire.collect(self._sent, self._received, f"{self._name}.top"), self._add)

    def _add(self) -> None:
        self._flat.zero_()
        for payload in self._received:
            values, places, flags = self._parts(payload)
            self._flat.index_add_(0, places, values)
            self._flags |= flags


def _largest(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest magnitudes; a NaN counts as the largest of all."""
    magnitude = flat.abs()
    sample = magnitude[:: max(1, len(flat) // 16384)]
    # A threshold from a sample leaves few candidates; selecting among all of them takes four times as long.
    wanted = min(len(sample), math.ceil(1.3 * count / len(flat) * len(sample)) + 8)
    threshold = sample.topk(wanted).values[-1]
    candidates = torch.nonzero(~(magnitude < threshold)).view(-1)
    if count <= len(candidates) < len(flat):
        return candidates[magnitude[candidates].topk(count, sorted=False).indices]
    return magnitude.topk(count, sorted=False).indices
