"""The learning rate of a larger global batch: scaled, at once or over a warm-up.

Linear scaling with a gradual warm-up follows Goyal et al., "Accurate, large minibatch SGD" (2017); the square root is
that of Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from hvdlm.contracts import Kind
from hvdlm.errors import ConfigError
from hvdlm.options import Options, lr_factor
from hvdlm.world import World

__all__ = ["multiply_learning_rates", "scale_learning_rates"]

_DONE = "hvdlm_warmup_steps"
"""In a parameter group: warm-up steps that are done. Saved with the optimizer, so that a run goes on in its warm-up."""


def scale_learning_rates(
    found: Sequence[tuple[str, Kind, Any]], options: Options, world: World
) -> list[Callable[[], None]]:
    """What ``lr_scale`` asks for, on optimizers and the schedulers made over them; returns what ends the warm-up.

    Schedulers go on from the scaled rate: a warm-up acts on each step and puts back what it found.

    Raises:
        ConfigError: An optimizer has a scheduler that was not given: it would undo the scaling.
    """
    undo: list[Callable[[], None]] = []
    if options.lr_scale == "none" or world.size == 1:
        return undo
    factor = lr_factor(options, world.size)
    schedulers = [value for _, kind, value in found if kind == "scheduler"]
    for where, kind, optimizer in found:
        if kind != "optimizer":
            continue
        if options.lr_warmup_steps:
            undo += _warm_up(optimizer, factor, options.lr_warmup_steps)
        if getattr(optimizer, "_hvdlm_scaled", False):
            continue  # attached again after a reset: what it is now comes with the state
        own = [s for s in schedulers if s.optimizer is optimizer]
        if any("initial_lr" in g for g in optimizer.param_groups) and not own:
            raise ConfigError(
                f'lr_scale="{options.lr_scale}": {where} already has a scheduler, which would undo the scaling.',
                hint="pass the scheduler too, or make it after hvdlm.wrap",
            )
        optimizer._hvdlm_scaled = True
        multiply_learning_rates([optimizer], own, factor)
    return undo


def multiply_learning_rates(
    optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[LRScheduler], factor: float
) -> None:
    """Multiply the learning rates of optimizers, and those that schedulers start from."""
    if factor == 1.0:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
    for scheduler in schedulers:
        scheduler.base_lrs = [lr * factor for lr in getattr(scheduler, "base_lrs", [])]


def _warm_up(optimizer: torch.optim.Optimizer, factor: float, steps: int) -> list[Callable[[], None]]:
    """Make each step use its part of the way from the unscaled rate to the scaled one."""
    found: list[Any] = []

    def before(*_: Any) -> None:
        found.clear()
        for group in optimizer.param_groups:
            found.append(group["lr"])
            done = min(int(group.get(_DONE, 0)), steps)
            group["lr"] = group["lr"] * ((1.0 + (factor - 1.0) * done / steps) / factor)
            group[_DONE] = min(done + 1, steps)

    def after(*_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, found, strict=True):
            group["lr"] = lr

    return [
        optimizer.register_step_pre_hook(before).remove,
        optimizer.register_step_post_hook(after).remove,
    ]
