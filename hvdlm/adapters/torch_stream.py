"""Training batches from data without numbers or a known end: ``IterableDataset``, ``hvdlm.sources.Stream``.

Every worker reads the whole stream, with the person's loader settings, and keeps its part of each batch, cut in rank
order. The order is the stream's own whatever the number of workers. One batch is read ahead, and while the script works
on the one before, all workers tell each other how long theirs is and what it begins with: streams that end apart or
differ end in an error on every rank and not in a job that hangs.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset

from hvdlm.adapters.torch_random import RandomStreams
from hvdlm.adapters.torch_workers import EndsWithRank
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.ledger import Source
from hvdlm.algorithms.partition import split_shares
from hvdlm.contracts import Collectives
from hvdlm.errors import DataError
from hvdlm.plan import Partition, Share
from hvdlm.sources.stream import Stream

__all__ = ["StreamFeed", "is_stream"]

Counts = npt.NDArray[np.int64]

_MARKED_BYTES = 1 << 16
"""Longest piece of a sample that is compared between workers."""


def is_stream(loader: DataLoader[Any]) -> bool:
    """Whether a loader's samples come one after the other, without numbers."""
    return isinstance(loader.dataset, IterableDataset | Stream)


class _Piece(NamedTuple):
    """What a loader worker hands over of one global batch."""

    total: int
    """Samples of the global batch."""
    mark: int
    """Stands for the first of them."""
    data: Any
    """This worker's part, collated; all samples where the cut is not known yet."""


class _Cut:
    """A collate function that keeps this worker's part. Runs in the loader's processes.

    Args:
        collate: The person's.
        partition: How batches are cut; None if it changes while they are read ahead.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], partition: Partition | None) -> None:
        self._collate, self._partition = collate, partition

    def __call__(self, samples: list[Any]) -> _Piece:
        kept = samples
        if self._partition is not None:
            kept = self._collate(_part(samples, self._partition)[0])
        return _Piece(len(samples), _mark(samples[0]), kept)


class _Samples(IterableDataset[Any]):
    """A Stream as PyTorch knows it."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)


