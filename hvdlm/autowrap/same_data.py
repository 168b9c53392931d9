"""Finds out that every worker computes the same batches, in a script that draws its batches by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash

from hvdlm.errors import DataError
from hvdlm.session import Session

__all__ = ["SameData"]

_CALLS = 4
"""Forward passes that are compared. The first batch may have been drawn before the streams were separated."""


class SameData:
    """Compares what models are called with over the first batches.

    Integer tensors count where there are some (token ids), else all tensors: a state that is carried from batch to
    batch differs between workers by their dropout alone.

    Args:
        session: The run.
        models: The models, whose calls are watched.
        shared: Whether the script shares its data out itself; then nothing is compared.
    """

    def __init__(self, session: Session, models: Sequence[torch.nn.Module], shared: Callable[[], bool]) -> None:
        self._session, self._shared = session, shared
        self._digests: list[bytes] = []
        self._hooks: list[Any] = []
        if session.world.size > 1:
            self._hooks = [m.register_forward_pre_hook(self._called, with_kwargs=True) for m in models]
            session.account.after_reduction = self._reduced

    def remove(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._session.account.after_reduction = None

    def _called(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training or not torch.is_grad_enabled() or len(self._digests) >= _CALLS:
            return
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.numel()]
        tensors = [v for v in tensors if not v.is_floating_point()] or tensors
        hasher = xxhash.xxh3_128()
        for tensor in tensors:
            hasher.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self._digests.append(hasher.digest() if tensors else b"")

    def _reduced(self) -> None:
        if self._session.account.reductions < _CALLS:
            return
        own = b"".join(self._digests[1:])
        self.remove()
        gathered = self._session.adapter.collectives.allgather(own)
        if self._shared() or not own or len(set(gathered)) > 1:
            return
        raise DataError(
            "every worker trains on the same batches: the script has no DataLoader, and makes its batches in a way "
            "that does not depend on PyTorch's or NumPy's random streams.",
            hint="share the data out with one line, as in: data = hvdlm.shard(data, dim=1); or draw batches with "
            "torch.randint, whose stream is each worker's own",
        )
