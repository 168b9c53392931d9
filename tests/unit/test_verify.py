"""Causes from made-up traces, and the command's answers to bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from hvdlm.cli.verify import how_to_run, imported_by, verify
from hvdlm.errors import ConfigError
from hvdlm.verify.compare import compare
from hvdlm.verify.diagnose import diagnose
from hvdlm.verify.trace import Step, Trace


def traces(size: int = 2) -> tuple[Trace, list[Trace]]:
    """Those of a correct script: equal gradients, parts of the batch on each rank."""
    step = Step(lr=0.1, norm=2.0, sample=[1.0, -1.0, 1.0, 1.0], digests={"0": "a"}, values=[1.0, 2.0])
    made = {"backwards": 2, "attempts": 2, "steps": [step] * 2, "losses": [3.0, 2.0], "start": [0.0, 0.0]}
    one = Trace(0, 1, batches=[["r0", "r1", "r2", "r3"]] * 2, **made)  # type: ignore[arg-type]
    per = 4 // size
    several = [
        Trace(rank, size, batches=[[f"r{rank * per + i}" for i in range(per)]] * 2, **made)  # type: ignore[arg-type]
        for rank in range(size)
    ]
    return one, several


def changed(trace: Trace, **step: object) -> Trace:
    return dataclasses.replace(trace, steps=[dataclasses.replace(s, **step) for s in trace.steps])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 4])
def test_a_correct_script_has_no_findings(size: int) -> None:
    assert diagnose(*traces(size)) == []
    compared = compare(*traces(size))
    assert [row.step for row in compared] == [1, 2]
    assert all((row.loss_one, row.gradient, row.parameters) == (row.loss_several, 0, 0) for row in compared)
    with_fewer = traces(size)
    with_fewer[1][0].batches[1] = ["r9"]
    assert [row.step for row in compare(*with_fewer)] == [1], "samples differ from the second step on"


def test_losses_are_weighed_by_samples() -> None:
    one, (a, b) = traces()
    a = dataclasses.replace(a, batches=[["r0", "r1", "r2"]] * 2, losses=[4.0, 4.0])
    b = dataclasses.replace(b, batches=[["r3"]] * 2, losses=[0.0, 0.0])
    assert compare(one, [a, b])[0].loss_several == 3.0
    summed = [dataclasses.replace(t, options={"reduction": "sum"}) for t in (a, b)]
    assert compare(one, summed)[0].loss_several == 4.0


def test_parameters_that_go_elsewhere() -> None:
    one, several = traces()
    elsewhere = [changed(t, values=[1.0, 2.5]) for t in several]
    (found,) = diagnose(one, elsewhere)
    assert found.cause == "parameter" and "though the first gradient is the same" in found.evidence
    rounded = [dataclasses.replace(t, options={"compression": "fp16"}) for t in elsewhere]
    assert diagnose(one, rounded) == []


def test_what_only_uneven_shares_show() -> None:
    one, several = traces()
    turned = [changed(t, sample=[1.0, 1.0, 1.0, 1.0]) for t in several]
    (found,) = diagnose(one, turned, uneven=True)
    assert found.cause == "loss" and "with equal shares they do not" in found.evidence


def test_causes() -> None:
    one, (a, b) = traces()
    twice = {"norm": 4.0, "sample": [2.0, -2.0, 2.0, 2.0]}
    cases = {
        "loss": [changed(a, **twice), changed(b, **twice)],
        "clipping": [
            dataclasses.replace(changed(t, norm=0.2, sample=[0.1, -0.1, 0.1, 0.1]), hooks=["f"]) for t in (a, b)
        ],
        "learning rate": [changed(a, lr=0.2), changed(b, lr=0.2)],
        "parameter": [a, changed(b, digests={"0": "b"})],
        "optimizer step": [a, dataclasses.replace(b, steps=[], attempts=0)],
        "checkpoint": [dataclasses.replace(t, saved=["x.pt"]) for t in (a, b)],
        "data": [a, dataclasses.replace(b, batches=a.batches)],
        "seed": [dataclasses.replace(a, initial={"w": "1"}), dataclasses.replace(b, initial={"w": "2"})],
        "buffer": [dataclasses.replace(a, buffers={"N.m": "1"}), dataclasses.replace(b, buffers={"N.m": "2"})],
        "failed": [dataclasses.replace(a, error="ValueError: no"), b],
    }
    for cause, several in cases.items():
        found = diagnose(one, several)
        assert found and found[0].cause == cause, (cause, found)
        assert found[0].evidence and found[0].suggestion


def test_data_that_every_worker_reads_whole() -> None:
    one, several = traces()
    one = dataclasses.replace(one, unshared=16)
    whole = [dataclasses.replace(t, unshared=16, batches=[["x", str(t.rank)]] * 2) for t in several]
    assert [f.cause for f in diagnose(one, whole)] == ["data"]
    cut_by_hand = [dataclasses.replace(t, unshared=8) for t in whole]
    shared = [dataclasses.replace(t, handed=2) for t in whole]
    asked = [dataclasses.replace(t, options={"partition": "none"}) for t in whole]
    for right in (cut_by_hand, shared, asked):
        assert diagnose(one, right) == []


def test_a_step_that_waits_for_the_others() -> None:
    """Under Keras a step is what sums gradients: a rank that steps alone waits for ever."""
    one, (a, b) = traces()
    alone = [dataclasses.replace(a, attempts=1, steps=[], stuck=True), dataclasses.replace(b, attempts=0, steps=[])]
    assert [f.cause for f in diagnose(one, alone)] == ["optimizer step"]
    failed = [dataclasses.replace(t, stuck=False, backwards=1, error="HorovodAllreduce: mismatched") for t in alone]
    assert next(f.cause for f in diagnose(one, failed)) == "optimizer step"
    raised = [dataclasses.replace(t, stuck=False, backwards=1, error="ValueError: mine") for t in alone]
    assert next(f.cause for f in diagnose(one, raised)) == "failed"
    (found,) = diagnose(one, [dataclasses.replace(a, stuck=True), b])
    assert found.cause == "failed" and "rank 0 waits in a collective" in found.evidence


def test_local_synchronisation_is_no_difference() -> None:
    one, (a, b) = traces()
    local = [dataclasses.replace(t, options={"sync": "local"}) for t in (a, changed(b, digests={"0": "b"}))]
    assert diagnose(one, local) == []


def test_a_rate_that_was_asked_for_is_right() -> None:
    one, several = traces()
    asked = [dataclasses.replace(changed(t, lr=0.2), options={"lr_scale": "linear"}) for t in several]
    assert diagnose(one, asked) == []


def test_what_a_script_imports(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch.nn as nn, hvdlm\nfrom keras.layers import Dense\nfrom . import mine\n'import json'\n"
    )
    assert imported_by(str(script)) == {"os", "torch", "hvdlm", "keras"}
    assert how_to_run(str(script)) == "plain"
    script.write_text("import torch\n")
    assert how_to_run(str(script)) == "autowrap"


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras = tmp_path / "keras_script.py"
    keras.write_text("import keras\n")
    cases = {
        "needs a Python script, not nothing": [],
        "needs a Python script, not 'nowhere.py'": ["nowhere.py"],
        "at least 2 workers": ["-np", "1", str(keras)],
        "is a Keras script, and KERAS_BACKEND is torch": [str(keras)],
    }
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for message, arguments in cases.items():
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(verify, arguments, catch_exceptions=False)
