"""Lines that TensorFlow writes on every start and that tell nobody anything: they go to the logs only."""

from __future__ import annotations

import re

__all__ = ["without_noise"]

_MARK = b"absl::InitializeLog"
_NOISE = re.compile(
    rb"^(?:WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|I0000 [^\n]* oneDNN custom operations are on\.[^\n]*)\r?\n",
    re.MULTILINE,
)


def without_noise(data: bytes) -> bytes:
    r"""A piece of stderr without them.

    TensorFlow writes them before it has read ``TF_CPP_MIN_LOG_LEVEL``, which silences the rest.

    >>> without_noise(b"I0000 00:00:1795642.9 7 port.cc:153] oneDNN custom operations are on. You may\\nloss 3.2\\n")
    b'loss 3.2\\n'
    """
    return _NOISE.sub(b"", data) if _MARK in data or b"oneDNN" in data else data
