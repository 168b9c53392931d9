"""Reference arithmetic of outer steps and of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_coded import bucket_maker
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.algorithms.outer import mean_move, nesterov
from hvdlm.algorithms.patterns import parse_pattern
from hvdlm.algorithms.pruning import keep_largest, keep_n_of_m, sparsity_at

WEIGHTS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=9), elements=st.floats(-9, 9, width=32))


def test_a_worker_without_samples_is_left_out() -> None:
    moved = mean_move(np.ones(2), [np.array([3.0, 1.0]), np.full(2, np.nan), np.array([0.0, 5.0])], [1, 0, 3])
    assert moved.tolist() == pytest.approx([0.25 * 2 - 0.75, 3.0])


def test_the_outer_step_is_that_of_torch() -> None:
    p = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=True)
    x, velocity = p.detach().numpy().copy(), np.zeros(7)
    for _ in range(5):
        moved = np.random.default_rng(1).normal(size=7)
        p.grad = torch.from_numpy(-moved)
        optimizer.step()
        x, velocity = nesterov(x, moved, velocity, lr=0.7, momentum=0.9)
        np.testing.assert_allclose(x, p.detach().numpy(), rtol=1e-13)


def test_the_schedule_rises_from_nothing_to_its_end_and_stays() -> None:
    at = {"begin": 10, "end": 95, "every": 20, "final": 0.8}
    made = {t: s for t in range(200) if (s := sparsity_at(t, **at)) is not None}
    assert list(made) == [10, 30, 50, 70, 90, 95]
    assert made[10] == 0 and made[95] == 0.8
    rises = np.diff(list(made.values())) / np.diff(list(made))
    assert (rises > 0).all() and (np.diff(rises) < 0).all(), "steeply at first"
    assert sparsity_at(5, begin=5, end=5, every=1, final=0.5) == 0.5


@given(st.lists(WEIGHTS, min_size=1, max_size=3), st.floats(0, 1))
def test_the_largest_are_kept(weights: list[np.ndarray], sparsity: float) -> None:
    masks = keep_largest(weights, sparsity)
    kept = np.concatenate([np.abs(w[m]) for w, m in zip(weights, masks, strict=True)])
    dropped = np.concatenate([np.abs(w[~m]) for w, m in zip(weights, masks, strict=True)])
    assert len(dropped) >= int(sparsity * (len(kept) + len(dropped)))
    if len(kept) and len(dropped):
        assert kept.min() > dropped.max(), "equal ones stay together"
        at_threshold = (dropped == dropped.max()).sum()
        assert len(dropped) - at_threshold < max(1, int(sparsity * (len(kept) + len(dropped))))


def test_what_is_not_finite_stays_to_be_seen() -> None:
    (mask,) = keep_largest([np.array([np.nan, 1.0, np.inf, 2.0])], 0.5)
    assert mask.tolist() == [True, False, True, False]


@given(arrays.arrays(np.float32, (4, 13), elements=st.floats(-9, 9, width=32)), st.integers(1, 3))
def test_n_of_m(weight: np.ndarray, n: int) -> None:
    mask = keep_n_of_m(weight, n, 4)
    groups, magnitudes = mask[:, :12].reshape(-1, 4), np.abs(weight[:, :12]).reshape(-1, 4)
    assert (groups.sum(1) == n).all() and mask[:, 12:].all()
    for kept, values in zip(groups, magnitudes, strict=True):
        assert values[kept].min() >= values[~kept].max()


def test_patterns() -> None:
    assert parse_pattern("") is None and parse_pattern("2:4") == (2, 4)
    for text in ("4:2", "2-4", "0:4", "2:2", "two"):
        with pytest.raises(ValueError, match="pattern"):
            parse_pattern(text)


class Measuring:
    """One worker's wire that adds up the bytes it is given."""

    rank, size, sums_halves = 0, 1, False

    def __init__(self) -> None:
        self.sent = 0

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        self.sent += tensor.nbytes

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        out.copy_(tensor)
        self.start(tensor, name)

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        out.copy_(tensor[None])
        self.start(tensor, name)

    def arrived(self, handle: Any) -> bool:
        return False

    def wait(self, handle: Any) -> None:
        pass


@pytest.mark.parametrize(("codec", "tolerance"), [("none", 1e-6), ("fp16", 1e-3), ("int8", 2e-2)])
def test_at_80_percent_three_quarters_of_the_bytes_stay_here(codec: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    wire, watch = Measuring(), BackwardWatch()
    reducer = Reducer(
        [list(model.named_parameters())],
        sparse=frozenset(),
        wire=wire,  # type: ignore[arg-type]
        watch=watch,
        size=1,
        mean=True,
        make_bucket=bucket_maker(codec, wire),
        bucket_cap_bytes=2**25,
        name="pruned",
    )

    def backward() -> tuple[int, list[torch.Tensor]]:
        before = wire.sent
        model.zero_grad()
        model(torch.ones(4, 512)).square().sum().backward()
        return wire.sent - before, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    watch.install()
    try:
        backward()
        whole, dense = backward()
        matrices = {id(p): p for p in model.parameters() if p.ndim == 2}
        kept = keep_largest([p.detach().numpy() for p in matrices.values()], 0.8)
        masks = dict(zip(matrices, map(torch.from_numpy, kept), strict=True))
        reducer.pack(masks)
        backward()
        packed, sparse = backward()
    finally:
        watch.remove()
        reducer.remove()
    assert packed <= 0.25 * whole
    for p, exact, found in zip(model.parameters(), dense, sparse, strict=True):
        masked = exact * masks[id(p)] if id(p) in masks else exact
        torch.testing.assert_close(found, masked, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
