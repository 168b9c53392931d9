"""Where replicas that train on their own may meet: between two steps, at the end of an epoch, on every rank alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hvdlm.contracts import Course, Recorder

__all__ = ["SyncedCourse", "SyncedRecorder", "after_skipped_steps"]


class Local(Protocol):
    """See :class:`hvdlm.adapters.torch_local.LocalSync`."""

    def boundary(self) -> None: ...

    def synchronise(self) -> None: ...


def after_skipped_steps(
    optimizers: Sequence[torch.optim.Optimizer],
    skipped: Callable[[torch.optim.Optimizer], None],
    trained: Sequence[Callable[[], None]],
) -> Callable[[], None]:
    """Hear of steps that a gradient scaler leaves out: an infinity on one rank must not let it lose count."""
    scalers: Any = torch.amp.GradScaler
    original = scalers.step

    @functools.wraps(original)
    def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        made = []
        hook = optimizer.register_step_post_hook(lambda *_: made.append(True))
        try:
            return original(scaler, optimizer, *args, **kwargs)
        finally:
            hook.remove()
            if not made and any(optimizer is own for own in optimizers):
                skipped(optimizer)
                for tell in trained:
                    tell()

    def undo() -> None:
        if scalers.step is step:
            scalers.step = original

    scalers.step = step
    return undo


class SyncedCourse:
    """A course in which replicas are synchronised before anything else is done between two steps.

    Args:
        course: What happens there otherwise.
        local: Synchronises.
    """

    def __init__(self, course: Course, local: Local) -> None:
        self._course, self._local = course, local

    def __getattr__(self, name: str) -> Any:
        return getattr(self._course, name)

    def boundary(self) -> None:
        """See :class:`hvdlm.contracts.Course`."""
        self._local.boundary()
        self._course.boundary()


class SyncedRecorder:
    """A recorder that is told of the end of an epoch when replicas are equal.

    Args:
        recorder: The recorder.
        local: Synchronises.
    """

    def __init__(self, recorder: Recorder, local: Local) -> None:
        self._recorder, self._local = recorder, local

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def epoch_done(self, loader: str, number: int, skew: float | None = None) -> None:
        """See :class:`hvdlm.contracts.Recorder`."""
        self._local.synchronise()
        self._recorder.epoch_done(loader, number, skew)
