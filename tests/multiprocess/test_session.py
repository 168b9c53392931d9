"""hvdlm's functions in real jobs, over each controller."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path

import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = ROOT / "tests" / "multiprocess" / "session_script.py"


@pytest.mark.parametrize(("workers", "controller"), [(2, "mpi"), (3, "mpi"), (2, "gloo")])
def test_functions(tmp_path: Path, workers: int, controller: str) -> None:
    run_dir = tmp_path / "run"
    job = run_workers(
        [str(SCRIPT), str(tmp_path), str(workers)],
        workers,
        controller=controller,
        cwd=tmp_path,
        timeout=110,
        env={"HVDLM_RUN_DIR": str(run_dir)},
    )
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    assert job.stdout.count("done in") == workers
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 1.25
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == workers and summary["samples_seen"] == 10
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    assert summary["replicas_identical"] is True
    assert len(summary["shares"]) == workers and sum(summary["shares"]) == pytest.approx(1, abs=1e-5)
    assert summary["skew"] >= 1
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    shares = [event for event in events if event["event"] == "shares"]
    assert shares and shares[-1]["epoch"] >= 1 and len(shares[-1]["shares"]) == workers


@pytest.mark.parametrize("ending", ["raise ValueError('on rank 1')", "sys.exit(3)", "os._exit(3)"])
def test_a_rank_that_ends_badly_ends_the_job(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys, time, torch, hvdlm
            net, data = hvdlm.wrap(
                torch.nn.Linear(1, 1),
                torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(64, 1)), batch_size=2),
            )
            for step, (x,) in enumerate(data):
                if step == 5 and hvdlm.rank() == 1:
                    print("failing at", time.time(), flush=True)
                    {ending}
                net(x).mean().backward()
            """
        )
    )
    job = run_workers([str(script)], 2, controller="mpi", cwd=tmp_path, timeout=60)
    ended = time.time()
    assert job.returncode != 0
    failing = float(job.stdout.split("failing at")[1].split()[0])
    assert ended - failing < 5
    summaries = list(tmp_path.glob("hvdlm-runs/*/summary.json"))
    assert not summaries, "a run that failed leaves no summary as if it had not"
