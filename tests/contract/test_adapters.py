"""The same checks hold for every adapter: torch, Keras on TensorFlow and on torch, tf_keras, and the fake one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.adapter_checks import CASES, CHECKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Adapter -> check -> "ok" or the traceback."""
    results = {}
    for name in CASES:
        directory = tmp_path_factory.mktemp(name)
        backend = "torch" if name == "keras_torch" else "tensorflow"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        program = [sys.executable, "-m", "tests.contract.adapter_checks", name, str(directory / "found.json")]
        done = subprocess.run(program, capture_output=True, text=True, timeout=240, cwd=directory, env=env, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = json.loads((directory / "found.json").read_text())
    return results


@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("name", CASES)
def test_adapter_keeps_the_contract(found: dict[str, dict[str, str]], name: str, check: str) -> None:
    assert found[name][check] == "ok", found[name][check]
