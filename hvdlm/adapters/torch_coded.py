"""Buckets whose gradients travel encoded, and the choice of a bucket for each codec."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from hvdlm.adapters.torch_bucket import Bucket, Slot, Wire, slice_of
from hvdlm.adapters.torch_journeys import CodedWire, Exchange, Journey, TopK
from hvdlm.adapters.torch_powersgd import PowerSGD
from hvdlm.algorithms.codecs import CODECS
from hvdlm.options import Options

__all__ = ["BucketMaker", "CodedBucket", "ReducerWire", "bucket_maker", "capture", "maker_for", "pool", "restore"]


class ReducerWire(Wire, CodedWire, Protocol):
    """What buckets of all kinds need of Horovod."""

    sums_halves: bool
    """Whether the allreduce adds half floats as fast as it moves them: MPI's does, Gloo's adds them one by one."""


class BucketMaker(Protocol):
    """Makes one bucket."""

    def __call__(
        self, name: str, members: Sequence[torch.nn.Parameter], dtype: torch.dtype, device: torch.device
    ) -> Bucket:
        """A bucket of gradients, all of one type and device."""
        ...


def bucket_maker(codec: str, wire: ReducerWire, *, rank: int = 4, ratio: float = 0.01) -> BucketMaker:
    """How buckets are made under an option ``compression``.

    Args:
        codec: A name in :data:`hvdlm.algorithms.codecs.CODECS`.
        wire: Collectives.
        rank: Of PowerSGD.
        ratio: Part of the gradient that top-k sends.
    """
    if codec == "none" or (codec == "fp16" and wire.sums_halves):
        return functools.partial(Bucket, wire=wire, compress=codec == "fp16")
    return functools.partial(CodedBucket, wire=wire, codec=codec, rank=rank, ratio=ratio)


def maker_for(options: Options, wire: ReducerWire, codec: str | None = None) -> BucketMaker:
    """How buckets are made under these options; ``codec`` takes the place of ``compression``."""
    name = codec or options.compression.replace("auto", "none")  # until something is measured
    return bucket_maker(name, wire, rank=options.powersgd_rank, ratio=options.topk_ratio)


class CodedBucket(Bucket):
    """Gradients that travel together, encoded.

    Args:
        name: Name of the collectives; equal on all ranks, unique among buckets.
        members: The parameters, all of one device.
        dtype: Data type of the sum, float32 or float64.
        device: Where they are.
        wire: Collectives.
        codec: Name of the codec.
        rank: Of PowerSGD.
        ratio: Part of the gradient that top-k sends.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[torch.nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        *,
        wire: ReducerWire,
        codec: str,
        rank: int,
        ratio: float,
    ) -> None:
        blocks = CODECS[codec].block > 0
        # Without gaps between gradients: what lies in one would be encoded too.
        multiple = Exchange.multiple(codec, wire.size) if blocks else 1
        super().__init__(name, members, dtype, device, wire, compress=False, align_bytes=1, multiple=multiple)
        self._flags = torch.zeros(len(members), dtype=torch.uint8, device=device)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._under_way = False
        shared: dict[str, Any] = {"length": self._length, "num_flags": len(members), "dtype": dtype, "device": device}
        self._journey: Journey
        if blocks:
            self._journey = Exchange(wire, name, codec=codec, **shared)
        elif codec == "topk":
            self._journey = TopK(wire, name, ratio=ratio, **shared)
        else:
            shapes = [(slot.offset, slice_of(self._flat, slot).shape) for slot in self._slots.values()]
            self._journey = PowerSGD(wire, name, shapes=shapes, rank=rank, **shared)

    @property
    def launched(self) -> bool:
        """See :attr:`Bucket.launched`."""
        return self._under_way

    def _write(self, slot: Slot, grad: torch.Tensor) -> None:
        if self._journey.residual is None:
            super()._write(slot, grad)
            return
        residual, view = slice_of(self._journey.residual, slot), self._views[slot.number]
        grad = torch.view_as_real(grad.detach()) if grad.dtype.is_complex else grad.detach()
        weight = slot.weight
        assert weight is not None
        if weight == 0.0:
            view.copy_(residual)  # a NaN of a filler sample must not spread: 0 * NaN is NaN
        elif grad.dtype == view.dtype:
            torch.add(residual, grad, alpha=weight, out=view)
        else:
            view.copy_(grad)
            view.mul_(weight).add_(residual)

    def launch(self, counted: bool) -> None:
        """See :meth:`Bucket.launch`."""
        if self._unfilled == len(self._slots):
            self._renew()
        self._flat[self._flags_at :].zero_()
        self._flags.fill_(int(counted))
        if self._unfilled:
            for i, slot in enumerate(self._slots.values()):
                if slot.weight is None:
                    slice_of(self._flat, slot).zero_()
                    self._flags[i] = 0
                    if self._journey.residual is not None:
                        # Kept for a step that uses the parameter: where nobody does, what arrives is dropped.
                        own = slice_of(self._journey.residual, slot)
                        self._held.append((own, own.clone()))
                        own.zero_()
        self._all_used = counted and not self._unfilled
        self._pay()
        self._under_way = True
        self._journey.start(self._flat, self._flags)

    def advance(self) -> None:
        """See :meth:`Bucket.advance`."""
        if self._under_way:
            self._journey.advance()

    def hop(self) -> bool:
        """See :meth:`Bucket.hop`."""
        return self._journey.hop()

    def finish(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """See :meth:`Bucket.finish`."""
        self._journey.finish()
        self._under_way = False
        for own, held in self._held:
            own.add_(held)
        self._held.clear()
        return self._collect([True] * len(self._slots) if self._all_used else self._flags.tolist())

    def residual(self) -> torch.Tensor | None:
        """What this worker has not sent yet, laid out as the bucket; None for a codec that forgets it."""
        residual = self._journey.residual
        extra = self._journey.extra_residual()
        if residual is not None and extra is not None:
            residual += extra
        return residual

    def residuals(self) -> dict[int, torch.Tensor]:
        """By ``id`` of the parameter: what this worker has not sent yet. Views, to read or to fill."""
        residual = self.residual()
        return {} if residual is None else {key: slice_of(residual, slot) for key, slot in self._slots.items()}

    def warm(self) -> dict[int, torch.Tensor]:
        """By ``id`` of the parameter: where PowerSGD's next step starts. Views, to read or to fill."""
        if not isinstance(self._journey, PowerSGD):
            return {}
        keys = list(self._slots)
        return {keys[i]: q for i, q in self._journey.warm().items()}


def capture(buckets: Iterable[Bucket], names: Mapping[int, str]) -> dict[str, dict[str, torch.Tensor]]:
    """The state of the codecs between two steps, by name of the parameter, whatever buckets it travels in.

    ``residuals`` are this worker's own: only their sum over workers counts (see
    :func:`hvdlm.algorithms.codecs.redistribute`). ``warm`` is the same on all workers.
    """
    state: dict[str, dict[str, torch.Tensor]] = {"residuals": {}, "warm": {}}
    for bucket in buckets:
        state["residuals"].update((names[key], value.clone()) for key, value in bucket.owed.items())
        if isinstance(bucket, CodedBucket):
            state["residuals"].update((names[key], value.clone()) for key, value in bucket.residuals().items())
            state["warm"].update((names[key], value.clone()) for key, value in bucket.warm().items())
    return state


def pool(buckets: Iterable[Bucket], wire: Wire, size: int) -> None:
    """Give each worker an equal part of what all have not sent yet; the sum over workers, which is what training has
    yet to see, stays the same. Every rank calls it between the same two steps.
    """
    handles = []
    for bucket in buckets:
        residual = bucket.residual() if isinstance(bucket, CodedBucket) else None
        if residual is not None:
            handles.append((wire.start(residual, f"{bucket.name}.residual"), residual))
    for handle, residual in handles:
        wire.wait(handle)
        residual.div_(size)


def restore(
    buckets: Iterable[Bucket], names: Mapping[int, str], state: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Put back what :func:`capture` took; what the state lacks, or has in another shape, starts anew.

    A codec that forgets what it drops sends what another one left, with the next gradient.
    """
    residuals = state.get("residuals", {})
    left = {key: residuals[name] for key, name in names.items() if name in residuals}
    for bucket in buckets:
        if not isinstance(bucket, CodedBucket) or bucket.residual() is None:
            bucket.owe(left)
            continue
        for part, own in (("residuals", bucket.residuals()), ("warm", bucket.warm())):
            for key, value in own.items():
                given = state.get(part, {}).get(names[key])
                if given is not None and given.shape == value.shape:
                    value.copy_(given)
                elif part == "residuals":
                    value.zero_()
