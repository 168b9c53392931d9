"""What a worker's gradient counts by where that is not its samples: the targets its loss is a mean over.

A loss that leaves out ignored targets is a mean over those that are left, of which each worker has another number. With
T_i of them on worker i the applied gradient is sum(T_i * g_i) / sum(T_i): the same algebra as with samples. The sum is
asked for when a batch is handed out and is there when backward needs it. Equal numbers give the same quotients as
samples do, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hvdlm.contracts import Collectives
from hvdlm.errors import DataError
from hvdlm.plan import Share
from hvdlm.sources.padding import IGNORED

__all__ = ["Weigher", "count_targets"]


def count_targets(batch: Any, shifted: bool = False) -> int | None:
    """Targets of a batch that are not ignored; None if it has no integer ``labels``.

    >>> count_targets({"labels": torch.tensor([[5, 6, -100], [7, -100, -100]])})
    3
    >>> count_targets({"labels": torch.tensor([[5, 6, -100], [7, -100, -100]])}, shifted=True)
    1

    Args:
        batch: What the loader gave.
        shifted: Whether the first of each row is no target, as in a causal language model that is given its own input.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32) or labels.ndim == 0:
        return None
    if shifted and labels.ndim > 1:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


class Weigher:
    """Weighs the shares of training batches.

    Args:
        weight: The option.
        models: All attached models; looked at when a batch comes.
        size: Number of workers.
    """

    def __init__(self, weight: str | Callable[[Any], float], models: Sequence[torch.nn.Module], size: int) -> None:
        self._weight, self._models, self._size = weight, models, size
        self._pending: Callable[[], float] | None = None

    def weigh(self, share: Share, batch: Any, collectives: Collectives) -> Share:
        """The share, with what it counts. Every rank calls it for the same batch.

        Raises:
            DataError: The person's function raised, or gave no number of 0 or more.
        """
        if self._size == 1 or self._weight == "samples":
            return share
        own = self._count(batch)
        if own is None:
            return share
        if self._pending is not None:
            self._pending()  # the batch before was not trained on: its sum must not wait for ever
        figures = np.array([0.0 if share.is_filler else own], dtype=np.float64)
        begin = getattr(collectives, "begin", None)
        wait = begin(figures, "hvdlm.weight") if begin is not None else None
        self._pending = _Fraction(share, float(figures[0]), wait or (lambda: collectives.allreduce(figures)))
        return replace(share, weigh=self._pending)

    def _count(self, batch: Any) -> float | None:
        if not callable(self._weight):
            return count_targets(batch, any(_shifts(model) for model in self._models))
        try:
            value = float(self._weight(batch))
        except Exception as error:
            raise DataError(
                f"weight= raised {type(error).__name__} on a batch: {error}.",
                hint="it takes what the loader gives and returns what the loss is a mean over, as a number",
            ) from error
        if not math.isfinite(value) or value < 0:
            raise DataError(f"weight= gave {value} for a batch; allowed: finite numbers of 0 or more.")
        return value


class _Fraction:
    """This worker's part of a sum over workers; waits for it when first asked."""

    def __init__(self, share: Share, own: float, wait: Callable[[], Any]) -> None:
        self._share, self._own, self._wait = share, own, wait
        self._value: float | None = None

    def __call__(self) -> float:
        if self._value is None:
            total = float(self._wait()[0])
            # No target in the whole batch: as one process, which has a mean over nothing.
            by_samples = self._share.count / self._share.total
            self._value = self._own / total if total else by_samples
        return self._value


def _shifts(model: torch.nn.Module) -> bool:
    """Whether a model of Transformers takes the next token of each row for the target."""
    return getattr(model, "loss_type", None) == "ForCausalLM"
