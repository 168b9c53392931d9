"""``hvdlm partition``: which worker would get which share of a data set, before anything is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.partition import (
    STRATEGIES,
    check_weights,
    moved_fraction,
    place,
    skew,
    spill_fraction,
    split_shares,
)
from hvdlm.algorithms.permutation import MAX_SIZE
from hvdlm.algorithms.rendezvous import slot_homes
from hvdlm.algorithms.slots import home_of, slot_counts, slot_of
from hvdlm.cli.rows import count_rows, read_keys
from hvdlm.errors import ConfigError
from hvdlm.plan import Epoch, Partition

__all__ = ["partition"]

Ids = npt.NDArray[np.int64]

_MAX_WORKERS = 1 << 16
_MEASURED = 1 << 22
"""Samples that are really placed to measure spills and moves; the first of an epoch, all of them in a smaller one."""
_BLOCK = 1 << 16
_SHOWN = 64
"""Rows of the table."""
_BAR = 30
"""Characters of the longest bar."""


@click.command()
@click.option("--num-samples", type=int, metavar="N", help="Samples of the data set.")
@click.option("--data", metavar="PATH", help="Count the rows of files: a path, a directory, a glob or a URL.")
@click.option("--key", metavar="COLUMN", help="Column (JSONL, Parquet) that places a row: equal values stay together.")
@click.option("--workers", type=int, metavar="W", help="Number of workers; that of --weights if left out.")
@click.option("--weights", metavar="A,B,...", help="Relative speed of each worker; equal if left out.")
@click.option("--strategy", default="hash", show_default=True, help="hash, random or contiguous.")
@click.option("--batch-size", type=int, default=256, show_default=True, help="Samples per global batch.")
@click.option("--resize-to", type=int, metavar="W", help="Also show what moves when there are W workers instead.")
@click.option("--seed", type=int, default=0, show_default=True, help="The run's seed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def partition(
    num_samples: int | None,
    data: str | None,
    key: str | None,
    workers: int | None,
    weights: str | None,
    strategy: str,
    batch_size: int,
    resize_to: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Show which worker gets which share of a data set, and how much moves on a resize.

    A worker that is added by --resize-to has weight 1. Example:

        hvdlm partition --num-samples 1000000 --weights 1,1,2,4 --resize-to 5
    """
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"--strategy is {strategy!r}; allowed: {', '.join(map(repr, STRATEGIES))}.",
            hint="with partition='none' every worker reads everything, so there is nothing to show"
            if strategy == "none"
            else "hvdlm partition --help describes each option",
        )
    if not 1 <= batch_size <= _MEASURED:
        raise ConfigError(f"--batch-size is {batch_size}; allowed: 1 to {_MEASURED:,}.", hint="try --batch-size 256")
    shares = _weights(workers, weights)
    resized = None if resize_to is None else _resized(shares, resize_to)
    total, keys = _samples(num_samples, data, key)
    plan = _Plan(total, keys, strategy, min(batch_size, total), seed)
    report = _report(plan, shares, resized)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is partitioned, whoever the workers are."""

    num_samples: int
    keys: Ids | None
    """What places each row, by its id; the id itself if None."""
    strategy: str
    batch_size: int
    seed: int

    def ids(self) -> Iterable[Ids]:
        """What places the samples of the first epoch, in its order, in blocks of whole batches, as far as measured."""
        epoch = Epoch(
            partition=Partition(strategy=self.strategy, rank=0, size=1, seed=self.seed),
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            shuffle=self.strategy != "contiguous",
            drop_last=False,
            number=0,
        )
        block = max(1, _BLOCK // self.batch_size) * self.batch_size
        for start in range(0, min(self.num_samples, _MEASURED), block):
            ids = epoch.order(np.arange(start, min(start + block, self.num_samples), dtype=np.int64))
            yield ids if self.keys is None else self.keys[ids]

    def place(self, ids: Ids, weights: Sequence[float], homes: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
        return place(ids, self.batch_size, self.strategy, weights, homes, self.seed)


def _report(plan: _Plan, weights: Sequence[float], resized: Sequence[float] | None) -> dict[str, Any]:
    full, rest = divmod(plan.num_samples, plan.batch_size)
    counts = full * split_shares(plan.batch_size, weights) + split_shares(rest, weights)
    homes = slot_homes(weights) if plan.strategy == "hash" else None
    at_home = _at_home(plan, homes, len(weights)) if homes is not None else None
    return {
        "num_samples": plan.num_samples,
        "num_workers": len(weights),
        "strategy": plan.strategy,
        "batch_size": plan.batch_size,
        "num_batches": full + bool(rest),
        "seed": plan.seed,
        "workers": [
            {
                "worker": worker,
                "weight": weight,
                "count": int(counts[worker]),
                "share": int(counts[worker]) / plan.num_samples,
                "home_count": None if at_home is None else int(at_home[worker]),
            }
            for worker, weight in enumerate(weights)
        ],
        "skew": skew(counts if at_home is None else at_home, weights),
        "spill_fraction": None if homes is None else _spilled(plan, weights, homes),
        "resize": None if resized is None else _moves(plan, weights, resized, homes),
    }


def _at_home(plan: _Plan, homes: npt.NDArray[np.int32], num_workers: int) -> Ids:
    """Samples at home at each worker."""
    if plan.keys is not None:
        return np.bincount(home_of(plan.keys, homes, plan.seed), minlength=num_workers)
    at_home = np.zeros(num_workers, dtype=np.int64)
    np.add.at(at_home, homes, slot_counts(plan.num_samples, len(homes), plan.seed))
    return at_home


def _spilled(plan: _Plan, weights: Sequence[float], homes: npt.NDArray[np.int32]) -> float:
    spilled, placed = 0.0, 0
    for ids in plan.ids():
        spilled += len(ids) * spill_fraction(plan.place(ids, weights, homes), home_of(ids, homes, plan.seed))
        placed += len(ids)
    return round(spilled) / placed


def _moves(
    plan: _Plan, weights: Sequence[float], resized: Sequence[float], homes: npt.NDArray[np.int32] | None
) -> dict[str, Any]:
    if homes is None:
        moved, placed = 0.0, 0
        for ids in plan.ids():
            moved += len(ids) * moved_fraction(plan.place(ids, weights, None), plan.place(ids, resized, None))
            placed += len(ids)
        fraction = round(moved) / placed
    else:
        movers = slot_homes(resized) != homes
        if plan.keys is None:
            in_slot = slot_counts(plan.num_samples, len(homes), plan.seed)
        else:
            in_slot = np.bincount(slot_of(plan.keys, len(homes), plan.seed), minlength=len(homes))
        fraction = int(in_slot[movers].sum()) / plan.num_samples
    num = max(len(weights), len(resized))
    before, after = (np.pad(np.divide(w, np.sum(w)), (0, num - len(w))) for w in (weights, resized))
    return {
        "num_workers": len(resized),
        "weights": list(resized),
        "moved_fraction": fraction,
        "least_fraction": float(np.maximum(after - before, 0).sum()),
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = f"{report['num_samples']:,} samples, {report['num_workers']} workers, partition={report['strategy']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("worker", "weight", "samples", "share", "at home"):
        table.add_column(column, justify="right")
    table.add_column("")
    largest = max(row["count"] for row in report["workers"])
    for row in report["workers"][:_SHOWN]:
        home = "-" if row["home_count"] is None else f"{row['home_count']:,}"
        bar = f"[cyan]{'█' * round(_BAR * row['count'] / largest)}[/]"
        weight, count, share = f"{row['weight']:g}", f"{row['count']:,}", f"{row['share']:.2%}"
        table.add_row(str(row["worker"]), weight, count, share, home, bar)
    console.print(table)
    if report["num_workers"] > _SHOWN:
        console.print(f"... and {report['num_workers'] - _SHOWN} more; --json shows all")
    console.print()
    what = "homes" if report["strategy"] == "hash" else "shares"
    console.print(f"skew            {report['skew']:.4f}   largest over mean of {what} / weight; 1 is even")
    if report["spill_fraction"] is not None:
        console.print(
            f"spill_fraction  {report['spill_fraction']:.4f}   computed away from home, at a global batch of "
            f"{report['batch_size']:,}"
        )
    if report["resize"] is not None:
        resize = report["resize"]
        console.print(
            f"moved_fraction  {resize['moved_fraction']:.4f}   on a resize to {resize['num_workers']} workers; exact "
            f"shares need {resize['least_fraction']:.4f}"
        )


def _weights(workers: int | None, weights: str | None) -> tuple[float, ...]:
    hint = "for example: hvdlm partition --num-samples 1000 --workers 4 --weights 1,1,2,4"
    if workers is not None and not 1 <= workers <= _MAX_WORKERS:
        raise ConfigError(f"--workers is {workers}; allowed: 1 to {_MAX_WORKERS:,}.", hint=hint)
    if weights is None:
        if workers is None:
            raise ConfigError("neither --workers nor --weights was given; one of them is needed.", hint=hint)
        return (1.0,) * workers
    try:
        return check_weights([float(part) for part in weights.split(",")], workers)
    except ValueError as error:
        raise ConfigError(f"--weights is {weights!r}: {error}.", hint=hint) from None


def _resized(weights: tuple[float, ...], resize_to: int) -> tuple[float, ...]:
    if not 1 <= resize_to <= _MAX_WORKERS:
        raise ConfigError(f"--resize-to is {resize_to}; allowed: 1 to {_MAX_WORKERS:,}.", hint="try --resize-to 5")
    resized = weights[:resize_to] + (1.0,) * (resize_to - len(weights))
    if not any(resized):
        raise ConfigError(
            f"--resize-to {resize_to} leaves only workers of weight 0.", hint="put the workers of weight 0 last"
        )
    return resized


def _samples(num_samples: int | None, data: str | None, key: str | None) -> tuple[int, Ids | None]:
    """Number of samples, and what places each if not its id."""
    if (num_samples is None) == (data is None):
        given = "neither --num-samples nor --data" if data is None else "both --num-samples and --data"
        raise ConfigError(f"{given} was given; allowed: one of them.", hint="hvdlm partition --data train.jsonl ...")
    if data is None:
        assert num_samples is not None
        if key is not None:
            raise ConfigError("--key was given without --data: there are no rows to read it from.", hint="add --data")
        if not 1 <= num_samples <= MAX_SIZE:
            raise ConfigError(f"--num-samples is {num_samples}; allowed: 1 to 2**62.", hint="try --num-samples 1000")
        return num_samples, None
    if key is None:
        return count_rows(data), None
    keys = read_keys(data, key)
    return len(keys), keys
