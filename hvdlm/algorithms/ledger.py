"""What has been trained on, in a few plain values: with them a run goes on at any number of workers.

The order of samples is a function of seed and epoch, and who computes what has no influence on it, so one position per
loader says everything: samples before it are done, the others are not. As in the consistent cuts of Chandy & Lamport
("Distributed snapshots", ACM TOCS 1985), it is to be saved together with the model it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hvdlm.errors import DataError

__all__ = ["VERSION", "Cursor", "Ledger", "Source", "compare", "digest_of"]

VERSION = 1
"""Of the JSON form."""


@dataclass(frozen=True)
class Cursor:
    """Where the next sample to train on stands."""

    epoch: int = 0
    batch: int = 0
    """Global batches of the epoch that are done; the next one has this number, and random streams with it."""
    samples: int = 0
    """Samples of the epoch that are done: the position of the next one."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What makes a position mean the same samples: the data set and its order."""

    dataset: str
    """Class of the data set."""
    num_samples: int
    content: str = ""
    """The data set's own fingerprint, or a digest of a few samples; empty where neither is known."""
    seed: int
    shuffled: bool
    sampler: str = ""
    """Class of the person's own sampler; empty if there is none."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The state of one loader.

    >>> source = Source(dataset="Lines", num_samples=9, seed=0, shuffled=True)
    >>> ledger = Ledger(source=source, cursor=Cursor(1, 2, 6), world_size=2, weights=(), strategy="hash", batch_size=3)
    >>> Ledger.from_json(ledger.to_json(), source) == ledger
    True
    """

    source: Source
    cursor: Cursor
    world_size: int
    weights: tuple[float, ...]
    """Of the workers, relative; empty if equal."""
    strategy: str
    batch_size: int
    """Samples per global batch; 0 where a sampler decides each time."""
    drawn: str = ""
    """Digest of what the person's sampler drew for this epoch; empty if there is none."""

    def to_json(self) -> dict[str, Any]:
        """Numbers, text, lists and dicts only; equal on all ranks."""
        return {"version": VERSION, **asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, value: object, source: Source) -> Ledger:
        """Read a state back.

        Args:
            value: What :meth:`to_json` gave.
            source: What this run reads.

        Raises:
            DataError: It is no such state, is of a newer version, or belongs to another data set or order.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("version"), int):
            raise DataError(
                f"the state of a loader is a dict with a version, not {_short(value)}.",
                hint="pass what the loader's state_dict() gave",
            )
        if value["version"] > VERSION:
            raise DataError(
                f"the state of the loader has version {value['version']}; this hvdlm reads up to {VERSION}.",
                hint="pip install --upgrade hvdlm",
            )
        try:
            ledger = cls(
                source=Source(**value["source"]),
                cursor=Cursor(**value["cursor"]),
                weights=tuple(float(weight) for weight in value["weights"]),
                **{name: value[name] for name in ("world_size", "strategy", "batch_size", "drawn")},
            )
            numbers = [*asdict(ledger.cursor).values(), ledger.world_size, ledger.batch_size]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the state of the loader is damaged: {error!r}.", hint="use an older copy") from None
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise DataError(f"the state of the loader is damaged: {_short(value)}.", hint="use an older copy")
        compare(ledger.source, source)
        if not source.sampler and ledger.cursor.samples > source.num_samples:
            raise DataError(
                f"the state of the loader is damaged: {ledger.cursor.samples} of {source.num_samples} are done.",
                hint="use an older copy",
            )
        return ledger


_TOLD = {
    "dataset": ("another kind of dataset", "pass the dataset it was made with, or start afresh without the state"),
    "num_samples": ("a dataset of another length", "restore the dataset, or start afresh without the state"),
    "content": ("another dataset (its content differs)", "restore the dataset, or start afresh without the state"),
    "seed": ("another seed, so another order", "give the seed of the state: --seed {was}"),
    "shuffled": ("another order", "set the loader's shuffle as it was: shuffle={was}"),
    "sampler": ("another sampler", "give the loader the sampler it had"),
}


def compare(was: Source, now: Source) -> None:
    """Refuse a position in a source for another one.

    Raises:
        DataError: They differ; says in what.
    """
    for field in fields(Source):
        before, after = getattr(was, field.name), getattr(now, field.name)
        if before != after:
            said, hint = _TOLD[field.name]
            raise DataError(
                f"the state of the loader belongs to {said}: {field.name} was {before!r} and is {after!r}.",
                hint=hint.format(was=before),
            )


def digest_of(parts: Sequence[bytes]) -> str:
    """A short name for some bytes, equal on every machine."""
    hasher = hashlib.blake2b(digest_size=12)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
