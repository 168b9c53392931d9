"""A DataLoader whose training batches are this worker's part of the global batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

from hvdlm.adapters.timed import timed
from hvdlm.adapters.torch_reader import Feed, make_reader, refuse, source_of
from hvdlm.adapters.torch_sampler import Draws, is_custom
from hvdlm.adapters.torch_stream import StreamFeed, is_stream
from hvdlm.agreement import agree
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.ledger import Cursor, Ledger, Source
from hvdlm.balancing import Pace, steps_between
from hvdlm.contracts import Collectives, Course, Recorder
from hvdlm.errors import DataError
from hvdlm.keys import make_keys
from hvdlm.options import Options
from hvdlm.plan import Epoch, Partition, Share, shares_of_batches
from hvdlm.state.course import Straight
from hvdlm.world import World

__all__ = ["ShardedLoader"]


class ShardedLoader:
    """Stands in for a person's DataLoader and forwards what it does not change.

    Iterated while training, it yields this worker's share of each global batch, with the person's dataset, collate
    function and worker settings. Iterated in eval mode or under no-grad, it yields all batches on every worker, in the
    same order on each (``eval="whole"``), or this worker's share of them (``eval="sharded"``).

    Args:
        loader: The person's loader.
        name: Where it was found, for messages.
        options: What to do.
        world: Where this process stands.
        collectives: To agree on the order of a custom sampler.
        recorder: Told of every training batch.
        evaluating: Whether an iteration that starts now is an evaluation.
        announce: Told of each training share before its batch is handed out.
        weights: Relative speed of each worker at the start; equal if empty.
        waited: Seconds that this worker has waited for others so far.
        course: Told of the boundaries between steps; says which epochs were completed before the run went on.
        weigh: Says what a share counts by, from its batch.
        evaluated: Told how many samples this worker has read so far in an evaluation that is shared out, None in one
            that is read whole.

    Raises:
        DataError: The loader's data cannot be shared out rightly; says why.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        name: str,
        options: Options,
        world: World,
        collectives: Collectives,
        recorder: Recorder,
        evaluating: Callable[[], bool],
        announce: Callable[[Share], None],
        evaluated: Callable[[int | None], None],
        weights: tuple[float, ...] = (),
        waited: Callable[[], float] = lambda: 0.0,
        course: Course | None = None,
        weigh: Callable[[Share, Any], Share] = lambda share, _: share,
    ) -> None:
        refuse(loader, name, options, world)
        self._loader, self._name = loader, name
        self._course = course or Straight()
        self._options, self._world = options, world
        self._collectives, self._recorder = collectives, recorder
        self._evaluating, self._announce, self._evaluated = evaluating, announce, evaluated
        self._weigh = weigh
        self._stream: StreamFeed | None = None
        keys, self._num_samples = None, 0
        if is_stream(loader):
            self._stream = StreamFeed(
                loader,
                name=name,
                seed=options.seed,
                batch_size=self.batch_size_of_job,
                rank=world.rank,
                size=world.size,
                collectives=collectives,
            )
        else:
            self._num_samples = len(loader.dataset)  # type: ignore[arg-type]  # only of data that has a length
            keys = make_keys(options.key, loader.dataset, name, collectives, world.is_main)
        partition = Partition(
            strategy=options.partition, rank=world.rank, size=world.size, seed=options.seed, weights=weights, keys=keys
        )
        follow: dict[str, Any] = {"dynamic": options.balance == "dynamic", "every": steps_between(options)}
        self._pace = Pace(partition, world=world, collectives=collectives, waited=waited, **follow)
        self._whole = Partition(strategy="none", rank=0, size=1, seed=options.seed)
        self._epoch = 0
        self._evaluation = 0
        self._feeds: dict[str, tuple[Feed, DataLoader[Any]]] = {}
        self._done = self._handed_out = Cursor()
        self._told_trained = False
        self._start: Ledger | None = None
        self._draws = (
            None if self._stream or not is_custom(loader) else Draws(loader, name, options, world, collectives)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    @property
    def __class__(self) -> type:
        # isinstance(loader, DataLoader) in the person's code goes on being true.
        return type(self._loader)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a sharded loader cannot be changed")

    def __len__(self) -> int:
        """Global batches in a training epoch."""
        if self._stream is not None:
            return self._stream.num_batches()
        return len(self._training_epoch(0)) if self._draws is None else len(self._draws)

    def __iter__(self) -> Iterator[Any]:
        return self._course.evaluation(self._evaluate()) if self._evaluating() else self._train()

    @property
    def batch_size_of_job(self) -> int:
        """Samples per global training batch; 0 where the person's batch sampler decides each time."""
        own = self._loader.batch_size or 0
        return own * (self._world.size if self._options.batch == "per_worker" else 1)

    def _shuffled(self) -> bool:
        return isinstance(self._loader.sampler, RandomSampler) or self._options.partition == "random"

    def _training_epoch(self, number: int, done: Cursor = Cursor()) -> Epoch:  # noqa: B008 (it is frozen)
        return Epoch(
            partition=self._pace.partition,
            num_samples=self._num_samples,
            batch_size=self.batch_size_of_job,
            shuffle=self._shuffled(),
            drop_last=bool(self._loader.drop_last),
            number=number,
            batches_done=done.batch,
            samples_done=done.samples,
            block_order=getattr(self._loader.dataset, "block_order", None),
        )

    def _source(self) -> Source:
        if self._stream is not None:
            return self._stream.source()
        custom = self._draws is not None
        return source_of(self._loader, seed=self._options.seed, shuffled=self._shuffled(), custom=custom)

    def state_dict(self) -> dict[str, Any]:
        """What has been trained on so far: to be saved together with the model, by :func:`hvdlm.save` or as JSON.

        A batch counts from the optimizer's step on; where hvdlm knows of no optimizer, from the end of its backward on.
        The state is the same on every rank, and a run of any number of workers can go on from it.
        """
        return Ledger(
            source=self._source(),
            cursor=self._done,
            world_size=self._world.size,
            weights=tuple(self._pace.partition.weights),
            strategy=self._options.partition,
            batch_size=self.batch_size_of_job,
            drawn="" if self._draws is None else self._draws.digest_in(self._done.epoch),
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken: the next iteration reads the rest of its epoch. Every rank loads it.

        Raises:
            DataError: The state is of another data set, order, or newer version.
        """
        self._start = Ledger.from_json(state, self._source())
        was, now = self._start.batch_size, self.batch_size_of_job
        if was != now and self._shuffled() and hasattr(self._loader.dataset, "block_order"):
            raise DataError(
                f"{self._name}: global batches were of {was} samples and are of {now}, and this dataset shuffles its "
                "blocks by that size: the rest of the epoch would not be what was left.",
                hint=f'keep batch="global" and batch_size={was}',
            )
        self._done = self._handed_out = self._start.cursor
        self._epoch = self._start.cursor.epoch
        self._pace.restart(self._start.weights)

    def trained(self) -> None:
        """The model has taken in what was handed out."""
        self._told_trained = True
        self._done = self._handed_out

    def _train(self) -> Iterator[Any]:
        if self._course.done(self._name, self._epoch):
            self._epoch += 1
            return
        start, self._start = self._start, None
        cursor = Cursor(self._epoch) if start is None else start.cursor
        if self._world.size > 1 and (start is not None or "train" not in self._feeds):
            agree(self._collectives, [f"{self._name} starts at {cursor}"])
        number = self._epoch
        self._epoch += 1
        self._pace.epoch()
        planned_at = self._pace.partition_at
        batches: Iterator[tuple[Share, Any]]
        if self._stream is not None:
            self._recorder.epoch(self._name, number, 0, 0, 0)
            fixed = self._options.balance != "dynamic"
            batches = self._stream.batches(
                number, planned_at, fixed=fixed, first_batch=cursor.batch, start=cursor.samples
            )
        elif self._draws is not None:
            drawn = self._draws.batches() if start is None else self._draws.replay(start)
            self._recorder.epoch(self._name, number, 0, sum(map(len, drawn)), len(drawn))
            batches = self._read("train", shares_of_batches(planned_at, drawn, cursor.batch), cursor.batch)
        else:
            self._check_length()
            epoch = self._training_epoch(number, cursor)
            planned = epoch.num_planned - cursor.samples
            self._recorder.epoch(self._name, number, epoch.num_samples, planned, len(epoch) - cursor.batch)
            batches = self._read("train", epoch.shares(partition_at=planned_at), cursor.batch)
        for share, batch in timed(batches, self._recorder.data):
            share = self._weigh(share, batch)
            self._announce(share)
            self._recorder.batch(share, number, self._name)
            # Random streams (dropout) are a function of the step and the rank: replicas draw different masks, and
            # nothing bound to a rank has to be saved.
            torch.manual_seed(derive_seed("step", self._options.seed, number, cursor.batch, self._world.rank) >> 1)
            samples = share.total // (self._world.size if self._options.partition == "none" else 1)
            cursor = self._handed_out = Cursor(number, cursor.batch + 1, cursor.samples + samples)
            self._pace.handed_out(len(share.ids))
            yield batch
            self._pace.asked(self._stream.planned if self._stream is not None else self._feeds["train"][0].planned)
            if not self._told_trained:
                self._done = cursor  # nobody tells: what the script asks for more after, it has used
            if self._done == cursor:
                self._course.boundary()
        self._done = self._handed_out = Cursor(number + 1)
        homes = self._stream is None and self._world.size > 1
        skew = self._pace.partition.home_skew(self._num_samples) if homes else None
        self._recorder.epoch_done(self._name, number, skew)

    def _evaluate(self) -> Iterator[Any]:
        number = self._evaluation
        self._evaluation += 1
        sharded = self._options.eval == "sharded"
        partition = self._pace.partition if sharded else self._whole
        self._pace.disturbed()
        batches: Iterator[tuple[Share, Any]]
        if self._stream is not None:
            batches = self._stream.evaluation(number, partition)
        elif self._draws is not None:
            batches = self._read_own(shares_of_batches(lambda _: partition, self._draws.batches()))
        else:
            self._check_length()
            batches = self._read_own(
                Epoch(
                    partition=partition,
                    num_samples=self._num_samples,
                    batch_size=self._loader.batch_size or 1,
                    shuffle=self._shuffled(),
                    drop_last=bool(self._loader.drop_last),
                    number=number,
                    block_order=getattr(self._loader.dataset, "block_order", None),
                ).shares()
            )
        num_samples = 0
        self._evaluated(0 if sharded else None)
        for share, batch in batches:
            num_samples += share.count
            self._evaluated(num_samples if sharded else None)
            yield batch

    def _check_length(self) -> None:
        now = len(self._loader.dataset)  # type: ignore[arg-type]  # only of data that has a length
        if now != self._num_samples:
            raise DataError(
                f"{self._name}: its dataset had {self._num_samples} samples when hvdlm got it and has {now} now.",
                hint="make a new DataLoader for the new data and pass it to hvdlm.wrap, or keep the dataset as it is",
            )

    def _read_own(self, shares: Iterator[Share]) -> Iterator[tuple[Share, Any]]:
        # No collective waits for the others in an evaluation, so an empty share needs no filler.
        return self._read("eval", (s for s in shares if not s.is_filler))

    def _read(self, purpose: str, shares: Iterator[Share], first_batch: int = 0) -> Iterator[tuple[Share, Any]]:
        feed, reader = self._feeds.get(purpose) or self._feeds.setdefault(purpose, make_reader(self._loader))
        feed.start(shares, first_batch)
        for batch in reader:
            yield feed.taken.popleft(), batch
