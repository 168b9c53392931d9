"""When workers that begin together part: counted in steps, over restarts too."""

from __future__ import annotations

from typing import Any

import torch

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.torch_coded import maker_for
from hvdlm.adapters.torch_local import LocalSync
from hvdlm.options import Options
from tests.unit.test_codecs import CodedThreadWire

OPTIONS = Options(sync="local", sync_every=2, sync_warmup_steps=3)


def made(collectives: ThreadCollectives) -> tuple[LocalSync, torch.optim.Optimizer, torch.nn.Parameter]:
    wire: Any = CodedThreadWire(collectives)
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], 1.0)
    local = LocalSync(
        options=OPTIONS, wire=wire, size=wire.size, make_bucket=maker_for(OPTIONS, wire), synced=[], asleep=True,
        part=lambda: local.wake(),  # noqa: PLW0108 - it is being made
    )  # fmt: skip
    local.add([("p", parameter)], [])
    local.follow([optimizer], [])
    return local, optimizer, parameter


def step(local: LocalSync, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, grad: float) -> None:
    parameter.grad = torch.full_like(parameter, grad)
    optimizer.step()
    local.boundary()


def test_so_many_steps_are_made_together_and_then_replicas_part() -> None:
    def work(collectives: ThreadCollectives) -> list[Any]:
        local, optimizer, parameter = made(collectives)
        seen = []
        # Gradients of the first three are global already; those after are each worker's own.
        for grad in (-1.0, -1.0, -1.0, *([-1.0 - collectives.rank] * 3)):
            step(local, optimizer, parameter, grad)
            seen.append((local.asleep, float(parameter.detach()[0])))
        local.remove()
        return seen

    first, second = FakeJob(2).run(work)
    assert [asleep for asleep, _ in first] == [True, True, False, False, False, False]
    assert [value for _, value in first] == [1, 2, 3, 4, 6, 7]  # the fifth is the mean of 5 and 7
    assert [value for _, value in second] == [1, 2, 3, 5, 6, 8]


def test_a_job_that_goes_on_counts_the_steps_it_had_made() -> None:
    def work(collectives: ThreadCollectives) -> list[Any]:
        asleep = []
        for before in (0, 1, 3, 7):
            local, optimizer, parameter = made(collectives)
            local.load_state_dict({})
            local.resume(before)
            step(local, optimizer, parameter, -1.0)
            step(local, optimizer, parameter, -1.0)
            asleep.append((local.asleep, local.together))
            local.remove()
        return asleep

    for found in FakeJob(2).run(work):
        assert found == [(True, 2), (False, 3), (False, 3), (False, 7)]
