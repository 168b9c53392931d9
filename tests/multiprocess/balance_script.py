"""Workers of unequal speed, 1 to 4 by sleeping in forward; run by test_balance.py. Rank 0 writes what it saw."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.api import _current

SECONDS = (0.003, 0.012)
torch.set_num_threads(1)


class Slow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS[hvdlm.rank()] * len(x))
        return self.linear(x)


def train(balance: str, steps: int) -> list[tuple[float, int]]:
    @hvdlm.distribute(balance=balance)
    def run(model: Any, optimizer: Any, data: Any) -> list[tuple[float, int]]:
        found, start = [], time.perf_counter()
        for x, _ in data:
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
            now = time.perf_counter()
            found.append((now - start, _current().adapter._share.count))
            start = now
        return found

    model = Slow()
    data = DataLoader(TensorDataset(*torch.zeros(2, 16 * steps, 1)), batch_size=16)
    return run(model, torch.optim.SGD(model.parameters(), lr=0.1), data)  # type: ignore[no-any-return]


result = {"even": train("none", 8), "dynamic": train("dynamic", 40)}
if hvdlm.is_main():
    Path(sys.argv[1]).write_text(json.dumps(result))
