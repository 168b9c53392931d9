"""Takes the state of torch objects into a :class:`hvdlm.state.snapshot.Snapshot`, and puts it back in place."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from hvdlm.adapters.torch_loader import ShardedLoader
from hvdlm.adapters.torch_lr import multiply_learning_rates
from hvdlm.adapters.torch_objects import state_of
from hvdlm.errors import CheckpointError
from hvdlm.state.snapshot import LOCAL, Bytes, Entry, Gatherer, Leaf, Snapshot, is_whole, rebuild

__all__ = ["Stateful", "capture", "restore"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_log = logging.getLogger("hvdlm")
_told: set[str] = set()
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def leaf_of(value: Any) -> Leaf | None:
    """How a tensor is kept; None for other values."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return None
    nbytes = value.numel() * value.element_size()
    more: dict[str, Any] = {"cpu": True} if value.device.type == "cpu" else {}
    if value.dtype in _NAMES:
        return Leaf(_NAMES[value.dtype], tuple(value.shape), nbytes, more)
    name = str(value.dtype).removeprefix("torch.")
    return Leaf("U8", (nbytes,), nbytes, {**more, "as": name, "shape": list(value.shape)})


def copy_to(value: torch.Tensor, out: Bytes) -> None:
    """A tensor's bytes, from whatever device."""
    source = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if value.device.type == "cpu":
        # NumPy copies in the thread that asks, unlocked: torch would wake threads that compute for the training.
        np.copyto(out, source.numpy())
    else:
        torch.from_numpy(out).copy_(source)


def _view(mark: Mapping[str, Any], entry: Entry, data: Bytes) -> torch.Tensor:
    """A tensor over the snapshot's bytes: to be copied from."""
    dtype = getattr(torch, mark["as"]) if "as" in mark else _DTYPES[entry.dtype]
    shape = mark["shape"] if "as" in mark else entry.shape
    if not len(data):
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(tuple(shape))


def _made(mark: Mapping[str, Any], entry: Entry, data: Bytes) -> torch.Tensor:
    tensor = _view(mark, entry, data).clone()
    tensor._hvdlm_on_cpu = mark.get("cpu", False)  # type: ignore[attr-defined]  # a mark of ours
    return tensor


