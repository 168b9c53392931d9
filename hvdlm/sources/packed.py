"""Blocks of a fixed number of tokens, cut from the rows of a data set laid end to end."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt

from hvdlm.environment import cache_dir as default_cache_dir
from hvdlm.errors import ConfigError, DataError
from hvdlm.sources.index import write_atomically

__all__ = ["PackedBlocks", "Rows"]

_log = logging.getLogger("hvdlm")

_VERSION = 1
_TOKEN = np.dtype("<u4")
_PROBES = 16
"""Rows that are tokenized to see whether the cache was made by the same tokenizer."""
_FLUSH = 1 << 20
"""Tokens written at once."""


class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class PackedBlocks:
    """A map-style data set of equally long blocks of tokens; what is left at the end is dropped.

    All rows are tokenized once, into a file of 4 bytes a token in the cache, which is mapped and not loaded. It is
    found again if the rows are the same and the tokenizer gives the same for some of them.

    >>> blocks = PackedBlocks(open_files("data/*.txt"), tokenizer.encode, 1024, separator=50256)  # doctest: +SKIP
    >>> blocks[0].shape  # doctest: +SKIP
    (1024,)

    Args:
        dataset: The rows; :func:`hvdlm.sources.open_files` makes them.
        tokenize: Row -> token ids, each in [0, 2**32).
        block_size: Tokens per block.
        separator: A token put behind each row; none if None.
        cache_dir: Where tokens are kept; hvdlm's cache if None.
        version: Anything that tells apart what this cannot see: rows or tokenizers that differ in few places.

    Raises:
        ConfigError: ``block_size`` or ``separator`` is out of range.
        DataError: A row cannot be read or tokenized, or there are fewer tokens than a block has.
    """

    def __init__(
        self,
        dataset: Rows,
        tokenize: Callable[[Any], Sequence[int] | npt.NDArray[Any]],
        block_size: int,
        *,
        separator: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        version: str = "",
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}; allowed: 1 or more.")
        if separator is not None and not 0 <= separator < 2**32:
            raise ConfigError(f"separator is {separator}; allowed: token ids in [0, 2**32).")
        self.block_size = block_size
        rows = _Tokenized(dataset, tokenize, separator)
        cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self._key = rows.key(version)
        self._path = cache / "tokens" / f"{self._key}.u4"
        if not self._path.exists():
            _log.info("tokenizing %d rows into %s", len(dataset), self._path)
            write_atomically(self._path, rows.pieces())
        self.num_tokens = self._path.stat().st_size // _TOKEN.itemsize
        if self.num_tokens < block_size:
            raise DataError(
                f"the data set has {self.num_tokens} tokens, fewer than the {block_size} of one block.",
                hint="use a smaller block_size, or more data",
            )
        self._tokens: npt.NDArray[np.uint32] | None = None

    def __repr__(self) -> str:
        return f"PackedBlocks(blocks={len(self)}, block_size={self.block_size})"

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def __getitem__(self, block: SupportsIndex) -> npt.NDArray[np.int64]:
        """The tokens of a block; int64, shape (block_size,).

        Raises:
            IndexError: There is no such block.
        """
        number = operator.index(block)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"block {operator.index(block)} of {len(self)}")
        if self._tokens is None:
            self._tokens = np.memmap(self._path, dtype=_TOKEN, mode="r", shape=(self.num_tokens,))
        return self._tokens[number * self.block_size : (number + 1) * self.block_size].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None}

    @property
    def fingerprint(self) -> str:
        """Stands for what is in the data set."""
        return f"{self._key}-{self.block_size}"


class _Tokenized:
    """The tokens of the rows of a data set."""

    def __init__(self, dataset: Rows, tokenize: Callable[[Any], Any], separator: int | None) -> None:
        self._dataset, self._tokenize, self._separator = dataset, tokenize, separator

    def key(self, version: str) -> str:
        """Under which the tokens are kept."""
        count = len(self._dataset)
        probes = sorted({number * count // _PROBES for number in range(_PROBES)}) if count else []
        digest = hashlib.sha256()
        for row in probes:
            tokens = self.row(row)
            digest.update(b"%d:" % len(tokens) + tokens.tobytes())
        rows = getattr(self._dataset, "fingerprint", type(self._dataset).__qualname__)
        parts = [_VERSION, str(rows), count, self._separator, version, digest.hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def pieces(self) -> Iterator[bytes]:
        """All tokens, as they are stored."""
        waiting: list[bytes] = []
        size = 0
        for row in range(len(self._dataset)):
            waiting.append(self.row(row).tobytes())
            size += len(waiting[-1])
            if size >= _FLUSH * _TOKEN.itemsize:
                yield b"".join(waiting)
                waiting, size = [], 0
        yield b"".join(waiting)

    def row(self, row: int) -> npt.NDArray[np.uint32]:
        """The tokens of one row, with its separator."""
        value = self._dataset[row]
        try:
            tokens = np.asarray(self._tokenize(value))
        except Exception as error:
            raise DataError(f"{self._where(row)}: tokenize raised {type(error).__name__}: {error}.") from error
        if tokens.ndim == 1 and not len(tokens):
            tokens = tokens.astype(np.int64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{self._where(row)}: tokenize gave an array of {tokens.dtype} and shape {tokens.shape}, "
                "not a sequence of token ids.",
                hint="with a tokenizer of Transformers: tokenize=lambda text: tokenizer(text)['input_ids']",
            )
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= 2**32):
            raise DataError(f"{self._where(row)}: token ids are {tokens.min()} to {tokens.max()}, not in [0, 2**32).")
        if self._separator is not None:
            tokens = np.append(tokens, np.uint32(self._separator))
        return tokens.astype(_TOKEN)

    def _where(self, row: int) -> str:
        where = getattr(self._dataset, "where", None)
        return str(where(row)) if callable(where) else f"row {row}"
