"""Where checkpoints lie: a directory, or any URL that fsspec knows. One is there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hvdlm.errors import ConfigError

__all__ = ["LAST_FILE", "Directory", "Remote", "Store", "open_store"]

LAST_FILE = "manifest.json"
"""Written when all other files of a checkpoint are there: without it there is no checkpoint."""
_NAME = re.compile(r"step-\d+")
_PARTIAL = ".partial-"

Write = Callable[[Callable[[str], Any]], None]
"""Writes all files of a checkpoint, :data:`LAST_FILE` last: called with what opens a file of a name for writing."""


class Store(Protocol):
    """Checkpoints by name; any method may raise OSError, or what the store's library raises."""

    def names(self) -> list[str]:
        """Those that are there, in any order."""
        ...

    def read(self, name: str, file: str) -> bytes:
        """A file of a checkpoint."""
        ...

    def write(self, name: str, write: Write) -> None:
        """Make a checkpoint of this name; one that was there is replaced."""
        ...

    def remove(self, name: str) -> None:
        """Remove a checkpoint."""
        ...


def open_store(where: str) -> Store:
    """The store at a path or URL.

    Raises:
        ConfigError: It cannot be one.
    """
    if where.startswith("file://"):
        where = where[len("file://") :]
    try:
        return Remote(where) if re.match(r"\w[\w+.-]*(://|::)", where) else Directory(where)
    except ImportError as error:
        raise ConfigError(
            f"checkpoint_dir {where!r} needs a package that is not installed: {error}", hint="pip install 'hvdlm[data]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"checkpoint_dir {where!r} cannot be used: {error}",
            hint="--checkpoint-dir takes a directory that can be written, or a URL that fsspec knows",
        ) from error


class Directory:
    """A local directory: a checkpoint gets its name by a rename, when all of it has reached the disk.

    Args:
        path: Made if it is not there.
    """

    def __init__(self, path: str) -> None:
        self._root = Path(path).expanduser().absolute()
        self._root.mkdir(parents=True, exist_ok=True)
        probe = self._root / f"{_PARTIAL}{os.getpid()}"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    def names(self) -> list[str]:
        """See :class:`Store`."""
        return [entry.name for entry in os.scandir(self._root) if _NAME.fullmatch(entry.name)]

    def read(self, name: str, file: str) -> bytes:
        """See :class:`Store`."""
        return (self._root / name / file).read_bytes()

    def write(self, name: str, write: Write) -> None:
        """See :class:`Store`."""
        self._clean()
        partial = self._root / f"{_PARTIAL}{name}"
        partial.mkdir()

        @contextlib.contextmanager
        def create(file: str) -> Iterator[Any]:
            with open(partial / file, "xb", buffering=0) as out:
                yield out
                os.fsync(out.fileno())

        try:
            write(create)
            _sync(partial)
            final = self._root / name
            if final.exists():
                final.rename(self._root / f"{_PARTIAL}old-{name}")
            partial.rename(final)
            _sync(self._root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._clean()

    def remove(self, name: str) -> None:
        """See :class:`Store`."""
        # First by another name: what is half removed must not look like a checkpoint.
        (self._root / name).rename(self._root / f"{_PARTIAL}old-{name}")
        self._clean()

    def _clean(self) -> None:
        """Remove what an earlier run that was killed left half written."""
        for entry in list(os.scandir(self._root)):
            if entry.name.startswith(_PARTIAL):
                shutil.rmtree(entry.path, ignore_errors=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Remote:
    """Any file system of fsspec: object stores have no rename, so the manifest, written last, makes the checkpoint.

    Args:
        url: As fsspec takes it.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._root = self._root.rstrip("/")

    def names(self) -> list[str]:
        """See :class:`Store`."""
        return [name for name, files in self._listed().items() if LAST_FILE in files]

    def _listed(self) -> dict[str, set[str]]:
        self._fs.invalidate_cache()
        found: dict[str, set[str]] = {}
        try:
            paths = self._fs.find(self._root)
        except FileNotFoundError:
            return {}
        for path in paths:
            parts = str(path).rsplit("/", 2)
            if len(parts) == 3 and _NAME.fullmatch(parts[1]):
                found.setdefault(parts[1], set()).add(parts[2])
        return found

    def read(self, name: str, file: str) -> bytes:
        """See :class:`Store`."""
        content: bytes = self._fs.cat_file(f"{self._root}/{name}/{file}")
        return content

    def write(self, name: str, write: Write) -> None:
        """See :class:`Store`."""
        self.remove(name)
        self._fs.makedirs(f"{self._root}/{name}", exist_ok=True)
        write(lambda file: self._fs.open(f"{self._root}/{name}/{file}", "wb"))

    def remove(self, name: str) -> None:
        """See :class:`Store`."""
        files = self._listed().get(name)
        if files is None:
            return
        # The manifest first: what is half removed must not look like a checkpoint.
        for file in sorted(files, key=lambda file: file != LAST_FILE):
            self._fs.rm_file(f"{self._root}/{name}/{file}")
        with contextlib.suppress(OSError, NotImplementedError):
            self._fs.rmdir(f"{self._root}/{name}")
