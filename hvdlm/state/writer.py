"""Writes checkpoints in a thread of its own while training goes on, and finds the newest that is whole."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdlm.contracts import Collectives
from hvdlm.errors import CheckpointError, HvdlmError
from hvdlm.state.checkpoint import Damaged, name_of, number_of, read, write
from hvdlm.state.history import send
from hvdlm.state.snapshot import Snapshot
from hvdlm.state.store import Store, open_store
from hvdlm.world import World

__all__ = ["Writer"]

_log = logging.getLogger("hvdlm")

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 60.0
_SECONDS_TO_CLOSE = 0.5


class _Closed(Exception):
    """The run ends: what is being written is given up."""


class Writer:
    """Checkpoints of one run in one store; rank 0 writes and reads.

    What fails is warned of and tried again, with growing pauses, until it is written or a newer state takes its place.

    Args:
        where: Directory or URL.
        keep: How many checkpoints are kept.
        on_event: Told of checkpoints, from the writer's thread.
    """

    def __init__(
        self, where: str, keep: int, on_event: Callable[[str, dict[str, Any]], None] = lambda name, fields: None
    ) -> None:
        self._where, self._keep = where, keep
        self.on_event = on_event
        self._store: Store | None = None
        self._damaged: set[str] = set()
        self._condition = threading.Condition()
        self._pending: Snapshot | None = None
        self._busy = self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def store(self) -> Store:
        """The store, opened when first needed."""
        if self._store is None:
            self._store = open_store(self._where)
        return self._store

    def open_for_all(self, resume: str, world: World, collectives: Collectives) -> Snapshot | None:
        """The state to go on from, read by rank 0 and sent to all; every rank calls it.

        Raises:
            CheckpointError: As :meth:`open` does, on every rank.
        """
        snapshot, failure = None, ["", ""]
        if world.is_main:
            try:
                snapshot = self.open(resume)
            except HvdlmError as error:  # every rank has to hear of it
                failure = [error.message, error.hint or ""]
        message, hint = json.loads(collectives.broadcast(json.dumps(failure).encode()))
        if message:
            raise CheckpointError(message, hint=hint or None)
        return send(snapshot, collectives, 0)

    def open(self, resume: str) -> Snapshot | None:
        """The state to go on from.

        Args:
            resume: ``no`` (the store must be empty), ``yes`` (there must be one) or ``auto``.

        Raises:
            CheckpointError: There is none that is whole although there has to be, or one although there must not.
            ConfigError: The store cannot be used.
        """
        store = self.store
        try:
            names = sorted(store.names(), key=number_of, reverse=True)
        except Exception as error:
            if resume == "no":
                self._warn(f"cannot be read: {error!r}")
                return None
            raise CheckpointError(
                f"the checkpoints in {self._where} cannot be read: {error!r}",
                hint="check that the store can be reached",
            ) from error
        if resume == "no":
            if names:
                raise CheckpointError(
                    f"{self._where} holds checkpoints of an earlier run, up to step {number_of(names[0])}.",
                    hint="--resume goes on from there; else give another --checkpoint-dir, or empty this one",
                )
            return None
        for name in names:
            try:
                return read(store, name)
            except CheckpointError:
                raise
            except Exception as error:
                what = str(error) if isinstance(error, Damaged) else repr(error)
                self._damaged.add(name)
                self._warn(f"{name} is damaged ({what}); the one before it is used")
        if resume == "auto" and not names:
            return None
        raise CheckpointError(
            f"there is no checkpoint {'that is whole ' if names else ''}in {self._where} to resume from.",
            hint="start without --resume, or give the --checkpoint-dir of the run to go on with",
        )

    def submit(self, snapshot: Snapshot) -> None:
        """Have a state written; one that waits for it still is replaced. Returns at once."""
        with self._condition:
            if self._closing:
                return
            snapshot.pins += 1
            if self._pending is not None:
                self._pending.pins -= 1
            self._pending = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hvdlm checkpoints", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is left to write; False if that takes longer than ``timeout`` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: self._pending is None and not self._busy, timeout)

    def close(self) -> None:
        """End the thread; what is being written is given up, and what is in the store stays."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_SECONDS_TO_CLOSE)  # a store that hangs must not keep the job from ending

    def _work(self) -> None:
        failures = 0
        while True:
            with self._condition:
                if failures:
                    pause = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** (failures - 1))
                    self._condition.wait_for(lambda: self._closing, pause)
                else:
                    self._condition.wait_for(lambda: self._closing or self._pending is not None)
                if self._closing:
                    return
                snapshot, self._pending = self._pending, None
                assert snapshot is not None
                self._busy = True
            failed = not self._try(snapshot, failures)
            with self._condition:
                failures = failures + 1 if failed else 0
                if failed and self._pending is None and not self._closing:
                    self._pending = snapshot
                else:
                    snapshot.pins -= 1
                self._busy = False
                self._condition.notify_all()

    def _try(self, snapshot: Snapshot, failures: int) -> bool:
        if not snapshot.wait():
            self._warn(f"step {snapshot.number} is not written: the script changed parameters between two steps")
            return True
        start = time.monotonic()
        try:
            size = write(self.store, snapshot, self._check)
        except _Closed:
            return False
        except Exception as error:
            if failures % 10 == 0:
                self._warn(
                    f"step {snapshot.number} could not be written: {error}; training goes on, and so do attempts"
                )
            self.on_event("checkpoint_failed", {"step": snapshot.number, "error": str(error)})
            return False
        if failures:
            self._warn(f"step {snapshot.number} is written, after {failures} failed attempts")
        self._damaged.discard(name_of(snapshot.number))
        seconds = round(time.monotonic() - start, 3)
        self.on_event("checkpoint", {"step": snapshot.number, "seconds": seconds, "bytes": size})
        self._prune()
        return True

    def _prune(self) -> None:
        try:
            whole = sorted(set(self.store.names()) - self._damaged, key=number_of, reverse=True)
            for name in whole[self._keep :]:
                self.store.remove(name)
        except Exception as error:
            self._warn(f"old checkpoints could not be removed: {error}")

    def _check(self) -> None:
        if self._closing:
            raise _Closed

    def _warn(self, text: str) -> None:
        _log.warning("checkpoints in %s: %s", self._where, text)
