"""The PyTorch adapter: recognises a script's objects and makes them distributed, in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from hvdlm.adapters.engine import start_horovod, stop_horovod
from hvdlm.adapters.residuals import parted, put_together
from hvdlm.adapters.single import SingleCollectives
from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_capture import Stateful, capture, restore
from hvdlm.adapters.torch_commit import Commits
from hvdlm.adapters.torch_copying import Background
from hvdlm.adapters.torch_job import Job
from hvdlm.adapters.torch_loader import ShardedLoader
from hvdlm.adapters.torch_lr import scale_learning_rates
from hvdlm.adapters.torch_made import Made
from hvdlm.adapters.torch_objects import (
    kind_of,
    like,
    refuse_model,
    refuse_optimizer,
    shard_loaders_over,
    signature_of,
)
from hvdlm.adapters.torch_replicas import Replicas, start_alike
from hvdlm.adapters.torch_state import digest
from hvdlm.adapters.torch_sync import Synchroniser
from hvdlm.adapters.torch_weight import Weigher
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.balancing import starting_weights
from hvdlm.contracts import Collectives, Course, Fingerprint, Kind, Recorder
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.state.course import Straight
from hvdlm.state.snapshot import Snapshot
from hvdlm.world import World

__all__ = ["TorchAdapter"]

Found = Sequence[tuple[str, Kind, Any]]


class TorchAdapter:
    """See :class:`hvdlm.contracts.Adapter`."""

    name = "torch"
    data_comes_with_fit = False

    def __init__(self) -> None:
        self._wire: TorchWire | None = None
        self._watch = BackwardWatch()
        self._sync = Synchroniser(self._watch)
        self._models: list[torch.nn.Module] = []
        self._undo: list[Callable[[], None]] = []
        self._replicas = Replicas()
        self._rank, self._size = 0, 1
        self._pooled = False
        self._background = Background()
        self._eval_samples: int | None = None
        self._weights: tuple[float, ...] | None = None
        self._commits = Commits(self._watch)
        self._course: Course = Straight()
        self._made = Made(self._course, self._sync.parameters)

    def start(self, launched: bool, lost: Callable[[], bool] | None = None) -> World:
        """See :class:`hvdlm.contracts.Adapter`."""
        if not launched:
            return World.single()
        hvd, world = start_horovod("torch", torch.__version__, lost)
        self._wire = TorchWire(hvd)
        return world

    def stop(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if self._wire is not None:
            stop_horovod("torch")
            self._wire = None

    @property
    def collectives(self) -> Collectives:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._wire or SingleCollectives()

    def recognise(self, value: object) -> Kind | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        return kind_of(value)

    def signature(self, found: Found) -> list[str]:
        """See :class:`hvdlm.contracts.Adapter`."""
        return signature_of(found)

    def attach(self, found: Found, options: Options, world: World, recorder: Recorder) -> list[Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        models = [(where, value) for where, kind, value in found if kind == "model"]
        optimizers = [(where, value) for where, kind, value in found if kind == "optimizer"]
        for where, model in models:
            refuse_model(where, model)
        for where, optimizer in optimizers:
            refuse_optimizer(where, optimizer)
        self._models += [model for _, model in models]
        groups = self._sync.groups_of(models, optimizers)
        if self._wire is not None:
            self._rank, self._size = world.rank, world.size
            start_alike(models, optimizers, groups, self._wire, world.is_main)
            job = Job(options, world, self._wire, recorder)
            self._sync.reduce(groups, models, job)
            norms = self._sync.norms(job)
            if norms is not None:
                self._undo.append(norms.remove)
        self._undo += scale_learning_rates(found, options, world)
        self._made.given(found)
        self._replicas.add(models, optimizers, local_norms=options.batch_norm == "local")
        self._watch.install()
        self._watch.before.append(lambda tensors: self._record_loss(recorder, tensors))
        if optimizers:
            hook = optimizers[0][1].register_step_post_hook(lambda *_: recorder.step())
            self._undo.append(hook.remove)
        self._undo += self._commits.follow(optimizer for _, optimizer in optimizers)
        self._sync.follow(optimizers, [self._commits.trained, recorder.step])
        self._sync.prune(models, optimizers, options)
        if options.prune != "none" or options.sync != "global":
            self._background.forbid()
        if self._weights is None:
            self._weights = starting_weights(options, world, self.collectives)
        weights = self._weights
        # A loss that is a sum counts as it is; replicas that train on their own ask nobody at each step.
        by_samples = options.reduction == "sum"
        weigher = Weigher("samples" if by_samples else options.weight, self._models, world.size)
        course = self._background.course(self._sync.course(self._course))
        recorder = self._background.recorder(self._sync.recorder(recorder))

        def sharded(where: str, loader: DataLoader[Any]) -> ShardedLoader:
            own = ShardedLoader(
                loader,
                name=where,
                options=options,
                world=world,
                collectives=self.collectives,
                recorder=recorder,
                evaluating=self._evaluating,
                announce=self._announce,
                evaluated=self._evaluated,
                weights=weights,
                waited=lambda: self.collectives.blocked()[1],
                course=course,
                weigh=lambda share, batch: share if self._sync.alone else weigher.weigh(share, batch, self.collectives),
            )
            return self._commits.add(where, own)

        datasets = {id(value): where for where, kind, value in found if kind == "dataset"}
        if datasets:
            self._undo.append(shard_loaders_over(datasets, sharded))
        return [sharded(where, value) if kind == "loader" else value for where, kind, value in found]

    @property
    def _share(self) -> Share | None:
        return self._sync.share

    def _evaluating(self) -> bool:
        trainable = [m for m in self._models if any(True for _ in m.parameters())]
        return not torch.is_grad_enabled() or (bool(trainable) and not any(m.training for m in trainable))

    def _announce(self, share: Share) -> None:
        self._sync.share = share

    def _evaluated(self, num_samples: int | None) -> None:
        self._eval_samples = num_samples

    def _record_loss(self, recorder: Recorder, tensors: Any) -> None:
        root = tensors if isinstance(tensors, torch.Tensor) else tensors[0] if len(tensors) else None
        if root is not None and root.numel() == 1:
            recorder.loss(root.detach(), self._sync.share)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """See :class:`hvdlm.contracts.Adapter`."""
        with self._sync.no_sync():
            yield

    def eval_samples(self) -> int | None:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._eval_samples

    def randomise(self, seed: int, rank: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        torch.manual_seed(derive_seed("stream", seed, torch.initial_seed(), rank) >> 1)
        np.random.seed(derive_seed("numpy", seed, rank) & 0xFFFFFFFF)

    def digest(self) -> bytes:
        """See :class:`hvdlm.contracts.Adapter`."""
        return digest(self._sync.parameters.values())

    def synchronised(self) -> bool:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._sync.synchronised

    def synchronise(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._sync.synchronise()

    def fingerprints(self) -> list[Fingerprint]:
        """See :class:`hvdlm.contracts.Adapter`."""
        return self._replicas.fingerprints()

    def resync(self, names: Sequence[str], root: int) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        if self._wire is not None:
            self._replicas.resync(names, root, self._wire, self._rank)

    def follow(self, course: Course) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._course, self._made = course, Made(course, self._sync.parameters)
        self._made.install()
        self._background.install()
        self._undo.append(self._made.remove)
        self._watch.before.append(lambda _: course.backward())

    def pool(self, whole: bool) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._pooled = whole
        if whole:
            self._sync.pool()

    def capture(self, kept: Mapping[str, Any], old: Snapshot | None) -> Snapshot:
        """See :class:`hvdlm.contracts.Adapter`."""
        kept = {**kept, **parted(self._sync.state_dict(), self._size, self._pooled)}
        stateful = self._stateful()
        later = self._background.may_copy and bool(stateful.optimizers)
        return self._background.copies(capture(stateful, kept, old, later))

    def restore(self, snapshot: Snapshot, whole: bool, lr_factor: float) -> dict[str, Any]:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._background.wait()
        kept = restore(self._stateful(), snapshot, whole, lr_factor)
        if whole:
            self._sync.load_state_dict(put_together(kept, self._size))
        return kept

    def _stateful(self) -> Stateful:
        own = {id(p) for model in self._models for p in model.parameters()}
        loose = [p for key, p in self._sync.parameters.items() if key not in own]
        return Stateful(models=self._models, loaders=self._commits.loaders, loose=loose, **self._made.everything())

    def number(self, value: Any) -> float:
        """See :class:`hvdlm.contracts.Adapter`."""
        return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)

    def like(self, value: float, example: Any) -> Any:
        """See :class:`hvdlm.contracts.Adapter`."""
        return like(value, example)

    def save(self, value: Any, path: str) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        torch.save(value, path)

    def detach(self) -> None:
        """See :class:`hvdlm.contracts.Adapter`."""
        self._background.remove()
        self._watch.remove()
        self._sync.remove()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
