"""Sums over workers inside a step of Keras on torch, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.plan import Share

__all__ = ["TorchTotals"]


class TorchTotals:
    """See :class:`hvdlm.adapters.keras_statistics.Totals`.

    Args:
        wire: Collectives.
        share: The current share, None if there is no training loader.
        size: Number of workers.
        mean: Whether a worker's gradients weigh by its share.
    """

    def __init__(self, wire: TorchWire, share: Callable[[], Share | None], *, size: int, mean: bool) -> None:
        self._wire, self._share, self._size, self._mean = wire, share, size, mean

    def _number(self) -> float:
        share = self._share()
        if self._mean:
            return 1.0 / self._size if share is None else share.fraction
        return float(share is None or not share.is_filler)

    def weight(self) -> torch.Tensor:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        return torch.tensor(self._number(), dtype=torch.float64)

    def recording(self) -> bool:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        return torch.is_grad_enabled()

    def total(self, sums: torch.Tensor, stem: str) -> torch.Tensor:
        """See :class:`hvdlm.adapters.keras_statistics.Totals`."""
        name, number = f"hvdlm.total.{stem}", self._number()
        result: torch.Tensor = _Total.apply(sums, number, self._wire, name)  # type: ignore[no-untyped-call]  # untyped
        return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, weight: float, wire: TorchWire, name: str) -> torch.Tensor:
        ctx.weight, ctx.wire, ctx.name = weight, wire, name
        return _summed(sums.detach().clone() if weight else torch.zeros_like(sums), wire, name)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        # The reducer weighs this worker's gradients afterwards: what other workers' losses say is weighed here, and
        # divided by this worker's weight to meet that.
        own = upstream * ctx.weight if ctx.weight else torch.zeros_like(upstream)
        summed = _summed(own.contiguous(), ctx.wire, f"{ctx.name}.backward")
        return summed / ctx.weight if ctx.weight else torch.zeros_like(summed), None, None, None


def _summed(tensor: torch.Tensor, wire: TorchWire, name: str) -> torch.Tensor:
    wire.wait(wire.start(tensor, name))
    return tensor
