"""Gradients that travel as they are at first: while a model finds its way, what a codec drops is worth most.

What PyTorch's PowerSGD hook calls ``start_powerSGD_iter``, for every codec.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlm.adapters.torch_bucket import Bucket
from hvdlm.adapters.torch_coded import BucketMaker, ReducerWire, maker_for
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.options import Options

__all__ = ["WarmUp"]


class WarmUp:
    """Counts the reductions of a job, and lets buckets be made anew when enough travelled as they are."""

    def __init__(self) -> None:
        self.left = 0
        """Reductions that are still to travel as they are; the same on all ranks."""

    def maker_for(self, options: Options, wire: ReducerWire, codec: str | None = None) -> BucketMaker:
        """As :func:`hvdlm.adapters.torch_coded.maker_for`, and plain buckets while reductions are left."""
        coded, plain = maker_for(options, wire, codec), maker_for(options, wire, "none")

        def make(name: str, members: Sequence[torch.nn.Parameter], dtype: torch.dtype, device: torch.device) -> Bucket:
            return (plain if self.left > 0 else coded)(name, members, dtype, device)

        return make

    def reduced(self, count: int, reducers: Sequence[Reducer]) -> None:
        """So many reductions more were made, by these. Called between two backwards."""
        self.resume(self.left - count, reducers)

    def resume(self, left: int, reducers: Sequence[Reducer]) -> None:
        """Go on with so many left."""
        changes, self.left = (self.left > 0) != (left > 0), max(0, left)
        for reducer in reducers if changes else ():
            reducer.refresh()
