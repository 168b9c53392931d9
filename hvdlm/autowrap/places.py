"""Where in the person's script something happens."""

from __future__ import annotations

import os
import sys
import sysconfig

__all__ = ["is_own", "place"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = tuple(
    {os.path.join(sysconfig.get_paths()[name], "") for name in ("purelib", "platlib", "stdlib", "platstdlib")}
)
_MAX_FRAMES = 60


def is_own(filename: str) -> bool:
    """Whether a file is the person's: neither of a library nor of hvdlm, nor made up by Python."""
    return not filename.startswith(("<", _PACKAGE, *_LIBRARIES))


def place(skip: int = 1) -> str:
    """``file:line`` of the innermost call in the person's own code, by the file's name; ``?`` if there is none.

    Args:
        skip: Frames that are not looked at, this function's caller included.
    """
    frame = sys._getframe(skip)
    for _ in range(_MAX_FRAMES):
        if is_own(frame.f_code.co_filename):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "?"
