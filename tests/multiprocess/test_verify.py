"""``hvdlm verify`` on scripts with one mistake each and on correct ones, of PyTorch and of Keras.

A fixed choice runs with the other tests; all of them: ``pytest -m perf tests/multiprocess/test_verify.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.multiprocess import verify_cases, verify_keras_cases
from tests.multiprocess.workers import run_workers

MISTAKES = {f"torch-{name}": case for name, case in verify_cases.MISTAKES.items()}
MISTAKES |= {f"keras-{name}": case for name, case in verify_keras_cases.MISTAKES.items()}
CORRECT = {f"torch-{name}": script for name, script in verify_cases.CORRECT.items()}
CORRECT |= {f"keras-{name}": script for name, script in verify_keras_cases.CORRECT.items()}
_SAMPLE = ("torch-not_sharded", "torch-sum_as_mean", "keras-clipped_before")
_SAMPLE_CORRECT = ("torch-weights", "keras-fit")


def _cases(names: list[str], sample: tuple[str, ...]) -> list[object]:
    return [name if name in sample else pytest.param(name, marks=pytest.mark.perf) for name in names]


def findings(script: str, directory: Path) -> tuple[list[str], dict[str, list[dict[str, float]]]]:
    """(causes named, the steps compared by arm)."""
    path = directory / "train.py"
    path.write_text(script)
    job = run_workers(
        ["-m", "hvdlm", "verify", "--json", "--steps", "4", str(path)], 1, controller=None, cwd=directory, timeout=280
    )
    assert job.returncode in (0, 1), job.stderr[-2000:]
    verdict = json.loads(job.stdout)
    assert verdict["ok"] is (job.returncode == 0) and verdict["ok"] is not bool(verdict["findings"])
    written = [p.name for p in directory.iterdir() if p.name not in ("train.py", "hvdlm-runs")]
    assert not written, "verify wrote the script's checkpoint"
    return [finding["cause"] for finding in verdict["findings"]], verdict["compared"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _cases(list(MISTAKES), _SAMPLE))
def test_a_mistake_is_named(tmp_path: Path, name: str) -> None:
    cause, script = MISTAKES[name]
    assert findings(script, tmp_path)[0][:1] == [cause]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", _cases(list(CORRECT), _SAMPLE_CORRECT))
def test_a_correct_script_passes(tmp_path: Path, name: str) -> None:
    causes, compared = findings(CORRECT[name], tmp_path)
    assert causes == []
    assert set(compared) == {"even", "uneven"}
    for steps in compared.values() if "per_worker" not in name else ():
        assert len(steps) >= 3, "there was something to compare"
        for step in steps:
            assert step["gradient"] < 1e-3 and step["parameters"] < 0.05
            assert step["loss_several"] == pytest.approx(step["loss_one"], rel=1e-3)
