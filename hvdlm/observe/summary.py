"""The closing account of a run: ``summary.json`` in the run directory, and a few lines for the person."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdlm.private import open_private
from hvdlm.secrets import masked

__all__ = ["Summary", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. Counts are of the whole job, not of this worker."""

    framework: str
    world_size: int
    steps: int
    """Optimizer steps; training batches where no optimizer was seen."""
    samples_seen: int
    """Samples that gradients were computed from, over all workers and epochs."""
    samples_missing: int | None
    """Samples of completed epochs that no worker saw; None if the script draws its samples itself."""
    samples_repeated: int | None
    """How often a sample of a completed epoch was seen more than once."""
    loss_first: float | None
    """Mean training loss of the first step over its global batch."""
    loss_last: float | None
    samples_per_second: float
    seconds: float
    """From the first training batch to the end."""
    replicas_identical: bool | None
    """Whether the parameters are equal bit for bit on all workers at the end; None if it could not be asked."""
    options: dict[str, Any]
    shares: list[float] | None = None
    """Each worker's part of the samples that this start of the job computed, in rank order; None in one process."""
    skew: float | None = None
    """Largest over mean of a worker's homes per weight in the last epoch; None where samples have no homes."""
    resets: int = 0
    """Changes of the workers of an elastic job."""
    lost_steps: int = 0
    """Steps that were made again, because a worker was lost after the last commit."""
    samples_retrained: int = 0
    """Samples that were handed out again for it; they count once in ``samples_seen``."""
    recovery_seconds: float = 0.0
    """From the loss of a worker until the next step was completed, of all losses together."""

    def lines(self, path: Path) -> list[str]:
        """The account for a person, a line each, with the path of the whole of it."""
        workers = f"{self.world_size} worker" + ("s" if self.world_size > 1 else "")
        speed = f"{self.samples_per_second:,.1f} samples/s"
        rows = [("hvdlm", f"{self.framework} on {workers}: {self.steps:,} steps in {self.seconds:.1f} s, {speed}")]
        if self.loss_first is not None and self.loss_last is not None:
            rows.append(("loss", f"{self.loss_first:.4f} at the first step, {self.loss_last:.4f} at the last"))
        data = "drawn by the script"
        if self.samples_missing is not None:
            data = f"{self.samples_missing:,} missing, {self.samples_repeated:,} repeated"
        rows.append(("samples", f"{self.samples_seen:,} seen, {data}"))
        if self.resets:
            rows.append(
                (
                    "resets",
                    f"{self.resets}, {self.lost_steps:,} steps made again, {self.samples_retrained:,} samples read "
                    f"again, {self.recovery_seconds:.1f} s until training went on",
                )
            )
        if self.shares is not None and max(self.shares) > 1.02 * min(self.shares):
            shown = " ".join(f"{share:.1%}" for share in self.shares[:8]) + " ..." * (len(self.shares) > 8)
            rows.append(("shares", shown))
        replicas = {True: "identical bit for bit", False: "DIFFERENT", None: "not compared"}
        rows.append(("replicas", replicas[self.replicas_identical]))
        rows.append(("summary", str(path)))
        return [f"{title:<9} {text}" for title, text in rows]

    def write(self, directory: Path, secrets: Sequence[str] = ()) -> Path:
        """Write ``summary.json``, without ``secrets``; returns its path."""
        path = directory / "summary.json"
        write_json(path, asdict(self), secrets)
        return path


def write_json(path: Path, value: Any, secrets: Sequence[str] = ()) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one, and no reader ``secrets``."""
    partial = path.with_name(path.name + ".partial")
    with open_private(partial) as file:
        file.write(json.dumps(masked(_finite(value), secrets), indent=2) + "\n")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
