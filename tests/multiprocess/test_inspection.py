"""Replicas that come apart, and workers that wait for each other for ever, in real jobs."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = ROOT / "tests" / "multiprocess" / "inspect_script.py"


def job(case: str, tmp_path: Path, script: Path = SCRIPT) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    done = run_workers(
        [str(script), case],
        2,
        controller="mpi",
        cwd=tmp_path,
        timeout=110,
        env={"HVDLM_RUN_DIR": str(tmp_path / "run")},
    )
    events = tmp_path / "run" / "events.jsonl"
    lines = map(json.loads, events.read_text().splitlines() if events.exists() else [])
    # How gradients travel is said in every job; on a busy machine a worker may be slow enough to be named.
    return done, [event for event in lines if event["event"] not in ("plan", "shares", "straggler")]


@pytest.mark.parametrize(("case", "tensor"), [("flip", "arg0.2.weight"), ("skipped", "arg0.0.bias")])
def test_a_difference_stops_the_job_and_is_named(tmp_path: Path, case: str, tensor: str) -> None:
    done, events = job(case, tmp_path)
    assert done.returncode != 0
    (event,) = events
    assert event["tensor"] == tensor and event["ranks"] == [1]
    # Done after step 6; compared every 4 steps.
    assert event["last_equal_step"] == 4 and event["step"] == 8
    assert f"MismatchError: replicas differ after step 8 (equal after step 4): {tensor}" in done.stderr
    assert "on rank 1 as on rank 0" in done.stderr and "HINT: hvdlm verify" in done.stderr


@pytest.mark.parametrize("case", ["resync", "warn", "buffer", "nothing"])
def test_a_job_may_go_on(tmp_path: Path, case: str) -> None:
    done, events = job(case, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ended") == 2
    identical = json.loads((tmp_path / "run" / "summary.json").read_text())["replicas_identical"]
    if case == "nothing":
        assert events == [] and identical is True
        return
    assert events[0]["step"] == 8 and events[0]["action"] == ("resync" if case == "resync" else "warn")
    if case == "resync":
        assert len(events) == 1 and identical is True
    if case == "warn":
        assert len(events) > 5 and identical is False
    if case == "buffer":
        assert [e["tensor"] for e in events] == ["arg0.seen"] and "(a buffer)" in done.stderr


def test_a_missing_rank_is_named_with_its_stack(tmp_path: Path) -> None:
    done, events = job("missing", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"rank 1 is missing: rank 0 waits in hvdlm\.\S+ for \d s", done.stderr)
    assert "inspect_script.py" in done.stderr and "in linger: time.sleep(5)" in done.stderr
    assert events[0]["event"] == "stall" and events[0]["ranks"] == [1]


def test_collectives_that_do_not_match_end_the_job(tmp_path: Path) -> None:
    began = time.monotonic()
    done, events = job("mismatch", tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    assert "collectives that do not match" in done.stderr
    assert "hvdlm.barrier() if odd else hvdlm.mean(1.0)" in done.stderr
    assert events[0]["kind"] == "mismatch" and len(events[0]["operations"]) == 2


def test_keras(tmp_path: Path) -> None:
    done, events = job("", tmp_path, SCRIPT.with_name("inspect_keras_script.py"))
    assert done.returncode != 0
    stall, divergence = events
    assert stall["ranks"] == [1] and "rank 1 is missing: rank 0 waits in a compiled step" in done.stderr
    assert "in on_train_batch_end: time.sleep(5)" in done.stderr
    # Batches count from 0: flipped after step 10, and compared after steps 8 and 12.
    assert (divergence["last_equal_step"], divergence["step"]) == (8, 12)
    assert divergence["tensor"].endswith("dense_1/kernel") and divergence["ranks"] == [1]
