"""Training runs that must come out the same on any number of workers; each is a script as a person would write it.

``python torch_cases.py DIRECTORY [NAME ...]`` runs them, alone or under a launcher, and rank 0 writes one file a case.
Many cases share a process because starting one costs more than training it.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import hvdlm
from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.algorithms.balance import Balancer

VOCABULARY, WIDTH, CONTEXT, SAMPLES = 37, 16, 12, 61
LONG = 7
"""Epochs of 8 global batches: 56 steps."""
HALVES: dict[str, Any] = {"compression": "fp16", "bucket_cap_mb": 32.0}
"""A size of buckets leaves nothing to plan: the planner may find that halves take longer than they save."""
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A tiny GPT with tied embeddings."""

    def __init__(self, checkpointing: bool | None = None, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, sparse=sparse)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.checkpointing = checkpointing  # None: none; else use_reentrant

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            if self.checkpointing is None or not self.training:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        return self.head(self.norm(x))


def text(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=generator)
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def gpt(**kwargs: Any) -> Gpt:
    # Rank-dependent on purpose: workers must start from rank 0's parameters.
    torch.manual_seed(3 + hvdlm.rank())
    return Gpt(**kwargs)


def loader(**kwargs: Any) -> DataLoader[Any]:
    if "batch_sampler" not in kwargs:
        kwargs.setdefault("batch_size", 8)
        kwargs.setdefault("shuffle", "sampler" not in kwargs)
    return DataLoader(kwargs.pop("dataset", None) or text(), **kwargs)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=reduction)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DataLoader[Any],
    *,
    epochs: int = 2,
    clip: float | None = 0.5,
    set_to_none: bool = True,
    reduction: str = "mean",
    **options: Any,
) -> nn.Module:
    """The usual loop; an epoch has 8 global batches."""

    @hvdlm.distribute(reduction=reduction, **options)
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        model.train()
        for _ in range(epochs):
            for x, y in data:
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = cross_entropy(model, x, y, reduction)
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()

    train(model, optimizer, data)
    return model


@case
def sgd_fp32() -> nn.Module:
    model = gpt()
    return fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader(), epochs=LONG)


@case
def adamw_fp32_foreach() -> nn.Module:
    model = gpt()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True), loader(), epochs=LONG)


@case
def adamw_fp32_fused() -> nn.Module:
    model = gpt()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), loader(), epochs=LONG)


@case
def adamw_fp64() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), epochs=LONG)


@case
def lbfgs_fp64() -> nn.Module:
    model = gpt().double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3, history_size=4)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.LBFGS, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for x, y in data:

                def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model, x, y)
                    loss.backward()
                    # LBFGS compares losses: it has to see that of the global batch.
                    return hvdlm.mean(loss.detach(), weight=len(x))

                optimizer.step(closure)

    # Whole batches only: an empty share's filler would have to count 0 in the closure's mean too.
    train(model, optimizer, loader(drop_last=True))
    return model


@case
def sgd_compressed() -> nn.Module:
    model = gpt()
    return fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader(), epochs=LONG, **HALVES)


@case
def adamw_compressed() -> nn.Module:
    model = gpt()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), epochs=LONG, **HALVES)


@case
def small_buckets() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), bucket_cap_mb=0.002)


@case
def grads_kept_and_zeroed() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), set_to_none=False)


@case
def losses_that_are_sums() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.SGD(model.parameters(), lr=1e-4), loader(), reduction="sum", clip=None)


def accumulate(micro: int, *, no_sync: bool) -> nn.Module:
    """``micro`` micro-batches a step; 8 batches an epoch leave a remainder for 3."""
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for i, (x, y) in enumerate(data):
                last = (i + 1) % micro == 0 or i + 1 == len(data)
                with hvdlm.no_sync() if no_sync and not last else contextlib.nullcontext():
                    (cross_entropy(model, x, y) / micro).backward()
                if last:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()

    train(model, optimizer, loader())
    return model


@case
def sums_accumulated() -> nn.Module:
    """A gradient that is global already must not be summed over workers again."""
    model = gpt().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    @hvdlm.distribute(reduction="sum")
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for i, (x, y) in enumerate(data):
            cross_entropy(model, x, y, "sum").backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    train(model, optimizer, loader())
    return model


