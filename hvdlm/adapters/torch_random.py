"""Random numbers of the data apart from those of the training script."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStreams"]


class RandomStreams(contextlib.AbstractContextManager[None]):
    """Inside, torch's, NumPy's and Python's random numbers are those of the data, equal on all ranks."""

    def __init__(self, seed: int) -> None:
        self._data: tuple[Any, Any, Any] = (
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed & 0xFFFFFFFF).get_state(),
            random.Random(seed).getstate(),
        )
        self._script: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> None:
        self._script = _states()
        _set(self._data)

    def __exit__(self, *_: object) -> None:
        self._data = _states()
        assert self._script is not None
        _set(self._script)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
