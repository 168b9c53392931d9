"""Hosts that train on their own: the workers of one sum their gradients at every backward, over links inside it.

Under ``sync="local"`` with ``local_group="host"`` what travels between hosts is what
:class:`hvdlm.adapters.torch_local.LocalSync` sends every ``sync_every`` steps; inside, sums go over process sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.algorithms.hosts import host_ranks
from hvdlm.errors import ConfigError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

__all__ = ["Host", "HostReducer"]

Groups = Sequence[Sequence[tuple[str, torch.nn.Parameter]]]


class Host:
    """The workers of this host, and what they compute together of each batch.

    Args:
        wire: Collectives over all workers. Every one of them makes its host at the same time.
        world: Where this process stands.
        options: ``reduction`` says what a worker's gradient counts.

    Raises:
        ConfigError: The ranks of a host do not follow each other, or Horovod was started before hvdlm knew that there
            would be process sets.
    """

    def __init__(self, wire: TorchWire, world: World, options: Options) -> None:
        told = np.zeros((world.size, 2), dtype=np.int64)
        told[world.rank] = world.local_rank, world.local_size
        try:
            hosts = host_ranks([(int(rank), int(size)) for rank, size in wire.allreduce(told)])
        except ValueError as error:
            raise ConfigError(
                f'local_group="host": {error}.',
                hint="have the launcher fill one host after the other: mpirun --map-by slot, srun -m block",
            ) from None
        try:
            self.wire = wire.among(hosts)
        except ValueError as error:
            raise ConfigError(
                f'local_group="host" came after Horovod was started: {error}',
                hint="give it in the first call of hvdlm, or as a flag: --local-group host",
            ) from None
        self._mean = options.reduction == "mean"
        self._share: Share | None = None
        self._pending: _Together | None = None

    def part_of(self, share: Share) -> Share:
        """A worker's part of a batch, counting as a part of what its host computes. All workers of the host call it."""
        if self._pending is not None:
            self._pending.count()  # the batch before was not trained on: its sum must not wait for ever
        self._pending = together = _Together(self.wire, share, self._mean)
        self._share = share
        return dataclasses.replace(share, weigh=together.weight)

    @property
    def idle(self) -> bool:
        """Whether this host computes nothing of the batch."""
        return self._pending is not None and not self._pending.count()

    @property
    def share(self) -> Share | None:
        """This worker's samples of those of its host; where that has none, of its fillers."""
        share, together = self._share, self._pending
        if share is None or together is None:
            return None
        count = together.count()
        return (
            dataclasses.replace(share, total=count)
            if count
            else dataclasses.replace(share, count=1, total=self.wire.size)
        )


class _Together:
    """Samples that a host computes of one batch; waits for the other workers when first asked."""

    def __init__(self, wire: TorchWire, share: Share, mean: bool) -> None:
        self._own, self._total, self._mean = share.count, share.total, mean
        self._wait: Callable[[], Any] = wire.begin(np.array([share.count], dtype=np.int64), "hvdlm.host")
        self._count: int | None = None

    def count(self) -> int:
        if self._count is None:
            self._count = int(self._wait()[0])
        return self._count

    def weight(self) -> float:
        """What this worker's gradient counts in the sum over its host."""
        if not self._own:
            return 0.0
        # A loss that is a sum takes the step of the whole batch, from the part that the host computes.
        return (self._own if self._mean else self._total) / self.count()


class HostReducer(Reducer):
    """Sums gradients over the workers of a host.

    Args:
        host: The host.
        kwargs: See :class:`Reducer`.
    """

    def __init__(self, groups: Groups, host: Host, **kwargs: Any) -> None:
        self._host = host
        super().__init__(groups, wire=host.wire, size=host.wire.size, mean=True, **kwargs)

    @property
    def _counted(self) -> bool:
        # A host without samples steps along zeros, as a worker that trains alone does: a GradScaler wants gradients.
        return super()._counted or self._host.idle
