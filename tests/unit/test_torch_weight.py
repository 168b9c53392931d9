"""What a share counts by, and learning rates that warm up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.torch_lr import scale_learning_rates
from hvdlm.adapters.torch_weight import Weigher
from hvdlm.errors import ConfigError, DataError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

WORLD = World(rank=0, size=4, local_rank=0, local_size=4)


def fractions(counts: list[int], batches: list[Any], weight: Any = "auto") -> list[float]:
    def work(collectives: ThreadCollectives) -> float:
        count = counts[collectives.rank]
        share = Share(np.arange(max(count, 1)), count, sum(counts))
        return Weigher(weight, [], len(counts)).weigh(share, batches[collectives.rank], collectives).fraction

    return FakeJob(len(counts)).run(work)


def labels(*rows: list[int], dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor(rows, dtype=dtype)}


def test_by_targets_that_are_not_ignored() -> None:
    one, two = labels([1, 2, -100], [3, -100, -100]), labels([-100, 5, -100])
    assert fractions([2, 1], [one, two]) == [0.75, 0.25]
    assert fractions([2, 1], [one, two], "samples") == [2 / 3, 1 / 3]
    assert fractions([3, 0], [one, two]) == [1.0, 0.0], "a filler has no targets"
    none = labels([-100, -100])
    assert fractions([2, 1], [none, none]) == [2 / 3, 1 / 3], "a mean over nothing, as in one process"
    assert fractions([2, 1], [none, two]) == [0.0, 1.0]


def test_equal_numbers_are_the_samples_bit_for_bit() -> None:
    for counts in ([3, 4], [1, 2, 4], [5, 5, 3]):
        full = [labels(*[[1] * 7] * count) for count in counts]
        assert fractions(counts, full) == [count / sum(counts) for count in counts]


@pytest.mark.parametrize("batch", [torch.zeros(2), [torch.zeros(2)], {"x": 1}, labels([1, 2], dtype=torch.float64)])
def test_without_integer_labels_it_is_by_samples_and_no_collective(batch: Any) -> None:
    share = Share(np.arange(2), 2, 5)
    assert Weigher("auto", [], 2).weigh(share, batch, None) is share  # type: ignore[arg-type]


def test_a_function_of_the_batch() -> None:
    assert fractions([1, 1], [[3], [1]], sum) == [0.75, 0.25]
    for function, message in (
        (lambda batch: batch.nothing, "weight= raised AttributeError"),
        (lambda batch: float("nan"), "weight= gave nan"),
        (lambda batch: -1, "weight= gave -1"),
        (lambda batch: "many", "weight= raised ValueError"),
    ):
        with pytest.raises(DataError, match=message):
            fractions([1, 1], [[3], [1]], function)


def rates(steps: int, lr_scale: str, warmup: int, scheduler: bool = False) -> tuple[list[float], Any]:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)] if scheduler else []
    options = Options(batch="per_worker", lr_scale=lr_scale, lr_warmup_steps=warmup)  # type: ignore[arg-type]
    found: list[Any] = [("o", "optimizer", optimizer), *(("s", "scheduler", each) for each in schedulers)]
    undo = scale_learning_rates(found, options, WORLD)
    used = []
    for _ in range(steps):
        before = float(p.detach())
        p.grad = torch.ones(1)
        optimizer.step()
        used.append(before - float(p.detach()))
        for each in schedulers:
            each.step()
    for end in undo:
        end()
    return used, optimizer


def test_the_rate_grows_from_the_scripts_to_the_scaled_one() -> None:
    used, optimizer = rates(6, "linear", 4)
    assert used == pytest.approx([0.5, 0.875, 1.25, 1.625, 2.0, 2.0])
    assert optimizer.param_groups[0]["lr"] == 2.0
    assert rates(3, "sqrt", 2)[0] == pytest.approx([0.5, 0.75, 1.0])
    assert rates(2, "linear", 0)[0] == pytest.approx([2.0, 2.0])


def test_a_scheduler_goes_on_from_the_scaled_rate() -> None:
    used, optimizer = rates(6, "linear", 2, scheduler=True)
    assert used == pytest.approx([0.5, 1.25, 2.0, 2.0, 0.2, 0.2], rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_warm_up_goes_on_where_the_optimizer_was_saved() -> None:
    _, saved = rates(2, "linear", 4)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    options = Options(batch="per_worker", lr_scale="linear", lr_warmup_steps=4)
    scale_learning_rates([("o", "optimizer", optimizer)], options, WORLD)
    optimizer.load_state_dict(saved.state_dict())
    p.grad = torch.ones(1)
    optimizer.step()
    assert -float(p.detach()) == pytest.approx(1.25), "the third step"


@pytest.mark.parametrize("options", [{"lr_warmup_steps": 5}, {"lr_warmup_steps": -1, "lr_scale": "linear"}])
def test_a_warm_up_needs_a_scale(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        Options(batch="per_worker", **options)
