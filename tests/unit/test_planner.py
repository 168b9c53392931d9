"""The planner of the PyTorch adapter: what it decides, when it looks again, what it tells."""

from __future__ import annotations

import logging
import types
from typing import Any

import numpy as np
import pytest
import torch

from hvdlm.adapters import torch_planner
from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_planner import Planner
from hvdlm.algorithms.comm_model import ORDER, Link
from hvdlm.options import Options

FAST, SLOW = Link(0.0001, 5e9), Link(0.001, 1e6)


class Wire:
    rank, size, sums_halves = 0, 2, False

    def __init__(self) -> None:
        self.waited = 0.0

    def allreduce(self, array: Any, op: str = "sum") -> Any:
        return np.array(array)


class Run:
    """A planner that is told of steps; the clock and the link are made up."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, links: list[Link], within_host: bool = False, **options: Any
    ) -> None:
        self.clock, self.wire, self.watch = 0.0, Wire(), BackwardWatch()
        self.made: list[tuple[Any, float]] = []
        self.links = links
        monkeypatch.setattr(torch_planner, "time", types.SimpleNamespace(perf_counter=lambda: self.clock))
        monkeypatch.setattr(torch_planner, "measure_link", lambda *_: self.links.pop(0))
        self.tried: list[str] = []
        self.events: list[dict[str, Any]] = []
        monkeypatch.setattr(torch_planner, "codec_costs", self._costs)
        self.reducer = types.SimpleNamespace(reductions=0, rebuild=lambda make, cap: self.made.append((make, cap)))
        self.parted = 0
        parameters = [torch.nn.Parameter(torch.zeros(2048, 1024)) for _ in range(4)]
        self.planner = Planner(
            self.reducer, self.wire, Options(**options), parameters, self.watch, self._event, self._part, within_host
        )  # type: ignore[arg-type]

    def _part(self) -> None:
        self.parted += 1

    def _costs(self, _: Any, codecs: list[str], __: Any) -> dict[str, float]:
        self.tried += codecs
        return dict.fromkeys(codecs, 1e-9)

    def _event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def steps(self, count: int, wait: float, reduces: bool = True) -> None:
        for _ in range(count):
            self.clock += 0.1
            for begin in self.watch.before:
                begin(None)
            self.clock += 0.1 + wait
            self.wire.waited += wait
            self.reducer.reductions += reduces
            for end in self.watch.after:
                end()

    @property
    def codec(self) -> str:
        assert self.planner.choice is not None
        return self.planner.choice.codec


def test_a_slow_link_gets_few_bytes_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hvdlm"):
        run = Run(monkeypatch, [SLOW], compression="auto")
    assert run.codec in ("powersgd", "topk")
    assert len(run.made) == 1
    (line,) = caplog.messages
    assert line.startswith(f"compression={run.codec}, buckets of ") and "8 Mbit/s" in line
    assert all(name in line for name in ORDER), "what the others would have cost"
    (event,) = run.events
    assert event["event"] == "plan" and event["reason"] == line and event["codec"] == run.codec


def test_a_fast_link_gets_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [FAST], compression="auto")
    run.steps(4, 0.001)
    assert run.codec == "none"


def test_on_one_host_nothing_is_split_that_would_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run = Run(monkeypatch, [Link(0.0002, 500e6, within_host=True)])
    run.steps(4, 0.02)
    assert run.made[-1][1] == 32 * 2**20
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    run = Run(monkeypatch, [Link(0.0002, 500e6, within_host=True)])
    run.steps(4, 0.02)
    assert run.made[-1][1] < 32 * 2**20


def test_on_one_host_nothing_is_coded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert Run(monkeypatch, [SLOW], compression="auto").codec != "none"
    run = Run(monkeypatch, [SLOW], within_host=True, compression="auto")
    assert run.codec == "none" and not run.tried[len(ORDER) :]
    assert caplog.messages[-1].startswith("on one host codecs take longer than they save: compression=none")


def test_what_else_runs_between_steps_is_no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for pause in (0.0, 0.04):
        run = Run(monkeypatch, [SLOW], compression="auto")
        for _ in range(4):
            run.clock += 0.04
            run.planner.pause(pause)
            run.steps(1, 0.0)
        told[pause] = run.events[-1]["reason"]
    assert "240 ms of computing" in told[0.0]
    assert "200 ms of computing" in told[0.04]


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_halves_are_not_made_where_processors_move_every_byte(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    for link in (SLOW, FAST):
        assert Run(monkeypatch, [link], compression=codec).codec == codec, "between hosts it is as asked"
    assert caplog.messages == []
    run = Run(monkeypatch, [FAST], within_host=True, compression=codec)
    run.steps(4, 0.02)
    assert run.codec == "none" and run.events[-1]["reason"] == caplog.messages[-1]
    assert caplog.messages[0].startswith(
        f"{codec} takes longer to code than it saves over Gloo on one host: compression=none"
    )
    assert Run(monkeypatch, [FAST], within_host=True, compression="int8").codec == "int8"
    monkeypatch.setattr(Wire, "sums_halves", True)
    assert Run(monkeypatch, [FAST], within_host=True, compression=codec).codec == codec, "MPI adds halves fast"


def test_exact_leaves_nothing_to_choose_but_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(monkeypatch, [SLOW], compression="auto", exact=True).codec == "none"
    run = Run(monkeypatch, [SLOW], compression="int8", bucket_cap_mb=3.0)
    assert run.codec == "int8" and run.made[0][1] == 3 * 2**20
    assert run.tried == [], "with one codec there is nothing to try"


def test_workers_part_only_where_steps_would_take_much_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(monkeypatch, [SLOW], sync="auto", sync_every=20)
    assert not run.parted, "nothing is timed yet"
    with caplog.at_level(logging.WARNING, "hvdlm"):
        run.steps(4, 0.02)
    assert run.parted == 1
    assert caplog.messages[-1].startswith("sync=local, every 20 steps: none at every step would add ")
    assert run.events[-1]["sync"] == "local" and run.events[-1]["reason"] == caplog.messages[-1]
    for link, options in ((FAST, {}), (SLOW, {"exact": True})):
        run = Run(monkeypatch, [link], sync="auto", **options)
        run.steps(4, 0.02)
        assert not run.parted


def test_it_looks_again_when_waiting_changes_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [FAST, SLOW], compression="auto")
    run.steps(300, 0.02)
    assert len(run.links) == 1, "nothing changed"
    run.steps(100, 0.5)
    assert run.links == [] and run.codec in ("powersgd", "topk")
    assert [event["codec"] for event in run.events][-1] == run.codec, "the new plan is told too"


def test_backwards_of_others_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that sends nothing may happen on one worker only: agreeing there would wait for ever."""
    run = Run(monkeypatch, [FAST], compression="auto")
    agreed: list[Any] = []
    monkeypatch.setattr(run.wire, "allreduce", lambda array, op="sum": agreed.append(op) or array)
    run.steps(500, 0.02, reduces=False)
    assert agreed == []
    run.steps(4, 0.02)
    assert agreed
