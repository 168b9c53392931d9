"""What codecs have not sent yet, in the state of a job whose workers change: only its sum over workers counts.

A commit that every worker makes for itself holds what is its own. A worker that gets the commit of another does not get
this with it, or it would be sent twice. Where workers are about to leave, or a checkpoint is written, it is pooled, and
the commit holds the sum: each worker of the job that goes on takes an equal part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.state.snapshot import OWN

__all__ = ["parted", "put_together"]

_POOLED = "pooled"


def parted(state: dict[str, Any], size: int, pooled: bool) -> dict[str, Any]:
    """The state of a synchroniser of either framework, as it is kept by name.

    Args:
        state: Its residuals are copies.
        size: Number of workers.
        pooled: Whether each of them holds an equal part of the residuals.
    """
    residuals = [part.pop("residuals", {}) for part in _parts(state)]
    if not pooled:
        return {"sync": state, OWN: residuals}
    return {"sync": state, _POOLED: _times(residuals, float(size))}


def put_together(kept: dict[str, Any], size: int) -> dict[str, Any]:
    """The state for one of ``size`` workers; what it is made of is taken out of ``kept``."""
    state: dict[str, Any] = kept.pop("sync", {})
    own, pooled = kept.pop(OWN, []), kept.pop(_POOLED, [])
    for part, residuals in zip(_parts(state), own or _times(pooled, 1.0 / size), strict=False):
        part["residuals"] = residuals
    return state


def _parts(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (*state.get("reducers", ()), *state.get("locals", ())) if part is not None]


def _times(residuals: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    return [{name: value * factor for name, value in part.items()} for part in residuals]
