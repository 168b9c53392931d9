"""When the state may be copied while training goes on, and what has to wait for the copy.

Parameters and what optimizers remember change in ``optimizer.step()``. Where a loader hands out the next batch they may
be copied during forward and backward; the step waits for what is left of it. At the end of an epoch, and where no
optimizer is known, the script may change them itself: there everything is copied at once.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from hvdlm.contracts import Course, Recorder
from hvdlm.state.snapshot import Snapshot

__all__ = ["Background"]


class Background:
    """The copy that is being made, if any."""

    def __init__(self) -> None:
        self._calm = False
        self._allowed = True
        self._copied: Snapshot | None = None
        self._hook: Any = None

    @property
    def may_copy(self) -> bool:
        """Whether nothing but a step of an optimizer will change what is trained."""
        return self._calm and self._allowed and self._hook is not None

    def install(self) -> None:
        """Let steps of optimizers wait."""
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(lambda *_: self.wait())

    def forbid(self) -> None:
        """Something else changes parameters between a batch and its step."""
        self._allowed = False

    def copies(self, snapshot: Snapshot) -> Snapshot:
        """This snapshot is being filled; returns it."""
        self._copied = snapshot
        return snapshot

    def wait(self) -> None:
        """Wait for the copy."""
        copied, self._copied = self._copied, None
        if copied is not None and not copied.wait():
            self.forbid()  # an embedding with max_norm changes in its forward, say: it would happen again

    def course(self, course: Course) -> Course:
        """A course for loaders that have the next batch ready."""
        return _Calm(course, self)

    def recorder(self, recorder: Recorder) -> Recorder:
        """A recorder for loaders: at the end of an epoch nothing is copied any more."""
        return _Waiting(recorder, self)

    def remove(self) -> None:
        """Wait for the copy, and let steps be."""
        self.wait()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class _Calm:
    def __init__(self, course: Course, background: Background) -> None:
        self._course, self._background = course, background

    def __getattr__(self, name: str) -> Any:
        return getattr(self._course, name)

    def boundary(self) -> None:
        self._background._calm = True
        try:
            self._course.boundary()
        finally:
            self._background._calm = False


class _Waiting:
    def __init__(self, recorder: Recorder, background: Background) -> None:
        self._recorder, self._background = recorder, background

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def epoch_done(self, *args: Any) -> None:
        self._background.wait()
        self._recorder.epoch_done(*args)
