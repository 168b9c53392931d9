"""From where each rank stands to a sentence: who keeps the others waiting, and where it is."""

from __future__ import annotations

import dataclasses
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Standing", "Verdict", "stack_of_main_thread", "verdict"]

_MAX_FRAMES = 8
_SHOWN_FRAMES = 6


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one rank is."""

    rank: int
    operation: str | None
    """The collective it waits in; None if it is somewhere else."""
    seconds: float
    """How long it has waited there."""
    steps: int
    """How often gradients were made global on it so far."""
    stack: list[str]
    """Its main thread, innermost call last."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What keeps the job from going on."""

    kind: Literal["missing", "mismatch", "network"]
    ranks: tuple[int, ...]
    """The ranks that are missing; all, if they wait in collectives that do not match."""
    operations: tuple[str, ...]
    message: str


def stack_of_main_thread() -> list[str]:
    """The calls of the main thread, innermost last: those of the script, and the innermost one.

    Example:
        >>> stack_of_main_thread()[-1].startswith("File ")
        True
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return []
    calls = traceback.extract_stack(frame)
    libraries = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], os.path.dirname(__file__))
    own = [call for call in calls if not call.filename.startswith((*libraries, "<frozen", _PACKAGE))]
    shown = own[-_MAX_FRAMES:]
    if calls and (not shown or calls[-1] is not shown[-1]):
        shown = [*shown, calls[-1]]
    return [f"File {c.filename}, line {c.lineno}, in {c.name}" + (f": {c.line}" if c.line else "") for c in shown]


_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def verdict(before: Mapping[int, Standing], now: Mapping[int, Standing], size: int) -> Verdict | None:
    """Who keeps the job from going on; None if it went on between two looks.

    Args:
        before: Where the ranks that answered stood a moment ago.
        now: Where they stand.
        size: Number of workers.
    """
    waiting = {r: s for r, s in now.items() if s.operation is not None}
    if not waiting or any(r not in before or _moved(before[r], s) for r, s in waiting.items()):
        return None
    silent = [r for r in range(size) if r not in now]
    elsewhere = [r for r in now if r not in waiting]
    behind = []
    operations = sorted({str(s.operation) for s in waiting.values()})
    if not silent and not elsewhere:
        most = max(s.steps for s in waiting.values())
        behind = [r for r, s in waiting.items() if s.steps < most]
        kind: Literal["missing", "mismatch", "network"] = "network" if len(operations) == 1 else "mismatch"
        if kind == "network" and behind:
            kind = "missing"
    else:
        kind = "missing"
    ranks = tuple(sorted(silent + elsewhere or behind or list(waiting)))
    parts = [_headline(kind, ranks, waiting, operations)]
    for rank in ranks:
        parts.append(_place(rank, now.get(rank), kind))
    return Verdict(kind=kind, ranks=ranks, operations=tuple(operations), message="\n".join(parts))


def _moved(before: Standing, now: Standing) -> bool:
    return before.operation != now.operation or before.steps != now.steps or now.seconds < before.seconds


def _headline(kind: str, ranks: tuple[int, ...], waiting: Mapping[int, Standing], operations: list[str]) -> str:
    longest = max(s.seconds for s in waiting.values())
    if kind == "mismatch":
        return (
            f"the workers wait in collectives that do not match, and will wait for ever ({longest:.0f} s so far). "
            "HINT: a branch of the script that only some ranks take holds a backward, an hvdlm call or a loader"
        )
    if kind == "network":
        return (
            f"all workers are in {operations[0]}, which has not ended for {longest:.0f} s: the network between them "
            "moves nothing, or very little. HINT: hvdlm doctor"
        )
    others = sorted(r for r in waiting if r not in ranks)
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    places = ", ".join(sorted({str(waiting[r].operation) for r in others})) or operations[0]
    return (
        f"{who} {'are' if len(ranks) > 1 else 'is'} missing: rank{'s' if len(others) > 1 else ''} "
        f"{', '.join(map(str, others))} wait{'' if len(others) > 1 else 's'} in {places} for {longest:.0f} s"
    )


def _place(rank: int, standing: Standing | None, kind: str) -> str:
    if standing is None:
        return f"  rank {rank} does not answer: its process has ended, is stopped, or its machine cannot be reached"
    where = f"in {standing.operation}" if standing.operation is not None else "not in a collective"
    lines = "".join(f"\n      {line}" for line in standing.stack[-_SHOWN_FRAMES:])
    return f"  rank {rank}, {where}, after {standing.steps} steps:{lines}"
