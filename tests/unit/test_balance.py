"""Balance: shares follow speed, smoothly, within bounds, not for noise; all workers change them at the same batch."""

from __future__ import annotations

import itertools
import math
import random
import types
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlm import balancing
from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.algorithms.balance import Balancer, bounded, clipped_mean
from hvdlm.algorithms.partition import split_shares
from hvdlm.balancing import Pace, starting_weights, steps_between
from hvdlm.errors import ConfigError
from hvdlm.options import Options
from hvdlm.plan import Partition
from hvdlm.world import World


@settings(max_examples=80, deadline=None)
@given(
    speeds=st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(any),
    smallest=st.floats(0.01, 1),
    largest=st.floats(1, 8),
)
def test_bounds_hold_and_nothing_is_lost(speeds: list[float], smallest: float, largest: float) -> None:
    weights = bounded(speeds, smallest, largest)
    grain = 1e-3
    assert all(smallest - grain <= weight <= largest + grain for weight in weights)
    assert sum(weights) == pytest.approx(len(speeds), abs=grain * len(speeds))
    order = sorted(range(len(speeds)), key=lambda worker: speeds[worker])
    assert all(weights[a] <= weights[b] + grain for a, b in itertools.pairwise(order))


def simulate(seconds: list[float], steps: int, *, balancer: Balancer, noise: float, overhead: float = 0.0) -> float:
    """Step time over that of the best split, at the end; seconds per sample are those of each worker."""
    draw = random.Random(3)
    for _ in range(steps):
        counts = split_shares(64, balancer.weights).tolist()
        times = [
            (overhead + s * max(n, 1)) * (1 + draw.uniform(-noise, noise)) for s, n in zip(seconds, counts, strict=True)
        ]
        balancer.update([time / max(n, 1) for time, n in zip(times, counts, strict=True)])
    best = 64 / math.fsum(1 / s for s in seconds)
    return max(s * n for s, n in zip(seconds, split_shares(64, balancer.weights).tolist(), strict=True)) / best


@pytest.mark.parametrize("overhead", [0.0, 0.3])
@pytest.mark.parametrize("seconds", [[1.0, 2.5], [1.0, 1.0, 4.0], [1.0, 3.0, 1.0, 2.0]])
def test_it_finds_the_speeds_in_few_measurements(seconds: list[float], overhead: float) -> None:
    balancer = Balancer((1.0,) * len(seconds))
    assert simulate(seconds, 6, balancer=balancer, noise=0.05, overhead=overhead) < 1.12
    # and follows when they swap
    assert simulate(seconds[::-1], 7, balancer=balancer, noise=0.05, overhead=overhead) < 1.15


@pytest.mark.parametrize("seed", range(20))
def test_noise_changes_little(seed: int) -> None:
    balancer = Balancer((1.0, 1.0, 1.0))
    draw = random.Random(seed)
    changes = sum(balancer.update([draw.uniform(0.97, 1.03) for _ in range(3)]) for _ in range(200))
    assert changes <= 3, "none of a coarse step, and of fine ones those that chance makes stand out"
    assert all(abs(weight - 1) < 0.025 for weight in balancer.weights)


def test_small_differences_are_made_up_for_in_time() -> None:
    """4 % are too little for a coarse step: the mean of some measurements finds them."""
    balancer, draw = Balancer((1.0, 1.0)), random.Random(0)
    changes = [balancer.update([draw.uniform(0.99, 1.01), draw.uniform(1.07, 1.09)]) for _ in range(12)]
    assert sum(changes) == 1 and not any(changes[:4])
    assert balancer.weights[0] / balancer.weights[1] == pytest.approx(1.08, abs=0.015)


def test_what_is_no_measurement_leaves_the_weights() -> None:
    balancer = Balancer((1.0, 1.0))
    for bad in (0.0, -1.0, math.nan, math.inf):
        assert not balancer.update([1.0, bad])
    assert balancer.update([1.0, 3.0]) and balancer.weights == (1.5, 0.5)
    assert not balancer.update([math.nan, 0.0])
    with pytest.raises(ValueError, match="3 times for 2 workers"):
        balancer.update([1.0, 1.0, 1.0])


def test_a_worker_without_samples_comes_back() -> None:
    """Its filler is measured: weight 0 to start with is no life sentence."""
    balancer = Balancer((1.0, 0.0))
    assert balancer.update([1.0, 1.0]) and balancer.weights == (1.0, 1.0)


