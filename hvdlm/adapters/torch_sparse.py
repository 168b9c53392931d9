"""Sums of sparse gradients: the rows of all workers, each once."""

from __future__ import annotations

import torch

from hvdlm.adapters.torch_wire import TorchWire

__all__ = ["sum_rows"]


def sum_rows(
    p: torch.nn.Parameter, grad: torch.Tensor | None, weight: float, wire: TorchWire, prefix: str, name: str
) -> torch.Tensor | None:
    """The rows of all workers, duplicates added; None if no worker with samples has any.

    Args:
        p: The parameter.
        grad: This worker's gradient, sparse along the first axis or dense; None where it counts for nothing.
        weight: What it counts.
        wire: Collectives.
        prefix: Of their names.
        name: The parameter's.
    """
    if grad is not None and not grad.is_sparse:
        grad = grad.to_sparse(1)
    if grad is None:
        indices, values = torch.empty(0, dtype=torch.int64), torch.empty(0, *p.shape[1:], dtype=p.dtype)
    else:
        grad = grad.coalesce()
        indices, values = grad.indices()[0], grad.values() * weight
    used = torch.tensor([int(grad is not None)], dtype=torch.int32)
    handle = wire.start(used, f"{prefix}.used.{name}")
    indices = wire.gather(indices.to(p.device), f"{prefix}.indices.{name}")
    values = wire.gather(values.to(p.device), f"{prefix}.values.{name}")
    wire.wait(handle)
    if not int(used):
        return None
    return torch.sparse_coo_tensor(indices[None], values, p.shape, check_invariants=False).coalesce()
