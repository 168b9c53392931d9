"""``events.jsonl``: what happened to a run besides training, a line each, written by rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hvdlm.private import open_private
from hvdlm.secrets import masked

__all__ = ["FILE", "Events"]

FILE = "events.jsonl"


class Events:
    """Appends to the file of one run.

    Args:
        directory: Asked for the run directory when there is something to write; None on ranks that write nothing.
        secrets: What is not to be written.
    """

    def __init__(self, directory: Callable[[], Path] | None, secrets: Sequence[str] = ()) -> None:
        self._directory, self._secrets = directory, tuple(secrets)

    def without_secrets(self, value: Any) -> Any:
        """A text, list or dict as it may be shown."""
        return masked(value, self._secrets)

    def add(self, event: str, **facts: Any) -> None:
        """Write one event: its kind, the time (seconds since 1970), and what belongs to it."""
        if self._directory is None:
            return
        line = json.dumps({"time": time.time(), "event": event, **self.without_secrets(facts)})
        with open_private(self._directory() / FILE, "a") as file:
            file.write(line + "\n")
