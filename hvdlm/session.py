"""One training run on this worker: starts the engine, makes objects distributed, keeps the account, closes it."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hvdlm.account import Account, watch
from hvdlm.agreement import agree
from hvdlm.contracts import Adapter, Kind
from hvdlm.environment import Environment
from hvdlm.errors import ConfigError, EngineError, RecognitionError
from hvdlm.joining import share_threads
from hvdlm.observe.events import Events
from hvdlm.observe.progress import Progress
from hvdlm.observe.summary import Summary, write_json
from hvdlm.options import Options, Resolved, resolve
from hvdlm.plan import Share
from hvdlm.private import make_private, open_private
from hvdlm.state.history import History
from hvdlm.state.part import Part
from hvdlm.state.steward import Steward
from hvdlm.state.writer import Writer
from hvdlm.world import World

__all__ = ["Session"]

_log = logging.getLogger("hvdlm")


class Session:
    """What happens between the first object that is made distributed and the closing summary.

    Args:
        adapter: The framework.
        environment: What the environment says.
        code: Options given in the code.
        extras: What the person registered, by name; may grow.
        history: Commits that outlive this session.
        part: This worker's part in an elastic job; None in others.

    Raises:
        ConfigError: An option is unknown or not allowed.
        EngineError: Horovod is missing, unusable, or sees another world than the launcher.
    """

    def __init__(
        self,
        adapter: Adapter,
        environment: Environment,
        code: Mapping[str, object],
        extras: Mapping[str, Any] = MappingProxyType({}),
        history: History | None = None,
        part: Part | None = None,
    ) -> None:
        self.adapter = adapter
        self._environment = environment
        self._code = dict(code)
        self.resolved: Resolved = self._resolve()
        self.world = _start(adapter, environment, self.resolved.options, None if part is None else part.lost)
        if environment.shares_threads and self.world.size > 1:
            share_threads(adapter.collectives, self.world.host)
        self._progress = Progress(self._progress_mode())
        self._found: list[tuple[str, Kind, Any]] = []
        self._run_dir: Path | None = None
        self.account = Account(adapter, self._progress, lambda: self.resolved.options.partition)
        self._watchdog: Any = None
        where = (lambda: self.run_dir) if self.world.is_main else None
        self.events = self.account.events = Events(where, environment.secrets)
        self._extras, self._history, self._part = extras, history, part
        self.steward: Steward | None = None
        """Keeps the state of the training; None if nothing asks for it."""
        self.data_is_shared = False
        """Whether the script shares its data out itself."""
        self._closed = False

    def _resolve(self) -> Resolved:
        return resolve(
            environment=self._environment.options,
            code=self._code,
            config_file=self._environment.config_file,
            command_line=self._environment.command_line,
            host_weights=self._environment.host_weights,
        )

    def _progress_mode(self) -> str:
        shown = self._environment.progress or ("bar" if sys.stderr.isatty() else "lines")
        return shown if self.world.is_main else "none"

    @property
    def run_dir(self) -> Path:
        """Where this run writes; made on rank 0 when first needed."""
        if self._run_dir is None:
            given = self._environment.run_dir
            script = Path(sys.argv[0] or "python").stem or "python"
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            group = self._environment.group
            name = "-".join(filter(None, (stamp, script, group)))
            self._run_dir = Path(given) / group if given else Path("hvdlm-runs") / name
            if self.world.is_main:
                make_private(self._run_dir)
        return self._run_dir

    def configure(self, code: Mapping[str, object]) -> None:
        """Take further options from the code.

        Raises:
            ConfigError: Objects are attached already, and an option would change for them.
        """
        if not code:
            return
        before = self.resolved.options
        self._code.update(code)
        self.resolved = self._resolve()
        if self._found and self.resolved.options != before:
            raise ConfigError(
                f"options changed between two calls of wrap: {', '.join(sorted(code))}.",
                hint="give all options in the first call",
            )

    def attach(self, found: Sequence[tuple[str, Kind, Any]]) -> list[Any]:
        """Make objects distributed; returns what the script uses instead of each.

        Raises:
            MismatchError: Options or objects differ between ranks; names the first difference.
            RecognitionError: Among all objects so far there is neither a model nor an optimizer.
        """
        if not any(kind in ("model", "optimizer") for _, kind, _ in [*self._found, *found]):
            raise RecognitionError(
                "nothing to distribute: neither a model nor an optimizer was recognised, and without one every worker "
                "would train a model of its own.",
                hint="pass them: model, optimizer, loader = hvdlm.wrap(model, optimizer, loader)",
            )
        options = self.resolved.options
        if not self._found:
            for sentence in self.resolved.overridden:
                if self.world.is_main:
                    _log.warning("%s", sentence)
            if self.world.is_main:
                rows, values = self.resolved.table(), options.to_dict()
                config = {name: {"value": values[name], "origin": origin} for name, _, origin in rows}
                write_json(self.run_dir / "config.json", config, self._environment.secrets)
        if self.world.size > 1:
            lines = [f"option {name} = {value}" for name, value, _ in self.resolved.table()]
            agree(self.adapter.collectives, [*lines, *self.adapter.signature(found)])
        if self.world.size > 1 and not self._found:
            own, where = self._environment, lambda: self.run_dir
            self._watchdog = watch(self.account, self.adapter, self.world, options, self.events, where, own)
        if not self._found and (options.elastic or options.checkpoint_dir):
            self.steward = self._keep_state(options)
            self.adapter.follow(self.steward)
        replaced = self.adapter.attach(found, options, self.world, self.account)
        self._found += found
        return replaced

    def _keep_state(self, options: Options) -> Steward:
        """What commits, writes checkpoints, and leads the script to where an earlier run was."""
        writer = Writer(options.checkpoint_dir, options.checkpoint_keep) if options.checkpoint_dir else None
        steward = Steward(
            self.adapter, options, self.world, self.account, self._extras, history=self._history, writer=writer
        )
        steward.on_event = self._on_state
        if self._part is not None:
            steward.on_boundary.append(functools.partial(self._part.boundary, steward))
        if writer is not None:
            writer.on_event = steward.on_event
        return steward

    def _on_state(self, event: str, facts: dict[str, Any]) -> None:
        if event == "restore" and self._part is not None:
            self._part.restored(self.account.samples)
        self.events.add(event, **facts)

    def started(self) -> None:
        """All objects are attached and the script goes on."""
        self._warn_of_hand_drawn_data()
        if self.steward is not None:
            self.steward.begin()

    def _warn_of_hand_drawn_data(self) -> None:
        if self.adapter.data_comes_with_fit or self.world.size == 1:
            return
        if not any(kind in ("loader", "dataset") for _, kind, _ in self._found):
            if self.world.is_main and not self.data_is_shared:
                _log.warning(
                    "no DataLoader or dataset was recognised: each worker gets random streams of its own, and every "
                    "worker counts the same; pass the loader to hvdlm.wrap to have the data shared out"
                )
            self.adapter.randomise(self.resolved.options.seed, self.world.rank)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record metrics on rank 0: a line in ``metrics.jsonl``, and on the screen."""
        if not self.world.is_main or (self.steward is not None and self.steward.skipping):
            return
        numbers = {name: self.adapter.number(value) for name, value in metrics.items()}
        line = {"step": self.account.steps or self.account.batches, "time": time.time(), **numbers}
        with open_private(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._progress.metrics(numbers)
        if self.account.timing is not None:
            self.account.timing.scalars(int(line["step"]), numbers)

    def mean(self, value: Any, weight: float | None) -> Any:
        """The weighted mean of a value over workers, as the type of the value."""
        if weight is None:
            samples = self.adapter.eval_samples()
            weight = 1.0 if samples is None else float(samples)
        # A worker without samples may hold a NaN (0 / 0): its value must not count.
        own = 0.0 if weight == 0 else weight * self.adapter.number(value)
        total, weights = self.adapter.collectives.allreduce(np.array([own, weight], dtype=np.float64)).tolist()
        return self.adapter.like(total / weights if weights else float("nan"), value)

    def finish(self) -> None:
        """Compare replicas, write ``summary.json`` and print the account on rank 0. Every rank calls it."""
        if self._closed or not self._found:
            self.abandon()
            return
        self.adapter.synchronise()
        if self.steward is not None:
            self.steward.finish()
        account = self.account
        seconds = account.seconds()
        losses = [self._mean_loss(account.loss_first), self._mean_loss(account.loss_last)]
        digests = self.adapter.collectives.allgather(self.adapter.digest())
        counted = not account.drawn_at_random and account.batches > 0
        summary = Summary(
            framework=self.adapter.name,
            world_size=self.world.size,
            steps=account.steps or account.batches or account.reductions,
            samples_seen=account.samples,
            samples_missing=account.missing if counted else None,
            samples_repeated=account.repeated if counted else None,
            loss_first=losses[0],
            loss_last=losses[1],
            samples_per_second=round(account.samples / seconds, 3) if seconds else 0.0,
            seconds=round(seconds, 3),
            replicas_identical=len(set(digests)) == 1,
            options=self.resolved.options.to_dict(),
            **account.sharing(),
            **({} if self._part is None else self._part.figures()),
        )
        account.close_timeline()
        self.abandon()
        if self.world.is_main:
            path = summary.write(self.run_dir, self._environment.secrets)
            for line in summary.lines(path):
                self._progress.message(line)

    def _mean_loss(self, record: tuple[Any, Share | None] | None) -> float | None:
        """The loss over the global batch; None if no worker has one."""
        value, weight = 0.0, 0.0
        if record is not None:
            share = record[1]
            weight = 1.0 if share is None else share.fraction
            value = weight * self.adapter.number(record[0]) if weight else 0.0
        total, weights = self.adapter.collectives.allreduce(np.array([value, weight], dtype=np.float64)).tolist()
        return total / weights if weights else None

    def abandon(self, wait: bool = True) -> None:
        """Undo what was changed outside the person's objects; makes no collective, safe to repeat.

        Args:
            wait: Whether to wait until threads have ended; they do by themselves.
        """
        self._closed = True
        self._progress.close()
        if self.steward is not None:
            self.steward.close()
        if self.account.timing is not None:
            self.account.timing.close()
        if self._watchdog is not None:
            self._watchdog.close(wait)
            self._watchdog = None
        self.adapter.detach()


def _start(adapter: Adapter, environment: Environment, options: Options, lost: Callable[[], bool] | None) -> World:
    os.environ.update({"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if options.local_group == "host" else {})
    world = adapter.start(environment.size > 1, lost)
    if world.size != environment.size:
        by_hand = "srun --mpi=pmi2 python train.py, or: " if environment.launcher == "srun" else ""
        raise EngineError(
            f"{environment.launcher} started {environment.size} processes, but Horovod sees {world.size}: it was "
            f"built without what {environment.launcher} needs.",
            hint=f"{by_hand}hvdlm doctor; then hvdlm build-horovod, or start with: hvdlm run -np "
            f"{environment.size} {os.path.basename(sys.argv[0])}",
        )
    return world
