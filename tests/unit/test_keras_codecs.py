"""Codecs on TensorFlow tensors, against the reference arithmetic. Workers are threads here, each step eager."""

from __future__ import annotations

import copy
import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.keras_bucket import Buckets
from hvdlm.adapters.keras_codecs import Coder, decode, encode
from hvdlm.adapters.keras_job import Job
from hvdlm.adapters.keras_reducer import Reducer
from hvdlm.adapters.residuals import parted, put_together
from hvdlm.algorithms import codecs
from hvdlm.algorithms.codecs import CODECS, exchange_sum, redistribute, topk_sum
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.powersgd import powersgd_sum, start
from hvdlm.options import Options
from hvdlm.state.snapshot import OWN
from hvdlm.world import World
from tests.unit.keras_wire_of_threads import ThreadWire

SHAPES = [(96, 64), (7,), (), (5, 2, 64)]
LENGTH = sum(int(np.prod(shape)) for shape in SHAPES)
BLOCKS = ["fp16", "bf16", "int8"]


class OneWorker:
    """A job of one, in graphs too."""

    sums_halves, rank, size = False, 0, 1

    def sum(self, tensor: Any, name: str) -> Any:
        return tf.identity(tensor)

    def gather(self, tensor: Any, name: str) -> Any:
        return tf.identity(tensor)


def random(seed: int, dtype: Any, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(LENGTH) * scale).astype(dtype)


def run(codec: str, size: int, own: Any, state: Any = None) -> Any:
    """``own[t][rank]``: per rank the sums of all steps, and the residuals."""

    def work(collectives: ThreadCollectives) -> Any:
        wire: Any = ThreadWire(collectives)
        dtype = tf.as_dtype(own[0][0].dtype)
        coder = Coder(wire, "c", codec=codec, rank=4, ratio=0.1, shapes=SHAPES, dtype=dtype)
        if state is not None:
            coder.load_residuals(state[wire.rank])
        sums = [coder.sum(tf.constant(step[wire.rank])).numpy() for step in own]
        return sums, coder.residuals()

    return FakeJob(size).run(work)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_codes_are_those_of_the_reference(name: str, dtype: Any) -> None:
    codec = CODECS[name]
    for scale in (1.0, 1e30, 1e-30, 0.0):
        values = (np.random.default_rng(0).standard_normal(2 * codec.block) * scale).astype(dtype)
        values[5] = np.inf if scale == 1.0 else values[5]
        scales, codes = encode(codec, tf.constant(values))
        wanted, wanted_codes = codecs.encode(codec, values)
        if scale:  # zeros are zeros under any scale
            np.testing.assert_array_equal(scales.numpy(), wanted)
        exact = codecs.decode(codec, wanted, wanted_codes)
        found = decode(codec, scales, codes).numpy()
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(exact))
        finite = np.isfinite(exact)
        # TensorFlow rounds float64 to float32 first: now and then to the neighbouring code.
        assert (found[finite] != exact[finite]).mean() <= (2e-3 if dtype == np.float64 else 0)
        np.testing.assert_allclose(found[finite], exact[finite], rtol=8e-3)


