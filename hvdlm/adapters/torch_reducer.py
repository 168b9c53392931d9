"""Makes gradients global by the time ``backward()`` returns, without touching the person's optimizer.

Each parameter has two hooks. One runs before autograd adds to ``.grad``: it sets an already global gradient aside, so
that only the new part travels. One runs after: it copies the new part, weighted, into a flat bucket, and a full bucket
starts its allreduce while backward goes on. When the outermost ``backward()`` ends, the sums become the ``.grad``.
Clipping, GradScaler, schedulers, LBFGS closures and step hooks then see what one process would have seen.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_bucket import Bucket, arrivals, layout
from hvdlm.adapters.torch_coded import BucketMaker, capture, pool, restore
from hvdlm.adapters.torch_pack import Packing
from hvdlm.adapters.torch_sparse import sum_rows
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.plan import Share

__all__ = ["Reducer"]


@dataclass
class _Entry:
    """A parameter and what this backward has done to it."""

    name: str
    parameter: torch.nn.Parameter
    group: int
    bucket: Bucket | None = None
    """Where its gradient travels; None for a sparse gradient."""
    fired: bool = False
    """Whether ``.grad`` now is this worker's own part."""
    local: bool = False
    """Whether ``.grad`` holds parts that accumulated under no_sync and are already weighted."""
    before: torch.Tensor | None = None
    """The global gradient that was there before."""


