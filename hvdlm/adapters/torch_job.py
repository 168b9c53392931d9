"""What the replicas of one job share."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.contracts import Recorder
from hvdlm.options import Options
from hvdlm.world import World

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What the replicas of a job are kept together with."""

    options: Options
    """``sync`` and what goes with it, ``compression``, ``reduction``."""
    world: World
    """Where this process stands."""
    wire: TorchWire
    """Collectives over all workers."""
    recorder: Recorder
    """Told of each reduction."""
