"""Optimizers, schedulers and scalers that a train function makes itself, and steps that must not happen twice.

Constructors and scheduler steps are watched on torch's own classes, and only in a run that keeps its state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hvdlm.contracts import Course, Kind

__all__ = ["Made"]


class Made:
    """Knows every optimizer over some parameters, every scheduler of these, and every gradient scaler.

    While the train function is on its way to the committed position, their ``step()`` does nothing.

    Args:
        course: Whether it is.
        parameters: Those hvdlm was given, by their ``id``.
    """

    def __init__(self, course: Course, parameters: Mapping[int, torch.nn.Parameter]) -> None:
        self._course, self._parameters = course, parameters
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._scalers: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._depth = 0

    def given(self, found: Sequence[tuple[str, Kind, Any]]) -> None:
        """The script handed these objects to hvdlm."""
        lists = {"optimizer": self._optimizers, "scheduler": self._schedulers, "scaler": self._scalers}
        for _, kind, value in found:
            if kind in lists:
                self._note(lists[kind], value)

    def everything(self) -> dict[str, list[Any]]:
        """Optimizers, schedulers and scalers, each in the order in which they were given or made."""
        optimizers = self._own_optimizers()
        ours = {id(optimizer) for optimizer in optimizers}
        schedulers = [s for s in self._schedulers if id(getattr(s, "optimizer", None)) in ours]
        return {"optimizers": optimizers, "schedulers": schedulers, "scalers": list(self._scalers)}

    def _own_optimizers(self) -> list[Any]:
        return [
            optimizer
            for optimizer in self._optimizers
            if any(id(p) in self._parameters for g in getattr(optimizer, "param_groups", ()) for p in g["params"])
        ]

    @staticmethod
    def _note(known: list[Any], value: Any) -> None:
        if not any(value is one for one in known):
            known.append(value)

    def install(self) -> None:
        """Start watching."""
        self._watch_made(torch.optim.Optimizer, self._optimizers)
        for cls in _with_subclasses(LRScheduler):
            if "__init__" in cls.__dict__:
                self._watch_made(cls, self._schedulers)
            if "step" in cls.__dict__:
                self._watch_step(cls)
        self._watch_made(torch.amp.GradScaler, self._scalers)
        hook = register_optimizer_step_pre_hook(self._before_step)
        self._undo.append(hook.remove)

    def remove(self) -> None:
        """Stop watching."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _replace(self, cls: Any, name: str, value: Callable[..., Any]) -> None:
        original = cls.__dict__[name]
        setattr(cls, name, value)

        def undo() -> None:
            if cls.__dict__.get(name) is value:
                setattr(cls, name, original)

        self._undo.append(undo)

    def _watch_made(self, cls: Any, known: list[Any]) -> None:
        original = cls.__dict__["__init__"]

        @functools.wraps(original)
        def init(made: Any, *args: Any, **kwargs: Any) -> None:
            self._note(known, made)  # before: the inner ones of a chain come after it wherever they are made
            original(made, *args, **kwargs)

        self._replace(cls, "__init__", init)

    def _watch_step(self, cls: Any) -> None:
        original = cls.__dict__["step"]

        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            # The step that the constructor makes sets the first learning rate.
            starting = getattr(scheduler, "_step_count", None) == 0
            if self._course.skipping and not starting and not self._depth:
                return None
            self._depth += 1
            try:
                return original(scheduler, *args, **kwargs)
            finally:
                self._depth -= 1

        self._replace(cls, "step", step)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Torch's optimizers leave parameters without a gradient alone; a closure must not make new ones."""
        if not self._course.skipping or not any(optimizer is one for one in self._own_optimizers()):
            return None
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        closure = (args[1] if len(args) > 1 else None) or kwargs.get("closure")
        if closure is None:
            return None
        return (args[0], lambda: torch.zeros(())), {}


def _with_subclasses(cls: Any) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _with_subclasses(sub)
