"""Trains, saves, is killed by itself, goes on; run by test_resume.py. Saved with the model: which ids it has seen.

``resume_script.py CHECKPOINT RANK STEP SIGNAL DELAY LOADER_WORKERS``: that rank is sent the signal so long after
that step of the whole training began, if it is reached; -1 for none. The last life writes ``CHECKPOINT.done``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm
from hvdlm.api import _current

checkpoint, killed, when, signal_number = Path(sys.argv[1]), *map(int, sys.argv[2:5])
delay, loader_workers = float(sys.argv[5]), int(sys.argv[6])
EPOCHS, SAMPLES, EVERY = 3, 50, 4
torch.set_num_threads(1)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(SAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ahead = {"num_workers": loader_workers, "prefetch_factor": 3} if loader_workers else {}
data = DataLoader(TensorDataset(x, torch.arange(SAMPLES)), batch_size=6, shuffle=True, **ahead)  # type: ignore[arg-type]

seen: list[list[int]] = [[] for _ in range(EPOCHS)]
first, step = 0, 0
state: dict[str, Any] | None = torch.load(checkpoint) if checkpoint.exists() else None
if state is not None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    seen, step = json.loads(state["seen"]), state["step"]
    first = state["loader"]["cursor"]["epoch"]
model, optimizer, data = hvdlm.wrap(model, optimizer, data)
if state is not None:
    data.load_state_dict(state["loader"])


def save() -> None:
    every = _current().adapter.collectives.allgather(json.dumps(recent).encode())
    for payload in every:
        for epoch, ids in json.loads(payload):
            seen[epoch] += ids
    recent.clear()
    values = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": data.state_dict()}
    hvdlm.save({**values, "seen": json.dumps(seen), "step": step}, checkpoint)


recent: list[tuple[int, list[int]]] = []
for epoch in range(first, EPOCHS):
    for inputs, ids in data:
        if step == when and hvdlm.rank() == killed:
            if delay:
                # Wherever it is then: in a collective, while it saves, in the steps after.
                threading.Timer(delay, os.kill, (os.getpid(), signal_number)).start()
            else:
                os.kill(os.getpid(), signal_number)
        optimizer.zero_grad()
        (model(inputs) ** 2).mean().backward()
        optimizer.step()
        step += 1
        recent.append((epoch, ids[: _current().adapter._share.count].tolist()))
        if step % EVERY == 0:
            save()
save()
if hvdlm.is_main():
    checkpoint.with_suffix(".done").write_text("done")
