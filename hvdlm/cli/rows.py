"""Rows of a data set, for commands that look at it before a run.

Lines of plain text and JSONL files are counted as they are; what else :func:`hvdlm.sources.open_files` can read
(Parquet, TFRecord, compressed files, globs and URLs) is opened with it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.hashing import hash_key
from hvdlm.errors import DataError
from hvdlm.sources import open_files
from hvdlm.sources.compressed import CODECS
from hvdlm.sources.index import FORMATS

__all__ = ["count_rows", "read_keys"]

_JSONL = (".jsonl", ".ndjson")
_NOT_PLAIN = (*CODECS, *FORMATS["parquet"], *FORMATS["tfrecord"])
_CHUNK = 1 << 20


def count_rows(data: str) -> int:
    """Lines of a text file, rows (lines that are not blank) of a JSONL file, or all of those in a directory.

    Raises:
        DataError: Something cannot be read, is not text, or holds no row.
    """
    if _needs_sources(data):
        return len(open_files(data))
    path = Path(data).expanduser()
    total = sum(_count(file) for file in _files(path))
    if not total:
        raise DataError(f"{path} holds no row.", hint=f"look into it: head {_quoted(path)}")
    return total


def read_keys(data: str, column: str) -> npt.NDArray[np.int64]:
    """What places each row of JSONL and Parquet files: the hash of the value in a column, in the order of the rows.

    Returns:
        int64, shape (rows,).

    Raises:
        DataError: As :func:`count_rows`, or a row is not a JSON object, lacks the column or has a value that cannot be
            a key; the message names file and line.
    """
    if _needs_sources(data):
        return np.fromiter(_keys_of_rows(data, column), dtype=np.int64)
    path = Path(data).expanduser()
    hashes = np.fromiter((h for file in _files(path) for h in _keys(file, column)), dtype=np.int64)
    if not len(hashes):
        raise DataError(f"{path} holds no row.", hint=f"look into it: head {_quoted(path)}")
    return hashes


def _needs_sources(data: str) -> bool:
    path = Path(data).expanduser()
    if "://" in data or "::" in data or (not path.exists() and any(mark in data for mark in "*?[")):
        return True
    names = (file.name for file in path.rglob("*")) if path.is_dir() else [path.name]
    return any(name.lower().endswith(_NOT_PLAIN) for name in names)


def _keys_of_rows(data: str, column: str) -> Iterator[int]:
    rows = open_files(data)
    if rows.kind not in ("jsonl", "parquet"):
        raise DataError(
            f"{data} holds {rows.kind} rows, which have no column {column!r}.",
            hint="leave --key out to place rows by their number",
        )
    for number in range(len(rows)):
        row = rows[number]
        if not isinstance(row, dict):
            raise DataError(f"{rows.where(number)} holds a {type(row).__name__}; allowed: JSON objects.")
        if column not in row:
            raise DataError(
                f"{rows.where(number)} has no column {column!r}; it has: {', '.join(map(repr, row))}.",
                hint="name one of them: --key COLUMN",
            )
        try:
            yield hash_key(row[column])
        except TypeError as error:
            raise DataError(f"{rows.where(number)}, column {column!r}: {error}.") from None


def _files(path: Path) -> list[Path]:
    """The file, or the files in a directory and those below it, sorted; hidden ones are left out."""
    try:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_file()]
            files = sorted(file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts))
            if not files:
                raise DataError(f"{path} is a directory without files.", hint=f"ls -la {_quoted(path)}")
            return files
        if not path.exists():
            raise DataError(f"{path} does not exist.", hint=f"ls {_quoted(path.parent)}")
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a directory.", hint=f"ls -l {_quoted(path)}")
    except OSError as error:
        raise _unreadable(path, error) from None
    return [path]


def _count(file: Path) -> int:
    jsonl = file.suffix.lower() in _JSONL
    try:
        with file.open("rb") as opened:
            if jsonl:
                return sum(1 for line in _text(file, opened) if line.strip())
            count, last = 0, b"\n"
            while chunk := opened.read(_CHUNK):
                if b"\0" in chunk:
                    raise _binary(file)
                count, last = count + chunk.count(b"\n"), chunk[-1:]
            return count + (last != b"\n")
    except OSError as error:
        raise _unreadable(file, error) from None


def _keys(file: Path, column: str) -> Iterator[int]:
    if file.suffix.lower() not in _JSONL:
        raise DataError(
            f"{file} is not a JSONL file ({' or '.join(_JSONL)}), so it has no column {column!r}.",
            hint="leave --key out to place rows by their number",
        )
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(_text(file, opened), start=1):
                if line.strip():
                    yield _key(file, number, line, column)
    except OSError as error:
        raise _unreadable(file, error) from None


def _key(file: Path, number: int, line: bytes, column: str) -> int:
    where, show = f"{file}, line {number}", f"look at it: sed -n {number}p {_quoted(file)}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}.", hint=show) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; allowed: JSON objects.", hint=show)
    if column not in row:
        raise DataError(f"{where} has no column {column!r}; it has: {', '.join(map(repr, row))}.", hint=show)
    try:
        return hash_key(row[column])
    except TypeError as error:
        raise DataError(f"{where}, column {column!r}: {error}.", hint=show) from None


def _text(file: Path, lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if b"\0" in line:
            raise _binary(file)
        yield line


def _binary(file: Path) -> DataError:
    return DataError(
        f"{file} is not a text file; allowed: plain text and JSONL.",
        hint="give the number of its rows instead: hvdlm partition --num-samples N ...",
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}.", hint=f"ls -l {_quoted(path)}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
