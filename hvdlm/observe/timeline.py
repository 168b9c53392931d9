"""One trace of all ranks, for Perfetto: what each did when, and Horovod's own timeline, on one clock.

Horovod writes its timeline on the coordinator only (``HOROVOD_TIMELINE``, ``--timeline-filename``). Where it is asked
for, every rank notes its steps, reading and waiting beside it; at the end rank 0 puts all into that file.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdlm.algorithms.clocks import clock_offsets
from hvdlm.contracts import Collectives
from hvdlm.world import World

__all__ = ["MAX_SPANS", "Timeline", "horovod_events", "merged"]

MAX_SPANS = 200_000
"""A rank notes so many spans, about 20 MB, and then no more."""
_ROUNDS = 20
_TRACKS = ("step", "data", "wait")
_HOROVOD = 1_000_000
"""The process of Horovod's own events in the trace; those of ranks are numbered by rank."""

Span = tuple[str, str, float, float]


class Timeline:
    """What one rank does when.

    Args:
        path: Where Horovod writes its timeline on rank 0, and the trace goes.
        world: Where this process stands.
        collectives: To compare clocks, and to gather.
        clock: Seconds of a clock that never goes back.
    """

    def __init__(
        self, path: str, world: World, collectives: Collectives, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._world, self._collectives, self._clock = Path(path), world, collectives, clock
        self._spans: list[Span] = []
        self._missed = 0
        self._last = ""
        self._since = clock()
        self._early = self._clocks()
        collectives.on_wait = self._waited

    def _note(self, track: str, name: str, start: float, end: float) -> None:
        if len(self._spans) < MAX_SPANS:
            self._spans.append((track, name, start, end))
        else:
            self._missed += 1

    def _waited(self, name: str, start: float, end: float) -> None:
        self._note("wait", name, start, end)

    def data(self, seconds: float) -> None:
        """A batch has come, after so many seconds."""
        now = self._clock()
        self._note("data", "read a batch", now - seconds, now)
        self._since = now

    def reached(self, what: str) -> None:
        """The part of a step of this name has ended: what was done since the last one."""
        now = self._clock()
        self._note("step", what, self._since, now)
        self._since = now

    def _clocks(self) -> list[tuple[float, float]]:
        times = []
        for _ in range(_ROUNDS):
            start = self._clock()
            self._collectives.allgather(b"")
            times.append((start, self._clock()))
        return times

    def close(self) -> None:
        """Write the trace on rank 0. Every rank calls it."""
        self._collectives.on_wait = None
        late = self._clocks()
        own = {
            "host": socket.gethostname(),
            "spans": self._spans,
            "missed": self._missed,
            "clocks": [self._early, late],
        }
        payloads = self._collectives.allgather(zlib.compress(json.dumps(own).encode(), 1))
        self._collectives.end_timeline()
        if not self._world.is_main:
            return
        ranks = [json.loads(zlib.decompress(payload)) for payload in payloads]
        # Horovod's file says when it began by the clock of the day, and spans use one that never goes back.
        trace = merged(ranks, *horovod_events(self._path), time.time() - self._clock())
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(trace), encoding="utf-8")
        os.replace(partial, self._path)


def horovod_events(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Horovod's events, and when it began, in microseconds of the clock of the day; nothing if there is no such file.

    A trace that an earlier session of this process has merged gives none.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0.0
    try:
        events = json.loads(text)
    except ValueError:
        # Not written to its end: up to the last event that is whole.
        try:
            events = json.loads(text[: text.rindex("}\n") + 1].rstrip(",") + "]")
        except ValueError:
            return [], 0.0
    if not isinstance(events, list):
        return [], 0.0
    began = [e["args"]["start_time_since_epoch_in_micros"] for e in events if "start_time" in str(e.get("args"))]
    return events, float(began[0]) if began else 0.0


def merged(
    ranks: Sequence[Mapping[str, Any]], horovod: Sequence[Mapping[str, Any]], began: float, epoch: float
) -> dict[str, Any]:
    """The trace, in the JSON format that chrome://tracing made and Perfetto reads.

    Args:
        ranks: What each rank noted: ``host``, ``spans``, ``missed``, and ``clocks`` (early and late).
        horovod: Horovod's events.
        began: What their times count from, in microseconds of the clock of the day.
        epoch: What is added to rank 0's spans to get seconds of the clock of the day.
    """
    early, late = (clock_offsets([rank["clocks"][i] for rank in ranks]) for i in (0, 1))
    first, last = (ranks[0]["clocks"][i][0][0] for i in (0, 1))
    events: list[dict[str, Any]] = []
    for number, rank in enumerate(ranks):
        events += _names(number, f"rank {number} ({rank['host']})", number, enumerate(_TRACKS))
        slope = (late[number][0] - early[number][0]) / (last - first) if last > first else 0.0
        for track, name, start, end in rank["spans"]:
            # Clocks drift apart: between the two comparisons, in a straight line.
            offset = early[number][0] + slope * (start + early[number][0] - first)
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "pid": number,
                    "tid": _TRACKS.index(track),
                    "ts": round((start + offset - first) * 1e6, 1),
                    "dur": round(max(0.0, end - start) * 1e6, 1),
                }
            )
    events += _of_horovod(horovod, began - (first + epoch) * 1e6)
    return {
        "displayTimeUnit": "ms",
        "traceEvents": events,
        "otherData": {
            "made_by": "hvdlm",
            "clock_error_us": [round(1e6 * max(a[1], b[1]), 1) for a, b in zip(early, late, strict=True)],
            "spans_left_out": sum(rank["missed"] for rank in ranks),
        },
    }


def _of_horovod(events: Sequence[Mapping[str, Any]], shift: float) -> list[dict[str, Any]]:
    """Horovod shows each tensor as a process; here all are threads of one."""
    tensors = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and "name" in e.get("args", {})}
    if not tensors:
        return []
    found = _names(_HOROVOD, "Horovod, seen from rank 0", _HOROVOD, sorted(tensors.items()))
    for event in events:
        if event.get("ph") == "M":
            continue
        moved = {**event, "pid": _HOROVOD, "tid": event.get("pid", 0), "ts": round(event["ts"] + shift, 1)}
        if event["ph"] == "X":
            moved["name"] = f"rank {event['name']} is ready"
        found.append(moved)
    return found


def _names(pid: int, name: str, order: int, threads: Any) -> list[dict[str, Any]]:
    named = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}]
    named += [{"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": order}}]
    for tid, thread in threads:
        named.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": thread}})
    return named