@pytest.mark.parametrize("change", [{"smoothing": 0}, {"hysteresis": 1}, {"largest": 0.5}, {"weights": (1, -1)}])
def test_wrong_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        Balancer(**{"weights": (1.0, 1.0), **change})


def test_a_quota_shows_and_a_pause_of_the_script_does_not() -> None:
    throttled = [0.01, 0.01, 0.01, 0.07]  # 40 % of the CPU, in periods of 0.1 s
    assert clipped_mean(throttled, [1] * 4) == pytest.approx(0.025)
    assert clipped_mean([0.01, 0.01, 30.0, 0.01], [1] * 4) < 0.04


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0


def test_all_workers_change_at_the_same_batch() -> None:
    """Rank 1 takes three times as long a sample, and has read further ahead; waiting does not count."""

    def work(collectives: ThreadCollectives) -> list[Any]:
        rank, clock = collectives.rank, Clock()
        partition = Partition(strategy="contiguous", rank=rank, size=2, seed=0)
        pace = Pace(
            partition,
            world=World(rank=rank, size=2, local_rank=rank, local_size=2),
            collectives=collectives,
            waited=lambda: clock.waited,
            dynamic=True,
            clock=lambda: clock.now,
        )
        pace.epoch()
        for step in range(5):
            pace.handed_out(8)
            clock.now += 8 * (0.3 if rank else 0.1) + 5.0 * (1 - rank)
            clock.waited += 5.0 * (1 - rank)
            pace.asked(step + 2 + 3 * rank)
        return [pace.partition_at(batch).shares for batch in range(12)]

    first, second = FakeJob(2).run(work)
    assert first == second
    assert first[:9] == [[1.0, 1.0]] * 9, "planned by rank 1 already"
    assert first[9:] == [(1.5, 0.5)] * 3


def test_workers_that_train_on_their_own_agree_when_they_meet() -> None:
    assert steps_between(Options(sync="local", sync_every=50)) == 50
    assert steps_between(Options(sync_every=50)) == steps_between(Options(sync="local", sync_every=1)) == 4
    agreed: list[Any] = []
    collectives = types.SimpleNamespace(allreduce=lambda array: agreed.append(array) or array)
    world, partition = World(rank=0, size=2, local_size=2), Partition(strategy="hash", rank=0, size=2, seed=0)
    pace = Pace(partition, world=world, collectives=collectives, waited=lambda: 0.0, dynamic=True, every=10)  # type: ignore[arg-type]
    for _ in range(25):
        pace.handed_out(1)
        pace.asked(1)
    assert len(agreed) == 2


def test_off_makes_no_collective() -> None:
    pace = Pace(
        Partition(strategy="hash", rank=0, size=2, seed=0),
        world=World(rank=0, size=2, local_rank=0, local_size=2),
        collectives=None,  # type: ignore[arg-type]
        waited=lambda: 0.0,
        dynamic=False,
    )
    for _ in range(20):
        pace.handed_out(1)
        pace.asked(1)


def weights_of(size: int, **options: Any) -> list[tuple[float, ...]]:
    def work(collectives: ThreadCollectives) -> tuple[float, ...]:
        world = World(rank=collectives.rank, size=size, local_rank=collectives.rank, local_size=size)
        return starting_weights(Options(**options), world, collectives)

    return FakeJob(size).run(work)


def test_given_weights_are_taken_and_their_number_checked() -> None:
    assert weights_of(3, balance="static", weights="1,2,4") == [(1.0, 2.0, 4.0)] * 3
    assert weights_of(2) == weights_of(2, balance="dynamic") == [()] * 2
    with pytest.raises(ConfigError, match=r"2 weights for 3 workers(.|\n)*--weights 1,1,1"):
        weights_of(3, balance="static", weights=[1, 2])


def test_calibration_is_shared_and_small_differences_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([100.0, 300.0, 100.0, 103.0])
    monkeypatch.setattr(balancing, "_speed", lambda: next(speeds))
    (weights, same) = weights_of(2, balance="static")
    assert weights == same and sorted(weights) == [0.5, 1.5]
    assert weights_of(2, balance="static") == [(), ()]


def test_the_calibration_measures() -> None:
    assert balancing._speed(0.05) > 0
