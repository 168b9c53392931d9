"""Learning rates of Keras optimizers in a process that is one worker of two, then of three."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from hvdlm.adapters.keras_optimizers import multiply_learning_rates, scale_learning_rate
from hvdlm.options import Options
from hvdlm.world import World

OPTIONS = Options(batch="per_worker", lr_scale="linear")


def world(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, local_size=size, cross_rank=0, cross_size=1)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_change_of_the_workers_scales_what_one_process_would_use(scheduled: bool) -> None:
    rate: Any = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5) if scheduled else 0.1
    optimizer = keras.optimizers.SGD(rate)
    optimizer.build([keras.Variable([1.0])])
    scale_learning_rate(optimizer, OPTIONS, world(2))
    assert float(optimizer.learning_rate if not scheduled else optimizer._get_current_learning_rate()) == (
        pytest.approx(0.2)
    )
    scale_learning_rate(optimizer, OPTIONS, world(3))  # attached again
    multiply_learning_rates([optimizer], 3 / 2)  # its state is that of two workers
    now = optimizer._get_current_learning_rate()
    assert float(now) == pytest.approx(0.3)
    scale_learning_rate(optimizer, OPTIONS, world(1))
    multiply_learning_rates([optimizer], 1 / 3)
    assert float(optimizer._get_current_learning_rate()) == pytest.approx(0.1)
