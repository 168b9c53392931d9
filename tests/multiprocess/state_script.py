"""An unchanged train function, run by test_state.py: killed at some step, started again with --resume.

``state_script.py OUT STYLE KILL_AT``: OUT gets the final parameters and ``OUT.ids.<pid>`` the ids of each step, KILL_AT
is the batch (counted in this life, on rank 0) in which this rank kills itself; -1 for none. STYLE is ``plain`` (nothing
of hvdlm in the loop), ``epochs`` (hvdlm.epochs), ``made`` (optimizer and scheduler made in the function), ``hand`` (no
loader) or ``wrap``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import hvdlm

out, style, kill_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
EPOCHS, SAMPLES, BATCH = 3, 50, 6
torch.set_num_threads(1)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(2))
data = DataLoader(TensorDataset(x, torch.arange(SAMPLES)), batch_size=BATCH, shuffle=True)
valid = DataLoader(TensorDataset(x[:8], torch.arange(8)), batch_size=4)
batches = 0
log = open(f"{out}.ids.{os.getpid()}", "a", encoding="utf-8")  # noqa: SIM115
best: dict[str, Any] = {"loss": 9e9, "epochs": []}


def make(kind: str, model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=27)


def one(model: Any, optimizer: Any, scheduler: Any, inputs: Any, ids: Any, epoch: int) -> None:
    global batches
    if batches == kill_at and hvdlm.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    batches += 1
    steward = hvdlm.api._current().steward
    share = hvdlm.api._current().adapter._share
    count = len(ids) if share is None else share.count
    log.write(json.dumps([steward.position if steward else -1, epoch, ids[:count].tolist()]) + "\n")
    log.flush()
    optimizer.zero_grad()
    (model(inputs) ** 2).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()


def evaluate(model: Any, loader: Any) -> float:
    model.eval()
    with torch.no_grad():
        losses = [float((model(inputs) ** 2).mean()) for inputs, _ in loader]
    model.train()
    return sum(losses) / len(losses)


def train(model: Any, optimizer: Any, scheduler: Any, loader: Any, valid: Any) -> None:
    if style == "made":
        optimizer, scheduler = make(style, model)
    hvdlm.register("best", best)
    for epoch in hvdlm.epochs(EPOCHS) if style == "epochs" else range(EPOCHS):
        for inputs, ids in loader:
            one(model, optimizer, scheduler, inputs, ids, epoch)
        loss = evaluate(model, valid)
        hvdlm.log(epoch=epoch, valid=loss)
        if style == "epochs":
            best["loss"] = min(best["loss"], loss)
            best["epochs"].append(epoch)


def train_by_hand(model: Any, optimizer: Any, scheduler: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(27):
        ids = torch.randint(SAMPLES, (BATCH,), generator=generator)
        one(model, optimizer, scheduler, x[ids], ids, 0)


optimizer, scheduler = (None, None) if style == "made" else make(style, model)
if style == "hand":
    hvdlm.distribute(train_by_hand)(model, optimizer, scheduler)
elif style == "wrap":
    model, optimizer, scheduler, data, valid = hvdlm.wrap(model, optimizer, scheduler, data, valid)
    train(model, optimizer, scheduler, data, valid)
else:
    hvdlm.distribute(train)(model, optimizer, scheduler, data, valid)
torch.save({"model": model.state_dict(), "best": best, "batches": batches}, f"{out}.{os.getpid()}.pt")