@dataclass(frozen=True, kw_only=True)
class Stateful:
    """What has state in a training, each kind in an order that is the same in each run of the script."""

    models: Sequence[torch.nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[LRScheduler]
    scalers: Sequence[torch.amp.GradScaler]
    loaders: Mapping[str, ShardedLoader]
    loose: Sequence[torch.nn.Parameter]
    """Parameters that only an optimizer knows."""


def capture(of: Stateful, kept: Mapping[str, Any], old: Snapshot | None, later: bool = False) -> Snapshot:
    """The state of all of these; warns once of what cannot be kept.

    Args:
        of: The objects.
        kept: What hvdlm and the person keep beside, by name.
        old: A snapshot that may be overwritten.
        later: Whether parameters and what optimizers remember may be copied until the next step.
    """
    gather = Gatherer(leaf_of, copy_to)
    positions = {name: loader.state_dict() for name, loader in of.loaders.items()}
    tree: dict[str, Any] = {
        "models": [
            {name: _add(gather, tensor, f"{_title('model', i)}.{name}") for name, tensor in state_of(model)}
            for i, model in enumerate(of.models)
        ],
        "loose": [_add(gather, p, f"parameter{i}") for i, p in enumerate(of.loose)],
        "optimizers": [
            gather.add_calm(_optimizer_state(optimizer), _title("optimizer", i))
            for i, optimizer in enumerate(of.optimizers)
        ],
        "schedulers": [gather.add(s.state_dict(), _title("scheduler", i)) for i, s in enumerate(of.schedulers)],
        "scalers": [gather.add(s.state_dict(), _title("scaler", i)) for i, s in enumerate(of.scalers)],
        # Those that nothing was trained on yet, or ever, have no position.
        "loaders": {name: state for name, state in positions.items() if any(state["cursor"].values())},
        "kept": {name: gather.add(value, name) for name, value in kept.items()},
    }
    if tree["loaders"]:  # a script that draws its batches by hand draws them again on its way
        streams = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
        tree["random"] = gather.add(streams, "random")
    for name in gather.dropped:
        if name not in _told:
            _told.add(name)
            _log.warning("%s cannot be kept with the state: a run that goes on uses what the script makes", name)
    on_cpu = all(p.device.type == "cpu" for model in of.models for p in model.parameters())
    return gather.pack(tree, old, _version if later and on_cpu else None)


def _add(gather: Gatherer, tensor: torch.Tensor, name: str) -> Any:
    """Buffers may change in a forward; parameters do not."""
    return (gather.add_calm if isinstance(tensor, torch.nn.Parameter) else gather.add)(tensor, name)


def _version(tensor: torch.Tensor) -> int:
    return tensor._version


def _title(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}{number}"


def _optimizer_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {numbers[id(p)]: value for p, value in optimizer.state.items() if id(p) in numbers}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [sorted(state.items()), groups, len(numbers)]


def restore(of: Stateful, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
    """Put a state back, in place.

    Args:
        of: The objects, in the order of :func:`capture`.
        snapshot: The state.
        whole: Else only models.
        lr_factor: What learning rates are multiplied by.

    Returns:
        What hvdlm and the person keep beside.

    Raises:
        CheckpointError: It is of other objects; names the first difference.
    """
    tree = snapshot.tree
    for i, (model, marks) in enumerate(zip(of.models, tree["models"], strict=False)):
        own = dict(state_of(model))
        _compare_model(_title("model", i), own, marks, snapshot)
        for name, tensor in own.items():
            mark = marks[name]
            # Past autograd: a script without loaders arrives between a forward and its backward.
            tensor.data.copy_(_view(mark, snapshot.entries[mark["t"]], snapshot.bytes_of(mark["t"])))
    for p, mark in zip(of.loose, tree["loose"], strict=False):
        p.data.copy_(_view(mark, snapshot.entries[mark["t"]], snapshot.bytes_of(mark["t"])))
    for model in of.models:
        model.zero_grad()  # of a step that was not completed
    if not whole:
        return {}
    _compare_numbers(of, tree)
    for i, (optimizer, state) in enumerate(zip(of.optimizers, tree["optimizers"], strict=True)):
        _load_optimizer(_title("optimizer", i), optimizer, rebuild(snapshot, state, _made))
    for scheduler, state in zip(of.schedulers, tree["schedulers"], strict=True):
        values = rebuild(snapshot, state, _made)
        scheduler.load_state_dict({**scheduler.state_dict(), **{k: v for k, v in values.items() if is_whole(v)}})
    multiply_learning_rates(of.optimizers, of.schedulers, lr_factor)
    for scaler, state in zip(of.scalers, tree["scalers"], strict=True):
        values = rebuild(snapshot, state, _made)
        if values:
            scaler.load_state_dict(values)
    for name, loader in of.loaders.items():
        if name in tree["loaders"]:
            loader.load_state_dict(tree["loaders"][name])
    if "random" in tree:
        drawn, numpy_state, python_state = rebuild(snapshot, tree["random"], _made)
        torch.set_rng_state(drawn)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    return {name: rebuild(snapshot, value, _made) for name, value in tree["kept"].items()}


def _compare_model(where: str, own: Mapping[str, torch.Tensor], marks: Mapping[str, Any], snapshot: Snapshot) -> None:
    def here(name: str) -> str:
        leaf = leaf_of(own[name]) if name in own else None
        return "nothing" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"

    def there(name: str) -> str:
        if name not in marks:
            return "nothing"
        entry = snapshot.entries[marks[name]["t"]]
        return f"{entry.dtype} {list(entry.shape)}"

    for name in dict.fromkeys([*own, *marks]):
        if here(name) != there(name):
            raise CheckpointError(
                f"the state to go on from is of another model. First difference: {where}.{name} is {here(name)} in "
                f"this model, and {there(name)} in the state.",
                hint="build the model as in the run that wrote it, or give another --checkpoint-dir",
            )


def _compare_numbers(of: Stateful, tree: Mapping[str, Any]) -> None:
    for kind in ("models", "optimizers", "schedulers", "scalers"):
        own, kept = len(getattr(of, kind)), len(tree[kind])
        if own != kept:
            raise CheckpointError(
                f"the state to go on from has {kept} {kind}, and this script has {own}.",
                hint="run the script that wrote it, or give another --checkpoint-dir",
            )


def _load_optimizer(name: str, optimizer: torch.optim.Optimizer, value: Any) -> None:
    state, groups, number = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if number != len(parameters) or len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the state to go on from is of another optimizer: {name} has {len(parameters)} parameters in "
            f"{len(optimizer.param_groups)} groups, and {number} in {len(groups)} in the state.",
            hint="make the optimizer as in the run that wrote it, or give another --checkpoint-dir",
        )
    optimizer.state.clear()
    for at, values in state:
        p = parameters[at]
        optimizer.state[p] = _placed(values, p.device)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: _placed(v, None) for k, v in values.items() if is_whole(v)})


def _placed(value: Any, device: torch.device | None) -> Any:
    """Tensors that were not on the CPU go to the parameter's device."""
    if isinstance(value, torch.Tensor):
        return value if device is None or value._hvdlm_on_cpu else value.to(device)  # type: ignore[attr-defined]  # a mark of ours
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(v, device) for v in value)
    return {k: _placed(v, device) for k, v in value.items() if v is not LOCAL} if isinstance(value, dict) else value
