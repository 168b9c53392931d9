"""Runs something as soon as a module has been imported, by whoever imports it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["AfterImport"]


class AfterImport(MetaPathFinder):
    """Calls functions when modules have been loaded, at once for those that are loaded already.

    Args:
        actions: Module name -> what to call, with the module.
    """

    def __init__(self, actions: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._actions = dict(actions)
        self._finding: set[str] = set()

    def install(self) -> None:
        """Start."""
        for name in [name for name in self._actions if name in sys.modules]:
            self._actions.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stop."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _loaded(self, name: str, module: ModuleType) -> None:
        action = self._actions.pop(name, None)
        if action is not None and self in sys.meta_path:
            action(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname not in self._actions or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            # Kept until it is loaded: others may only ask whether the module is there.
            spec.loader = _Telling(spec.loader, lambda module: self._loaded(fullname, module))
        return spec


class _Telling(Loader):
    """A loader that says when it has loaded."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self._loader, self._action = loader, action

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._action(module)
