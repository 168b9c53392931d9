"""Gradual magnitude pruning of a PyTorch model: masks that rise with a schedule, and are equal on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hvdlm.algorithms.pruning import sparsity_at
from hvdlm.options import Options
from hvdlm.pruning import Candidate, final_sparsity, masks_of

__all__ = ["Pruner", "candidates"]

_log = logging.getLogger("hvdlm")


def candidates(models: Sequence[tuple[str, torch.nn.Module]]) -> list[Candidate]:
    """All parameters of some models, and whether they may be pruned."""
    embedded = {
        id(module.weight)
        for _, model in models
        for module in model.modules()
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
    }
    return [
        Candidate(where, name, p, p.ndim >= 2 and p.is_floating_point() and id(p) not in embedded)
        for where, model in models
        for name, p in model.named_parameters()
    ]


class Pruner:
    """Makes masks by the schedule and keeps what they drop at zero, in weights and in gradients.

    Args:
        parameters: See :func:`hvdlm.pruning.prunable`.
        options: ``prune_*``.
        changed: Called with the masks (by ``id`` of the parameter) whenever they change.
        wait: Says whether masks are only made when :meth:`synced` is called, since replicas differ in between.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        options: Options,
        changed: Callable[[Mapping[int, torch.Tensor]], None],
        wait: Callable[[], bool],
    ) -> None:
        self._parameters, self._options = list(parameters), options
        self._changed, self._wait = changed, wait
        self._final = final_sparsity(options)
        self._masks: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._due: float | None = None

    @property
    def sparsity(self) -> float:
        """Part of the weights of the pruned parameters that is zero by mask."""
        dropped = sum(int((~mask).sum()) for mask in self._masks.values())
        return dropped / sum(p.numel() for _, p in self._parameters)

    def step(self) -> None:
        """An optimizer made a step; on every rank after the same one."""
        self._steps += 1
        self.apply()
        at = {"begin": self._options.prune_begin, "end": self._options.prune_end, "every": self._options.prune_every}
        target = sparsity_at(self._steps, final=self._final, **at)
        if target is not None:
            self._due = target
            if not self._wait():
                self.synced()

    def synced(self) -> None:
        """Replicas are equal: make the masks that are due."""
        if self._due:
            with torch.no_grad():
                self._make(self._due)
            self.apply()
            _log.info("step %d: %.1f %% of the weights pruned", self._steps, 100 * self.sparsity)
        self._due = None

    def _make(self, target: float) -> None:
        weights = [p.detach().cpu().to(_exact(p)).numpy() for _, p in self._parameters]
        masks = masks_of(weights, target, self._options)
        named = zip(self._parameters, masks, strict=True)
        self._set({name: torch.from_numpy(mask).to(p.device) for (name, p), mask in named})

    def _set(self, masks: dict[str, torch.Tensor]) -> None:
        self._masks = masks
        self._changed({id(p): masks[name] for name, p in self._parameters if name in masks})

    def apply(self) -> None:
        """An optimizer may have moved what is pruned: back to zero."""
        for name, p in self._parameters:
            if name in self._masks:
                p.data.mul_(self._masks[name])

    def after_backward(self) -> None:
        """What is pruned gets no gradient, so that optimizers forget it."""
        for name, p in self._parameters:
            if name in self._masks and p.grad is not None and not p.grad.is_sparse:
                p.grad.mul_(self._masks[name])

    def state_dict(self) -> dict[str, Any]:
        """Masks by parameter name, and where the schedule is."""
        return {"steps": self._steps, "masks": {name: mask.to(torch.uint8) for name, mask in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._steps, self._due = int(state["steps"]), None
        devices = {name: p.device for name, p in self._parameters}
        self._set({name: mask.bool().to(devices[name]) for name, mask in state["masks"].items() if name in devices})
        self.apply()


def _exact(p: torch.Tensor) -> torch.dtype:
    """A type that NumPy has and that holds every value."""
    return p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
