"""Which optimizers a model holds, and their learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from hvdlm.options import Options, lr_factor
from hvdlm.world import World

__all__ = ["multiply_learning_rates", "optimizers_of", "scale_learning_rate"]


def optimizers_of(model: Any) -> list[Any]:
    """The outermost optimizers that a model holds: the compiled one, and those of models that keep several."""
    values = [v for v in vars(model).values() if isinstance(v, keras.optimizers.Optimizer)]
    if getattr(model, "optimizer", None) is not None:
        values.insert(0, model.optimizer)
    inner = {id(getattr(v, "inner_optimizer", None)) for v in values}
    return [v for v in {id(v): v for v in values}.values() if id(v) not in inner]


_SCALED = "_hvdlm_scaled"
"""Of an optimizer whose learning rate is what it has to be here: what it is from now on comes with its state."""


def scale_learning_rate(optimizer: Any, options: Options, world: World) -> None:
    """Multiply the learning rate as ``lr_scale`` says, at once or over ``lr_warmup_steps``."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for name in ("_get_current_learning_rate", "apply"):
        vars(optimizer).pop(name, None)  # of this job when it had another number of workers
    if options.lr_scale == "none" or world.size == 1:
        return
    factor = lr_factor(options, world.size)
    if isinstance(optimizer._learning_rate, keras.Variable):
        if not getattr(optimizer, _SCALED, False):
            setattr(optimizer, _SCALED, True)
            optimizer._learning_rate.assign(optimizer._learning_rate * factor)
    else:
        # A schedule is part of what is saved: it stays as it is, and what is read from it is scaled.
        own = optimizer._get_current_learning_rate
        optimizer._get_current_learning_rate = lambda: own() * factor
    if options.lr_warmup_steps:
        _warm_up(optimizer, factor, options.lr_warmup_steps)


def _warm_up(optimizer: Any, factor: float, steps: int) -> None:
    """Make each step use its part of the way from the unscaled rate to the scaled one.

    Only while it is applied: callbacks that read and set the rate go on from the scaled one. How far it is follows from
    the optimizer's own count of steps, which is saved with it.
    """
    rate, apply = optimizer._get_current_learning_rate, optimizer.apply
    applying = [False]

    def current() -> Any:
        if not applying[0]:
            return rate()
        done = ops.cast(ops.minimum(optimizer.iterations, steps), "float32")
        return rate() * ((1.0 + (factor - 1.0) * done / steps) / factor)

    def warming(*args: Any, **kwargs: Any) -> Any:
        applying[0] = True
        try:
            return apply(*args, **kwargs)
        finally:
            applying[0] = False

    optimizer._get_current_learning_rate, optimizer.apply = current, warming


def multiply_learning_rates(optimizers: Sequence[Any], factor: float) -> None:
    """Multiply learning rates that are kept with the state; what is read from a schedule is scaled where it is read."""
    for optimizer in optimizers:
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        setattr(optimizer, _SCALED, True)
        if factor != 1.0 and isinstance(optimizer._learning_rate, keras.Variable):
            optimizer._learning_rate.assign(optimizer._learning_rate * factor)
