"""Local synchronisation on real workers, each case against an oracle that plays all workers in one process.

``python local_script.py DIRECTORY [WORKERS,WORKERS [--mpi]]`` under a launcher: every rank writes ``CASE.RANK.json``
with how far it is from the oracle, and a digest of its parameters. Numbers of workers are those of hosts that train on
their own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.adapters import torch_planner
from hvdlm.adapters.torch_adapter import TorchAdapter
from hvdlm.algorithms.comm_model import Link
from hvdlm.algorithms.outer import mean_move, nesterov
from hvdlm.algorithms.partition import split_shares
from hvdlm.world import World
from tests.multiprocess.answers import write_answer

SAMPLES, BATCH, EPOCHS, EVERY = 45, 7, 3, 4
NESTEROV = {"outer_optimizer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9}
SGD = {"lr": 0.1, "momentum": 0.9}
OWN = sys.argv[1:] if Path(sys.argv[0]).name == Path(__file__).name else []
HOSTS = [int(workers) for given in OWN[1:2] for workers in given.split(",")]
"""Workers of each host in a job in which hosts train on their own."""


def model_of(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = [nn.BatchNorm1d(9)] if norm else []
    return nn.Sequential(nn.Linear(5, 9), *middle, nn.Tanh(), nn.Linear(9, 3)).double()


def data_of(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.tanh(x[:, :3]) + 0.1)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, reduction: str) -> torch.Tensor:
    squares = (model(x) - y).square()
    return squares.mean() if reduction == "mean" else squares.sum() / 15


def trained(
    make: Callable[[Any], torch.optim.Optimizer], *, norm: bool = False, samples: int = SAMPLES, **options: Any
) -> nn.Module:
    """The script of a person."""

    @hvdlm.distribute(partition="contiguous", sync_every=EVERY, **{"sync": "local", **options})
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> None:
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                loss_of(model, x, y, options.get("reduction", "mean")).backward()
                optimizer.step()

    model = model_of(norm)
    train(model, make(model.parameters()), DataLoader(data_of(samples), BATCH))
    return model


def played(
    make: Callable[[Any], torch.optim.Optimizer], *, norm: bool = False, samples: int = SAMPLES, **options: Any
) -> nn.Module:
    """The same, with all workers played here."""
    shared = model_of(norm)
    # Who trains on its own: workers, or hosts of some each.
    together = HOSTS if options.get("local_group") == "host" else [1] * hvdlm.size()
    bounds, size = np.cumsum([0, *together]), len(together)
    workers = [copy.deepcopy(shared) for _ in range(size)]
    optimizers = [make(worker.parameters()) for worker in workers]
    velocity = [np.zeros(p.shape) for p in shared.parameters()]
    counts, steps, data = [0] * size, 0, data_of(samples)
    outer = {"lr": options.get("outer_lr", 0.7), "momentum": options.get("outer_momentum", 0.9)}

    def average(values: list[torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(mean_move(np.zeros(out.shape), [v.numpy() for v in values], counts)))

    def synchronise() -> None:
        nonlocal counts, steps
        if not steps:
            return
        with torch.no_grad():
            for i, p in enumerate(shared.parameters()):
                ends = [list(worker.parameters())[i].numpy() for worker in workers]
                moved = mean_move(p.numpy(), ends, counts)
                if options.get("outer_optimizer") == "nesterov":
                    new, velocity[i] = nesterov(p.numpy(), moved, velocity[i], **outer)
                else:
                    new = p.numpy() + moved
                p.copy_(torch.from_numpy(new.copy()))
            for i, b in enumerate(shared.buffers()):
                if b.is_floating_point():
                    average([list(worker.buffers())[i].clone() for worker in workers], b)
            if options.get("local_moments") == "average":
                for states in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
                    for key in [k for k, v in states[0].items() if isinstance(v, torch.Tensor) and v.ndim]:
                        mean = torch.zeros_like(states[0][key])
                        average([state[key].clone() for state in states], mean)
                        for state in states:
                            state[key].copy_(mean)
            for worker in workers:
                for own, new in zip(
                    [*worker.parameters(), *worker.buffers()], [*shared.parameters(), *shared.buffers()], strict=True
                ):
                    if own.is_floating_point():
                        own.copy_(new)
        counts, steps = [0] * size, 0

    together_left = LOOKS if options.get("sync") == "auto" else options.get("sync_warmup_steps", 0)
    for _ in range(EPOCHS):
        for at in range(0, samples, BATCH):
            if steps == EVERY:
                synchronise()
            x, y = data[at : at + BATCH]
            if together_left:
                together_left -= 1
                for worker, optimizer in zip(workers, optimizers, strict=True):
                    optimizer.zero_grad()
                    loss_of(worker, x, y, "mean").backward()
                    optimizer.step()
                # The planner chooses between backward and step: the last of these steps is the first that counts.
                steps = int(not together_left and options.get("sync") == "auto")
                shared.load_state_dict(workers[0].state_dict() if not steps else shared.state_dict())
                continue
            ends = np.cumsum([0, *split_shares(len(x), [1.0] * hvdlm.size())])[bounds]
            for i, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
                part = slice(int(ends[i]), int(ends[i + 1]))
                count = part.stop - part.start
                optimizer.zero_grad()
                filler = slice(0, 1)
                loss = loss_of(
                    worker, x[part if count else filler], y[part if count else filler], options.get("reduction", "mean")
                )
                loss = loss * (len(x) / count if options.get("reduction") == "sum" and count else 1.0 if count else 0.0)
                loss.backward()
                optimizer.step()
                counts[i] += count
            steps += 1
        synchronise()
    return shared


CASES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "averaging": (lambda p: torch.optim.SGD(p, **SGD), {}),
    "nesterov": (lambda p: torch.optim.AdamW(p, lr=0.01), NESTEROV),
    "moments_averaged": (lambda p: torch.optim.AdamW(p, lr=0.01), {"local_moments": "average"}),
    "sums": (lambda p: torch.optim.SGD(p, **SGD), {"reduction": "sum"}),
    "fillers": (lambda p: torch.optim.SGD(p, **SGD), {"samples": 43}),  # the last batch has one sample
    "batch_norm": (lambda p: torch.optim.SGD(p, **SGD), {"norm": True, "samples": 42}),
    "small_buckets": (lambda p: torch.optim.SGD(p, **SGD), {"bucket_cap_mb": 0.001}),
    "going_over": (lambda p: torch.optim.SGD(p, **SGD), {"sync": "auto"}),  # over a link that is said to be slow
}
CASES["together_first"] = (
    lambda p: torch.optim.AdamW(p, lr=0.01),
    {**NESTEROV, "sync_warmup_steps": 9, "norm": True, "samples": 42},  # into the second epoch
)
OF_HOSTS = [name for name in CASES if name not in ("small_buckets", "going_over", "together_first")]
LOOKS = 4
"""Steps after which the planner knows how long computing takes."""


def told_of_hosts(start: Callable[..., World]) -> Callable[..., World]:
    """MPI takes two names of this machine for one host: tell hvdlm what the job wants it to be."""

    @functools.wraps(start)
    def told(*args: Any, **kwargs: Any) -> World:
        world = start(*args, **kwargs)
        first = 0
        for workers in HOSTS:
            if world.rank < first + workers:
                break
            first += workers
        return dataclasses.replace(world, local_rank=world.rank - first, local_size=workers)

    return told


def infinity_on_one_rank(**options: Any) -> nn.Module:
    """A scaler skips a step on one rank only: nobody loses count, and the job ends."""

    @hvdlm.distribute(partition="contiguous", sync="local", sync_every=EVERY, **options)
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], scaler: Any) -> None:
        for epoch in range(EPOCHS):
            for number, (x, y) in enumerate(loader):
                optimizer.zero_grad()
                loss = loss_of(model, x, y, "mean")
                if (epoch, number) == (1, 2) and hvdlm.rank() == 1:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

    model = model_of().float()
    x, y = data_of().tensors
    loader = DataLoader(TensorDataset(x.float(), y.float()), BATCH)
    train(model, torch.optim.SGD(model.parameters(), 0.1), loader, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return model


def drawn_by_hand(**options: Any) -> nn.Module:
    """No loader: each worker draws for itself, and the end synchronises what is left."""
    x, y = data_of().tensors

    @hvdlm.distribute(sync="local", sync_every=EVERY, **options)
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(10):
            at = torch.randint(len(x), (4,))
            optimizer.zero_grad()
            loss_of(model, x[at], y[at], "mean").backward()
            optimizer.step()

    model = model_of()
    train(model, torch.optim.SGD(model.parameters(), **SGD))
    return model


def flat(model: nn.Module) -> torch.Tensor:
    values = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return torch.cat([value.detach().double().flatten() for value in values])


def found(run: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    model, oracle = run()
    own = flat(model)
    start = torch.cat([p.detach().flatten() for p in model_of().parameters()])
    result: dict[str, Any] = {
        "digest": own.numpy().tobytes().hex(),
        "moved": float((own[: len(start)] - start).norm()),
    }
    if oracle is not None:
        want = flat(oracle)
        result["far"] = float((own - want).norm() / want.norm())
    return result


def main() -> None:
    directory = Path(sys.argv[1])
    runs: dict[str, Callable[[], tuple[nn.Module, nn.Module | None]]] = {
        name: lambda make=make, options=options: (trained(make, **options), played(make, **options))
        for name, (make, options) in CASES.items()
    }
    if HOSTS:
        group: dict[str, Any] = {"local_group": "host"}
        runs = {
            name: lambda make=make, options={**options, **group}: (trained(make, **options), played(make, **options))
            for name, (make, options) in CASES.items()
            if name in OF_HOSTS
        }
    group = {"local_group": "host"} if HOSTS else {}
    runs |= {"infinity_on_one_rank": lambda: (infinity_on_one_rank(**group), None)}
    runs |= {"drawn_by_hand": lambda: (drawn_by_hand(**group), None)}
    for name, run in runs.items():
        write_answer(directory, name, lambda run=run: found(run))


if __name__ == "__main__":
    torch_planner.measure_link = lambda *_: Link(0.05, 1e4)  # type: ignore[attr-defined]
    if "--mpi" in sys.argv:
        TorchAdapter.start = told_of_hosts(TorchAdapter.start)  # type: ignore[method-assign]
    if not HOSTS:
        hvdlm.init()
    main()
