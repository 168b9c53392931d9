"""Flat buckets: sums, flags of use, fp16 that cannot overflow where fp32 would not. Workers are threads here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.torch_bucket import Bucket, arrivals, layout
from hvdlm.adapters.torch_coded import bucket_maker

SHAPES = [(3, 5), (7,), (), (2, 1, 4)]


class ThreadWire:
    """Sums in the precision of the tensor, as Horovod does."""

    def __init__(self, collectives: ThreadCollectives) -> None:
        self._collectives = collectives
        self.names: list[str] = []

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        self.names.append(name)
        return tensor

    def wait(self, handle: torch.Tensor) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            handle.copy_(torch.from_numpy(self._collectives.allreduce(handle.numpy())))


def step(bucket: Bucket, gradients: list[torch.Tensor | None], weight: float) -> dict[int, torch.Tensor]:
    """One backward: gradients arrive, travel, and become ``.grad``; returns copies by position."""
    parameters = [slot.parameter for slot in bucket._slots.values()]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
        if gradient is not None:
            bucket.fill(p, gradient, weight)
    bucket.launch(weight != 0)
    totals = {id(p): total for p, total in bucket.finish()}
    result = {}
    for i, p in enumerate(parameters):
        if id(p) in totals:
            result[i] = totals[id(p)].clone()
        p.grad = None
    return result


def run(size: int, steps: list[list[list[Any]]], weights: list[float], **kwargs: Any) -> Any:
    """``steps[t][rank]`` are the gradients of a step; returns per rank the list of results and the names sent."""

    def work(collectives: ThreadCollectives) -> Any:
        wire = ThreadWire(collectives)
        parameters = [torch.nn.Parameter(torch.zeros(s, dtype=kwargs.get("dtype", torch.float32))) for s in SHAPES]
        bucket = Bucket(
            "b",
            parameters,
            kwargs.get("dtype", torch.float32),
            torch.device("cpu"),
            wire,
            kwargs.get("compress", False),
        )
        return [step(bucket, s[collectives.rank], weights[collectives.rank]) for s in steps], wire.names

    return FakeJob(size).run(work)


def gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def test_weighted_sum() -> None:
    own = [gradients(1), gradients(2)]
    for results, _ in run(2, [own], [0.25, 0.75]):
        for i in range(len(SHAPES)):
            torch.testing.assert_close(results[0][i], 0.25 * own[0][i] + 0.75 * own[1][i])


@pytest.mark.parametrize("compress", [False, True])
def test_unused_and_partly_used(compress: bool) -> None:
    a, b = gradients(1), gradients(2)
    steps = [[[a[0], None, None, a[3]], [b[0], b[1], None, None]]] * 2
    for results, _ in run(2, steps, [0.5, 0.5], compress=compress):
        for result in results:
            assert sorted(result) == [0, 1, 3], "the third was used by nobody"
            torch.testing.assert_close(result[1], b[1] / 2, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("compress", [False, True])
def test_a_filler_counts_nothing_not_even_its_nan(compress: bool) -> None:
    a = gradients(1)
    poison = [torch.full_like(g, math.nan) for g in a]
    steps = [[[*a[:3], None], poison]] * 3
    for results, names in run(2, steps, [1.0, 0.0], compress=compress):
        assert "b.exact" not in names
        for result in results:
            assert sorted(result) == [0, 1, 2], "what only a filler used was used by nobody"
            torch.testing.assert_close(result[0], a[0], rtol=2e-3, atol=2e-3)


@settings(max_examples=100, deadline=None)
@example([-19.0, -28.0], 2)
@example([0.0, -37.0, -37.0], 2)
@given(st.lists(st.floats(-37, 38), min_size=2, max_size=5), st.integers(2, 3))
def test_fp16_carries_every_magnitude_fp32_does(exponents: list[float], size: int) -> None:
    """Steps whose gradients jump by any factor: never an infinity that fp32 would not have."""
    steps = [[gradients(10 * t + r, 10.0**e / 100) for r in range(size)] for t, e in enumerate(exponents)]
    for results, _ in run(size, steps, [1 / size] * size, compress=True):
        for own, result in zip(steps, results, strict=True):
            exact = [sum(g[i].double() for g in own) / size for i in range(len(SHAPES))]
            largest = max(float(g.abs().max()) for gradients_of_rank in own for g in gradients_of_rank)
            for i, value in enumerate(exact):
                assert bool(torch.isfinite(result[i]).all())
                assert float((result[i].double() - value).abs().max()) <= 4e-3 * largest + 1e-44


def test_fp16_keeps_gradients_that_cancel_and_zeros() -> None:
    big = [g.sign() * 3e38 for g in gradients(1)]
    steps = [[gradients(1), gradients(2)], [big, [-g for g in big]], [[g * 0 for g in big]] * 2, [gradients(3)] * 2]
    for results, _ in run(2, steps, [0.5, 0.5], compress=True):
        assert all(float(value.abs().max()) == 0 for result in results[1:3] for value in result.values())
        torch.testing.assert_close(results[3][0], gradients(3)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_in_fp32_is_so_on_every_rank_and_passes(value: float) -> None:
    bad = gradients(2)
    bad[0][1, 2] = value
    steps = [
        [gradients(1), gradients(2)],
        [gradients(1), bad],
        [gradients(1), gradients(2)],
        [gradients(1), gradients(2)],
    ]
    for results, names in run(2, steps, [0.5, 0.5], compress=True):
        assert "b.exact" in names
        assert not bool(torch.isfinite(results[1][0][1, 2]))
        assert int(torch.isfinite(results[1][0]).sum()) == 14
        torch.testing.assert_close(results[3][1], results[0][1], rtol=2e-3, atol=2e-3)


def test_fp16_travels_as_half_the_bytes_once_it_knows_the_magnitude() -> None:
    sizes = []

    class Measuring(ThreadWire):
        def start(self, tensor: torch.Tensor, name: str) -> Any:
            sizes.append(tensor.element_size())
            return super().start(tensor, name)

    parameters = [torch.nn.Parameter(torch.zeros(4))]
    bucket = Bucket(
        "b", parameters, torch.float32, torch.device("cpu"), Measuring(ThreadCollectives(FakeJob(1), 0)), True
    )
    for _ in range(3):
        step(bucket, [torch.ones(4)], 1.0)
    assert sizes == [4, 2, 2]


def test_held_gradients_do_not_change() -> None:
    """A buffer is used again only when nobody holds a gradient in it."""
    p = torch.nn.Parameter(torch.zeros(4))
    bucket = Bucket("b", [p], torch.float32, torch.device("cpu"), ThreadWire(ThreadCollectives(FakeJob(1), 0)), False)

    def backward(value: float) -> torch.Tensor:
        p.grad = torch.full((4,), value)
        bucket.fill(p, p.grad, 1.0)
        bucket.launch(True)
        ((_, total),) = bucket.finish()
        p.grad = None
        return total

    held = backward(1.0)
    where = held.data_ptr()
    other = backward(2.0)
    assert held.tolist() == [1.0] * 4 and other.tolist() == [2.0] * 4
    del held, other
    first = backward(3.0)
    where = first.data_ptr()
    del first
    assert backward(4.0).data_ptr() == where, "the usual loop allocates nothing"


def test_layout_respects_the_cap_and_types() -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(100, dtype=d)) for d in [torch.float32, torch.float64, torch.bfloat16] * 4
    ]
    buckets = layout(parameters, 900)
    assert sorted(id(p) for _, _, members in buckets for p in members) == sorted(map(id, parameters))
    for dtype, _, members in buckets:
        assert all((p.dtype == torch.float64) == (dtype == torch.float64) for p in members)
        assert len(members) == 1 or len(members) * 100 * dtype.itemsize <= 900
    assert buckets[0][2][0] is parameters[-1], "from the last, which backward reaches first"


class Link:
    """Writes down what is begun and what is waited for; one worker."""

    rank, size, sums_halves = 0, 1, False

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        self.events.append(f"+{name}")
        return name

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        out.copy_(tensor)
        return self.start(tensor, name)

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        out.copy_(tensor[None])
        return self.start(tensor, name)

    def arrived(self, handle: Any) -> bool:
        return False

    def wait(self, handle: Any) -> None:
        self.events.append(f"-{handle}")


def launched(link: Link, codec: str, name: str) -> Bucket:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    bucket = bucket_maker(codec, link)(name, [p], torch.float32, p.device)
    bucket.fill(p, torch.ones(64, 64), 1.0)
    bucket.launch(True)
    return bucket


def test_buckets_of_several_hops_are_waited_for_in_turn() -> None:
    """While one bucket comes back the next is on its way out: something has always begun before it is waited for."""
    link = Link()
    buckets = [launched(link, codec, name) for codec, name in (("int8", "a"), ("powersgd", "b"), ("none", "c"))]
    sums = [total for _, total in arrivals(buckets)]
    assert all(torch.allclose(total, torch.ones(64, 64), atol=1e-2) for total in sums) and len(sums) == 3
    out = ["+a.out", "+b.p", "+c"]
    assert link.events == [*out, "-a.out", "+a.back", "-b.p", "+b.q", "-c", "-a.back", "-b.q"]
