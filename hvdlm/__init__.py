"""hvdlm runs the PyTorch or Keras language-model training script you have on many workers.

Importing it loads no framework: each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdlm.adoption import main_first, shard
    from hvdlm.api import (
        barrier,
        distribute,
        epochs,
        init,
        is_main,
        local_rank,
        local_size,
        log,
        mean,
        no_sync,
        rank,
        register,
        save,
        size,
        wrap,
    )
    from hvdlm.errors import HvdlmError
    from hvdlm.options import Options
    from hvdlm.world import World

__version__ = "0.1.0"

__all__ = [
    "HvdlmError",
    "Options",
    "World",
    "barrier",
    "distribute",
    "epochs",
    "init",
    "is_main",
    "local_rank",
    "local_size",
    "log",
    "main_first",
    "mean",
    "no_sync",
    "rank",
    "register",
    "save",
    "shard",
    "size",
    "wrap",
]

_HOMES = {
    "HvdlmError": "hvdlm.errors",
    "Options": "hvdlm.options",
    "main_first": "hvdlm.adoption",
    "shard": "hvdlm.adoption",
    "World": "hvdlm.world",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hvdlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "hvdlm.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