for _micro in (1, 2, 3):
    CASES[f"accumulate_{_micro}"] = lambda micro=_micro: accumulate(micro, no_sync=False)
    CASES[f"accumulate_{_micro}_no_sync"] = lambda micro=_micro: accumulate(micro, no_sync=True)


@case
def no_sync_after_sync() -> nn.Module:
    """A global gradient is there already when local accumulation starts."""
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for x, y in data:
                cross_entropy(model, x, y).backward()
                with hvdlm.no_sync():
                    (2 * cross_entropy(model, y, x)).backward()
                (cross_entropy(model, x, y) * 3).backward()
                optimizer.step()
                optimizer.zero_grad()

    train(model, optimizer, loader())
    return model


@case
def checkpoint_reentrant() -> nn.Module:
    model = gpt(checkpointing=True).double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), bucket_cap_mb=0.002)


@case
def checkpoint_not_reentrant() -> nn.Module:
    model = gpt(checkpointing=False).double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), bucket_cap_mb=0.002)


@case
def checkpoint_reentrant_of_everything() -> nn.Module:
    """One layer used in two checkpointed segments: its gradient comes in two parts, in nested backwards."""
    model = gpt(checkpointing=True).double()
    model.blocks[1] = model.blocks[0]
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(), bucket_cap_mb=0.002)


@case
def compiled() -> nn.Module:
    model = gpt().double()
    wrapped = torch.compile(model, backend="aot_eager")
    fit(wrapped, torch.optim.AdamW(model.parameters(), lr=1e-3), loader())
    return model


@case
def two_backwards_one_graph() -> nn.Module:
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                logits = model(x)
                functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward(retain_graph=True)
                (logits**2).mean().backward()
                optimizer.step()

    train(model, optimizer, loader())
    return model


@case
def gradient_penalty() -> nn.Module:
    """torch.autograd.grad over the parameters, with gradients there already, then a backward through it."""
    model = gpt().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(3):
            for x, y in data:
                optimizer.zero_grad()
                (0.1 * cross_entropy(model, x, y)).backward()
                logits = model.head(model.norm(model.tokens(x)))
                loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten())
                grads = torch.autograd.grad(loss, list(model.norm.parameters()), create_graph=True)
                assert all(p.grad is not None for p in model.parameters())
                # A penalty linear in the gradient: only then is the mean over shares that of the batch.
                (loss + 0.1 * sum(g.sum() for g in grads)).backward()
                optimizer.step()

    train(model, optimizer, loader())
    return model


@case
def scheduler_before() -> nn.Module:
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                cross_entropy(model, x, y).backward()
                optimizer.step()
                scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a replaced optimizer would make the scheduler warn
        train(model, optimizer, loader())
    return model


@case
def optimizer_with_state() -> nn.Module:
    """State and hyper-parameters that only rank 0 has right, as after loading a checkpoint on rank 0."""
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + hvdlm.rank()))
    if hvdlm.is_main():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    return fit(model, optimizer, loader())


