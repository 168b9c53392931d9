"""Local synchronisation: replicas train on their own, and become one again every H steps.

What each worker has moved since the last synchronisation travels in the same flat buckets as gradients do, so every
codec carries it. It happens between two steps: when the script asks for the next batch, all of the step is done on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvdlm.adapters.torch_bucket import Bucket, arrivals, layout
from hvdlm.adapters.torch_coded import BucketMaker
from hvdlm.adapters.torch_coded import capture as capture_residuals
from hvdlm.adapters.torch_coded import pool as pool_residuals
from hvdlm.adapters.torch_coded import restore as restore_residuals
from hvdlm.adapters.torch_meeting import after_skipped_steps
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.options import Options
from hvdlm.plan import Share

__all__ = ["LocalSync"]


class _Part:
    """A parameter and where its worker's local steps began."""

    def __init__(self, name: str, parameter: torch.nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        # Buckets carry the gradients of parameters: this one's is the move.
        self.start = torch.nn.Parameter(parameter.detach().clone())
        self.velocity: torch.Tensor | None = None


class LocalSync:
    """Averages replicas every ``sync_every`` steps, weighted by samples.

    Args:
        options: ``sync_every``, ``outer_*``, ``local_moments``, ``reduction``, ``bucket_cap_mb``.
        wire: Collectives over all workers.
        size: Number of workers.
        make_bucket: How buckets are made: it decides how moves travel.
        synced: Called after each synchronisation, at the same place on every rank.
        alone: Whether each worker trains on its own; else what weighs gradients is elsewhere.
        asleep: Whether replicas are kept equal otherwise, until :meth:`wake`.
        part: Called after ``sync_warmup_steps`` steps of that: replicas are to be left to themselves.
    """

    def __init__(
        self,
        *,
        options: Options,
        wire: TorchWire,
        size: int,
        make_bucket: BucketMaker,
        synced: Sequence[Callable[[], None]],
        alone: bool = True,
        asleep: bool = False,
        part: Callable[[], None] = lambda: None,
    ) -> None:
        self._alone, self.asleep, self._part = alone, asleep, part
        self.together = 0
        """Steps that were made together before replicas parted."""
        self._options, self._wire, self._size, self._synced = options, wire, size, synced
        self._make_bucket = make_bucket
        self._dormant: list[tuple[str, torch.nn.Parameter]] = []
        self._parts: dict[int, _Part] = {}
        self._buckets: list[Bucket] = []
        self._carried: list[list[torch.nn.Parameter]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._norms: list[torch.Tensor] = []
        self._undo: list[Callable[[], None]] = []
        self._share: Share | None = None
        self._count = self._total = 0
        self._steps = self._stepped = 0
        self._by_hand = True

    def add(self, named: Sequence[tuple[str, torch.nn.Parameter]], models: Sequence[torch.nn.Module]) -> None:
        """Take in parameters that are equal on all ranks, and the running statistics of the models' BatchNorms."""
        self._dormant += named
        self._wake()
        for model in models:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    self._norms += [b for b in (module.running_mean, module.running_var) if b is not None]

    # What the adapter tells.

    @property
    def share(self) -> Share | None:
        """This worker's part of the batch that is trained on now."""
        return self._share

    @share.setter
    def share(self, share: Share | None) -> None:
        self._share = share
        if share is not None:
            self._by_hand = False
            self._count, self._total = self._count + share.count, self._total + share.total

    def follow(self, optimizers: Sequence[torch.optim.Optimizer], trained: Sequence[Callable[[], None]]) -> None:
        """Count steps of the first optimizer; where there is none, backwards are counted.

        Args:
            optimizers: The script's.
            trained: Called where a gradient scaler skips a step: on this rank alone, so it counts as one made.
        """
        first = not self._optimizers and bool(optimizers)
        self._optimizers += optimizers
        for optimizer in optimizers:
            hook = optimizer.register_step_post_hook(lambda *_, own=optimizer: self._step(own))
            self._undo.append(hook.remove)
        if first:
            self._undo.append(after_skipped_steps(self._optimizers, self._step, trained))

    # The local steps.

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped += 1
        if optimizer is self._optimizers[0]:
            self._steps += 1
            self._warm_up(1)

    def _warm_up(self, steps: int) -> None:
        """So many steps more were made together: part if that is enough. All ranks count alike."""
        if self.asleep:
            self.together += steps
            if 0 < self._options.sync_warmup_steps <= self.together:
                self._part()

    def before_backward(self, _: object = None) -> None:
        """A backward starts: in a script that draws its batches by hand, the step before is complete."""
        self._wake()
        if self._by_hand:
            self.boundary()

    def after_backward(self) -> None:
        """A backward has ended: a step, where no optimizer is known."""
        if not self._optimizers:
            self._steps += 1
            self._stepped += 1
            self._warm_up(1)

    def _wake(self) -> None:
        awake = [pair for pair in self._dormant if pair[1].requires_grad]
        if not awake:
            return
        self._dormant = [pair for pair in self._dormant if not pair[1].requires_grad]
        parts = [_Part(name, p) for name, p in awake]
        by_start = {id(part.start): part for part in parts}
        for dtype, device, starts in layout(
            [part.start for part in parts], (self._options.bucket_cap_mb or 32.0) * 2**20
        ):
            name = f"hvdlm.local.{len(self._buckets)}"
            self._buckets.append(self._make_bucket(name, starts, dtype, device))
            self._carried.append(starts)
        self._parts |= by_start
        for part in parts if self._alone else ():
            handle = part.parameter.register_hook(self._weigh)  # type: ignore[no-untyped-call]  # torch gives it no types
            self._undo.append(handle.remove)

    def _weigh(self, grad: torch.Tensor) -> torch.Tensor | None:
        share = self._share
        if share is None or self.asleep:
            return None
        if share.is_filler:
            return torch.zeros_like(grad)  # a NaN of a filler sample must not spread
        if self._options.reduction == "sum" and share.count != share.total:
            return grad * (share.total / share.count)  # the step of the whole batch, from a part of it
        return None

    # Becoming one again.

    @property
    def synchronised(self) -> bool:
        """Whether nobody has stepped since the last synchronisation."""
        return self.asleep or not self._stepped

    def wake(self) -> None:
        """Replicas, which are equal now, are left to themselves. Every rank calls it between the same two steps."""
        self.asleep = False
        self.restart()

    def boundary(self) -> None:
        """Between two steps, on every rank: synchronise if it is time."""
        if not self.asleep and self._steps >= self._options.sync_every:
            self.synchronise()

    def synchronise(self) -> None:
        """Make replicas one again. Every rank calls it between the same two steps."""
        if self.synchronised:
            return
        weight = self._count / self._total if self._total else 1.0 / self._size
        counted = weight > 0
        with torch.no_grad():
            self._move(weight, counted)
            if self._norms:
                self._average(self._norms, weight, "norms")
            if self._options.local_moments == "average":
                self._average(self._moments(), weight, "moments")
        self._steps = self._stepped = self._count = self._total = 0
        for tell in self._synced:
            tell()

    def _move(self, weight: float, counted: bool) -> None:
        for part in self._parts.values():
            part.start.grad = part.parameter.detach() - part.start
        for bucket, starts in zip(self._buckets, self._carried, strict=True):
            for start in starts:
                assert start.grad is not None
                bucket.fill(start, start.grad, weight)
            bucket.launch(counted)
        lr, momentum = self._options.outer_lr, self._options.outer_momentum
        plain = self._options.outer_optimizer == "none"
        for start, moved in arrivals(self._buckets):
            part = self._parts[id(start)]
            if plain:
                start.data.add_(moved)
            else:
                if part.velocity is None:
                    part.velocity = torch.zeros_like(start)
                part.velocity.mul_(momentum).add_(moved)
                start.data.add_(moved, alpha=lr).add_(part.velocity, alpha=lr * momentum)
        for part in self._parts.values():
            part.start.grad = None
            part.parameter.data.copy_(part.start)

    def _moments(self) -> list[torch.Tensor]:
        """Float state of optimizers that is shaped as its parameter: the same on every rank but for its values."""
        return [
            value
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            for _, value in sorted(optimizer.state.get(p, {}).items())
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.is_floating_point()
        ]

    def _average(self, tensors: Sequence[torch.Tensor], weight: float, what: str) -> None:
        handles = []
        for i, tensor in enumerate(tensors):
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            own = tensor.to(dtype).mul(weight) if weight else torch.zeros(tensor.shape, dtype=dtype)
            handles.append((self._wire.start(own, f"hvdlm.local.{what}.{i}"), own, tensor))
        for handle, own, tensor in handles:
            self._wire.wait(handle)
            tensor.copy_(own)

    # State, between two synchronisations.

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Between two synchronisations: what the outer optimizer and the codec remember, by parameter."""
        state = capture_residuals(self._buckets, self._names())
        velocities = {p.name: p.velocity for p in self._parts.values() if p.velocity is not None}
        return {**state, **({"velocity": velocities} if velocities else {})}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from :meth:`state_dict`; the parameters are the restored ones, equal on every rank."""
        velocities = state.get("velocity", {})
        for part in self._parts.values():
            kept = velocities.get(part.name)
            part.velocity = None if kept is None else kept.clone()
        restore_residuals(self._buckets, self._names(), {k: v for k, v in state.items() if k != "velocity"})
        self.restart()

    def resume(self, together: int) -> None:
        """Go on where so many steps had been made together."""
        self._warm_up(together - self.together)

    def pool(self) -> None:
        """See :func:`hvdlm.adapters.torch_coded.pool`."""
        pool_residuals(self._buckets, self._wire, self._size)

    def restart(self) -> None:
        """The parameters were set to values that all ranks share: the next local steps begin there."""
        for part in self._parts.values():
            part.start.data.copy_(part.parameter.detach())
        self._steps = self._stepped = self._count = self._total = 0

    def _names(self) -> dict[int, str]:
        return {key: part.name for key, part in self._parts.items()}

    def remove(self) -> None:
        """Take the hooks off."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._parts.clear()
