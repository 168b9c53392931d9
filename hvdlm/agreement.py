"""Finds out whether all ranks hold the same facts, and names the first that differs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from hvdlm.contracts import Collectives
from hvdlm.errors import MismatchError

__all__ = ["agree"]


def agree(collectives: Collectives, lines: Sequence[str]) -> None:
    """Compare lines of text between ranks; the whole text travels only where digests differ.

    Raises:
        MismatchError: On every rank alike: the first line that differs, and which ranks hold what.
    """
    text = "\n".join(lines).encode()
    digests = collectives.allgather(hashlib.blake2b(text, digest_size=16).digest())
    if len(set(digests)) == 1:
        return
    texts = [payload.decode().split("\n") for payload in collectives.allgather(text)]
    for column in itertools.zip_longest(*texts, fillvalue="(nothing)"):
        if len(set(column)) > 1:
            by_line: dict[str, list[int]] = {}
            for rank, line in enumerate(column):
                by_line.setdefault(line, []).append(rank)
            told = "; ".join(f"rank {', '.join(map(str, ranks))}: {line}" for line, ranks in by_line.items())
            raise MismatchError(
                f"ranks differ in what has to be equal. First difference: {told}.",
                hint="build the model from the same configuration on every rank, and pass the same options to each",
            )
    raise AssertionError("digests differ, texts do not")
