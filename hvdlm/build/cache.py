"""Built wheels, kept outside the checkout. An entry is whole or it is not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hvdlm.build.sdist import file_sha256

__all__ = ["WheelCache"]


class WheelCache:
    """Wheels by key, each in a directory with the record of its build.

    Args:
        directory: Directory of hvdlm's cache; made when first written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._wheels = directory / "wheels"

    def find(self, key: str) -> Path | None:
        """The wheel of a key; None if there is none. One that is not as it was stored is thrown away."""
        entry = self._wheels / key
        try:
            stored = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
            wheel = entry / str(stored["wheel"])
            if file_sha256(wheel) == stored["sha256"]:
                return wheel
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if entry.exists():
            self.drop(key)
        return None

    def store(self, key: str, wheel: Path, record: dict[str, Any]) -> Path:
        """Copy a wheel into the cache, replacing an entry of the same key, and return its place there.

        Whatever interrupts this leaves the entry as it was or as it will be.
        """
        self._wheels.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self._wheels))
        try:
            shutil.copyfile(wheel, fresh / wheel.name)
            entry = {"wheel": wheel.name, "sha256": file_sha256(fresh / wheel.name), "record": record}
            (fresh / "entry.json").write_text(json.dumps(entry, indent=2), encoding="utf-8")
            fresh.chmod(0o755)
            self.drop(key)
            try:
                os.rename(fresh, self._wheels / key)
            except OSError:
                # Another build of the same was faster.
                if self.find(key) is None:
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return self._wheels / key / wheel.name

    def drop(self, key: str) -> None:
        """Remove an entry. The rename makes it disappear at once, not file by file."""
        entry = self._wheels / key
        if entry.exists():
            grave = Path(tempfile.mkdtemp(prefix=".gone-", dir=self._wheels))
            os.rename(entry, grave / key)
            shutil.rmtree(grave, ignore_errors=True)
