"""Framework adapters, with the same face (:class:`hvdlm.contracts.Adapter`); none is imported until it is chosen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from hvdlm.contracts import Adapter
from hvdlm.errors import ConfigError

__all__ = ["ADAPTERS", "choose_adapter", "framework_of"]

ADAPTERS = {
    "torch": ("hvdlm.adapters.torch_adapter", "TorchAdapter"),
    "keras": ("hvdlm.adapters.keras_adapter", "KerasAdapter"),
}
"""Framework name -> (module, class)."""

_ON_TORCH = ("hvdlm.adapters.keras_torch", "KerasTorchAdapter")
"""The adapter for ``KERAS_BACKEND=torch``."""

_LEGACY = ("hvdlm.adapters.keras_legacy", "LegacyKerasAdapter")
"""The adapter for models of ``tf_keras`` (Keras 2)."""

_ROOTS = {"torch": "torch", "keras": "keras", "tf_keras": "tf_keras", "tensorflow": "keras"}
"""Package that a class is from -> framework."""


def choose_adapter(framework: str | None = None) -> Adapter:
    """The adapter of a framework; by default of the one the script has imported.

    Raises:
        ConfigError: The framework is unknown; lists those that are known.
    """
    if framework is None:
        framework = _imported()
    if framework not in (*ADAPTERS, "tf_keras"):
        raise ConfigError(f"unknown framework {framework!r}; the frameworks are: {', '.join(ADAPTERS)}.")
    if framework == "tf_keras":
        module, name = _LEGACY
    else:
        module, name = _ON_TORCH if framework == "keras" and _keras_runs_on() == "torch" else ADAPTERS[framework]
    adapter: Adapter = getattr(importlib.import_module(module), name)()
    return adapter


def framework_of(objects: Iterable[Any]) -> str | None:
    """The framework that the first model, optimizer or dataset among some objects is of, judged by its class."""
    for value in objects:
        for cls in type(value).__mro__:
            root = cls.__module__.partition(".")[0]
            if root in _ROOTS and root in sys.modules:
                return _ROOTS[root]
    return None


def _keras_runs_on() -> str:
    backend: str = importlib.import_module("keras").config.backend()
    if backend not in ("tensorflow", "torch"):
        raise ConfigError(
            f"Keras runs on {backend!r}; allowed: 'tensorflow', 'torch'.", hint="set KERAS_BACKEND=tensorflow"
        )
    return backend


def _imported() -> str:
    """The framework the script has imported. Where both are loaded (a library may load the other one, and Keras runs
    on torch too), the one that the main script names.
    """
    loaded = [name for name in ADAPTERS if name in sys.modules]
    if len(loaded) > 1:
        loaded = ["keras"] if _main_names("keras") or _main_names("tensorflow") else ["torch"]
    if "tf_keras" in sys.modules and not _main_names("keras"):
        return "tf_keras"
    return loaded[0] if loaded else "torch"


def _main_names(package: str) -> bool:
    """Whether the main script has a module, class or function of a package among its names."""
    values = vars(sys.modules["__main__"]).values()
    named = [str(getattr(v, name, None) or "") for v in values for name in ("__name__", "__module__")]
    return any(name.split(".")[0] == package for name in named)
