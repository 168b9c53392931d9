"""Training runs over streams, keys and masked targets that must come out the same on any number of workers.

Like torch_cases.py, whose model and ``main`` they share; run by test_torch_data.py.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

import hvdlm
from hvdlm.api import _current
from hvdlm.sources import Stream
from tests.multiprocess import torch_cases
from tests.multiprocess.torch_cases import Gpt, fit, gpt, text

torch_cases.CASES.clear()
case = torch_cases.case


class Masked(Dataset[dict[str, torch.Tensor]]):
    """Rows of which more and more is masked, the first ones wholly: then a worker may have no target at all."""

    def __init__(self, samples: int = 61) -> None:
        self.text = text(samples)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, labels = self.text[index]
        keep = torch.rand(len(labels), generator=torch.Generator().manual_seed(index)) < index / 80
        return {"input_ids": ids, "labels": torch.where(keep, labels, -100), "document": torch.tensor(index // 5)}


def masked_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def train_masked(model: nn.Module, data: DataLoader[Any], loss: Any = masked_loss, **options: Any) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute(**options)
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for _ in range(2):
            for batch in data:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()

    train(model, optimizer, data)
    assert all(p.isfinite().all() for p in model.parameters())
    return model


@case
def targets_masked() -> nn.Module:
    # In order: from the fourth batch on every global batch has targets, but not every row.
    data = torch.utils.data.Subset(Masked(), range(1, 61))
    return train_masked(gpt().double(), DataLoader(data, batch_size=6))


@case
def targets_masked_accumulated() -> nn.Module:
    model = gpt().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @hvdlm.distribute(balance="static", weights=[1.0] * (hvdlm.size() - 1) + [0.0] if hvdlm.size() > 1 else [1.0])
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any]) -> None:
        for step, batch in enumerate(data, 1):
            with contextlib.nullcontext() if step % 3 == 0 else hvdlm.no_sync():
                (masked_loss(model, batch) / 3).backward()
            if step % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()

    train(model, optimizer, DataLoader(torch.utils.data.Subset(Masked(), range(7, 61)), batch_size=6))
    return model


class Causal(Gpt):
    """Shifts labels itself, as the models of Transformers do that say so."""

    loss_type = "ForCausalLM"


@case
def targets_shifted_by_the_model() -> nn.Module:
    torch.manual_seed(3 + hvdlm.rank())

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["input_ids"])[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    data = torch.utils.data.Subset(Masked(), range(7, 61))
    return train_masked(Causal().double(), DataLoader(data, batch_size=6, shuffle=True), loss)


@case
def a_weight_function() -> nn.Module:
    """The loss is a mean over even targets only, in batches that are no dicts."""

    def pairs(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([row["input_ids"] for row in rows]), torch.stack([row["labels"] for row in rows])

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        chosen = batch[1].flatten() % 2 == 0
        return functional.cross_entropy(model(batch[0]).flatten(0, 1)[chosen], batch[1].flatten()[chosen] % 37)

    data = DataLoader(Masked(), batch_size=7, shuffle=True, collate_fn=pairs)
    return train_masked(gpt().double(), data, loss, weight=lambda batch: (batch[1] % 2 == 0).sum())


@case
def targets_all_there() -> nn.Module:
    """Equal numbers of targets weigh as samples do, bit for bit."""

    def run(weight: str) -> nn.Module:
        data = DataLoader([{"input_ids": x, "labels": y} for x, y in text()], batch_size=8, shuffle=True)  # type: ignore[arg-type, var-annotated]
        return train_masked(gpt().double(), data, weight=weight)

    auto, samples = run("auto"), run("samples")
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), samples.parameters(), strict=True))
    return auto


class Drawn(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Text in an order that Python's, NumPy's and torch's random numbers make together."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows = list(text())
        random.shuffle(rows)
        for index in np.random.permutation(len(rows))[torch.randperm(len(rows)).numpy()]:
            yield rows[index]


@case
def stream_drawn_at_random() -> nn.Module:
    random.seed(hvdlm.rank())
    np.random.seed(hvdlm.rank())
    model = gpt().double()
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), DataLoader(Drawn(), batch_size=8))


@case
def stream_in_a_loader_worker() -> nn.Module:
    model = gpt().double()
    data = DataLoader(Drawn(), batch_size=8, num_workers=1, drop_last=True)
    return fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data)


@case
def stream_balanced_with_masks() -> nn.Module:
    rows = [row for row in Masked() if (row["labels"] != -100).any()]
    data = DataLoader(Stream(lambda: iter(rows)), batch_size=8)  # type: ignore[arg-type, var-annotated]
    return train_masked(gpt().double(), data, balance="dynamic")


@case
def keys_of_documents() -> nn.Module:
    model = gpt().double()

    def chunk_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(batch["document"][: _current().adapter._share.count].tolist())
        return masked_loss(model, batch)

    seen: list[int] = []
    rows = [row for row in Masked(400) if (row["labels"] != -100).any()]
    train_masked(model, DataLoader(rows, batch_size=40, shuffle=True), chunk_loss, key="document")  # type: ignore[arg-type]
    if hvdlm.size() > 1:
        counts = np.bincount(seen, minlength=80)
        mostly = np.mean([count in range(3) or count >= 8 for count in counts[1:]])
        # Of a document's 5 chunks in 2 epochs, all or none are computed here, but for those that spill.
        assert mostly > 0.5, counts
    return model


if __name__ == "__main__":
    torch_cases.main(*sys.argv[1:])
