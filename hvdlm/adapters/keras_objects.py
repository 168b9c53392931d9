"""What is said of Keras objects to other workers, and objects that cannot be made distributed."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf

from hvdlm.adapters.keras_state import model_variables
from hvdlm.errors import RecognitionError

__all__ = ["is_built", "like", "refuse_model", "refuse_optimizer", "refuse_torch", "signature_of"]


def signature_of(where: str, model: Any) -> list[str]:
    """A line for each variable, which has to be the same on all ranks."""
    return [f"{where}.{v.path}: {tuple(v.shape)} {v.dtype} trainable={v.trainable}" for v in model_variables(model)]


def is_built(model: Any) -> bool:
    """Whether a model has all its variables."""
    return bool(model.built) and all(layer.built for layer in model._flatten_layers())


def like(value: float, example: Any) -> Any:
    """``value`` as the type of ``example``: a tensor for a tensor, a float for a number."""
    if tf.is_tensor(example):
        dtype = example.dtype if example.dtype.is_floating else tf.float32
        return tf.reshape(tf.constant(value, dtype), example.shape)
    return value


def refuse_model(where: str, model: Any) -> None:
    """Refuse a model that synchronises by itself.

    Raises:
        RecognitionError: It was made under a strategy.
    """
    strategy = getattr(model, "_distribute_strategy", None)
    if strategy is not None:
        raise RecognitionError(
            f"{where} was made under {type(strategy).__name__}.scope(), which synchronises by itself.",
            hint="make and compile the model outside of strategy.scope(): hvdlm synchronises",
        )


def refuse_optimizer(where: str, optimizer: Any) -> None:
    """Refuse an optimizer of Horovod's.

    Raises:
        RecognitionError: It is one.
    """
    if hasattr(optimizer, "_allreduce_grads") or type(optimizer).__module__.startswith("horovod"):
        raise RecognitionError(
            f"{where} is a horovod DistributedOptimizer, which does not reduce under Keras 3.",
            hint="pass the plain optimizer: hvdlm sums gradients",
        )


def refuse_torch(value: object) -> None:
    """A torch model or optimizer beside Keras on TensorFlow would train alone on every worker, silently.

    Raises:
        RecognitionError: The value is one.
    """
    torch = sys.modules.get("torch")
    kinds = () if torch is None else (torch.nn.Module, torch.optim.Optimizer)
    if isinstance(value, kinds):
        raise RecognitionError(
            f"a {type(value).__name__} of torch beside objects of Keras on TensorFlow: one job trains one framework.",
            hint="give hvdlm the objects of one framework, or set KERAS_BACKEND=torch",
        )
