"""How patterns of structured sparsity are written. Apart from their arithmetic: supervisors and flags need no NumPy."""

from __future__ import annotations

import re

__all__ = ["parse_pattern"]


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(N, M) of ``2:4``; None for the empty text, which is unstructured.

    Raises:
        ValueError: It is of another form, or not 0 < N < M.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"{text!r} is no pattern of the form N:M with 0 < N < M, such as 2:4")
    return int(match[1]), int(match[2])
