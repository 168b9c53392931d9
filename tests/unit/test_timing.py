"""Stragglers explained from times of simulated jobs, and the event file as TensorBoard reads it."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.account import Account
from hvdlm.adapters.single import SingleCollectives
from hvdlm.algorithms.stragglers import Times, explain, link_seconds
from hvdlm.observe.eventfile import EventFile
from hvdlm.observe.events import Events
from hvdlm.observe.timing import Timing
from hvdlm.world import World


def job(
    data: list[float], compute: list[float], samples: list[float], communication: float, noise: float = 0.0
) -> Times:
    """What the ranks of a synchronous job would measure."""
    rng = random.Random(f"{data}{compute}{communication}")
    data = [d * (1 + noise * rng.uniform(-1, 1)) for d in data]
    compute = [c * (1 + noise * rng.uniform(-1, 1)) for c in compute]
    last = max(d + c for d, c in zip(data, compute, strict=True))
    return Times(data, compute, [last - d - c + communication for d, c in zip(data, compute, strict=True)], samples)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
@pytest.mark.parametrize("cause", ["data", "compute"])
@pytest.mark.parametrize("factor", [1.3, 2.0, 4.0])
def test_the_right_rank_and_cause(size: int, cause: str, factor: float) -> None:
    for straggler in {0, size // 2, size - 1}:
        data, compute = [0.01] * size, [0.1] * size
        if cause == "data":
            data[straggler] += 0.1 * (factor - 1)
        else:
            compute[straggler] *= factor
        found = explain(job(data, compute, [8.0] * size, 0.005, noise=0.03))
        assert found is not None and (found.rank, found.cause) == (straggler, cause)


def test_predicted_gains_are_those_of_the_balanced_job() -> None:
    times = job([0.0] * 3, [0.1, 0.1, 0.3], [8.0] * 3, 0.02)
    found = explain(times)
    assert found is not None and found.gain_balanced is not None and found.gain_without is not None
    # 24 samples at 80 + 80 + 26.7 a second, and at 160 without the third.
    assert found.gain_balanced == pytest.approx(0.32 / (24 / (80 + 80 + 8 / 0.3) + 0.02) - 1)
    assert found.gain_without == pytest.approx(0.32 / (24 / 160 + 0.02) - 1)
    assert found.gain_balanced > found.gain_without
    assert found.sentence().startswith("rank 2 computes slowly and costs")


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("jitter", [0.0, 0.03, 0.1])
def test_balanced_ranks_wait_for_whichever_is_last(size: int, jitter: float) -> None:
    """What is said to be gained, against jobs that are played step by step, with times that differ."""
    rng, speeds, samples, steps = random.Random(size), [10.0] * (size - 1) + [5.0], [1.0] * size, 4000

    def seconds(rank: int, share: float) -> float:
        # Of what comes between, there is more in longer steps.
        return share / speeds[rank] + rng.gauss(0, jitter * share / speeds[rank]) * (0.1 * speeds[rank] / share) ** 0.5

    def job_takes(shares: list[float]) -> float:
        return sum(max(seconds(r, share) for r, share in enumerate(shares)) for _ in range(steps)) / steps

    balanced = [size * speed / sum(speeds) for speed in speeds]
    gained = job_takes(samples) / job_takes(balanced) - 1
    own = [1 / speed for speed in speeds]
    deviations = [jitter * t * (0.1 / t) ** 0.5 for t in own]
    found = explain(Times([0.0] * size, own, [max(own) - t for t in own], samples, deviations))
    assert found is not None and found.gain_balanced == pytest.approx(gained, rel=0.06)


def test_a_slow_link_is_told_from_slow_communication() -> None:
    times = job([0.0] * 3, [0.1] * 3, [8.0] * 3, 0.2)
    alike, slow = explain(times, [0.01, 0.011, 0.01]), explain(times, [0.01, 0.09, 0.01])
    assert alike is not None and (alike.rank, alike.cause) == (None, "communication")
    assert slow is not None and (slow.rank, slow.cause) == (1, "communication")


@pytest.mark.parametrize("size", [3, 4, 5, 8, 16, 31])
@pytest.mark.parametrize("limited", ["sends", "gets", "both"])
@pytest.mark.parametrize("tree", ["low", "high"])
def test_a_slow_link_is_found_whatever_it_limits(size: int, limited: str, tree: str) -> None:
    """Broadcasts go over a binomial tree, where a slow rank also slows what it hands on."""

    def parent(place: int) -> int:
        return place & (place - 1) if tree == "low" else place - (1 << (place.bit_length() - 1))

    def seconds(root: int, rank: int, slow: int) -> float:
        place, total = (rank - root) % size, 0.0
        while place:
            source, place = (root + parent(place)) % size, parent(place)
            bad = (source == slow and limited != "gets") or (rank == slow and limited != "sends")
            total, rank = total + (0.2 if bad else 0.01), source
        return total

    for slow in {0, 1, size // 2, size - 1}:
        found = link_seconds([[seconds(q, r, slow) for q in range(size)] for r in range(size)])
        assert max(range(size), key=found.__getitem__) == slow
        assert found[slow] > 3 * sorted(found)[size // 2]


def test_of_two_links_the_one_that_sends_slowly() -> None:
    assert link_seconds([[0, 0.5], [0.1, 0]]) == [0.1, 0.5]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_an_even_job_is_left_alone(size: int) -> None:
    assert explain(job([0.01] * size, [0.1] * size, [8.0] * size, 0.005, noise=0.02)) is None


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per rank"):
        explain(Times([0.1], [0.1, 0.1], [0.0, 0.0], [1.0, 1.0]))


class Shown:
    """A sink."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.values |= values

    def close(self) -> None: ...


@pytest.mark.parametrize("rank", [0, 1])
def test_shares_and_skew_are_metrics_of_rank_0(tmp_path: Path, rank: int) -> None:
    adapter: Any = SimpleNamespace(collectives=SingleCollectives())
    progress: Any = SimpleNamespace(epoch=lambda *_: None)
    world = World(rank=rank, size=2, local_rank=rank, local_size=2)
    account = Account(adapter, progress, lambda: "hash")
    account.timing = Timing(adapter, world, Events(None), lambda: tmp_path)
    account.timing.sink = shown = Shown()
    account.timing.gathered([[1.0, 0.1, 0.1, 6.0, 2.5, 2.0, 0.0], [1.0, 0.1, 0.1, 2.0, 2.5, 2.0, 0.0]], 2)
    account.epoch_done("data", 0, 1.004)
    if rank:
        assert not shown.values and not list(tmp_path.iterdir())
    else:
        assert (shown.values["rank0/share"], shown.values["rank1/share"]) == (0.75, 0.25)
        assert shown.values["data/skew"] == 1.004


READ = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1])
read.Reload()
print([(tag, [(e.step, round(e.value, 6)) for e in read.Scalars(tag)]) for tag in read.Tags()["scalars"]])
"""


def test_tensorboard_reads_the_event_file(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "metrics")
    for step in (1, 300, 70000):
        file.scalars(step, {"train/loss": 1.0 / step, "perf/step_ms": float(step)})
    read = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "metrics")], capture_output=True, text=True, timeout=100, check=True
    )
    assert sorted(ast.literal_eval(read.stdout)) == [
        ("perf/step_ms", [(1, 1.0), (300, 300.0), (70000, 70000.0)]),
        ("train/loss", [(1, 1.0), (300, 0.003333), (70000, 0.000014)]),
    ]
