"""Keras replicas that train on their own and become one again: against all workers played in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.multiprocess.workers import ROOT, run_workers

SCRIPT = ROOT / "tests" / "multiprocess" / "keras_local_script.py"
pytestmark = pytest.mark.timeout(400)


def test_as_all_workers_in_one_process(tmp_path: Path) -> None:
    done = run_workers([str(SCRIPT), str(tmp_path)], 3, controller="gloo", cwd=tmp_path, timeout=300)
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert "refused.0.json" in found
    errors = [result["error"] for result in found.values() if "error" in result]
    assert not errors, errors[0]
    assert done.returncode == 0, done.stderr[-3000:]
    names = re.findall(r'^    "(\w+)": \((?:sgd|adam),', SCRIPT.read_text(), re.M)
    assert len(names) > 5
    for name in [*names, "coded"]:
        ranks = [found[f"{name}.{rank}.json"] for rank in range(3)]
        assert len({rank["digest"] for rank in ranks}) == 1, name
        assert ranks[0]["moved"] > 0.1, f"{name}: the comparison is between models that learned something"
        assert ranks[0]["far"] < 1e-10, name
