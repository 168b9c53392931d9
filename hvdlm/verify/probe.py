"""Runs a script's first steps and writes down what happens: ``python -m hvdlm.verify.probe DIR STEPS HOW SCRIPT``.

Nothing is changed but files: what saves models writes nothing, it is only noted.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from hvdlm import api, autorun, saving
from hvdlm.autowrap.imports import AfterImport
from hvdlm.environment import read_environment
from hvdlm.session import Session
from hvdlm.verify.trace import Trace, store

__all__ = ["SAMPLES", "Probe", "digest", "main"]

SAMPLES = 4096
"""Elements of gradients and parameters that are written down."""
_STUCK_SECONDS = 8.0
"""How long a worker may stand still after another has ended before it is taken to wait for ever."""


class Probe:
    """Watches this process.

    Args:
        directory: Where the trace goes.
        steps: After how many the process ends.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        environment = read_environment()
        self.limit = steps
        self.trace = Trace(environment.rank, environment.size)
        self.closing: Callable[[], None] = lambda: None
        """Writes down what can only be seen at the end."""
        self.initial: Callable[[Any], dict[str, str]] = lambda model: {}
        """Digests of a model's parameters, by name."""
        self._directory = directory
        self._lock = threading.Lock()
        threading.Thread(target=self._watch_others, name="hvdlm-verify", daemon=True).start()
        attach = Session.attach

        def noted(session: Session, found: Any) -> Any:
            for where, kind, value in found:
                if kind == "model":
                    self.note_initial(where, value)
            result = attach(session, found)
            self.trace.options = session.resolved.options.to_dict()
            return result

        Session.attach = noted  # type: ignore[method-assign,assignment]  # while the probe runs
        # Replacing the file is part of it: what writes nothing would leave an empty one.
        saving._save_atomically = lambda adapter, value, path: self.trace.saved.append(path)

    def note_initial(self, where: str, model: Any) -> None:
        """A model is about to be made equal on all ranks: what it is like before that."""
        for name, value in self.initial(model).items():
            self.trace.initial.setdefault(f"{where}.{name}", value)

    def watch_torch(self, torch: ModuleType) -> None:
        """PyTorch has been imported."""
        from hvdlm.verify.torch_probe import TorchProbe

        TorchProbe(self, torch).watch()

    def watch_keras(self, keras: ModuleType) -> None:
        """Keras has been imported."""
        if keras.config.backend() == "tensorflow":
            from hvdlm.verify.keras_probe import KerasProbe

            KerasProbe(self, keras).watch()

    def backward(self) -> None:
        """A gradient is about to be computed; the process ends here once enough were."""
        if self.trace.backwards >= self.limit:
            self.finish()
        self.trace.backwards += 1

    def finish(self) -> None:
        """Write the trace and end the process, whatever the script goes on to do."""
        self.closing()
        session = api._session
        self.trace.handed = 0 if session is None else session.account.batches
        if session is not None and session.data_is_shared:
            self.trace.unshared = 0
        with self._lock:
            store(self.trace, self._directory)
            sys.stdout.flush()
            os._exit(0)

    def _watch_others(self) -> None:
        """Write the trace of a worker that waits for ever, in a collective that the others do not come to."""
        still, before = time.monotonic(), None
        while True:
            time.sleep(0.2)
            now = (self.trace.backwards, self.trace.attempts, len(self.trace.batches), len(self.trace.steps))
            if now != before or not list(self._directory.glob("rank-*.json")):
                still, before = time.monotonic(), now
            elif time.monotonic() - still > _STUCK_SECONDS and self._lock.acquire(blocking=False):
                self.trace.stuck = True
                store(self.trace, self._directory, wait=False)
                os._exit(0)


def digest(data: Any) -> str:
    """Of the bytes of a contiguous array."""
    return xxhash.xxh3_64_hexdigest(data)


def main(argv: list[str]) -> None:
    """``DIRECTORY STEPS plain|autowrap SCRIPT [ARGUMENT ...]``."""
    directory, steps, how, *words = argv
    probe = Probe(Path(directory), int(steps))
    AfterImport({"torch": probe.watch_torch, "keras": probe.watch_keras}).install()
    try:
        if how == "autowrap":
            autorun.main(words)
        else:
            sys.argv = words
            sys.path[0:1] = [os.path.dirname(os.path.abspath(words[0]))]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            probe.trace.error = probe.trace.error or f"exit code {leaving.code}"
    except BaseException as error:
        probe.trace.error = f"{type(error).__name__}: {error}"
    probe.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
