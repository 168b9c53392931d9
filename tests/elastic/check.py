"""What holds at the end of every job, whatever happened to its workers."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from tests.elastic.jobs import Ended, load

STEPS, SAMPLES = 72, 3 * 188
_OURS = ("run", "hosts", "output", "slow", "final.pt", "final.npz", "checkpoints", "fault-*", "lossy-*", "tmp")
"""What a job of these tests may leave in its directory."""


def complaint(
    ended: Ended, wanted: dict[str, Any], counted: bool = True, parameters: float = 5e-5, loss: float = 1e-3
) -> str | None:
    """What is wrong with it, None if nothing: complete, every sample once, the model of an undisturbed run.

    Args:
        ended: The job.
        wanted: The end of a training in one process that nothing disturbed.
        counted: Whether its data is such that samples can be told apart; else the model alone tells.
        parameters: How far each may be from the wanted one, of its norm.
        loss: How far the loss may be from the wanted one, of it.
    """
    if ended.code != 0:
        return f"exit code {ended.code}:\n{ended.output}"
    summary = ended.summary
    counts = [summary.get(name) for name in ("samples_missing", "samples_repeated", "steps", "samples_seen")]
    if counts != [*([0, 0] if counted else [None, None]), STEPS, SAMPLES]:
        return f"missing, repeated, steps, seen: {counts}\n{ended.output}"
    if summary["replicas_identical"] is not True:
        return f"replicas differ\n{ended.output}"
    if (ended.events[-1]["event"], ended.events[-1]["how"]) != ("over", "done"):
        return f"the last event is {ended.events[-1]}"
    left = _left_behind(ended.directory)
    if left:
        return f"files are left behind: {left}"
    own = load(ended.directory)
    for name, value in wanted["model"].items():
        error = np.linalg.norm(own["model"][name] - value) / np.linalg.norm(value)
        if not error <= parameters:
            return f"{name} differs by {error}\n{ended.output}"
    for name in ("best", "lr"):
        if not np.allclose(own[name], wanted[name], rtol=loss):
            return f"{name} is {own[name]}, not {wanted[name]}\n{ended.output}"
    return None


def _left_behind(directory: Path) -> list[str]:
    strange = [path for path in directory.iterdir() if not any(fnmatch.fnmatch(path.name, name) for name in _OURS)]
    strange += [path for path in directory.glob("checkpoints/*") if not fnmatch.fnmatch(path.name, "step-*")]
    # Frameworks keep files of their own there.
    strange += directory.glob("tmp/*hvdlm*")
    return sorted(str(path.relative_to(directory)) for path in strange)