class StreamFeed:
    """Reads a loader over a stream.

    Args:
        loader: The person's loader.
        name: Where it was found, for messages.
        seed: Of the random choices that the stream makes.
        batch_size: Samples per global batch.
        rank: This worker.
        size: Number of workers.
        collectives: To compare what workers read; may have ``begin(array)``, which returns what waits for the sum.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        name: str,
        seed: int,
        batch_size: int,
        rank: int,
        size: int,
        collectives: Collectives,
    ) -> None:
        self._loader, self._name, self._seed = loader, name, seed
        self._batch_size = batch_size
        self._rank, self._size, self._collectives = rank, size, collectives
        self._pending: Callable[[], Counts] | None = None
        self.planned = 0
        """The number of the next global batch that will be read."""
        if isinstance(loader.dataset, Stream) and loader.num_workers > 1:
            raise DataError(
                f"{name} reads a Stream in {loader.num_workers} loader workers, each of which would read all of it.",
                hint="use num_workers=1, or an IterableDataset that shares itself out by get_worker_info()",
            )

    def source(self) -> Source:
        """What a saved position in this stream refers to."""
        workers = self._loader.num_workers
        # With several loader workers their batches take turns, so that the order depends on both numbers.
        turns = f" in {workers} loader workers" if workers > 1 else ""
        return Source(
            dataset=type(self._loader.dataset).__qualname__,
            num_samples=0,
            seed=self._seed,
            shuffled=False,
            sampler=f"stream by {self._batch_size}{turns}",
        )

    def num_batches(self) -> int:
        """Global batches of an epoch, if the dataset says how many samples it has.

        Raises:
            TypeError: It does not.
        """
        num = len(self._loader.dataset)  # type: ignore[arg-type]  # only of what has a length
        return num // self._batch_size if self._loader.drop_last else -(-num // self._batch_size)

    def batches(
        self, epoch: int, partition_at: Callable[[int], Partition], *, fixed: bool, first_batch: int = 0, start: int = 0
    ) -> Iterator[tuple[Share, Any]]:
        """This worker's share of each global batch of an epoch, and its data.

        Args:
            epoch: Which one: random choices of the stream are a function of it, and ``set_epoch`` is told.
            partition_at: How the batch of a number is cut.
            fixed: Whether that is the same for all, so that loader workers may cut.
            first_batch: Batches that were trained on before; they are read again and thrown away.
            start: Samples in these.

        Raises:
            DataError: The stream is empty, ends before ``start``, or is another on another rank.
        """
        if self._pending is not None:
            self._pending()  # the script left the last epoch early: what was begun has to end first
        pieces = self._pieces(epoch, partition_at(first_batch) if fixed else None, first_batch, start)
        number, position = first_batch, start
        piece, agreed = self._next(pieces)
        while True:
            self._pending = None
            self._compare(agreed(), number)
            if piece is None:
                break
            # The next one is read, and compared, while the script works on this one.
            following, agreed = self._next(pieces)
            self.planned = number + 2
            partition = partition_at(number)
            share = _share(piece.total, position, partition)
            data = piece.data if fixed else self._loader.collate_fn(_part(piece.data, partition)[0])
            number, position = number + 1, position + piece.total
            piece = following
            yield share, data
        if position == 0:
            raise DataError(f"{self._name}: the stream is empty.", hint="check what the samples are made from")

    def evaluation(self, number: int, partition: Partition) -> Iterator[tuple[Share, Any]]:
        """This worker's share of an evaluation; no rank waits for another."""
        position = 0
        for piece in self._pieces(number, partition, 0, 0):
            share = _share(piece.total, position, partition)
            position += piece.total
            if not share.is_filler:
                yield share, piece.data

    def _pieces(self, epoch: int, partition: Partition | None, skipped: int, start: int) -> Iterator[_Piece]:
        dataset = self._loader.dataset
        set_epoch = getattr(dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        seed = derive_seed("stream", self._seed, epoch) >> 1
        reader = self._reader(_Cut(self._loader.collate_fn, partition), torch.Generator().manual_seed(seed))
        streams = RandomStreams(seed)
        with streams:
            found = iter(reader)
        done = 0
        for _ in range(skipped):
            with streams:
                piece = next(found, None)
            done += 0 if piece is None else piece.total
        if done != start:
            raise DataError(
                f"{self._name}: {skipped} batches of the stream hold {done} samples; {start} were trained on before.",
                hint="resume with the data that the run was started with",
            )
        while True:
            with streams:
                piece = next(found, None)
            if piece is None:
                return
            yield piece

    def _reader(self, cut: _Cut, generator: torch.Generator) -> DataLoader[Any]:
        loader, dataset = self._loader, self._loader.dataset
        more: dict[str, Any] = {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
        reader: DataLoader[Any] = DataLoader(
            _Samples(dataset) if isinstance(dataset, Stream) else dataset,
            batch_size=self._batch_size,
            drop_last=bool(loader.drop_last),
            # Workers of an epoch start anew: one that lasted would go on with random streams of the epoch before.
            num_workers=loader.num_workers,
            collate_fn=cut,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=EndsWithRank(loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            generator=generator,
            **more,
        )
        reader._hvdlm_reader = True  # see shard_loaders_over
        return reader

    def _next(self, pieces: Iterator[_Piece]) -> tuple[_Piece | None, Callable[[], Counts]]:
        """The next piece of this worker, and what waits for all workers' [samples] and [mark] of theirs."""
        piece = next(pieces, None)
        own = np.zeros(2 * self._size, dtype=np.int64)
        if piece is not None:
            own[self._rank], own[self._size + self._rank] = piece.total, piece.mark
        if self._size == 1:
            return piece, lambda: own
        begin = getattr(self._collectives, "begin", None)
        if begin is not None:
            self._pending = begin(own, f"hvdlm.stream.{self._name}")
            return piece, self._pending
        return piece, functools.partial(self._collectives.allreduce, own)

    def _compare(self, counts: Counts, number: int) -> None:
        totals, marks = counts[: self._size].tolist(), counts[self._size :].tolist()
        hint = "every worker has to read the same stream: do not split it by rank, and seed what is drawn at random"
        if len(set(totals)) > 1:
            told = ", ".join(f"rank {rank}: {n}" for rank, n in enumerate(totals[:8]))
            raise DataError(
                f"{self._name}: batch {number} of the stream does not have as many samples on each rank ({told}).",
                hint=hint,
            )
        if len(set(marks)) > 1:
            raise DataError(f"{self._name}: batch {number} of the stream begins otherwise on other ranks.", hint=hint)


def _part(samples: list[Any], partition: Partition) -> tuple[list[Any], int]:
    """This worker's samples of a batch, and where they begin; the first one as a filler if there are none."""
    if partition.strategy == "none" or partition.size == 1:
        return samples, 0
    ends = np.cumsum(split_shares(len(samples), partition.shares)).tolist()
    start, end = ([0, *ends])[partition.rank : partition.rank + 2]
    return (samples[start:end], start) if end > start else (samples[:1], 0)


def _share(total: int, position: int, partition: Partition) -> Share:
    """The share of a batch whose first sample has this position in the stream."""
    everyone = partition.strategy == "none"
    count = total if everyone or partition.size == 1 else int(partition.counts(total)[partition.rank])
    own, start = _part(list(range(total)), partition)
    ids = np.arange(position + start, position + start + len(own), dtype=np.int64)
    return Share(ids, count, total * partition.size if everyone else total)


def _mark(sample: Any, depth: int = 0) -> int:
    """A checksum of what is cheap to compare of a sample; 0 for what is not."""
    if isinstance(sample, torch.Tensor):
        if sample.numel() * sample.element_size() > _MARKED_BYTES or sample.layout is not torch.strided:
            return int(sample.numel())
        return zlib.crc32(sample.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(sample, np.ndarray):
        return zlib.crc32(sample.tobytes()) if 0 < sample.nbytes <= _MARKED_BYTES and sample.dtype != object else 0
    if isinstance(sample, str | bytes):
        data = sample.encode("utf-8", "surrogatepass") if isinstance(sample, str) else sample
        return zlib.crc32(data[:_MARKED_BYTES])
    if isinstance(sample, int | float | np.generic):
        return zlib.crc32(repr(sample).encode())
    if depth < 3 and isinstance(sample, Mapping | list | tuple):
        parts = sample.values() if isinstance(sample, Mapping) else sample[:1024]
        marks = [_mark(part, depth + 1) for part in parts]
        return zlib.crc32(np.array(marks, dtype=np.int64).tobytes())
    return 0
