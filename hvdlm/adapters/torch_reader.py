"""Reads the batches of a person's DataLoader that this worker is told to read, and refuses loaders it could not."""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from hvdlm.adapters.torch_stream import is_stream
from hvdlm.adapters.torch_workers import EndsWithRank
from hvdlm.algorithms.ledger import Source, digest_of
from hvdlm.errors import DataError, RecognitionError
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.world import World

__all__ = ["Feed", "make_reader", "refuse", "source_of"]

_log = logging.getLogger("hvdlm")


class Feed:
    """A batch sampler that reads from whatever iterator of shares it was given last.

    DataLoader workers prefetch: ``taken`` holds the shares whose ids were handed to them but whose batches the script
    has not received yet, so that nothing is counted before it arrives. ``planned`` is the number of the next global
    batch whose share will be asked for.
    """

    def __init__(self) -> None:
        self._shares: Iterator[Share] = iter(())
        self.taken: collections.deque[Share] = collections.deque()
        self.planned = 0

    def start(self, shares: Iterator[Share], first_batch: int = 0) -> None:
        """Read from these shares from now on; the first is that of global batch ``first_batch``."""
        self._shares = shares
        self.planned = first_batch
        self.taken.clear()

    def __iter__(self) -> Iterator[Sequence[int]]:
        taken = self.taken
        for share in self._shares:
            taken.append(share)
            self.planned += 1
            yield share.ids.tolist()


def make_reader(loader: DataLoader[Any]) -> tuple[Feed, DataLoader[Any]]:
    """A DataLoader like the person's, over the same dataset, that reads the batches it is fed."""
    feed = Feed()
    more: dict[str, Any] = {}
    if loader.num_workers:
        more = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    reader: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=feed,  # type: ignore[arg-type]  # any iterable of lists
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=EndsWithRank(loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **more,
    )
    reader._hvdlm_reader = True  # it is fed shares already: see shard_loaders_over
    return feed, reader


def refuse(loader: DataLoader[Any], name: str, options: Options, world: World) -> None:
    """Raise for a loader that cannot be shared out rightly; warn of one that is a poor fit."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise RecognitionError(
            f"{name}: {type(loader).__name__} has its own __iter__, which hvdlm would bypass.",
            hint="pass a plain torch.utils.data.DataLoader",
        )
    if isinstance(loader.sampler, DistributedSampler):
        raise DataError(
            f"{name} has a DistributedSampler, which shares the data out already.",
            hint="drop the sampler and pass shuffle=True: hvdlm shares the data out",
        )
    if loader.batch_sampler is None:
        raise DataError(
            f"{name} has batch_size=None: hvdlm cannot cut batches that the dataset makes itself.",
            hint="give the DataLoader a batch_size, or a batch_sampler",
        )
    if is_stream(loader):
        if options.key != "none":
            raise DataError(
                f"{name} reads a stream, whose samples have no place to keep: each batch is cut in order, not by key.",
                hint="leave key out, or use a map-style dataset (hvdlm.sources.open_files for files)",
            )
        if options.partition == "random":
            raise DataError(
                f'{name} reads a stream, which partition="random" cannot shuffle: its order is its own.',
                hint='set partition="contiguous" (--partition contiguous) and shuffle in the dataset, by a buffer',
            )
        return
    try:
        num_samples = len(loader.dataset)  # type: ignore[arg-type]  # only of what has a length
    except TypeError:
        raise DataError(
            f"{name}: its dataset {type(loader.dataset).__name__} has no length.", hint="give the dataset a __len__"
        ) from None
    if num_samples == 0:
        raise DataError(f"{name}: its dataset is empty.", hint="check the path and the split the dataset is made from")
    if num_samples < world.size:
        raise DataError(
            f"{name}: its dataset has {num_samples} samples, fewer than the {world.size} workers.",
            hint=f"run with at most {num_samples} workers: hvdlm run -np {num_samples} ...",
        )
    if not hasattr(loader.batch_sampler, "__len__") or not _has_length(loader.sampler):
        raise DataError(
            f"{name}: its sampler has no length, and hvdlm draws an epoch's order before it shares it out.",
            hint="give the sampler a __len__, or use shuffle=True",
        )
    batch_size = loader.batch_size
    if batch_size is not None and batch_size < world.size and options.batch == "global" and options.partition != "none":
        _log.warning(
            "%s: a global batch of %d cannot keep %d workers busy; raise batch_size or set batch='per_worker'",
            name,
            batch_size,
            world.size,
        )


def _has_length(sampler: object) -> bool:
    try:
        return len(sampler) >= 0  # type: ignore[arg-type]  # only of what has a length
    except TypeError:
        return False


def source_of(loader: DataLoader[Any], *, seed: int, shuffled: bool, custom: bool) -> Source:
    """What a saved position in this loader refers to.

    Args:
        loader: The person's loader.
        seed: Of the order.
        shuffled: Whether hvdlm shuffles.
        custom: Whether the person's own sampler decides.
    """
    sampler = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    return Source(
        dataset=type(loader.dataset).__qualname__,
        num_samples=len(loader.dataset),  # type: ignore[arg-type]  # only of what has a length
        content=_content_of(loader.dataset),
        seed=seed,
        shuffled=shuffled,
        sampler=type(sampler).__qualname__ if custom else "",
    )


def _content_of(dataset: Any) -> str:
    """What the dataset calls itself, or a digest of three samples where reading one twice surely gives the same.

    Empty where neither is known.
    """
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    if type(dataset) is Subset:
        inner = _content_of(dataset.dataset)
        picked = [str(int(dataset.indices[i])) for i in _three(len(dataset))]
        return digest_of([inner.encode(), *(index.encode() for index in picked)])
    if type(dataset) is not TensorDataset:
        return ""
    rows = [tensor[i].detach().cpu().contiguous() for tensor in dataset.tensors for i in _three(len(dataset))]
    return digest_of([row.reshape(-1).view(torch.uint8).numpy().tobytes() for row in rows])


def _three(length: int) -> list[int]:
    return sorted({0, length // 2, length - 1})