@case
def unused_parameters() -> nn.Module:
    """Never used, used by some samples only: AdamW's decay must not touch what one process would not touch."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt, self.never = Gpt(), nn.Linear(4, 4)
            self.experts = nn.ModuleList(nn.Linear(VOCABULARY, VOCABULARY) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.gpt(x)
            rows = []
            for row, ids in zip(logits, x, strict=True):
                chosen = int(ids[0]) % 5
                rows.append(self.experts[chosen](row) if chosen < 4 else row)
            return torch.stack(rows)

    torch.manual_seed(3 + hvdlm.rank())
    model = Net().double()
    data = loader(batch_size=3)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.3), data, epochs=3, clip=None)


@case
def unfrozen_midway() -> nn.Module:
    model = gpt().double()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for epoch in range(6):
            for p in model.blocks[0].parameters():
                p.requires_grad_(epoch in (2, 3, 5))
            for x, y in data:
                optimizer.zero_grad()
                cross_entropy(model, x, y).backward()
                optimizer.step()

    train(model, optimizer, loader())
    return model


@case
def sparse_embeddings() -> nn.Module:
    model = gpt(sparse=True, tied=False).double()
    dense = [p for name, p in model.named_parameters() if name != "tokens.weight"]
    optimizers = [torch.optim.SparseAdam([model.tokens.weight], lr=1e-2), torch.optim.AdamW(dense, lr=1e-3)]

    @hvdlm.distribute
    def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], data: DataLoader[Any]) -> None:
        for _ in range(3):
            for x, y in data:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                cross_entropy(model, x, y).backward()
                assert model.tokens.weight.grad.is_sparse
                for optimizer in optimizers:
                    optimizer.step()

    train(model, optimizers, loader())
    return model


@case
def two_models_two_optimizers() -> nn.Module:
    """Alternating backwards, as in a GAN: each reaches one model only."""
    torch.manual_seed(3 + hvdlm.rank())
    models = nn.ModuleDict({"a": Gpt(), "b": Gpt()}).double()
    optimizers = {name: torch.optim.AdamW(models[name].parameters(), lr=1e-3) for name in "ab"}

    @hvdlm.distribute
    def train(a: nn.Module, b: nn.Module, optimizers: dict[str, torch.optim.Optimizer], data: Any) -> None:
        for _ in range(4):
            for i, (x, y) in enumerate(data):
                name, model = ("a", a) if i % 3 else ("b", b)
                optimizers[name].zero_grad()
                cross_entropy(model, x, y).backward()
                optimizers[name].step()

    train(data=loader(), a=models["a"], b=models["b"], optimizers=optimizers)
    return models


@case
def scaler_with_inf_on_one_rank() -> nn.Module:
    """The sample with id 5 overflows: in one process that step is skipped, so it must be on every worker."""
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(SAMPLES)
    data = loader(dataset=TensorDataset(*text().tensors, ids))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    skipped = []

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
        for _ in range(3):
            for x, y, numbers in data:
                optimizer.zero_grad()
                loss = cross_entropy(model, x, y)
                if bool((numbers == 5).any()):
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                before = scaler.get_scale()
                scaler.update()
                skipped.append(scaler.get_scale() < before)

    train(model, optimizer, data)
    assert sum(skipped) == 3, skipped
    assert hvdlm.mean(scaler.get_scale()) == scaler.get_scale()
    return model


@case
def autocast_bfloat16_parameters() -> nn.Module:
    """bfloat16 parameters: Horovod has no such type. Compared loosely: the arithmetic itself is coarse."""
    model = gpt().bfloat16()
    return fit(model, torch.optim.SGD(model.parameters(), lr=0.1), loader(), epochs=2)


@case
def contiguous_in_order() -> nn.Module:
    model = gpt().double()
    data = loader(shuffle=False)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, partition="contiguous")


@case
def random_partition() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(shuffle=False), partition="random")


@case
def everything_everywhere() -> nn.Module:
    model = gpt().double()
    # SGD without clipping: Adam and clipping would hide a gradient that is too large by a factor.
    return fit(model, torch.optim.SGD(model.parameters(), lr=0.1), loader(), partition="none", clip=None)


@case
def dropped_last_batch() -> nn.Module:
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(drop_last=True))


@case
def fillers() -> nn.Module:
    """Tails of one sample (61 = 20 x 3 + 1): the other workers compute a filler, here one that gives NaN.

    A worker without samples is told by nothing in the script; the filler's batch is poisoned from outside, through the
    share that the session was told of.
    """
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        from hvdlm.api import _current

        fillers = 0
        for _ in range(3):
            for x, y in data:
                optimizer.zero_grad()
                loss = cross_entropy(model, x, y)
                share = _current().adapter._share
                if share.is_filler:
                    loss, fillers = loss * float("nan"), fillers + 1
                loss.backward()
                optimizer.step()
        total = hvdlm.mean(float(fillers)) * hvdlm.size()
        assert (total > 0) == (hvdlm.size() > 1), total

    train(model, optimizer, loader(batch_size=3))
    return model


@case
def weighted_sampler() -> nn.Module:
    """Drawn at random with replacement on rank 0, and respected."""
    model = gpt().double()
    generator = torch.Generator().manual_seed(11 + hvdlm.rank())
    sampler = WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1).tolist(), 50, generator=generator)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(sampler=sampler))


@case
def batch_sampler() -> nn.Module:
    model = gpt().double()
    batches = [list(range(i, min(i + 2 + i % 5, SAMPLES))) for i in range(0, SAMPLES, 3)]
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(batch_sampler=batches))


class Words(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of unequal length, read by worker processes and padded by the person's collate_fn."""

    def __init__(self) -> None:
        self.x, self.y = text().tensors

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = 3 + i % (CONTEXT - 3)
        return self.x[i, :n], self.y[i, :n]


