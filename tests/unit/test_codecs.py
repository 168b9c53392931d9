"""Codecs: the reference arithmetic, and the tensor versions against it. Workers are threads here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.residuals import parted, put_together
from hvdlm.adapters.torch_capture import _made, copy_to, leaf_of
from hvdlm.adapters.torch_coded import CodedBucket, bucket_maker, capture, pool, restore
from hvdlm.adapters.torch_journeys import Exchange, TopK
from hvdlm.algorithms.codecs import CODECS, Codec, decode, encode, exchange_sum, redistribute, topk, topk_sum
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.powersgd import matrix_shape, orthonormal, powersgd_sum, start, warm
from hvdlm.state.history import History
from hvdlm.state.snapshot import Gatherer, rebuild

BLOCKS = ["fp16", "bf16", "int8"]
CODED = [*BLOCKS, "powersgd", "topk"]
CPU = torch.device("cpu")
# Of one block, relative to its largest magnitude: half a unit in the last place.
ROUNDING = {"fp16": 2.0**-11 + 1e-7, "bf16": 2.0**-8 + 1e-7, "int8": 0.5 / 127 + 1e-7}


class CodedThreadWire:
    """Collectives among threads; every buffer is filled in place, as over Horovod."""

    sums_halves = False

    def __init__(self, collectives: ThreadCollectives) -> None:
        self._job, self.rank, self.size = collectives.job, collectives.rank, collectives.job.size
        self.sent_bytes = 0
        self.names: list[str] = []

    def _start(self, kind: str, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        self.names.append(name)
        self.sent_bytes += tensor.numel() * tensor.element_size()
        return kind, tensor.clone(), out

    def start(self, tensor: torch.Tensor, name: str) -> Any:
        return self._start("sum", tensor, tensor, name)

    def exchange(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        return self._start("exchange", tensor, out, name)

    def collect(self, tensor: torch.Tensor, out: torch.Tensor, name: str) -> Any:
        return self._start("collect", tensor, out, name)

    def arrived(self, handle: Any) -> bool:
        return False

    def wait(self, handle: Any) -> None:
        kind, tensor, out = handle
        everyone = self._job.exchange(self.rank, tensor)
        if kind == "sum":
            out.copy_(torch.stack(everyone).sum(0))
        elif kind == "exchange":
            out.copy_(torch.stack([rows[self.rank] for rows in everyone]))
        else:
            out.copy_(torch.stack(everyone))


def random(seed: int, length: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(length).astype(dtype)


# The reference.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 3e38, 1e-37])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_round_to_the_last_place_at_any_magnitude(name: str, scale: float, dtype: Any) -> None:
    codec = CODECS[name]
    values = (random(0, 3 * codec.block, np.float64) / 6 * scale).astype(dtype)
    back = decode(codec, *encode(codec, values))
    assert back.dtype == dtype
    largest = np.abs(values).reshape(-1, codec.block).max(axis=1).repeat(codec.block)
    floor = 2.0 ** -(100 if dtype == np.float32 else 1000)
    assert (np.abs(back - values) <= ROUNDING[name] * np.maximum(largest, floor)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_not_finite_is_not_hidden(name: str, bad: float) -> None:
    codec = CODECS[name]
    values = random(0, 2 * codec.block)
    values[3] = bad
    back = decode(codec, *encode(codec, values))
    assert not np.isfinite(back[3])
    assert np.isfinite(back[codec.block :]).all()
    if name != "int8":
        assert np.isfinite(np.delete(back, 3)).all(), "only the value itself"


def test_zeros_are_zeros() -> None:
    for name in BLOCKS:
        codec = CODECS[name]
        assert not decode(codec, *encode(codec, np.zeros(codec.block, np.float32))).any()


def test_bf16_codes_are_bfloat16() -> None:
    values = random(1, 4096)
    scales, codes = encode(CODECS["bf16"], values)
    scaled = torch.from_numpy(values / scales.repeat(CODECS["bf16"].block))
    assert np.array_equal(codes, scaled.to(torch.bfloat16).view(torch.uint16).numpy())


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_feedback_loses_nothing(name: str) -> None:
    """Over steps the sums and what is left of them add up to the gradients, to rounding of float64."""
    size, rows, columns = 3, 48, 64
    length = 3 * CODECS["int8"].block * 4
    own_residuals = [np.zeros(length) for _ in range(size)]
    owner_residuals = [np.zeros(length // size) for _ in range(size)]
    q = start(7, columns, 2).astype(np.float64)
    gradients, sums = np.zeros(length), np.zeros(length)
    for step in range(5):
        own = [random(10 * step + r, length, np.float64) for r in range(size)]
        gradients += np.sum(own, axis=0)
        if name == "int8":
            sums += exchange_sum(CODECS[name], own, own_residuals, owner_residuals)
        elif name == "topk":
            sums += topk_sum(own, own_residuals, 0.1)
        else:
            shape = (rows, columns)
            total, q = powersgd_sum([g.reshape(shape) for g in own], [r.reshape(shape) for r in own_residuals], q)
            sums += total.reshape(-1)
    left = np.sum(own_residuals, axis=0)
    if name == "int8":
        left = left + np.concatenate(owner_residuals)
    assert np.abs(left).max() > 1e-3, "something was dropped"
    np.testing.assert_allclose(sums + left, gradients, atol=1e-10)


def test_powersgd_is_exact_for_matrices_of_its_rank_and_gets_out_of_zero() -> None:
    factors = np.random.default_rng(0)
    low = factors.standard_normal((40, 2)) @ factors.standard_normal((2, 30))
    q = start(1, 30, 2).astype(np.float64)
    zero, q = powersgd_sum([np.zeros((40, 30))] * 2, [np.zeros((40, 30)) for _ in range(2)], q)
    assert not zero.any() and np.abs(q).max() > 0
    total, _ = powersgd_sum([low, low], [np.zeros((40, 30)) for _ in range(2)], q)
    np.testing.assert_allclose(total, 2 * low, atol=1e-10)
    p = orthonormal(np.random.default_rng(2).standard_normal((40, 2)).astype(np.float32) * 1e30)
    np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-6)
    assert matrix_shape((8, 8), 4) is None and matrix_shape((64, 64), 4) == (64, 64)
    assert warm(np.zeros((3, 1)), np.ones((3, 1))).all()


def test_topk_takes_the_largest() -> None:
    assert topk(np.array([0.1, -3.0, np.nan, 2.0]), 0.5).tolist() == [1, 2]
    assert topk(np.zeros(10), 0.001).shape == (1,)


def test_redistribute_keeps_the_sum() -> None:
    states = [{"a": random(r, 5), "b": random(9 + r, 2)} for r in range(3)]
    for size in (1, 2, 5):
        new = [redistribute(states, rank, size) for rank in range(size)]
        for name in ("a", "b"):
            left = np.sum([state[name] for state in new if name in state], axis=0)
            np.testing.assert_allclose(left, np.sum([state[name] for state in states], axis=0), rtol=1e-5)


# The tensor versions against it.


def journey_steps(codec: Codec, own: Any, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """``own[t][rank]``; per rank the sums of all steps and the residual, what an owner keeps moved into it."""
    size, length = len(own[0]), len(own[0][0])

    def work(collectives: ThreadCollectives) -> Any:
        wire = CodedThreadWire(collectives)
        shared: dict[str, Any] = {"length": length, "num_flags": 3, "dtype": dtype, "device": CPU}
        journey = (
            TopK(wire, "t", ratio=0.05, **shared)
            if codec.name == "topk"
            else Exchange(wire, "t", codec=codec.name, **shared)
        )
        sums = []
        for gradients in own:
            flat = torch.from_numpy(gradients[wire.rank].copy())
            if journey.residual is not None:
                flat += journey.residual
            flags = torch.tensor([0, wire.rank == size - 1, 1], dtype=torch.uint8)
            journey.start(flat, flags)
            journey.finish()
            assert flags.tolist() == [0, 1, 1]
            sums.append(flat.numpy().copy())
        extra = journey.extra_residual()
        if extra is not None and journey.residual is not None:
            journey.residual += extra
        return sums, None if journey.residual is None else journey.residual.numpy()

    return FakeJob(size).run(work)


@pytest.mark.parametrize(("size", "dtype"), [(1, np.float32), (2, np.float64), (3, np.float32)])
@pytest.mark.parametrize("name", [*BLOCKS, "topk"])
def test_tensors_do_what_the_reference_does(name: str, size: int, dtype: Any) -> None:
    codec = CODECS[name]
    length = size * max(codec.block, 256) * (300 if name == "int8" else 20)  # more than one piece
    scales = [0.0, 1e-30, 1.0, 1e30]
    own = [
        [(random(9 * t + r, length, np.float64) * scales[t]).astype(dtype) for r in range(size)]
        for t in range(len(scales))
    ]
    residuals = [np.zeros(length, dtype) for _ in range(size)]
    owner = [np.zeros(length // size, dtype) for _ in range(size)]
    found = journey_steps(codec, own, torch.float32 if dtype == np.float32 else torch.float64)
    for t, gradients in enumerate(own):
        wanted = (
            topk_sum(gradients, residuals, 0.05) if name == "topk" else exchange_sum(codec, gradients, residuals, owner)
        )
        for sums, _ in found:
            np.testing.assert_array_equal(sums[t], found[0][0][t], err_msg="ranks differ")
            # A sum in another order may round to the neighbouring code.
            np.testing.assert_allclose(sums[t], wanted, rtol=1e-5, atol=2.1 * ROUNDING.get(name, 0) * abs(wanted).max())
            assert (np.abs(sums[t] - wanted) > 1e-5 * abs(wanted).max()).mean() < 1e-3
    if codec.feedback:
        left = np.sum([residual for _, residual in found], axis=0)
        whole = np.sum(residuals, axis=0) + (np.concatenate(owner) if name == "int8" else 0)
        np.testing.assert_allclose(left, whole, atol=1e-3 * abs(whole).max() + 1e-30)


SHAPES = [(96, 64), (7,), (), (5, 2, 64), (300, 40)]


def make_bucket(codec: str, collectives: ThreadCollectives, dtype: torch.dtype = torch.float32) -> Any:
    wire = CodedThreadWire(collectives)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    bucket = bucket_maker(codec, wire, rank=4, ratio=0.1)("b", parameters, dtype, CPU)
    assert isinstance(bucket, CodedBucket)
    return bucket, parameters, wire


def backward(bucket: Any, parameters: Any, gradients: Any, weight: float) -> dict[int, torch.Tensor]:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            bucket.fill(p, gradient, weight)
    bucket.launch(weight != 0)
    assert bucket.launched
    totals = {id(p): total.clone() for p, total in bucket.finish()}
    return {i: totals[id(p)] for i, p in enumerate(parameters) if id(p) in totals}


def gradients_of(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) * scale for shape in SHAPES]


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (2, torch.float64), (3, torch.float32)])
@pytest.mark.parametrize("codec", CODED)
def test_bucket_feedback_makes_up_over_steps(codec: str, size: int, dtype: torch.dtype) -> None:
    """Of a gradient that stays the same, the mean of many sums is the gradient: nothing is lost, only late."""
    steps = 120 if codec in ("powersgd", "topk") else 12

    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, _ = make_bucket(codec, collectives, dtype)
        own = gradients_of(collectives.rank, dtype)
        total = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        for _ in range(steps):
            for i, value in backward(bucket, parameters, own, 1 / size).items():
                total[i] += value / steps
        return total

    ranks = FakeJob(size).run(work)
    exact = [sum(g) / size for g in zip(*(gradients_of(r, dtype) for r in range(size)), strict=True)]
    for total in ranks:
        assert all(torch.equal(a, b) for a, b in zip(total, ranks[0], strict=True)), "replicas differ"
        tolerance = {"fp16": 1e-3, "bf16": 4e-3, "int8": 2e-3}.get(codec, 0.12)
        difference = torch.cat([(a - b).flatten() for a, b in zip(total, exact, strict=True)])
        assert float(difference.norm() / torch.cat([value.flatten() for value in exact]).norm()) < tolerance


@pytest.mark.parametrize("codec", CODED)
def test_bucket_with_unused_parameters_and_fillers(codec: str) -> None:
    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, wire = make_bucket(codec, collectives)
        own = gradients_of(collectives.rank)
        backward(bucket, parameters, own, 0.5)
        names = {id(p): str(i) for i, p in enumerate(parameters)}
        before = capture([bucket], names)["residuals"]
        poison = [torch.full_like(g, math.nan) for g in own]
        weight = 1.0 if wire.rank == 0 else 0.0
        result = backward(bucket, parameters, [*(own if weight else poison)[:4], None], weight)
        after = capture([bucket], names)["residuals"]
        return result, before, after

    for result, before, after in FakeJob(2).run(work):
        assert sorted(result) == [0, 1, 2, 3], "the last was used by nobody"
        assert all(bool(torch.isfinite(value).all()) for value in result.values())
        if before:
            # int8 moves what the owner of a chunk keeps into the residual; an unused parameter loses none of it.
            assert bool(torch.isfinite(after["4"]).all())
            if codec != "int8":
                torch.testing.assert_close(after["4"], before["4"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("codec", CODED)
def test_a_nan_on_one_rank_is_seen_by_all_and_passes(codec: str, bad: float) -> None:
    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, _ = make_bucket(codec, collectives)
        own = gradients_of(collectives.rank)
        backward(bucket, parameters, own, 0.5)
        poisoned = [g.clone() for g in own]
        if collectives.rank == 1:
            poisoned[0][3, 2] = bad
        seen = backward(bucket, parameters, poisoned, 0.5)
        after = [backward(bucket, parameters, own, 0.5) for _ in range(2)]
        return seen, after

    for seen, after in FakeJob(2).run(work):
        assert not bool(torch.isfinite(seen[0]).all())
        assert all(bool(torch.isfinite(value).all()) for step in after for value in step.values())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("codec", CODED)
def test_extreme_magnitudes(codec: str, scale: float) -> None:
    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, _ = make_bucket(codec, collectives)
        return [backward(bucket, parameters, gradients_of(5, scale=scale), 0.5) for _ in range(3)]

    for results in FakeJob(2).run(work):
        for result in results:
            assert all(bool(torch.isfinite(value).all()) for value in result.values())
        sums = [sum(result[i].double() for result in results) / 3 for i in range(len(SHAPES))]
        exact = [g.double() for g in gradients_of(5, scale=scale)]
        if scale == 0:
            assert not any(value.any() for value in sums)
            continue
        # Against the direction of the gradient, all three steps together.
        inner = sum(float((a / scale * (b / scale)).sum()) for a, b in zip(sums, exact, strict=True))
        norm = sum(float(((b / scale) ** 2).sum()) for b in exact)
        assert inner / norm > 0.1 if codec in ("powersgd", "topk") else inner / norm == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("codec", CODED)
def test_one_element_many_tiny_ones_and_odd_sizes(codec: str) -> None:
    def work(collectives: ThreadCollectives) -> Any:
        wire = CodedThreadWire(collectives)
        found = []
        for shapes in ([(1,)], [(1,)] * 2_000, [(4099,), (3,)]):
            parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
            bucket = bucket_maker(codec, wire, ratio=1.0)("b", parameters, torch.float32, CPU)
            generator = torch.Generator().manual_seed(wire.rank)
            own = [torch.randn(shape, generator=generator) for shape in shapes]
            result = backward(bucket, parameters, own, 1.0)
            found.append((torch.cat(own), torch.cat([result[i] for i in range(len(shapes))])))
        return found

    ranks = FakeJob(3).run(work)
    for i in range(3):
        exact = sum(found[i][0] for found in ranks)
        for found in ranks:
            assert torch.equal(found[i][1], ranks[0][i][1])
            torch.testing.assert_close(found[i][1], exact, rtol=0, atol=0.02 * float(exact.abs().max()) + 0.02)


def test_int8_sends_a_quarter_and_powersgd_and_topk_far_less() -> None:
    def work(collectives: ThreadCollectives) -> dict[str, int]:
        sent = {}
        for codec in CODED:
            wire = CodedThreadWire(collectives)
            parameters = [torch.nn.Parameter(torch.zeros(1024, 1024))]
            bucket = bucket_maker(codec, wire)("b", parameters, torch.float32, CPU)
            backward(bucket, parameters, [torch.randn(1024, 1024)], 1.0)
            sent[codec] = wire.sent_bytes
        return sent

    whole = 4 * 2**20
    for sent in FakeJob(2).run(work):
        # Out with all chunks, back with one.
        assert sent["int8"] < 1.03 * (whole / 4 + whole / 8)
        assert sent["fp16"] < 1.01 * (whole / 2 + whole / 4)
        assert sent["powersgd"] == 2 * 4 * 1024 * 4 + 4
        assert sent["topk"] < 0.021 * whole


@pytest.mark.parametrize("codec", ["int8", "powersgd", "topk"])
def test_state_goes_over_to_other_buckets_and_another_number_of_workers(codec: str) -> None:
    """What three workers had not sent yet, two workers send."""

    def three(collectives: ThreadCollectives) -> Any:
        bucket, parameters, _ = make_bucket(codec, collectives)
        sums = backward(bucket, parameters, gradients_of(collectives.rank), 1.0)
        return sums, capture([bucket], {id(p): f"p{i}" for i, p in enumerate(parameters)})

    before = FakeJob(3).run(three)
    states = [{name: value.numpy() for name, value in state["residuals"].items()} for _, state in before]

    def two(collectives: ThreadCollectives) -> Any:
        wire = CodedThreadWire(collectives)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        names = {id(p): f"p{i}" for i, p in enumerate(parameters)}
        make = bucket_maker(codec, wire)
        buckets = [make("x", parameters[2:], torch.float32, CPU), make("y", parameters[:2], torch.float32, CPU)]
        own = redistribute(states, wire.rank, 2)
        restore(
            buckets,
            names,
            {"residuals": {k: torch.from_numpy(v) for k, v in own.items()}, "warm": before[0][1]["warm"]},
        )
        return capture(buckets, names)

    after = FakeJob(2).run(two)
    exact = [sum(g) for g in zip(*(gradients_of(r) for r in range(3)), strict=True)]
    for i, value in enumerate(exact):
        left = sum(state["residuals"][f"p{i}"] for state in after)
        torch.testing.assert_close(before[0][0][i] + left, value, rtol=1e-4, atol=1e-4)
    assert set(after[0]["warm"]) == set(before[0][1]["warm"])
    assert (codec == "powersgd") == bool(after[0]["warm"])
    for name, q in after[0]["warm"].items():
        assert torch.equal(q, before[0][1]["warm"][name])


def test_powersgd_tensors_do_what_the_reference_does() -> None:
    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, _ = make_bucket("powersgd", collectives, torch.float64)
        return [
            backward(bucket, parameters, gradients_of(10 * t + collectives.rank, torch.float64), 1.0)[0]
            for t in range(4)
        ]

    found = FakeJob(2).run(work)
    q = start(derive_seed("powersgd", "b", 0), 64, 4).astype(np.float64)
    residuals = [np.zeros((96, 64)) for _ in range(2)]
    for t in range(4):
        own = [gradients_of(10 * t + r, torch.float64)[0].numpy() for r in range(2)]
        total, q = powersgd_sum(own, residuals, q)
        for sums in found:
            np.testing.assert_allclose(sums[t].numpy(), total, atol=1e-9)


@pytest.mark.parametrize("codec", ["int8", "topk"])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_worker_that_joins_gets_no_copy_of_what_another_has_not_sent(codec: str, pooled: bool) -> None:
    """Two workers commit; two others come. What all still have to send is what the two had, no more and no less."""
    names = {i: f"p{i}" for i in range(len(SHAPES))}

    def commit(collectives: ThreadCollectives) -> Any:
        bucket, parameters, wire = make_bucket(codec, collectives)
        backward(bucket, parameters, gradients_of(wire.rank), 1.0)
        if pooled:
            pool([bucket], wire, wire.size)
        state = capture([bucket], {id(p): names[i] for i, p in enumerate(parameters)})
        owed = {name: value.clone() for name, value in state["residuals"].items()}
        gather = Gatherer(leaf_of, copy_to)
        kept = parted({"reducers": [state], "locals": []}, wire.size, pooled)
        tree = {"kept": {name: gather.add(value, name) for name, value in kept.items()}}
        made = gather.pack(tree, None)
        made.number = 9
        return owed, made

    before = FakeJob(2).run(commit)

    def go_on(collectives: ThreadCollectives) -> Any:
        history = History()
        if collectives.rank < 2:
            history.add(before[collectives.rank][1])
        agreed = history.agree(collectives)
        assert agreed is not None
        kept = {name: rebuild(agreed, tree, _made) for name, tree in agreed.tree["kept"].items()}
        return put_together(kept, 4)["reducers"][0]["residuals"]

    after = FakeJob(4).run(go_on)
    for name in names.values():
        owed = before[0][0][name] + before[1][0][name]
        assert float(owed.abs().max()) > 0
        torch.testing.assert_close(sum(state[name] for state in after), owed)
        shares = [float(state[name].abs().max()) > 0 for state in after]
        assert shares == ([True] * 4 if pooled else [True, True, False, False])


@pytest.mark.parametrize("after", ["none", "fp16", "bf16"])
@pytest.mark.parametrize("codec", ["int8", "powersgd", "topk"])
def test_what_a_codec_has_not_sent_goes_with_the_next_gradient_of_one_that_forgets(codec: str, after: str) -> None:
    """As when the planner changes its mind: the sums of both are the sums of all gradients. Once, and no more."""

    def work(collectives: ThreadCollectives) -> Any:
        bucket, parameters, wire = make_bucket(codec, collectives)
        names = {id(p): f"p{i}" for i, p in enumerate(parameters)}
        own = gradients_of(wire.rank)
        totals = backward(bucket, parameters, own, 1.0)
        plain = bucket_maker(after, wire)("after", parameters, torch.float32, CPU)
        restore([plain], names, capture([bucket], names))
        waiting = capture([plain], names)["residuals"]
        # One worker's samples are fillers now; the last parameter is used a step later.
        poison = [torch.full_like(g, math.nan) for g in own]
        given = [*(poison if wire.rank else own)[:-1], None]
        first = backward(plain, parameters, given, float(wire.rank == 0))
        second = backward(plain, parameters, own, 1.0)
        sums = [totals[i] + first.get(i, 0.0) + second[i] for i in range(len(own))]
        return sums, waiting, capture([plain], names)["residuals"]

    found = FakeJob(2).run(work)
    everyone = [gradients_of(rank) for rank in range(2)]
    for sums, waiting, left in found:
        assert len(waiting) == len(SHAPES) and not left
        for i, value in enumerate(sums):
            last = i == len(sums) - 1
            expected = 2 * (everyone[0][i] + everyone[1][i]) + (0.0 if last else everyone[0][i])
            torch.testing.assert_close(value, expected, rtol=3e-2, atol=3e-2 if after == "bf16" else 5e-3)
