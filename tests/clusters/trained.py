"""A train function that is the same on every engine: the GPT example, small, and what it has to come to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.multiprocess.workers import ROOT

WORDS = ["--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "128", "--block-size", "64", "--epochs", "1"]


def train_the_gpt_example() -> int:
    """Run the decorated function of ``examples/gpt_torch`` in this process; returns the number of workers."""
    import sys

    path = ROOT / "examples" / "gpt_torch" / "train_hvdlm.py"
    spec = importlib.util.spec_from_file_location("train_hvdlm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.argv = [str(path), *WORDS]
    spec.loader.exec_module(module)
    module.main()
    import hvdlm

    return hvdlm.size()


def check_summary(run_dir: Path, workers: int) -> dict[str, Any]:
    """No sample missing or repeated, replicas identical."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == workers and summary["replicas_identical"] is True
    assert (summary["samples_missing"], summary["samples_repeated"]) == (0, 0)
    return summary