@pytest.mark.parametrize(("size", "dtype"), [(1, np.float32), (2, np.float64), (3, np.float32)])
@pytest.mark.parametrize("name", [*BLOCKS, "topk", "powersgd"])
def test_sums_are_those_of_the_reference(name: str, size: int, dtype: Any) -> None:
    codec = CODECS[name]
    own = [[random(9 * t + r, dtype) for r in range(size)] for t in range(3)]
    found = run(name, size, own)
    step = size * codec.block if codec.block else 1
    padded = -(-LENGTH // step) * step
    residuals = [np.zeros(padded, dtype) for _ in range(size)]
    owner = [np.zeros(padded // size, dtype) for _ in range(size)]
    q = {i: start(derive_seed("powersgd", "c", i), c, 4).astype(dtype) for i, c in ((0, 64),)}
    for t, gradients in enumerate(own):
        if name == "topk":
            wanted = topk_sum(gradients, residuals, 0.1)
        elif name == "powersgd":
            wanted = np.sum(gradients, axis=0)
            cut = 96 * 64
            matrices = [g[:cut].reshape(96, 64) for g in gradients]
            total, q[0] = powersgd_sum(matrices, [r[:cut].reshape(96, 64) for r in residuals], q[0])
            wanted[:cut] = total.reshape(-1)
        else:
            fill = [np.pad(g, (0, padded - LENGTH)) for g in gradients]
            wanted = exchange_sum(codec, fill, residuals, owner)[:LENGTH]
        for sums, _ in found:
            np.testing.assert_array_equal(sums[t], found[0][0][t], err_msg="ranks differ")
            off = np.abs(sums[t] - wanted) > 1e-3 * np.abs(wanted).max()
            # A sum in another order may round to the neighbouring code, or take another of two equals.
            assert off.mean() < 2e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [*BLOCKS, "topk", "powersgd"])
def test_a_nan_on_one_rank_is_seen_by_all_and_passes(name: str, bad: float) -> None:
    own = [[random(3 * t + r, np.float32) for r in range(2)] for t in range(3)]
    own[1][1][10] = bad
    for sums, residuals in run(name, 2, own):
        assert not np.isfinite(sums[1]).all()
        assert np.isfinite(sums[2]).all()
        assert all(np.isfinite(part).all() for part in residuals)


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_residuals_go_over_to_another_number_of_workers(name: str) -> None:
    own = [[random(r, np.float64) for r in range(3)]]
    before = run(name, 3, own)
    states = [{str(i): part for i, part in enumerate(residuals)} for _, residuals in before]
    moved = [redistribute(states, rank, 2) for rank in range(2)]
    state = [[part[str(i)] for i in range(len(SHAPES))] for part in moved]
    zero = [[np.zeros(LENGTH)] * 2]
    after = run(name, 2, zero, state)
    left = np.sum([np.concatenate([part.reshape(-1) for part in residuals]) for _, residuals in after], axis=0)
    np.testing.assert_allclose(before[0][0][0] + after[0][0][0] + left, np.sum(own[0], axis=0), atol=1e-9)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_what_is_not_sent_yet_goes_on_with_the_job(name: str, pooled: bool) -> None:
    """Two workers commit, a third comes: nothing is lost, nothing sent twice, and PowerSGD goes on where it was."""
    shapes, cap = SHAPES[:2], 300.0  # two buckets
    own = [[np.random.default_rng(9 * r + i).standard_normal(s) for i, s in enumerate(shapes)] for r in range(3)]

    def buckets_of(collectives: ThreadCollectives) -> Buckets:
        wire: Any = ThreadWire(collectives)
        return Buckets(wire, "b", codec=name, rank=4, ratio=0.1, cap_bytes=cap)

    def commit(collectives: ThreadCollectives) -> Any:
        buckets = buckets_of(collectives)
        sums = buckets.sum([tf.constant(g) for g in own[collectives.rank]], tf.constant(1.0, tf.float64))
        if pooled:
            buckets.pool(collectives)
        return [s.numpy() for s in sums], parted({"reducers": [buckets.state()], "locals": []}, 2, pooled)

    before = FakeJob(2).run(commit)

    def go_on(collectives: ThreadCollectives) -> Any:
        kept = copy.deepcopy(before[min(collectives.rank, 1)][1])
        if collectives.rank == 2 and not pooled:  # what a commit of another holds of its own is set to zero
            kept[OWN] = [{key: 0.0 * part for key, part in parts.items()} for parts in kept[OWN]]
        buckets = buckets_of(collectives)
        buckets.load_state(put_together(kept, 3)["reducers"][0])
        zeros = [tf.zeros(shape, tf.float64) for shape in shapes]
        sums = buckets.sum(zeros, tf.constant(1.0, tf.float64))
        return [s.numpy() for s in sums], buckets.state()

    after = FakeJob(3).run(go_on)
    keys = {part.shape: key for key, part in after[0][1]["residuals"].items()}
    for i, shape in enumerate(shapes):
        owed = sum(state["residuals"][keys[shape]] for _, state in after)
        sent = before[0][0][i] + after[0][0][i]
        np.testing.assert_allclose(sent + owed, own[0][i] + own[1][i], atol=1e-9)
    if name == "powersgd":
        first, then = before[0][1]["sync"]["reducers"][0]["warm"], after[0][1]["warm"]
        fresh = start(derive_seed("powersgd", "b.1", 0), 64, 4)
        (key,) = first
        assert np.abs(first[key] - fresh).max() > 0.1
        # The second step turned what the first had found, not what all begin with.
        left = own[0][0] + own[1][0] - before[0][0][0]
        basis = np.linalg.qr(left @ first[key]).Q
        wanted = left.T @ basis
        np.testing.assert_allclose(then[key], wanted / np.abs(wanted).max(0), atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("codec", ["topk", "powersgd"])
def test_the_first_gradients_may_travel_as_they_are(codec: str, compiled: bool) -> None:
    def work(collectives: ThreadCollectives) -> list[Any]:
        wire: Any = ThreadWire(collectives) if not compiled else OneWorker()
        made = [Buckets(wire, "b", codec=codec, rank=1, ratio=0.1, cap_bytes=1e9, warm_up=2) for _ in "ab"]
        step = tf.function(lambda g: made[0].sum([g], tf.constant(1.0))) if compiled else None
        grad = tf.constant(np.random.default_rng(collectives.rank).standard_normal(SHAPES[0]))
        sums = [(step(grad) if step else made[0].sum([grad], tf.constant(1.0)))[0].numpy() for _ in range(3)]
        # One that goes on from there has none left.
        made[1].load_state(made[0].state())
        sums.append(made[1].sum([grad], tf.constant(1.0))[0].numpy())
        return sums

    size = 1 if compiled else 2
    wanted = sum(np.random.default_rng(r).standard_normal(SHAPES[0]) for r in range(size))
    for sums in FakeJob(size).run(work):
        for number, total in enumerate(sums):
            assert (np.abs(total - wanted).max() < 1e-12) == (number < 2)


@pytest.mark.parametrize("cap", [1e9, 300])
def test_pruned_gradients_are_not_sent(cap: float) -> None:
    sent: list[int] = []

    class Measuring(ThreadWire):
        def sum(self, tensor: Any, name: str) -> Any:
            sent.append(int(tf.size(tensor)))
            return super().sum(tensor, name)

        def timed(self, tensors: Any, work: Any) -> Any:
            return work()

    mask = np.random.default_rng(3).random(SHAPES[0]) < 0.2

    def work(collectives: ThreadCollectives) -> Any:
        variables = [tf.Variable(tf.zeros(shape, tf.float64)) for shape in SHAPES]
        reducer = Reducer(
            types.SimpleNamespace(gradient_accumulation_steps=None),
            wire=Measuring(collectives),  # type: ignore[arg-type]
            weight=tf.Variable(0.5, dtype=tf.float64),
            options=Options(),
            bucket_cap_bytes=cap,
            name="pruned",
        )
        reducer.masks = {id(variables[0]): tf.Variable(mask)}
        grads = np.split(random(collectives.rank, np.float64), np.cumsum([v.shape.num_elements() for v in variables]))
        own = [tf.constant(g.reshape(v.shape)) for g, v in zip(grads, variables, strict=False)]
        return own, reducer.reduce(own, variables)

    (first, total), (second, other) = FakeJob(2).run(work)
    for i, (a, b, found, same) in enumerate(zip(first, second, total, other, strict=True)):
        exact = (a.numpy() + b.numpy()) / 2 * (mask if i == 0 else 1)
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-12)
        np.testing.assert_array_equal(found.numpy(), same.numpy())
    assert sum(sent) == 2 * (LENGTH - mask.size + mask.sum())


@pytest.mark.parametrize(
    ("sums_halves", "hosts", "more", "wanted"),
    [
        (False, 1, {"compression": "bf16", "compression_warmup_steps": 3}, "none"),
        (False, 1, {"compression": "fp16"}, "none"),
        (True, 1, {"compression": "fp16"}, "fp16"),
        (False, 2, {"compression": "fp16"}, "fp16"),
        (False, 1, {"compression": "fp16", "bucket_cap_mb": 32.0}, "fp16"),
        (False, 1, {"compression": "int8"}, "int8"),
    ],
)
def test_halves_are_not_made_where_processors_move_every_byte(
    sums_halves: bool, hosts: int, more: dict[str, Any], wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, Any]] = []
    recorder: Any = types.SimpleNamespace(event=lambda name, **facts: told.append({"name": name, **facts}))
    world = dataclasses.replace(World.single(), size=2, local_size=2 // hosts)
    collectives: Any = types.SimpleNamespace(sums_halves=sums_halves)
    job = Job(options=Options(**more), world=world, collectives=collectives, recorder=recorder)
    assert job.options.compression == wanted
    if wanted == more["compression"]:
        assert not told and not caplog.messages
    else:
        assert [event["codec"] for event in told] == ["none"]
        assert "takes longer to code than it saves over Gloo on one host" in caplog.text
