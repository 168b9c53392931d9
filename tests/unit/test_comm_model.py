"""The planner's model: what it takes on which link, and that it holds to what is allowed."""

from __future__ import annotations

import dataclasses

import pytest

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.algorithms.comm_model import CAPS_BYTES, ORDER, Link, Load, choose, sent_bytes, step_overhead
from hvdlm.planning import agree_on, measure_link

GPT = Load(num_elements=6_800_000, thin_elements=140_000, topk_ratio=0.01, workers=2, compute=0.3, backward=0.2)
COSTS = {"none": 0.0, "fp16": 0.008, "bf16": 0.008, "int8": 0.015, "powersgd": 0.02, "topk": 0.05}
MBIT = 1e6 / 8


@pytest.mark.parametrize(
    ("mbit", "wanted"),
    [(80_000, "none"), (1000, "none fp16 bf16 int8"), (100, "powersgd topk"), (10, "powersgd topk")],
)
def test_the_slower_the_link_the_fewer_the_bytes(mbit: float, wanted: str) -> None:
    choice = choose(ORDER, GPT, Link(0.001, mbit * MBIT), COSTS)
    assert choice.codec in wanted.split()
    assert choice.codec in choice.reason and "Mbit/s" in choice.reason


def test_nothing_is_taken_that_is_not_allowed() -> None:
    assert choose(["none"], GPT, Link(0.001, MBIT), COSTS).codec == "none"


def test_the_choice_is_within_its_limit_of_the_best() -> None:
    for mbit in (10, 100, 1000, 10_000):
        link = Link(0.0005, mbit * MBIT)
        choice = choose(ORDER, GPT, link, COSTS)
        best = min(step_overhead(c, GPT, link, COSTS[c], cap) for c in ORDER for cap in CAPS_BYTES)
        assert GPT.compute + choice.overhead <= 1.05 * (GPT.compute + best) + 1e-12


def test_buckets_are_small_where_they_hide_and_large_where_each_costs() -> None:
    assert choose(["none"], GPT, Link(0.0002, 1000 * MBIT), COSTS).cap_bytes <= 4 * 2**20
    assert choose(["none"], GPT, Link(0.05, 1e6 * MBIT), COSTS).cap_bytes == max(CAPS_BYTES)


def test_what_processors_move_hides_only_behind_others() -> None:
    """On one host a bucket that travels takes a processor from computing: there is nothing to gain from several."""
    link = Link(0.0002, 500e6, within_host=True)
    assert choose(["none"], GPT, link, COSTS).cap_bytes == max(CAPS_BYTES)
    many = dataclasses.replace(GPT, processors=16)
    assert choose(["none"], many, link, COSTS).cap_bytes < max(CAPS_BYTES)
    assert step_overhead("none", GPT, link, 0.0, 2**20) >= sent_bytes("none", GPT) / link.bandwidth
    assert step_overhead("none", many, link, 0.0, 2**20) < sent_bytes("none", GPT) / link.bandwidth / 2


def test_what_takes_a_processor_hides_only_behind_others() -> None:
    """MPI that looks for messages all the time takes a processor over any link."""
    calm, spinning = (Link(0.001, 1000 * MBIT, busy=part) for part in (0.1, 1.0))
    cap = 2**21
    added = {link.busy: step_overhead("none", GPT, link, 0.0, cap) for link in (calm, spinning)}
    assert added[0.1] < 0.15 < 0.19 < added[1.0]
    taken = [ORDER.index(choose(ORDER, GPT, link, COSTS).codec) for link in (calm, spinning)]
    assert 0 < taken[0] < taken[1], "what is more work to code is taken only where it saves as much"
    assert choose(["none"], GPT, spinning, COSTS).cap_bytes < max(CAPS_BYTES), "something hides all the same"
    many = dataclasses.replace(GPT, processors=16)
    assert step_overhead("none", many, spinning, 0.0, cap) < 0.13


def test_bytes() -> None:
    assert sent_bytes("none", GPT) == 4 * GPT.num_elements
    assert sent_bytes("int8", GPT) == pytest.approx(GPT.num_elements * (1 + 4 / 256))
    assert sent_bytes("topk", GPT) == pytest.approx(0.08 * GPT.num_elements)


def test_all_workers_measure_the_same() -> None:
    def work(collectives: ThreadCollectives) -> tuple[Link, list[float]]:
        return measure_link(collectives, 3), agree_on(collectives, float(collectives.rank), 1.0)

    found = FakeJob(3).run(work)
    assert len({link for link, _ in found}) == 1
    assert found[0][0].latency > 0 and found[0][0].bandwidth > 1 and found[0][0].busy > 0
    assert all(agreed == [2.0, 1.0] for _, agreed in found)
