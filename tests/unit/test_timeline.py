"""One trace of all ranks: clocks are compared, spans and Horovod's own events come together on one clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdlm.adapters.single import SingleCollectives
from hvdlm.algorithms.clocks import clock_offsets
from hvdlm.observe.timeline import MAX_SPANS, Timeline, horovod_events, merged
from hvdlm.world import World

RAW = """[
{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros":5000000000}},
{"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}},
{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "hvdlm.grad.0"}},
{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},
{"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 2000000, "pid": 1},
{"ph": "X", "name": "1", "ts": 2000100, "pid": 1, "dur": 0},
{"ph": "E", "ts": 2000200, "pid": 1}]"""


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6),
    st.lists(st.lists(st.floats(0, 0.1), min_size=6, max_size=6), min_size=1, max_size=8),
)
def test_the_true_offset_lies_within_the_bounds(ahead: list[float], late: list[list[float]]) -> None:
    times: list[list[tuple[float, float]]] = [[] for _ in ahead]
    for number, delays in enumerate(late):
        entered = [10.0 * number + d for d in delays[: len(ahead)]]
        for rank, start in enumerate(entered):
            left = max(entered) + 0.001 * (1 + rank)
            times[rank].append((start + ahead[rank], left + ahead[rank]))
    for rank, (offset, error) in enumerate(clock_offsets(times)):
        assert abs(offset - (ahead[0] - ahead[rank])) <= error + 1e-6


def test_more_collectives_narrow_the_bounds() -> None:
    loose = [[(0.0, 1.0)], [(0.0, 1.0)]]
    tight = [[*loose[0], (2.0, 2.01)], [*loose[1], (2.0, 2.01)]]
    assert clock_offsets(tight)[1][1] < clock_offsets(loose)[1][1]
    with pytest.raises(ValueError):
        clock_offsets([[(0.0, 1.0)], []])


def rank(ahead: float, drift: float, spans: list[tuple[str, str, float, float]]) -> dict[str, object]:
    """What a rank notes whose clock is ``ahead``, and gains ``drift`` seconds in each."""

    def clock(t: float) -> float:
        return t * (1 + drift) + ahead

    return {
        "host": "h",
        "missed": 0,
        "clocks": [[(clock(t), clock(t + 1e-4))] for t in (0.0, 1000.0)],
        "spans": [(track, name, clock(a), clock(b)) for track, name, a, b in spans],
    }


def test_ranks_are_on_one_clock(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(RAW)
    spans = [("wait", "hvdlm.grad.0", 500.0, 500.25), ("data", "read a batch", 700.0, 700.1)]
    # Horovod began 4999 s after the clock of the day's beginning of time, the ranks' common clock 4990 s after it.
    trace = merged([rank(0, 0, spans), rank(12345, 1e-4, spans)], *horovod_events(path), 4990.0)
    json.dumps(trace)
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "B", "E"}
    for event in events:
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    for name in ("hvdlm.grad.0", "read a batch"):
        ours = {e["pid"]: e["ts"] for e in events if e.get("name") == name and e["ph"] == "X"}
        assert set(ours) == {0, 1} and abs(ours[0] - ours[1]) < 200  # of microseconds; the clocks drift by 50,000
    assert next(e["ts"] for e in events if e.get("ph") == "B") == pytest.approx((5002 - 4990) * 1e6)
    named = {(e["name"], e["args"].get("name")) for e in events if e["ph"] == "M"}
    assert ("process_name", "rank 1 (h)") in named and ("thread_name", "hvdlm.grad.0") in named
    assert any(e["name"] == "rank 1 is ready" for e in events if e["ph"] == "X")
    assert max(trace["otherData"]["clock_error_us"]) <= 200


@pytest.mark.parametrize("cut", [0, 5, 60, 150, 340, len(RAW) - 30])
def test_a_file_that_ends_early(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.json"
    path.write_text(RAW[:cut])
    events, began = horovod_events(path)
    assert len(events) < 8 and began in (0.0, 5e9)
    assert horovod_events(tmp_path / "nowhere.json") == ([], 0.0)


def test_a_session_of_one_writes_its_trace(tmp_path: Path) -> None:
    path, now = tmp_path / "t.json", [0.0]
    timeline = Timeline(str(path), World.single(), SingleCollectives(), lambda: now[0])
    for part in ("forward", "backward", "optimizer step"):
        now[0] += 0.5
        timeline.reached(part)
    now[0] += 0.25
    timeline.data(0.25)
    timeline._spans += [("step", "x", 0.0, 0.0)] * MAX_SPANS
    timeline.reached("left out")
    timeline.close()
    trace = json.loads(path.read_text())
    spans = [(e["name"], e["ts"], e["dur"]) for e in trace["traceEvents"] if e["ph"] == "X"][:4]
    assert spans == [
        ("forward", 0, 5e5),
        ("backward", 5e5, 5e5),
        ("optimizer step", 1e6, 5e5),
        ("read a batch", 1.5e6, 2.5e5),
    ]
    assert trace["otherData"]["spans_left_out"] == 1
    assert horovod_events(path) == ([], 0.0)  # a trace that is merged already is not merged again
