"""Where files are and how pieces of them are read: local paths with nothing but Python, URLs through fsspec."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from hvdlm.errors import DataError

__all__ = ["DataFile", "find_files", "need"]

_VERSIONS = ("ETag", "etag", "generation", "version_id", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems say of a file that is another when its content is."""
_PATTERN = re.compile(r"[*?\[]")


def need(module: str, what: str) -> Any:
    """Import an optional module.

    Raises:
        DataError: It is not installed; says what needs it and how to install it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} needs {module}, which is not installed.", hint="pip install 'hvdlm[data]'") from None


@dataclass(frozen=True)
class DataFile:
    """One file as it was when it was found; reading it later, when it is another, raises."""

    name: str
    """Path or URL, for people."""
    path: str
    """What the file system calls it."""
    size: int
    """Bytes, as stored."""
    version: str
    """Modification time or entity tag."""
    store: Any = field(default=None, repr=False)
    """The fsspec file system; None for a local path."""

    def read(self, start: int, end: int, row: int | None = None) -> bytes:
        """Bytes [start, end); opens and closes the file, so that nothing is shared between processes or threads.

        Args:
            start: First byte.
            end: Behind the last byte; cut at the end of the file.
            row: Which row it is read for, for messages.

        Raises:
            DataError: The file cannot be read, or has changed.
        """
        end = min(end, self.size)
        if end <= start:
            return b""
        try:
            if self.store is None:
                with open(self.path, "rb", buffering=0) as opened:
                    self._compare(_local_version(os.fstat(opened.fileno())), row)
                    data = _read_all(opened.fileno(), start, end)
            else:
                data = cast(bytes, self.store.cat_file(self.path, start=start, end=end))
        except OSError as error:
            raise self.error(f"cannot be read: {error}", row, hint="check the path and its permissions") from error
        if len(data) != end - start:
            raise self._changed(row)
        return data

    def open(self) -> BinaryIO:
        """The whole file, seekable.

        Raises:
            DataError: The file cannot be read, or has changed.
        """
        self.check()
        try:
            return open(self.path, "rb") if self.store is None else cast(BinaryIO, self.store.open(self.path, "rb"))
        except OSError as error:
            raise self.error(f"cannot be read: {error}", hint="check the path and its permissions") from error

    def check(self) -> None:
        """Raise a DataError if the file is gone or has changed since it was found."""
        try:
            if self.store is None:
                now = _local_version(os.stat(self.path))
            else:
                now = _remote_version(self.store.info(self.path))
        except OSError as error:
            raise self.error(f"cannot be read: {error}", hint="check the path and its permissions") from error
        self._compare(now, None)

    def error(self, message: str, row: int | None = None, hint: str | None = None) -> DataError:
        """A DataError that names this file and the row in it."""
        where = self.name if row is None else f"{self.name}, row {row}"
        return DataError(f"{where}: {message}.", hint=hint)

    def _compare(self, now: tuple[int, str], row: int | None) -> None:
        if now != (self.size, self.version):
            raise self._changed(row)

    def _changed(self, row: int | None) -> DataError:
        return self.error(
            "the file has changed since it was indexed", row, hint="restore it, or call open_files again to index it"
        )


def find_files(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[DataFile]:
    """The files that paths, globs, directories and URLs stand for.

    They come in the order given; those of one glob or directory by name. A file named twice comes once.

    Raises:
        DataError: Nothing is given, nothing matches, or a file does not exist.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not given:
        raise DataError("no files are given.", hint="pass a path, a glob or a URL: open_files('data/*.jsonl')")
    found: dict[str, DataFile] = {}
    for source in given:
        text = os.fspath(source)
        some = list(_remote(text) if "://" in text or "::" in text else _local(text))
        if not some:
            raise DataError(
                f"no file matches {text!r} (working directory: {os.getcwd()}).", hint="check the path: ls " + text
            )
        for file in some:
            found.setdefault(file.name, file)
    return list(found.values())


def _local(text: str) -> Iterator[DataFile]:
    text = os.path.expanduser(text)
    if os.path.isdir(text):
        paths = sorted(
            str(path)
            for path in Path(text).rglob("*")
            if path.is_file() and not any(_is_hidden(part) for part in path.relative_to(text).parts)
        )
    elif _PATTERN.search(text) and not os.path.exists(text):
        paths = sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))
    else:
        paths = [text]
    for path in paths:
        try:
            size, version = _local_version(os.stat(path))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}.", hint=f"check the path: ls {path}") from error
        # Absolute, so that it is found after the script has changed its directory.
        yield DataFile(path, os.path.abspath(path), size, version)


def _remote(url: str) -> Iterator[DataFile]:
    core = need("fsspec.core", f"reading {url}")
    try:
        store, path = core.url_to_fs(url)
        if _PATTERN.search(path):
            paths = sorted(name for name in store.glob(path) if store.isfile(name))
        elif store.isdir(path):
            paths = sorted(name for name in store.find(path) if not any(map(_is_hidden, _below(name, path))))
        else:
            paths = [path]
        for path in paths:
            size, version = _remote_version(store.info(path))
            yield DataFile(str(store.unstrip_protocol(path)), path, size, version, store)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"{url}: {type(error).__name__}: {error}.", hint="check the URL and your access to it"
        ) from error


def _below(name: str, directory: str) -> list[str]:
    return name[len(directory) :].strip("/").split("/")


def _is_hidden(part: str) -> bool:
    """Whether a name is one that tools give to what is no data: .git, _SUCCESS, _metadata."""
    return part.startswith((".", "_"))


def _local_version(status: os.stat_result) -> tuple[int, str]:
    return status.st_size, str(status.st_mtime_ns)


def _remote_version(info: dict[str, Any]) -> tuple[int, str]:
    if info.get("size") is None:
        raise OSError(f"{info.get('name')} has no known size, so it cannot be read in pieces")
    return int(info["size"]), next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def _read_all(descriptor: int, start: int, end: int) -> bytes:
    pieces = []
    # One read returns at most 2 GiB.
    while start < end and (piece := os.pread(descriptor, end - start, start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
