"""The planner of the Keras adapter: what it decides, eagerly and in compiled steps, and that nothing is lost."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hvdlm.adapters import keras_planner
from hvdlm.adapters.fake import FakeJob, ThreadCollectives
from hvdlm.adapters.keras_planner import PlannedBuckets
from hvdlm.algorithms.comm_model import Link
from hvdlm.options import Options
from tests.unit.keras_wire_of_threads import ThreadWire

FAST, SLOW = Link(1e-5, 5e9), Link(0.001, 1e5)
SHAPES = [(96, 64), (7,)]
ONE = tf.constant(1.0, tf.float64)


class Alone:
    """A job of two whose other worker sends zeros, in graphs too."""

    sums_halves, rank, size = False, 0, 2

    def allreduce(self, array: Any, op: Any = "sum") -> Any:
        return np.array(array)

    def sum(self, tensor: Any, name: str) -> Any:
        return tf.identity(tensor)

    def exchange(self, tensor: Any, name: str) -> Any:
        return tf.concat([tensor[:1], tf.zeros_like(tensor[1:])], 0)

    def gather(self, tensor: Any, name: str) -> Any:
        return tf.concat([tensor, tf.zeros_like(tensor)], 0)


def planned(wire: Any, links: list[Link], monkeypatch: Any, events: list[Any] | None = None, **options: Any) -> Any:
    """A planner with a link that is made up, and codecs that cost nothing."""
    monkeypatch.setattr(keras_planner, "measure_link", lambda *_: links[0] if len(links) == 1 else links.pop(0))
    monkeypatch.setattr(keras_planner, "_codec_costs", lambda _, codecs, __: dict.fromkeys(codecs, 0.0))
    within_host = options.pop("within_host", False)
    return PlannedBuckets(
        wire,
        "g",
        options=Options(compression="auto", **options),
        cap_bytes=2.0**25,
        within_host=within_host,
        tell=lambda name, **facts: (events if events is not None else []).append({"event": name, **facts}),
    )


def gradients(seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [tf.constant(generator.standard_normal(shape), tf.float32) for shape in SHAPES]


def test_a_slow_link_gets_few_bytes_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Any] = []
    buckets = planned(Alone(), [SLOW], monkeypatch, events)
    with caplog.at_level(logging.WARNING, "hvdlm"):
        buckets.sum(gradients(0), ONE)
    assert buckets.choice in ("powersgd", "topk")
    (line,) = caplog.messages
    assert line.startswith(f"compression={buckets.choice}") and "ms added to a step: none " in line
    assert events[0]["event"] == "plan" and events[0]["codec"] == buckets.choice


@pytest.mark.parametrize(("options", "why"), [({"exact": True}, ""), ({"within_host": True}, "on one host")])
def test_nothing_is_coded_where_that_is_excluded_or_costs_more(
    options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    buckets = planned(Alone(), [SLOW], monkeypatch, events, **options)
    own = gradients(0)
    sums = buckets.sum(own, ONE)
    assert buckets.choice == "none" and not buckets.coded
    assert events[0]["reason"].startswith(why)
    for got, given in zip(sums, own, strict=True):
        np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_computes_long_gets_a_codec_that_changes_less(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 2 s of computing float32 takes too little to change anything."""
    buckets = planned(Alone(), [Link(1e-4, 2e6)], monkeypatch)
    step = tf.function(lambda grads: buckets.sum(grads, ONE), autograph=False) if compiled else None
    chosen = []
    monkeypatch.setattr(keras_planner, "median", lambda values: 2.0)
    for turn in range(6):
        own = gradients(turn)
        sums = step(own) if step else buckets.sum(own, ONE)
        chosen.append(buckets.choice)
    assert chosen[0] in ("powersgd", "topk")
    assert chosen[-1] == "none"
    np.testing.assert_array_equal(sums[0], own[0])


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_codec_has_not_sent_is_sent_when_another_takes_over(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of all steps are the sums of all gradients: also of what int8 and PowerSGD had set aside."""
    monkeypatch.setattr(keras_planner, "median", lambda values: 1e6)

    def work(collectives: ThreadCollectives) -> Any:
        wire: Any = ThreadWire(collectives)
        buckets = planned(wire, [SLOW], monkeypatch)
        totals, given, chosen = [0.0, 0.0], [0.0, 0.0], []
        for turn in range(6):
            own = gradients(10 * turn + wire.rank)
            sums = buckets.sum(own, ONE)
            totals = [total + each.numpy().astype(float) for total, each in zip(totals, sums, strict=True)]
            given = [total + each.numpy().astype(float) for total, each in zip(given, own, strict=True)]
            chosen.append(buckets.choice)
        return totals, given, chosen, [name for name in wire.names if name.endswith("settled")]

    found = FakeJob(size).run(work)
    for totals, _, chosen, settled in found:
        assert chosen[2] in ("int8", "powersgd", "topk") and chosen[-1] == "none"
        assert len(settled) == 1
        for i, total in enumerate(totals):
            np.testing.assert_allclose(total, sum(given[i] for _, given, _, _ in found), atol=2e-5)


def test_a_link_that_changes_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = planned(Alone(), [SLOW, FAST, SLOW], monkeypatch)
    waits = iter([1.0, 1.0, 5.0])  # the first look, one that knows what is usual, one that sees another
    monkeypatch.setattr(keras_planner, "median", lambda values: next(seconds))
    seconds = iter(value for wait in waits for value in (1e-4, wait))
    step = tf.function(lambda grads: buckets.sum(grads, ONE), autograph=False)
    own = gradients(0)
    chosen = []
    for _ in range(202):
        step(own)
        chosen.append(buckets.choice)
    assert chosen[150] in ("powersgd", "topk") and chosen[-1] == "none"


def test_state_goes_on_with_its_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = planned(Alone(), [SLOW], monkeypatch)
    buckets.sum(gradients(0), ONE)
    state = buckets.state()
    again = planned(Alone(), [SLOW], monkeypatch)
    again.load_state(state)
    own = gradients(1)
    for got, expected in zip(again.sum(own, ONE), buckets.sum(own, ONE), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_first_sums_travel_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = planned(Alone(), [SLOW], monkeypatch, compression_warmup_steps=3)
    step = tf.function(lambda grads: buckets.sum(grads, ONE), autograph=False)
    equal = []
    for turn in range(5):
        own = gradients(turn)
        equal.append(bool(np.array_equal(step(own)[0], own[0])))
    assert equal == [True, True, True, False, False]


def test_what_codecs_cost_is_measured() -> None:
    costs = keras_planner._codec_costs(Alone(), ["none", "int8", "powersgd"], Options())  # type: ignore[arg-type]
    assert costs["none"] == 0.0
    assert 0.0 < costs["int8"] < 1e-6 and 0.0 < costs["powersgd"] < 1e-6
