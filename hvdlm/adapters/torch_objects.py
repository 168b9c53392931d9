"""The person's torch objects: what they hold, which are refused, and loaders the script makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from hvdlm.adapters.torch_loader import ShardedLoader
from hvdlm.adapters.torch_stream import is_stream
from hvdlm.contracts import Kind
from hvdlm.errors import RecognitionError

__all__ = [
    "kind_of",
    "like",
    "refuse_model",
    "refuse_optimizer",
    "shard_loaders_over",
    "signature_of",
    "sparse_parameters",
    "state_of",
]


def kind_of(value: object) -> Kind | None:
    """What a value is to PyTorch, None if nothing."""
    kinds: tuple[tuple[type, Kind], ...] = (
        (torch.nn.Module, "model"),
        (torch.optim.Optimizer, "optimizer"),
        (DataLoader, "loader"),
        (Dataset, "dataset"),
        (LRScheduler, "scheduler"),
        (torch.amp.GradScaler, "scaler"),
    )
    return next((kind for cls, kind in kinds if isinstance(value, cls)), None)


def like(value: float, example: Any) -> Any:
    """``value`` as the type of ``example``: a tensor for a tensor."""
    if isinstance(example, torch.Tensor):
        dtype = example.dtype if example.dtype.is_floating_point else torch.get_default_dtype()
        return torch.tensor(value, dtype=dtype, device=example.device).reshape(example.shape)
    return value


def signature_of(found: Sequence[tuple[str, Kind, Any]]) -> list[str]:
    """See :meth:`hvdlm.contracts.Adapter.signature`."""
    lines = []
    for where, kind, value in found:
        if kind == "model":
            for name, tensor in state_of(value):
                lines.append(f"{where}.{name}: {tuple(tensor.shape)} {tensor.dtype} grad={tensor.requires_grad}")
        elif kind == "optimizer":
            sizes = [len(group["params"]) for group in value.param_groups]
            lines.append(f"{where}: {type(value).__name__} over {sizes} parameters")
        elif kind == "loader":
            samples = "a stream" if is_stream(value) else f"{len(value.dataset)} samples"
            lines.append(f"{where}: {samples}, batch_size={value.batch_size}")
    return lines


def state_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a model by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def refuse_model(where: str, model: torch.nn.Module) -> None:
    """Raise RecognitionError for a model that synchronises by itself or has no shape yet."""
    if type(model).__name__ in {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}:
        raise RecognitionError(
            f"{where} is a {type(model).__name__}, which synchronises by itself.",
            hint="pass the plain module (model.module) and drop the wrapper: hvdlm synchronises",
        )
    lazy = [n for n, p in model.named_parameters() if isinstance(p, torch.nn.parameter.UninitializedParameter)]
    if lazy:
        raise RecognitionError(
            f"{where}.{lazy[0]} has no shape yet (a lazy module).", hint="run one forward pass before hvdlm gets it"
        )


def refuse_optimizer(where: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise RecognitionError for an optimizer that sums gradients by itself."""
    if hasattr(optimizer, "skip_synchronize"):
        raise RecognitionError(
            f"{where} is a horovod.torch.DistributedOptimizer, which sums gradients by itself.",
            hint="pass the plain optimizer: hvdlm sums gradients",
        )


def shard_loaders_over(datasets: dict[int, str], sharded: Callable[[str, DataLoader[Any]], ShardedLoader]) -> Any:
    """Share out the DataLoaders that the script makes itself over datasets it was given. Returns the undo.

    While this holds, iterating such a loader iterates its sharded stand-in.
    """
    original_iter, original_len = DataLoader.__iter__, DataLoader.__len__
    stand_ins: dict[int, tuple[DataLoader[Any], ShardedLoader]] = {}

    def stand_in(loader: DataLoader[Any]) -> ShardedLoader | None:
        dataset = loader.dataset
        while id(dataset) not in datasets and hasattr(dataset, "dataset"):
            dataset = dataset.dataset  # a Subset, as random_split makes
        if id(dataset) not in datasets or getattr(loader, "_hvdlm_reader", False):
            return None
        if id(loader) not in stand_ins:
            where = f"{datasets[id(dataset)]} loader {len(stand_ins)}"
            stand_ins[id(loader)] = (loader, sharded(where, loader))
        return stand_ins[id(loader)][1]

    def iterate(self: DataLoader[Any]) -> Any:
        own = stand_in(self)
        return original_iter(self) if own is None else iter(own)

    def length(self: DataLoader[Any]) -> int:
        own = stand_in(self)
        return original_len(self) if own is None else len(own)

    DataLoader.__iter__, DataLoader.__len__ = iterate, length  # type: ignore[method-assign]  # until it is undone

    def undo() -> None:
        DataLoader.__iter__, DataLoader.__len__ = original_iter, original_len  # type: ignore[method-assign]  # until it is undone

    return undo


def sparse_parameters(models: Iterable[torch.nn.Module]) -> frozenset[int]:
    """``id`` of the weights of embeddings whose gradients are sparse."""
    modules = (module for model in models for module in model.modules())
    embeddings = (m for m in modules if isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag)))
    return frozenset(id(m.weight) for m in embeddings if m.sparse)
