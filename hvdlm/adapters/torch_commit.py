"""Knows when the model has taken in what loaders handed out, so that a saved position matches a saved model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_loader import ShardedLoader

__all__ = ["Commits"]


class Commits:
    """Tells loaders of each step of an optimizer; of each backward where no optimizer is known.

    A batch whose gradient only accumulates is not in the model yet: going on from a state taken then has to read it
    again, for gradients are not saved.

    Args:
        watch: Tells when backward ends.
    """

    def __init__(self, watch: BackwardWatch) -> None:
        self.loaders: dict[str, ShardedLoader] = {}
        """All loaders that are told, by name."""
        self._has_optimizer = False
        self._watch = watch

    def add(self, name: str, loader: ShardedLoader) -> ShardedLoader:
        """Tell this loader too; returns it."""
        self.loaders[name] = loader
        return loader

    def follow(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[Callable[[], None]]:
        """Watch some optimizers, and backward; returns what ends it."""
        if self._backward not in self._watch.after:
            self._watch.after.append(self._backward)
        hooks = [optimizer.register_step_post_hook(lambda *_: self.trained()) for optimizer in optimizers]
        self._has_optimizer |= bool(hooks)
        return [hook.remove for hook in hooks]

    def _backward(self) -> None:
        if not self._has_optimizer:
            self.trained()

    def trained(self) -> None:
        """A step is done."""
        for loader in self.loaders.values():
            loader.trained()
