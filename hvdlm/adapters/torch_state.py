"""State that has to be equal on all workers before the first step: parameters, buffers, optimizer state.

Nothing is pickled: structure travels as JSON, tensors as their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import xxhash

from hvdlm.adapters.torch_wire import TorchWire

__all__ = ["broadcast_optimizer", "broadcast_tensors", "digest", "fingerprint"]


def broadcast_tensors(named: Sequence[tuple[str, torch.Tensor]], wire: TorchWire, root: int = 0) -> None:
    """Overwrite tensors with those of rank ``root``, bit for bit, whatever their data type.

    Args:
        named: (name, tensor); names, shapes and types equal on all ranks.
        wire: Collectives.
        root: Whose tensors are right.
    """
    handles = []
    with torch.no_grad():
        for name, tensor in named:
            if tensor.numel() == 0:
                continue
            flat = tensor.detach().contiguous().reshape(-1)
            # As bytes, since Horovod knows neither bfloat16 nor complex numbers.
            handles.append((wire.send(flat.view(torch.uint8), f"hvdlm.state.{name}", root), flat, tensor))
        for handle, flat, tensor in handles:
            wire.wait(handle)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))


def broadcast_optimizer(
    name: str, optimizer: torch.optim.Optimizer, wire: TorchWire, is_root: bool, root: int = 0
) -> None:
    """Give every rank the optimizer state and hyper-parameters of rank ``root``.

    Values that are neither numbers, strings, tensors nor containers of these (callables) stay as they are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: list[torch.Tensor] = []
    payload = b""
    if is_root:
        numbers = {id(p): i for i, p in enumerate(parameters)}
        state = {numbers[id(p)]: value for p, value in optimizer.state.items() if id(p) in numbers}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        payload = json.dumps(_encode([sorted(state.items()), groups], tensors)).encode()
    payload = wire.broadcast(payload, root)
    if is_root:
        broadcast_tensors([(f"{name}.{i}", tensor) for i, tensor in enumerate(tensors)], wire, root)
        return
    state, groups = _decode(json.loads(payload), tensors)
    broadcast_tensors([(f"{name}.{i}", tensor) for i, tensor in enumerate(tensors)], wire, root)
    optimizer.state.clear()
    for number, values in state:
        p = parameters[number]
        optimizer.state[p] = _placed(values, p.device)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in _placed(values, None).items() if v is not _LOCAL})


class _Local:
    """Stands for a value that each rank keeps for itself."""


_LOCAL = _Local()


def _encode(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"t": [list(value.shape), str(value.dtype).removeprefix("torch."), value.device.type == "cpu"]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_encode(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"d": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    return {"x": None}


def _decode(value: Any, tensors: list[torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        tensor = torch.zeros(content[0], dtype=getattr(torch, content[1]))
        tensor._hvdlm_on_cpu = content[2]  # type: ignore[attr-defined]  # a mark of ours
        tensors.append(tensor)
        return tensor
    if kind in "lu":
        items = [_decode(v, tensors) for v in content]
        return items if kind == "l" else tuple(items)
    return {_decode(k, tensors): _decode(v, tensors) for k, v in content} if kind == "d" else _LOCAL


def _placed(value: Any, device: torch.device | None) -> Any:
    """Tensors that were not on the CPU of rank 0 go to the parameter's device."""
    if isinstance(value, torch.Tensor):
        return value if device is None or value._hvdlm_on_cpu else value.to(device)  # type: ignore[attr-defined]  # a mark of ours
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _placed(v, device) for k, v in value.items()}
    return value


def fingerprint(tensor: torch.Tensor) -> int:
    """64 bits of XXH3 over a tensor's bytes."""
    return xxhash.xxh3_64_intdigest(_bytes_of(tensor))


def digest(tensors: Iterable[torch.Tensor]) -> bytes:
    """XXH3-128 of the tensors' bytes, in order: equal on two ranks if and (all but certainly) only if they are."""
    hasher = xxhash.xxh3_128()
    for tensor in tensors:
        hasher.update(_bytes_of(tensor))
    return hasher.digest()


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
