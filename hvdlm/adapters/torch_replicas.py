"""What has to be equal on all workers while PyTorch trains: how it starts, its fingerprints, how it is mended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvdlm.adapters.torch_objects import state_of
from hvdlm.adapters.torch_state import broadcast_optimizer, broadcast_tensors, fingerprint
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.contracts import Fingerprint

__all__ = ["Replicas", "start_alike"]


def start_alike(
    models: Sequence[tuple[str, torch.nn.Module]],
    optimizers: Sequence[tuple[str, torch.optim.Optimizer]],
    groups: Sequence[Sequence[tuple[str, torch.nn.Parameter]]],
    wire: TorchWire,
    is_main: bool,
) -> None:
    """Give every rank the models and optimizers of rank 0.

    Args:
        models: (name, model).
        optimizers: (name, optimizer).
        groups: Lists of (name, parameter), with those that only optimizers know.
        wire: Collectives.
        is_main: Whether this is rank 0.
    """
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for where, model in models:
        for name, tensor in state_of(model):
            named.setdefault(id(tensor), (f"{where}.{name}", tensor))
    for group in groups:
        for name, p in group:
            named.setdefault(id(p), (name, p))
    broadcast_tensors(list(named.values()), wire)
    for where, optimizer in optimizers:
        broadcast_optimizer(where, optimizer, wire, is_main)


class Replicas:
    """The models and optimizers of one job.

    Left out are buffers that a module does not save (masks, caches, states carried from batch to batch), and under
    ``batch_norm="local"`` the running statistics of BatchNorm, which are each worker's own.
    """

    def __init__(self) -> None:
        self._models: list[tuple[str, torch.nn.Module]] = []
        self._optimizers: list[tuple[str, torch.optim.Optimizer]] = []
        self._local_norms = False

    def add(
        self,
        models: Sequence[tuple[str, torch.nn.Module]],
        optimizers: Sequence[tuple[str, torch.optim.Optimizer]],
        *,
        local_norms: bool,
    ) -> None:
        """Take in (name, object) pairs."""
        self._models += models
        self._optimizers += optimizers
        self._local_norms = local_norms

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """(name, tensor, whether it is a parameter), each tensor once."""
        seen: set[int] = set()
        for where, model in self._models:
            for name, p in model.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{where}.{name}", p, True
        for where, optimizer in self._optimizers:
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{where}.{i}", p, True
        for where, model in self._models:
            for prefix, module in model.named_modules():
                if self._local_norms and isinstance(module, _BatchNorm):
                    continue
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                        seen.add(id(buffer))
                        yield ".".join(filter(None, (where, prefix, name))), buffer, False

    def fingerprints(self) -> list[Fingerprint]:
        """See :class:`hvdlm.contracts.Adapter`."""
        return [Fingerprint(name, fingerprint(tensor), trained) for name, tensor, trained in self._tensors()]

    def resync(self, names: Sequence[str], root: int, wire: TorchWire, rank: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        wanted = set(names)
        broadcast_tensors([(name, tensor) for name, tensor, _ in self._tensors() if name in wanted], wire, root)
        for where, optimizer in self._optimizers:
            broadcast_optimizer(where, optimizer, wire, rank == root, root)