class Reducer:
    """Sums the gradients of groups of parameters over workers at the end of each backward.

    Args:
        groups: Lists of (name, parameter), one list per model. A backward that touches nothing of a group on any rank
            moves none of its gradients.
        sparse: ``id`` of the parameters whose gradients are sparse (embeddings made with ``sparse=True``).
        wire: Collectives.
        watch: Tells when backward starts and ends.
        size: Number of workers.
        mean: Weight each worker's gradient by its part of the global batch; else by 1 (losses that are sums).
        make_bucket: How buckets are made: it decides how gradients travel.
        bucket_cap_bytes: Largest bucket.
        name: Tells this reducer's collectives from those of others.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[tuple[str, torch.nn.Parameter]]],
        *,
        sparse: frozenset[int],
        wire: TorchWire,
        watch: BackwardWatch,
        size: int,
        mean: bool,
        make_bucket: BucketMaker,
        bucket_cap_bytes: float,
        name: str,
    ) -> None:
        self.share: Share | None = None
        self.reductions = 0
        """How often gradients were made global so far."""
        self._name = f"hvdlm.grad.{name}"
        self._wire, self._watch = wire, watch
        self._size, self._mean = size, mean
        self._make_bucket, self._cap = make_bucket, bucket_cap_bytes
        self._sparse_ids = sparse
        self._buckets: list[list[Bucket]] = [[] for _ in groups]
        self._entries: dict[int, _Entry] = {}
        self._dormant: list[_Entry] = []
        self._hooks: list[Any] = []
        self._accumulate_only = False
        self._queued = False
        self._under_way: list[Bucket] = []
        self._packing = Packing()
        for number, group in enumerate(groups):
            entries = [_Entry(name, p, number) for name, p in group]
            self._add([e for e in entries if e.parameter.requires_grad])
            self._dormant += [e for e in entries if not e.parameter.requires_grad]
        watch.before.append(lambda _: self._wake())
        watch.after.append(self._drain)

    def _add(self, entries: Sequence[_Entry]) -> None:
        for number in sorted({e.group for e in entries}):
            members = {id(e.parameter): e for e in entries if e.group == number}
            self._fill_buckets(number, list(members.values()))
            for e in members.values():
                before = functools.partial(self._before_accumulate, e)
                after = functools.partial(self._after_accumulate, e)
                self._hooks.append(e.parameter.register_hook(before))  # type: ignore[no-untyped-call]  # torch gives it no types
                self._hooks.append(e.parameter.register_post_accumulate_grad_hook(after))  # type: ignore[no-untyped-call]  # torch gives it no types
            self._entries.update(members)

    def _fill_buckets(self, number: int, entries: Sequence[_Entry]) -> None:
        dense = {id(self._packing.carrier(e.parameter)): e for e in entries if id(e.parameter) not in self._sparse_ids}
        carriers = [self._packing.carrier(e.parameter) for e in dense.values()]
        for dtype, device, members in layout(carriers, self._cap):
            name = f"{self._name}.{number}.{len(self._buckets[number])}"
            bucket = self._make_bucket(name, members, dtype, device)
            self._buckets[number].append(bucket)
            for p in members:
                dense[id(p)].bucket = bucket

    def _wake(self) -> None:
        """Take in parameters that were frozen and now require gradients. Costs nothing when none is frozen."""
        if any(e.parameter.requires_grad for e in self._dormant):
            self._add([e for e in self._dormant if e.parameter.requires_grad])
            self._dormant = [e for e in self._dormant if not e.parameter.requires_grad]

    @property
    def _counted(self) -> bool:
        """Whether this worker has something in the current global batch that counts."""
        if self.share is None or self.share.is_filler:
            return self.share is None
        return not self._mean or self.share.fraction > 0

    @property
    def weight(self) -> float:
        """What this worker's gradient counts in the sum over workers."""
        if not self._mean:
            return float(self._counted)
        return 1.0 / self._size if self.share is None else self.share.fraction

    def _before_accumulate(self, e: _Entry, grad: torch.Tensor) -> torch.Tensor | None:
        p = e.parameter
        if p.grad is None:
            e.local = False  # zeroed since: what had accumulated on this worker is gone
        if self._accumulate_only or e.local:
            if not e.local and p.grad is not None:
                p.grad.div_(self._size)  # global already: 1/size of it on each worker adds up to itself again
            e.local = True
            weight = self.weight
            return None if weight == 1.0 else torch.zeros_like(grad) if weight == 0.0 else grad * weight
        if p.grad is not None and not e.fired:
            e.before, p.grad = p.grad, None
            if self._watch.depth == 0:
                self._queue()
        return None

    def _after_accumulate(self, e: _Entry, p: torch.nn.Parameter) -> None:
        if self._accumulate_only:
            return
        if self._watch.depth == 0:
            self._queue()
        e.fired = True
        if e.bucket is None:
            return
        # A nested backward (re-entrant checkpointing) may reach the parameter again: its bucket must wait.
        e.bucket.deferred |= self._watch.depth > 1
        self._fill(e)
        for bucket in self._under_way:
            bucket.advance()
        if e.bucket.full and not e.bucket.deferred:
            e.bucket.launch(self._counted)
            self._under_way.append(e.bucket)

    def _queue(self) -> None:
        """Drain at the end of a backward entered by another way than ``torch.autograd.backward``: it was imported by
        name before hvdlm started, or it is ``torch.autograd.grad``, which accumulates nothing.
        """
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._drain)

    def _fill(self, e: _Entry) -> None:
        p = e.parameter
        assert p.grad is not None and e.bucket is not None
        if p.grad.is_sparse:
            p.grad = p.grad.to_dense()  # not from an embedding that says so: the other ranks expect it dense
        e.bucket.fill(*self._packing.pack(p), 1.0 if e.local else self.weight)

    def _drain(self) -> None:
        """Start what has not started, wait for all, and make the sums the parameters' gradients."""
        self._queued = False
        if self._accumulate_only:
            return
        touched = self._touched()
        self.reductions += any(touched)
        for e in self._entries.values():
            if touched[e.group] and e.local and not e.fired and e.parameter.grad is not None:
                e.fired = True  # accumulated under no_sync, but not reached by this backward
                if e.bucket is not None:
                    self._fill(e)
        buckets = [b for number, group in enumerate(self._buckets) if touched[number] for b in group]
        for bucket in buckets:
            if not bucket.launched:
                bucket.launch(self._counted)
        self._under_way.clear()
        totals = dict(self._packing.unpack(p, total) for p, total in arrivals(buckets))
        for key, e in self._entries.items():
            if touched[e.group]:
                self._settle(e, totals.get(key) if e.bucket is not None else self._sum_sparse(e))
            elif e.before is not None:
                e.parameter.grad, e.before = e.before, None

    def _touched(self) -> list[bool]:
        """Which groups some worker's backward reached.

        One group needs no agreement, for the same script reaches it everywhere. With several (a GAN's two models), all
        workers agree on which ones travel; a backward that reaches none (of a model not ours) makes no collective.
        """
        touched = [False] * len(self._buckets)
        for e in self._entries.values():
            touched[e.group] |= e.fired
        if len(touched) < 2 or not any(touched):
            return touched
        flags = torch.from_numpy(np.array(touched, dtype=np.int32))
        self._wire.wait(self._wire.start(flags, f"{self._name}.touched"))
        return [bool(flag) for flag in flags.tolist()]

    def _settle(self, e: _Entry, total: torch.Tensor | None) -> None:
        """Make the sum the gradient. Where no worker with samples used the parameter, ``.grad`` becomes what it was."""
        p = e.parameter
        base = e.before if e.fired else p.grad
        if total is None:
            p.grad = base
        elif base is None:
            p.grad = total
        elif base.is_sparse or total.is_sparse:
            p.grad = base + total
        else:
            p.grad = base.add_(total)
        e.fired = e.local = False
        e.before = None

    def _sum_sparse(self, e: _Entry) -> torch.Tensor | None:
        grad = e.parameter.grad if e.fired and self._counted else None
        return sum_rows(e.parameter, grad, 1.0 if e.local else self.weight, self._wire, self._name, e.name)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on this worker; the next backward outside sends the sum, once."""
        outer, self._accumulate_only = self._accumulate_only, True
        try:
            yield
        finally:
            self._accumulate_only = outer

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the codec remembers between steps: see :func:`hvdlm.adapters.torch_coded.capture`."""
        return capture(itertools.chain(*self._buckets), self._names())

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from what :meth:`state_dict` returned, of any codec and with any buckets."""
        restore(itertools.chain(*self._buckets), self._names(), state)

    def pool(self) -> None:
        """See :func:`hvdlm.adapters.torch_coded.pool`."""
        pool(itertools.chain(*self._buckets), self._wire, self._size)

    def rebuild(self, make_bucket: BucketMaker, bucket_cap_bytes: float) -> None:
        """Let gradients travel in another way from the next backward on. Every rank calls it between two backwards."""
        state = self.state_dict()
        self._make_bucket, self._cap = make_bucket, bucket_cap_bytes
        self._refill(state)

    def refresh(self) -> None:
        """Make all buckets anew; called as :meth:`rebuild` is."""
        self._refill(self.state_dict())

    def pack(self, masks: Mapping[int, torch.Tensor]) -> None:
        """Send only what these masks keep (by ``id`` of the parameter) from now on; called as :meth:`rebuild` is."""
        state = self.state_dict()
        self._packing = Packing(masks)
        self._refill(state)

    def _refill(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for number in range(len(self._buckets)):
            self._buckets[number] = []
            self._fill_buckets(number, [e for e in self._entries.values() if e.group == number])
        self.load_state_dict(state)

    def _names(self) -> dict[int, str]:
        return {id(self._packing.carrier(e.parameter)): e.name for e in self._entries.values()}

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._entries.clear()