def pad(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.zeros(len(samples), CONTEXT, dtype=torch.long)
    y = torch.zeros(len(samples), CONTEXT, dtype=torch.long)
    for row, (a, b) in enumerate(samples):
        x[row, : len(a)], y[row, : len(b)] = a, b
    return x, y


@case
def loader_workers() -> nn.Module:
    model = gpt().double()
    data = loader(dataset=Words(), collate_fn=pad, num_workers=2, persistent_workers=True, prefetch_factor=3)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, epochs=3)


@case
def dataset_given() -> nn.Module:
    """The train function makes its loaders itself, over datasets it was given."""
    model = gpt().double()

    @hvdlm.distribute
    def train(config: dict[str, Any]) -> None:
        optimizer = torch.optim.AdamW(config["model"].parameters(), lr=1e-3)
        first, _ = torch.utils.data.random_split(config["data"], [40, 21], torch.Generator().manual_seed(1))
        data = DataLoader(first, batch_size=8, shuffle=True)
        assert len(data) == 5
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                cross_entropy(config["model"], x, y).backward()
                optimizer.step()

    train({"model": model, "data": text()})
    return model


@case
def batch_norm() -> nn.Module:
    """Statistics of the global batch, uneven tails and fillers included."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
            self.norm1, self.norm2 = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(CONTEXT, affine=False, momentum=None)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm1(self.tokens(x).transpose(1, 2)).transpose(1, 2)
            return self.head(torch.tanh(self.norm2(x)))

    torch.manual_seed(3 + hvdlm.rank())
    model = Net().double()
    data = loader(batch_size=3)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, epochs=3)


@case
def update_by_hand() -> nn.Module:
    """No optimizer: gradients are global after backward, so any update is right."""
    model = gpt().double()

    @hvdlm.distribute
    def train(model: nn.Module, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for x, y in data:
                model.zero_grad()
                cross_entropy(model, x, y).backward()
                for p in model.parameters():
                    p.data.add_(p.grad, alpha=-0.05)

    train(model, loader())
    return model


@case
def gradients_held_by_the_script() -> nn.Module:
    """References to earlier gradients must not change under the script."""
    model = gpt().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    @hvdlm.distribute
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        previous: list[torch.Tensor] = []
        for _ in range(3):
            for x, y in data:
                optimizer.zero_grad()
                cross_entropy(model, x, y).backward()
                current = [p.grad for p in model.parameters()]
                if previous:
                    with torch.no_grad():
                        for p, old in zip(model.parameters(), previous, strict=True):
                            p.grad = p.grad + 0.3 * old
                previous = current
                optimizer.step()

    train(model, optimizer, loader())
    return model


def weighted(by_size: dict[int, Any], **options: Any) -> nn.Module:
    """Train with weights, and count on the way what each epoch reads."""
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    numbered = TensorDataset(*text().tensors, torch.arange(SAMPLES))
    data = loader(dataset=numbered, **options.pop("loader", {}))
    weights = by_size.get(hvdlm.size(), "")

    @hvdlm.distribute(weights=weights, **options)
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        from hvdlm.api import _current

        for _ in range(3):
            seen, sizes = np.zeros(SAMPLES), []
            for x, y, numbers in data:
                optimizer.zero_grad()
                share = _current().adapter._share
                loss = cross_entropy(model, x, y)
                (loss * float("nan") if share.is_filler else loss).backward()
                optimizer.step()
                seen[numbers[: share.count]] += 1
                sizes.append(share.count)
            every = _current().adapter.collectives.allreduce(seen)
            assert (every == 1).all(), every
            if weights and options["balance"] == "static":
                mine = 8 * weights[hvdlm.rank()] / sum(weights)
                assert all(abs(size - mine) < 1 for size in sizes[:-1]), (sizes, mine)

    train(model, optimizer, data)
    return model


@case
def weights_given() -> nn.Module:
    return weighted({2: (1, 3), 3: (1, 2, 4)}, balance="static")


@case
def weights_given_contiguous() -> nn.Module:
    return weighted({2: (3, 1), 3: (4, 1, 2)}, balance="static", partition="contiguous")


@case
def a_weight_of_zero() -> nn.Module:
    """That worker computes fillers only, here such as give NaN."""
    return weighted({2: (0, 1), 3: (1, 0, 2)}, balance="static")


@case
def weights_calibrated() -> nn.Module:
    return weighted({}, balance="static")


def changing(**options: Any) -> nn.Module:
    """Weights that change every 4 steps, by decree instead of by the clock."""
    turns: list[tuple[float, ...]] = []

    def decree(self: Balancer, seconds: list[float]) -> bool:
        assert all(s > 0 for s in seconds), seconds
        self.weights = tuple(float((i + len(turns)) % 3) for i in range(len(self.weights)))
        turns.append(self.weights)
        return True

    measured, Balancer.update = Balancer.update, decree
    try:
        model = weighted({}, balance="dynamic", **options)
    finally:
        Balancer.update = measured
    assert len(turns) == (5 if hvdlm.size() > 1 else 0), turns
    return model


@case
def weights_changing() -> nn.Module:
    return changing()


@case
def weights_changing_read_ahead() -> nn.Module:
    return changing(loader={"num_workers": 1, "prefetch_factor": 2})


PRUNING = {"prune": "magnitude", "prune_begin": 4, "prune_end": 24, "prune_every": 5}


def pruned_by(optimizer: str = "AdamW", **options: Any) -> nn.Module:
    model = gpt(tied=False).double()
    sent: list[int] = []
    start = TorchWire.start

    def counted(wire: TorchWire, tensor: torch.Tensor, name: str) -> Any:
        if name.startswith("hvdlm.grad"):
            sent.append(tensor.numel())
        return start(wire, tensor, name)

    TorchWire.start = counted
    try:
        make = getattr(torch.optim, optimizer)
        fit(model, make(model.parameters(), lr=1e-2), loader(), epochs=LONG, clip=None, **PRUNING, **options)
    finally:
        TorchWire.start = start
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features != VOCABULARY]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert abs(zeros - (0.5 if "prune_pattern" in options else 0.8)) < 0.01, zeros
    if sent:
        kept = sum(p.numel() for p in model.parameters()) - zeros * sum(w.numel() for w in weights)
        assert sent[-1] < 1.05 * kept + 200 < sent[0], "what is pruned is not sent"
    assert bool(sent) == (hvdlm.size() > 1)
    return model


@case
def pruned() -> nn.Module:
    return pruned_by(prune_exclude="head.weight", prune_sparsity=0.8)


@case
def pruned_layer_by_layer_with_momentum() -> nn.Module:
    return pruned_by("RMSprop", prune_exclude="head.*", prune_sparsity=0.8, prune_scope="layer")


@case
def pruned_two_of_four() -> nn.Module:
    return pruned_by(prune_exclude="head.weight", prune_pattern="2:4")


@case
def wrapped_by_call() -> nn.Module:
    """The last one: a session that began with ``wrap`` goes on, and takes no other options."""
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, data = hvdlm.wrap(model, optimizer, loader(), partition="contiguous")
    for _ in range(4):
        for x, y in data:
            optimizer.zero_grad()
            cross_entropy(model, x, y).backward()
            optimizer.step()
    return model


def main(directory: str, *names: str) -> None:
    torch.set_num_threads(1)
    hvdlm.init()
    for name in names or CASES:
        try:
            model = CASES[name]()
            torch.save(model.state_dict(), Path(directory) / f"{name}.{hvdlm.rank()}.pt")
        except Exception:
            # Every rank fails alike in a case that is wrong, so the others can go on.
            (Path(directory) / f"{name}.{hvdlm.rank()}.err").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
