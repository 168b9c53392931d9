"""Options that Keras scripts cannot have yet. The README lists them; a test compares."""

from __future__ import annotations

from hvdlm.errors import ConfigError
from hvdlm.options import Options

__all__ = ["refuse_options"]


def refuse_options(options: Options, backend: str) -> None:
    """Raise ConfigError for an option that would have no effect under Keras.

    Args:
        options: What is asked for.
        backend: ``tensorflow`` or ``torch``; ``tf_keras`` for Keras 2.
    """
    if backend == "tf_keras":
        _refuse_under_keras_2(options)
        return
    given = {
        "sync": options.sync == "auto" or (options.sync == "local" and backend == "torch"),
        "local_group": options.local_group != "worker",
        "sync_warmup_steps": options.sync_warmup_steps > 0 and backend == "torch",
        "prune": options.prune != "none" and backend == "torch",
        "key": options.key != "none",
        "weight": callable(options.weight) and backend == "tensorflow",
        "checkpoint_dir": bool(options.checkpoint_dir) and backend == "torch",
        "elastic": options.elastic and backend == "torch",
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ConfigError(
            f"{name} is not available under Keras on {backend}: its value {options.to_dict()[name]!r} would have no "
            "effect.",
            hint=f"leave {name} out",
        )


def _refuse_under_keras_2(options: Options) -> None:
    given = {
        "compression": options.compression not in ("none", "fp16"),
        "compression_warmup_steps": options.compression_warmup_steps > 0,
        "balance": options.balance == "dynamic",
        "sync": options.sync != "global",
        "local_group": options.local_group != "worker",
        "sync_warmup_steps": options.sync_warmup_steps > 0,
        "prune": options.prune != "none",
        "weight": callable(options.weight),
        "key": options.key != "none",
        "lr_warmup_steps": options.lr_warmup_steps > 0,
        "elastic": options.elastic,
        "checkpoint_dir": bool(options.checkpoint_dir),
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise ConfigError(
            f"{name}={options.to_dict()[name]!r} is not available for tf_keras (Keras 2).",
            hint=f"leave {name} out, or use Keras 3: import keras",
        )
