"""The batches that a person's own sampler draws: by rank 0, for all ranks, and the same again when a run goes on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.ledger import Ledger, digest_of
from hvdlm.contracts import Collectives
from hvdlm.errors import DataError
from hvdlm.options import Options
from hvdlm.world import World

__all__ = ["Draws", "is_custom"]


def is_custom(loader: DataLoader[Any]) -> bool:
    """Whether the order is the business of the person's own sampler."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return True
    if type(sampler) is RandomSampler:
        return sampler.replacement or sampler.num_samples != len(loader.dataset)  # type: ignore[arg-type]  # only of what has a length
    return type(sampler) is not SequentialSampler


class Draws:
    """An epoch's global batches from a sampler of the person's.

    Args:
        loader: The person's loader.
        name: Where it was found, for messages.
        options: What to do.
        world: Where this process stands.
        collectives: To send what rank 0 draws.
    """

    def __init__(
        self, loader: DataLoader[Any], name: str, options: Options, world: World, collectives: Collectives
    ) -> None:
        self._loader, self._name = loader, name
        self._options, self._world, self._collectives = options, world, collectives
        self._drawn = 0
        self._digest = ""

    def __len__(self) -> int:
        """Global batches of an epoch."""
        steps = len(self._loader.batch_sampler)  # type: ignore[arg-type]  # only of what has a length
        return -(-steps // self._world.size) if self._options.batch == "per_worker" else steps

    def digest_in(self, epoch: int) -> str:
        """Of what was drawn for an epoch, if that was the last draw."""
        return self._digest if epoch == self._drawn - 1 else ""

    def batches(self, done: int = 0) -> list[list[int]]:
        """The global batches of a new draw, without the first ``done`` samples."""
        batches = [batch for batch in self._draw() if batch]
        ends = list(itertools.accumulate(map(len, batches)))
        batches = [batch for batch, end in zip(batches, ends, strict=True) if end > done]
        if self._options.batch == "per_worker":
            step = self._world.size
            groups = [batches[i : i + step] for i in range(0, len(batches), step)]
            batches = [[sample for batch in group for sample in batch] for group in groups]
        return batches

    def replay(self, ledger: Ledger) -> list[list[int]]:
        """What the sampler draws in the epoch that a state was taken in, once it has drawn the epochs before.

        Raises:
            DataError: It draws otherwise than then.
        """
        while self._drawn < ledger.cursor.epoch:
            self._draw()
        batches = self.batches(ledger.cursor.samples)
        if ledger.drawn and ledger.drawn != self._digest:
            raise DataError(
                f"{self._name}: its sampler draws otherwise than in the run that the state was taken in.",
                hint="make it draw the same each time: seed its generator",
            )
        return batches

    def _draw(self) -> list[list[int]]:
        """The batches that the sampler makes on rank 0: its random choices differ between ranks."""
        if self._world.is_main:
            with torch.random.fork_rng(devices=[]):
                # A sampler without a generator of its own draws the same when a run goes on.
                torch.manual_seed(derive_seed("sampler", self._options.seed, self._drawn) >> 1)
                batches = [[int(i) for i in batch] for batch in self._loader.batch_sampler or ()]
            lengths = np.array([len(batch) for batch in batches], dtype=np.int64)
            flat = np.array([i for batch in batches for i in batch], dtype=np.int64)
            payload = np.concatenate(([len(lengths)], lengths, flat)).astype("<i8").tobytes()
        else:
            payload = b""
        payload = self._collectives.broadcast(payload)
        numbers = np.frombuffer(payload, dtype="<i8")
        lengths, flat = numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
        self._drawn += 1
        self._digest = digest_of([payload])
        return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []
