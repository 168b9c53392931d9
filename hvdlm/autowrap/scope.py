"""The dynamic scope in which things are recognised: what was found, when it is attached, and how all is undone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from hvdlm.autowrap.imports import AfterImport
from hvdlm.autowrap.places import place
from hvdlm.contracts import Kind
from hvdlm.errors import RecognitionError
from hvdlm.session import Session

__all__ = ["Scope"]

_log = logging.getLogger("hvdlm")


class Scope:
    """Recognises what is made while it is active.

    Optimizers and schedulers are noted as they are made, models are found by the parameters they hold. All are attached
    at the last moment before training reads data or computes a gradient, so that what the script does in between
    (loading a checkpoint, moving to a device) is done.

    Args:
        begin: Starts hvdlm for a framework and returns the session.
    """

    active: Scope | None = None
    """The innermost scope of this process."""

    def __init__(self, begin: Callable[[str], Session]) -> None:
        self._begin = begin
        self._session: Session | None = None
        self._pending: list[tuple[weakref.ref[Any], Kind, str]] = []
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        self._names: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._outer: Scope | None = None
        self._busy = self._stood_down = False
        self.framework: str | None = None
        """The framework that trains, once it is known."""
        self.has_data = False
        """Whether a loader or data set was shared out, or the script shared out a tensor itself."""

    def __enter__(self) -> Scope:
        from hvdlm.autowrap.refusals import REFUSALS

        self._outer, Scope.active = Scope.active, self
        actions: dict[str, Callable[[ModuleType], None]] = {
            name: lambda module, refuse=refuse: self._undo.extend(refuse(self, module))  # type: ignore[misc]  # a default holds the loop's value
            for name, refuse in REFUSALS.items()
        }
        actions["torch"] = lambda _: self._watch_torch()
        actions["keras"] = lambda _: self._watch_keras()
        imports = AfterImport(actions)
        imports.install()
        self._undo.append(imports.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Recognise nothing any more; what is attached stays attached."""
        if Scope.active is self:
            Scope.active = self._outer
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._pending.clear()

    def stand_down(self) -> None:
        """The script says itself what is to be distributed."""
        self._stood_down = True
        self.close()

    def _watch_torch(self) -> None:
        from hvdlm.autowrap.torch_hooks import install

        self._undo += install(self)

    def _watch_keras(self) -> None:
        from hvdlm.autowrap.keras_hooks import install

        self._undo += install(self)

    def session(self, framework: str) -> Session:
        """The run, which begins now if it has not."""
        if self._session is None:
            self._session, self.framework = self._begin(framework), framework
        return self._session

    @property
    def has_attached(self) -> bool:
        """Whether anything is attached."""
        return len(self._attached) > 0

    @property
    def busy(self) -> bool:
        """Whether something is being attached: what the adapter makes itself is not the person's."""
        return self._busy

    def note(self, value: Any, kind: Kind) -> None:
        """Something was made, in the line of the script that is running."""
        if not self._busy and not any(ref() is value for ref, _, _ in self._pending):
            self._pending.append((weakref.ref(value), kind, place(2)))

    def pending(self) -> list[tuple[Any, Kind, str]]:
        """What was made and is not attached yet: (object, kind, where)."""
        return [(ref(), kind, where) for ref, kind, where in self._pending if ref() is not None]

    @property
    def has_pending_optimizer(self) -> bool:
        """Whether an optimizer was made and is not attached yet."""
        return any(kind == "optimizer" and ref() is not None for ref, kind, _ in self._pending)

    def is_attached(self, value: Any) -> bool:
        """Whether this object was attached."""
        return value in self._attached

    def attach(self, framework: str, found: list[tuple[str, Kind, Any]], told: Iterator[str]) -> list[Any]:
        """Make objects distributed; returns what is used instead of each.

        Args:
            framework: ``torch`` or ``keras``.
            found: (name, kind, object).
            told: A line for the person for each object, made when it is attached.
        """
        self._busy = True
        try:
            session = self.session(framework)
            replaced = session.attach([(self._unique(name), kind, value) for name, kind, value in found])
        finally:
            self._busy = False
        for _, _, value in found:
            self._attached.add(value)
        self._pending = [
            entry for entry in self._pending if entry[0]() is not None and entry[0]() not in self._attached
        ]
        for line in told:
            self.tell(line)
        return replaced

    def tell(self, line: str) -> None:
        """Say on rank 0 what was recognised."""
        assert self._session is not None
        if self._session.world.is_main:
            _log.warning("autowrap: %s", line)
        self._session.events.add("recognised", what=line)

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name} #{count}"

    def finished(self, way: str = "--autowrap") -> None:
        """The script has ended.

        Args:
            way: What the person asked for, to be named in the error.

        Raises:
            RecognitionError: On several workers, and nothing was ever recognised.
        """
        if self._session is None and not self._stood_down:
            raise RecognitionError(
                f"{way} recognised nothing: the script made no PyTorch or Keras optimizer, called no backward() "
                "and no fit(), so that every worker did the same work by itself.",
                hint="pass them: model, optimizer, loader = hvdlm.wrap(model, optimizer, loader)",
            )
