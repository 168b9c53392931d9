"""Gradients of pruned parameters travel without their zeros: what is kept, one after the other, and no indices.

The masks are equal on all ranks, so everybody knows which element is which.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["Packing"]


class Packing:
    """Which parameters travel packed.

    Args:
        masks: By ``id`` of the parameter: True for what is kept, of the parameter's shape.
    """

    def __init__(self, masks: Mapping[int, torch.Tensor] | None = None) -> None:
        self._kept = {key: _places(mask) for key, mask in (masks or {}).items()}
        self._carriers: dict[int, torch.nn.Parameter] = {}
        self._owners: dict[int, torch.nn.Parameter] = {}

    def carrier(self, p: torch.nn.Parameter) -> torch.nn.Parameter:
        """What travels in a bucket in the place of ``p``: a vector of what is kept, or ``p`` itself."""
        kept = self._kept.get(id(p))
        if kept is None:
            return p
        if id(p) not in self._carriers:
            carrier = torch.nn.Parameter(torch.empty(len(kept), dtype=p.dtype, device=p.device))
            self._carriers[id(p)], self._owners[id(carrier)] = carrier, p
        return self._carriers[id(p)]

    def pack(self, p: torch.nn.Parameter) -> tuple[torch.nn.Parameter, torch.Tensor]:
        """(carrier, its gradient): what is kept of the gradient of ``p``."""
        assert p.grad is not None
        carrier = self.carrier(p)
        if carrier is p:
            return p, p.grad
        # Buckets look at it once more where fp16 overflowed.
        carrier.grad = p.grad.reshape(-1).index_select(0, self._kept[id(p)])
        return carrier, carrier.grad

    def unpack(self, carrier: torch.nn.Parameter, total: torch.Tensor) -> tuple[int, torch.Tensor]:
        """(``id`` of the parameter, its whole gradient): zeros where it is pruned."""
        owner = self._owners.get(id(carrier))
        if owner is None:
            return id(carrier), total
        carrier.grad = None
        whole = torch.zeros(owner.numel(), dtype=total.dtype, device=total.device)
        whole.index_copy_(0, self._kept[id(owner)], total)
        return id(owner), whole.view(owner.shape)


def _places(mask: torch.Tensor) -> torch.Tensor:
    places = torch.nonzero(mask.reshape(-1)).view(-1)
    # One element at least: a bucket has no place for nothing.
    return places if len(places) else torch.zeros(1, dtype=torch.int64, device=mask.device)
