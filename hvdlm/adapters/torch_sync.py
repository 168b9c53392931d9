"""How replicas stay one: their gradients are summed at each backward, or they meet every few steps; and what is pruned.

The adapter adds objects and tells of batches; this module knows which options want which parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hvdlm.adapters.torch_backward import BackwardWatch
from hvdlm.adapters.torch_batchnorm import SyncBatchNorms
from hvdlm.adapters.torch_coded import maker_for
from hvdlm.adapters.torch_hosts import Groups, Host, HostReducer
from hvdlm.adapters.torch_job import Job
from hvdlm.adapters.torch_local import LocalSync
from hvdlm.adapters.torch_meeting import SyncedCourse, SyncedRecorder
from hvdlm.adapters.torch_objects import sparse_parameters
from hvdlm.adapters.torch_planner import Planner
from hvdlm.adapters.torch_prune import Pruner, candidates
from hvdlm.adapters.torch_reducer import Reducer
from hvdlm.adapters.torch_warmup import WarmUp
from hvdlm.contracts import Course, Recorder
from hvdlm.options import Options
from hvdlm.plan import Share
from hvdlm.pruning import prunable

__all__ = ["Synchroniser"]

Models = Sequence[tuple[str, torch.nn.Module]]
Optimizers = Sequence[tuple[str, torch.optim.Optimizer]]


class Synchroniser:
    """All that keeps the replicas of one job together.

    Args:
        watch: Tells when backward starts and ends.
    """

    def __init__(self, watch: BackwardWatch) -> None:
        self._watch = watch
        self.parameters: dict[int, torch.nn.Parameter] = {}
        """Every parameter that was given, by its ``id``."""
        self._models: list[torch.nn.Module] = []
        self._reducers: list[Reducer] = []
        self._local: LocalSync | None = None
        self._host: Host | None = None
        self._norms: SyncBatchNorms | None = None
        self._pruner: Pruner | None = None
        self._warm_up = WarmUp()
        self._undo: list[Callable[[], None]] = []
        self._share: Share | None = None
        self._told = 0

    def groups_of(self, models: Models, optimizers: Optimizers) -> list[list[tuple[str, torch.nn.Parameter]]]:
        """Parameters by model, then those only optimizers know; each parameter once, and only new ones."""
        groups = []
        for where, model in models:
            groups.append([(f"{where}.{name}", p) for name, p in model.named_parameters() if self._is_new(p)])
        for where, optimizer in optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            groups.append([(f"{where}.{i}", p) for i, p in enumerate(own) if self._is_new(p)])
        return [group for group in groups if group]

    def _is_new(self, p: torch.nn.Parameter) -> bool:
        known = id(p) in self.parameters
        self.parameters[id(p)] = p
        return not known

    def reduce(self, groups: Groups, models: Models, job: Job) -> None:
        """Let these parameters stay one from now on.

        Args:
            groups: See :meth:`groups_of`.
            models: Where they are from.
            job: How, and over what.
        """
        self._models += [model for _, model in models]
        options = job.options
        if not self._reducers:
            self._warm_up.left = options.compression_warmup_steps
        if options.sync != "global":
            self._add_local(groups, models, job)
        together = options.sync != "local" or options.sync_warmup_steps > 0
        if together and groups:
            reducer = Reducer(
                groups,
                wire=job.wire,
                size=job.world.size,
                mean=options.reduction == "mean",
                make_bucket=self._warm_up.maker_for(options, job.wire),
                **self._shared(options),
            )
            auto = "auto" in (options.compression, options.sync)
            if job.world.size > 1 and (auto or not options.bucket_cap_mb):
                plain = [p for group in groups for _, p in group]
                part = self._part if options.sync == "auto" else None
                told: dict[str, Any] = {"tell": job.recorder.event, "within_host": job.world.within_host}
                make = self._warm_up.maker_for
                Planner(reducer, job.wire, options, plain, self._watch, part=part, make=make, **told)
            reducer.share = self._share
            self._reducers.append(reducer)
        if together:
            self._watch.after.append(lambda: self._tell(job.recorder))

    def _shared(self, options: Options) -> dict[str, Any]:
        return {
            "sparse": sparse_parameters(self._models),
            "watch": self._watch,
            "bucket_cap_bytes": (options.bucket_cap_mb or 32.0) * 2**20,
            "name": f"{len(self._reducers)}",
        }

    def _add_local(self, groups: Groups, models: Models, job: Job) -> None:
        options = job.options
        if self._local is None:
            if options.local_group == "host" and job.world.size > 1:
                host = Host(job.wire, job.world, options)
                self._host = host if host.wire.size > 1 else None
            self._local = LocalSync(
                options=options,
                wire=job.wire,
                size=job.world.size,
                make_bucket=maker_for(options, job.wire, "none" if options.compression == "auto" else None),
                synced=[self._prune_synced, job.recorder.reduced],
                alone=self._host is None,
                asleep=options.sync == "auto" or options.sync_warmup_steps > 0,
                part=self._part,
            )
            self._watch.before.append(self._local.before_backward)
            self._watch.after.append(self._local.after_backward)
        self._local.add([pair for group in groups for pair in group], [model for _, model in models])
        if self._host is not None and groups:
            whole = maker_for(options, self._host.wire, "none")
            self._reducers.append(HostReducer(groups, self._host, make_bucket=whole, **self._shared(options)))

    def _part(self) -> None:
        """All ranks have made the same steps until now; from now on replicas meet now and then."""
        assert self._local is not None
        for reducer in self._reducers:
            reducer.remove()
        self._reducers.clear()
        if self._norms is not None:
            self._norms.remove()
        self._local.wake()

    @property
    def alone(self) -> bool:
        """Whether each worker trains on its own now."""
        return self._local is not None and not self._local.asleep

    def norms(self, job: Job) -> SyncBatchNorms | None:
        """BatchNorm over all that compute one batch together; None where each worker does so alone."""
        host, mean = self._host, job.options.reduction == "mean"
        if job.options.batch_norm == "local" or (self.alone and host is None):
            return None
        wire = job.wire if host is None else host.wire
        own = (lambda: self._share) if host is None else (lambda: host.share)
        self._norms = SyncBatchNorms(self._models, wire, own, size=wire.size, mean=mean)
        return self._norms

    def prune(self, models: Models, optimizers: Optimizers, options: Options) -> None:
        """Prune the models of the script; only those of the first call, which has to have them."""
        if options.prune == "none" or self._pruner is not None or not models:
            return
        found = prunable(candidates(models), options.prune_exclude)
        self._pruner = pruner = Pruner(found, options, self._masked, wait=lambda: self.alone)
        self._watch.after.append(pruner.after_backward)
        if optimizers:
            hook = optimizers[0][1].register_step_post_hook(lambda *_: pruner.step())
            self._undo.append(hook.remove)
            # Other optimizers may hold pruned weights too.
            hooks = [one.register_step_post_hook(lambda *_: pruner.apply()) for _, one in optimizers[1:]]
            self._undo += [hook.remove for hook in hooks]

    def _masked(self, masks: Mapping[int, torch.Tensor]) -> None:
        for reducer in self._reducers:
            reducer.pack(masks)

    def _prune_synced(self) -> None:
        if self._pruner is not None:
            self._pruner.apply()  # the outer step may have moved what is pruned
            self._pruner.synced()
            if self._local is not None:
                self._local.restart()

    @property
    def sparsity(self) -> float | None:
        """Part of the prunable weights that is pruned; None where nothing is."""
        return None if self._pruner is None else self._pruner.sparsity

    def follow(self, optimizers: Optimizers, trained: Sequence[Callable[[], None]]) -> None:
        """See :meth:`hvdlm.adapters.torch_local.LocalSync.follow`."""
        if self._local is not None:
            self._local.follow([optimizer for _, optimizer in optimizers], trained)

    # While training runs.

    @property
    def share(self) -> Share | None:
        """This worker's part of the batch that is trained on now."""
        return self._share

    @share.setter
    def share(self, share: Share) -> None:
        self._share = share
        own = share if self._host is None else self._host.part_of(share)
        for reducer in self._reducers:
            reducer.share = own
        if self._local is not None:
            self._local.share = share

    def course(self, course: Course) -> Course:
        """A course in which replicas meet before anything else is done between two steps."""
        return course if self._local is None else SyncedCourse(course, self._local)

    def recorder(self, recorder: Recorder) -> Recorder:
        """A recorder that hears of the end of an epoch when replicas are equal."""
        return recorder if self._local is None else SyncedRecorder(recorder, self._local)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backwards inside accumulate on each worker."""
        with contextlib.ExitStack() as stack:
            for reducer in self._reducers:
                stack.enter_context(reducer.no_sync())
            yield

    @property
    def synchronised(self) -> bool:
        """Whether replicas are equal now."""
        return self._local is None or self._local.synchronised

    def synchronise(self) -> None:
        """Make replicas equal. Every rank calls it between the same two steps."""
        if self._local is not None:
            self._local.synchronise()

    def _tell(self, recorder: Recorder) -> None:
        count = sum(reducer.reductions for reducer in self._reducers)
        if count > self._told:
            self._warm_up.reduced(count - self._told, self._reducers)
            self._told = count
            recorder.reduced()

    # State.

    def state_dict(self) -> dict[str, Any]:
        """What codecs, outer optimizers and masks remember between two steps."""
        return {
            "reducers": [reducer.state_dict() for reducer in self._reducers],
            "locals": [] if self._local is None else [self._local.state_dict()],
            "as_they_are": self._warm_up.left,
            "together": 0 if self._local is None else self._local.together,
            "pruner": None if self._pruner is None else self._pruner.state_dict(),
        }

    def pool(self) -> None:
        """Share out among all workers what their codecs have not sent yet. Every rank calls it."""
        for reducer in self._reducers:
            reducer.pool()
        if self._local is not None:
            self._local.pool()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; what was not there before starts anew."""
        if self._pruner is not None and state.get("pruner") is not None:
            self._pruner.load_state_dict(state["pruner"])
        self._warm_up.resume(state.get("as_they_are", self._warm_up.left), self._reducers)
        for reducer, own in zip(self._reducers, state.get("reducers", ()), strict=False):
            reducer.load_state_dict(own)
        if self._local is not None:
            self._local.load_state_dict(next(iter(state.get("locals", ())), {}))
            self._local.resume(state.get("together", 0))

    def remove(self) -> None:
        """Take all hooks off."""
        for reducer in self._reducers:
            reducer.remove()
        for undo in reversed(self._undo):
            undo()
        if self._local is not None:
            self._local.remove()
        self._reducers.clear()
        self._undo.clear()
