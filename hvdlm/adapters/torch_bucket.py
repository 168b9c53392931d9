"""One flat buffer of gradients and its journey: filled as gradients become ready, summed over workers, read back.

Layout of the flat buffer of k gradients: their elements one after the other (each start aligned to 64 bytes), then k
*used* flags. A flag is 1 where a worker with samples got a gradient, so that the sum tells, without another
collective, which parameters nobody used: their ``.grad`` stays as it was, as in one process.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvdlm.adapters.torch_half import decode, encode, exponent_of

__all__ = ["Bucket", "Slot", "Wire", "arrivals", "layout", "numel", "slice_of"]

_ALIGN_BYTES = 64


class Wire(Protocol):
    """The collectives a bucket needs (Horovod's, over torch tensors)."""

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin summing ``tensor`` in place over ranks; returns a handle."""
        ...

    def wait(self, handle: Any) -> None:
        """Wait until the sum is in place."""
        ...


def layout(
    parameters: Sequence[torch.nn.Parameter], cap_bytes: float
) -> list[tuple[torch.dtype, torch.device, list[torch.nn.Parameter]]]:
    """Group parameters into buckets of at most ``cap_bytes`` per data type and device.

    Parameters are taken from last to first, roughly the order in which backward reaches them. float16 and bfloat16
    gradients are summed as float32: Horovod has no bfloat16, and summing half floats loses what one process keeps.
    """
    buckets: list[tuple[torch.dtype, torch.device, list[torch.nn.Parameter]]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[torch.nn.Parameter], int]] = {}
    for p in reversed(parameters):
        dtype = p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
        if p.dtype.is_complex:
            dtype = torch.float64 if p.dtype == torch.complex128 else torch.float32
        size = numel(p) * dtype.itemsize
        key = (dtype, p.device)
        members, used = open_buckets.get(key, ([], 0))
        if not members or used + size > cap_bytes:
            members, used = [], 0
            buckets.append((dtype, p.device, members))
        members.append(p)
        open_buckets[key] = (members, used + size)
    return buckets


def numel(p: torch.Tensor) -> int:
    """Real numbers in a tensor: a complex one is two."""
    return p.numel() * (2 if p.dtype.is_complex else 1)


@dataclass
class Slot:
    """A parameter's place in a bucket."""

    parameter: torch.nn.Parameter
    offset: int
    number: int
    """Its place among the bucket's members."""
    weight: float | None = None
    """What this backward's gradient was weighted with; None until there is one."""


class Bucket:
    """Gradients that travel together.

    Args:
        name: Name of the collective; equal on all ranks, unique among buckets.
        members: The parameters, all of one device.
        dtype: Data type of the sum, float32 or float64.
        wire: Collectives.
        compress: Whether gradients travel as scaled fp16.
        align_bytes: Where gradients may begin.
        multiple: What the length of the buffer is a multiple of.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[torch.nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        wire: Wire,
        compress: bool,
        align_bytes: int = _ALIGN_BYTES,
        multiple: int = 1,
    ) -> None:
        self.name = name
        self.deferred = False
        """Whether this backward's sum may only start when backward has ended."""
        self._wire = wire
        self._dtype, self._device = dtype, device
        self._slots: dict[int, Slot] = {}
        step = max(1, align_bytes // dtype.itemsize)
        offset = 0
        for number, p in enumerate(members):
            self._slots[id(p)] = Slot(p, offset, number)
            offset += -(-numel(p) // step) * step
        self._flags_at = offset
        self._length = -(-(offset + len(members)) // multiple) * multiple
        self._unfilled = len(members)
        self._handle: Any = None
        self._flat = torch.zeros(self._length, dtype=dtype, device=device)
        self._views = self._views_of(self._flat)
        self._half = torch.zeros(self._length, dtype=torch.float16, device=device) if compress else None
        self._half_views = [] if self._half is None else self._views_of(self._half)
        self._exponent: int | None = None
        self._sent_half = False
        self._all_used = False
        self.owed: dict[int, torch.Tensor] = {}
        """By ``id`` of the parameter: what another codec had not sent when this one took over. Goes with a gradient."""

    @property
    def launched(self) -> bool:
        """Whether the sum of this backward has been started."""
        return self._handle is not None

    @property
    def full(self) -> bool:
        """Whether every member has its gradient in place."""
        return self._unfilled == 0

    def fill(self, p: torch.nn.Parameter, grad: torch.Tensor, weight: float) -> None:
        """Put ``weight * grad`` in its place."""
        slot = self._slots[id(p)]
        if slot.weight is None:
            if self._unfilled == len(self._slots):
                self._renew()
            self._unfilled -= 1
        slot.weight = weight
        self._write(slot, grad)

    def _write(self, slot: Slot, grad: torch.Tensor) -> None:
        grad = torch.view_as_real(grad.detach()) if grad.dtype.is_complex else grad.detach()
        weight = slot.weight
        assert weight is not None
        owed = self.owed.get(id(slot.parameter))
        if owed is not None:
            grad, weight = (owed if weight == 0.0 else torch.add(owed, grad, alpha=weight)), 1.0
        if self._half is not None and self._exponent is not None:
            encode(grad, weight, self._exponent, self._half_views[slot.number])
            return
        view = self._views[slot.number]
        if weight == 0.0:
            view.zero_()  # a NaN of a filler sample must not spread: 0 * NaN is NaN
        elif grad.dtype == view.dtype:
            torch.mul(grad, weight, out=view)
        else:
            view.copy_(grad)  # to the wider type first: a weighted half float would round once more
            view.mul_(weight)

    def owe(self, left: Mapping[int, torch.Tensor]) -> None:
        """Send this with the next gradients, by ``id`` of the parameter; what has another shape is dropped."""
        shapes = {key: self._views[slot.number].shape for key, slot in self._slots.items() if key in left}
        self.owed = {key: left[key].clone() for key, shape in shapes.items() if left[key].shape == shape}

    def _pay(self) -> None:
        """What was owed is on its way, where there was a gradient for it to go with."""
        if self.owed:
            self.owed = {key: owed for key, owed in self.owed.items() if self._slots[key].weight is None}

    def launch(self, counted: bool) -> None:
        """Start the sum. On a rank without samples (not ``counted``) the flags stay 0, as the gradients do."""
        if self._unfilled == len(self._slots):
            self._renew()
        half = self._half if self._exponent is not None else None
        buffer = self._flat if half is None else half
        flags = buffer[self._flags_at :]
        flags.fill_(1.0 if counted else 0.0)
        if self._unfilled:
            for i, slot in enumerate(self._slots.values()):
                if slot.weight is None:
                    buffer[slot.offset : slot.offset + numel(slot.parameter)].zero_()
                    flags[i] = 0.0
        self._sent_half = half is not None
        self._all_used = counted and not self._unfilled
        self._pay()
        self._handle = self._wire.start(buffer, self.name)

    def finish(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Wait for the sum; (parameter, summed gradient) for every parameter that some worker used.

        Each member's ``.grad`` must still be this worker's own: it is read again where fp16 overflowed.
        """
        self._wire.wait(self._handle)
        self._handle = None
        if self._sent_half:
            self._decode()
        elif self._half is not None:
            self._exponent = exponent_of(self._flat[: self._flags_at])
        everything = [True] * len(self._slots)
        return self._collect(everything if self._all_used else (self._flat[self._flags_at :] > 0).tolist())

    def advance(self) -> None:
        """Go on with what has arrived, without waiting, while backward makes other gradients."""

    def hop(self) -> bool:
        """Wait for one collective of several; whether another has begun. A sum of a single one is left to finish."""
        return False

    def _collect(self, used: Sequence[bool]) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        result = []
        for slot, view, is_used in zip(self._slots.values(), self._views, used, strict=True):
            slot.weight = None
            if is_used:
                p = slot.parameter
                view = torch.view_as_complex(view) if p.dtype.is_complex else view
                result.append((p, view if view.dtype == p.dtype else view.to(p.dtype)))
        self._unfilled = len(self._slots)
        self.deferred = False
        return result

    def _decode(self) -> None:
        assert self._half is not None and self._exponent is not None
        end = self._flags_at
        body = self._flat[:end]
        self._flat[end:].copy_(self._half[end:])
        self._exponent = decode(self._half[:end], self._exponent, body)
        if self._exponent is not None:
            return
        # Not finite, or so small that fp16 rounded too much of it away. Every rank holds the same bits, so every rank
        # takes this way: the sum again in full precision.
        for slot in self._slots.values():
            if slot.weight is None:
                self._flat[slot.offset : slot.offset + numel(slot.parameter)].zero_()
            else:
                assert slot.parameter.grad is not None
                self._write(slot, slot.parameter.grad)
        self._wire.wait(self._wire.start(body, f"{self.name}.exact"))
        self._exponent = exponent_of(body)

    def _renew(self) -> None:
        """Take a new buffer if anyone still holds a view of this one: accumulated gradients, or the person's own
        references, must not change under them. In the usual loop (zero_grad, backward, step) nobody does.
        """
        views, self._views = self._views, []
        del views
        if torch._C._storage_Use_Count(self._flat.untyped_storage()._cdata) > _sole_use_count():
            self._flat = torch.zeros(self._length, dtype=self._dtype, device=self._device)
        self._views = self._views_of(self._flat)

    def _views_of(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return [slice_of(buffer, slot) for slot in self._slots.values()]


def arrivals(buckets: Iterable[Bucket]) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Wait for launched buckets: (parameter, sum) for every parameter that some worker used.

    A bucket of several collectives begins the next one behind those that the others have begun, and is waited for
    behind them: the link never stands still while one bucket is on its way.
    """
    waiting = collections.deque(buckets)
    while waiting:
        bucket = waiting.popleft()
        if bucket.hop():
            waiting.append(bucket)
        else:
            yield from bucket.finish()


def slice_of(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A parameter's part of a flat buffer, in its shape."""
    p = slot.parameter
    flat = buffer[slot.offset : slot.offset + numel(p)]
    return flat.view(*p.shape, 2) if p.dtype.is_complex else flat.view(p.shape)


_SOLE: list[int] = []


def _sole_use_count() -> int:
    """What the use count of a storage with one tensor reads while it is being read."""
    if not _SOLE:
        probe = torch.zeros(1)
        _SOLE.append(torch._C._storage_Use_Count(probe.untyped_storage()._cdata))
    return _SOLE[0]
